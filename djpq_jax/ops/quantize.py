"""Uniform quantizer with a learned step, clip and exponent.

A magnitude is clipped, raised to `exponent` and rounded to whole steps::

    u   = (min(|x|, clip) - floor) ** exponent        (0 below `floor`)
    x_q = sign(x) * step * round(u / step)

The result is `step` times an integer: the grid is uniform whatever the
exponent is, and there is no inverse mapping.  Unsigned, negative x gives 0.

Straight-through derivatives, each times sign(x)::

    d x_q / d step     = round(u / step) - u / step
    d x_q / d clip     = exponent (clip - floor) ** (exponent - 1)  above clip
    d x_q / d exponent = u ln(min(|x|, clip) - floor)               above floor
    d x_q / d x        = 1 where |x| <= clip, 0 above    (without sign(x))

Formula and derivatives: `quant_layers.py` of github.com/microsoft/geta, which
says that it follows DJPQ (Wang et al., arXiv 2007.10463).  The derivative to x
is the plain straight-through one, also below `floor`, so that a weight can
leave the dead zone.  Unsigned, it is 0 for x < 0.

Rounding is to nearest, ties to even.  All arithmetic is float32 (float64 for
float64 inputs).  Reverse-mode differentiation only: there is no jvp.
"""

import functools

import jax
import jax.numpy as jnp


def quantize(x, step_size, clip, exponent=1.0, *, signed=True, floor=0.0):
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

  Returns:
    Array of x's shape and dtype.

  Raises:
    TypeError: x is not floating.
    ValueError: a parameter does not broadcast to x.

  >>> quantize(jnp.array([-2.0, 0.3, 0.8]), 0.25, 1.0)
  Array([-1.  ,  0.25,  0.75], dtype=float32)
  >>> quantize(jnp.array([-2.0, 0.3, 0.8]), 0.25, 1.0, signed=False)
  Array([0.  , 0.25, 0.75], dtype=float32)
  >>> float(jax.grad(quantize, argnums=2)(jnp.array(3.0), 0.25, 1.0))
  1.0
  """
  x, unit, step, clip, exponent, floor = _operands(
    x,
    unit=_unit(step_size),
    step_size=step_size,
    clip=clip,
    exponent=exponent,
    floor=floor,
  )
  if exponent is None:
    return _uniform(x, unit, step, clip, floor, bool(signed))
  return _warped(x, unit, step, clip, exponent, floor, bool(signed))


def quantize_lsq(x, clip, bits, *, signed=True):
  """The quantizer of a fixed number of bits: only its clip is learned.

  ``quantize(x, step_for_bits(bits, clip), clip)``, whose step moves with the
  clip: the learned step size of LSQ (Esser et al. 2020).  Values and
  derivatives are those of that formula, in one pass over x instead of two::

      d x_q / d clip = (x_q - x) / clip   inside, x_q / clip   outside

  Args:
    x: floating array of any shape.
    clip: largest magnitude kept, > 0, in units of x; broadcasts to x.
    bits: a Python number, > 1 if signed and > 0 if not.
    signed: whether negative values have levels; static.

  Returns:
    Array of x's shape and dtype.

  Raises:
    TypeError: x is not floating.
    ValueError: a parameter does not broadcast to x.

  >>> quantize_lsq(jnp.array([-2.0, 0.3, 0.8]), 1.0, 3)
  Array([-1.        ,  0.33333334,  0.6666667 ], dtype=float32)
  """
  step = clip / (2.0 ** (bits - signed) - 1)
  x, unit, step, clip = _operands(
    x, unit=_unit(clip), step_size=step, clip=clip
  )
  return _lsq(x, unit, step, clip, bool(signed))


def quantize_to_int(
  x, step_size, clip, exponent=1.0, *, signed=True, floor=0.0
):
  """Integer levels n of the quantizer: `quantize(x, ...)` is step * n.

  The equality is exact in float32 while ``|n| < 2**24``.  No gradient.

  Args:
    x: floating array of any shape.
    step_size: spacing of the grid in units of u, > 0; broadcasts to x.
    clip: largest magnitude kept, > floor, in units of x; broadcasts to x.
    exponent: power that warps magnitudes, > 0; broadcasts to x.
    signed: whether negative values have levels; static.
    floor: fixed lower edge, >= 0, in units of x.

  Returns:
    int32 array of x's shape.

  Raises:
    TypeError: x is not floating.
    ValueError: a parameter does not broadcast to x.

  >>> quantize_to_int(jnp.array([-2.0, 0.3, 0.8]), 0.25, 1.0)
  Array([-4,  1,  3], dtype=int32)
  """
  x, step, clip, exponent, floor = _operands(
    x, step_size=step_size, clip=clip, exponent=exponent, floor=floor
  )
  level = _level(x, step, clip, exponent, floor, signed)
  return jax.lax.stop_gradient(level).astype(jnp.int32)


def bit_width(step_size, clip, exponent=1.0, *, signed=True, floor=0.0):
  """Bits that the grid needs, 1[signed] + log2(1 + (clip-floor)**t / step).

  The logarithm without its ceil: real-valued bits train, whole bits are for
  the report [ceil: `quant_layers.py` of microsoft/geta; without: our choice].
  `ceil(bit_width(...))` bits hold all levels of `quantize_to_int`, up to
  float32 rounding.

  Args:
    step_size: spacing of the grid in units of u, > 0.
    clip: largest magnitude kept, > floor, in units of x.
    exponent: power t that warps magnitudes, > 0.
    signed: whether one bit is a sign; static.
    floor: fixed lower edge, >= 0, in units of x, without gradient.

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
  return int(signed) + jnp.log2(1 + span * (1 / step))


