"""Kernels to begin with: JAX's initializers, with fewer programs to compile.

On a CPU XLA compiles a generator for a shape of several axes for longer than
one for a vector, and one for each shape.  Compilers treat the ends of vectors
in their own ways, so that a last bit may differ from JAX's.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import places

# Standard deviation of the standard normal distribution between -2 and 2.
_TRUNCATED = 0.87962566103423978
# Vectors have one of a few lengths, up to where that would waste much.
_SHORTEST, _LONGEST = 2**12, 2**20


def he_normal(key, shape, dtype=jnp.float32):
  """Values of `jax.nn.initializers.he_normal()`, [*window, inputs, outputs]."""
  return _scaled(2.0, key, shape, dtype)


def lecun_normal(key, shape, dtype=jnp.float32):
  """Values of `jax.nn.initializers.lecun_normal()`, [*window, in, out]."""
  return _scaled(1.0, key, shape, dtype)


def truncated_normal(key, shape, dtype=jnp.float32, *, deviation=1.0):
  """Normal values, cut at two standard deviations, times `deviation`.

  Those of `jax.random.truncated_normal(key, -2, 2, shape, dtype)`, where an
  entry depends on its place in the flat array and not on the shape, as with
  the generator that JAX has by default.
  """
  size = math.prod(shape)
  length = size
  if size <= _LONGEST and not isinstance(key, jax.core.Tracer):
    length = _SHORTEST
    while length < size:
      length *= 4
  values = jax.random.truncated_normal(key, -2.0, 2.0, (length,), dtype)
  values *= np.asarray(deviation, dtype)
  if length == size:
    return values.reshape(shape)
  return places.pick(lambda v: v[:size].reshape(shape), values)


def _scaled(scale: float, key, shape, dtype):
  variance = np.asarray(scale / math.prod(shape[:-1]), dtype)
  deviation = np.sqrt(variance) / np.asarray(_TRUNCATED, dtype)
  return truncated_normal(key, shape, dtype, deviation=deviation)
