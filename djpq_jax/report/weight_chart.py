"""How the weights of a layer lie on their grid, for the page."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from djpq_jax.report import chart

# Above 9 bits several levels share a bar.
MOST_BARS = 511


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """The integers of one layer's kernel, counted by level.

  Args:
    bits: of the grid, at least 2, or 1 if `odd`; its levels go from
      -2**(bits-1) to 2**(bits-1)-1, the lowest of which not all grids have.
    counts: how many weights each level has, lowest level first, [2**bits].
    steps: what one level is worth, > 0: one number for the layer, or one for
      each output channel.
    odd: whether the grid has the odd levels alone, as a mid-rise one; they go
      from -2**bits to 2**bits-1 then, and there are twice as many counts.

  Raises:
    ValueError: there are not as many counts as levels, or no step.
  """

  bits: int
  counts: Sequence[int]
  steps: Sequence[float]
  odd: bool = False

  def __post_init__(self):
    levels = 2 ** (self.bits + self.odd)
    if len(self.counts) != levels:
      raise ValueError(
        f'{self.bits} bits have {levels} levels, but there are '
        f'{len(self.counts)} counts'
      )
    if not self.steps:
      raise ValueError('weights on a grid need its step')

  @property
  def top(self) -> int:
    """The highest level."""
    return len(self.counts) // 2 - 1

  @property
  def zeros(self) -> int:
    """How many weights are zero."""
    return self.counts[self.top + 1]

  @property
  def total(self) -> int:
    """How many weights there are."""
    return sum(self.counts)


def count(
  integers: Any, bits: int, steps: Any, *, odd: bool = False
) -> Weights:
  """Counts a kernel's integers.

  Args:
    integers: a kernel's levels, any shape.
    bits: of its grid, at least 2, or 1 if `odd`.
    steps: what one level is worth, a scalar or one for each output channel.
    odd: whether the levels are the odd ones alone.

  Returns:
    The counts of all levels, those without a weight too.

  >>> count([[1, -1], [0, 1]], 2, 0.5).counts
  (0, 1, 1, 2)
  """
  levels = np.asarray(integers, np.int64).ravel()
  half = 2 ** (bits - 1 + odd)
  if levels.size and not -half <= levels.min() <= levels.max() < half:
    raise ValueError(
      f'{bits} bits go from {-half} to {half - 1}, a weight is beyond'
    )
  counts = np.bincount(levels + half, minlength=2 * half)
  return Weights(
    bits=bits,
    counts=tuple(counts.tolist()),
    steps=tuple(np.asarray(steps, np.float64).ravel().tolist()),
    odd=odd,
  )


def facts(weights: Weights) -> list[tuple[str, str]]:
  """What there is to know of a layer's weights, as names and values."""
  total = weights.total or 1
  used = sum(1 for n in weights.counts if n)
  zeros = weights.zeros
  return [
    ('bits', f'{weights.bits}'),
    ('levels', f'{used:,} of {2**weights.bits:,} in use'),
    ('step', _step(weights.steps)),
    ('weights', f'{weights.total:,}'),
    ('zeros', f'{zeros:,} ({100 * zeros / total:.1f} %)'),
  ]


def draw(weights: Weights, name: str, key: str) -> chart.Chart:
  """A bar for each level of the grid.

  Args:
    weights: of a layer.
    name: of the layer.
    key: of the chart, unique on the page.

  Returns:
    The chart.
  """
  top, total = weights.top, weights.total or 1
  bars = _bars(weights)
  across = chart.horizontal(-top - 1.6, top + 0.6)
  largest = max(100 * n / total for _, _, n in bars)
  up = chart.vertical(0, 1.06 * largest or 1)
  parts: dict[str, list[str]] = {'blue': [], 'orange': []}
  tips = []
  for low, high, n in bars:
    left, right, height = (
      across(low - 0.5),
      across(high + 0.5),
      up(100 * n / total),
    )
    gap = 0.12 * (right - left) if right - left > 4 else 0
    left, right = round(left + gap, 1), round(right - gap, 1)
    colour = 'orange' if low <= 0 <= high else 'blue'
    if n:
      parts[colour].append(
        f'M{left:g} {chart.BOTTOM}V{height:g}H{right:g}V{chart.BOTTOM}Z'
      )
    tips.append(
      chart.Tip(
        x=round((left + right) / 2, 1),
        y=None,
        text=f'{_levels(low, high, weights.steps)}\n{n:,} weights, '
        f'{100 * n / total:.2f} %',
      )
    )
  ticks = _ticks(top, odd=weights.odd)
  one = len(weights.steps) == 1
  values = [chart.plain(float(f'{t * weights.steps[0]:.3g}')) for t in ticks]
  crowded = 7.5 * max(map(len, values)) > across(ticks[1]) - across(ticks[0])
  noted = {ticks[0], 0, ticks[-1]} if crowded else set(ticks)
  return chart.Chart(
    key=key,
    title='Share of the weights on each level, %',
    description=f'{name}: '
    + ', '.join(f'{k} {v}' for k, v in facts(weights))
    + '.',
    x_label='level'
    + (' and value' if one else ', in steps of each output channel'),
    x_ticks=[(across(t), chart.plain(t)) for t in ticks],
    x_notes=[
      (across(t), value) for t, value in zip(ticks, values) if t in noted
    ]
    if one
    else (),
    y_ticks=up.ticks(),
    bars=[
      chart.Line(path=''.join(parts['blue']), colour='blue', label='not zero'),
      chart.Line(path=''.join(parts['orange']), colour='orange', label='zero'),
    ],
    tips=tips,
  )


def _bars(weights: Weights) -> list[tuple[int, int, int]]:
  """Lowest and highest level of each bar, and its count; zero is alone."""
  width = -(-len(weights.counts) // MOST_BARS)
  top = weights.top

  def half(last: int) -> list[tuple[int, int]]:
    starts = range(1, last + 1, width)
    return [(low, min(low + width - 1, last)) for low in starts]

  below = [(-b, -a) for a, b in reversed(half(top + 1))]
  both = [*below, (0, 0), *half(top)]
  first = top + 1  # the place of level zero
  return [
    (a, b, sum(weights.counts[a + first : b + first + 1])) for a, b in both
  ]


def _levels(low: int, high: int, steps: Sequence[float]) -> str:
  names = chart.plain(low)
  if high > low:
    names += f' to {chart.plain(high)}'
  elif len(steps) == 1:
    names += f' = {low * steps[0]:.4g}'.replace('-', '−')
  return f'level {names}'


def _ticks(top: int, *, odd: bool) -> list[int]:
  """Round levels, symmetric about zero but for few of them."""
  if top <= 3:
    return list(range(-top if odd else -top - 1, top + 1, 1 + odd))
  step = round(chart.linear_ticks(0, top, 3 if top < 100 else 2)[1])
  half = list(range(step, top + 1, step))
  return [-t for t in reversed(half)] + [0] + half


def _step(steps: Sequence[float]) -> str:
  if len(steps) == 1:
    return f'{steps[0]:.4g}'
  return f'{min(steps):.4g} to {max(steps):.4g}, one per output channel'
