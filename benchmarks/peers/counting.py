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
      Convolutions have padding that keeps the size, and stride 1 unless there
      is a 'stride0' and so on.

  >>> made = {'weight_bits0': np.full((2, 3), 4), 'act_bits0': np.full(2, 8)}
  >>> bops(made)
  (192.0, 6144.0)
  """
  total = dense = 0.0
  for k in itertools.count():
    if f'weight_bits{k}' not in made:
      break
    weights, inputs = made[f'weight_bits{k}'], made[f'act_bits{k}']
    stride = int(made.get(f'stride{k}', 1))
    total += _products(inputs, weights, stride)
    ones = np.ones(inputs.shape), np.ones(weights.shape)
    dense += 32 * 32 * _products(*ones, stride)
  return total, dense


def whole_tensors(kernels, inputs, weight_bits, act_bits, full=None) -> dict:
  """What `bops` takes, of a network with one width for each tensor.

  Args:
    kernels: the shape of each layer's kernel, [kh, kw, in, out] or [in, out].
    inputs: the shape of each layer's input, [height, width, in] or [in].
    weight_bits: of each layer.
    act_bits: of each layer's input.
    full: (kernels, inputs) before channels were removed; what is missing of
      them gets no bits.

  >>> made = whole_tensors([(1, 2)], [(1,)], [4], [8], full=([(3, 2)], [(3,)]))
  >>> made['act_bits0']
  array([8., 0., 0.])
  >>> bops(made)
  (64.0, 6144.0)
  """
  made = {}
  for name, shapes, bits, whole in (
    ('weight_bits', kernels, weight_bits, full[0] if full else kernels),
    ('act_bits', inputs, act_bits, full[1] if full else inputs),
  ):
    for k, shape in enumerate(shapes):
      made[f'{name}{k}'] = np.zeros(whole[k])
      made[f'{name}{k}'][tuple(slice(size) for size in shape)] = bits[k]
  return made


def _products(inputs, weights, stride) -> float:
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
    seen = padded[dy : dy + height : stride, dx : dx + width : stride]
    total += seen.sum(axis=(0, 1)) @ weights[dy, dx]
  return float(total)
