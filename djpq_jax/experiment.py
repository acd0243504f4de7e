"""One experiment from its config to its report.

    data -> float model -> compress -> search -> plan -> finetune -> harden
         -> artifact -> reload -> evaluate -> report

Each arrow is one function here; comparisons put them together differently.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import allocate
from djpq_jax import budget as budget_lib
from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import data
from djpq_jax import harden
from djpq_jax import losses
from djpq_jax import models
from djpq_jax import optim
from djpq_jax import train

CALIBRATION_IMAGES = 256
METHODS = ('djpq', 'uniform', 'float')

# Called with (phase, steps done, steps in all, metrics).
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclasses.dataclass
class Run:
  """What the phases of one experiment share."""

  config: Any
  train_split: data.Split
  test_split: data.Split
  progress: Progress
  history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  steps_done: int = 0

  def batches(self, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """The batch of each step number of a phase."""
    augment = data.Augment(**self.config.augment)

    def batch_at(step):
      return data.train_batch(
        self.train_split,
        step,
        batch_size=self.config.batch_size,
        seed=seed,
        augment=augment,
      )

    return batch_at

  def sample(self) -> np.ndarray:
    """Images to calibrate on, as training sees them but not augmented."""
    count = min(CALIBRATION_IMAGES, len(self.train_split))
    return data.train_batch(
      self.train_split, 0, batch_size=count, seed=self.config.seed
    )['image']

  def steps(self, epochs: float) -> int:
    """Steps of so many epochs."""
    per_epoch = data.steps_per_epoch(self.train_split, self.config.batch_size)
    return round(epochs * per_epoch)


def prepare(config, progress: Progress | None = None) -> Run:
  """Loads the data and checks that config, data and model fit together."""
  if config.method not in METHODS:
    raise ValueError(
      f'unknown method {config.method!r}; there are {", ".join(METHODS)}'
    )
  train_split, test_split = data.load(
    config.data.name, data_dir=config.data.dir or None
  )
  return Run(config, train_split, test_split, progress or (lambda *_: None))


def dense_model(run: Run):
  """The untrained float model of the config."""
  config = run.config
  model = models.create(
    config.model.name, seed=config.seed, **config.model.kwargs
  )
  shape = run.train_split.images.shape[1:]
  if tuple(model.input_shape) != shape:
    raise ValueError(
      f'model {config.model.name} takes images of shape '
      f'{tuple(model.input_shape)}, but {config.data.name} has {shape}; set '
      'model.kwargs.input_shape or choose another model'
    )
  return model


def _phase(run: Run, name: str, state: train.TrainState, steps: int):
  """Runs one phase to its end and records its history."""
  seed = run.config.seed * 10 + ('float', 'search', 'finetune').index(name)

  def on_log(step, metrics):
    row = {'phase': name, 'step': run.steps_done + step, **metrics}
    run.history.append({k: _plain(v) for k, v in row.items()})
    run.progress(name, step, steps, metrics)

  state = train.fit(
    state,
    run.batches(seed),
    steps,
    log_every=max(1, min(50, steps // 20)),
    on_log=on_log,
  )
  run.steps_done += steps
  return state


def _plain(value):
  return value if isinstance(value, (str, int)) else float(value)


def _optimizer(phase, steps: int):
  config = optim.OptimizerConfig(**phase.optimizer)
  return optim.make(config, steps)


def train_float(run: Run, model):
  """Trains the model before it is compressed."""
  phase = run.config.float
  steps = run.steps(phase.epochs)
  if not steps:
    return model
  objective = train.Objective(smoothing=phase.smoothing)
  state = train.init(
    model, objective, _optimizer(phase, steps), seed=run.config.seed
  )
  return train.model_of(_phase(run, 'float', state, steps))


def compressed(run: Run, model) -> compress.Compressed:
  """Attaches gates and quantizers as the config's rules say."""
  rules = [compress.Rule(**rule) for rule in run.config.rules]
  return compress.compress(model, rules, run.sample())


def search(run: Run, model: compress.Compressed, teacher=None):
  """Learns channels and bits; the budget is reached by a controller."""
  phase, budget = run.config.search, run.config.budget
  choices = run.config.bit_choices or None
  steps = run.steps(phase.epochs)
  controller = None
  if budget:
    allocate.check_reachable(model, budget, choices)
    start = float(jax.jit(_relative_bops(model))())
    controller = budget_lib.Controller(
      budget=budget, start=start, steps=max(1, steps), ramp=phase.ramp
    )
  objective = train.Objective(
    smoothing=phase.smoothing,
    distill=phase.distill,
    temperature=phase.temperature,
    noisy=True,
    kl_weight=phase.kl_weight,
    strength=phase.strength,
    controller=controller,
    ramp_steps=round(phase.ramp * steps),
  )
  state = train.init(
    model,
    objective,
    _optimizer(phase, max(1, steps)),
    seed=run.config.seed + 1,
    teacher=teacher if phase.distill else None,
  )
  return train.model_of(_phase(run, 'search', state, steps))


def _relative_bops(model):
  graphdef, state = nnx.split(model)
  pure = nnx.as_pure(state)
  return lambda: losses.relative_bops(nnx.merge(graphdef, pure))


