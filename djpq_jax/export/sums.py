"""Makes each quantized product an integer one, or an exact one in float.

ONNX Runtime's integer layers take a bias in whole steps of their sums.  Where
no such bias leaves every level of the next grid where it begins, or where no
grid follows, a layer can run in float instead, on sums of whole numbers.
`exact_bias` and `exact_sums` keep each bit of the model's results; `settle`
prefers integer layers.
"""

import dataclasses

import numpy as np

from djpq_jax.export import biases
from djpq_jax.export import nodes

EXACT_IN_FLOAT = 2**24  # whole numbers below it
LARGEST_BIAS = 2**30  # it is int32, as the sums that it is added to

Grid = tuple[float, int, int]  # its step, its lowest and its highest level

# What ONNX Runtime moves a QuantizeLinear across.
_PASSED = ('Relu', 'MaxPool', 'Reshape', 'Transpose')


def settle(graph: nodes.Graph) -> None:
  """Makes each product an integer one where a grid follows it.

  Where no bias leaves all levels in place, the nearest is taken.
  """
  for node in list(graph.nodes):
    if node.op not in ('Conv', 'Gemm') or not is_quantized(graph, node):
      continue
    if node.op == 'Conv' and next_grid(graph, node) is None:
      exact_sums(graph, node)
      continue
    bias = _whole_bias(graph, node)
    if np.all(np.abs(bias.whole) < LARGEST_BIAS):
      give_bias(graph, node, bias)


def is_quantized(graph, node) -> bool:
  """Whether both operands of a product are levels of a grid."""
  above = [graph.producer(name) for name in node.inputs[:2]]
  return all(n is not None and n.op == 'DequantizeLinear' for n in above)


def _operands(graph, node) -> tuple[nodes.Node, nodes.Node]:
  """The nodes that make the input and the kernel of a quantized product."""
  inputs, weights = (graph.producer(name) for name in node.inputs[:2])
  assert inputs is not None
  assert weights is not None
  return inputs, weights


def _kernel(graph, node, weights):
  """Integers of a kernel, their steps [channels], the axis of channels."""
  integers, scale, _ = (graph.constants[i] for i in weights.inputs)
  axis = 0 if node.op == 'Conv' else 1
  return integers, np.broadcast_to(scale, (integers.shape[axis],)), axis


def exact_sums(graph: nodes.Graph, node: nodes.Node) -> None:
  """Takes the steps out of a product, which then runs in float.

  Its sums are then those of whole numbers, which float32 adds up exactly, in
  whatever order; the steps come after them.  Sums of rounded products would
  move some activations of the next layers to another level.  Where float32
  cannot hold the sums, the product is one of integers.
  """
  inputs, weights = _operands(graph, node)
  integers, scale, axis = _kernel(graph, node, weights)
  step, zero = (graph.constants[i] for i in inputs.inputs[1:])
  rank = len(graph.dims[node.output])
  shape = [1, -1, *[1] * (rank - 2)] if axis == 0 else [-1]
  after = [('Mul', (scale * np.float32(step)).reshape(shape))]
  if len(node.inputs) > 2:
    after.append(('Add', graph.constants[node.inputs.pop()].reshape(shape)))
  layer = node.layer
  last = node
  flat = np.moveaxis(np.abs(integers.astype(np.int64)), axis, 0)
  most = flat.reshape(len(flat), -1).sum(axis=1).max(initial=0)
  if most * _largest_input(graph, inputs)[0] < EXACT_IN_FLOAT:
    one = graph.constant(np.float32(1), 'one')
    node.inputs = [
      _whole(graph, node, [inputs.inputs[0], one, inputs.inputs[2]]),
      _whole(graph, node, [weights.inputs[0], one, _zero(graph)]),
    ]
    node.op = 'Conv' if axis == 0 else 'MatMul'
  else:
    node.op = 'ConvInteger' if axis == 0 else 'MatMulInteger'
    node.inputs = [
      inputs.inputs[0],
      weights.inputs[0],
      graph.constant(zero, f'{layer}/zero'),
    ]
    last = graph.insert_after(node, 'Cast', to=1)
  for op, array in after:
    last = graph.add_after(last, op, array, f'{layer}/{op}')


def _zero(graph) -> str:
  return graph.constant(np.array(0, np.int8), 'zero')


def _whole(graph, node, names) -> str:
  """A DequantizeLinear of its own for a product; the name of its output."""
  name = graph.name(f'{node.layer}/DequantizeLinear')
  made = nodes.Node('DequantizeLinear', names, name, {}, node.layer)
  graph.dims[name] = graph.dims[names[0]]
  graph.nodes.insert(graph.nodes.index(node), made)
  return name


def _whole_bias(graph: nodes.Graph, node: nodes.Node) -> biases.Bias:
  """A bias in whole steps of the sums: ONNX Runtime takes no other.

  The kernel's integers are made as large as they can be and its steps as
  small, so that a step of the sums is small; and where a whole number leaves
  all results as they are, it is taken.
  """
  grid = next_grid(graph, node)
  product = _product(graph, node)
  bias = np.zeros(len(product.scale))
  if len(node.inputs) > 2:
    bias = graph.constants[node.inputs[2]].astype(np.float64)
  unit = product.scale.astype(np.float64) * product.step
  begins = np.zeros((len(bias), 0))
  if grid is not None:
    begins = biases.level_begins(bias, unit, product.reach, *grid)
  bias = bias / unit
  return biases.whole_steps(
    bias, begins + bias[:, None], np.ceil(begins), product.most
  )


