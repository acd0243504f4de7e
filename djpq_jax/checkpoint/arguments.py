"""What a model is called with, as an artifact says it.

A model is traced again when it is read.  Most take one batch of images, of
which the manifest has the shape; for any others the index has each argument:
of an array its dtype and shape, else the value.
"""

from collections.abc import Mapping
import math
from typing import Any, TypeAlias

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import files
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import stablehlo

# Those by position and those by name, shapes in place of arrays.
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

BATCH = 2  # of images; that of other arguments is the one they were traced with


def of(model: harden.HardenedModel, input_shape) -> Arguments:
  """What a model will be traced with, once it is read.

  Args:
    model: hardened; how it was traced tells all but the size of images.
    input_shape: of one example of the first array.

  Raises:
    ValueError: `input_shape` is not that of the first array.
  """
  traced = model.structure.graph.arguments
  if traced is None:
    return _images(input_shape)
  if _are_images(traced):
    ((images,), _) = traced
    if len(images.shape) != 1 + len(input_shape):
      raise ValueError(
        f'input_shape is {tuple(input_shape)}, but an example that the model '
        f'was compressed with has the shape {images.shape[1:]}, without the '
        'batch'
      )
    return _images(input_shape)
  arrays, _ = graph_lib.split_arrays(traced)
  first = next(x for x in arrays if x.shape)
  if first.shape[1:] != tuple(input_shape):
    raise ValueError(
      f'input_shape is {tuple(input_shape)}, but an example of the first array '
      f'that the model was compressed with has the shape {first.shape[1:]}'
    )
  return traced


def _images(input_shape) -> Arguments:
  shape = (BATCH, *input_shape)
  return (jax.ShapeDtypeStruct(shape, jnp.float32),), {}


def _are_images(arguments: Arguments) -> bool:
  args, kwargs = arguments
  alone = len(args) == 1 and not kwargs
  return alone and _is_array(args[0]) and _dtype(args[0]) == 'float32'


def _is_array(x) -> bool:
  return isinstance(x, jax.ShapeDtypeStruct)


def _dtype(x) -> str:
  """As JAX holds it: float32 of NumPy's float64, unless that is enabled."""
  if jnp.issubdtype(x.dtype, jax.dtypes.extended):
    raise ValueError(
      f'the model was compressed with an argument of dtype {x.dtype}, of which '
      'an artifact cannot tell'
    )
  return str(jax.dtypes.canonicalize_dtype(x.dtype))


def to_json(arguments: Arguments) -> dict[str, Any] | None:
  """What the index says of them; None for a batch of images.

  Raises:
    ValueError: one of them is nothing that an artifact holds.
  """
  if _are_images(arguments):
    return None
  args, kwargs = arguments
  return {
    'args': [_stated(x) for x in args],
    'kwargs': {name: _stated(x) for name, x in kwargs.items()},
  }


def from_json(stated: Mapping[str, Any] | None, input_shape) -> Arguments:
  """Undoes `to_json`; of damaged ones it raises what comes.

  Args:
    stated: None in artifacts of images, and in all that were written before
      there were others.
    input_shape: what the manifest says.
  """
  if stated is None:
    return _images(input_shape)
  args = tuple(_read(x) for x in stated['args'])
  return args, {name: _read(x) for name, x in stated['kwargs'].items()}


def _stated(x):
  """One argument, or a part of one: its kind, and what it is."""
  kind = type(x)
  if _is_array(x):
    return {'array': {'dtype': _dtype(x), 'shape': list(x.shape)}}
  if kind is dict and all(type(key) is str for key in x):
    return {'dict': {key: _stated(part) for key, part in x.items()}}
  if kind in (list, tuple):
    return {kind.__name__: [_stated(part) for part in x]}
  finite = kind is not float or math.isfinite(x)
  if x is None or (kind in (bool, int, float, str) and finite):
    return {'value': x}
  raise ValueError(
    f'the model was compressed with an argument of type {kind.__name__}, of '
    'which an artifact cannot tell: it holds shapes of arrays, texts and '
    'finite numbers, in lists, tuples and dicts with texts as keys'
  )


def _read(stated):
  ((kind, content),) = stated.items()
  if kind == 'array':
    shape = tuple(content['shape'])
    return jax.ShapeDtypeStruct(shape, np.dtype(content['dtype']))
  if kind == 'dict':
    return {key: _read(part) for key, part in content.items()}
  if kind == 'value':
    return content
  return {'list': list, 'tuple': tuple}[kind](_read(part) for part in content)


def open_batch(arguments: Arguments) -> Arguments:
  """The arguments for any number of examples, for `stablehlo.export`."""
  size = graph_lib.batch_size(*arguments)
  (batch,) = jax.export.symbolic_shape(stablehlo.BATCH)
  arrays, whole = graph_lib.split_arrays(arguments)
  return whole(
    jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    if x.shape[:1] == (size,)
    else x
    for x in arrays
  )


def problem(model: harden.HardenedModel, arguments: Arguments) -> str:
  """What keeps a model from being called with them, as a sentence; or ''."""
  graphdef, state = nnx.split(compress.eval_view(model))
  arrays, whole = graph_lib.split_arrays(arguments)

  def call(state, arrays):
    args, kwargs = whole(arrays)
    nnx.merge(graphdef, state)(*args, **kwargs)

  try:
    jax.eval_shape(call, nnx.as_pure(state), arrays)
  except Exception as error:  # of many kinds, from the model's own code
    shapes = ', '.join(f'{_dtype(x)} {x.shape}' for x in arrays)
    return (
      f'the model cannot be called with {shapes}: {files.first_line(error)}'
    )
  return ''
