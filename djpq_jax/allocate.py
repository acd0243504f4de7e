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
import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np

from djpq_jax import compress
from djpq_jax import cost

LOG_ALPHA_PER_BIT = 2.0  # how much a gate's threshold moves with one bit
CLOSE_ENOUGH = 0.985  # of the budget; no channel is given up to come nearer
FULL = 0.999  # of the budget; filling stops there

Budget: TypeAlias = float | Mapping[str, float]  # a float is one of BOPs


@dataclasses.dataclass(frozen=True)
class Search:
  """What a search found, as plain numbers.

  Attributes:
    weight_bits: layer path -> real-valued bits, also where the search allowed
      only some: they tell which of them was nearer.
    act_bits: layer path -> real-valued bits.
    log_alpha: group name -> log signal-to-noise per channel, [size].
  """

  weight_bits: Mapping[str, float]
  act_bits: Mapping[str, float]
  log_alpha: Mapping[str, np.ndarray]


def read(model: compress.Compressed) -> Search:
  """Reads bits and gates off a searched model.

  Raises:
    ValueError: the model is frozen, so there is nothing left to plan.
  """
  if model.structure.plan is not None:
    raise ValueError(
      'the model is frozen: its channels and bits are settled, as its '
      'structure.plan says; plan for the model that it was made of'
    )
  weight_bits, act_bits, log_alpha = {}, {}, {}
  for path, _, operands in compress.hooks(model):
    if operands.weight is not None:
      weight_bits[path] = float(operands.weight.bits(restricted=False))
      act_bits[path] = float(operands.act.bits(restricted=False))
  for g, gate in zip(model.structure.gated, model.gates):
    name = model.structure.groups[g].name
    log_alpha[name] = np.asarray(gate.log_alpha())
  return Search(weight_bits, act_bits, log_alpha)


def uniform(
  model: compress.Compressed, weight_bits: int, act_bits: int
) -> compress.Plan:
  """The plan that prunes nothing and gives every layer the same bits.

  Bounds of single layers still hold, as the 8 bits of the first layer's input.

  Raises:
    ValueError: bits that are within the bounds of no layer at all.
  """
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


def counted_bits(budgets: Mapping[str, float]) -> set[str]:
  """Whose bits the budgets count: 'weight', 'act', both or neither."""
  kinds = {'bops': {'weight', 'act'}, 'weights': {'weight'}, 'macs': set()}
  return set().union(*(kinds[name] for name in budgets))


