"""Turns a searched model into a plan in whole channels and bits, on budget.

The search ends near the budget with real-valued bits and noisy gates.  One
number, the slack, then moves all of them together: it is added to every
tensor's bits and lowers every gate's threshold.  The largest slack that stays
within the budget is found by bisection, and what it leaves unused is filled
with the next best single changes that still fit.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from djpq_jax import compress
from djpq_jax import cost

LOG_ALPHA_PER_BIT = 2.0  # how much a gate's threshold moves with one bit
CLOSE_ENOUGH = 0.985  # of the budget; filling stops there


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
  """Reads bits and gates off a searched model."""
  weight_bits, act_bits, log_alpha = {}, {}, {}
  for path, _, operands in compress.hooks(model):
    if operands.weight is not None:
      weight_bits[path] = float(operands.weight.bits(restricted=False))
      act_bits[path] = float(operands.act.bits(restricted=False))
  for g, gate in zip(model.structure.gated, model.gates):
    name = model.structure.groups[g].name
    log_alpha[name] = np.asarray(gate.log_alpha())
  return Search(weight_bits, act_bits, log_alpha)


def uniform(model: compress.Compressed, weight_bits: int, act_bits: int):
  """The plan that prunes nothing and gives every layer the same bits.

  Bounds of the layers still hold, as the 8 bits of the first layer's input.
  """
  found = read(model)
  layers = model.structure.layers

  def within(bits, bounds):
    return int(np.clip(bits, *bounds))

  return compress.Plan(
    open={},
    weight_bits={
      p: within(weight_bits, layers[p].weight_bits) for p in found.weight_bits
    },
    act_bits={
      p: within(act_bits, _act_bounds(model, p)) for p in found.act_bits
    },
  )


def plan(
  model: compress.Compressed,
  budget: float | None,
  choices: Sequence[int] | None = None,
) -> compress.Plan:
  """Rounds a searched model to whole channels and bits.

  Args:
    model: a searched model.
    budget: largest BOPs relative to the dense float32 model; None only
      rounds: bits to the nearest choice, gates at their threshold.
    choices: allowed bits, for example (2, 4, 8, 16, 32); by default all whole
      numbers.  Each layer's bounds still hold.

  Returns:
    A plan at or below the budget, as close to it as single channels allow.

  Raises:
    ValueError: the budget is out of reach; the message says how far it goes.
  """
  rounder = _Rounder(model, choices)
  if budget is None:
    return rounder.at(0.0)
  check_reachable(model, budget, choices)
  low, high = -40.0, 40.0
  if rounder.bops(rounder.at(high)) <= budget:
    return rounder.at(high)
  for _ in range(50):
    middle = (low + high) / 2
    fits = rounder.bops(rounder.at(middle)) <= budget
    low, high = (middle, high) if fits else (low, middle)
  return _fill(rounder, rounder.at(low), budget)


def reachable(
  model: compress.Compressed, choices: Sequence[int] | None = None
) -> float:
  """The smallest relative BOPs that the rules allow."""
  rounder = _Rounder(model, choices)
  return rounder.bops(rounder.at(-40.0))


def check_reachable(model, budget: float, choices=None):
  """Raises a ValueError if the rules do not allow so small a budget."""
  least = reachable(model, choices)
  if budget < least:
    raise ValueError(
      f'a budget of {100 * budget:.4g} % of the float32 BOPs cannot be '
      'reached: with the fewest bits and channels that the rules allow, '
      f'{100 * least:.4g} % are left; raise the budget, or allow fewer bits '
      'or more pruning'
    )


def relative_bops(structure: compress.Structure, plan: compress.Plan) -> float:
  """Exact BOPs of a plan over those of the dense float32 model."""
  uses = compress.planned_usage(structure, plan)
  return cost.relative_bops(uses, cost.float_bops(uses))


def _act_bounds(model, path):
  for found, _, operands in compress.hooks(model):
    if found == path:
      return operands.act.bounds
  raise KeyError(path)


class _Rounder:
  """Rounds what a search found, at any slack, and counts what that costs."""

  def __init__(self, model: compress.Compressed, choices):
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
    self.counts = _Counts(self.structure)

  def real_bits(self, kind: str, path: str) -> float:
    """Bits of one tensor as the search left them."""
    return getattr(self.found, f'{kind}_bits')[path]

  def at(self, slack: float) -> compress.Plan:
    """The plan at one slack, in bits."""
    bits: dict[str, dict[str, int]] = {'weight': {}, 'act': {}}
    for (kind, path), allowed in self.allowed.items():
      real = max(self.real_bits(kind, path) + slack, 0.5)
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

  def bops(self, plan: compress.Plan) -> float:
    """Relative BOPs of a plan."""
    return self.counts.relative_bops(plan)

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


class _Counts:
  """Relative BOPs of many plans, in float64: a sum over layers."""

  def __init__(self, structure: compress.Structure):
    self.structure = structure
    layers = structure.graph.layers.values()
    self.total = 32 * 32 * structure.graph.float_macs
    self.fixed = 32 * 32 * sum(m for _, m in structure.graph.other_macs)
    self.rows = [
      (
        layer.path,
        layer.macs,
        self._channels(layer.in_group, layer.in_channel),
        None
        if layer.depthwise
        else self._channels(layer.out_group, layer.out_channel),
      )
      for layer in layers
    ]

  def _channels(self, group, channel):
    """[(group name, channels)] of those with gates, and how many in all."""
    gated = set(self.structure.gated)
    parts = [
      (self.structure.groups[g].name, channel[group == g])
      for g in np.unique(group)
      if g in gated
    ]
    return parts, len(group)

  def relative_bops(self, plan: compress.Plan) -> float:
    def share(channels):
      if channels is None:
        return 1.0
      parts, total = channels
      closed = sum(
        np.count_nonzero(~plan.open[name][index])
        for name, index in parts
        if name in plan.open
      )
      return 1 - closed / total

    bops = self.fixed
    for path, macs, into, out in self.rows:
      bits = plan.weight_bits.get(path, 32) * plan.act_bits.get(path, 32)
      bops += macs * share(into) * share(out) * bits
    return bops / self.total


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


def _fill(rounder: _Rounder, plan: compress.Plan, budget: float):
  """Spends what is left of the budget on the next changes that fit."""
  while rounder.bops(plan) < CLOSE_ENOUGH * budget:
    fitting = [
      (edge, changed)
      for edge, changed in rounder.next_changes(plan)
      if rounder.bops(changed) <= budget
    ]
    if not fitting:
      return _trade(rounder, plan, budget)
    plan = min(fitting, key=lambda pair: pair[0])[1]
  return plan


def _trade(rounder: _Rounder, plan: compress.Plan, budget: float):
  """Pays for a change that is too large alone by closing the worst channels."""
  changes = sorted(rounder.next_changes(plan), key=lambda pair: pair[0])
  for _, changed in changes:
    while changed and rounder.bops(changed) > budget:
      changed = rounder.without_worst(changed)
    if changed and rounder.bops(changed) > rounder.bops(plan):
      return changed
  return plan
