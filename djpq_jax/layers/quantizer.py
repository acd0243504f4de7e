"""A learned grid for one tensor."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax.ops import grid
from djpq_jax.ops import quantize

EXPONENT_RANGE = (0.5, 2.0)
# From as many bits on a level more is nothing, and integers of int8 want
# magnitudes below 128.
NARROW_FROM = 8
# To as many bits a kernel has no level at zero; with more none was tried.
MID_RISE_TO = 2


class QuantParam(nnx.Param):
  """A learned quantizer parameter: log clip, log step or log exponent."""


@jax.custom_vjp
def bounded(x, low, high):
  """Clamps `x` to [low, high]; at a bound only the way back has a gradient.

  A plain clamp has no gradient outside, so what once hit a bound never
  returns; straight-through lets `x` drift ever further out.  Here a gradient
  reaches `x` unless following it (downhill) would leave the range further.
  The active bound gets the gradient too, since the value moves with it.

  Args:
    x: float array.
    low: smallest value, same shape.
    high: largest value, same shape.

  Returns:
    Array like `x`.
  """
  return jnp.clip(x, low, high)


def _bounded_fwd(x, low, high):
  return jnp.clip(x, low, high), (x, low, high)


def _bounded_bwd(residuals, g):
  x, low, high = residuals
  # On a bound, what x may not follow the bound does.
  below = (x < low) | ((x == low) & (g > 0))
  above = (x > high) | ((x == high) & (g < 0))
  leaves = (below & (g > 0)) | (above & (g < 0))
  return (
    jnp.where(leaves, 0.0, g),
    jnp.where(below, g, 0.0),
    jnp.where(above, g, 0.0),
  )


bounded.defvjp(_bounded_fwd, _bounded_bwd)


class Quantizer(nnx.Module):
  """A learned grid for one tensor: clip q_m, step d and, if asked, exponent t.

  All three are learned as logarithms, so they stay positive, and the step is
  held between those of the largest and of the smallest allowed bits.  A
  quantizer whose bits are `fixed` learns its clip alone and its step follows,
  which is the learned step size of LSQ (Esser et al. 2020) for that grid.

  Args:
    clip: largest magnitude kept, > 0, below zero more or less than that (see
      `narrow_range` and `below`); scalar, or an array that broadcasts to the
      tensor for one grid per channel.
    bits: bits to begin with, inside `bounds`.
    signed: whether the tensor has negative values.
    bounds: smallest and largest bits.
    learn_exponent: whether to learn t (else it stays 1).
    fixed: whether `bits` stay as they are.
    exponent: t to begin with.
    choices: bits that the grid may have, or () for any.  The learned bits go
      to the nearest of them (in octaves), with a straight-through gradient
      [DJPQ-restrict].
    real_above: whether bits above the largest choice stay as they are learned.
    narrow_range: whether a signed grid has as many levels below zero as above
      it, as the formula of `ops.quantize` says.  If not, it has one more below,
      which two's complement holds: of two bits -2, -1, 0, 1 [LSQ].  A grid
      with an exponent, or that cannot have fewer than eight bits, is symmetric
      in any case.
    below: levels below zero over levels above it, for values that reach less
      far below zero than above; in place of what `narrow_range` says, where
      that need not be symmetric.
    mid_rise: whether the levels lie half a step beside whole steps, as
      `ops.quantize` says; in place of the two before.
    may_lack_zero: whether a grid of the choices is a mid-rise one if it has
      `MID_RISE_TO` bits or fewer, and none if it has more, whatever `mid_rise`
      says: the grids that are left once bits are fixed.  For signed grids with
      ``narrow_range=False``, without exponent and `below`.

  Raises:
    ValueError: fewer bits than such a grid can have, or `may_lack_zero` with
      another grid.
  """

  def __init__(
    self,
    clip,
    bits: float,
    *,
    signed: bool,
    bounds: tuple[float, float],
    learn_exponent: bool = False,
    fixed: bool = False,
    exponent: float = 1.0,
    choices: Sequence[float] = (),
    real_above: bool = False,
    narrow_range: bool = True,
    below: float | None = None,
    mid_rise: bool = False,
    may_lack_zero: bool = False,
  ):
    plain = signed and not narrow_range and below is None
    if may_lack_zero and (learn_exponent or not plain):
      raise ValueError(
        'may_lack_zero is for signed grids with narrow_range=False, without '
        'exponent and below'
      )
    clip = jnp.asarray(clip, jnp.float32)
    self.signed = signed
    self.bounds = (float(bounds[0]), float(bounds[1]))
    self.fixed_bits = float(bits) if fixed else None
    self.choices = () if fixed else tuple(sorted(map(float, choices)))
    self.real_above = real_above and not fixed
    self.narrow_range = narrow_range
    self.below = None if below is None else float(below)
    self.mid_rise = mid_rise
    self.may_lack_zero = may_lack_zero
    self.log_clip = QuantParam(jnp.log(clip))
    self.log_exponent = nnx.data(None)
    self.log_step = nnx.data(None)
    t: Any = 1.0
    if learn_exponent:
      t = jnp.asarray(exponent, jnp.float32)
      self.log_exponent = QuantParam(jnp.log(t))
    for count in (bits, *self.bounds):
      self._above(float(count))  # which refuses those that no grid has
    if not fixed:
      step = grid.step_for_bits(float(bits), clip, t, **self.extent)
      self.log_step = QuantParam(jnp.log(step))

  def grid(self, *, restricted: bool = True):
    """Returns (step, clip, exponent) as they apply now.

    Args:
      restricted: whether the bits are one of the choices, if there are any;
        else they are those that are learned.
    """
    return self._grid(restricted)[:3]

  def _grid(self, restricted: bool = True):
    """(step, clip, exponent, bits or None if not restricted)."""
    log_clip = self.log_clip[...]
    clip = jnp.exp(log_clip)
    exponent: Any = 1.0
    log_range = log_clip
    if self.log_exponent is not None:
      raw = self.log_exponent[...]
      low, high = (jnp.full_like(raw, np.log(e)) for e in EXPONENT_RANGE)
      exponent = jnp.exp(bounded(raw, low, high))
      log_range = exponent * log_clip
    if self.fixed_bits is not None:
      step = jnp.exp(log_range) / self._above(self.fixed_bits)
      return step, clip, exponent, None
    assert self.log_step is not None
    low, high = (log_range - np.log(self._above(b)) for b in self.bounds[::-1])
    log_step = bounded(self.log_step[...], low, high)
    bits = None
    if self.choices and restricted:
      learned = grid.bit_width(jnp.exp(log_step), clip, exponent, **self.extent)
      bits = self._nearest(learned)
      top = grid.levels_above(bits, **self._extent(False))
      without = grid.levels_above(bits, **self._extent(True))
      top = jnp.where(self.lacks_zero(bits), without, top)
      allowed = log_range - jnp.log(top)
      log_step += jax.lax.stop_gradient(allowed - log_step)
    return jnp.exp(log_step), clip, exponent, bits

  @property
  def symmetric(self) -> bool:
    """Whether the grid has as many levels below zero as above, or none."""
    return self.sides['narrow_range']

  @property
  def sides(self) -> dict[str, Any]:
    """What the grid has below zero, as `ops.quantize.quantize` takes it."""
    return self._sides(self.mid_rise)

  def levels(self, bits: float) -> tuple[float, float]:
    """Steps from zero to the highest and to the lowest level, at some bits."""
    sides = self._sides(self.lacks_zero(bits))
    narrow = sides.pop('narrow_range')
    above, below = grid.levels_above(bits, **sides), sides['below']
    if sides['mid_rise']:
      return above, above
    if below is not None:
      return above, above * below
    return above, (above + (not narrow)) * self.signed

  def lacks_zero(self, bits: float) -> bool:
    """Whether the grid has no level at zero, at some bits."""
    if self.choices and self.may_lack_zero:
      return bits <= MID_RISE_TO
    return self.mid_rise

  @property
  def extent(self) -> dict[str, Any]:
    """What the bits depend on beside step, clip and exponent, likewise."""
    return self._extent(self.mid_rise)

  def _extent(self, mid_rise: bool) -> dict[str, Any]:
    uneven = self._may_be_uneven() and not mid_rise
    below = self.below if uneven else None
    return {'signed': self.signed, 'below': below, 'mid_rise': mid_rise}

  def _sides(self, mid_rise: bool) -> dict[str, Any]:
    asked = self.below is not None or not self.narrow_range
    narrow = mid_rise or not (asked and self._may_be_uneven())
    return {'narrow_range': narrow} | self._extent(mid_rise)

  def _may_be_uneven(self) -> bool:
    least = self.bounds[0] if self.fixed_bits is None else self.fixed_bits
    return self.signed and least < NARROW_FROM and self.log_exponent is None

  def nearest(self, bits: float) -> float:
    """What a grid whose bits are learned to be these has."""
    return float(self._nearest(bits, np)) if self.choices else bits

  def _nearest(self, bits, numpy: Any = jnp):
    """The choice that is nearest in octaves, or the same bits above them."""
    choices = np.array(self.choices, np.float32)
    # From the geometric mean of two choices on, the larger one is nearer.
    edges = np.sqrt(choices[1:] * choices[:-1])
    found = numpy.asarray(choices)[numpy.searchsorted(edges, bits)]
    above = self.real_above and bits > choices[-1]
    return numpy.where(above, bits, found)

  def _above(self, bits: float) -> float:
    return grid.levels_above(bits, **self.extent)

  def bits(self, *, restricted: bool = True):
    """Bits of the grid: differentiable, or a whole float if fixed."""
    if self.fixed_bits is not None:
      return self.fixed_bits
    step, clip, exponent, chosen = self._grid(restricted)
    bits = grid.bit_width(step, clip, exponent, **self.extent)
    if chosen is not None:  # a grid without a zero has other levels
      bits += jax.lax.stop_gradient(chosen - bits)
    # One grid per channel shares one width: that of its widest channel.
    return jnp.max(bits)

  def __call__(self, x):
    """Quantizes `x`, of any shape; the result has its shape and dtype."""
    if self.fixed_bits is not None and self.log_exponent is None:
      clip = jnp.exp(self.log_clip[...])
      return quantize.quantize_lsq(x, clip, self.fixed_bits, **self.sides)
    parts, sides, shift = self._parts()
    if shift is None:
      return quantize.quantize(x, *parts, **sides)
    out = quantize.quantize(x - shift, *parts, **sides) + shift
    return out.astype(x.dtype)

  def integers(self, x):
    """The whole numbers n, int32, for which `self(x)` is unit * n."""
    parts, sides, shift = self._parts()
    if shift is None:
      return quantize.quantize_to_int(x, *parts, **sides)
    level = quantize.quantize_to_int(x - shift, *parts, **sides)
    return jnp.where(shift > 0, 2 * level + 1, level)

  @property
  def unit(self):
    """What one of `integers` is worth: the step, or half of it."""
    step, _, _, bits = self._grid()
    return step * jnp.where(self._without_zero(bits), 0.5, 1.0)

  def _parts(self):
    """The grid, its sides, and how far it is shifted or None.

    Where it depends on the bits whether a level is at zero, there is one grid
    for both: a mid-rise one is that of all levels, half a step higher.
    """
    step, clip, exponent, bits = self._grid()
    without = self._without_zero(bits)
    if isinstance(without, bool):
      return (step, clip, exponent), self._sides(without), None
    shift = jnp.where(without, step / 2, 0.0)
    return (step, clip - shift, exponent), self._sides(False), shift

  def _without_zero(self, bits):
    """Whether the grid has no level at zero; a bool if that is known."""
    if bits is None:
      return self.mid_rise
    lacking = {self.lacks_zero(b) for b in self.choices}
    if self.real_above:
      lacking.add(self.lacks_zero(np.inf))
    return self.lacks_zero(bits) if len(lacking) > 1 else lacking.pop()