def exact_bias(
  graph: nodes.Graph, node: nodes.Node, chain, grid: Grid
) -> biases.Bias | None:
  """A bias that leaves each result of a product at its level.

  Args:
    graph: where all of it is.
    node: the product.
    chain: what follows it, from `folding.chain`.
    grid: that comes next, from `next_grid`.

  Returns:
    The bias of the product that has taken `chain` into it; None if there is no
    such one.
  """
  step, lowest, highest = grid
  product = _product(graph, node)
  channels = len(product.scale)
  factor, summand = (
    np.broadcast_to(a, (channels,)) for a in (chain.factor, chain.summand)
  )
  # Where a factor is negative, the kernel will be.
  sign = np.sign(factor).astype(np.float32)
  scale = product.scale * np.float32(product.step)

  def level(totals):
    y = sign[:, None] * totals.astype(np.float32) * scale[:, None]
    for op, array, first in chain.steps:
      column = np.broadcast_to(array, (channels,))[:, None]
      y = _FLOAT32[op](*((column, y) if first else (y, column)))
    return np.round(y / np.float32(step))

  levels = np.arange(lowest + 1, highest + 1)
  ends = biases.first_sums(level, levels, product.reach)
  folded = np.abs(product.scale * factor).astype(np.float32)
  unit = folded.astype(np.float64) * product.step
  if np.any(unit == 0):
    return None
  base = (levels - 0.5) * step / unit[:, None]
  base[np.isnan(ends)] = np.nan
  found = biases.whole_steps(summand / unit, base, ends, product.most)
  if found.elsewhere or np.any(np.abs(found.whole) >= LARGEST_BIAS):
    return None
  return found


_FLOAT32 = {
  'Add': np.add,
  'Sub': np.subtract,
  'Mul': np.multiply,
  'Div': np.divide,
}


@dataclasses.dataclass(frozen=True)
class _Product:
  """What is known of a quantized product.

  Attributes:
    scale: steps of its kernel, float32 [channels].
    step: of its input.
    reach: the largest magnitude of a sum, [channels].
    most: how many times finer the sums can get, [channels].
  """

  scale: np.ndarray
  step: float
  reach: np.ndarray
  most: np.ndarray


def _product(graph, node) -> _Product:
  inputs, weights = _operands(graph, node)
  integers, scale, axis = _kernel(graph, node, weights)
  flat = np.moveaxis(integers, axis, 0).reshape(len(scale), -1)
  flat = np.abs(flat.astype(np.int64))
  top, signed = _largest_input(graph, inputs)
  # Processors without 8-bit dot products add pairs of products in 16 bits.
  most = min(127, 2**15 // (2 * (255 if signed else top)))
  return _Product(
    scale,
    float(graph.constants[inputs.inputs[1]]),
    flat.sum(axis=1) * top,
    np.maximum(1, most // np.maximum(1, flat.max(axis=1))),
  )


def give_bias(graph: nodes.Graph, node: nodes.Node, bias: biases.Bias) -> None:
  """Gives a product a bias that was found for it."""
  inputs, weights = _operands(graph, node)
  integers, scale, axis = _kernel(graph, node, weights)
  channels = len(scale)
  step = float(graph.constants[inputs.inputs[1]])
  scale = (scale * bias.wider / bias.finer).astype(np.float32)
  layer = weights.layer
  column = [-1 if a == axis else 1 for a in range(integers.ndim)]
  integers = (integers * bias.finer.reshape(column)).astype(np.int8)
  weights.inputs = [
    graph.constant(integers, f'{layer}/kernel'),
    graph.constant(scale, f'{layer}/step'),
    graph.constant(np.zeros(channels, np.int8), f'{layer}/zero'),
  ]
  weights.attributes = {'axis': axis}
  names = [
    graph.constant(bias.whole.astype(np.int32), f'{layer}/bias'),
    graph.constant(scale * np.float32(step), f'{layer}/unit'),
    graph.constant(np.zeros(channels, np.int32), f'{layer}/zero'),
  ]
  name = graph.name(f'{layer}/DequantizeLinear')
  made = nodes.Node('DequantizeLinear', names, name, {'axis': 0}, layer)
  graph.dims[name] = (channels,)
  graph.nodes.insert(graph.nodes.index(node), made)
  node.inputs[2:] = [name]


def next_grid(graph, node) -> Grid | None:
  """(step, lowest, highest level) of the grid that a result goes to next."""
  below = graph.only_consumer(node.output)
  while below is not None and below.op in _PASSED:
    below = graph.only_consumer(below.output)
  if below is None or below.op != 'QuantizeLinear':
    return None
  step, zero = (graph.constants[i] for i in below.inputs[1:])
  low, high = _levels(graph, graph.only_consumer(below.output), int(zero))
  return float(step), low, high


def _levels(graph, clip, zero: int) -> tuple[int, int]:
  """The whole numbers that a clip leaves, or that the type has."""
  low, high = 0, 255
  if clip is not None and clip.op == 'Clip' and all(clip.inputs[1:]):
    low, high = (int(graph.constants[i]) for i in clip.inputs[1:])
  return low - zero, high - zero


def _largest_input(graph, dequantize) -> tuple[int, bool]:
  """The largest magnitude of a level, and whether levels have a sign."""
  zero = int(graph.constants[dequantize.inputs[2]])
  above = graph.producer(dequantize.inputs[0])
  while above is not None and above.op in ('Transpose', 'Reshape'):
    above = graph.producer(above.inputs[0])
  low, high = _levels(graph, above, zero)
  return max(-low, high, 1), zero > 0
