"""DJPQ and its controls: from a float model to a frozen one."""

import dataclasses

from flax import nnx
import numpy as np

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import graph as graph_lib
from djpq_jax.experiment import phases
from djpq_jax.experiment import setting

UNPRUNED = compress.Rule(pattern='*', prune=False)
UNQUANTIZED = compress.Rule(pattern='*', quantize=False)
MET = 0.999  # a budget below 1 that asks for nothing


def djpq(run: setting.Run, model) -> compress.Compressed:
  """Searches channels and bits together, then carries the plan out."""
  config = run.config
  net = phases.compressed(run, model)
  net = phases.search(
    run, net, model, budgets=run.budgets, epochs=config.search.epochs
  )
  plan = phases.planned(run, net, run.budgets)
  if config.finetune.rewind:
    net = _rewound(net, phases.compressed(run, model))
  return phases.frozen(run, net, plan)


def _rewound(
  searched: compress.Compressed, fresh: compress.Compressed
) -> compress.Compressed:
  """`fresh`, with what a plan does not say of the searched grids.

  Noise, and bits that change from step to step, have moved the searched
  weights away from the float model.
  """
  for new, old in zip(compress.hooks(fresh), compress.hooks(searched)):
    for kind in ('weight', 'act'):
      grid = getattr(old.operands, kind)
      if grid is not None and grid.log_exponent is not None:
        setattr(new.operands, kind, nnx.data(grid))
  return fresh


def two_stage(run: setting.Run, model) -> compress.Compressed:
  """The control: first prunes channels, then learns bits, at equal epochs.

  Each stage has half of the search's epochs.  The first stage gets its own
  budget of MACs, the second one what is left of the BOPs budget.
  """
  config = run.config
  epochs = config.search.epochs / 2
  macs = config.two_stage_macs
  net = phases.compressed(run, model, [UNQUANTIZED])
  net = phases.search(run, net, model, budgets={'bops': macs}, epochs=epochs)
  first = phases.planned(run, net, macs)
  structure = net.structure
  left = allocate.relative_bops(structure, first)
  pruned = compress.fold_gates(phases.frozen(run, net, first))
  net = phases.compressed(run, pruned, [UNPRUNED])
  least = left * allocate.reachable(net, config.bit_choices or None)
  if config.budget < least:
    raise ValueError(
      f'a budget of {100 * config.budget:.4g} % of the float32 BOPs cannot be '
      f'reached: the first stage left {100 * left:.4g} % of the MACs, and with '
      f'the fewest bits that the rules allow {100 * least:.4g} % of the BOPs '
      'are left; lower two_stage_macs, raise the budget, or allow fewer bits'
    )
  # What the first stage left may be within the budget as it is.
  budget = min(config.budget / left, MET)
  run.scale = _left(first, left)  # what the second counts is less than all
  net = phases.search(run, net, model, budgets={'bops': budget}, epochs=epochs)
  run.scale = {}
  second = phases.planned(run, net, budget)
  if config.finetune.rewind:
    cut = graph_lib.slice_channels(model, structure.graph, first.open)
    net = _rewound(net, phases.compressed(run, cut, [UNPRUNED]))
  net = phases.frozen(run, net, second)
  # Seen from the dense model, both stages are one plan; no gates are left.
  net.structure = dataclasses.replace(
    structure,
    plan=dataclasses.replace(second, open=first.open),
    groups=tuple(
      dataclasses.replace(g, reason=g.reason or 'pruned in the first stage')
      for g in structure.groups
    ),
  )
  return net


def _left(plan: compress.Plan, share: float) -> dict[str, float]:
  """What a plan leaves of the dense model, as metrics of training say it."""
  kept = np.concatenate([*plan.open.values(), []])  # of all groups
  fraction = float(kept.mean()) if kept.size else 1.0
  return {'relative_bops': share, 'kept_fraction': fraction}


def before_search(run: setting.Run, model) -> list[compress.Compressed]:
  """What each search of a method begins with, as if none had pruned yet."""
  if run.config.method == 'two_stage':
    first = phases.compressed(run, model, [UNQUANTIZED])
    return [first, phases.compressed(run, model, [UNPRUNED])]
  return [phases.compressed(run, model)]


def uniform(run: setting.Run, model) -> compress.Compressed:
  """The control: the same bits everywhere, learned clips, nothing pruned."""
  net = phases.compressed(run, model, [UNPRUNED])
  plan = allocate.uniform(net, *run.config.uniform_bits)
  return phases.frozen(run, net, plan)


def unchanged(run: setting.Run, model) -> compress.Compressed:
  """The control: the float model itself, trained on for as many epochs."""
  net = phases.compressed(run, model, [UNPRUNED, UNQUANTIZED])
  plan = compress.Plan(open={}, weight_bits={}, act_bits={})
  return phases.frozen(run, net, plan)


METHODS = {
  'djpq': djpq,
  'two_stage': two_stage,
  'uniform': uniform,
  'float': unchanged,
}
