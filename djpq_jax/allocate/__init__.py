"""Turns a searched model into a plan in whole channels and bits, on budget.

The search ends near the budget with real-valued bits and noisy gates.  One
number, the slack, then moves all of them together: it is added to every
tensor's bits and lowers every gate's threshold.  The largest slack that stays
within the budget is found by bisection, and what it leaves unused is filled
with the next best single changes that still fit.

Several costs can have a budget each.  A plan's load is then the largest of its
costs over their budgets: 1 where the tightest budget is just met.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import math
from typing import Any, TypeAlias

import numpy as np

from djpq_jax import compress
from djpq_jax import cost
from djpq_jax.allocate import filling
from djpq_jax.allocate import rounding
from djpq_jax.allocate.rounding import Search
from djpq_jax.allocate.rounding import counted_bits
from djpq_jax.allocate.rounding import read

__all__ = [
  'Budget',
  'Search',
  'check_reachable',
  'counted_bits',
  'even_bits',
  'plan',
  'reachable',
  'read',
  'relative_bops',
  'uniform',
]

Budget: TypeAlias = float | Mapping[str, float]  # a float is one of BOPs


def uniform(
  model: compress.Compressed, weight_bits: int, act_bits: int
) -> compress.Plan:
  """The plan that prunes nothing and gives every layer the same bits.

  Bounds of single layers still hold, as the 8 bits of the first layer's input.

  Raises:
    ValueError: bits that are within the bounds of no layer at all.
  """
  compress.check(model, 'a plan')
  plan: dict[str, dict[str, int]] = {}
  for kind, bits in (('weight', weight_bits), ('act', act_bits)):
    bounds = {
      path: getattr(operands, kind).bounds
      for path, _, operands in compress.hooks(model)
      if operands.weight is not None
    }
    _check_any(bits, bounds.values(), kind)
    plan[kind] = {
      path: int(np.clip(bits, math.ceil(low), math.floor(high)))
      for path, (low, high) in bounds.items()
    }
  return compress.Plan(
    open={}, weight_bits=plan['weight'], act_bits=plan['act']
  )


def _check_any(bits: int, bounds: Collection[Any], kind: str) -> None:
  """Raises a ValueError if bits are within none of some bounds."""
  if bounds and not any(low <= bits <= high for low, high in bounds):
    what = {'weight': 'weights', 'act': 'activations'}[kind]
    allowed = ', '.join(
      f'{low:g} to {high:g}' for low, high in sorted({*bounds})
    )
    raise ValueError(
      f'uniform bits of {bits} for {what} are what no layer can have: the '
      f'rules allow {allowed}; take others, or change {kind}_bits of the rules'
    )


def even_bits(model: compress.Compressed, budget: Budget) -> float:
  """The bits that all grids together can have within a budget.

  Args:
    model: compressed; all its channels count.
    budget: as that of `plan`.

  Returns:
    Real-valued bits, within 1 and 16; each grid has them within its bounds.
  """
  rounder = rounding.Rounder(model, None, _by_name(budget))

  def load(bits: float) -> float:
    given: dict[str, dict[str, Any]] = {'weight': {}, 'act': {}}
    for (kind, path), allowed in rounder.allowed.items():
      given[kind][path] = np.clip(bits, allowed[0], allowed[-1])
    even = compress.Plan(
      open={}, weight_bits=given['weight'], act_bits=given['act']
    )
    return rounder.load(even)

  return _largest(lambda bits: load(bits) <= 1, 1.0, compress.MAX_BITS)


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
  """The largest number that fits, by bisection; `low` if none does."""
  if fits(high):
    return high
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def plan(
  model: compress.Compressed,
  budget: Budget | None,
  choices: Sequence[int] | None = None,
) -> compress.Plan:
  """Rounds a searched model to whole channels and bits.

  Args:
    model: a searched model.
    budget: largest BOPs relative to the dense float32 model, or the largest
      of several costs by name, see `cost.COSTS`; None only rounds: bits to the
      nearest choice, gates at their threshold.  Bits that no budget counts
      are only rounded, too.
    choices: allowed bits, for example (2, 4, 8, 16, 32); by default all whole
      numbers.  Each layer's bounds still hold.

  Returns:
    A plan at or below every budget, as close to the tightest as single
    channels allow.

  Raises:
    ValueError: the budget is out of reach (the message says how far it goes)
      or no finite number above 0, the choices are no whole numbers, or the
      model is frozen already.
  """
  if budget is None:
    return rounding.Rounder(model, choices, {'bops': 1.0}).at(0.0)
  check_reachable(model, budget, choices)
  rounder = rounding.Rounder(model, choices, _by_name(budget))
  slack = _largest(lambda s: rounder.load(rounder.at(s)) <= 1, -40.0, 40.0)
  return filling.fill(rounder, rounder.at(slack))


def reachable(
  model: compress.Compressed,
  choices: Sequence[int] | None = None,
  name: str = 'bops',
) -> float:
  """The smallest relative BOPs, or another of the costs, that rules allow."""
  return _least(model, choices)[name]


def check_reachable(model, budget: Budget, choices=None):
  """Raises a ValueError if the rules do not allow so small a budget."""
  least = _least(model, choices)
  for name, limit in _by_name(budget).items():
    if limit < least[name]:
      raise ValueError(
        f'a budget of {100 * limit:.4g} % of the float32 {cost.COSTS[name]} '
        'cannot be reached: with the fewest bits and channels that the rules '
        f'allow, {100 * least[name]:.4g} % are left; raise the budget, or '
        f'allow {"" if name == "macs" else "fewer bits or "}more pruning'
      )


def _least(model, choices) -> dict[str, float]:
  """The smallest relative costs that the rules allow."""
  rounder = rounding.Rounder(model, choices, {'bops': 1.0})
  return rounder.counts.relative(rounder.at(-40.0))


def _by_name(budget: Budget) -> Mapping[str, float]:
  if not isinstance(budget, Mapping):
    budget = {'bops': budget}
  unknown = sorted(budget.keys() - cost.COSTS.keys())
  if unknown or not budget:
    what = f'no cost {unknown[0]!r}' if unknown else 'no budget'
    raise ValueError(f'there is {what}; known: {", ".join(cost.COSTS)}')
  for name, limit in budget.items():
    if isinstance(limit, str) or not 0 < limit < math.inf:  # nor is it NaN
      raise ValueError(
        f'a budget of {cost.COSTS[name]} is a finite number above 0, a share '
        f'of those of the float32 model, not {limit!r}'
      )
  return budget


def relative_bops(structure: compress.Structure, plan: compress.Plan) -> float:
  """Exact BOPs of a plan over those of the dense float32 model."""
  uses = compress.planned_usage(structure, plan)
  return cost.relative_bops(uses, cost.float_bops(uses))