def even_bits(model: compress.Compressed, budget: Budget) -> float:
  """The bits that all grids together can have within a budget.

  Args:
    model: compressed; all its channels count.
    budget: as that of `plan`.

  Returns:
    Real-valued bits, within 1 and 16; each grid has them within its bounds.
  """
  rounder = _Rounder(model, None, _by_name(budget))

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
      or no finite number above 0, or the model is frozen already.
  """
  if budget is None:
    return _Rounder(model, choices, {'bops': 1.0}).at(0.0)
  check_reachable(model, budget, choices)
  rounder = _Rounder(model, choices, _by_name(budget))
  slack = _largest(lambda s: rounder.load(rounder.at(s)) <= 1, -40.0, 40.0)
  return _fill(rounder, rounder.at(slack))


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
  rounder = _Rounder(model, choices, {'bops': 1.0})
  return rounder.counts.relative(rounder.at(-40.0))


def _by_name(budget: Budget) -> Mapping[str, float]:
  if not isinstance(budget, Mapping):
    budget = {'bops': budget}
  unknown = sorted(budget.keys() - cost.COSTS.keys())
  if unknown or not budget:
    what = f'no cost {unknown[0]!r}' if unknown else 'no budget'
    raise ValueError(f'there is {what}; known: {", ".join(cost.COSTS)}')
  for name, limit in budget.items():
    if not 0 < limit < math.inf:  # nor is it NaN
      raise ValueError(
        f'a budget of {cost.COSTS[name]} is a finite number above 0, a share '
        f'of those of the float32 model, not {limit}'
      )
  return budget


def relative_bops(structure: compress.Structure, plan: compress.Plan) -> float:
  """Exact BOPs of a plan over those of the dense float32 model."""
  uses = compress.planned_usage(structure, plan)
  return cost.relative_bops(uses, cost.float_bops(uses))


class _Rounder:
  """Rounds what a search found, at any slack, and counts what that costs."""

  def __init__(
    self, model: compress.Compressed, choices, budgets: Mapping[str, float]
  ):
    self.budgets = budgets
    # What the slack moves besides channels.
    self.moved = counted_bits(budgets)
    self.found = read(model)
    self.structure = model.structure
    self.allowed = {}
    for path, _, operands in compress.hooks(model):
      if operands.weight is None:
        continue
      for kind in ('weight', 'act'):
        bounds = getattr(operands, kind).bounds
        self.allowed[kind, path] = _allowed(bounds, choices, path, kind)
    self.groups = {g.name: g for g in self.structure.groups}
    self.counts = compress.PlanCosts(self.structure)

  def real_bits(self, kind: str, path: str) -> float:
    """Bits of one tensor as the search left them."""
    return getattr(self.found, f'{kind}_bits')[path]

  def at(self, slack: float) -> compress.Plan:
    """The plan at one slack, in bits."""
    bits: dict[str, dict[str, int]] = {'weight': {}, 'act': {}}
    for (kind, path), allowed in self.allowed.items():
      real = self.real_bits(kind, path)
      real = max(real + slack * (kind in self.moved), 0.5)
      distance = np.abs(np.log2(allowed) - np.log2(real))
      bits[kind][path] = int(allowed[np.argmin(distance)])
    threshold = -LOG_ALPHA_PER_BIT * slack
    masks = {
      name: self.top(name, int((log_alpha > threshold).sum()))
      for name, log_alpha in self.found.log_alpha.items()
    }
    return compress.Plan(
      open=masks, weight_bits=bits['weight'], act_bits=bits['act']
    )

  def top(self, name: str, count: int) -> np.ndarray:
    """Opens the best channels of a group: at least `count`, aligned."""
    group = self.groups[name]
    count = max(count, group.min_channels)
    count = min(-(-count // group.align) * group.align, group.size)
    order = np.argsort(-self.found.log_alpha[name], kind='stable')
    mask = np.zeros(group.size, bool)
    mask[order[:count]] = True
    return mask

  def load(self, plan: compress.Plan) -> float:
    """The largest of a plan's costs over their budgets."""
    relative = self.counts.relative(plan)
    return max(relative[name] / limit for name, limit in self.budgets.items())

  def without_worst(self, plan: compress.Plan) -> compress.Plan | None:
    """The plan without the least of its open channels; None if it has none."""
    found = self.found.log_alpha
    worst = []
    for name, mask in plan.open.items():
      fewer = self.top(name, int(mask.sum()) - self.groups[name].align)
      if fewer.sum() < mask.sum():
        worst.append((found[name][mask & ~fewer].max(), name, fewer))
    if not worst:
      return None
    _, name, fewer = min(worst, key=lambda item: item[0])
    return dataclasses.replace(plan, open=dict(plan.open) | {name: fewer})

  def next_changes(self, plan: compress.Plan):
    """Single changes upward: yields (slack at which it would come, plan)."""
    for (kind, path), allowed in self.allowed.items():
      if kind not in self.moved:
        continue
      field = f'{kind}_bits'
      now = getattr(plan, field)
      higher = [b for b in allowed if b > now[path]]
      if higher:
        edge = np.sqrt(higher[0] * now[path]) - self.real_bits(kind, path)
        changed = dict(now) | {path: int(higher[0])}
        yield edge, dataclasses.replace(plan, **{field: changed})
    for name, mask in plan.open.items():
      more = self.top(name, int(mask.sum()) + 1)
      added = more & ~mask
      if added.any():
        edge = -self.found.log_alpha[name][added].min() / LOG_ALPHA_PER_BIT
        changed = dict(plan.open) | {name: more}
        yield edge, dataclasses.replace(plan, open=changed)


def _allowed(bounds, choices, path, kind) -> np.ndarray:
  low, high = bounds
  if choices is None:
    choices = range(int(np.ceil(low)), int(np.floor(high)) + 1)
  allowed = np.array(sorted(b for b in choices if low <= b <= high))
  if not len(allowed):
    raise ValueError(
      f'none of the allowed bits {tuple(choices)} is within the bounds '
      f'{bounds} of the {kind} bits of layer {path}'
    )
  return allowed


def _fill(rounder: _Rounder, plan: compress.Plan):
  """Spends what is left of the budget on the next changes that fit."""
  while (load := rounder.load(plan)) < FULL:
    # What the tightest budget does not count is no way to spend it.
    fitting = [
      (edge, changed)
      for edge, changed in rounder.next_changes(plan)
      if load < rounder.load(changed) <= 1
    ]
    if not fitting:
      if load < CLOSE_ENOUGH:
        plan = _trade(rounder, plan)
      break
    plan = min(fitting, key=lambda pair: pair[0])[1]
  return _with_free(rounder, plan)


def _with_free(rounder: _Rounder, plan: compress.Plan):
  """Takes back what the search had and the tightest budget does not count."""
  while True:
    load = rounder.load(plan)
    free = [
      (edge, changed)
      for edge, changed in rounder.next_changes(plan)
      if edge <= 0 and rounder.load(changed) <= load
    ]
    if not free:
      return plan
    plan = min(free, key=lambda pair: pair[0])[1]


def _trade(rounder: _Rounder, plan: compress.Plan):
  """Pays for a change that is too large alone by closing the worst channels."""
  changes = sorted(rounder.next_changes(plan), key=lambda pair: pair[0])
  for _, changed in changes:
    while changed and rounder.load(changed) > 1:
      changed = rounder.without_worst(changed)
    if changed and rounder.load(changed) > rounder.load(plan):
      return changed
  return plan
