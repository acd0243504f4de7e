"""Simplifies a graph so that a layer and its next grid stand side by side.

ONNX Runtime makes one integer operator of DequantizeLinear, Conv, Relu,
QuantizeLinear where nothing stands between them.  Batch norm and what gates
have left are such things: both are a factor and a summand per channel, which
go into the scales of the kernel and into the bias.  That holds in real
arithmetic, while in float32 the last bit may differ; so it is done where no
level of the next grid then begins at another sum, or where it is asked for.
"""

import dataclasses
import math

import numpy as np

from djpq_jax.export import nodes
from djpq_jax.export import sums

AFFINE = ('Add', 'Sub', 'Mul', 'Div')


def simplify(graph: nodes.Graph, form: str) -> None:
  """Does all of it, in place.

  Args:
    graph: to change.
    form: see `export`; but for 'qdq' no result changes in its last bit.
  """
  graph.prune()
  while any(_hoisted(graph, node) for node in list(graph.nodes)):
    pass
  for node in list(graph.nodes):
    if node.op == 'QuantizeLinear':
      _clip_integers(graph, node)
  if form == 'qdq':
    for node in list(graph.nodes):
      if node.op in ('Conv', 'MatMul') and node in graph.nodes:
        _fold(graph, node)
    sums.settle(graph)
  elif form == 'exact':
    for node in list(graph.nodes):
      if node.op in ('Conv', 'MatMul') and sums.is_quantized(graph, node):
        _settle_exactly(graph, node)
  graph.prune()


def _settle_exactly(graph: nodes.Graph, node: nodes.Node) -> None:
  """Makes a product an integer layer if that rounds all results alike."""
  found = chain(graph, node)
  grid = sums.next_grid(graph, found.last)
  flat = node.op == 'Conv' or len(graph.dims[node.output]) == 2
  if grid is not None and flat and np.all(found.factor != 0):
    bias = sums.exact_bias(graph, node, found, grid)
    if bias is not None:
      _carry_out(graph, node, found)
      sums.give_bias(graph, node, bias)
      return
  sums.exact_sums(graph, node)


def _constant_operand(graph, node):
  """(index, array) of the operand of an affine node that is constant."""
  for i in (1, 0):
    if node.inputs[i] in graph.constants:
      return i, graph.constants[node.inputs[i]]
  return None, None


def _hoisted(graph: nodes.Graph, node: nodes.Node) -> bool:
  """Moves a positive factor to before a relu, a pooling or a reshape."""
  if node.op != 'Mul':
    return False
  at, factor = _constant_operand(graph, node)
  if at is None or factor.dtype != np.float32:
    return False
  above = graph.producer(node.inputs[1 - at])
  if above is None or graph.only_consumer(above.output) is not node:
    return False
  moved = _before(graph, above, factor)
  if moved is None:
    return False
  graph.remove(node, above.output)
  graph.dims[above.output] = graph.dims[node.output]
  x = above.inputs[0]
  name = graph.constant(moved, 'factor')
  first = nodes.Node('Mul', [x, name], graph.name('Mul'))
  graph.dims[first.output] = graph.dims[x]
  graph.nodes.insert(graph.nodes.index(above), first)
  above.inputs[0] = first.output
  if above.op == 'Clip':
    # Its upper end moves along; it may be one for each channel now.
    high = graph.constants[above.inputs[2]] * factor
    above.op = 'Min'
    above.inputs = [first.output, graph.constant(high, 'high')]
  elif above.op == 'Min':
    i, high = _constant_operand(graph, above)
    assert i is not None
    above.inputs[i] = graph.constant(high * factor, 'high')
  return True


