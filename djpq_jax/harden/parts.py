"""What a hardened model is made of."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress


class Constant(nnx.Variable):
  """A number that training settled: a step or a scale."""


class Dequantizer(nnx.Module):
  """Turns an integer kernel back into multiples of its step.

  Args:
    step: what one is worth, a scalar or one for each output channel.
    odd: whether all integers are odd, those of a mid-rise grid: its levels are
      two of these steps apart.
  """

  def __init__(self, step, *, odd: bool = False):
    self.step = Constant(step)
    self.odd = odd

  def __call__(self, kernel):
    """Int [..., out] -> float32 of the same shape."""
    return kernel.astype(jnp.float32) * self.step[...]


class FixedQuantizer(nnx.Module):
  """Rounds a layer's input to whole steps, as many as it may have.

  Args:
    step: spacing of the levels, > 0, in units of the input.
    lowest: fewest steps, 0 or less.
    highest: most steps, 0 or more.
  """

  def __init__(self, step, lowest: int, highest: int):
    self.step = Constant(step)
    self.lowest = lowest
    self.highest = highest

  def __call__(self, x):
    """Float array -> multiples of the step, same shape and dtype.

    The derivative is straight-through: 1 between the outermost levels, else 0.
    """
    x = jnp.asarray(x)
    exact, inside = self._steps(x)
    steps = jax.lax.stop_gradient(jnp.round(inside))
    steps += inside - jax.lax.stop_gradient(inside)  # 0, with the derivative
    return (exact * steps).astype(x.dtype)

  def integers(self, x):
    """The steps n, int32 of x's shape, for which `self(x)` is step * n."""
    _, inside = self._steps(jnp.asarray(x))
    return jax.lax.stop_gradient(jnp.round(inside)).astype(jnp.int32)

  def _steps(self, x):
    """The step in the dtype to compute in, and x over it, between the ends."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f'inputs must be floating, not {x.dtype}')
    dtype = jnp.float64 if x.dtype == 'float64' else jnp.float32
    step = self.step[...].astype(dtype)
    # As `ops.quantize` does it: a quotient rounds otherwise now and then.
    inside = jnp.clip(x.astype(dtype) * (1 / step), self.lowest, self.highest)
    return step, inside

  @property
  def signed(self) -> bool:
    """Whether it has levels below zero."""
    return self.lowest < 0

  def bits(self) -> int:
    """Bits that its levels take."""
    return bits_between(self.lowest, self.highest)


class Scales(nnx.Module):
  """What is left of a group's gates: one factor per kept channel, [size]."""

  def __init__(self, scale):
    self.scale = Constant(scale)

  def mean(self):
    """The factors, [1, size]."""
    return self.scale[...][None]


class HardenedModel(compress.Compressed):
  """A smaller model of integers; called like the model it came from."""

  hardened = True


def bits_between(lowest: int, highest: int) -> int:
  """Whole bits of as many levels as there are from one to the other.

  >>> [bits_between(0, n) for n in (0, 7, 8)], bits_between(-7, 7)
  ([1, 3, 4], 4)
  >>> bits_between(-1, 2), bits_between(-2, 1)
  (2, 2)
  """
  return max(1, (highest - lowest).bit_length())


def kernel_bits(integers, *, odd: bool = False) -> int:
  """Whole bits of two's complement that a kernel's integers take.

  Args:
    integers: of any shape.
    odd: whether all are; bits are then those of what they are twice of, and 1.

  Returns:
    Bits, at least 2; at least 1 of odd ones, as -1 and 1 take.

  >>> kernel_bits([-2, 1]), kernel_bits([-1, 2])
  (2, 3)
  >>> kernel_bits([-3, 3], odd=True), kernel_bits([-1, 1], odd=True)
  (2, 1)
  """
  integers = np.asarray(integers, np.int64)
  if odd:
    integers = integers >> 1
  largest = int(max(integers.max(), -1 - integers.min()))
  return max(2 - odd, bits_between(-1 - largest, largest))