def finetune(run: Run, model: compress.Compressed, teacher=None):
  """Trains what is left, at its bits; then re-estimates batch norm."""
  phase = run.config.finetune
  steps = run.steps(phase.epochs)
  objective = train.Objective(
    smoothing=phase.smoothing,
    distill=phase.distill,
    temperature=phase.temperature,
  )
  state = train.init(
    model,
    objective,
    _optimizer(phase, max(1, steps)),
    seed=run.config.seed + 2,
    teacher=teacher if phase.distill else None,
  )
  model = train.model_of(_phase(run, 'finetune', state, steps))
  batch_at = run.batches(run.config.seed * 10 + 9)
  count = run.config.statistics_batches
  return train.estimate_statistics(
    model, (batch_at(i)['image'] for i in range(count))
  )


def predictions(model, split: data.Split, batch_size: int = 256) -> np.ndarray:
  """Logits on every image of a split, float32 [N, classes]."""
  batches = list(data.eval_batches(split, batch_size))
  logits = train.predict(model, (b['image'] for b in batches))
  return logits[np.concatenate([b['mask'] for b in batches]) > 0]


def accuracy(logits: np.ndarray, split: data.Split) -> float:
  """Share of a split's images that the logits get right."""
  return float((logits.argmax(-1) == split.labels).mean())


def evaluate(model, split: data.Split, batch_size: int = 256) -> float:
  """Share of a split's images that a model gets right."""
  return accuracy(predictions(model, split, batch_size), split)


def settle(run: Run, model: compress.Compressed) -> compress.Plan:
  """The plan that the config's method makes of a compressed model."""
  config = run.config
  if config.method == 'uniform':
    return allocate.uniform(model, *config.uniform_bits)
  return allocate.plan(
    model, config.budget or None, config.bit_choices or None
  )


def run(config, workdir, progress: Progress | None = None) -> dict[str, Any]:
  """Runs a whole experiment.

  Args:
    config: complete, from `config.load`.
    workdir: where the artifact goes; made if it is missing.
    progress: told about every look at the metrics.

  Returns:
    The report as JSON-ready values, see `report`.  All that it says of the
    hardened model was recomputed from the reloaded artifact.
  """
  start = time.monotonic()
  workdir = pathlib.Path(workdir)
  this = prepare(config, progress)
  model = dense_model(this)
  check = compressed(this, model)
  if config.method == 'djpq' and config.budget:
    allocate.check_reachable(check, config.budget, config.bit_choices or None)
  del check
  model = train_float(this, model)
  float_accuracy = evaluate(model, this.test_split)
  net = compressed(this, model)
  if config.method == 'djpq':
    net = search(this, net, teacher=model)
  plan = settle(this, net)
  net = compress.freeze(net, plan, this.sample())
  net = finetune(this, net, teacher=model)
  hardened = harden.harden(net)
  return _deploy(this, hardened, workdir, float_accuracy, start)


def _deploy(run: Run, hardened, workdir, float_accuracy, start):
  """Saves, reloads and measures; the report speaks of the reloaded model."""
  folder = workdir / 'artifact'
  before = predictions(hardened, run.test_split)
  shape = run.test_split.images.shape[1:]
  sample = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  rows = harden.count(hardened, sample)
  config = run.config
  checkpoint.save(
    folder,
    hardened,
    rows,
    model_spec={
      'name': config.model.name,
      'kwargs': config.model.kwargs.to_dict(),
    },
    input_shape=shape,
    more={
      'accuracy': accuracy(before, run.test_split),
      'float_accuracy': float_accuracy,
      'measured_on': {'data': config.data.name, 'images': len(before)},
    },
  )
  reloaded = load_artifact(folder)
  logits = predictions(reloaded, run.test_split)
  if not np.array_equal(logits, before):
    raise RuntimeError(
      'the reloaded artifact does not predict what was saved; this is a bug'
    )
  rows = harden.count(reloaded, sample)
  return {
    'float_accuracy': float_accuracy,
    'accuracy': accuracy(logits, run.test_split),
    'budget': config.budget or None,
    **harden.totals(reloaded, rows),
    'artifact': folder.name,
    'artifact_bytes': checkpoint.size_bytes(folder),
    'float_bytes': 4 * _parameters(dense_model(run)),
    'seconds': time.monotonic() - start,
    'seed': config.seed,
    'config': config.to_dict(),
    'layers': [vars(row) for row in rows],
    'groups': groups(reloaded),
    'history': run.history,
  }


def load_artifact(folder):
  """Loads an artifact of one of the models of this package."""
  spec = checkpoint.read_manifest(folder)['model']
  return checkpoint.load(
    folder, lambda: models.create(spec['name'], **spec['kwargs'])
  )


def _parameters(model) -> int:
  leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
  return sum(leaf.size for leaf in leaves)


def groups(model: compress.Compressed) -> list[dict[str, Any]]:
  """Name, size, kept channels and reason of every channel group."""
  masks = compress.open_masks(model.structure)
  return [
    {
      'name': g.name,
      'size': g.size,
      'kept': int(mask.sum()),
      'reason': g.reason,
    }
    for g, mask in zip(model.structure.groups, masks)
  ]
