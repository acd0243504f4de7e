"""From a hardened model to one whose layers run on integers."""

from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import harden
from djpq_jax import layers
from djpq_jax.compress import wrapped
from djpq_jax.integer import planning
from djpq_jax.integer import products
from djpq_jax.integer import reproducible

EXECUTIONS = ('simulated', 'float', 'int8')


class IntegerOperands(layers.Operands):
  """The hook of a layer that runs on integers.

  Args:
    operands: the hook that the hardened layer had.
    plan: how its product is computed.
    offset: int32 [out...] that undoes the input's shift, or None.
    scale_shape: of one scale per output, or () for one in all.
  """

  def __init__(
    self, operands: layers.Operands, plan: planning.Plan, offset, scale_shape
  ):
    super().__init__(
      operands.name,
      weight=operands.weight,
      act=operands.act,
      gate=operands.gate,
      feature_axis=operands.feature_axis,
      promote=operands.promote,
    )
    self.plan = plan
    self.scale_shape = scale_shape
    self.offset: Any = nnx.data(None if offset is None else offset)

  def __call__(self, operands, **kwargs):
    """Returns (int32 levels, `products.Weights`, bias)."""
    inputs, kernel, bias = operands
    levels = self.act.integers(self.entering(inputs))
    step = self.weight.step[...]
    inputs, _, bias = self.promote((inputs, step, bias), **kwargs)
    scale = step.reshape(self.scale_shape)
    weights = products.Weights(
      kernel,
      scale * self.act.step[...],
      None if self.offset is None else self.offset[...],
      inputs.dtype,
    )
    return levels, weights, bias


class IntegerModel(harden.HardenedModel):
  """A hardened model on its integers, all else in one reproducible order."""

  def __call__(self, *args, **kwargs):
    """Calls the model; see `HardenedModel`."""
    graphdef, state = nnx.split(self)
    before = dict(nnx.to_flat_state(nnx.as_pure(state)))

    def call(*args, **kwargs):
      # A copy of this trace, as some models write to their Variables.
      model = nnx.merge(graphdef, nnx.as_pure(state))
      result = harden.HardenedModel.__call__(model, *args, **kwargs)
      after = nnx.to_flat_state(nnx.as_pure(nnx.state(model)))
      return result, {p: x for p, x in after if x is not before.get(p, x)}

    result, written = reproducible.reproducible(call)(*args, **kwargs)
    if written:
      nnx.update(self, nnx.from_flat_state(list(written.items())))
    return result


def lower(
  model: harden.HardenedModel, execution: str = 'int8'
) -> harden.HardenedModel:
  """Makes a hardened model run on its integers.

  Between layers the model computes in float32: batch norm, activations,
  residual adds and pooling.  Each operation is rounded by itself and sums have
  an order, so that another runtime can have the same bits.

  Args:
    model: from `harden.harden` or `checkpoint.load`; it is left as it is.
    execution: 'simulated' carries the integers in float32, with XLA's own
      convolutions; 'float' too, with depthwise ones as sums of shifted inputs;
      'int8' multiplies int8 by int8 into int32.

  Returns:
    A model that is called alike.  All executions have the same accumulators.
    Layers without an exact one compute as the hardened model does;
    `left_float` lists them.

  Raises:
    TypeError: the model is not hardened.
    ValueError: the execution is unknown, or the model was lowered before.
  """
  compress.check(model, 'lower', hardened=True)
  if execution not in EXECUTIONS:
    raise ValueError(
      f'no execution {execution!r}; there are {", ".join(EXECUTIONS)}'
    )
  if plans(model):
    raise ValueError('the model runs on integers already: lower the hardened')
  copy = nnx.clone(model)
  for hook in compress.hooks(copy):
    if _reason(hook) is None:
      _install(hook, _plan(hook, execution))
  return IntegerModel(copy.model, copy.gates, copy.structure)


