"""How channel identity goes through the primitives between MAC layers.

Each rule takes (units, equation, operands) and returns the outputs. A primitive
without a rule freezes the channels that go in: the tracer never guesses.
"""

import dataclasses
import math

import numpy as np

from djpq_jax.graph import arrays

ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
  bessel_i1e cbrt ceil clamp clz complex conj convert_element_type copy copy_p
  cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
  igamma igammac imag integer_pow is_finite le le_to lgamma log log1p logistic
  lt lt_to max min mul name ne neg nextafter not or population_count pow real
  reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
  shift_right_logical sharding_constraint sign sin sinh sqrt square
  stop_gradient sub tan tanh xor""".split()
)
REDUCTIONS = frozenset(
  """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod
  reduce_sum reduce_xor""".split()
)
CUMULATIVE = frozenset('cumlogsumexp cummax cummin cumprod cumsum'.split())
WINDOWS = frozenset(
  'reduce_window_max reduce_window_min reduce_window_sum'.split()
)
# Noise is equally distributed along each axis, so any extent will do.
RANDOM = frozenset(
  """random_bits random_clone random_fold_in random_gamma random_seed
  random_split random_unwrap random_wrap rng_bit_generator rng_uniform
  threefry2x32""".split()
)

CUT = 'cut at fixed positions'
PADDED = 'padded with a fixed number of zero channels (option-A shortcut)'
POSITION = 'is an axis of positions'


def join_axes(units, labels, sizes, size):
  """Ties the labels that meet on one axis; returns the label of the result."""
  result = None
  for label, extent in zip(labels, sizes, strict=True):
    if label is None:
      continue
    if extent != size:
      units.freeze(label, 'one channel is broadcast over an axis')
    elif result is None:
      result = label
    else:
      units.tie(result, label)
  return result


def _shape(eqn, i=0):
  return tuple(eqn.outvars[i].aval.shape)


def _one(eqn, operands, axes, tag=None):
  shape = _shape(eqn)
  family = arrays.heritage(operands)
  return [arrays.Traced(shape, tuple(axes), tag, **family)]


def _retag(tag, kept):
  """The tag after axes moved; `kept` holds the old axis of each new axis."""
  if tag is None:
    return None
  moved = tuple(None if k is None else tag.axes[k] for k in kept)
  return dataclasses.replace(tag, axes=moved)


def elementwise(units, eqn, operands):
  """Operands of equal rank (or scalars) meet axis by axis."""
  shape = _shape(eqn)
  full = [x for x in operands if len(x.shape) == len(shape)]
  axes = [
    join_axes(
      units, [x.axes[d] for x in full], [x.shape[d] for x in full], size
    )
    for d, size in enumerate(shape)
  ]
  tags = [x.tag for x in operands if x.tag is not None]
  return _one(eqn, operands, axes, tags[0] if len(tags) == 1 else None)


def same(units, eqn, operands):
  """Outputs are the operands, one to one."""
  del units, eqn
  return list(operands)


def broadcast_in_dim(units, eqn, operands):
  """New axes are uniform; so are axes of extent 1 that grow."""
  x = operands[0]
  shape = _shape(eqn)
  axes, kept = [None] * len(shape), [None] * len(shape)
  for source, target in enumerate(eqn.params['broadcast_dimensions']):
    if x.shape[source] == shape[target]:
      axes[target], kept[target] = x.axes[source], source
    else:
      join_axes(units, [x.axes[source]], [x.shape[source]], shape[target])
  return _one(eqn, operands, axes, _retag(x.tag, kept))


def transpose(units, eqn, operands):
  """Axes move with their labels."""
  del units
  x, order = operands[0], eqn.params['permutation']
  axes = [x.axes[d] for d in order]
  return _one(eqn, operands, axes, _retag(x.tag, order))


def squeeze(units, eqn, operands):
  """Drops axes of extent 1."""
  x = operands[0]
  gone = {d % len(x.shape) for d in eqn.params['dimensions']}
  for d in gone:
    units.freeze(x.axes[d], 'its single channel is squeezed away')
  kept = [d for d in range(len(x.shape)) if d not in gone]
  return _one(eqn, operands, [x.axes[d] for d in kept], _retag(x.tag, kept))


def reshape(units, eqn, operands):
  """Flattening repeats labels; splitting a labelled axis freezes it."""
  x, shape = operands[0], _shape(eqn)
  axes, kept = [None] * len(shape), [None] * len(shape)
  if math.prod(shape) > 0:
    for sources, targets in _segments(x.shape, shape):
      _reshape_segment(units, x, shape, sources, targets, axes, kept)
  return _one(eqn, operands, axes, _retag(x.tag, kept))


def _segments(old, new):
  """Smallest runs of axes with equal product; axes of extent 1 are left out."""
  old = [(d, n) for d, n in enumerate(old) if n != 1]
  new = [(d, n) for d, n in enumerate(new) if n != 1]
  while old:
    sources, targets = [old.pop(0)], [new.pop(0)]
    while (a := math.prod(n for _, n in sources)) != (
      b := math.prod(n for _, n in targets)
    ):
      (sources if a < b else targets).append((old if a < b else new).pop(0))
    yield [d for d, _ in sources], [d for d, _ in targets]


def _reshape_segment(units, x, shape, sources, targets, axes, kept):
  labels = [x.axes[d] for d in sources]
  if len(sources) == len(targets) == 1:
    axes[targets[0]], kept[targets[0]] = labels[0], sources[0]
  elif all(label is None for label in labels):
    pass
  elif len(targets) == 1:
    axes[targets[0]] = _merge(units, labels, [x.shape[d] for d in sources])
  else:
    parts = [shape[d] for d in targets]
    reason = f'split by a reshape into {parts}'
    for label in labels:
      units.freeze(label, reason)
    for d in targets:
      axes[d] = units.opaque(shape[d], reason)


def _merge(units, labels, sizes):
  """Each element of a flattened axis belongs to the channel it came from."""
  total = math.prod(sizes)
  open_axes = [
    d
    for d, label in enumerate(labels)
    if label is not None and not units.is_opaque(label)
  ]
  if len(open_axes) == 1:
    d = open_axes[0]
    inner = math.prod(sizes[d + 1 :])
    repeated = np.repeat(labels[d], inner)
    return np.tile(repeated, total // len(repeated))
  reason = 'merged with another axis by a reshape'
  for d in open_axes:
    units.freeze(labels[d], reason)
  return units.opaque(total, reason if open_axes else POSITION)


def reduction(units, eqn, operands):
  """A reduction over channels (mean, softmax, norm) mixes them all."""
  x, gone = operands[0], {int(d) for d in eqn.params['axes']}
  reason = (
    'normalised over the channel axis, or reduced over it '
    f'({eqn.primitive.name})'
  )
  for d in gone:
    units.freeze(x.axes[d], reason)
  kept = [d for d in range(len(x.shape)) if d not in gone]
  return _one(eqn, operands, [x.axes[d] for d in kept], _retag(x.tag, kept))


def cumulative(units, eqn, operands):
  """A running sum over channels depends on their order and number."""
  x = operands[0]
  units.freeze(x.axes[eqn.params['axis']], 'accumulated over the channel axis')
  return _one(eqn, operands, x.axes)


def window(units, eqn, operands):
  """Pooling keeps the axes that the window does not touch."""
  x, p = operands[0], eqn.params
  axes = []
  for d, size in enumerate(_shape(eqn)):
    touched = (
      p['window_dimensions'][d] != 1
      or p['window_strides'][d] != 1
      or tuple(p['padding'][d]) != (0, 0)
      or p.get('base_dilation', (1,) * (d + 1))[d] != 1
    )
    if touched:
      units.freeze(x.axes[d], 'pooled over the channel axis')
    axes.append(units.opaque(size, POSITION) if touched else x.axes[d])
  return _one(eqn, operands, axes)


def reduce_window(units, eqn, operands):
  """The general form: one array and the initial value of its reduction."""
  rule = window if len(operands) == 2 else opaque
  return rule(units, eqn, operands)


def concatenate(units, eqn, operands):
  """Channels one after the other; other axes meet."""
  shape, axis = _shape(eqn), eqn.params['dimension']
  axes = [
    join_axes(units, [x.axes[d] for x in operands], [n] * len(operands), n)
    for d, n in enumerate(shape)
    if d != axis
  ]
  axes.insert(axis, _concatenate_labels(units, operands, axis))
  return _one(eqn, operands, axes)


def _concatenate_labels(units, operands, axis):
  labels = [x.axes[axis] for x in operands]
  if any(label is None for label in labels):
    for label in labels:
      units.freeze(label, PADDED)
  return np.concatenate(
    [
      units.opaque(x.shape[axis], PADDED) if label is None else label
      for x, label in zip(operands, labels, strict=True)
    ]
  )


def pad(units, eqn, operands):
  """Padding with channels fixes the number of the others."""
  x = operands[0]
  axes = []
  for d, (low, high, inner) in enumerate(eqn.params['padding_config']):
    label = x.axes[d]
    if (low, high, inner) != (0, 0, 0):
      units.freeze(label, PADDED)
      label = _pad_label(units, label, x.shape[d], low, high, inner)
    axes.append(label)
  return _one(eqn, operands, axes)


def _pad_label(units, label, size, low, high, inner):
  total = low + high + size + inner * max(size - 1, 0)
  result = units.opaque(total, PADDED)
  if label is not None and min(low, high) >= 0 and size:
    result[low : low + (size - 1) * (inner + 1) + 1 : inner + 1] = label
  return result


def slice_(units, eqn, operands):
  """Channels that are cut out at fixed positions keep their identity."""
  x, p = operands[0], eqn.params
  strides = p['strides'] or (1,) * len(x.shape)
  axes = [
    _part(units, label, slice(*bounds))
    for label, *bounds in zip(
      x.axes, p['start_indices'], p['limit_indices'], strides, strict=True
    )
  ]
  return _one(eqn, operands, axes)


def _part(units, label, part):
  if label is None or len(label[part]) == len(label):
    return label
  units.freeze(label, CUT)
  return label[part]


def split(units, eqn, operands):
  """As `slice_`, into several outputs."""
  x, axis = operands[0], eqn.params['axis']
  outputs, start = [], 0
  for i, size in enumerate(eqn.params['sizes']):
    part = _part(units, x.axes[axis], slice(start, start + int(size)))
    axes = (*x.axes[:axis], part, *x.axes[axis + 1 :])
    family = arrays.heritage(operands)
    outputs.append(arrays.Traced(_shape(eqn, i), axes, **family))
    start += int(size)
  return outputs


def rev(units, eqn, operands):
  """Keeps the tag: a transposed convolution flips its kernel's window."""
  x, axes = operands[0], list(operands[0].axes)
  for d in eqn.params['dimensions']:
    if axes[d] is not None and len(axes[d]) > 1:
      units.freeze(axes[d], 'reversed')
      axes[d] = axes[d][::-1]
  return _one(eqn, operands, axes, x.tag)