def _before(graph, above, factor):
  """The factor as it is before a node, or None if it cannot go there."""
  shape = graph.dims[above.inputs[0]] if above.inputs else ()
  if above.op in ('Relu', 'MaxPool', 'Clip', 'Min') and np.all(factor > 0):
    if above.op == 'Clip' and (above.inputs[1] or len(above.inputs) < 3):
      return None
    if above.op == 'Min' and not _constant_second(graph, above):
      return None
    if above.op == 'MaxPool' and not _per_channel(factor, len(shape)):
      return None
    return factor
  if above.op in ('Transpose', 'Reshape') and factor.size == 1:
    return factor.reshape(())
  if above.op == 'Transpose' and factor.ndim == len(shape):
    return np.transpose(factor, np.argsort(above.attributes['perm']))
  if above.op == 'Reshape' and factor.ndim:
    return _unshaped(factor, graph.dims[above.output], shape)
  return None


def _constant_second(graph, node) -> bool:
  i, _ = _constant_operand(graph, node)
  return i == 1


def _per_channel(array, rank: int) -> bool:
  """Whether it has one value for all, or one for each channel (axis 1)."""
  return array.size == 1 or (
    array.ndim == rank and array.size == array.shape[1]
  )


def _unshaped(factor, after, before):
  """A factor on the output of a reshape as one on its input."""
  if not after or not before or after[0] != before[0]:
    return None
  if factor.ndim != len(after) or factor.shape[0] != 1:
    return None
  if not all(isinstance(d, int) for d in (*after[1:], *before[1:])):
    return None
  if math.prod(after[1:]) != math.prod(before[1:]):
    return None
  full = np.broadcast_to(factor, (1, *after[1:])).reshape(1, *before[1:])
  for axis in range(1, full.ndim):
    first = full.take([0], axis)
    full = first if np.all(full == first) else full
  return np.array(full)


def _clip_integers(graph: nodes.Graph, quantize: nodes.Node) -> None:
  """Lets an upper end apply to whole numbers, after they are rounded."""
  above = graph.producer(quantize.inputs[0])
  if above is None or graph.only_consumer(above.output) is not quantize:
    return
  if above.op == 'Min' and _constant_second(graph, above):
    high = graph.constants[above.inputs[1]]
  elif above.op == 'Clip' and not above.inputs[1]:
    high = graph.constants[above.inputs[2]]
  else:
    return
  scale = graph.constants[quantize.inputs[1]]
  zero = graph.constants[quantize.inputs[2]]
  if np.any(high < 0):
    return
  info = np.iinfo(zero.dtype)
  top = np.round(high / scale) + zero.astype(np.float32)
  top = np.minimum(top, info.max).astype(zero.dtype)
  below = graph.only_consumer(quantize.output)
  if below is not None and below.op == 'Clip':
    low = below.inputs[1]
    top = np.minimum(top, graph.constants[below.inputs[2]])
    graph.remove(below, quantize.output)
  else:
    low = graph.constant(np.array(info.min, zero.dtype), 'low')
  readers = graph.consumers(quantize.output)
  graph.remove(above, above.inputs[0])
  at = graph.nodes.index(quantize) + 1
  dims = graph.dims[quantize.output]
  if top.size == 1:
    names = [quantize.output, low, graph.constant(top.reshape(()), 'high')]
    new = nodes.Node('Clip', names, graph.name('Clip'), {}, quantize.layer)
  else:
    low_value = graph.constants[low]
    name = quantize.output
    if low_value != info.min:
      clip = nodes.Node(
        'Clip', [name, low, ''], graph.name('Clip'), {}, quantize.layer
      )
      graph.nodes.insert(at, clip)
      graph.dims[clip.output] = dims
      name, at = clip.output, at + 1
    names = [name, graph.constant(top, 'high')]
    new = nodes.Node('Min', names, graph.name('Min'), {}, quantize.layer)
  graph.nodes.insert(at, new)
  graph.dims[new.output] = dims
  for reader in readers:
    reader.inputs = [
      new.output if i == quantize.output else i for i in reader.inputs
    ]


