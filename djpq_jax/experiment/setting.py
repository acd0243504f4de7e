"""What the phases of one experiment share: config, data, model, history."""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import cost as cost_lib
from djpq_jax import data
from djpq_jax import metrics
from djpq_jax import models
from djpq_jax import optim
from djpq_jax import parallel
from djpq_jax.experiment import layer_rules
from djpq_jax.models import torch_weights

CALIBRATION_IMAGES = 256
SEARCHING = ('djpq', 'two_stage')  # methods that lead to a budget
# Fields of the budgets, by cost.
BUDGETS = {'bops': 'budget', 'macs': 'budget_macs', 'weights': 'budget_weights'}

# Called with (phase, steps done, steps in all, metrics).
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclasses.dataclass
class Run:
  """What the phases of one experiment share.

  Attributes:
    config: complete, from `config.load`.
    train_split: what is trained on.
    test_split: what the results are measured on.
    watched_split: what accuracy is measured on in training.
    progress: told about every look at the metrics.
    workdir: where checkpoints go; None for nowhere.
    float_dir: where those of the float training go.
    log: where metrics go besides the history.
    stop: asked after every step whether to save and stop.
    history: metrics, one row per look.
    steps_done: of all phases that are finished.
    phases_done: how many there are.
    best_steps: phase -> step over all phases that it ended with, where the
      best one was kept.
    scale: what metrics of a model that was cut before are multiplied by, by
      name, such that they say what is left of the dense model.
  """

  config: Any
  train_split: data.Split
  test_split: data.Split
  watched_split: data.Split
  progress: Progress
  workdir: pathlib.Path | None = None
  float_dir: pathlib.Path | None = None
  log: metrics.Log | None = None
  stop: Callable[[], bool] | None = None
  history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  steps_done: int = 0
  phases_done: int = 0
  best_steps: dict[str, int] = dataclasses.field(default_factory=dict)
  scale: dict[str, float] = dataclasses.field(default_factory=dict)

  def batches(
    self, seed: int, *, as_bytes: bool = False
  ) -> Callable[[int], dict[str, np.ndarray]]:
    """This process's share of the batch of each step number of a phase.

    Args:
      seed: of order and augmentation.
      as_bytes: whether images that are bytes stay so, as a step takes them;
        otherwise they are normalized.
    """
    augment = data.Augment(**self.config.augment)

    def batch_at(step):
      return data.train_batch(
        self.train_split,
        step,
        batch_size=self.config.batch_size,
        seed=seed,
        augment=augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        as_bytes=as_bytes,
      )

    return batch_at

  def sample(self) -> np.ndarray:
    """Images to calibrate on, as training sees them but not augmented."""
    count = min(CALIBRATION_IMAGES, len(self.train_split))
    return data.train_batch(
      self.train_split, 0, batch_size=count, seed=self.config.seed
    )['image']

  @property
  def searches(self) -> bool:
    """Whether channels or bits are learned, towards a budget."""
    return self.config.method in SEARCHING

  @property
  def budgets(self) -> dict[str, float] | None:
    """Relative costs to end at, by name; None where nothing leads there."""
    budgets = {cost: self.config[field] for cost, field in BUDGETS.items()}
    found = {cost: budget for cost, budget in budgets.items() if budget}
    return found or None if self.searches else None

  @property
  def budget(self) -> float | None:
    """Relative BOPs to end at; None where nothing leads there."""
    return (self.budgets or {}).get('bops')

  def epochs(self) -> dict[str, float]:
    """Epochs of each phase, such that all methods have as many."""
    config = self.config
    search, finetune = config.search.epochs, config.finetune.epochs
    if not self.searches:
      search, finetune = 0.0, search + finetune
    return {
      'float': config.float.epochs,
      'search': search,
      'finetune': finetune,
    }

  def steps(self, epochs: float) -> int:
    """Steps of so many epochs."""
    per_epoch = data.steps_per_epoch(self.train_split, self.config.batch_size)
    return round(epochs * per_epoch)

  def mesh(self) -> jax.sharding.Mesh:
    """The devices that this experiment trains on."""
    count = self.config.step.devices
    if not count:
      return parallel.mesh()
    devices = [
      d
      for p in range(jax.process_count())
      for d in jax.local_devices(process_index=p)[:count]
    ]
    return parallel.mesh(devices)

  def record(
    self, rows: list[dict[str, Any]], *, restored: bool = False
  ) -> None:
    """Adds rows, new ones or those of a checkpoint, to history and log."""
    self.history += rows
    if self.log is not None:
      add = self.log.restore if restored else self.log.write
      add(rows)


