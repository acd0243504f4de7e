"""Uniform quantizer with a learned step, clip and exponent.

A magnitude is clipped, raised to `exponent` and rounded to whole steps::

    u   = (min(|x|, clip) - floor) ** exponent        (0 below `floor`)
    x_q = sign(x) * step * round(u / step)

The result is `step` times an integer: the grid is uniform whatever the
exponent is, and there is no inverse mapping.  Unsigned, negative x gives 0.
Signed, two's complement holds one level more below zero than above it; with
``narrow_range=False`` the grid has it, too: negative x is clipped one step
later, at ``-(clip + step)``.  ``below`` puts that edge anywhere else, at
``-below * clip``: for values that reach less far below zero than above, as
after gelu or swish, which would leave most levels below zero unused.
With ``mid_rise`` the levels lie half a step beside the whole ones, evenly on
both sides of zero, which is none of them::

    x_q = sign(x) * step * (floor(min(|x|, clip) / step) + 1/2)

It is for few bits: of two, -2 to 1 steps have two levels below zero and one
above it, and -3/2, -1/2, 1/2 and 3/2 steps two on either side.  One bit has no
other grid: -1/2 and 1/2 steps.

Straight-through derivatives, each times sign(x)::

    d x_q / d step     = round(u / step) - u / step
    d x_q / d clip     = exponent (clip - floor) ** (exponent - 1)  above clip
    d x_q / d exponent = u ln(min(|x|, clip) - floor)               above floor
    d x_q / d x        = 1 where |x| <= clip, 0 above    (without sign(x))

and, where negative x is clipped one step later, 1 more to the step there;
where it is clipped at ``-below * clip``, `below` times as much to the clip.
With `mid_rise` they are the same, with its level in place of round(u / step).

Formula and derivatives: `quant_layers.py` of github.com/microsoft/geta, which
says that it follows DJPQ (Wang et al., arXiv 2007.10463).  The derivative to x
is the plain straight-through one, also below `floor`, so that a weight can
leave the dead zone.  Unsigned, it is 0 for x < 0.

Rounding is to nearest, ties to even.  All arithmetic is float32 (float64 for
float64 inputs).  Reverse-mode differentiation only: there is no jvp.
"""

import functools
import math

import jax
import jax.numpy as jnp

from djpq_jax.ops import grid
from djpq_jax.ops import powers
from djpq_jax.ops import straight_through


def quantize(
  x,
  step_size,
  clip,
  exponent=1.0,
  *,
  signed=True,
  floor=0.0,
  narrow_range=True,
  below=None,
  mid_rise=False,
):
  """Rounds x to whole steps, differentiable in x and in the grid.

  ``x_q = sign(x) step round((min(|x|, clip) - floor) ** exponent / step)``
  [formula and derivatives: the module's docstring].

  Precondition, not checked as it may be traced: 0 <= floor < clip, step > 0.
  A step above the clip's power rounds everything to 0 or one step.  Infinite
  x saturates at the clip; NaN stays NaN.

  Args:
    x: floating array of any shape.
    step_size: spacing of the grid in units of u, > 0; broadcasts to x.
    clip: largest magnitude kept, > floor, in units of x; broadcasts to x.
    exponent: power that warps magnitudes, > 0; broadcasts to x.  The Python
      number 1.0 picks a kernel without powers; an array of ones gives the
      same values and also a gradient.
    signed: whether negative values have levels; static.
    floor: fixed lower edge, >= 0, in units of x, without gradient; magnitudes
      below it give 0.
    narrow_range: whether a signed grid has as many levels below zero as above,
      or one more, as two's complement [LSQ, Esser et al. 2020]; static.
    below: largest magnitude kept below zero, over the clip, >= 0; in place of
      what `narrow_range` says.  A Python number or None; static.
    mid_rise: whether the levels lie half a step beside whole steps, in place
      of what `narrow_range` says [the mid-rise quantizer of signal processing];
      static.

  Returns:
    Array of x's shape and dtype.

  Raises:
    TypeError: x is not floating.
    ValueError: a parameter does not broadcast to x, a level more, `below` or
      `mid_rise` is asked for together with an exponent, `mid_rise` together
      with a floor, `below`, or no sign, or `below` is negative.

  >>> quantize(jnp.array([-2.0, 0.3, 0.8]), 0.25, 1.0)
  Array([-1.  ,  0.25,  0.75], dtype=float32)
  >>> quantize(jnp.array([-2.0, 0.3, 0.8]), 0.25, 1.0, signed=False)
  Array([0.  , 0.25, 0.75], dtype=float32)
  >>> float(jax.grad(quantize, argnums=2)(jnp.array(3.0), 0.25, 1.0))
  1.0
  >>> quantize(jnp.array([-9.0, 9.0]), 0.5, 0.5, narrow_range=False)
  Array([-1. ,  0.5], dtype=float32)
  >>> quantize(jnp.array([-9.0, 9.0]), 0.25, 1.0, below=0.5)
  Array([-0.5,  1. ], dtype=float32)
  >>> quantize(jnp.array([-9.0, -0.1, 0.9, 9.0]), 1.0, 1.5, mid_rise=True)
  Array([-1.5, -0.5,  0.5,  1.5], dtype=float32)
  """
  sides = _sides(signed, narrow_range, exponent, below, mid_rise, floor)
  x, step, clip, exponent, floor, unit = _operands(
    x,
    step_size=step_size,
    clip=clip,
    exponent=exponent,
    floor=floor,
    unit=_unit(step_size),
  )
  if exponent is None:
    return straight_through.uniform(x, unit, step, clip, floor, sides)
  return straight_through.warped(x, unit, step, clip, exponent, floor, sides)


