"""Simplifies a graph so that a layer and its next grid stand side by side.

ONNX Runtime makes one integer operator of DequantizeLinear, Conv, Relu,
QuantizeLinear where nothing stands between them.  Batch norm and what gates
have left are such things: both are a factor and a summand per channel, which
go into the scales of the kernel and into the bias.  All that is done here
holds in real arithmetic; in float32 the last bit may differ.
"""

import dataclasses
import itertools
import math

import numpy as np

from djpq_jax.export import nodes

AFFINE = ('Add', 'Sub', 'Mul', 'Div')


def simplify(graph: nodes.Graph, *, exact: bool = False) -> None:
  """Does all of it, in place.

  Args:
    graph: to change.
    exact: whether each layer runs in float that could not be an integer one
      without moving a sum to another level.
  """
  graph.prune()
  while any(_hoisted(graph, node) for node in list(graph.nodes)):
    pass
  for node in list(graph.nodes):
    if node.op == 'QuantizeLinear':
      _clip_integers(graph, node)
  for node in list(graph.nodes):
    if node.op in ('Conv', 'MatMul', 'Mul') and node in graph.nodes:
      _fold(graph, node)
  _settle_sums(graph, 1.0 if exact else MOST_IN_FLOAT)
  graph.prune()


# Of the layers that could be integer ones.
MOST_IN_FLOAT = 0.25


def _settle_sums(graph: nodes.Graph, most_in_float: float) -> None:
  """Prepares each product to be an integer one, or an exact one in float.

  A convolution can be an integer one where its result is quantized next.  Few
  of these lack a bias that leaves all levels in place if bits are few; these
  run in float then, so that the whole file is exact.  If many do, as with
  eight bits, nothing would be won by it.
  """
  integer, floating = {}, []
  for node in list(graph.nodes):
    if node.op not in ('Conv', 'Gemm') or not _is_quantized(graph, node):
      continue
    if node.op == 'Conv' and _next_grid(graph, node) is None:
      floating.append(node)
    else:
      integer[node.output] = node, _whole_bias(graph, node)
  inexact = [name for name, (_, bias) in integer.items() if bias.elsewhere]
  if len(inexact) <= most_in_float * len(integer):
    floating += [integer.pop(name)[0] for name in inexact]
  for node in floating:
    _exact_sums(graph, node)
  for node, bias in integer.values():
    _give_bias(graph, node, bias)


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


def _fold(graph: nodes.Graph, node: nodes.Node) -> None:
  """Puts the factors and summands after a convolution into it."""
  if node.op == 'Conv' and len(node.inputs) > 2:
    return
  rank = len(graph.dims[node.output])
  if node.op == 'MatMul' and (rank != 2 or not _is_quantized(graph, node)):
    return
  if node.op == 'Mul' and not _scales_sums(graph, node):
    return
  factor, summand = np.float64(1), np.float64(0)
  last = node
  while (below := graph.only_consumer(last.output)) is not None:
    if below.op not in AFFINE:
      break
    at, array = _constant_operand(graph, below)
    if at is None or not _per_channel(array, rank):
      break
    if below.op == 'Div' and at == 0:
      break
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
  if last is node:
    return
  while (below := graph.only_consumer(node.output)) is not None:
    graph.remove(below, node.output)
    if below is last:
      break
  if node.op == 'Mul':
    _rewrite_scaling(graph, node, factor, summand, rank)
  else:
    _rewrite(graph, node, factor, summand)


def _is_quantized(graph, node) -> bool:
  above = [graph.producer(name) for name in node.inputs[:2]]
  return all(n is not None and n.op == 'DequantizeLinear' for n in above)


def _scales_sums(graph, node) -> bool:
  above = graph.producer(node.inputs[0])
  if above is None or above.op != 'Cast':
    return False
  above = graph.producer(above.inputs[0])
  return above is not None and above.op == 'ConvInteger'


