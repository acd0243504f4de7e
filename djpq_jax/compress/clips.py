"""Clips: the largest magnitudes that grids keep."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SAMPLES = 100_000  # values of a tensor that a clip is fitted to
# What a clip may be times the one that the search for it begins with, from 1/20
# where few values are far larger than all others to 1.5, in steps of 6.7 %.
SCALES = 0.2 * 7.5 ** (np.arange(-21, 32) / 31)


@functools.partial(jax.jit, static_argnames='out_axes')
def of_kernel(kernel, out_axes: tuple[int, ...] = ()):
  """The largest magnitude of a kernel, or of each of its output channels."""
  axes = tuple(a for a in range(kernel.ndim) if a not in out_axes)
  largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=bool(out_axes))
  return jnp.where(largest > 0, largest, 1.0)


def of_least_error(
  clip: np.ndarray,
  levels: float,
  below: float,
  tensors: Sequence[Any],
  *,
  mid_rise: bool = False,
) -> np.ndarray:
  """The multiple of a clip with the least squared error, for each grid.

  Args:
    clip: largest magnitudes, a scalar or one for each output channel.
    levels: steps from zero to the clip.
    below: steps from zero to the lowest level.
    tensors: what is quantized, of any shapes.
    mid_rise: whether levels lie half a step beside whole steps.

  Returns:
    Clips, of the shape of `clip`.
  """
  best, _ = _search(
    clip, levels, below, _columns(clip, tensors), mid_rise=mid_rise
  )
  return best.reshape(clip.shape)


def asymmetric(
  clip: np.ndarray, bits: int, tensors: Sequence[Any]
) -> tuple[np.ndarray, float]:
  """The grid of whole levels with the least squared error.

  Args:
    clip: largest magnitude, a scalar; see `of_least_error`.
    bits: of the grid.
    tensors: what is quantized, of any shapes.

  Returns:
    (clip, levels below zero over levels above it); at most half of all levels
    are below zero.
  """
  x = _columns(clip, tensors)
  others = 2**bits - 1  # levels but zero
  most = min(2 ** (bits - 1), others - 1)

  def fitted(count):
    best, least = _search(clip, others - count, count, x)
    return least.item(), count, best.reshape(clip.shape)

  # From where the range of the values puts zero, as far as it gets better.
  low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
  found = fitted(min(most, round(others * -low / (high - low or 1.0))))
  for way in (-1, 1):
    while 0 <= found[1] + way <= most:
      next_to_it = fitted(found[1] + way)
      if next_to_it[0] >= found[0]:
        break
      found = next_to_it
  _, count, best = found
  return best, count / (others - count)


def _columns(clip: np.ndarray, tensors: Sequence[Any]) -> np.ndarray:
  """Values, [values, grids] or [values, 1]."""
  if clip.ndim:  # one grid per output channel: one column each
    x = np.asarray(tensors[0], np.float32)
    axes = [axis for axis, size in enumerate(clip.shape) if size > 1]
    x = np.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(-1, clip.size)
  x = np.concatenate([np.ravel(np.asarray(t, np.float32)) for t in tensors])
  if x.size > SAMPLES:  # not every n-th: those may be of a few channels alone
    x = x[np.random.default_rng(0).integers(x.size, size=SAMPLES)]
  return x[:, None]


def _search(
  clip, levels: float, below: float, x: np.ndarray, *, mid_rise: bool = False
):
  """The best clips of some, and their squared errors, [grids]."""
  if mid_rise and levels == 0.5:  # of one bit, the mean magnitude
    edge = np.abs(x).mean(axis=0)
    edge = np.where(edge > 0, edge, clip.ravel())
    return edge, np.square(edge - np.abs(x)).sum(axis=0)
  best, least = clip.ravel(), np.full(clip.size, np.inf, np.float32)
  for scale in SCALES:
    edge = clip.ravel() * np.float32(scale)
    step = edge / np.float32(levels)
    lowest = -step * np.float32(below)
    inside = np.clip(x, lowest, edge) / step
    if mid_rise:
      level = np.copysign(np.floor(np.abs(inside)) + 0.5, inside)
    else:
      level = np.round(inside)
    error = np.square(step * level - x).sum(axis=0)
    best = np.where(error < least, edge, best)
    least = np.minimum(error, least)
  return best, least
