"""Traces a model to a jaxpr in which the operands of MAC layers are marked."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.extend import core as jex_core
from jax.interpreters import batching
import jax.numpy as jnp

mark_p = jex_core.Primitive('mac_operands')
mark_p.multiple_results = True


@mark_p.def_abstract_eval
def _mark_abstract(inputs, kernel, *, layer, mapped, rank):
  del layer, mapped, rank
  return [inputs, kernel]


def _mark_batch(args, dims, *, layer, mapped, rank):
  """Under `jax.vmap` the inputs have an axis that the layer does not see."""
  axis = dims[0]
  if isinstance(axis, int):  # else only the kernel has
    mapped = (axis, *(d + (d >= axis) for d in mapped))
  return mark_p.bind(*args, layer=layer, mapped=mapped, rank=rank), dims


batching.primitive_batchers[mark_p] = _mark_batch


class Marker(nnx.Module):
  """A layer's `promote_dtype` that marks what it hands to the product."""

  def __init__(self, layer: str, promote: Callable[..., Any]):
    self.layer = layer
    is_module = isinstance(promote, nnx.Module)
    self.promote = nnx.data(promote) if is_module else nnx.static(promote)

  def __call__(self, args, **kwargs):
    """Promotes as before, then marks inputs and kernel."""
    inputs, kernel, *rest = self.promote(args, **kwargs)
    inputs, kernel = mark_p.bind(
      inputs, kernel, layer=self.layer, mapped=(), rank=kernel.ndim
    )
    return (inputs, kernel, *rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A model's forward pass, as a jaxpr over named arrays.

  Attributes:
    jaxpr: of (values of the model, array arguments).
    variables: path of each model value, in the order of the first invars;
      '' for a value that is not a float Variable.
    kinds: class name of each module that has a MAC kernel.
    inputs: shapes of the array arguments, the last invars.
    outputs: shapes of the outputs.
  """

  jaxpr: Any
  variables: tuple[str, ...]
  kinds: Mapping[str, str]
  inputs: tuple[Any, ...]
  outputs: tuple[Any, ...]


def join(path) -> str:
  """'/'-joined path of a module or Variable."""
  return '/'.join(str(key) for key in path)


def is_mac(module) -> bool:
  """Whether a module has the public operand hook and a kernel."""
  return hasattr(module, 'promote_dtype') and hasattr(module, 'kernel')


def is_array(x) -> bool:
  """Whether it has a shape and a dtype."""
  return hasattr(x, 'shape') and hasattr(x, 'dtype')


def split_arrays(tree) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
  """The arrays of a tree, and what puts others in their place.

  What is no array, as a bool, stays as it is.
  """
  leaves, shape = jax.tree.flatten(tree)
  is_input = [is_array(leaf) for leaf in leaves]

  def whole(arrays):
    arrays = iter(arrays)
    full = [
      next(arrays) if i else x for x, i in zip(leaves, is_input, strict=True)
    ]
    return jax.tree.unflatten(shape, full)

  return [x for x, i in zip(leaves, is_input, strict=True) if i], whole


def value_of(leaf):
  """The array (or tree) that a leaf of a flat state holds."""
  return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def with_value(leaf, value):
  """A leaf of a flat state with another value, metadata kept."""
  return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def shape_of(x):
  """Shape and dtype of an array; anything else as it is."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x


def flat_state(model):
  """Returns the graphdef and a list of (path, leaf)."""
  graphdef, state = nnx.split(model)
  return graphdef, list(nnx.to_flat_state(state))


def abstract(model):
  """A copy of the model with shapes in place of its Variables' arrays."""
  graphdef, flat = flat_state(model)
  # Bare arrays stay: nnx takes a bare shape for a static attribute.
  flat = [
    (path, with_value(leaf, jax.tree.map(shape_of, value_of(leaf))))
    if isinstance(leaf, nnx.Variable)
    else (path, leaf)
    for path, leaf in flat
  ]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _mark_layers(model) -> dict[str, str]:
  """Puts markers on a model that nobody else holds; returns path -> class."""
  kinds = {}
  for path, module in list(nnx.iter_modules(model)):
    if is_mac(module):
      name = join(path)
      kinds[name] = type(module).__name__
      module.promote_dtype = nnx.data(Marker(name, module.promote_dtype))
  return kinds


def _variable_name(path, leaf) -> str:
  """Path of a Variable whose axes can hold channels, else ''."""
  value = value_of(leaf)
  if not isinstance(leaf, nnx.Variable) or not is_array(value):
    return ''
  if isinstance(leaf, nnx.RngState):
    return ''
  is_float = jnp.issubdtype(value.dtype, jnp.inexact)
  return join(path) if is_float else ''


def program(model, args, kwargs) -> Program:
  """Traces `model(*args, **kwargs)`; the model itself is not touched."""
  graphdef, flat = flat_state(model)
  arrays, whole = split_arrays((args, kwargs))
  kinds: dict[str, str] = {}

  def call(values, inputs):
    state = [
      (path, with_value(leaf, value))
      for (path, leaf), value in zip(flat, values, strict=True)
    ]
    copy = nnx.merge(graphdef, nnx.from_flat_state(state))
    kinds.update(_mark_layers(copy))
    call_args, call_kwargs = whole(inputs)
    outputs = copy(*call_args, **call_kwargs)
    return [x for x in jax.tree.leaves(outputs) if is_array(x)]

  values = [jax.tree.map(shape_of, value_of(leaf)) for _, leaf in flat]
  inputs = [shape_of(x) for x in arrays]
  jaxpr, outputs = jax.make_jaxpr(call, return_shape=True)(values, inputs)
  names = []
  for (path, leaf), value in zip(flat, values, strict=True):
    count = len(jax.tree.leaves(value))
    name = _variable_name(path, leaf)
    names.extend([name] if name else [''] * count)
  return Program(jaxpr, tuple(names), kinds, tuple(inputs), tuple(outputs))
