"""The arithmetic of grids: bits, steps and levels.

A grid has whole steps from -clip to clip, or on one side of zero alone; how
many bits they take depends on the step, the clip and the exponent of
`ops.quantize`, which says what each of them is.
"""

import jax
import jax.numpy as jnp

from djpq_jax.ops import powers


def bit_width(
  step_size,
  clip,
  exponent=1.0,
  *,
  signed=True,
  floor=0.0,
  below=None,
  mid_rise=False,
):
  """Bits that the grid needs, 1[signed] + log2(1 + (clip-floor)**t / step).

  With `below`, all levels count: log2(1 + (1 + below) (clip-floor) / step);
  with `mid_rise`, likewise, with as much below zero as above it.

  The logarithm without its ceil: real-valued bits train, whole bits are for
  the report [ceil: `quant_layers.py` of microsoft/geta; without: our choice].
  `ceil(bit_width(...))` bits hold all levels of `quantize_to_int`, up to
  float32 rounding, and also the level more of ``narrow_range=False``.

  Args:
    step_size: spacing of the grid in units of u, > 0.
    clip: largest magnitude kept, > floor, in units of x.
    exponent: power t that warps magnitudes, > 0.
    signed: whether one bit is a sign; static.
    floor: fixed lower edge, >= 0, in units of x, without gradient.
    below: as in `quantize.quantize`.
    mid_rise: as in `quantize.quantize`.

  Returns:
    Bits, float32 array of the arguments' common shape; differentiable.

  Raises:
    ValueError: the arguments do not broadcast with each other.

  >>> round(float(bit_width(1 / 7, 1.0)), 3)
  4.0
  >>> round(float(bit_width(1 / 15, 1.0, signed=False)), 3)
  4.0
  """
  step, span = _span(step_size, clip, exponent, floor)
  below = _spread_below(signed, below, mid_rise)
  if below is not None:
    return jnp.log2(1 + (1 + below) * span * (1 / step))
  return int(signed) + jnp.log2(1 + span * (1 / step))


def step_for_bits(
  bits,
  clip,
  exponent=1.0,
  *,
  signed=True,
  floor=0.0,
  below=None,
  mid_rise=False,
):
  """Step whose grid has `bits` bits, the inverse of `bit_width`.

  step = (clip - floor) ** t / (2 ** (bits - 1[signed]) - 1)
  [`quant_layers.py` of microsoft/geta]; with `below` and `mid_rise`, see
  `levels_above`.

  Args:
    bits: bits, > 1 if signed and > 0 if not or with `mid_rise`; real-valued or
      whole.
    clip: largest magnitude kept, > floor, in units of x.
    exponent: power t that warps magnitudes, > 0.
    signed: whether one bit is a sign; static.
    floor: fixed lower edge, >= 0, in units of x, without gradient.
    below: as in `quantize.quantize`.
    mid_rise: as in `quantize.quantize`.

  Returns:
    Step, float32 array of the arguments' common shape; differentiable.

  Raises:
    ValueError: the arguments do not broadcast with each other.

  >>> round(float(1 / step_for_bits(4.0, 1.0)), 3)
  7.0
  """
  bits, span = _span(bits, clip, exponent, floor)
  return span / levels_above(
    bits, signed=signed, below=below, mid_rise=mid_rise
  )


def levels_above(bits, *, signed=True, below=None, mid_rise=False):
  """Levels above zero of a grid of `bits` bits, the clip in steps.

  2 ** (bits - 1[signed]) - 1; with `below`, its share of all but zero,
  (2 ** bits - 1) / (1 + below); with `mid_rise`, half of that, (2 ** bits - 1)
  / 2.

  Args:
    bits: bits, > 1 if signed and > 0 if not or with `mid_rise`; a number or an
      array.
    signed: whether one bit is a sign.
    below: as in `quantize.quantize`.
    mid_rise: as in `quantize.quantize`.

  Returns:
    A float for a Python number, else an array; differentiable.

  Raises:
    ValueError: a Python number of bits that leaves no level above zero.

  >>> levels_above(4), levels_above(4, signed=False), levels_above(2, below=0.5)
  (7.0, 15.0, 2.0)
  """
  power = (lambda n: 2.0**n) if isinstance(bits, int | float) else jnp.exp2
  below = _spread_below(signed, below, mid_rise)
  if below is not None:
    found = (power(bits) - 1) / (1 + below)
  else:
    found = power(bits - int(signed)) - 1
  if isinstance(found, float) and not found > 0:
    what = 'a signed grid' if signed and below is None else 'a grid'
    raise ValueError(f'{what} of {bits:g} bits has no level above zero')
  return found


def _spread_below(signed, below, mid_rise):
  """How far a signed grid spreads its bits below zero, over above it."""
  if mid_rise:
    return 1.0
  return below if signed else None


def _span(other, clip, exponent, floor):
  """The other argument, and (clip - floor) ** exponent, of one shape."""
  arrays = [
    other,
    clip,
    floor,
    *([] if powers.is_one(exponent) else [exponent]),
  ]
  dtype = powers.compute_dtype(*arrays)
  arrays = [jnp.asarray(a, dtype) for a in arrays]
  shapes = [a.shape for a in arrays]
  try:
    shape = jnp.broadcast_shapes(*shapes)
  except ValueError as error:
    raise ValueError(f'shapes do not broadcast: {shapes}') from error
  other, clip, floor, *rest = [jnp.broadcast_to(a, shape) for a in arrays]
  span = clip - jax.lax.stop_gradient(floor)
  return other, powers.power(span, rest[0] if rest else None)
