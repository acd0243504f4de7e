"""Rules for primitives that move, cut or join axes.

Each takes (units, equation, operands) and returns the outputs.
"""

import dataclasses
import math

import numpy as np

from djpq_jax.graph import arrays

CUT = 'cut at fixed positions'
PADDED = 'padded with a fixed number of zero channels (option-A shortcut)'
POSITION = 'is an axis of positions'


def broadcast_in_dim(units, eqn, operands):
  """New axes are uniform; so are axes of extent 1 that grow."""
  x = operands[0]
  shape = arrays.out_shape(eqn)
  axes: list[np.ndarray | None] = [None] * len(shape)
  kept: list[int | None] = [None] * len(shape)
  for source, target in enumerate(eqn.params['broadcast_dimensions']):
    if x.shape[source] == shape[target]:
      axes[target], kept[target] = x.axes[source], source
    else:
      units.join([x.axes[source]], [x.shape[source]], shape[target])
  return arrays.single(eqn, operands, axes, arrays.moved(x.tag, kept))


def transpose(units, eqn, operands):
  """Axes move with their labels."""
  del units
  x, order = operands[0], eqn.params['permutation']
  axes = [x.axes[d] for d in order]
  return arrays.single(eqn, operands, axes, arrays.moved(x.tag, order))


def squeeze(units, eqn, operands):
  """Drops axes of extent 1."""
  x = operands[0]
  gone = {d % len(x.shape) for d in eqn.params['dimensions']}
  for d in gone:
    units.freeze(x.axes[d], 'its single channel is squeezed away')
  kept = [d for d in range(len(x.shape)) if d not in gone]
  return arrays.single(
    eqn, operands, [x.axes[d] for d in kept], arrays.moved(x.tag, kept)
  )


def reshape(units, eqn, operands):
  """Flattening repeats labels; splitting a labelled axis freezes it."""
  x, shape = operands[0], arrays.out_shape(eqn)
  axes, kept = [None] * len(shape), [None] * len(shape)
  if math.prod(shape) > 0:
    for sources, targets in _segments(x.shape, shape):
      _reshape_segment(units, x, shape, sources, targets, axes, kept)
  return arrays.single(eqn, operands, axes, arrays.moved(x.tag, kept))


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


def concatenate(units, eqn, operands):
  """Channels one after the other; other axes meet."""
  shape, axis = arrays.out_shape(eqn), eqn.params['dimension']
  axes = [
    units.join([x.axes[d] for x in operands], [n] * len(operands), n)
    for d, n in enumerate(shape)
    if d != axis
  ]
  axes.insert(axis, _concatenate_labels(units, operands, axis))
  return arrays.single(eqn, operands, axes)


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


def tile(units, eqn, operands):
  """Channels again and again, as in a concatenation."""
  del units
  x = operands[0]
  axes = [
    label if label is None else np.tile(label, n)
    for label, n in zip(x.axes, eqn.params['reps'], strict=True)
  ]
  return arrays.single(eqn, operands, axes)


def stack(units, eqn, operands):
  """A new axis, of fixed extent; the others meet."""
  axes = [
    units.meet(*(x.axes[d] for x in operands))
    for d in range(len(operands[0].shape))
  ]
  axes.insert(eqn.params['axis'], units.opaque(len(operands), POSITION))
  return arrays.single(eqn, operands, axes)


def unstack(units, eqn, operands):
  """Undoes `stack`."""
  x, axis = operands[0], eqn.params['axis']
  units.freeze(x.axes[axis], CUT)
  part = arrays.single(eqn, operands, (*x.axes[:axis], *x.axes[axis + 1 :]))
  return part * len(eqn.outvars)


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
  return arrays.single(eqn, operands, axes)


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
  return arrays.single(eqn, operands, axes)


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
    outputs.append(arrays.Traced(arrays.out_shape(eqn, i), axes, **family))
    start += int(size)
  return outputs


def rev(units, eqn, operands):
  """Keeps the tag: a transposed convolution flips its kernel's window."""
  x, axes = operands[0], list(operands[0].axes)
  for d in eqn.params['dimensions']:
    if axes[d] is not None and len(axes[d]) > 1:
      units.freeze(axes[d], 'reversed')
      axes[d] = axes[d][::-1]
  return arrays.single(eqn, operands, axes, x.tag)


def dynamic_slice(units, eqn, operands):
  """Axes that are taken whole keep their channels."""
  x = operands[0]
  axes = [
    label if label is None or n == old else _cut(units, label, n)
    for label, old, n in zip(
      x.axes, x.shape, arrays.out_shape(eqn), strict=True
    )
  ]
  return arrays.single(eqn, operands, axes)


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
      label = units.join([label, update.axes[d]], [size, size], size)
    else:
      units.freeze(update.axes[d], CUT)
      label = units.opaque(size, CUT) if label is None else label
      units.freeze(label, CUT)
    axes.append(label)
  return arrays.single(eqn, operands, axes)


def gather(units, eqn, operands):
  """Axes that are taken whole keep their channels (e.g. an embedding)."""
  x, indices = operands[:2]
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  hidden = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  offsets = [d for d in range(len(x.shape)) if d not in hidden]
  for d, label in enumerate(x.axes):
    if sizes[d] != x.shape[d] or d in hidden:
      units.freeze(label, CUT)
  shape = arrays.out_shape(eqn)
  axes = [units.opaque(n, POSITION) for n in shape]
  for target, d in zip(numbers.offset_dims, offsets, strict=True):
    if sizes[d] == x.shape[d]:
      axes[target] = x.axes[d]
  batch = [d for d in range(len(shape)) if d not in numbers.offset_dims]
  for target, label in zip(batch, indices.axes[:-1], strict=True):
    axes[target] = label if label is not None else axes[target]
  found = arrays.single(eqn, operands, axes)
  if x.sources or not (x.params and indices.sources):
    return found
  # Picked from a parameter, as by an embedding: it depends on the input, but
  # is none.
  picked = (indices.sources - {arrays.INPUT}) | {arrays.PICKED}
  return [dataclasses.replace(y, sources=picked) for y in found]
