"""JAX primitives that compute on each element, as ONNX operators."""

from collections.abc import Callable

import numpy as np

from djpq_jax.export import translate

Constant = translate.Constant
Kernel = translate.Kernel
Tensor = translate.Tensor

_UNARY = {
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
_BINARY = {
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
_SAME = (
  'stop_gradient copy copy_p optimization_barrier sharding_constraint '
  'mesh_cast pvary'
).split()
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


def scalar(value) -> float | None:
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
    top = scalar(other)
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
  if scalar(low) is not None and scalar(high) is not None:
    return _clip(t, x, scalar(low), scalar(high))
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


RULES: dict[str, Callable] = {
  **{name: _unary(op) for name, op in _UNARY.items()},
  **{name: _binary(op) for name, op in _BINARY.items()},
  **dict.fromkeys(_SAME, _same),
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
}
