"""From the jaxpr of a hardened model to a graph of ONNX nodes.

JAX images are [B, H, W, C] and ONNX convolutions want [B, C, H, W].  A tensor
here remembers which of its axes lies where, so that a transposition is only
written where an operator needs another order: at the two ends of a plain CNN,
not around each layer.  What has the same value along an axis stays at size 1
there until an operator needs all of it, as operators of ONNX broadcast.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np

from djpq_jax import calls
from djpq_jax.export import nodes
from djpq_jax.export import program as program_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
  """Numbers known now; an axis of size 1 stands for any size."""

  array: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
  """A constant `integers * step`, arrays of one shape."""

  integers: np.ndarray
  step: np.ndarray
  layer: str

  @property
  def array(self) -> np.ndarray:
    """The floats."""
    return self.integers.astype(np.float32) * self.step


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """The output of a node.

  Attributes:
    name: of the output.
    dims: sizes of the axes as JAX counts them; 1 also stands for any size.
    order: axis i of the node's output is axis order[i] of JAX.
  """

  name: str
  dims: tuple
  order: tuple[int, ...]


Value = Constant | Kernel | Tensor
Rule = Callable[..., Value | list[Value]]


class Translator:
  """Walks a jaxpr and writes nodes.

  Args:
    program: what to translate.
    rules: for each primitive, a function of (translator, equation, values)
      that returns the values of its outputs.
    form: 'qdq', 'exact' or 'integer'; see `export`.
  """

  def __init__(
    self, program: program_lib.Program, rules: dict[str, Rule], form: str
  ):
    self.program = program
    self.rules = rules
    self.form = form
    self.graph = nodes.Graph()
    self.layer = ''  # the last one whose input was met
    # Tensors on a grid: name -> (name of the integers, zero point, layer).
    self.integers: dict[str, tuple[str, np.ndarray, str]] = {}
    self.float_layers: dict[str, str] = {}  # layer -> why it runs in float
    self._image = ''
    self._laid_out: dict[tuple[str, tuple[int, ...]], Tensor] = {}

  def run(self, input_name: str, output_name: str) -> nodes.Graph:
    """Translates all of it; returns the graph."""
    closed = self.program.jaxpr
    dims = tuple(closed.in_avals[0].shape)
    self._image = self.graph.name(input_name)
    self.graph.dims[self._image] = dims
    image = Tensor(input_name, dims, tuple(range(len(dims))))
    consts = [_constant(c) for c in closed.consts]
    (result,) = self._call(closed.jaxpr, consts, [image])
    (aval,) = closed.out_avals
    tensor = self.full(result, aval.shape)
    # A node of its own, so that no pass has to mind the name.
    self.graph.output = self.graph.name(output_name)
    identity = nodes.Node('Identity', [tensor.name], self.graph.output)
    self.graph.nodes.append(identity)
    self.graph.dims[self.graph.output] = tuple(aval.shape)
    return self.graph

  def _call(self, jaxpr, consts, args) -> list[Value]:
    values: dict[Any, Value] = {}
    for var, value in zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]):
      values[var] = value

    def read(var) -> Value:
      if isinstance(var, jex_core.Literal):
        return Constant(np.asarray(var.val, var.aval.dtype))
      return values[var]

    for eqn in jaxpr.eqns:
      outputs = self._equation(eqn, [read(var) for var in eqn.invars])
      values.update(zip(eqn.outvars, outputs))
    return [read(var) for var in jaxpr.outvars]

  def _equation(self, eqn, values: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    called = calls.inner(eqn)
    if called is not None:
      inner, consts = called
      known = [_constant(c) for c in consts]
      return self._call(inner, known, values)
    if name not in self.rules and not all(
      isinstance(v, Constant) for v in values
    ):
      raise self.refusal(f'the primitive {name!r} is not among the known ones')
    rule = self.rules.get(name)
    if all(isinstance(v, Constant) for v in values) and not (
      name in ('broadcast_in_dim', 'djpq_kernel', 'djpq_input') and rule
    ):
      return self.evaluate(eqn, values)
    assert rule is not None
    result = rule(self, eqn, values)
    return result if isinstance(result, list) else [result]

  def evaluate(self, eqn, values) -> list[Value]:
    """What depends on no image is computed once, by JAX."""
    arrays = [v.array for v in values]
    shapes = [v.aval.shape for v in eqn.invars]
    if eqn.primitive.name in ELEMENTWISE:
      arrays = list(np.broadcast_arrays(*arrays))  # keeps axes of size 1 small
    else:
      for shape in [*shapes, *(v.aval.shape for v in eqn.outvars)]:
        if not all(isinstance(d, int) for d in shape):
          raise self.refusal(
            f'{eqn.primitive.name!r} makes an array of as many numbers as '
            'there are images; a fixed batch may do'
          )
      arrays = [np.broadcast_to(a, s) for a, s in zip(arrays, shapes)]
    with jax.ensure_compile_time_eval():
      operands = [jax.numpy.asarray(a) for a in arrays]
      found = eqn.primitive.bind(*operands, **eqn.params)
    found = found if eqn.primitive.multiple_results else [found]
    return [Constant(np.asarray(x)) for x in found]

  def refusal(self, why: str) -> nodes.ExportError:
    """An error that says where."""
    where = f'after layer {self.layer}' if self.layer else 'before any layer'
    return nodes.ExportError(
      f'the model has no ONNX form, {where}: {why}; --format stablehlo takes '
      'every model'
    )

  # What rules are made of.

  def add(
    self, op: str, tensors: Sequence[Any], dims, order=None, **attributes
  ) -> Tensor:
    """Writes a node.

    Args:
      op: ONNX name.
      tensors: Tensors, or names of constants.
      dims: JAX's sizes of the result.
      order: of the result; as JAX has it by default.
      **attributes: of the operator.
    """
    order = tuple(range(len(dims))) if order is None else tuple(order)
    names = [t.name if isinstance(t, Tensor) else t for t in tensors]
    physical = [dims[i] for i in order]
    name = self.graph.add(op, names, physical, **attributes)
    return Tensor(name, tuple(dims), order)

  def laid_out(self, value: Value, order: Sequence[int]) -> Tensor:
    """A tensor with this order of axes; transposed if it has another."""
    order = tuple(order)
    if not isinstance(value, Tensor):
      array = np.transpose(value.array, order)
      dims = value.array.shape
      return Tensor(self.graph.constant(array), dims, order)
    if value.order == order:
      return value
    key = value.name, order
    if key not in self._laid_out:
      perm = [value.order.index(axis) for axis in order]
      self._laid_out[key] = self._moved(
        'Transpose', value, [], value.dims, order, perm=perm
      )
    found = self._laid_out[key]
    return Tensor(found.name, value.dims, order)

  def plain(self, value: Value) -> Tensor:
    """A tensor with the axes in JAX's order."""
    count = len(value.dims if isinstance(value, Tensor) else value.array.shape)
    return self.laid_out(value, range(count))

  def full(self, value: Value, shape, order=None) -> Tensor:
    """A tensor that has all of its elements; in JAX's order by default."""
    order = tuple(range(len(shape))) if order is None else tuple(order)
    if not isinstance(value, Tensor):
      static = [d if isinstance(d, int) else 1 for d in shape]
      value = Constant(np.broadcast_to(value.array, static))
    tensor = self.laid_out(value, order)
    if tuple(tensor.dims) == tuple(shape):
      return tensor
    return self.expanded(tensor, shape)

  def expanded(self, tensor: Tensor, shape) -> Tensor:
    """Repeats along axes of size 1."""
    wanted = [shape[axis] for axis in tensor.order]
    have = [tensor.dims[axis] for axis in tensor.order]
    target = [1 if w == h else w for w, h in zip(wanted, have)]
    if all(isinstance(d, int) for d in target):
      name = self.graph.constant(np.array(target, np.int64))
      return self.add('Expand', [tensor, name], shape, tensor.order)
    if target[0] == self._batch() and all(
      isinstance(d, int) for d in target[1:]
    ):
      rest = self.graph.constant(np.array(target[1:], np.int64))
      sizes = self.graph.add('Shape', [self._image], (4,))
      start = self.graph.constant(np.array([0], np.int64))
      end = self.graph.constant(np.array([1], np.int64))
      first = self.graph.add('Slice', [sizes, start, end], (1,))
      target_name = self.graph.add(
        'Concat', [first, rest], (len(target),), axis=0
      )
      return self.add('Expand', [tensor, target_name], shape, tensor.order)
    raise self.refusal('an array is repeated by a size that is open')

  def _batch(self):
    return self.program.jaxpr.in_avals[0].shape[0]

  def reshaped(self, tensor: Tensor, shape) -> Tensor:
    """A tensor in JAX's order with other sizes."""
    if tuple(tensor.dims) == tuple(shape):
      return tensor
    sizes = [d if isinstance(d, int) else -1 for d in shape]
    if sizes.count(-1) > 1:
      raise self.refusal('a reshape has more than one size that is open')
    name = self.graph.constant(np.array(sizes, np.int64))
    return self._moved('Reshape', tensor, [name], shape)

  def _moved(
    self, op: str, tensor: Tensor, more, dims, order=None, **attributes
  ):
    """A node that moves elements; those of a grid are moved as integers."""
    known = self.integers.get(tensor.name)
    if known is None:
      return self.add(op, [tensor, *more], dims, order, **attributes)
    integers, zero, layer = known
    whole = self.add(op, [integers, *more], dims, order, **attributes)
    above = self.graph.producer(tensor.name)
    assert above is not None
    names = [whole.name, *above.inputs[1:]]
    shape = self.graph.dims[whole.name]
    name = self.graph.add('DequantizeLinear', names, shape, layer=layer)
    self.integers[name] = whole.name, zero, layer
    return Tensor(name, whole.dims, whole.order)


ELEMENTWISE = set(
  """
  add sub mul div max min pow neg exp exp2 log log1p expm1 tanh logistic erf
  sqrt rsqrt abs sign floor ceil round square integer_pow not and or eq ne lt le
  gt ge select_n convert_element_type clamp stop_gradient copy is_finite sin cos
  optimization_barrier copy_p
  """.split()
)


def _constant(x) -> Constant:
  """An array that the model has a use for."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    raise nodes.ExportError(
      'the model hands keys of random numbers on, as nnx.RNN does: they have '
      'no translation to ONNX'
    )
  return Constant(np.asarray(x))
