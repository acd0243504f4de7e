"""Rules for products: a MAC layer ties its channels, others freeze them."""

import dataclasses
import math
from typing import Any

import numpy as np

from djpq_jax.graph import arrays
from djpq_jax.graph import labels
from djpq_jax.graph import layout
from djpq_jax.graph import units as units_lib


@dataclasses.dataclass(eq=False)
class Use:
  """What one MAC layer was seen to do, summed over its calls."""

  path: str
  weights: int = 0
  macs: int = 0
  calls: int = 0
  seen: set[int] = dataclasses.field(default_factory=set)
  in_axes: tuple[int | None, ...] = ()
  out_axes: tuple[int | None, ...] = ()
  in_units: list[np.ndarray] = dataclasses.field(default_factory=list)
  out_units: list[np.ndarray] = dataclasses.field(default_factory=list)
  feature_axes: set[int | None] = dataclasses.field(default_factory=set)
  depthwise: bool = False
  first: bool = False
  last: bool = False
  positions: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Other:
  """A product outside of the layers, and the units of its result's axes."""

  name: str
  macs: int
  units: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Ledger:
  """The units, and the products that were seen so far."""

  units: units_lib.Units
  batch: int
  uses: dict[str, Use] = dataclasses.field(default_factory=dict)
  others: list[Other] = dataclasses.field(default_factory=list)
  # Variables that kernels are made of and axes that they have, by layer; and
  # Variables that others read.
  kernels: dict[str, set[str]] = dataclasses.field(default_factory=dict)
  ranks: dict[str, int] = dataclasses.field(default_factory=dict)
  read: set[str] = dataclasses.field(default_factory=set)

  def per_example(self, count: int, *operands: arrays.Traced) -> int:
    """Divides the batch out of a product's count, rounded up.

    What does not depend on the batch stays: an accelerator computes it once
    for all examples, and for a single one as well.
    """

    def has_batch(x):  # or is as wide, and equal all along: an empty state
      spread = x.shape[:1] == (self.batch,) and x.axes[0] is None
      return x.batched or spread

    free = not any(map(has_batch, operands))
    return count if free else -(-count // self.batch)


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
  """Axes of a product, with the kernel (if any) on the right."""

  eqn: object
  left: arrays.Traced
  right: arrays.Traced
  left_axes: tuple[int, ...]  # contracted
  right_axes: tuple[int, ...]
  right_free: tuple[int, ...]
  macs: int


def _is_kernel(x):
  return x.tag is not None and x.tag.role == 'kernel'


def dot_general(ledger, eqn, operands, repeat):
  """Linear layers, attention, einsums."""
  (lc, rc), (lb, rb) = eqn.params['dimension_numbers']
  left, right = operands
  lf = [d for d in range(len(left.shape)) if d not in (*lc, *lb)]
  rf = [d for d in range(len(right.shape)) if d not in (*rc, *rb)]
  shape = tuple(eqn.outvars[0].aval.shape)
  macs = math.prod(shape) * math.prod(left.shape[d] for d in lc)
  if _is_kernel(left) and not _is_kernel(right):
    product = _Product(eqn, right, left, rc, lc, tuple(lf), macs)
  else:
    product = _Product(eqn, left, right, lc, rc, tuple(rf), macs)
  units = ledger.units
  pairs = zip(lb, rb, strict=True)
  axes = [units.meet(left.axes[i], right.axes[j]) for i, j in pairs]
  family: dict[str, Any]
  batch_axes = list(axes)
  axes += [left.axes[d] for d in lf] + [right.axes[d] for d in rf]
  if _is_kernel(product.right):
    for label in batch_axes:
      units.freeze(label, f'is a batch axis of {product.right.tag.layer}')
    use = _record(ledger, product, repeat, shape)
    _record_axes(units, use, product)
    family = _from_layer(use, operands)
  else:
    _record_other(ledger, product, repeat, axes)
    family = arrays.heritage(operands)
  return [arrays.Traced(shape, tuple(axes), **family)]


def _from_layer(use, operands) -> dict[str, Any]:
  """What the output of a layer takes from its operands."""
  found = arrays.heritage(operands)
  return {'sources': frozenset([use.path]), 'batched': found['batched']}


def _record(ledger, product, repeat, shape):
  """Adds one product of a marked kernel to what is known of its layer."""
  tag = product.right.tag
  use = ledger.uses.setdefault(tag.layer, Use(tag.layer))
  if tag.call not in use.seen:
    use.seen.add(tag.call)
    use.calls += repeat
  use.weights = math.prod(product.right.shape)
  use.macs += ledger.per_example(product.macs * repeat, product.left)
  # A sum of the input and an activation is no image, nor is an embedding.
  use.first |= product.left.sources == {arrays.INPUT}
  features = math.prod(product.right.shape[d] for d in product.right_free)
  size = math.prod(shape) // max(features, 1)
  use.positions = max(use.positions, ledger.per_example(size, product.left))
  use.feature_axes.add(_feature_axis(product))
  return use


def _feature_axis(product):
  """Where the layer's inputs held the channels that the product contracts."""
  tag = product.left.tag
  if tag is None or tag.call != product.right.tag.call:
    return None
  if len(product.left_axes) != 1:
    return None
  axis = tag.axes[product.left_axes[0]]
  return None if axis is None else axis - tag.ndim


def _kernel_axes(x, dims):
  return tuple(x.tag.axes[d] for d in dims)


def _record_axes(units, use, product):
  right, left = product.right, product.left

  def known(label, size):
    return units.opaque(size, layout.POSITION) if label is None else label

  use.in_axes = _kernel_axes(right, product.right_axes)
  use.out_axes = _kernel_axes(right, product.right_free)
  use.in_units = [
    known(units.meet(right.axes[j], left.axes[i]), left.shape[i])
    for i, j in zip(product.left_axes, product.right_axes, strict=True)
  ]
  use.out_units = [
    known(right.axes[d], right.shape[d]) for d in product.right_free
  ]
  if not left.batched:  # each example of a batch has gates of its own
    for i in product.left_axes:
      units.freeze(left.axes[i], f'is read by {use.path} without a batch')


def _record_other(ledger, product, repeat, axes=()):
  """A product outside of the MAC layers: nobody can gate its operands."""
  left, right, units = product.left, product.right, ledger.units
  name = product.eqn.primitive.name
  what = _other_operands(left, right)
  shapes = f'{list(left.shape)} x {list(right.shape)}'
  macs = ledger.per_example(product.macs * repeat, left, right)
  known = tuple(label for label in axes if label is not None)
  ledger.others.append(Other(f'{name} of {what}, {shapes}', macs, known))
  ledger.read.update(left.params, right.params)
  reason = f'contracted by a product of {what} ({name})'
  for x, dims in ((left, product.left_axes), (right, product.right_axes)):
    # A parameter's free axes become channels that no layer produces.
    for d in dims if x.sources else range(len(x.shape)):
      units.freeze(x.axes[d], reason)


def _other_operands(left, right) -> str:
  """In words, what a product outside of the layers multiplies."""
  still = [x for x in (left, right) if not x.sources]
  raw = sorted({path for x in still for path in x.params})
  if raw:
    return 'the raw parameter ' + ' and '.join(raw)
  return 'an activation and a constant' if still else 'two activations'


def conv_general_dilated(ledger, eqn, operands, repeat):
  """Convolutions: dense, grouped, depthwise, transposed."""
  left, right = operands
  if eqn.params['batch_group_count'] != 1:
    return labels.opaque(ledger.units, eqn, operands)
  product = _conv_product(eqn, left, right)
  shape = tuple(eqn.outvars[0].aval.shape)
  out_label = right.axes[eqn.params['dimension_numbers'].rhs_spec[0]]
  family: dict[str, Any]
  if _is_kernel(right):
    use = _record(ledger, product, repeat, shape)
    _tie_conv(ledger.units, product, use)
    family = _from_layer(use, operands)
  else:
    _record_other(ledger, product, repeat)
    for x in operands:
      for label in x.axes:
        ledger.units.freeze(label, 'convolved outside of a layer')
    family = arrays.heritage(operands)
  axes = _conv_axes(ledger.units, eqn, left, out_label)
  return [arrays.Traced(shape, axes, **family)]


def _conv_product(eqn, left, right):
  numbers, p = eqn.params['dimension_numbers'], eqn.params
  taps = math.prod(right.shape[d] for d in numbers.rhs_spec[1:])
  positions = math.prod(eqn.outvars[0].aval.shape)
  if math.prod(p['lhs_dilation']) != 1:
    # Of a transposed convolution only the real inputs count: each meets all
    # taps, whatever zeros stand between them.
    batch, _, *spatial = numbers.lhs_spec
    inputs = math.prod(left.shape[d] for d in (batch, *spatial))
    positions = inputs * right.shape[numbers.rhs_spec[0]]
    positions //= math.prod(p['window_strides'])
  return _Product(
    eqn,
    left,
    right,
    (numbers.lhs_spec[1],),
    (numbers.rhs_spec[1],),
    (numbers.rhs_spec[0],),
    positions * taps,
  )


def _tie_conv(units, product, use):
  """Dense, depthwise or grouped: who depends on whom."""
  left, right = product.left, product.right
  groups = product.eqn.params['feature_group_count']
  if groups == 1:
    _record_axes(units, use, product)
    return
  channels = left.shape[product.left_axes[0]]
  features = right.shape[product.right_free[0]]
  ins = left.axes[product.left_axes[0]]
  if ins is None:
    ins = units.opaque(channels, layout.POSITION)
  outs = right.axes[product.right_free[0]]
  if outs is None:
    outs = units.opaque(features, layout.POSITION)
  use.in_axes = _kernel_axes(right, product.right_axes)
  use.out_axes = _kernel_axes(right, product.right_free)
  use.in_units, use.out_units = [ins], [outs]
  use.depthwise = groups == channels == features
  if use.depthwise:
    units.meet(ins, outs)
  else:
    _freeze_groups(units, product, use, groups == channels)


def _freeze_groups(units, product, use, multiplier):
  if multiplier:
    reason = f'depthwise convolution with a channel multiplier in {use.path}'
  else:
    reason = f'grouped convolution in {use.path}'
  kernel_ins = product.right.axes[product.right_axes[0]]
  for label in (*use.in_units, *use.out_units, kernel_ins):
    units.freeze(label, reason)


def _conv_axes(units, eqn, left, out_label):
  """Labels of the output: positions are new where the window moves."""
  numbers, shape = eqn.params['dimension_numbers'], eqn.outvars[0].aval.shape
  axes = [None] * len(shape)
  axes[numbers.out_spec[0]] = left.axes[numbers.lhs_spec[0]]
  axes[numbers.out_spec[1]] = out_label
  for source, target in zip(
    numbers.lhs_spec[2:], numbers.out_spec[2:], strict=True
  ):
    units.freeze(left.axes[source], 'convolved over')
    axes[target] = units.opaque(shape[target], layout.POSITION)
  return tuple(axes)