def _rewrite_scaling(graph, node, factor, summand, rank) -> None:
  """Of integer sums: one product, one sum."""
  scale = graph.constants[node.inputs[1]]
  shape = [1, -1, *[1] * (rank - 2)]
  new = scale.astype(np.float64) * np.reshape(
    factor, shape if np.ndim(factor) else ()
  )
  node.inputs[1] = graph.constant(new.astype(np.float32), f'{node.layer}/scale')
  if np.any(summand):
    array = np.reshape(summand, shape).astype(np.float32)
    name = graph.constant(array, f'{node.layer}/bias')
    add = nodes.Node(
      'Add',
      [node.output, name],
      graph.name(f'{node.layer}/Add'),
      {},
      node.layer,
    )
    graph.dims[add.output] = graph.dims[node.output]
    graph.redirect(node.output, add.output)
    add.inputs[0] = node.output
    graph.nodes.insert(graph.nodes.index(node) + 1, add)


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


def _exact_sums(graph: nodes.Graph, conv: nodes.Node) -> None:
  """Takes the steps out of a convolution that runs in float.

  Its sums are then those of whole numbers, which float32 adds up exactly, in
  whatever order; the steps come after them.  Sums of rounded products would
  move some activations of the next layers to another level.
  """
  inputs, weights = (graph.producer(name) for name in conv.inputs[:2])
  assert inputs is not None
  assert weights is not None
  if graph.only_consumer(inputs.output) is not conv:
    return
  step, scale = (graph.constants[n.inputs[1]] for n in (inputs, weights))
  shape = [1, -1, *[1] * (len(graph.dims[conv.output]) - 2)]
  one = graph.constant(np.float32(1), 'one')
  zero = graph.constant(np.array(0, np.int8), 'zero')
  inputs.inputs = [inputs.inputs[0], one, inputs.inputs[2]]
  weights.inputs = [weights.inputs[0], one, zero]
  weights.attributes = {}
  layer = conv.layer
  factor = (scale.astype(np.float64) * step).astype(np.float32)
  after = [('Mul', factor.reshape(shape))]
  if len(conv.inputs) > 2:
    bias = graph.constants[conv.inputs.pop()]
    after.append(('Add', bias.reshape(shape)))
  last = conv
  for op, array in after:
    name = graph.constant(array, f'{layer}/{op}')
    node = nodes.Node(op, [last.output, name], graph.name(op), {}, layer)
    graph.dims[node.output] = graph.dims[conv.output]
    graph.redirect(last.output, node.output)
    node.inputs[0] = last.output
    graph.nodes.insert(graph.nodes.index(last) + 1, node)
    last = node


@dataclasses.dataclass(frozen=True)
class _Bias:
  """A bias in whole steps of the sums, each [channels] of an output.

  Attributes:
    finer: how many times finer the steps of the sums get.
    wider: a factor near 1 by which they are wider than that.
    whole: the bias in these steps.
    elsewhere: levels of the next grid that then begin at another sum, of all
      channels.
  """

  finer: np.ndarray
  wider: np.ndarray
  whole: np.ndarray
  elsewhere: int


