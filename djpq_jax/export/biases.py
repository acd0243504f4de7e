"""A bias in whole steps of the sums of a layer, the only one that it may have.

A layer's sums are whole numbers; the next grid has levels, each of which
begins at some sum.  A bias is exact if every level still begins at the same
sum once the bias has been rounded to whole steps.
"""

import dataclasses
import itertools

import numpy as np

MARGIN = 1e-4  # of a step of the sums
# How far a runtime's float32 may be off where it scales a sum.
ROUNDING = 4 * 2.0**-24

# By how many halves of a sum the outermost level is moved; the finer and wider
# ones for channels that the others leave with a level elsewhere.
_STRETCHES = [
  sorted(np.linspace(-end, end, count), key=abs)
  for end, count in ((1, 21), (2, 401))
]


@dataclasses.dataclass(frozen=True)
class Bias:
  """A bias in whole steps of the sums, each [channels] of an output.

  Attributes:
    finer: how many times finer the steps of the sums get.
    wider: a factor near 1 by which they are wider than that.
    whole: the bias in these steps.
    elsewhere: levels of the next grid that then begin at another sum, of all
      channels.
  """

  finer: np.ndarray
  wider: np.ndarray
  whole: np.ndarray
  elsewhere: int


def whole_steps(bias, base, ends, most) -> Bias:
  """Picks finer steps for the sums, and the bias as a whole number of these.

  Steps and bias may move by what takes no sum to another level.  Of all that
  are tried those are picked at which the fewest levels begin elsewhere; of
  these the finest.

  Args:
    bias: in steps of the sums as they are, [channels].
    base: where each level of the next grid begins in sums that have the bias
      in them, [channels, L]; nan where that does not matter.
    ends: the first sum, whole and without the bias, that is to reach it.
    most: how many times finer the sums can get, [channels].
  """
  finer, wider = most.copy(), np.ones_like(bias)
  whole = np.round(most * bias)
  if not base.shape[1]:
    return Bias(finer, wider, whole, 0)
  # So much wider moves the outermost level by half a sum.
  reach = np.nanmax(np.abs(base), axis=1, initial=1.0)
  # Not just inside: float32 has to see it too.
  margin = MARGIN + ROUNDING * np.abs(base)
  fewest = np.full(len(bias), np.inf)
  for stretches in _STRETCHES:
    for factor, stretch in itertools.product(
      range(most.max(), 0, -1), stretches
    ):
      todo = np.flatnonzero((fewest > 0) & (factor <= most))
      if not todo.size:
        continue
      width = 1 + stretch / 2 / reach[todo]
      # The bias that puts a level's begin at the sum at which it is.
      room = base[todo] / width[:, None] - ends[todo]
      low = np.nanmax(room, axis=1, initial=-np.inf)
      high = np.nanmin(room, axis=1, initial=np.inf) + 1
      met = np.isfinite(low)  # else no sum comes near a level's begin
      middle = bias[todo]
      middle[met] = (low[met] + high[met]) / 2
      tried = np.round(factor * middle)
      moved = room - (tried / factor)[:, None]
      near = margin[todo]
      elsewhere = ((moved <= -1 + near) | (moved > -near)).sum(axis=1)
      better = elsewhere < fewest[todo]
      at = todo[better]
      finer[at], wider[at], whole[at] = factor, width[better], tried[better]
      fewest[at] = elsewhere[better]
  return Bias(finer, wider, whole, int(fewest.sum()))


def level_begins(bias, unit, reach, step, lowest, highest):
  """Sums at which the levels of the next grid begin.

  A sum n, whole, becomes round((n unit + bias) / step).  Level k begins at
  n = ceil(T), T = ((k - 1/2) step - bias) / unit, whatever happens to T
  between two whole numbers.

  Args:
    bias: [channels].
    unit: of the sums, [channels].
    reach: the largest magnitude of a sum, [channels].
    step: of the next grid.
    lowest: its first level.
    highest: its last one.

  Returns:
    T, [channels, highest - lowest]; nan where no sum comes near.
  """
  levels = np.arange(lowest + 1, highest + 1)
  at = ((levels - 0.5) * step - bias[:, None]) / unit[:, None]
  return np.where(np.abs(at) <= reach[:, None] + 1, at, np.nan)


def first_sums(level, levels, reach) -> np.ndarray:
  """The smallest sum at which each level is reached.

  Args:
    level: from sums [channels, ...] to levels, increasing.
    levels: [L].
    reach: the largest magnitude of a sum, [channels].

  Returns:
    float64 [channels, L]; nan where a level begins at no sum that there is.
  """
  ends = np.broadcast_to(np.rint(reach)[:, None], (len(reach), len(levels)))
  low, high = -ends - 1, ends + 1
  while np.any(high - low > 1):
    middle = np.floor((low + high) / 2)
    above = level(middle) >= levels
    low, high = np.where(above, low, middle), np.where(above, middle, high)
  return np.where((high > ends) | (high <= -ends), np.nan, high)
