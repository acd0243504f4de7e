"""What computes with the arrays of an artifact: StableHLO of `jax.export`.

It takes the arrays as arguments, so that they are stored once.
"""

from collections.abc import Mapping
import lzma
import re

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import harden
from djpq_jax import integer

FILE_NAME = 'program.xz'
PLATFORMS = ('cpu', 'cuda', 'tpu')
LARGEST = 2**28  # bytes of a program, to stop at what was made to fill memory
# All that a program of ours may call; other custom calls can do anything.
CALLS = {'shape_assertion'}


def serialized(
  model: harden.HardenedModel, input_shape
) -> tuple[bytes | None, str]:
  """The program of a hardened model, for any number of images.

  Args:
    model: what it is to compute; its arrays are arguments by their names.
    input_shape: of one example, as (8, 8, 1).

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

  def predict(arrays, images):
    whole = [(keys[name], v) for name, v in (constants | arrays).items()]
    model = nnx.merge(graphdef, nnx.from_flat_state(whole))
    return model(images).astype(jnp.float32)

  arrays = {
    name: jax.ShapeDtypeStruct(values[name].shape, values[name].dtype)
    for name in stored
  }
  (batch,) = jax.export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((batch, *input_shape), jnp.float32)
  try:
    exported = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(
      arrays, images
    )
  except Exception as error:  # of many kinds, from the model's own code
    first = (str(error).splitlines() or [''])[0]
    return None, f'it cannot be traced for any batch: {first:.200}'
  return lzma.compress(bytes(exported.serialize())), ''


def names(model: harden.HardenedModel) -> set[str]:
  """Names of the arrays that an artifact stores."""
  flat = nnx.to_flat_state(nnx.state(model))
  return {'/'.join(map(str, key)) for key, _ in flat}


class Program:
  """A hardened model that runs without the class it was made of.

  Args:
    content: from `serialized`.
    arrays: the arrays of the artifact, by name.

  Raises:
    ValueError: it is damaged, or it calls what no program of ours calls.
  """

  def __init__(self, content: bytes, arrays: Mapping[str, np.ndarray]):
    plain = lzma.LZMADecompressor().decompress(content, LARGEST)
    exported = jax.export.deserialize(bytearray(plain))
    text = exported.mlir_module()
    calls = set(re.findall(r'custom_call @"?([^"(]+)', text))
    calls |= set(re.findall(r'call_target_name = "([^"]*)"', text))
    if calls - CALLS:
      raise ValueError(f'it calls {", ".join(sorted(calls - CALLS))}')
    self._arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
    self._call = jax.jit(exported.call)

  def __call__(self, images) -> jax.Array:
    """Images [B, ...] -> logits [B, classes], float32."""
    return self._call(self._arrays, jnp.asarray(images, jnp.float32))
