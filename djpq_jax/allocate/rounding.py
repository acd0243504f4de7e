"""What a search found, and the plan that it is at any slack."""

from collections.abc import Iterable, Mapping
import dataclasses

import numpy as np

from djpq_jax import compress

LOG_ALPHA_PER_BIT = 2.0  # how much a gate's threshold moves with one bit


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
    TypeError: no compressed model.
    ValueError: the model is frozen, so there is nothing left to plan.
  """
  compress.check(model, 'a plan')
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


def counted_bits(budgets: Mapping[str, float]) -> set[str]:
  """Whose bits the budgets count: 'weight', 'act', both or neither."""
  kinds = {'bops': {'weight', 'act'}, 'weights': {'weight'}, 'macs': set()}
  return set().union(*(kinds[name] for name in budgets))


class Rounder:
  """Rounds what a search found, at any slack, and counts what that costs."""

  def __init__(
    self, model: compress.Compressed, choices, budgets: Mapping[str, float]
  ):
    self.budgets = budgets
    # What the slack moves besides channels.
    self.moved = counted_bits(budgets)
    self.found = read(model)
    self.structure = model.structure
    if choices is not None:
      choices = _whole(choices)
    self.allowed = {}
    for path, _, operands in compress.hooks(model):
      if operands.weight is None:
        continue
      for kind in ('weight', 'act'):
        bounds = getattr(operands, kind).bounds
        self.allowed[kind, path] = allowed_bits(bounds, choices, path, kind)
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


def _whole(choices) -> list[int]:
  """The choices, if they are whole numbers.

  Raises:
    ValueError: they are not.
  """
  many = isinstance(choices, Iterable) and not isinstance(choices, str)
  bits = np.asarray(list(choices) if many else choices)
  if bits.ndim != 1 or bits.dtype.kind not in 'iuf' or np.any(bits % 1):
    raise ValueError(
      'choices are whole numbers of bits, for example (2, 4, 8), not '
      f'{choices!r}'
    )
  return [int(b) for b in bits]


def allowed_bits(bounds, choices, path, kind) -> np.ndarray:
  """The choices within a layer's bounds, ascending.

  Raises:
    ValueError: there are none.
  """
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
