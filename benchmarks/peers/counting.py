"""Bit operations of what a peer exports, counted in NumPy alone.

A multiplication costs the bits of its weight times the bits of its input, as
in `djpq_jax.cost`; here each weight and each input may have bits of its own,
and one of no bits costs nothing.  The scripts of this folder use it, too, and
they run where djpq_jax is not installed.
"""

import itertools

import numpy as np


def bops(made) -> tuple[float, float]:
  """Bit operations of all layers, and those at 32 x 32 bits.

  Args:
    made: 'weight_bits0' [kh, kw, in, out] or [in, out], 'act_bits0'
      [height, width, in] or [in], then those of the next layer, and so on.
      Convolutions have stride 1 and padding that keeps the size.

  >>> made = {'weight_bits0': np.full((2, 3), 4), 'act_bits0': np.full(2, 8)}
  >>> bops(made)
  (192.0, 6144.0)
  """
  total = dense = 0.0
  for k in itertools.count():
    if f'weight_bits{k}' not in made:
      break
    weights, inputs = made[f'weight_bits{k}'], made[f'act_bits{k}']
    total += _products(inputs, weights)
    dense += _products(np.full(inputs.shape, 32), np.full(weights.shape, 32))
  return total, dense


def _products(inputs, weights) -> float:
  """Sum over all multiplications of a layer; padding counts as its edge."""
  inputs = np.asarray(inputs, np.float64)
  weights = np.asarray(weights, np.float64).sum(axis=-1)
  if weights.ndim == 1:
    return float(inputs.reshape(-1) @ weights)
  height, width, _ = inputs.shape
  reach = weights.shape[0] // 2
  padded = np.pad(inputs, [(reach, reach), (reach, reach), (0, 0)], 'edge')
  total = 0.0
  for dy, dx in np.ndindex(weights.shape[:2]):
    seen = padded[dy : dy + height, dx : dx + width]
    total += seen.sum(axis=(0, 1)) @ weights[dy, dx]
  return float(total)