def step_for_bits(bits, clip, exponent=1.0, *, signed=True, floor=0.0):
  """Step whose grid has `bits` bits, the inverse of `bit_width`.

  step = (clip - floor) ** t / (2 ** (bits - 1[signed]) - 1)
  [`quant_layers.py` of microsoft/geta].

  Args:
    bits: bits, > 1 if signed and > 0 if not; real-valued or whole.
    clip: largest magnitude kept, > floor, in units of x.
    exponent: power t that warps magnitudes, > 0.
    signed: whether one bit is a sign; static.
    floor: fixed lower edge, >= 0, in units of x, without gradient.

  Returns:
    Step, float32 array of the arguments' common shape; differentiable.

  Raises:
    ValueError: the arguments do not broadcast with each other.

  >>> round(float(1 / step_for_bits(4.0, 1.0)), 3)
  7.0
  """
  bits, span = _span(bits, clip, exponent, floor)
  return span / (jnp.exp2(bits - int(signed)) - 1)


def _unit(parameter):
  """One, whose derivative is that of the parameter's logarithm.

  What is summed over a tensor is then free of the parameter itself, which
  some compilers would spread over the tensor first.
  """
  parameter = jnp.asarray(parameter, _compute_dtype(parameter))
  return parameter / jax.lax.stop_gradient(parameter)


def _values(x, step, clip, exponent, floor, signed):
  """Quantized values in x's dtype, and what of them the way back keeps."""
  x_q = step * _level(x, step, clip, exponent, floor, signed)
  # A layer keeps its input anyway, unless that has another dtype.
  return x_q.astype(x.dtype), x_q if x.dtype == x_q.dtype else None


def _wide(x_q, x, step, clip, exponent, floor, signed):
  """The values that were kept, or else once more, in the compute dtype."""
  if x_q is not None:
    return x_q
  return step * _level(x, step, clip, exponent, floor, signed)


def _moved(x_q, u):
  """How far rounding moved each magnitude: step round(u / step) - u.

  It does not round once more, for where compilers share that with the way
  forth, they write it to memory.  The abs keeps them from fusing the product in
  x_q with the difference, which rounds differently from program to program.
  """
  return jnp.abs(x_q) - u


# The derivative to the step's logarithm goes to `unit`, none to `step`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _uniform(x, unit, step, clip, floor, signed):
  """The quantizer for exponent 1; operands of one shape."""
  del unit
  return _values(x, step, clip, None, floor, signed)[0]


def _uniform_fwd(x, unit, step, clip, floor, signed):
  del unit
  out, x_q = _values(x, step, clip, None, floor, signed)
  return out, (x, x_q, step, clip, floor)


def _uniform_bwd(signed, residuals, g):
  x, x_q, step, clip, floor = residuals
  x_q = _wide(x_q, x, step, clip, None, floor, signed)
  size, sign = _size_and_sign(x.astype(step.dtype), signed)
  above = size > clip
  d_x = jnp.where(_inside(x, above, signed), g, jnp.zeros_like(g))
  g = g.astype(step.dtype) * sign
  d_unit = g * _moved(x_q, _magnitude(size, clip, floor))
  d_clip = jnp.where(above, g, 0)
  return d_x, d_unit, None, d_clip, None


