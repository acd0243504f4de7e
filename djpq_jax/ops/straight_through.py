"""The quantizer's values and straight-through derivatives, of whole operands.

Formulas are in `ops.quantize`, which checks the operands, and brings them to
one shape and to the dtype that is computed in.  The derivative to the step's
logarithm goes to `unit`, none to `step`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from djpq_jax.ops import powers


class Sides(NamedTuple):
  """What a grid has below zero and at it; static."""

  signed: bool
  narrow: bool
  below: float | None = None
  mid_rise: bool = False
  binary: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def uniform(x, unit, step, clip, floor, sides):
  """The quantizer for exponent 1; operands of one shape."""
  del unit
  return _values(x, step, clip, None, floor, sides)[0]


def _uniform_fwd(x, unit, step, clip, floor, sides):
  del unit
  out, x_q = _values(x, step, clip, None, floor, sides)
  return out, (x, x_q, step, clip, floor)


def _uniform_bwd(sides, residuals, g):
  x, x_q, step, clip, floor = residuals
  x_q = _wide(x_q, x, step, clip, None, floor, sides)
  size, sign = _size_and_sign(x.astype(step.dtype), sides)
  edge = _edge(x, step, clip, sides)
  above = size > edge
  d_x = jnp.where(_inside(x, above, sides), g, jnp.zeros_like(g))
  g = g.astype(step.dtype) * sign
  d_unit = g * _moved(x_q, _magnitude(size, edge, floor))
  d_clip = jnp.where(above, g, 0)
  if not sides.narrow:
    # The edge below moves with the step, too.
    d_unit += jnp.where(x < 0, d_clip * step, 0)
  if sides.below is not None:
    d_clip = jnp.where(x < 0, sides.below * d_clip, d_clip)
  return d_x, d_unit, None, d_clip, None


uniform.defvjp(_uniform_fwd, _uniform_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lsq(x, unit, step, clip, sides):
  """The quantizer whose step and clip both move with `unit`."""
  del unit
  return _values(x, step, clip, None, 0, sides)[0]


def _lsq_fwd(x, unit, step, clip, sides):
  del unit
  out, x_q = _values(x, step, clip, None, 0, sides)
  return out, (x, x_q, step, clip)


def _lsq_bwd(sides, residuals, g):
  x, x_q, step, clip = residuals
  x_q = _wide(x_q, x, step, clip, None, 0, sides)
  if sides.binary:
    return g, g.astype(step.dtype) * x_q, None, None
  size, sign = _size_and_sign(x.astype(step.dtype), sides)
  inside = _inside(x, size > _edge(x, step, clip, sides), sides)
  d_x = jnp.where(inside, g, jnp.zeros_like(g))
  d_unit = g.astype(step.dtype) * sign * _moved(x_q, jnp.where(inside, size, 0))
  return d_x, d_unit, None, None


lsq.defvjp(_lsq_fwd, _lsq_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def warped(x, unit, step, clip, exponent, floor, sides):
  """The quantizer for any exponent; operands of one shape."""
  del unit
  return _values(x, step, clip, exponent, floor, sides)[0]


def _warped_fwd(x, unit, step, clip, exponent, floor, sides):
  del unit
  out, x_q = _values(x, step, clip, exponent, floor, sides)
  return out, (x, x_q, step, clip, exponent, floor)


def _warped_bwd(sides, residuals, g):
  x, x_q, step, clip, exponent, floor = residuals
  x_q = _wide(x_q, x, step, clip, exponent, floor, sides)
  size, sign = _size_and_sign(x.astype(step.dtype), sides)
  magnitude = _magnitude(size, clip, floor)
  u = powers.power(magnitude, exponent)
  above = size > clip
  span = clip - floor
  d_x = jnp.where(_inside(x, above, sides), g, jnp.zeros_like(g))
  g = g.astype(step.dtype) * sign
  d_unit = g * _moved(x_q, u)
  d_clip = jnp.where(above, g * exponent * powers.power(span, exponent - 1), 0)
  d_exponent = g * u * jnp.log(jnp.where(magnitude == 0, 1, magnitude))
  return d_x, d_unit, None, d_clip, d_exponent, None


warped.defvjp(_warped_fwd, _warped_bwd)


def level(x, step, clip, exponent, floor, sides):
  """Signed whole level of each x, still floating."""
  size, sign = _size_and_sign(x.astype(step.dtype), sides)
  edge = _edge(x, step, clip, sides)
  u = powers.power(_magnitude(size, edge, floor), exponent)
  # Not u / step: XLA turns that into this product under jit on CPU but not
  # outside of it, and then the last bit, so the integer at a tie, would differ.
  steps = u * (1 / step)
  if sides.mid_rise:
    return sign * (jnp.floor(steps) + 0.5)
  return sign * jnp.round(steps)


def _values(x, step, clip, exponent, floor, sides):
  """Quantized values in x's dtype, and what of them the way back keeps."""
  x_q = step * level(x, step, clip, exponent, floor, sides)
  # A layer keeps its input anyway, unless that has another dtype.
  return x_q.astype(x.dtype), x_q if x.dtype == x_q.dtype else None


def _wide(x_q, x, step, clip, exponent, floor, sides):
  """The values that were kept, or else once more, in the compute dtype."""
  if x_q is not None:
    return x_q
  return step * level(x, step, clip, exponent, floor, sides)


def _moved(x_q, u):
  """How far rounding moved each magnitude: step round(u / step) - u.

  It does not round once more, for where compilers share that with the way
  forth, they write it to memory.  The abs keeps them from fusing the product in
  x_q with the difference, which rounds differently from program to program.
  """
  return jnp.abs(x_q) - u


def _size_and_sign(x, sides):
  if sides.mid_rise:  # zero has a level, too
    return jnp.abs(x), jnp.where(x < 0, -1, 1).astype(x.dtype)
  if sides.signed:
    return jnp.abs(x), jnp.sign(x)
  return jnp.maximum(x, 0), jnp.ones_like(x)


def _magnitude(size, clip, floor):
  """Distance above `floor`, saturating at the clip; 0 below the floor."""
  return jnp.maximum(jnp.minimum(size, clip) - floor, 0)


def _edge(x, step, clip, sides):
  """The largest magnitude kept, of each x."""
  if sides.below is not None:
    return jnp.where(x < 0, sides.below * clip, clip)
  return clip if sides.narrow else jnp.where(x < 0, clip + step, clip)


def _inside(x, above, sides):
  """Where the straight-through derivative to x is 1."""
  return ~above if sides.signed else ~above & (x >= 0)
