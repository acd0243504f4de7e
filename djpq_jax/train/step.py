"""One step of training, pure and jitted; it serves all phases.

The float model, the search for channels and bits, and the finetuning of what
is left differ in their `Objective` alone.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import losses
from djpq_jax import optim
from djpq_jax.train import convolutions
from djpq_jax.train import state as state_lib


def train_step(
  state: state_lib.TrainState, batch: state_lib.Batch, *, axis_name=None
):
  """One optimizer step; pure.

  Args:
    state: what to advance.
    batch: 'image' [B, ...], normalized or bytes, and 'label' int [B].
    axis_name: the mapped axis when called under `jax.pmap`: gradients,
      statistics and metrics are averaged over it.

  Returns:
    (next state, metrics: float32 scalars by name).
  """
  key, own = jax.random.fold_in(state.key, state.step), state
  if axis_name is not None:
    index = jax.lax.axis_index(axis_name)
    key = jax.random.fold_in(key, index)
    own = dataclasses.replace(state, rest=_own_streams(state, index))
  (loss, (rest, control, metrics)), grads = _gradients(own, batch, key)
  if axis_name is not None:
    loss, grads, rest, metrics = _mean_over(
      axis_name, (loss, grads, rest, metrics)
    )
    rest = _shared_streams(state, rest)
  with jax.named_scope('optimizer'):  # a name for profilers
    updates, opt_state = state.program.optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
  good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
  advanced = (params, rest, opt_state, control)
  before = (state.params, state.rest, state.opt_state, state.control)
  params, rest, opt_state, control = jax.tree.map(
    functools.partial(_chosen, good), advanced, before
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


def _chosen(good, new, old):
  """One leaf of the next state: the new one, or the old one of a bad step."""
  if new.dtype != old.dtype:  # optax makes float64 where JAX has 64 bits on
    new = new.astype(old.dtype)
  return jnp.where(good, new, old)


def _stream_keys(state: state_lib.TrainState):
  """Which leaves of `state.rest` are keys of the model's random streams."""
  model = optim.merge(state.program.train_graph, state.params, state.rest)
  rest = nnx.split(model, *optim.KINDS.values(), ...)[-1]
  return jax.tree.map(
    lambda variable: isinstance(variable, nnx.RngKey),
    rest,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )


def _own_streams(state: state_lib.TrainState, index):
  """The rest of a state with one device's own noise, as that of dropout."""

  def own(is_key, x):
    if not is_key:
      return x
    keys = jax.vmap(jax.random.fold_in, (0, None))(x.reshape(-1), index)
    return keys.reshape(x.shape)  # a stream may have been split

  return jax.tree.map(own, _stream_keys(state), state.rest)


def _shared_streams(state: state_lib.TrainState, rest):
  """Takes that back after a step: all devices hold the same state."""
  return jax.tree.map(
    lambda is_key, new, old: old if is_key else new,
    _stream_keys(state),
    rest,
    state.rest,
  )


def _gradients(state: state_lib.TrainState, batch: state_lib.Batch, key):
  """((loss, (rest, controller, metrics)), gradients) of a whole batch."""
  program = state.program
  loss = total_loss
  if program.remat:
    loss = jax.checkpoint(loss, policy=_is_product)
  grad_fn = jax.value_and_grad(loss, has_aux=True)
  if program.accumulate == 1:
    return grad_fn(state.params, state, batch, key)

  # Every k-th example, not the k-th stretch, so that each device finds its
  # part of each part among its own examples.
  parts = jax.tree.map(
    lambda x: jnp.swapaxes(
      x.reshape(-1, program.accumulate, *x.shape[1:]), 0, 1
    ),
    batch,
  )

  def one(rest, part):
    number, batch = part
    found = grad_fn(
      state.params,
      dataclasses.replace(state, rest=rest),
      batch,
      jax.random.fold_in(key, number),
    )
    (loss, (rest, control, metrics)), grads = found
    return rest, (loss, control, metrics, grads)

  numbers = jnp.arange(program.accumulate)
  rest, found = jax.lax.scan(one, state.rest, (numbers, parts))
  # The controller looks at parameters alone: all parts tell it the same.
  loss, control, metrics, grads = jax.tree.map(lambda x: x.mean(0), found)
  return (loss, (rest, control, metrics)), grads