_uniform.defvjp(_uniform_fwd, _uniform_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _lsq(x, unit, step, clip, signed):
  """The quantizer whose step and clip both move with `unit`."""
  del unit
  return _values(x, step, clip, None, 0, signed)[0]


def _lsq_fwd(x, unit, step, clip, signed):
  del unit
  out, x_q = _values(x, step, clip, None, 0, signed)
  return out, (x, x_q, step, clip)


def _lsq_bwd(signed, residuals, g):
  x, x_q, step, clip = residuals
  x_q = _wide(x_q, x, step, clip, None, 0, signed)
  size, sign = _size_and_sign(x.astype(step.dtype), signed)
  inside = _inside(x, size > clip, signed)
  d_x = jnp.where(inside, g, jnp.zeros_like(g))
  d_unit = g.astype(step.dtype) * sign * _moved(x_q, jnp.where(inside, size, 0))
  return d_x, d_unit, None, None


_lsq.defvjp(_lsq_fwd, _lsq_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _warped(x, unit, step, clip, exponent, floor, signed):
  """The quantizer for any exponent; operands of one shape."""
  del unit
  return _values(x, step, clip, exponent, floor, signed)[0]


def _warped_fwd(x, unit, step, clip, exponent, floor, signed):
  del unit
  out, x_q = _values(x, step, clip, exponent, floor, signed)
  return out, (x, x_q, step, clip, exponent, floor)


def _warped_bwd(signed, residuals, g):
  x, x_q, step, clip, exponent, floor = residuals
  x_q = _wide(x_q, x, step, clip, exponent, floor, signed)
  size, sign = _size_and_sign(x.astype(step.dtype), signed)
  magnitude = _magnitude(size, clip, floor)
  u = _power(magnitude, exponent)
  above = size > clip
  span = clip - floor
  d_x = jnp.where(_inside(x, above, signed), g, jnp.zeros_like(g))
  g = g.astype(step.dtype) * sign
  d_unit = g * _moved(x_q, u)
  d_clip = jnp.where(above, g * exponent * _power(span, exponent - 1), 0)
  d_exponent = g * u * jnp.log(jnp.where(magnitude == 0, 1, magnitude))
  return d_x, d_unit, None, d_clip, d_exponent, None


_warped.defvjp(_warped_fwd, _warped_bwd)


def _level(x, step, clip, exponent, floor, signed):
  """Signed whole level of each x, still floating."""
  size, sign = _size_and_sign(x.astype(step.dtype), signed)
  u = _power(_magnitude(size, clip, floor), exponent)
  # Not u / step: XLA turns that into this product under jit on CPU but not
  # outside of it, and then the last bit, so the integer at a tie, would differ.
  return sign * jnp.round(u * (1 / step))


def _size_and_sign(x, signed):
  if signed:
    return jnp.abs(x), jnp.sign(x)
  return jnp.maximum(x, 0), jnp.ones_like(x)


def _magnitude(size, clip, floor):
  """Distance above `floor`, saturating at the clip; 0 below the floor."""
  return jnp.maximum(jnp.minimum(size, clip) - floor, 0)


def _inside(x, above, signed):
  """Where the straight-through derivative to x is 1."""
  return ~above if signed else ~above & (x >= 0)


def _power(base, exponent):
  """Raises base >= 0 to the exponent, 0 at 0 with finite derivatives.

  None is exponent 1.  NaN stays NaN.
  """
  if exponent is None:
    return base
  zero = base <= 0
  return jnp.where(zero, 0, jnp.power(jnp.where(zero, 1, base), exponent))


def _span(other, clip, exponent, floor):
  """The other argument, and (clip - floor) ** exponent, of one shape."""
  arrays = [other, clip, floor, *([] if _is_one(exponent) else [exponent])]
  dtype = _compute_dtype(*arrays)
  arrays = [jnp.asarray(a, dtype) for a in arrays]
  shapes = [a.shape for a in arrays]
  try:
    shape = jnp.broadcast_shapes(*shapes)
  except ValueError as error:
    raise ValueError(f'shapes do not broadcast: {shapes}') from error
  other, clip, floor, *rest = [jnp.broadcast_to(a, shape) for a in arrays]
  span = clip - jax.lax.stop_gradient(floor)
  return other, _power(span, rest[0] if rest else None)


def _operands(x, **params):
  """Broadcasts the parameters to x, in the compute dtype.

  An exponent that is statically one comes back as None.  The zeros give all
  operands the sharding of x and the mesh axes that any of them varies over,
  as explicit meshes and `shard_map(check_vma=True)` ask for.
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x must be floating, not {x.dtype}')
  dtype = _compute_dtype(x)
  if _is_one(params.get('exponent')):
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


def _is_one(exponent):
  """Whether the exponent is the Python number 1, so no power is needed."""
  return isinstance(exponent, (int, float)) and exponent == 1


def _compute_dtype(*arrays):
  wide = any(isinstance(a, jax.Array) and a.dtype == 'float64' for a in arrays)
  return jnp.float64 if wide else jnp.float32
