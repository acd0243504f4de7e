"""The training step, pure and jitted, and the loop around it.

One step serves all phases: the float model, the search for channels and bits,
and the finetuning of what is left.  What differs stands in `Objective`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import data
from djpq_jax import losses
from djpq_jax import optim

Batch = dict[str, Any]
Metrics = dict[str, Any]


class TrainingError(RuntimeError):
  """Training cannot go on; the message says where it broke and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What a training phase minimizes.

  L = task + kl_weight * KL(gates) + strength * log(relative BOPs); the task
  is cross-entropy, mixed with distillation where there is a teacher.

  Attributes:
    smoothing: label smoothing of the cross-entropy.
    distill: weight of the teacher's term, the cross-entropy gets the rest.
    temperature: of the distillation.
    noisy: whether gates are sampled.
    kl_weight: weight of the gates' KL (gamma).
    strength: weight of the BOPs term; unused with a controller.
    controller: sets the strength such that a budget is met.
    ramp_steps: steps over which `kl_weight` and `strength` rise from zero.
  """

  smoothing: float = 0.0
  distill: float = 0.0
  temperature: float = 1.0
  noisy: bool = False
  kl_weight: float = 0.0
  strength: float = 0.0
  controller: budget_lib.Controller | None = None
  ramp_steps: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """The static half of a training state, compared by identity."""

  train_graph: nnx.GraphDef
  eval_graph: nnx.GraphDef
  optimizer: optax.GradientTransformation
  objective: Objective
  teacher_graph: nnx.GraphDef | None = None
  compressed: bool = False


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
) -> TrainState:
  """Makes the state before the first step of a phase.

  Args:
    model: a plain, compressed or frozen model.
    objective: what to minimize.
    optimizer: from `optim.make`.
    seed: of all noise in training.
    teacher: a float model to distil from, or None.

  Raises:
    ValueError: the objective distils, but there is no teacher.
  """
  if objective.distill and teacher is None:
    raise ValueError(f'distill={objective.distill} needs a teacher')
  train_graph, params, rest = optim.split(compress.train_view(model))
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


def train_step(state: TrainState, batch: Batch, *, axis_name=None):
  """One optimizer step; pure.

  Args:
    state: what to advance.
    batch: 'image' [B, ...] and 'label' int [B].
    axis_name: the mapped axis when called under `jax.pmap`: gradients,
      statistics and metrics are averaged over it.

  Returns:
    (next state, metrics: float32 scalars by name).
  """
  key = jax.random.fold_in(state.key, state.step)
  if axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
  grad_fn = jax.value_and_grad(_loss, has_aux=True)
  (loss, aux), grads = grad_fn(state.params, state, batch, key)
  rest, control, metrics = aux
  if axis_name is not None:
    loss, grads, rest, metrics = _mean_over(
      axis_name, (loss, grads, rest, metrics)
    )
  updates, opt_state = state.program.optimizer.update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
  advanced = (params, rest, opt_state, control)
  before = (state.params, state.rest, state.opt_state, state.control)
  params, rest, opt_state, control = jax.tree.map(
    lambda new, old: jnp.where(good, new, old), advanced, before
  )
  state = dataclasses.replace(
    state,
    step=state.step + 1,
    params=params,
    rest=rest,
    opt_state=opt_state,
    control=control,
    bad_steps=state.bad_steps + ~good,
  )
  return state, metrics | {'loss': loss, 'bad_steps': state.bad_steps}


def _mean_over(axis_name, tree):
  def mean(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.lax.pmean(x, axis_name)
    return x

  return jax.tree.map(mean, tree)


def _loss(params, state: TrainState, batch: Batch, key):
  program, objective = state.program, state.program.objective
  model = optim.merge(program.train_graph, params, state.rest)
  noise = {'gate_key': key} if objective.noisy and program.compressed else {}
  logits = model(batch['image'], **noise)
  total = losses.cross_entropy(
    logits, batch['label'], smoothing=objective.smoothing
  )
  if objective.distill:
    assert program.teacher_graph is not None, 'distillation needs a teacher'
    teacher = nnx.merge(program.teacher_graph, state.teacher)
    total = (1 - objective.distill) * total + (
      objective.distill
      * losses.distillation(
        logits,
        teacher(batch['image']),
        temperature=objective.temperature,
      )
    )
  metrics = {'task_loss': total, 'accuracy': _accuracy(logits, batch)}
  cost, control, more = _cost(model, state)
  _, _, rest = optim.split(model)
  return total + cost, (rest, control, metrics | more)


def _cost(model, state: TrainState):
  """The terms of gates and BOPs: (value, next control, metrics)."""
  program, objective = state.program, state.program.objective
  if not program.compressed:
    return 0.0, state.control, {}
  relative = losses.relative_bops(model)
  metrics = {'relative_bops': relative} | _summary(model)
  ramp = jnp.float32(1)
  if objective.ramp_steps:
    ramp = jnp.minimum(1.0, (state.step + 1) / objective.ramp_steps)
  cost, control = jnp.float32(0), state.control
  if objective.kl_weight:
    cost += ramp * objective.kl_weight * losses.gate_kl(model)
  if objective.controller is not None:
    strength, control = objective.controller.update(
      control, state.step, relative
    )
    metrics['strength'] = strength
    cost += strength * jnp.log(relative)
  elif objective.strength:
    cost += ramp * objective.strength * jnp.log(relative)
  return cost, control, metrics


def _summary(model: compress.Compressed) -> Metrics:
  """Mean bits over quantized layers and the kept fraction of gated channels."""
  operands = [o for _, _, o in compress.hooks(model) if o.weight is not None]
  kept = compress.open_masks(model.structure)
  total = sum(len(kept[g]) for g in model.structure.gated)
  if model.structure.plan is None:
    left = sum((jnp.sum(g.open_mask()) for g in model.gates), jnp.zeros(()))
  else:
    left = jnp.float32(sum(kept[g].sum() for g in model.structure.gated))
  return {
    'mean_weight_bits': _mean([o.weight.bits() for o in operands]),
    'mean_act_bits': _mean([o.act.bits() for o in operands]),
    'kept_fraction': left / max(total, 1) if total else jnp.ones(()),
  }


def _mean(values):
  return sum(jnp.asarray(v, jnp.float32) for v in values) / max(len(values), 1)


def _accuracy(logits, batch: Batch):
  right = jnp.argmax(logits, axis=-1) == batch['label']
  return jnp.mean(right.astype(jnp.float32))


# The state is donated: a step updates it in place on the device.
jit_step = functools.partial(jax.jit, donate_argnums=0)(train_step)


def fit(
  state: TrainState,
  batch_at: Callable[[int], Batch],
  steps: int,
  *,
  log_every: int = 20,
  on_log: Callable[[int, Metrics], None] | None = None,
  step_fn=jit_step,
) -> TrainState:
  """Runs steps `state.step` .. `steps`; resumes wherever the state stands.

  Args:
    state: a fresh or restored state; it is donated.
    batch_at: gives the batch of a step number.
    steps: where to end.
    log_every: steps between looks at the metrics (the only host syncs).
    on_log: called with (steps done, metrics as floats).
    step_fn: `jit_step`, or another wrapper of `train_step`.

  Raises:
    TrainingError: a loss or gradient was not finite; names the layer.
  """
  numbers = range(int(state.step), steps)
  looked = numbers.start
  batches = data.prefetch(batch_at(step) for step in numbers)
  for step, batch in zip(numbers, batches):
    state, metrics = step_fn(state, batch)
    if (step + 1) % log_every and step + 1 < steps:
      continue
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if metrics['bad_steps']:
      raise TrainingError(_where(state, batch_at, range(looked, step + 1)))
    looked = step + 1
    if on_log is not None:
      on_log(step + 1, metrics)
  return state


def _where(state: TrainState, batch_at, steps: range) -> str:
  """Finds the first thing that was not finite in some steps and says so."""
  head = f'training stopped at step {steps.stop}: '
  for step in steps:
    batch = batch_at(step)
    if not np.all(np.isfinite(np.asarray(batch['image']))):
      return (
        f'{head}the batch of step {step} has pixels that are not finite; '
        'check the data'
      )
  place = _bad_leaf(state.params) or _bad_input(state, batch)
  if place is None:
    grads = jax.grad(_loss, has_aux=True)(
      state.params, state, batch, state.key
    )[0]
    place = _bad_leaf(grads)
  if place is None:
    place = 'the loss (it recovered on this batch)'
  return (
    f'{head}{int(state.bad_steps)} step(s) were not finite, first seen in '
    f'{place}; lower the learning rate, or check the data'
  )


def _bad_leaf(params) -> str | None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not np.all(np.isfinite(np.asarray(leaf))):
      names = [str(getattr(p, 'key', p)) for p in path[1:]]
      return 'the variable ' + '/'.join(names)
  return None


def _bad_input(state: TrainState, batch: Batch) -> str | None:
  model = model_of(state)
  if not isinstance(model, compress.Compressed):
    return None
  taps = compress.inputs_of(model, batch['image'])
  for path in model.structure.graph.layers:
    if not all(np.all(np.isfinite(np.asarray(x))) for x in taps.get(path, [])):
      return f'the input of layer {path}'
  return None


def check_alive(model: compress.Compressed, *args) -> None:
  """Raises a TrainingError if a layer of a compressed model has collapsed.

  Args:
    model: searched or frozen.
    *args: a batch of inputs.
  """
  taps = compress.inputs_of(model, *args)
  for path, layer, operands in compress.hooks(model):
    if operands.weight is None:
      continue
    dead = 'kernel' if not jnp.any(operands.weight(layer.kernel[...])) else ''
    if not any(jnp.any(operands.act(x)) for x in taps[path]):
      dead = 'input'
    if dead:
      raise TrainingError(
        f'layer {path} has collapsed: its {dead} rounds to zero everywhere; '
        'raise the budget, lower the rates of gates and quantizers, or give '
        'the layer more bits or channels with a rule'
      )