def _is_product(primitive, *_, **__) -> bool:
  """What is kept for the way back; the rest is cheap to compute again."""
  return primitive in (jax.lax.conv_general_dilated_p, jax.lax.dot_general_p)


def _mean_over(axis_name, tree):
  def mean(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jax.lax.pmean(x, axis_name)
    return x

  return jax.tree.map(mean, tree)


def total_loss(
  params, state: state_lib.TrainState, batch: state_lib.Batch, key
):
  """All that a step minimizes: (loss, (rest, controller, metrics))."""
  program, objective = state.program, state.program.objective
  model = optim.merge(program.train_graph, params, state.rest)
  convolutions.speed_up(model)
  noise = {'gate_key': key} if objective.noisy and program.compressed else {}
  images = program.model_input(batch['image'])
  logits = model(images, **noise)
  total = losses.cross_entropy(
    logits, batch['label'], smoothing=objective.smoothing
  )
  if objective.distill:
    assert program.teacher_graph is not None, 'distillation needs a teacher'
    teacher = nnx.merge(program.teacher_graph, state.teacher)
    convolutions.speed_up(teacher)
    with jax.named_scope('teacher'):
      taught = losses.distillation(
        logits, teacher(images), temperature=objective.temperature
      )
    total = (1 - objective.distill) * total + objective.distill * taught
  metrics = {'task_loss': total, 'accuracy': _accuracy(logits, batch)}
  with jax.named_scope('cost'):
    cost, control, more = _cost(model, state)
  _, _, rest = optim.split(model)
  return total + cost, (rest, control, metrics | more)


def _cost(model, state: state_lib.TrainState):
  """The terms of gates and BOPs: (value, next control, metrics)."""
  program, objective = state.program, state.program.objective
  if not program.compressed:
    return 0.0, state.control, {}
  costs = losses.relative_costs(model)
  budgets = objective.budgets or {'bops': 1.0}
  relative = budget_lib.tightest(costs, budgets)
  metrics = {f'relative_{name}': costs[name] for name in ('bops', *budgets)}
  metrics |= _summary(model)
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


def _summary(model: compress.Compressed) -> state_lib.Metrics:
  """Mean bits over quantized layers and the kept fraction of gated channels."""
  operands = [o for _, _, o in compress.hooks(model) if o.weight is not None]
  plan = model.structure.plan
  if plan is None:
    total = sum(g.size for g in model.gates)
    left = sum((jnp.sum(g.open_mask()) for g in model.gates), jnp.zeros(()))
  else:  # groups may have been cut before there were gates
    structure = model.structure
    masks = [
      mask
      for g, mask in zip(structure.groups, compress.open_masks(structure))
      if not g.reason or g.name in plan.open
    ]
    total = sum(len(mask) for mask in masks)
    left = jnp.float32(sum(mask.sum() for mask in masks))
  return {
    'mean_weight_bits': _mean([o.weight.bits() for o in operands]),
    'mean_act_bits': _mean([o.act.bits() for o in operands]),
    'kept_fraction': left / max(total, 1) if total else jnp.ones(()),
  }


def _mean(values):
  total = sum((jnp.asarray(v, jnp.float32) for v in values), jnp.float32(0))
  return total / max(len(values), 1)


def _accuracy(logits, batch: state_lib.Batch):
  right = jnp.argmax(logits, axis=-1) == batch['label']
  return jnp.mean(right.astype(jnp.float32))


@jax.jit
def eval_step(state: state_lib.TrainState, batch: state_lib.Batch):
  """Counts what the model of a state gets right; changes nothing.

  Args:
    state: of any phase.
    batch: 'image' [B, ...], normalized or bytes, 'label' int [B], and 'mask'
      [B], 0 for what only fills the batch up.

  Returns:
    float32 scalars: (images that it gets right, images).
  """
  model = optim.merge(state.program.eval_graph, state.params, state.rest)
  convolutions.speed_up(model)
  images = state.program.model_input(batch['image'])
  right = jnp.argmax(model(images), axis=-1) == batch['label']
  return jnp.sum(right * batch['mask']), jnp.sum(batch['mask'])


# The state is donated: a step updates it in place on the device.
jit_step = functools.partial(jax.jit, donate_argnums=0)(train_step)