@dataclasses.dataclass(frozen=True)
class Chain:
  """Factors and summands per channel between a product and what follows.

  Attributes:
    last: the last node of them, or the product.
    steps: (ONNX name, float32 [channels] or [1], whether that comes first).
    factor: of all together, float64 [channels] or [1].
    summand: likewise.
  """

  last: nodes.Node
  steps: tuple[tuple[str, np.ndarray, bool], ...]
  factor: np.ndarray
  summand: np.ndarray


def chain(graph: nodes.Graph, node: nodes.Node) -> Chain:
  """What follows a product."""
  rank = len(graph.dims[node.output])
  factor, summand = np.ones(1), np.zeros(1)
  last, steps = node, []
  while (below := graph.only_consumer(last.output)) is not None:
    if below.op not in AFFINE:
      break
    at, array = _constant_operand(graph, below)
    if at is None or not _per_channel(array, rank):
      break
    if below.op == 'Div' and at == 0:
      break
    steps.append((below.op, array.reshape(-1), at == 0))
    array = array.astype(np.float64).reshape(-1)
    if below.op in ('Mul', 'Div'):
      array = array if below.op == 'Mul' else 1 / array
      factor, summand = factor * array, summand * array
    elif below.op == 'Add':
      summand = summand + array
    elif at == 1:
      summand = summand - array
    else:
      factor, summand = -factor, array - summand
    last = below
  return Chain(last, tuple(steps), factor, summand)


def _fold(graph: nodes.Graph, node: nodes.Node) -> None:
  """Puts the factors and summands after a product into it."""
  if node.op == 'Conv' and len(node.inputs) > 2:
    return
  rank = len(graph.dims[node.output])
  if node.op == 'MatMul' and (rank != 2 or not sums.is_quantized(graph, node)):
    return
  found = chain(graph, node)
  if found.last is not node:
    _carry_out(graph, node, found)


def _carry_out(graph: nodes.Graph, node: nodes.Node, found: Chain) -> None:
  """Takes what follows a product out, and puts it into the product."""
  for _ in found.steps:
    below = graph.only_consumer(node.output)
    assert below is not None
    graph.remove(below, node.output)
  _rewrite(graph, node, found.factor, found.summand)


def _rewrite(graph, conv, factor, summand) -> None:
  """Of a product: the scales of its kernel, and its bias."""
  shape = graph.dims[conv.inputs[1]]
  axis = 0 if conv.op == 'Conv' else 1
  channels = shape[axis]
  factor = np.broadcast_to(factor, (channels,))
  summand = np.broadcast_to(summand, (channels,))
  weights = graph.producer(conv.inputs[1])
  column = [-1 if a == axis else 1 for a in range(len(shape))]
  if weights is not None and weights.op == 'DequantizeLinear':
    integers, scale, _ = (graph.constants[i] for i in weights.inputs)
    scale = scale * factor if np.ndim(scale) or np.any(factor != 1) else scale
    # Integers take the sign: a scale is positive.
    sign = np.sign(scale).astype(np.int8)
    integers = integers * (sign.reshape(column) if sign.ndim else sign)
    scale = np.where(scale == 0, 1, np.abs(scale)).astype(np.float32)
    layer = weights.layer
    weights.inputs = [
      graph.constant(integers, f'{layer}/kernel'),
      graph.constant(scale, f'{layer}/step'),
      graph.constant(np.zeros(scale.shape, np.int8), f'{layer}/zero'),
    ]
    weights.attributes = {'axis': axis} if scale.ndim else {}
  elif conv.inputs[1] in graph.constants:
    kernel = graph.constants[conv.inputs[1]].astype(np.float64)
    kernel = (kernel * factor.reshape(column)).astype(np.float32)
    conv.inputs[1] = graph.constant(kernel, 'kernel')
  bias = summand.astype(np.float32)
  conv.inputs.append(graph.constant(bias, f'{conv.layer or "conv"}/bias'))
  conv.op = 'Conv' if axis == 0 else 'Gemm'
