"""Quantization points, convolutions, matrix products and pooling in ONNX."""

import math

import numpy as np

from djpq_jax import harden
from djpq_jax.export import translate

Constant = translate.Constant
Kernel = translate.Kernel
Tensor = translate.Tensor

INT8_LEVELS = 127
UINT8_LEVELS = 255


def layer_input(t, eqn, values):
  """The input of a quantized layer: QuantizeLinear, DequantizeLinear.

  The whole numbers of a grid that has fewer than its type are clipped as
  integers: a Clip of floats would stand between a convolution and its
  QuantizeLinear, which ONNX Runtime then leaves apart.  Rounding is monotone,
  so the order does not matter.
  """
  layer = eqn.params['layer']
  t.layer = layer
  grid = t.program.grids[layer]
  x = values[0]
  if not isinstance(x, Tensor):
    x = t.full(x, eqn.invars[0].aval.shape)
  most = INT8_LEVELS if grid.signed else UINT8_LEVELS
  if grid.highest > most or grid.lowest < -INT8_LEVELS - 1:
    t.float_layers[layer] = f'its inputs have {grid.bits()} bits'
    return _rounded(t, x, grid)
  # One type for all: ONNX Runtime fuses no layer from one type to another.
  shift = 128 if grid.signed else 0
  zero = np.array(shift, np.uint8)
  low = shift + grid.lowest
  high = shift + grid.highest
  step = np.float32(grid.step[...])
  if t.form != 'qdq':
    # As the model does it; a quotient now and then rounds to another level.
    # 'qdq' keeps both scales of a pair alike, for runtimes that fuse.
    inverse = t.graph.constant(np.float32(1) / step, f'{layer}/inverse')
    x = t.add('Mul', [x, inverse], x.dims, x.order)
    step = np.float32(1)
  q = _node(t, layer, 'QuantizeLinear', x, step, zero)
  if (low, high) != (0, UINT8_LEVELS):
    q = _node(
      t, layer, 'Clip', q, np.array(low, np.uint8), np.array(high, np.uint8)
    )
  scale = np.float32(grid.step[...])
  result = _node(t, layer, 'DequantizeLinear', q, scale, zero)
  t.integers[result.name] = q.name, zero, layer
  return result


def _node(t, layer, op, x, *constants):
  names = [x.name, *(t.graph.constant(c, f'{layer}/{op}') for c in constants)]
  dims = [x.dims[axis] for axis in x.order]
  return Tensor(t.graph.add(op, names, dims, layer=layer), x.dims, x.order)


def _rounded(t, x, grid: harden.FixedQuantizer):
  """The same arithmetic on floats, for more levels than eight bits have."""
  high = np.float32(grid.highest)
  low = np.float32(grid.lowest)
  step = np.float32(grid.step[...])
  scaled = t.add('Mul', [x, t.graph.constant(1 / step)], x.dims, x.order)
  whole = t.add('Round', [scaled], x.dims, x.order)
  names = [whole, t.graph.constant(low), t.graph.constant(high)]
  clipped = t.add('Clip', names, x.dims, x.order)
  return t.add('Mul', [clipped, t.graph.constant(step)], x.dims, x.order)


def layer_kernel(t, eqn, values):
  """The kernel of a quantized layer."""
  layer = eqn.params['layer']
  integers = np.asarray(values[0].array)
  step = np.broadcast_to(t.program.steps[layer], integers.shape)
  if np.abs(integers.astype(np.int32)).max(initial=0) > INT8_LEVELS:
    t.float_layers[layer] = 'its kernel has more than 8 bits'
    return Constant(integers.astype(np.float32) * step)
  return Kernel(integers.astype(np.int8), step, layer)


def _weights(t, kernel: Kernel, axis: int):
  """A dequantized kernel; its name.  The axis is that of the outputs."""
  others = tuple(a for a in range(kernel.step.ndim) if a != axis)
  step = kernel.step.max(axis=others)
  if not np.array_equal(step, kernel.step.min(axis=others)):
    why = 'its kernel has other grids than one for each output'
    t.float_layers.setdefault(kernel.layer, why)
    return t.graph.constant(kernel.array, f'{kernel.layer}/kernel')
  layer = kernel.layer
  attributes = {}
  if np.all(step == step.flat[0]):
    step = step.flat[0]
  else:
    attributes = {'axis': axis}
  zero = np.zeros(np.shape(step), np.int8)
  names = [
    t.graph.constant(kernel.integers, f'{layer}/kernel'),
    t.graph.constant(np.asarray(step, np.float32), f'{layer}/step'),
    t.graph.constant(zero, f'{layer}/zero'),
  ]
  shape = kernel.integers.shape
  return t.graph.add(
    'DequantizeLinear', names, shape, layer=layer, **attributes
  )


