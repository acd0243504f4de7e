"""From a finetuned model to the one that is deployed: integers and scales.

A hardened model is called like the original.  Channels are gone, each kernel
is an integer array with a step, each input has a fixed grid; gates that are
left are per-channel scales, and batch norm is a factor and a summand for each
channel.  Called as it is, it multiplies the steps in first and computes in
float32; `integer.lower` makes it run on the integers themselves, with exact
sums.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import graph as graph_lib
from djpq_jax import layers


class Constant(nnx.Variable):
  """A number that training settled: a step or a scale."""


class Dequantizer(nnx.Module):
  """Turns an integer kernel back into multiples of its step.

  Args:
    step: what one is worth, a scalar or one for each output channel.
    odd: whether all integers are odd, those of a mid-rise grid: its levels are
      two of these steps apart.
  """

  def __init__(self, step, *, odd: bool = False):
    self.step = Constant(step)
    self.odd = odd

  def __call__(self, kernel):
    """Int [..., out] -> float32 of the same shape."""
    return kernel.astype(jnp.float32) * self.step[...]


class FixedQuantizer(nnx.Module):
  """Rounds a layer's input to whole steps, as many as it may have.

  Args:
    step: spacing of the levels, > 0, in units of the input.
    lowest: fewest steps, 0 or less.
    highest: most steps, 0 or more.
  """

  def __init__(self, step, lowest: int, highest: int):
    self.step = Constant(step)
    self.lowest = lowest
    self.highest = highest

  def __call__(self, x):
    """Float array -> multiples of the step, same shape and dtype.

    The derivative is straight-through: 1 between the outermost levels, else 0.
    """
    x = jnp.asarray(x)
    exact, inside = self._steps(x)
    steps = jax.lax.stop_gradient(jnp.round(inside))
    steps += inside - jax.lax.stop_gradient(inside)  # 0, with the derivative
    return (exact * steps).astype(x.dtype)

  def integers(self, x):
    """The steps n, int32 of x's shape, for which `self(x)` is step * n."""
    _, inside = self._steps(jnp.asarray(x))
    return jax.lax.stop_gradient(jnp.round(inside)).astype(jnp.int32)

  def _steps(self, x):
    """The step in the dtype to compute in, and x over it, between the ends."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f'inputs must be floating, not {x.dtype}')
    dtype = jnp.float64 if x.dtype == 'float64' else jnp.float32
    step = self.step[...].astype(dtype)
    # As `ops.quantize` does it: a quotient rounds otherwise now and then.
    inside = jnp.clip(x.astype(dtype) * (1 / step), self.lowest, self.highest)
    return step, inside

  @property
  def signed(self) -> bool:
    """Whether it has levels below zero."""
    return self.lowest < 0

  def bits(self) -> int:
    """Bits that its levels take."""
    return bits_between(self.lowest, self.highest)


class Scales(nnx.Module):
  """What is left of a group's gates: one factor per kept channel, [size]."""

  def __init__(self, scale):
    self.scale = Constant(scale)

  def mean(self):
    """The factors, [1, size]."""
    return self.scale[...][None]


class HardenedModel(compress.Compressed):
  """A smaller model of integers; called like the model it came from."""


def bits_between(lowest: int, highest: int) -> int:
  """Whole bits of as many levels as there are from one to the other.

  >>> [bits_between(0, n) for n in (0, 7, 8)], bits_between(-7, 7)
  ([1, 3, 4], 4)
  >>> bits_between(-1, 2), bits_between(-2, 1)
  (2, 2)
  """
  return max(1, (highest - lowest).bit_length())


def kernel_bits(integers, *, odd: bool = False) -> int:
  """Whole bits of two's complement that a kernel's integers take.

  Args:
    integers: of any shape.
    odd: whether all are; bits are then those of what they are twice of, and 1.

  Returns:
    Bits, at least 2; at least 1 of odd ones, as -1 and 1 take.

  >>> kernel_bits([-2, 1]), kernel_bits([-1, 2])
  (2, 3)
  >>> kernel_bits([-3, 3], odd=True), kernel_bits([-1, 1], odd=True)
  (2, 1)
  """
  integers = np.asarray(integers, np.int64)
  if odd:
    integers = integers >> 1
  largest = int(max(integers.max(), -1 - integers.min()))
  return max(2 - odd, bits_between(-1 - largest, largest))


