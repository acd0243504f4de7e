"""What computes with the arrays of an artifact: StableHLO of `jax.export`.

It takes the arrays as arguments, so that they are stored once.
"""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import files
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import stablehlo
from djpq_jax.checkpoint import arguments as arguments_lib
from djpq_jax.checkpoint import xz

FILE_NAME = 'program.xz'


def serialized(
  model: harden.HardenedModel, arguments: arguments_lib.Arguments
) -> tuple[bytes | None, str]:
  """The program of a hardened model, for any number of examples.

  Args:
    model: what it is to compute; its arrays are arguments by their names.
    arguments: what else it takes; the program takes the arrays among them,
      the rest is as it is here.

  Returns:
    (The compressed program, ''), or (None, why there is none).
  """
  lowered = compress.eval_view(integer.lower(model, 'simulated'))
  graphdef, state = nnx.split(lowered)
  flat = nnx.to_flat_state(nnx.as_pure(state))
  keys = {'/'.join(map(str, key)): key for key, _ in flat}
  values = {'/'.join(map(str, key)): value for key, value in flat}
  stored = names(model)
  constants = {k: v for k, v in values.items() if k not in stored}

  def predict(arrays, *given):
    whole = [(keys[name], v) for name, v in (constants | arrays).items()]
    model = nnx.merge(graphdef, nnx.from_flat_state(whole))
    args, kwargs = call_of(given)
    return stablehlo.as_float32(model(*args, **kwargs))

  arrays = {
    name: jax.ShapeDtypeStruct(values[name].shape, values[name].dtype)
    for name in stored
  }
  inputs, call_of = graph_lib.split_arrays(arguments_lib.open_batch(arguments))
  try:
    exported = stablehlo.export(predict, arrays, *inputs)
  except stablehlo.NotExportable as error:
    return None, str(error)
  try:
    return xz.compress(bytes(exported.serialize())), ''
  except ValueError as error:  # a class that only its own code can make
    return None, f'it cannot be stored: {files.first_line(error)}'


def names(model: harden.HardenedModel) -> set[str]:
  """Names of the arrays that an artifact stores: no states of dropout."""
  flat = nnx.to_flat_state(nnx.state(model))
  return {
    '/'.join(map(str, key))
    for key, variable in flat
    if not isinstance(variable, nnx.RngState)
  }


class Program:
  """A hardened model that runs without the class it was made of.

  Args:
    content: from `serialized`.
    arrays: the arrays of the artifact, by name.

  Raises:
    ValueError: it is damaged, or it calls what no program of ours calls.
  """

  def __init__(self, content: bytes, arrays: Mapping[str, np.ndarray]):
    exported = jax.export.deserialize(bytearray(xz.decompress(content)))
    stablehlo.check(exported)
    self._arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
    self._dtypes = [x.dtype for x in exported.in_avals[len(arrays) :]]
    self._call = jax.jit(exported.call)

  def __call__(self, *inputs):
    """Images [B, ...] -> logits [B, classes], float32.

    A model with several outputs gives them as it does, in a dict or a tuple.
    A model with other arguments takes the arrays among them, in their order;
    those of a dict, or by name, in that of the names.
    """
    if len(inputs) != len(self._dtypes):
      raise TypeError(
        f'the program takes {len(self._dtypes)} arrays, not {len(inputs)}'
      )
    given = [jnp.asarray(x, t) for x, t in zip(inputs, self._dtypes)]
    return self._call(self._arrays, *given)
