"""Spends what a rounded plan leaves of its budget."""

from djpq_jax import compress
from djpq_jax.allocate import rounding

CLOSE_ENOUGH = 0.985  # of the budget; no channel is given up to come nearer
FULL = 0.999  # of the budget; filling stops there


def fill(rounder: rounding.Rounder, plan: compress.Plan):
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


def _with_free(rounder: rounding.Rounder, plan: compress.Plan):
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


def _trade(rounder: rounding.Rounder, plan: compress.Plan):
  """Pays for a change that is too large alone by closing the worst channels."""
  changes = sorted(rounder.next_changes(plan), key=lambda pair: pair[0])
  for _, changed in changes:
    while changed and rounder.load(changed) > 1:
      changed = rounder.without_worst(changed)
    if changed and rounder.load(changed) > rounder.load(plan):
      return changed
  return plan