def prepare(config, progress: Progress | None = None) -> Run:
  """Loads the data and checks that config, data and model fit together."""
  for cost, field in BUDGETS.items():
    if not 0 <= config[field] < 1:
      raise ValueError(
        f'{field} is a fraction of the float32 {cost_lib.COSTS[cost]} below '
        f'1, or 0 for none; got {config[field]}'
      )
    if config.method == 'two_stage' and cost != 'bops' and config[field]:
      raise ValueError(f'method two_stage has a budget of BOPs, not {field}')
  macs = config.two_stage_macs
  if config.method == 'two_stage' and not (config.budget and 0 < macs < 1):
    raise ValueError(
      'method two_stage needs a budget, and two_stage_macs between 0 and 1; '
      f'got {config.budget} and {macs}'
    )
  bits = config.uniform_bits
  if config.method == 'uniform' and [type(b) for b in bits] != [int, int]:
    raise ValueError(
      'uniform_bits takes two whole numbers, of weights and of activations; '
      f'got {bits}'
    )
  for name in ('float', 'search', 'finetune'):
    phase = config[name]
    optim.OptimizerConfig(**phase.optimizer)  # checks itself
    if not phase.get('temperature', 1) > 0:
      raise ValueError(
        f'{name}.temperature must be above 0, got {phase.temperature}'
      )
  if config.keep_best and not (config.evaluate_every and config.validation):
    raise ValueError(
      'keep_best needs evaluate_every, and a part of the training images to '
      'choose by: set validation, for example to 0.1 (choosing by the test '
      'images would make their accuracy no measure of others)'
    )
  if config.validation and not config.evaluate_every:
    raise ValueError(
      'validation holds images out to look at: set evaluate_every, for example '
      'to 1, or validation to 0'
    )
  _check_step(config)
  layer_rules.rules_of(config)  # checks them
  metrics.check(tensorboard=config.tensorboard)
  train_split, test_split = data.load(
    config.data.name,
    data_dir=config.data.dir or None,
    **config.data.kwargs,
  )
  watched_split = test_split
  if config.validation:
    train_split, watched_split = data.hold_out(train_split, config.validation)
  run = Run(
    config,
    train_split,
    test_split,
    watched_split,
    progress or (lambda *_: None),
  )
  if config.evaluate_every and not run.steps(config.evaluate_every):
    raise ValueError(
      f'evaluate_every is {config.evaluate_every:.4g} epochs, less than a step'
    )
  return run


def _check_step(config) -> None:
  """Finds out whether a batch can be cut as the config says."""
  step = config.step
  if step.wrapper not in ('jit', 'pmap'):
    raise ValueError(
      f"step.wrapper must be 'jit' or 'pmap', got {step.wrapper!r}"
    )
  if step.dtype not in ('float32', 'bfloat16'):
    raise ValueError(
      f"step.dtype must be 'float32' or 'bfloat16', got {step.dtype!r}"
    )
  here = jax.local_device_count()
  if not 0 <= step.devices <= here:
    raise ValueError(
      f'step.devices is {step.devices}, but there are {here}; 0 takes all'
    )
  devices = (step.devices or here) * jax.process_count()
  if step.accumulate < 1 or config.batch_size % (devices * step.accumulate):
    raise ValueError(
      f'batch_size {config.batch_size} cannot be cut into {devices} (devices) '
      f'x {step.accumulate} (step.accumulate) equal parts; change it, or set '
      'step.devices'
    )


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
    torch_weights.assign(model, _weights(config.model.weights))
  return model


def check_classes(run: Run, model) -> None:
  """Finds out whether a model has a logit for each class of the data.

  More are no mistake: labels may skip some.  Images of a class that has none
  would go through all of the training without a loss.

  Raises:
    ValueError: it has fewer.
  """
  graphdef, state = nnx.split(compress.eval_view(model))
  images = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
  logits = jax.eval_shape(
    lambda state, x: nnx.merge(graphdef, state)(x), nnx.as_pure(state), images
  )
  found, classes = logits.shape[-1], run.train_split.num_classes
  if found < classes:
    raise ValueError(
      f'model {run.config.model.name} has logits of {found} classes, but '
      f'{run.config.data.name} has {classes}; set model.kwargs.num_classes to '
      f'{classes} or choose another model'
    )


def _weights(path: str):
  try:
    return torch_weights.read_state_dict(path)
  except OSError as error:
    raise ValueError(
      f'model.weights is {path!r}, which cannot be read: {error.strerror}; '
      'give a file of torch.save or safetensors'
    ) from error