def harden(model: compress.Compressed) -> HardenedModel:
  """Rounds a frozen model for good.

  Args:
    model: from `compress.freeze`, usually finetuned.

  Returns:
    A new model with integer kernels; its predictions are the frozen model's.

  Raises:
    ValueError: the model still has channels and bits to settle, or a
      variable of it is not finite (named).
  """
  if model.structure.plan is None:
    raise ValueError(
      'harden needs a model whose channels and bits are settled: freeze it '
      'with a plan first'
    )
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
    if not jnp.issubdtype(value.dtype, jnp.floating):
      continue
    # What is not learned may be infinite, as a mask of attention.
    learned = isinstance(leaf, nnx.Param | nnx.BatchStat)
    bad = ~jnp.isfinite(value) if learned else jnp.isnan(value)
    if jnp.any(bad):
      raise ValueError(
        f'{"/".join(map(str, path))} is not finite; nothing was hardened'
      )
  inner = nnx.clone(compress.eval_view(model.model))
  gates = [Scales(gate.mu[...]) for gate in model.gates]
  hardened = HardenedModel(inner, gates, model.structure)
  for hook in compress.hooks(hardened):
    if hook.operands.weight is not None:
      _settle(hook)
  asked = _statistics_asked_for(hardened)
  for path, module in nnx.iter_modules(hardened):
    # Those of the batch stay, where the model's own code asks for them; a class
    # of one's own may compute something else.
    if type(module) is nnx.BatchNorm and False not in asked.get(path, ()):
      _settle_norm(module)
  return hardened


def _statistics_asked_for(model: HardenedModel) -> dict[tuple, set[bool]]:
  """Whether calls of each batch norm use running averages, or the batch's."""
  found: dict[tuple, set[bool]] = {}
  arguments = model.structure.graph.arguments
  if arguments is None:
    return found

  class Noting(nnx.BatchNorm):
    """Notes what is asked for, wherever it is called."""

    def __call__(self, x, use_running_average=None, **kwargs):
      running = use_running_average
      if running is None:
        running = self.use_running_average
      found.setdefault(self.noted_as, set()).add(bool(running))
      return super().__call__(x, use_running_average, **kwargs)

  graphdef, state = nnx.split(model)
  arrays, whole = graph_lib.split_arrays(arguments)

  def call(state, arrays):
    copy = nnx.merge(graphdef, state)
    for path, module in list(nnx.iter_modules(copy)):
      if type(module) is nnx.BatchNorm:
        module.__class__, module.noted_as = Noting, path
    args, kwargs = whole(arrays)
    copy(*args, **kwargs)

  jax.eval_shape(call, nnx.as_pure(state), arrays)
  return found


def _settle(hook: compress.Hook):
  weight, act = hook.operands.weight, hook.operands.act
  integers = weight.integers(hook.layer.kernel[...])
  width = int(jnp.max(jnp.abs(integers)))
  dtype = jnp.int8 if width < 2**7 else jnp.int16
  hook.layer.kernel = layers.IntegerParam(integers.astype(dtype))
  hook.operands.weight = nnx.data(Dequantizer(weight.unit, odd=weight.mid_rise))
  lowest, highest = map(int, act.integers(jnp.array([-jnp.inf, jnp.inf])))
  hook.operands.act = nnx.data(FixedQuantizer(act.grid()[0], lowest, highest))


def _settle_norm(norm: nnx.BatchNorm) -> None:
  """Moves the statistics of a batch norm into its scale and bias.

  Its mean is 0 then and its variance 1, so that what it computes is one product
  and one sum: the same everywhere, where square roots are not.
  """
  if norm.scale is None or norm.bias is None:
    return  # nowhere to put them
  if any(v[...].dtype != jnp.float32 for v in (norm.scale, norm.bias)):
    return  # nor exactly enough
  mean, var, scale, bias = (
    np.asarray(v[...], np.float64)
    for v in (norm.mean, norm.var, norm.scale, norm.bias)
  )
  factor = scale / np.sqrt(var + norm.epsilon)
  for variable, value in (
    (norm.scale, factor),
    (norm.bias, bias - mean * factor),
    (norm.mean, np.zeros_like(mean)),
    (norm.var, np.full_like(var, _rest_of_one(norm.epsilon))),
  ):
    variable.set_value(jnp.asarray(value, variable.get_value().dtype))


