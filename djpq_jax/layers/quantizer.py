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
      says: the grids that are left once bits are fixed.
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
    narrow_range: bool = True,
    below: float | None = None,
    mid_rise: bool = False,
    may_lack_zero: bool = False,
  ):
    clip = jnp.asarray(clip, jnp.float32)
    self.signed = signed
    self.bounds = (float(bounds[0]), float(bounds[1]))
    self.fixed_bits = float(bits) if fixed else None
    self.choices = tuple(sorted(map(float, choices)))
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
    """(step, clip, exponent, which of the choices it is or None)."""
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
    chosen = None
    if self.choices and restricted:
      learned = grid.bit_width(
        jnp.exp(log_step), clip, exponent, **self.extent
      )
      chosen = jnp.searchsorted(self._edges(), learned)
      tops = [self.levels(b)[0] for b in self.choices if b < np.inf]
      top = jnp.asarray(np.array([*tops, 1.0], np.float32))[chosen]
      if self.choices[-1] == np.inf:
        extent = self._extent(self.lacks_zero(np.inf))
        real = grid.levels_above(learned, **extent)
        top = jnp.where(chosen == len(tops), real, top)
      allowed = log_range - jnp.log(top)
      log_step += jax.lax.stop_gradient(allowed - log_step)
    return jnp.exp(log_step), clip, exponent, chosen

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
    """The choice that is nearest in octaves; without choices, `bits`."""
    if not self.choices:
      return bits
    found = self.choices[np.searchsorted(self._edges(), bits)]
    return bits if found == np.inf else found

  def _choice(self, log_step, clip, exponent):
    """Which of the choices is the nearest to what was learned."""
    bits = grid.bit_width(jnp.exp(log_step), clip, exponent, **self.extent)
    return jnp.searchsorted(self._edges(), bits)

  def _edges(self) -> np.ndarray:
    """From the geometric mean of two choices on, the larger one is nearer."""
    choices = np.array(self.choices, np.float32)
    edges = np.sqrt(choices[1:] * choices[:-1])
    return np.where(np.isinf(edges), choices[:-1], edges)

  def _above(self, bits: float) -> float:
    return grid.levels_above(bits, **self.extent)

  def bits(self, *, restricted: bool = True):
    """Bits of the grid: differentiable, or a whole float if fixed."""
    if self.fixed_bits is not None:
      return self.fixed_bits
    step, clip, exponent, chosen = self._grid(restricted)
    bits = grid.bit_width(step, clip, exponent, **self.extent)
    if chosen is not None:  # a grid without a zero has other levels
      whole = jnp.asarray(self.choices, bits.dtype)[chosen]
      if self.choices[-1] == np.inf:
        log_step = self._grid(False)[0]
        learned = grid.bit_width(log_step, clip, exponent, **self.extent)
        whole = jnp.where(jnp.isinf(whole), learned, whole)
      bits += jax.lax.stop_gradient(whole - bits)
    # One grid per channel shares one width: that of its widest channel.
    return jnp.max(bits)

  def __call__(self, x):
    """Quantizes `x`, of any shape; the result has its shape and dtype."""
    if self.fixed_bits is not None and self.log_exponent is None:
      clip = jnp.exp(self.log_clip[...])
      return quantize.quantize_lsq(x, clip, self.fixed_bits, **self.sides)
    return self._on_grid(quantize.quantize, x)

  def integers(self, x):
    """The whole numbers n, int32, for which `self(x)` is unit * n."""
    return self._on_grid(quantize.quantize_to_int, x)

  @property
  def unit(self):
    """What one of `integers` is worth: the step, or half of it."""
    step, _, _, chosen = self._grid()
    return step * jnp.where(self._without_zero(chosen), 0.5, 1.0)

  def _on_grid(self, function, x):
    """A function of `ops.quantize`, with or without a zero as is chosen."""
    *parts, chosen = self._grid()
    without = self._without_zero(chosen)
    if isinstance(without, bool):
      return function(x, *parts, **self._sides(without))
    one, other = (function(x, *parts, **self._sides(m)) for m in (True, False))
    return jnp.where(without, one, other)

  def _without_zero(self, chosen):
    """Whether the grid has no level at zero; a bool if that is known."""
    lacking = [self.lacks_zero(bits) for bits in self.choices]
    if chosen is None or not lacking:
      return self.mid_rise
    if len(set(lacking)) == 1:
      return lacking[0]
    return jnp.asarray(lacking)[chosen]