def _operand(t, value, axis: int):
  """Name of the second operand of a product that is known."""
  if isinstance(value, Kernel):
    return _weights(t, value, axis)
  return t.graph.constant(value.array)


def _product(t, op: str, x, kernel, axis: int, dims, order, **attributes):
  """A convolution or matrix product of a tensor and what is known."""
  layer = kernel.layer if isinstance(kernel, Kernel) else ''
  physical = [dims[a] for a in order]
  known = t.integers.get(x.name)
  if t.form == 'integer' and layer and known is not None:
    scaled = _integer_product(t, op, known, kernel, axis, physical, attributes)
    return Tensor(scaled, tuple(dims), tuple(order))
  names = [x.name, _operand(t, kernel, axis)]
  name = t.graph.add(op, names, physical, layer=layer, **attributes)
  return Tensor(name, tuple(dims), tuple(order))


def _integer_product(t, op, known, kernel, axis, dims, attributes) -> str:
  """An integer operator; its sums are exact, and scaled in float32."""
  integers, zero, layer = known
  names = [
    integers,
    t.graph.constant(kernel.integers, f'{layer}/kernel'),
    t.graph.constant(zero, f'{layer}/zero'),
  ]
  sums = t.graph.add(f'{op}Integer', names, dims, layer=layer, **attributes)
  cast = t.graph.add('Cast', [sums], dims, layer=layer, to=1)
  others = tuple(a for a in range(kernel.step.ndim) if a != axis)
  step = kernel.step.max(axis=others)
  shape = [-1 if a == 1 else 1 for a in range(len(dims))]
  if op == 'MatMul':
    shape = [-1]
  scale = step * np.float32(t.program.grids[layer].step[...])
  name = t.graph.constant(scale.reshape(shape), f'{layer}/scale')
  return t.graph.add('Mul', [cast, name], dims, layer=layer)


def convolution(t, eqn, values):
  """Conv, with the batch first and the channels second."""
  p = eqn.params
  if any(d != 1 for d in p['lhs_dilation']):
    raise t.refusal(
      "'conv_general_dilated' with a dilated input, as of a "
      'transposed convolution'
    )
  if p['batch_group_count'] != 1:
    raise t.refusal("'conv_general_dilated' with groups of the batch")
  if any(n < 0 for pair in p['padding'] for n in pair):
    raise t.refusal("'conv_general_dilated' with negative padding")
  numbers = p['dimension_numbers']
  x, kernel = values
  x = t.full(x, eqn.invars[0].aval.shape, numbers.lhs_spec)
  attributes = {
    'strides': list(p['window_strides']),
    'pads': [a for a, _ in p['padding']] + [b for _, b in p['padding']],
    'dilations': list(p['rhs_dilation']),
    'group': p['feature_group_count'],
  }
  dims = eqn.outvars[0].aval.shape
  if isinstance(kernel, Tensor):
    kernel = t.full(kernel, eqn.invars[1].aval.shape, numbers.rhs_spec)
    return t.add('Conv', [x, kernel], dims, numbers.out_spec, **attributes)
  kernel = _transposed(kernel, numbers.rhs_spec)
  return _product(t, 'Conv', x, kernel, 0, dims, numbers.out_spec, **attributes)


def _transposed(kernel, perm):
  if isinstance(kernel, Kernel):
    return Kernel(
      np.transpose(kernel.integers, perm),
      np.transpose(kernel.step, perm),
      kernel.layer,
    )
  return Constant(np.transpose(kernel.array, perm))


def _reshaped(kernel, shape):
  if isinstance(kernel, Kernel):
    return Kernel(
      kernel.integers.reshape(shape), kernel.step.reshape(shape), kernel.layer
    )
  return Constant(kernel.array.reshape(shape))


