"""JAX primitives that move elements or pick some, as ONNX operators."""

from collections.abc import Callable

import numpy as np

from djpq_jax.export import elementwise
from djpq_jax.export import translate

Constant = translate.Constant
Kernel = translate.Kernel
Tensor = translate.Tensor


def _broadcast_in_dim(t, eqn, values):
  """Axes are added; along the new ones it stays at size 1."""
  shape = eqn.params['shape']
  at = eqn.params['broadcast_dimensions']
  x = values[0]
  have = x.dims if isinstance(x, Tensor) else x.array.shape
  dims = [1] * len(shape)
  for axis, size in zip(at, have):
    dims[axis] = size
  if not isinstance(x, Tensor):
    return Constant(x.array.reshape(dims))
  if len(dims) == len(have):
    return x
  # The new axes come first in memory, wherever JAX has them.
  new = [axis for axis in range(len(shape)) if axis not in at]
  if x.order == tuple(range(len(have))):
    name = t.graph.constant(np.array(new, np.int64))
    return t.add('Unsqueeze', [x, name], dims)
  order = [*new, *(at[axis] for axis in x.order)]
  name = t.graph.constant(np.arange(len(new), dtype=np.int64))
  return t.add('Unsqueeze', [x, name], dims, order)


def _reshape(t, eqn, values):
  shape = eqn.outvars[0].aval.shape
  x = values[0]
  if isinstance(x, Kernel):
    return Kernel(x.integers.reshape(shape), x.step.reshape(shape), x.layer)
  return t.reshaped(t.full(x, eqn.invars[0].aval.shape), shape)


def _squeeze(t, eqn, values):
  """Axes of size 1 go, in whatever order the others are."""
  x = values[0]
  if isinstance(x, Kernel):
    return _reshape(t, eqn, values)
  return _squeezed(t, x, eqn.params['dimensions'])


def _squeezed(t, x, gone):
  dims = [d for axis, d in enumerate(x.dims) if axis not in gone]
  kept = [axis for axis in x.order if axis not in gone]
  at = sorted(x.order.index(axis) for axis in gone)
  name = t.graph.constant(np.array(at, np.int64))
  order = [sorted(kept).index(axis) for axis in kept]
  return t.add('Squeeze', [x, name], dims, order)


def _transpose(t, eqn, values):
  """Nothing is moved: axes get other numbers."""
  x, perm = values[0], eqn.params['permutation']
  if isinstance(x, Kernel):
    integers = np.transpose(x.integers, perm)
    return Kernel(integers, np.transpose(x.step, perm), x.layer)
  order = [perm.index(axis) for axis in x.order]
  return Tensor(x.name, tuple(x.dims[axis] for axis in perm), tuple(order))


def _concatenate(t, eqn, values):
  axis = eqn.params['dimension']
  tensors = [v for v in values if isinstance(v, Tensor)]
  order = tensors[0].order
  full = [
    t.full(value, var.aval.shape, order)
    for value, var in zip(values, eqn.invars)
  ]
  dims = eqn.outvars[0].aval.shape
  return t.add('Concat', full, dims, order, axis=order.index(axis))


def _slice(t, eqn, values):
  shape = eqn.invars[0].aval.shape
  x = t.full(values[0], shape, values[0].order)
  starts = eqn.params['start_indices']
  ends = eqn.params['limit_indices']
  strides = eqn.params['strides'] or [1] * len(shape)
  rows = []
  for axis, (size, *row) in enumerate(zip(shape, starts, ends, strides)):
    if tuple(row) == (0, size, 1):
      continue
    if not all(isinstance(number, int) for number in row):
      raise t.refusal("'slice' cuts the open batch dimension")
    rows.append((*row, x.order.index(axis)))
  if not rows:
    return x
  start, end, stride, at = (
    t.graph.constant(np.array(column, np.int64)) for column in zip(*rows)
  )
  names = [x, start, end, at, stride]
  return t.add('Slice', names, eqn.outvars[0].aval.shape, x.order)


def _gather(t, eqn, values):
  """Known places along one axis, as x[:, ::2], or one place, as x[:, 0]."""
  x, at = values
  numbers = eqn.params['dimension_numbers']
  shape = eqn.invars[0].aval.shape
  sizes = eqn.params['slice_sizes']
  dims = eqn.outvars[0].aval.shape
  if not isinstance(at, Constant) or numbers.operand_batching_dims:
    raise t.refusal("'gather' at places that depend on the images")
  x = t.full(x, shape, x.order)
  axes, gone = numbers.start_index_map, numbers.collapsed_slice_dims
  if at.array.ndim == 2 and len(axes) == 1 and gone == axes:
    (axis,) = axes
    whole = all(a == axis or sizes[a] == n for a, n in enumerate(shape))
    others = tuple(a for a in range(len(dims)) if a != axis)
    if whole and numbers.offset_dims == others:
      places = np.clip(at.array[:, 0], 0, shape[axis] - 1).astype(np.int64)
      name = t.graph.constant(places)
      return t.add('Gather', [x, name], dims, x.order, axis=x.order.index(axis))
  if at.array.ndim != 1:
    raise t.refusal("'gather' along more than one axis")
  for axis, start in zip(axes, at.array.tolist()):
    start = min(max(start, 0), shape[axis] - sizes[axis])
    row = start, start + sizes[axis], x.order.index(axis)
    names = [t.graph.constant(np.array([n], np.int64)) for n in row]
    dims = [sizes[a] if a == axis else d for a, d in enumerate(x.dims)]
    x = t.add('Slice', [x, *names], dims, x.order)
  return _squeezed(t, x, gone) if gone else x


def _split(t, eqn, values):
  """A slice for each part."""
  shape = eqn.invars[0].aval.shape
  axis = eqn.params['axis']
  x = t.full(values[0], shape, values[0].order)
  at = t.graph.constant(np.array([x.order.index(axis)], np.int64))
  parts, start = [], 0
  for size, var in zip(eqn.params['sizes'], eqn.outvars):
    ends = [
      t.graph.constant(np.array([n], np.int64)) for n in (start, start + size)
    ]
    parts.append(t.add('Slice', [x, *ends, at], var.aval.shape, x.order))
    start += size
  return parts


def _pad(t, eqn, values):
  x, fill = values
  config = eqn.params['padding_config']
  number = elementwise.scalar(fill)
  if number is None or any(
    min(low, high, inner) < 0 or inner for low, high, inner in config
  ):
    raise t.refusal("'pad' with holes, with less than nothing or by a variable")
  x = t.full(x, eqn.invars[0].aval.shape, x.order)
  rows = [config[axis] for axis in x.order]
  pads = [low for low, _, _ in rows] + [high for _, high, _ in rows]
  names = [
    t.graph.constant(np.array(pads, np.int64)),
    t.graph.constant(np.asarray(number, eqn.invars[0].aval.dtype)),
  ]
  return t.add('Pad', [x, *names], eqn.outvars[0].aval.shape, x.order)


RULES: dict[str, Callable] = {
  'broadcast_in_dim': _broadcast_in_dim,
  'reshape': _reshape,
  'squeeze': _squeeze,
  'transpose': _transpose,
  'concatenate': _concatenate,
  'slice': _slice,
  'gather': _gather,
  'split': _split,
  'pad': _pad,
}
