"""A coefficient for each budget, for peers that have no budget themselves.

Their users train with several coefficients of bit operations in the loss.  So
does this: the coefficient is searched in its logarithm until BOPs are within a
budget and near it.  A budget then gets the training that met it with the lowest
loss on training images.  All trainings of a seed are shared by its budgets,
and their number is reported.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

NEAR = 0.85  # of a budget is near enough
LIMIT = 4  # trainings for one budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """Finds coefficients from what trainings with others came to."""

  first: float  # the coefficient of the first training
  slope: float  # BOPs fall about as the coefficient to this power

  def propose(self, runs: Sequence[dict], budget: float) -> float:
    """The next coefficient: between two that enclose a budget, or beyond.

    >>> search = Search(first=1.0, slope=0.5)
    >>> search.propose([], 100.0)
    1.0
    >>> search.propose([{'coefficient': 1.0, 'bops': 1000.0}], 100.0)
    4.0
    """
    wanted = math.sqrt(NEAR) * budget
    if not runs:
      return self.first
    above = [r for r in runs if r['bops'] > budget]
    below = [r for r in runs if r['bops'] <= budget]
    if above and below:
      high = min(above, key=lambda r: r['bops'])
      low = max(below, key=lambda r: r['bops'])
      share = math.log(high['bops'] / wanted) / math.log(
        high['bops'] / max(low['bops'], 1.0)
      )
      ratio = low['coefficient'] / high['coefficient']
      return high['coefficient'] * ratio**share
    nearest = min(runs, key=lambda r: abs(math.log(max(r['bops'], 1) / budget)))
    factor = (max(nearest['bops'], 1) / wanted) ** (1 / self.slope)
    return nearest['coefficient'] * min(4.0, max(0.25, factor))

  def __call__(
    self, trainer: Callable[[float], dict], budgets: Sequence[float]
  ) -> list[dict]:
    """Trainings until each budget has one near it; the best of each budget.

    Args:
      trainer: coefficient -> what a training with it gives, with its 'bops'
        and its 'loss' on training images.
      budgets: bit operations.
    """
    runs: list[dict] = []
    for budget in sorted(budgets, reverse=True):
      for _ in range(LIMIT):
        if any(NEAR * budget <= r['bops'] <= budget for r in runs):
          break
        coefficient = self.propose(runs, budget)
        runs.append(trainer(coefficient) | {'coefficient': coefficient})
        found = runs[-1]
        print(
          f'coefficient {coefficient:.3g}: BOPs {found["bops"]:.4g}, wanted '
          f'{budget:.4g}, loss {found["loss"]:.4f}',
          flush=True,
        )
    return [best(runs, budget) | {'trainings': len(runs)} for budget in budgets]


def best(runs: Sequence[dict], budget: float) -> dict:
  """The lowest loss of what meets a budget, else what comes nearest to it."""
  within = [run for run in runs if run['bops'] <= budget]
  if within:
    return min(within, key=lambda run: run['loss'])
  return min(runs, key=lambda run: run['bops'])
