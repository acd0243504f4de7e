"""Powers of magnitudes, and the dtype that grids are computed in."""

import jax
import jax.numpy as jnp


def power(base, exponent):
  """Raises base >= 0 to the exponent, 0 at 0 with finite derivatives.

  None is exponent 1.  NaN stays NaN.
  """
  if exponent is None:
    return base
  zero = base <= 0
  return jnp.where(zero, 0, jnp.power(jnp.where(zero, 1, base), exponent))


def is_one(exponent):
  """Whether the exponent is the Python number 1, so no power is needed."""
  return isinstance(exponent, (int, float)) and exponent == 1


def compute_dtype(*arrays):
  """float64 if one of them is a JAX array of it, else float32."""
  wide = any(isinstance(a, jax.Array) and a.dtype == 'float64' for a in arrays)
  return jnp.float64 if wide else jnp.float32