def sort(units, eqn, operands):
  """Sorting mixes the channels along its axis."""
  for x in operands:
    units.freeze(x.axes[eqn.params['dimension']], 'sorted')
  family = arrays.heritage(operands)
  return [arrays.Traced(x.shape, x.axes, **family) for x in operands]


def dynamic_slice(units, eqn, operands):
  """Axes that are taken whole keep their channels."""
  x = operands[0]
  axes = [
    label if label is None or n == old else _cut(units, label, n)
    for label, old, n in zip(x.axes, x.shape, _shape(eqn), strict=True)
  ]
  return _one(eqn, operands, axes)


def _cut(units, label, size):
  units.freeze(label, CUT)
  return units.opaque(size, CUT)


def dynamic_update_slice(units, eqn, operands):
  """Axes that are written whole are tied."""
  x, update = operands[:2]
  axes = []
  for d, size in enumerate(x.shape):
    label = x.axes[d]
    if update.shape[d] == size:
      label = join_axes(units, [label, update.axes[d]], [size, size], size)
    else:
      units.freeze(update.axes[d], CUT)
      label = units.opaque(size, CUT) if label is None else label
      units.freeze(label, CUT)
    axes.append(label)
  return _one(eqn, operands, axes)


def gather(units, eqn, operands):
  """Axes that are taken whole keep their channels (e.g. an embedding)."""
  x, indices = operands[:2]
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  offsets = [d for d in range(len(x.shape)) if d not in hidden]
  for d, label in enumerate(x.axes):
    if sizes[d] != x.shape[d] or d in hidden:
      units.freeze(label, CUT)
  shape = _shape(eqn)
  axes = [units.opaque(n, POSITION) for n in shape]
  for target, d in zip(numbers.offset_dims, offsets, strict=True):
    if sizes[d] == x.shape[d]:
      axes[target] = x.axes[d]
  batch = [d for d in range(len(shape)) if d not in numbers.offset_dims]
  for target, label in zip(batch, indices.axes[:-1], strict=True):
    axes[target] = label if label is not None else axes[target]
  return _one(eqn, operands, axes)


