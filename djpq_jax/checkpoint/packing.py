"""Signed integers packed at their bit width."""

import numpy as np


def pack(values: np.ndarray, bits: int) -> np.ndarray:
  """Packs signed integers at `bits` bits each, lowest bit first.

  Args:
    values: integers in [-2**(bits-1), 2**(bits-1)), any shape.
    bits: 2 to 16.

  Returns:
    uint8 [ceil(values.size * bits / 8)].

  >>> pack(np.array([1, -1, 0, 1]), 2).tolist()
  [231]
  """
  shifted = np.ravel(values).astype(np.int64) + 2 ** (bits - 1)
  if shifted.size and not 0 <= shifted.min() <= shifted.max() < 2**bits:
    raise ValueError(f'values do not fit {bits} signed bits')
  digits = (shifted[:, None] >> np.arange(bits)) & 1
  return np.packbits(digits.astype(np.uint8).ravel(), bitorder='little')


def unpack(packed: np.ndarray, bits: int, shape) -> np.ndarray:
  """Undoes `pack`: int8 (int16 above 8 bits) of `shape`."""
  size = int(np.prod(shape))
  if packed.size != -(-size * bits // 8):
    raise ValueError(f'{packed.size} bytes do not hold {size} x {bits} bits')
  flat = np.unpackbits(packed, count=size * bits, bitorder='little')
  digits = flat.reshape(size, bits).astype(np.int64)
  values = (digits << np.arange(bits)).sum(axis=1) - 2 ** (bits - 1)
  return values.astype(np.int8 if bits <= 8 else np.int16).reshape(shape)