def quantize_lsq(
  x,
  clip,
  bits,
  *,
  signed=True,
  narrow_range=True,
  below=None,
  mid_rise=False,
):
  """The quantizer of a fixed number of bits: only its clip is learned.

  ``quantize(x, step_for_bits(bits, clip), clip)``, whose step moves with the
  clip: the learned step size of LSQ (Esser et al. 2020).  Values and
  derivatives are those of that formula, in one pass over x instead of two::

      d x_q / d clip = (x_q - x) / clip   inside, x_q / clip   outside

  Of one bit, with `mid_rise`, the clip is the level: ``sign(x) clip``, where
  zero counts as positive [the scaled sign of XNOR-Net, Rastegari et al. 2016].
  Much of x lies beyond its level then, and is no exception to be held back, so
  the derivatives are the same everywhere [our choice; `quantize`, which bits
  are searched with, holds it back]::

      d x_q / d clip = sign(x),   d x_q / d x = 1

  Args:
    x: floating array of any shape.
    clip: largest magnitude kept, > 0, in units of x; broadcasts to x.
    bits: a Python number, > 1 if signed and > 0 if not or with `mid_rise`.
    signed: whether negative values have levels; static.
    narrow_range: whether a signed grid has as many levels below zero as above,
      or all ``2 ** bits``; static.
    below: as in `quantize`; levels below zero over levels above it.
    mid_rise: as in `quantize`.

  Returns:
    Array of x's shape and dtype.

  Raises:
    TypeError: x is not floating.
    ValueError: a parameter does not broadcast to x, there are too few bits, or
      `below` or `mid_rise` is refused as by `quantize`.

  >>> quantize_lsq(jnp.array([-2.0, 0.3, 0.8]), 1.0, 3)
  Array([-1.        ,  0.33333334,  0.6666667 ], dtype=float32)
  >>> quantize_lsq(jnp.array([-9.0, 9.0]), 0.5, 2, narrow_range=False)
  Array([-1. ,  0.5], dtype=float32)
  >>> quantize_lsq(jnp.array([-9.0, 9.0]), 1.0, 2, below=1 / 2)
  Array([-0.5,  1. ], dtype=float32)
  >>> quantize_lsq(jnp.array([-9.0, 0.1, 9.0]), 0.5, 1, mid_rise=True)
  Array([-0.5,  0.5,  0.5], dtype=float32)
  """
  step = clip / grid.levels_above(
    bits, signed=signed, below=below, mid_rise=mid_rise
  )
  x, clip, step, unit = _operands(
    x, clip=clip, step_size=step, unit=_unit(clip)
  )
  sides = _sides(signed, narrow_range, below=below, mid_rise=mid_rise)
  sides = sides._replace(binary=mid_rise and bits == 1)
  return straight_through.lsq(x, unit, step, clip, sides)


