"""Signed integers as bytes that compress to less than their bit width.

Up to 8 bits a byte holds as many integers as fit whole, so that equal integers
make equal bytes.  The entropy code that the arrays are written with then takes
no more than the bits that are used, and fewer where levels differ in how often
they occur; across the borders of bytes it would see noise.
"""

import numpy as np

BYTE = 8


def pack(values: np.ndarray, bits: int) -> np.ndarray:
  """Packs signed integers, the first in the lowest bits.

  Args:
    values: integers in [-2**(bits-1), 2**(bits-1)), any shape.
    bits: 1 to 16; above 8 they follow each other bit by bit.

  Returns:
    uint8 [packed_bytes(values.size, bits)].

  >>> pack(np.array([1, -1, 0, 1]), 2).tolist()
  [231]
  >>> [f'{byte:08b}' for byte in pack(np.array([1, -1, 0]), 3)]
  ['00011101', '00000100']
  """
  shifted = np.ravel(values).astype(np.int64) + 2 ** (bits - 1)
  if shifted.size and not 0 <= shifted.min() <= shifted.max() < 2**bits:
    raise ValueError(f'values do not fit {bits} signed bits')
  if bits > BYTE:
    digits = (shifted[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8).ravel(), bitorder='little')
  count = BYTE // bits
  filled = np.pad(shifted, (0, -shifted.size % count)).reshape(-1, count)
  return (filled << bits * np.arange(count)).sum(axis=1).astype(np.uint8)


def packed_bytes(size: int, bits: int) -> int:
  """How many bytes `pack` makes of so many integers."""
  return -(-size * bits // BYTE) if bits > BYTE else -(-size // (BYTE // bits))


def unpack(packed: np.ndarray, bits: int, shape) -> np.ndarray:
  """Undoes `pack`: int8 (int16 above 8 bits) of `shape`."""
  size = int(np.prod(shape))
  if packed.size != packed_bytes(size, bits):
    raise ValueError(f'{packed.size} bytes do not hold {size} x {bits} bits')
  if bits > BYTE:
    flat = np.unpackbits(packed, count=size * bits, bitorder='little')
    digits = flat.reshape(size, bits).astype(np.int64)
    shifted = (digits << np.arange(bits)).sum(axis=1)
  else:
    places = bits * np.arange(BYTE // bits)
    shifted = (packed[:, None].astype(np.int64) >> places) & (2**bits - 1)
    shifted = shifted.ravel()[:size]
  dtype = np.int8 if bits <= BYTE else np.int16
  return (shifted - 2 ** (bits - 1)).astype(dtype).reshape(shape)
