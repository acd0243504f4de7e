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
from djpq_jax import evaluation
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import losses
from djpq_jax import models
from djpq_jax import optim
from djpq_jax import train
from djpq_jax.models import torch_weights

CALIBRATION_IMAGES = 256
METHODS = ('djpq', 'two_stage', 'uniform')

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
  if not 0 <= config.budget < 1:
    raise ValueError(
      'budget is a fraction of the float32 BOPs below 1, or 0 for coefficient '
      f'mode; got {config.budget}'
    )
  macs = config.two_stage_macs
  if config.method == 'two_stage' and not (config.budget and 0 < macs < 1):
    raise ValueError(
      'method two_stage needs a budget, and two_stage_macs between 0 and 1; '
      f'got {config.budget} and {macs}'
    )
  for phase in (config.float, config.search, config.finetune):
    optim.OptimizerConfig(**phase.optimizer)  # checks itself
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
  if config.model.weights:
    arrays = torch_weights.read_state_dict(config.model.weights)
    torch_weights.assign(model, arrays)
  return model


def dense_structure(config) -> compress.Structure:
  """Layers and channel groups of a config's model, from its shapes alone."""
  spec = config.model
  model = nnx.eval_shape(lambda: models.create(spec.name, **spec.kwargs))
  sample = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
  graph = graph_lib.trace(compress.eval_view(model), sample)
  return compress.resolve(graph, rules_of(config))


def rules_of(config) -> list[compress.Rule]:
  """The rules that a config states."""
  known = [field.name for field in dataclasses.fields(compress.Rule)]
  rules = [dict(rule) for rule in config.rules]
  for rule in rules:
    unknown = sorted(rule.keys() - set(known))
    if unknown or 'pattern' not in rule:
      what = f'has no field {unknown[0]!r}' if unknown else 'needs a pattern'
      raise ValueError(f'rule {rule} {what}; known: {", ".join(known)}')
  return [compress.Rule(**rule) for rule in rules]


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


def compressed(run: Run, model, rules=()) -> compress.Compressed:
  """Attaches gates and quantizers as the config's rules, then `rules`, say."""
  given = rules_of(run.config)
  return compress.compress(model, [*given, *rules], run.sample())


