"""What a training phase minimizes, and the state that its steps advance."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import data
from djpq_jax import optim

Batch = dict[str, Any]
Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What a training phase minimizes.

  L = task + kl_weight * KL(gates) + strength * log(relative BOPs); the task
  is cross-entropy, mixed with distillation where there is a teacher.  With
  budgets of other costs, theirs is in place of the BOPs.

  Attributes:
    smoothing: label smoothing of the cross-entropy.
    distill: weight of the teacher's term, the cross-entropy gets the rest.
    temperature: of the distillation.
    noisy: whether gates are sampled.
    kl_weight: weight of the gates' KL (gamma).
    strength: weight of the BOPs term; unused with a controller.
    controller: sets the strength such that a budget is met.
    budgets: of which costs, see `budget.tightest`; None for BOPs alone.  The
      controller leads to the first of them.
    ramp_steps: steps over which `kl_weight` and `strength` rise from zero.
  """

  smoothing: float = 0.0
  distill: float = 0.0
  temperature: float = 1.0
  noisy: bool = False
  kl_weight: float = 0.0
  strength: float = 0.0
  controller: budget_lib.Controller | None = None
  budgets: Mapping[str, float] | None = None
  ramp_steps: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """The static half of a training state, compared by identity.

  Attributes:
    train_graph: the model as it is trained.
    eval_graph: the model as it predicts.
    optimizer: of all parameters.
    objective: what to minimize.
    teacher_graph: the teacher as it predicts, or None.
    compressed: whether the model has gates and quantizers.
    accumulate: parts that a batch is cut into, one after the other.
    remat: whether only the results of convolutions and matrix products are
      kept for the way back, and all between them is computed again.
    pixels: what images of bytes mean; None if all come as float.
  """

  train_graph: nnx.GraphDef
  eval_graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  objective: Objective
  teacher_graph: nnx.GraphDef | None = None
  compressed: bool = False
  accumulate: int = 1
  remat: bool = False
  pixels: data.Pixels | None = None

  def model_input(self, images: jax.Array) -> jax.Array:
    """Images as the model takes them: bytes are normalized, here.

    On its way to a device a byte takes a quarter of a float32.

    Raises:
      ValueError: they are bytes, and nobody said what these mean.
    """
    if images.dtype != jnp.uint8:
      return images
    if self.pixels is None:
      raise ValueError(
        'the images of a batch are uint8: normalize them, or give train.init '
        'the pixels of their split (data.Pixels((0.0,), (1 / 255,)) leaves '
        'them from 0 to 255)'
      )
    shape = *[1] * (images.ndim - 1), -1
    factor, offset = (x.reshape(shape) for x in self.pixels.line())
    return images.astype(jnp.float32) * factor - offset


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """All that one step needs and changes.

  Attributes:
    program: what is run; static.
    step: steps done, int32.
    params: {'gates', 'quantizers', 'weights'} -> pure states.
    rest: batch statistics and random states.
    opt_state: the optimizer's.
    key: base key; each step folds its number in.
    control: the budget controller's state.
    bad_steps: steps whose loss or gradients were not finite; they change
      nothing else.
    teacher: the teacher's pure state, or None.
  """

  program: Program = dataclasses.field(metadata=dict(static=True))
  step: jax.Array
  params: dict[str, Any]
  rest: Any
  opt_state: Any
  key: jax.Array
  control: Any
  bad_steps: jax.Array
  teacher: Any = None


def init(
  model,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int = 0,
  teacher=None,
  dtype: str = 'float32',
  accumulate: int = 1,
  remat: bool = False,
  pixels: data.Pixels | None = None,
) -> TrainState:
  """Makes the state before the first step of a phase.

  Args:
    model: a plain, compressed or frozen model.
    objective: what to minimize.
    optimizer: from `optim.make`.
    seed: of all noise in training.
    teacher: a float model to distil from, or None.
    dtype: that the layers compute in, 'float32' or 'bfloat16'; parameters,
      gates, quantizers and batch statistics are float32 in any case.
    accumulate: parts that a batch is cut into, to save memory.  Their
      gradients are averaged; each part has its own batch statistics.
    remat: whether to save memory by computing again, on the way back, all but
      convolutions and matrix products.
    pixels: of the split, for batches whose images are bytes, see
      `data.train_batch`.

  Raises:
    ValueError: the objective distils, but there is no teacher; an argument
      out of range.
  """
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
  if accumulate < 1:
    raise ValueError(f'accumulate must be at least 1, got {accumulate}')
  if objective.distill and teacher is None:
    raise ValueError(f'distill={objective.distill} needs a teacher')
  training = compress.train_view(model)
  if dtype != 'float32':
    for _, module in nnx.iter_modules(training):
      if hasattr(module, 'dtype') and hasattr(module, 'param_dtype'):
        module.dtype = jnp.dtype(dtype)
  train_graph, params, rest = optim.split(training)
  eval_graph, _, _ = optim.split(compress.eval_view(model))
  teacher_graph = teacher_state = None
  if teacher is not None:
    teacher_graph, state = nnx.split(compress.eval_view(teacher))
    teacher_state = jax.tree.map(jnp.copy, nnx.as_pure(state))
  program = Program(
    train_graph,
    eval_graph,
    optimizer,
    objective,
    teacher_graph,
    isinstance(model, compress.Compressed),
    accumulate,
    remat,
    pixels,
  )
  # Copies: a donated state must not take the caller's model along.
  params, rest = jax.tree.map(_strong_copy, (params, rest))
  controller = objective.controller
  return TrainState(
    program=program,
    step=jnp.zeros((), jnp.int32),
    params=params,
    rest=rest,
    opt_state=optimizer.init(params),
    key=jax.random.key(seed),
    control=controller.init() if controller else None,
    bad_steps=jnp.zeros((), jnp.int32),
    teacher=teacher_state,
  )


def _strong_copy(x):
  """A copy without weak types, which the first step would recompile for."""
  return jnp.array(x, dtype=x.dtype)


def model_of(state: TrainState):
  """The model as it stands in a state, ready to predict."""
  return optim.merge(state.program.eval_graph, state.params, state.rest)