def _whole_bias(graph: nodes.Graph, node: nodes.Node) -> _Bias:
  """A bias in whole steps of the sums: ONNX Runtime takes no other.

  The kernel's integers are made as large as they can be and its steps as
  small, so that a step of the sums is small; and where a whole number leaves
  all results as they are, it is taken.
  """
  grid = _next_grid(graph, node)
  inputs, weights = (graph.producer(name) for name in node.inputs[:2])
  assert weights is not None
  assert inputs is not None
  integers, scale, _ = (graph.constants[i] for i in weights.inputs)
  axis = 0 if node.op == 'Conv' else 1
  channels = integers.shape[axis]
  flat = np.moveaxis(integers, axis, 0).reshape(channels, -1)
  flat = np.abs(flat.astype(np.int64))
  scale = np.broadcast_to(scale, (channels,))
  step = float(graph.constants[inputs.inputs[1]])
  top, signed = _largest_input(graph, inputs)
  bias = np.zeros(channels)
  if len(node.inputs) > 2:
    bias = graph.constants[node.inputs[2]].astype(np.float64)
  unit = scale.astype(np.float64) * step  # of the sums, before they get finer
  begins = np.zeros((channels, 0))
  if grid is not None:
    begins = _level_begins(bias, unit, flat.sum(axis=1) * top, *grid)
  # Processors without 8-bit dot products add pairs of products in 16 bits.
  most = min(127, 2**15 // (2 * (255 if signed else top)))
  most = np.maximum(1, most // np.maximum(1, flat.max(axis=1)))
  return _whole_steps(bias / unit, begins, most)


def _give_bias(graph: nodes.Graph, node: nodes.Node, bias: _Bias) -> None:
  """Carries out what `_whole_bias` found."""
  if np.any(np.abs(bias.whole) >= 2**30):
    return  # of a channel of tiny weights: no int32, so it stays as it is
  inputs, weights = (graph.producer(name) for name in node.inputs[:2])
  assert weights is not None
  assert inputs is not None
  integers, scale, _ = (graph.constants[i] for i in weights.inputs)
  axis = 0 if node.op == 'Conv' else 1
  channels = integers.shape[axis]
  step = float(graph.constants[inputs.inputs[1]])
  scale = np.broadcast_to(scale, (channels,))
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


def _whole_steps(bias, begins, most) -> _Bias:
  """Picks finer steps for the sums, and the bias as a whole number of these.

  Steps and bias may move by what takes no sum to another level.  Of all that
  are tried those are picked at which the fewest levels begin elsewhere; of
  these the finest.

  Args:
    bias: in steps of the sums as they are, [channels].
    begins: from `_level_begins`.
    most: how many times finer the sums can get, [channels].
  """
  finer, wider = most.copy(), np.ones_like(bias)
  whole = np.round(most * bias)
  if not begins.shape[1]:
    return _Bias(finer, wider, whole, 0)
  ends = np.ceil(begins)
  # So much wider moves the outermost level by half a sum.
  reach = np.nanmax(np.abs(begins + bias[:, None]), axis=1, initial=1.0)
  fewest = np.full(len(bias), np.inf)
  for stretches in _STRETCHES:
    for factor, stretch in itertools.product(
      range(most.max(), 0, -1), stretches
    ):
      todo = np.flatnonzero((fewest > 0) & (factor <= most))
      if not todo.size:
        continue
      width = 1 + stretch / 2 / reach[todo]
      # The bias that puts a level's begin at the sum at which it is.
      room = (begins + bias[:, None])[todo] / width[:, None] - ends[todo]
      low = np.nanmax(room, axis=1, initial=-np.inf)
      high = np.nanmin(room, axis=1, initial=np.inf) + 1
      met = np.isfinite(low)  # else no sum comes near a level's begin
      middle = bias[todo]
      middle[met] = (low[met] + high[met]) / 2
      tried = np.round(factor * middle)
      moved = room - (tried / factor)[:, None]
      # Not just inside: float32 has to see it too.
      elsewhere = ((moved <= -1 + MARGIN) | (moved > -MARGIN)).sum(axis=1)
      better = elsewhere < fewest[todo]
      at = todo[better]
      finer[at], wider[at], whole[at] = factor, width[better], tried[better]
      fewest[at] = elsewhere[better]
  return _Bias(finer, wider, whole, int(fewest.sum()))


MARGIN = 1e-4  # of a step of the sums
# By how many halves of a sum the outermost level is moved; the finer and wider
# ones for channels that the others leave with a level elsewhere.
_STRETCHES = [
  sorted(np.linspace(-end, end, count), key=abs)
  for end, count in ((1, 21), (2, 401))
]


def _level_begins(bias, unit, reach, step, lowest, highest):
  """Sums at which the levels of the next grid begin.

  A sum n, whole, becomes round((n unit + bias) / step).  Level k begins at
  n = ceil(T), T = ((k - 1/2) step - bias) / unit, whatever happens to T
  between two whole numbers.

  Args:
    bias: [channels].
    unit: of the sums, [channels].
    reach: the largest magnitude of a sum, [channels].
    step: of the next grid.
    lowest: its first level.
    highest: its last one.

  Returns:
    T, [channels, highest - lowest]; nan where no sum comes near.
  """
  levels = np.arange(lowest + 1, highest + 1)
  at = ((levels - 0.5) * step - bias[:, None]) / unit[:, None]
  return np.where(np.abs(at) <= reach[:, None] + 1, at, np.nan)


# What ONNX Runtime moves a QuantizeLinear across.
_PASSED = ('Relu', 'MaxPool', 'Reshape', 'Transpose')


def _next_grid(graph, node):
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
