"""How each JAX primitive is said in ONNX; products are in `products`."""

from collections.abc import Callable

import numpy as np

from djpq_jax.export import products
from djpq_jax.export import translate

Constant = translate.Constant
Kernel = translate.Kernel
Tensor = translate.Tensor

UNARY = {
  'neg': 'Neg',
  'exp': 'Exp',
  'log': 'Log',
  'tanh': 'Tanh',
  'logistic': 'Sigmoid',
  'erf': 'Erf',
  'sqrt': 'Sqrt',
  'abs': 'Abs',
  'sign': 'Sign',
  'floor': 'Floor',
  'ceil': 'Ceil',
  'not': 'Not',
  'sin': 'Sin',
  'cos': 'Cos',
}
BINARY = {
  'add': 'Add',
  'add_any': 'Add',
  'mul': 'Mul',
  'div': 'Div',
  'max': 'Max',
  'min': 'Min',
  'pow': 'Pow',
  'and': 'And',
  'or': 'Or',
  'eq': 'Equal',
  'lt': 'Less',
  'le': 'LessOrEqual',
  'gt': 'Greater',
  'ge': 'GreaterOrEqual',
}
REDUCTIONS = {
  'reduce_sum': 'ReduceSum',
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
}
ROUND_HALF_TO_EVEN = 1  # jax.lax.RoundingMethod


def _same(t, eqn, values):
  return values if eqn.primitive.multiple_results else values[0]


def _unary(op: str):
  return lambda t, eqn, values: t.add(
    op, values[:1], values[0].dims, values[0].order
  )


def _round(t, eqn, values):
  if int(eqn.params['rounding_method']) != ROUND_HALF_TO_EVEN:
    raise t.refusal("'round' away from zero has no operator in ONNX")
  return t.add('Round', values, values[0].dims, values[0].order)


def _rsqrt(t, eqn, values):
  root = t.add('Sqrt', values, values[0].dims, values[0].order)
  return t.add('Reciprocal', [root], root.dims, root.order)


def _with(op: str, number: float, swap: bool = False):
  """op(x, number), or op(number, x)."""

  def rule(t, eqn, values):
    x = values[0]
    name = t.graph.constant(np.float32(number))
    both = [name, x] if swap else [x, name]
    return t.add(op, both, x.dims, x.order)

  return rule


def _chain(*steps):
  """One rule after the other."""

  def rule(t, eqn, values):
    for step in steps:
      values = [step(t, eqn, values)]
    return values[0]

  return rule


def _square(t, eqn, values):
  x = values[0]
  return t.add('Mul', [x, x], x.dims, x.order)


def _integer_pow(t, eqn, values):
  power = eqn.params['y']
  if power == 2:
    return _square(t, eqn, values)
  return _with('Pow', power)(t, eqn, values)


def joined(t, values):
  """Operands of an elementwise node: (names, dims, order of the axes)."""
  tensors = [v for v in values if isinstance(v, Tensor)]
  # The largest keeps its order, so that small ones are transposed.
  leader = max(tensors, key=lambda v: sum(d != 1 for d in v.dims))
  order = leader.order
  dims = leader.dims
  names = []
  for value in values:
    if isinstance(value, Tensor) and not value.dims:
      names.append(value.name)
    elif isinstance(value, Tensor):
      names.append(t.laid_out(value, order).name)
      dims = _broadcast(dims, value.dims)
    else:
      array = value.array
      if array.ndim:
        array = np.transpose(array, order)
        dims = _broadcast(dims, value.array.shape)
      names.append(t.graph.constant(array))
  return names, dims, order


def _broadcast(one, other):
  return tuple(b if a == 1 else a for a, b in zip(one, other, strict=True))


def _is(value, number: float) -> bool:
  return isinstance(value, Constant) and bool(np.all(value.array == number))


def _scalar(value) -> float | None:
  """The number that a constant consists of."""
  if isinstance(value, Constant) and value.array.size:
    first = value.array.flat[0]
    if np.all(value.array == first):
      return float(first)
  return None


def _binary(op: str):
  def rule(t, eqn, values):
    names, dims, order = joined(t, values)
    return t.add(op, names, dims, order)

  return rule


def _sub(t, eqn, values):
  """A batch norm of a hardened model has no mean left to take off."""
  x, other = values
  if isinstance(x, Tensor) and _is(other, 0):
    return x
  return _binary('Sub')(t, eqn, values)


def _max(t, eqn, values):
  for x, other in (values, values[::-1]):
    if isinstance(x, Tensor) and _is(other, 0):
      return t.add('Relu', [x], x.dims, x.order)
  return _binary('Max')(t, eqn, values)


def _min(t, eqn, values):
  """Smaller than a number is a Clip, which relu6 is made of."""
  for x, other in (values, values[::-1]):
    top = _scalar(other)
    if isinstance(x, Tensor) and top == np.finfo(np.float32).max:
      return x  # of `reproducible.guarded`: ONNX fuses no products
    if isinstance(x, Tensor) and top is not None:
      return _clip(t, x, None, top)
  return _binary('Min')(t, eqn, values)


def _clip(t, x, low, high):
  names = [
    '' if v is None else t.graph.constant(np.float32(v)) for v in (low, high)
  ]
  return t.add('Clip', [x, *names], x.dims, x.order)