def dot(t, eqn, values):
  """MatMul, with reshapes around it where an operand has more axes."""
  (contract, rcontract), (batch, rbatch) = eqn.params['dimension_numbers']
  x, y = values
  shape, yshape = (v.aval.shape for v in eqn.invars)
  free = [a for a in range(len(shape)) if a not in (*contract, *batch)]
  yfree = [a for a in range(len(yshape)) if a not in (*rcontract, *rbatch)]
  size = math.prod(shape[a] for a in contract)
  dims = eqn.outvars[0].aval.shape
  y_sizes = [yshape[a] for a in yfree]
  if not isinstance(x, Tensor) and not batch:
    return _swapped(t, eqn, values)
  if not isinstance(y, Tensor) and not batch:
    if not isinstance(y, Kernel):
      y = Constant(np.broadcast_to(y.array, yshape))
    y = _transposed(y, (*rcontract, *yfree))
    y = _reshaped(y, (size, math.prod(y_sizes)))
    x = _matrix(
      t, x, shape, [*free, *contract], [*(shape[a] for a in free), size]
    )
    product = [*(shape[a] for a in free), math.prod(y_sizes)]
    found = _product(t, 'MatMul', x, y, 1, product, tuple(range(len(product))))
    return t.reshaped(found, dims)
  sizes = [shape[a] for a in batch]
  rows = math.prod(shape[a] for a in free)
  x = _matrix(t, x, shape, [*batch, *free, *contract], [*sizes, rows, size])
  y = _matrix(
    t,
    y,
    yshape,
    [*rbatch, *rcontract, *yfree],
    [*(yshape[a] for a in rbatch), size, math.prod(y_sizes)],
  )
  found = t.add('MatMul', [x, y], [*sizes, rows, math.prod(y_sizes)])
  return t.reshaped(found, dims)


def _matrix(t, value, shape, axes, sizes):
  """A tensor whose axes are in this order in memory, and then merged."""
  x = t.full(value, shape, axes)
  plain = Tensor(x.name, tuple(shape[a] for a in axes), tuple(range(len(axes))))
  if plain.dims != tuple(sizes):
    plain = t.reshaped(plain, sizes)
  return plain


def _swapped(t, eqn, values):
  """A product with what is known on the left."""
  (contract, rcontract), _ = eqn.params['dimension_numbers']
  shape, yshape = (v.aval.shape for v in eqn.invars)
  x, y = values
  free = [a for a in range(len(shape)) if a not in contract]
  yfree = [a for a in range(len(yshape)) if a not in rcontract]
  size = math.prod(shape[a] for a in contract)
  if not isinstance(x, Kernel):
    x = Constant(np.broadcast_to(x.array, shape))
  x = _reshaped(
    _transposed(x, (*contract, *free)),
    (size, math.prod(shape[a] for a in free)),
  )
  sizes = [yshape[a] for a in yfree]
  y = _matrix(t, y, yshape, [*yfree, *rcontract], [*sizes, size])
  product = [*sizes, math.prod(shape[a] for a in free)]
  found = _product(t, 'MatMul', y, x, 1, product, tuple(range(len(product))))
  found = t.reshaped(found, [*sizes, *(shape[a] for a in free)])
  # JAX has the axes of the left operand first.
  count = len(sizes)
  rank = len(found.dims)
  perm = [*range(count, rank), *range(count)]
  order = [perm.index(axis) for axis in found.order]
  return Tensor(found.name, tuple(found.dims[a] for a in perm), tuple(order))


def _window(t, eqn, x):
  """The input in an order that ONNX pools, and the attributes."""
  p = eqn.params
  sizes, strides = p['window_dimensions'], p['window_strides']
  if any(d != 1 for d in p['base_dilation']):
    raise t.refusal(f'{eqn.primitive.name!r} with a dilated input')
  rank = len(sizes)
  order = x.order
  whole = lambda a: sizes[a] == strides[a] == 1 and p['padding'][a] == (0, 0)
  if not all(whole(axis) for axis in order[:2]):
    order = (0, rank - 1, *range(1, rank - 1))
  if not all(whole(axis) for axis in order[:2]) or rank < 3:
    raise t.refusal(f'{eqn.primitive.name!r} over the batch or the channels')
  x = t.full(x, eqn.invars[0].aval.shape, order)
  spatial = order[2:]
  padding = [p['padding'][a] for a in spatial]
  attributes = {
    'kernel_shape': [sizes[a] for a in spatial],
    'strides': [strides[a] for a in spatial],
    'pads': [low for low, _ in padding] + [high for _, high in padding],
  }
  dilations = [p['window_dilation'][a] for a in spatial]
  if any(d != 1 for d in dilations):
    attributes['dilations'] = dilations
  return x, order, attributes


def max_pool(t, eqn, values):
  """MaxPool."""
  x, order, attributes = _window(t, eqn, values[0])
  dims = eqn.outvars[0].aval.shape
  return t.add('MaxPool', [x], dims, order, **attributes)


def sum_pool(t, eqn, values):
  """AveragePool, times the number of pixels of a window."""
  x, order, attributes = _window(t, eqn, values[0])
  if 'dilations' in attributes:
    raise t.refusal("'reduce_window_sum' with a dilated window")
  dims = eqn.outvars[0].aval.shape
  mean = t.add(
    'AveragePool', [x], dims, order, count_include_pad=1, **attributes
  )
  area = t.graph.constant(np.float32(math.prod(attributes['kernel_shape'])))
  return t.add('Mul', [mean, area], dims, order)