def iota(units, eqn, operands):
  """A range of numbers, as long as its axis is now."""
  del operands
  shape, d = _shape(eqn), eqn.params['dimension']
  axes = [None] * len(shape)
  axes[d] = units.opaque(shape[d], 'combined with a fixed range of numbers')
  return [arrays.Traced(shape, tuple(axes))]


def noise(units, eqn, operands):
  """Noise has no identity."""
  del units, operands
  return [arrays.uniform(v.aval.shape) for v in eqn.outvars]


def opaque(units, eqn, operands, reason=None):
  """What is not understood freezes what goes in, and hides what comes out."""
  reason = reason or (
    f'passes through "{eqn.primitive.name}", which the tracer does not follow'
  )
  for x in operands:
    for label in x.axes:
      units.freeze(label, reason)
  family = arrays.heritage(operands)
  return [
    arrays.Traced(
      _shape(eqn, i),
      tuple(units.opaque(n, reason) for n in _shape(eqn, i)),
      **family,
    )
    for i in range(len(eqn.outvars))
  ]


RULES = {
  **dict.fromkeys(ELEMENTWISE, elementwise),
  **dict.fromkeys(REDUCTIONS, reduction),
  **dict.fromkeys(CUMULATIVE, cumulative),
  **dict.fromkeys(WINDOWS, window),
  **dict.fromkeys(RANDOM, noise),
  'broadcast_in_dim': broadcast_in_dim,
  'concatenate': concatenate,
  'device_put': same,
  'dynamic_slice': dynamic_slice,
  'dynamic_update_slice': dynamic_update_slice,
  'gather': gather,
  'iota': iota,
  'optimization_barrier': same,
  'pad': pad,
  'reduce_window': reduce_window,
  'reshape': reshape,
  'rev': rev,
  'slice': slice_,
  'sort': sort,
  'split': split,
  'squeeze': squeeze,
  'transpose': transpose,
}