def _rest_of_one(epsilon: float) -> np.float32:
  """The float32 that is exactly 1 once epsilon is added in float32."""
  one, added = np.float32(1), np.float32(epsilon)
  rest = one - added
  while rest + added != one:
    rest = np.nextafter(rest, one if rest + added < one else np.float32(0))
  return rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
  """What one layer of a hardened model is and costs."""

  name: str
  kind: str
  in_size: int  # channels of the dense layer's input
  out_size: int
  kept_in: int
  kept_out: int
  weight_bits: int  # 32 for a layer left in float32
  act_bits: int
  macs: int  # multiply-accumulates per example
  float_macs: int  # of the dense layer
  bops: int  # bit operations per example
  weights: int  # kernel elements left


def count(model: HardenedModel, *args) -> list[LayerReport]:
  """Counts a hardened model from what it holds, not from how it was made.

  MACs come from tracing the sliced model, bits from its integers and grids.

  Args:
    model: a hardened model.
    *args: a batch of inputs, or of `jax.ShapeDtypeStruct`.

  Returns:
    One report per layer in execution order; products outside of layers, as in
    attention, are rows of kind 'product' at 32 x 32 bits.
  """
  dense = model.structure.graph
  traced = graph_lib.trace(model, *args)
  found = {path: (layer, ops_) for path, layer, ops_ in compress.hooks(model)}
  rows = []
  for name, was in dense.layers.items():
    now = traced.layers[f'model/{name}']
    layer, operands = found[name]
    weight_bits = act_bits = compress.FLOAT_BITS
    if isinstance(operands.weight, Dequantizer):
      odd = operands.weight.odd
      weight_bits = kernel_bits(layer.kernel[...], odd=odd)
      act_bits = operands.act.bits()
    rows.append(
      LayerReport(
        name=name,
        kind=was.kind,
        in_size=len(was.in_group),
        out_size=len(was.out_group),
        kept_in=len(now.in_group),
        kept_out=len(now.out_group),
        weight_bits=weight_bits,
        act_bits=act_bits,
        macs=now.macs,
        float_macs=was.macs,
        bops=now.macs * weight_bits * act_bits,
        weights=now.weights,
      )
    )
  # A loop over examples has as many products as there are examples.
  same = len(traced.products) == len(dense.products)
  pairs = zip(traced.products, dense.products if same else traced.products)
  return rows + [_product(now, was.macs) for now, was in pairs]


def _product(product: graph_lib.Product, float_macs: int) -> LayerReport:
  bits = compress.FLOAT_BITS
  return LayerReport(
    name=product.name,
    kind='product',
    in_size=0,
    out_size=0,
    kept_in=0,
    kept_out=0,
    weight_bits=bits,
    act_bits=bits,
    macs=product.macs,
    float_macs=float_macs,
    bops=product.macs * bits * bits,
    weights=0,
  )


def totals(model: HardenedModel, rows: list[LayerReport]) -> dict[str, Any]:
  """Sums of a count: MACs, BOPs, their dense float32 values, and ratios.

  `relative_weights` is that of the bits of all kernels.
  """
  graph = model.structure.graph
  float_macs = graph.float_macs
  float_bits = compress.FLOAT_BITS * sum(
    layer.weights for layer in graph.layers.values()
  )
  float_bops = compress.FLOAT_BITS**2 * float_macs
  bops = sum(row.bops for row in rows)
  return {
    'macs': sum(row.macs for row in rows),
    'float_macs': float_macs,
    'bops': bops,
    'float_bops': float_bops,
    'relative_bops': bops / float_bops,
    'relative_macs': sum(row.macs for row in rows) / float_macs,
    'relative_weights': sum(r.weights * r.weight_bits for r in rows)
    / float_bits,
  }
