"""Clips: the largest magnitudes that grids keep."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

SAMPLES = 100_000  # values of a tensor that a clip is fitted to


def of_kernel(kernel, out_axis: int | None = None):
  """The largest magnitude of a kernel, or of each of its output channels."""
  axes = tuple(a for a in range(kernel.ndim) if a != out_axis)
  if out_axis is None:
    axes = tuple(range(kernel.ndim))
  largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=out_axis is not None)
  return jnp.where(largest > 0, largest, 1.0)


def of_least_error(
  clip: np.ndarray,
  levels: float,
  tensors: Sequence[Any],
  *,
  symmetric: bool = True,
) -> np.ndarray:
  """The multiple of a clip with the least squared error, for each grid.

  Args:
    clip: largest magnitudes, a scalar or one for each output channel.
    levels: whole steps from zero to the clip.
    tensors: what is quantized, of any shapes.
    symmetric: if not, there is one step more below zero.

  Returns:
    Clips, of the shape of `clip`.
  """
  if clip.ndim:  # one grid per output channel: one column each
    axis = clip.shape.index(clip.size)
    x = np.moveaxis(np.asarray(tensors[0], np.float32), axis, -1)
    x = x.reshape(-1, clip.size)
  else:
    x = np.concatenate([np.ravel(np.asarray(t, np.float32)) for t in tensors])
    x = x[:: max(1, x.size // SAMPLES), None]
  best, least = clip.ravel(), np.full(clip.size, np.inf, np.float32)
  for scale in np.geomspace(0.2, 1.5, 32):
    edge = clip.ravel() * np.float32(scale)
    step = edge / np.float32(levels)
    below = edge if symmetric else edge + step
    rounded = step * np.round(np.clip(x, -below, edge) / step)
    error = np.square(rounded - x).sum(axis=0)
    best = np.where(error < least, edge, best)
    least = np.minimum(error, least)
  return best.reshape(clip.shape)