def _clamp(t, eqn, values):
  low, x, high = values
  if _scalar(low) is not None and _scalar(high) is not None:
    return _clip(t, x, _scalar(low), _scalar(high))
  floored = _binary('Max')(t, eqn, [x, low])
  return _binary('Min')(t, eqn, [floored, high])


def _not_equal(t, eqn, values):
  equal = _binary('Equal')(t, eqn, values)
  return t.add('Not', [equal], equal.dims, equal.order)


def _select(t, eqn, values):
  which, *cases = values
  if len(cases) != 2 or eqn.invars[0].aval.dtype != np.bool_:
    raise t.refusal("'select_n' among more than two cases")
  names, dims, order = joined(t, [which, cases[1], cases[0]])
  return t.add('Where', names, dims, order)


_ONNX_TYPES = {  # onnx.TensorProto, which is not imported here
  'float32': 1,
  'uint8': 2,
  'int8': 3,
  'int32': 6,
  'int64': 7,
  'bool': 9,
  'float16': 10,
}


def cast_type(t, dtype) -> int:
  """ONNX's number of a dtype."""
  if str(dtype) not in _ONNX_TYPES:
    raise t.refusal(f'arrays of {dtype} are not supported')
  return _ONNX_TYPES[str(dtype)]


def _convert(t, eqn, values):
  x = values[0]
  new = eqn.params['new_dtype']
  if eqn.invars[0].aval.dtype == new:
    return x
  if isinstance(x, Kernel):
    return Constant(x.array.astype(new))
  return t.add('Cast', [x], x.dims, x.order, to=cast_type(t, new))


def _reduce(op: str):
  def rule(t, eqn, values):
    axes = eqn.params['axes']
    x = t.full(values[0], eqn.invars[0].aval.shape, values[0].order)
    kept = [axis for axis in x.order if axis not in axes]
    at = sorted(x.order.index(axis) for axis in axes)
    dims = eqn.outvars[0].aval.shape
    order = [sorted(kept).index(axis) for axis in kept]
    if op != 'ReduceSum':
      return t.add(op, [x], dims, order, axes=at, keepdims=0)
    name = t.graph.constant(np.array(at, np.int64))
    return t.add(op, [x, name], dims, order, keepdims=0)

  return rule


def _argmax(t, eqn, values):
  (axis,) = eqn.params['axes']
  x = t.full(values[0], eqn.invars[0].aval.shape)
  dims = eqn.outvars[0].aval.shape
  found = t.add('ArgMax', [x], dims, axis=axis, keepdims=0)
  to = cast_type(t, eqn.params['index_dtype'])
  return t.add('Cast', [found], dims, to=to)


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
  number = _scalar(fill)
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


def _table() -> dict[str, Callable]:
  table: dict[str, Callable] = {k: _unary(v) for k, v in UNARY.items()}
  table |= {k: _binary(v) for k, v in BINARY.items()}
  table |= {k: _reduce(v) for k, v in REDUCTIONS.items()}
  for name in (
    'stop_gradient copy copy_p optimization_barrier sharding_constraint '
    'mesh_cast pvary'.split()
  ):
    table[name] = _same
  table |= {
    'sub': _sub,
    'max': _max,
    'min': _min,
    'ne': _not_equal,
    'round': _round,
    'rsqrt': _rsqrt,
    'square': _square,
    'integer_pow': _integer_pow,
    'exp2': _with('Pow', 2.0, swap=True),
    'log1p': _chain(_with('Add', 1.0), _unary('Log')),
    'expm1': _chain(_unary('Exp'), _with('Sub', 1.0)),
    'erfc': _chain(_unary('Erf'), _with('Sub', 1.0, swap=True)),
    'clamp': _clamp,
    'select_n': _select,
    'convert_element_type': _convert,
    'argmax': _argmax,
    'broadcast_in_dim': _broadcast_in_dim,
    'reshape': _reshape,
    'squeeze': _squeeze,
    'transpose': _transpose,
    'concatenate': _concatenate,
    'slice': _slice,
    'gather': _gather,
    'split': _split,
    'pad': _pad,
    'conv_general_dilated': products.convolution,
    'dot_general': products.dot,
    'reduce_window_max': products.max_pool,
    'reduce_window_sum': products.sum_pool,
    'djpq_input': products.layer_input,
    'djpq_kernel': products.layer_kernel,
  }
  return {name: _dense(name, rule) for name, rule in table.items()}


# They take a kernel as the integers that it is.
_KERNELS = {'convert_element_type', 'reshape', 'squeeze', 'transpose'}
_KERNELS |= {'conv_general_dilated', 'dot_general', 'djpq_kernel'}


def _dense(name: str, rule):
  """Whatever else a kernel meets takes its floats."""

  def checked(t, eqn, values):
    kernels = [v for v in values if isinstance(v, Kernel)]
    if kernels and name not in _KERNELS:
      for kernel in kernels:
        why = f'its kernel goes through {name!r}'
        t.float_layers.setdefault(kernel.layer, why)
      values = [
        Constant(v.array) if isinstance(v, Kernel) else v for v in values
      ]
      if all(isinstance(v, Constant) for v in values):
        return t.evaluate(eqn, values)
    return rule(t, eqn, values)

  return checked


RULES = _table()
