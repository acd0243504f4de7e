"""How a layer's sums are computed, and the proof that they are exact.

A sum of products is at most

    largest = max over outputs of  sum |w| * top

with the kernel's own integers w and the largest magnitude `top` of a level of
the input.  int32 holds it below 2**31, float32 below 2**24.  What is larger is
cut: into parts of the input channels whose sums are small enough, and operands
that their carrier does not hold into digits of base 128.
"""

import dataclasses
import math

import numpy as np

FLOAT_LIMIT = 2**24  # from here on float32 skips integers
INT_LIMIT = 2**31
DIGIT_BITS = 7
BYTE = 2**8  # wider integers are not exact in bfloat16
MOST_TAPS = 49  # a depthwise kernel of 7x7
LARGE_WINDOW = 9
FEW = 4  # input channels, as of an image


class NotExact(ValueError):
  """A layer has no exact integer execution; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
  """What is static about a layer's product.

  Attributes:
    contracted: leading axes of the kernel that are summed over.
    groups: feature groups of a convolution.
    window: spatial size of a convolution's kernel, () for a dot.
    dilated: whether a convolution's input or kernel is.
    lhs_dilated: whether its input is.
  """

  contracted: int
  groups: int = 1
  window: tuple[int, ...] = ()
  dilated: bool = False
  lhs_dilated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """How one layer's product is computed; static and hashable.

  Attributes:
    name: path of the layer.
    execution: 'simulated', 'float' or 'int8'.
    method: 'xla' is one convolution or dot of XLA's; 'taps' a sum of shifted
      inputs, for depthwise kernels; 'columns' a dot with the window's pixels
      side by side; 'point' a dot for 1x1 kernels.
    largest: no accumulator is larger in magnitude.
    carrier: dtype of the operands.
    act_digits: digits that the input is cut into.
    weight_digits: digits that the kernel is cut into.
    shift: is taken off the input so that it fits int8; 0 or 128.
    parts: (start, stop) of the input channels that are summed together.
    wide: whether an operand passes the 8 bits that bfloat16 and TF32 hold.
  """

  name: str
  execution: str
  method: str
  largest: int
  carrier: str
  act_digits: int
  weight_digits: int
  shift: int
  parts: tuple[tuple[int, int], ...]
  wide: bool


def plan(
  name: str,
  execution: str,
  kernel: np.ndarray,
  site: Site,
  top: int,
  *,
  signed: bool,
) -> Plan:
  """Finds an exact way to compute a layer.

  Args:
    name: path of the layer.
    execution: 'simulated', 'float' or 'int8'.
    kernel: its integers, [contracted..., out...].
    site: what is static about the product.
    top: the largest magnitude of a level of its input.
    signed: whether its input has levels below zero.

  Returns:
    The plan.

  Raises:
    NotExact: a sum may pass 2**31, or float32 cannot be cut small enough.
  """
  weights = np.abs(kernel.astype(np.int64))
  widest = int(weights.max(initial=0))
  largest = int(_per_channel(weights, site).sum(0).max(initial=0)) * top
  if largest >= INT_LIMIT:
    raise NotExact(f'its sums may reach {largest:.3g}, and int32 ends at 2**31')
  method = _method(execution, kernel, site)
  large = math.prod(site.window) > LARGE_WINDOW
  whole = ((0, kernel.shape[site.contracted - 1]),)
  if execution == 'int8' and method == 'taps':
    # Elementwise sums: int16 is half the memory where it holds them.
    carrier = 'int16' if max(largest, top, widest) < 2**15 else 'int32'
    digits, shift, parts = (1, 1), 0, whole
  elif method == 'columns' and large and largest < FLOAT_LIMIT:
    # A stem of 7x7: side by side its pixels are a copy 49 times as large.
    method, carrier, digits, shift, parts = 'xla', 'float32', (1, 1), 0, whole
  elif execution == 'int8':
    carrier, parts = 'int8', whole
    shift = 128 if not signed and 2**7 <= top < BYTE else 0
    if shift and site.lhs_dilated:  # zeros between pixels would not be shifted
      shift = 0
    digits = (1 if shift else _digits(top), _digits(widest))
  else:
    carrier, shift = 'float32', 0
    digits, parts = _float_cut(weights, site, top)
  return Plan(
    name=name,
    execution=execution,
    method=method,
    largest=largest,
    carrier=carrier,
    act_digits=digits[0],
    weight_digits=digits[1],
    shift=shift,
    parts=parts,
    wide=(digits[0] == 1 and top > BYTE) or (digits[1] == 1 and widest > BYTE),
  )


def _per_channel(weights: np.ndarray, site: Site) -> np.ndarray:
  """Sums of a kernel's magnitudes, [input channels, outputs]."""
  shape = weights.shape
  channels = shape[site.contracted - 1]
  outputs = math.prod(shape[site.contracted :])
  return weights.reshape(-1, channels, outputs).sum(0)


def _digits(top: int) -> int:
  """Digits of base 128 that magnitudes up to `top` have, at least 1."""
  return max(1, -(-int(top).bit_length() // DIGIT_BITS))


def cut(n, count: int, xp):
  """The digits of signed integers, lowest first; xp is numpy or jax.numpy."""
  if count == 1:
    return [n]
  size, mask = xp.abs(n), 2**DIGIT_BITS - 1
  return [
    xp.sign(n) * ((size >> (DIGIT_BITS * i)) & mask) for i in range(count)
  ]


def _float_cut(weights, site: Site, top: int):
  """Digits and parts with which float32 holds every sum."""
  parts = _parts(_per_channel(weights, site), top, site)
  if parts is not None:
    return (1, 1), parts
  digits = _digits(top), _digits(int(weights.max()))
  most = np.max([_per_channel(d, site) for d in cut(weights, digits[1], np)], 0)
  parts = _parts(most, min(top, 2**DIGIT_BITS - 1), site)
  if parts is None:
    raise NotExact('one channel of its kernel is too large for float32')
  return digits, parts


def _parts(per_channel: np.ndarray, top: int, site: Site):
  """Cuts the input channels such that no part reaches the limit, or None."""
  if site.groups > 1 and per_channel.sum(0).max() * top >= FLOAT_LIMIT:
    return None  # the channels of a part would belong to several groups
  parts, start = [], 0
  running = np.zeros(per_channel.shape[1], np.int64)
  for c, row in enumerate(per_channel * top):
    if row.max(initial=0) >= FLOAT_LIMIT:
      return None
    if (running + row).max(initial=0) >= FLOAT_LIMIT:
      parts.append((start, c))
      start, running = c, np.zeros_like(running)
    running = running + row
  return (*parts, (start, len(per_channel)))


def _method(execution: str, kernel: np.ndarray, site: Site) -> str:
  if execution == 'simulated' or len(site.window) != 2 or site.lhs_dilated:
    return 'xla'
  inputs, outputs = kernel.shape[-2:]
  taps = math.prod(site.window)
  if inputs == 1 and site.groups == outputs and taps <= MOST_TAPS:
    return 'taps'
  if execution == 'float' or site.groups > 1 or site.dilated:
    return 'xla'
  if taps == 1:
    return 'point'
  # So few channels leave a library's integer convolution idle.
  return 'columns' if inputs <= FEW and inputs * taps <= BYTE else 'xla'
