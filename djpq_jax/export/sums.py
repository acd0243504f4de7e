"""Makes each quantized product an integer one, or an exact one in float.

ONNX Runtime's integer layers take a bias in whole steps of their sums.  Where
no such bias leaves every level of the next grid where it begins, or where no
grid follows, a layer can run in float instead, on sums of whole numbers.
"""

import dataclasses
import itertools

import numpy as np

from djpq_jax.export import nodes

MOST_IN_FLOAT = 0.25  # of the layers that could be integer ones
MARGIN = 1e-4  # of a step of the sums
# By how many halves of a sum the outermost level is moved; the finer and wider
# ones for channels that the others leave with a level elsewhere.
_STRETCHES = [
  sorted(np.linspace(-end, end, count), key=abs)
  for end, count in ((1, 21), (2, 401))
]
# What ONNX Runtime moves a QuantizeLinear across.
_PASSED = ('Relu', 'MaxPool', 'Reshape', 'Transpose')


def settle(graph: nodes.Graph, most_in_float: float) -> None:
  """Prepares each product to be an integer one, or an exact one in float.

  A convolution can be an integer one where its result is quantized next.  Few
  of these lack a bias that leaves all levels in place if bits are few; these
  run in float then, so that the whole file is exact.  If many do, as with
  eight bits, nothing would be won by it.
  """
  integer, floating = {}, []
  for node in list(graph.nodes):
    if node.op not in ('Conv', 'Gemm') or not is_quantized(graph, node):
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


def _exact_sums(graph: nodes.Graph, conv: nodes.Node) -> None:
  """Takes the steps out of a convolution that runs in float.

  Its sums are then those of whole numbers, which float32 adds up exactly, in
  whatever order; the steps come after them.  Sums of rounded products would
  move some activations of the next layers to another level.
  """
  inputs, weights = _operands(graph, conv)
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
    last = graph.add_after(last, op, array, f'{layer}/{op}')


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
  inputs, weights = _operands(graph, node)
  integers, scale, axis = _kernel(graph, node, weights)
  channels = len(scale)
  flat = np.moveaxis(integers, axis, 0).reshape(channels, -1)
  flat = np.abs(flat.astype(np.int64))
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