def left_float(model: harden.HardenedModel) -> dict[str, str]:
  """Layers that do not run on integers, path -> why."""
  reasons = {hook.path: _reason(hook) for hook in compress.hooks(model)}
  return {path: why for path, why in reasons.items() if why is not None}


def plans(model: harden.HardenedModel) -> dict[str, planning.Plan]:
  """How each layer of a lowered model computes, by path."""
  return {
    hook.path: hook.operands.plan
    for hook in compress.hooks(model)
    if isinstance(hook.operands, IntegerOperands)
  }


def accumulators(model: harden.HardenedModel, *args) -> dict[str, list]:
  """What the layers of a lowered model sum up.

  Args:
    model: from `lower`.
    *args: what it is called with.

  Returns:
    Path -> int32 arrays [B, ..., out], one for each call of the layer.
  """
  return wrapped.look(model, [products.ACCUMULATORS], *args)[0]


def _reason(hook: compress.Hook) -> str | None:
  """Why a layer stays float, or None if it need not."""
  layer, operands = hook.layer, hook.operands
  if isinstance(operands, IntegerOperands):
    return None
  if not isinstance(operands.weight, harden.Dequantizer):
    return 'a rule leaves it in float32'
  if operands.promote is not dtypes.promote_dtype:
    return 'its promote_dtype may change values'
  if _site(layer) is None:
    return f'{type(layer).__name__} has no integer product here'
  contracted = _site(layer).contracted
  step = operands.weight.step[...]
  if step.size > 1 and any(n > 1 for n in step.shape[:contracted]):
    return 'its weight steps differ along an axis that is summed over'
  try:
    # In all executions or in none, so that all predict the same; float32 is
    # the one that holds least.
    _plan(hook, 'float')
  except planning.NotExact as error:
    return str(error)
  return None


def _site(layer) -> planning.Site | None:
  if _is_plain(layer, nnx.Conv) and layer.mask is None:
    window = tuple(layer.kernel_size)
    ones = lambda n: n in (None, 1) or all(d == 1 for d in np.ravel(n))
    return planning.Site(
      contracted=len(window) + 1,
      groups=layer.feature_group_count,
      window=window,
      dilated=not ones(layer.kernel_dilation),
      lhs_dilated=not ones(layer.input_dilation),
    )
  if _is_plain(layer, nnx.Linear):
    return planning.Site(contracted=1)
  general = _is_plain(layer, nnx.LinearGeneral) and not layer.batch_axis
  if general and layer.dot_general_cls is None:
    return planning.Site(contracted=len(np.ravel(layer.axis)))
  return None


def _is_plain(layer, kind) -> bool:
  """Whether a layer is of a kind, and multiplies as that does."""
  usual = (None, lax.dot_general, lax.conv_general_dilated)
  return (
    isinstance(layer, kind)
    and type(layer).__call__ is kind.__call__
    and getattr(layer, 'dot_general', None) in usual
    and getattr(layer, 'conv_general_dilated', None) in usual
  )


def _plan(hook: compress.Hook, execution: str) -> planning.Plan:
  act = hook.operands.act
  site = _site(hook.layer)
  assert site is not None
  return planning.plan(
    hook.path,
    execution,
    np.asarray(hook.layer.kernel[...]),
    site,
    max(act.highest, -act.lowest),
    signed=act.signed,
  )


def _install(hook: compress.Hook, plan: planning.Plan) -> None:
  layer, operands = hook.layer, hook.operands
  site = _site(layer)
  assert site is not None
  kernel = np.asarray(layer.kernel[...], np.int64)
  offset = None
  if plan.shift:
    sums = kernel.sum(tuple(range(site.contracted)))
    offset = harden.Constant(jnp.asarray(plan.shift * sums, jnp.int32))
  step = operands.weight.step[...]
  shape = step.shape[site.contracted :] if step.size > 1 else ()
  hook.layer.promote_dtype = nnx.data(
    IntegerOperands(operands, plan, offset, shape)
  )
  if site.window:
    layer.conv_general_dilated = products.Conv(plan)
  else:
    layer.dot_general = products.Dot(plan)