def search(
  run: Run,
  model: compress.Compressed,
  teacher,
  *,
  budget: float | None,
  epochs: float,
):
  """Learns channels and bits; a controller leads them to the budget."""
  phase = run.config.search
  steps = run.steps(epochs)
  controller = None
  if budget:
    controller = budget_lib.Controller(
      budget=budget,
      start=float(jax.jit(_relative_bops(model))()),
      steps=max(1, steps),
      ramp=phase.ramp,
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


def finetune(run: Run, model: compress.Compressed, teacher, *, epochs: float):
  """Trains what is left, at its bits; then re-estimates batch norm."""
  phase = run.config.finetune
  steps = run.steps(epochs)
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
  train.check_alive(model, run.sample())
  batch_at = run.batches(run.config.seed * 10 + 9)
  count = run.config.statistics_batches
  return evaluation.estimate_statistics(
    model, (batch_at(i)['image'] for i in range(count))
  )


def djpq(run: Run, model) -> compress.Compressed:
  """Searches channels and bits together, then carries the plan out."""
  config = run.config
  budget, choices = config.budget or None, config.bit_choices or None
  net = compressed(run, model)
  net = search(run, net, model, budget=budget, epochs=config.search.epochs)
  plan = allocate.plan(net, budget, choices)
  return compress.freeze(net, plan, run.sample())


def two_stage(run: Run, model) -> compress.Compressed:
  """The control: first prunes channels, then learns bits, at equal epochs.

  Each stage has half of the search's epochs.  The first stage gets its own
  budget of MACs, the second one what is left of the BOPs budget.
  """
  config = run.config
  epochs = config.search.epochs / 2
  macs = config.two_stage_macs
  net = compressed(run, model, [compress.Rule(pattern='*', quantize=False)])
  net = search(run, net, model, budget=macs, epochs=epochs)
  first = allocate.plan(net, macs)
  structure = net.structure
  left = allocate.relative_bops(structure, first)
  pruned = compress.fold_gates(compress.freeze(net, first, run.sample()))
  net = compressed(run, pruned, [compress.Rule(pattern='*', prune=False)])
  budget = config.budget / left
  net = search(run, net, model, budget=budget, epochs=epochs)
  second = allocate.plan(net, budget, config.bit_choices or None)
  net = compress.freeze(net, second, run.sample())
  # Seen from the dense model, both stages are one plan; no gates are left.
  net.structure = dataclasses.replace(
    structure,
    plan=dataclasses.replace(second, open=first.open),
    groups=tuple(
      dataclasses.replace(g, reason=g.reason or 'pruned in the first stage')
      for g in structure.groups
    ),
  )
  return net


def uniform(run: Run, model) -> compress.Compressed:
  """The control: the same bits everywhere, learned clips, nothing pruned."""
  net = compressed(run, model, [compress.Rule(pattern='*', prune=False)])
  plan = allocate.uniform(net, *run.config.uniform_bits)
  return compress.freeze(net, plan, run.sample())


def float_model(config, progress: Progress | None = None):
  """Trains a config's float model; returns it and its test accuracy."""
  this = prepare(config, progress)
  model = train_float(this, dense_model(this))
  return model, evaluation.evaluate(model, this.test_split)


def run(
  config,
  workdir,
  progress: Progress | None = None,
  *,
  trained=None,
  ready: Callable[[], None] | None = None,
) -> dict[str, Any]:
  """Runs a whole experiment.

  Args:
    config: complete, from `config.load`.
    workdir: where the artifact goes; made if it is missing.
    progress: told about every look at the metrics.
    trained: a float model to start from instead of training one.
    ready: called when the config has passed its checks, before all work.

  Returns:
    The report as JSON-ready values, see `report`.  All that it says of the
    hardened model was recomputed from the reloaded artifact.

  Raises:
    ValueError: the config cannot work; said before the first training step.
    train.TrainingError: a training cannot go on.
  """
  start = time.monotonic()
  this = prepare(config, progress)
  model = dense_model(this)
  _check(this, model)
  if ready is not None:
    ready()
  model = trained or train_float(this, model)
  float_accuracy = evaluation.evaluate(model, this.test_split)
  methods = {'djpq': djpq, 'two_stage': two_stage, 'uniform': uniform}
  net = methods[config.method](this, model)
  train.check_alive(net, this.sample())
  epochs = config.finetune.epochs
  if config.method == 'uniform':  # has nothing to search: equal epochs
    epochs += config.search.epochs
  net = finetune(this, net, model, epochs=epochs)
  hardened = harden.harden(net)
  return _deploy(this, hardened, pathlib.Path(workdir), float_accuracy, start)


def _check(run: Run, model) -> None:
  """Finds out before the first training whether rules and budget can work."""
  config = run.config
  run.steps(0)  # checks the batch size
  run.batches(0)  # checks the augmentation
  net, choices = compressed(run, model), config.bit_choices or None
  if config.method != 'uniform':
    allocate.check_reachable(net, config.budget or 1.0, choices)
  if config.method == 'two_stage':  # bits alone must do what pruning leaves
    whole = compressed(run, model, [compress.Rule(pattern='*', prune=False)])
    left = config.budget / config.two_stage_macs
    allocate.check_reachable(whole, left, choices)


def _deploy(run: Run, hardened, workdir, float_accuracy, start):
  """Saves, reloads and measures; the report speaks of the reloaded model."""
  folder = workdir / 'artifact'
  before = evaluation.predictions(hardened, run.test_split)
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
      'accuracy': evaluation.accuracy(before, run.test_split),
      'float_accuracy': float_accuracy,
      'measured_on': {'data': config.data.name, 'images': len(before)},
    },
  )
  reloaded = load_artifact(folder)
  logits = evaluation.predictions(reloaded, run.test_split)
  if not np.array_equal(logits, before):
    raise RuntimeError(
      'the reloaded artifact does not predict what was saved; this is a bug'
    )
  rows = harden.count(reloaded, sample)
  return {
    'float_accuracy': float_accuracy,
    'accuracy': evaluation.accuracy(logits, run.test_split),
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
