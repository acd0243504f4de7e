"""StableHLO files of `jax.export`: one program for CPU, GPU and TPU."""

import json
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import files
from djpq_jax import harden
from djpq_jax import stablehlo


def exported(
  model: harden.HardenedModel, input_shape, batch: int | None = None
) -> jax.export.Exported:
  """A hardened model as StableHLO, with its integers as constants.

  Args:
    model: what to export.
    input_shape: of one example, as (8, 8, 1).
    batch: examples of a call, or None for any number.

  Raises:
    ValueError: the model cannot be traced, or not for any batch.
  """
  graphdef, state = nnx.split(compress.eval_view(model))
  state = nnx.as_pure(state)

  def predict(images):
    # Else what is known, as a batch norm's root, is worked out while it is
    # compiled, by other code than what computes it for `djpq evaluate`: the
    # last bit may differ, and with it how an activation is rounded.
    known = jax.lax.optimization_barrier(state)
    return nnx.merge(graphdef, known)(images).astype(jnp.float32)

  try:
    return stablehlo.export(predict, stablehlo.images(input_shape, batch))
  except stablehlo.NotExportable as error:
    hint = '' if batch else '; with a fixed batch it may do'
    raise ValueError(f'the model has no StableHLO: {error}{hint}') from error


def manifest_path(path) -> pathlib.Path:
  """Where the facts about a file are: beside it."""
  path = pathlib.Path(path)
  return path.with_name(path.name + '.json')


def write(
  path, program: jax.export.Exported, facts: dict[str, Any]
) -> pathlib.Path:
  """Writes the program, and its facts beside it as JSON.

  Both replace what is there.

  Returns:
    The path of the JSON file.
  """
  path = pathlib.Path(path)
  for target, content in (
    (path, bytes(program.serialize())),
    (manifest_path(path), (json.dumps(facts, indent=1) + '\n').encode()),
  ):
    files.replace(target, content)
  return manifest_path(path)


class Loaded:
  """A file as JAX runs it, on whatever device it has."""

  def __init__(self, path):
    content = bytearray(pathlib.Path(path).read_bytes())
    self.program = jax.export.deserialize(content)
    self._call = jax.jit(self.program.call)

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C] -> logits [B, classes], float32."""
    return np.asarray(self._call(jnp.asarray(images, jnp.float32)))