def quantize_to_int(
  x,
  step_size,
  clip,
  exponent=1.0,
  *,
  signed=True,
  floor=0.0,
  narrow_range=True,
  below=None,
  mid_rise=False,
):
  """Integer levels n of the quantizer: `quantize(x, ...)` is step * n.

  With `mid_rise` it is step / 2 * n, and all n are odd.  The equality is exact
  in float32 while ``|n| < 2**24``.  No gradient.

  Args:
    x: floating array of any shape.
    step_size: spacing of the grid in units of u, > 0; broadcasts to x.
    clip: largest magnitude kept, > floor, in units of x; broadcasts to x.
    exponent: power that warps magnitudes, > 0; broadcasts to x.
    signed: whether negative values have levels; static.
    floor: fixed lower edge, >= 0, in units of x.
    narrow_range: whether a signed grid has as many levels below zero as above,
      or one more; static.
    below: as in `quantize`.
    mid_rise: as in `quantize`.

  Returns:
    int32 array of x's shape.

  Raises:
    TypeError: x is not floating.
    ValueError: as `quantize`.

  >>> quantize_to_int(jnp.array([-2.0, 0.3, 0.8]), 0.25, 1.0)
  Array([-4,  1,  3], dtype=int32)
  """
  sides = _sides(signed, narrow_range, exponent, below, mid_rise, floor)
  exponent = None if powers.is_one(exponent) else exponent
  x = jnp.asarray(x)
  # As arrays: a whole number of Python may be too large for a program.
  operands = [
    p if p is None else jnp.asarray(p, powers.compute_dtype(x))
    for p in (step_size, clip, exponent, floor)
  ]
  return _to_int(x, *operands, sides)


# One program for each shape, and not one for each operation on it.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def _to_int(x, step_size, clip, exponent, floor, sides):
  x, step, clip, exponent, floor = _operands(
    x, step_size=step_size, clip=clip, exponent=exponent, floor=floor
  )
  level = straight_through.level(x, step, clip, exponent, floor, sides)
  if sides.mid_rise:
    level = 2 * level
  return jax.lax.stop_gradient(level).astype(jnp.int32)


def _sides(
  signed, narrow_range, exponent=1.0, below=None, mid_rise=False, floor=0.0
):
  if mid_rise:
    plain = (
      powers.is_one(exponent) and isinstance(floor, int | float) and not floor
    )
    if not (signed and plain and below is None):
      raise ValueError(
        'mid_rise is for signed grids without exponent, floor and below'
      )
    return straight_through.Sides(True, True, None, True)
  if not narrow_range and not powers.is_one(exponent):
    raise ValueError('narrow_range=False is for grids with exponent 1.0 only')
  if below is None or not signed:
    return straight_through.Sides(
      bool(signed), bool(narrow_range or not signed)
    )
  if not powers.is_one(exponent):
    raise ValueError('below is for grids with exponent 1.0 only')
  if not 0 <= below < math.inf:
    raise ValueError(f'below must be a number from 0 on, got {below}')
  return straight_through.Sides(True, True, float(below))


def _unit(parameter):
  """One, whose derivative is that of the parameter's logarithm.

  What is summed over a tensor is then free of the parameter itself, which
  some compilers would spread over the tensor first.
  """
  parameter = jnp.asarray(parameter, powers.compute_dtype(parameter))
  return parameter / jax.lax.stop_gradient(parameter)


def _operands(x, **params):
  """Broadcasts the parameters to x, in the compute dtype.

  An exponent that is statically one comes back as None.  The zeros give all
  operands the sharding of x and the mesh axes that any of them varies over,
  as explicit meshes and `shard_map(check_vma=True)` ask for.
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x must be floating, not {x.dtype}')
  dtype = powers.compute_dtype(x)
  if powers.is_one(params.get('exponent')):
    params['exponent'] = None
  arrays = {
    k: None if v is None else jnp.asarray(v, dtype) for k, v in params.items()
  }
  zero = jnp.zeros_like(x, dtype)
  for array in arrays.values():
    if array is not None:
      zero += jnp.zeros_like(array, dtype, ())
  full = [_spread(k, a, zero) for k, a in arrays.items()]
  return x + zero.astype(x.dtype), *full


def _spread(name, array, zero):
  if array is None:
    return None
  try:
    return zero + jnp.broadcast_to(array, zero.shape)
  except ValueError as error:
    raise ValueError(
      f'{name} of shape {array.shape} does not broadcast to x of shape'
      f' {zero.shape}'
    ) from error
