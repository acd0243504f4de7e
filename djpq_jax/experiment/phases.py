"""The phases of an experiment: float training, search, finetuning.

Each phase saves its state as it goes, in a folder of its own.  A run that goes
on takes the same way again, and finds each phase where it was left: models are
compressed and frozen anew from the states of the phases before, which gives
the same bits, and only what is missing is trained.

Every process of a run does what is between the steps for itself.  Where that
ends in something static of the next program, all take it from process 0.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, TypeAlias

from flax import nnx
import jax
import numpy as np

from djpq_jax import allocate
from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import evaluation
from djpq_jax import losses
from djpq_jax import optim
from djpq_jax import parallel
from djpq_jax import train
from djpq_jax.experiment import layer_rules
from djpq_jax.experiment import running
from djpq_jax.experiment import setting

FULL_BITS = 8.0  # of grids that nearly copy their tensors
HEADROOM = 1.15  # over the budgets, for the bits that a search begins with

Budgets: TypeAlias = Mapping[str, float] | None  # see `setting.Run.budgets`


def _optimizer(phase, steps: int):
  config = optim.OptimizerConfig(**phase.optimizer)
  return optim.make(config, steps)


def _how(run: setting.Run) -> dict[str, Any]:
  """How a step computes, for `train.init`."""
  step = run.config.step
  return {
    'dtype': step.dtype,
    'accumulate': step.accumulate,
    'remat': step.remat,
    'pixels': run.train_split.pixels,
  }


def train_float(run: setting.Run, model):
  """Trains the model before it is compressed."""
  steps = run.steps(run.epochs()['float'])
  if not steps:
    return model
  state = float_state(run, model, steps=steps)
  return running.run_phase(run, 'float', state, steps)


def float_state(run: setting.Run, model, *, steps: int) -> train.TrainState:
  """The state that the float training begins with."""
  phase = run.config.float
  return train.init(
    model,
    train.Objective(smoothing=phase.smoothing),
    _optimizer(phase, max(1, steps)),
    seed=run.config.seed,
    **_how(run),
  )


def compressed(run: setting.Run, model, rules=()) -> compress.Compressed:
  """Attaches gates and quantizers as the config's rules, then `rules`, say."""
  given = layer_rules.rules_of(run.config)
  bits = layer_rules.bits_of(run.config)
  net = compress.compress(
    model,
    [*given, *rules],
    run.sample(),
    **bits,
  )
  _agree_on_sides(net)
  compress.restrict(net, **bits)  # within the bounds that were agreed on
  return net


def planned(
  run: setting.Run, model: compress.Compressed, budgets: allocate.Budget | None
) -> compress.Plan:
  """Rounds a searched model to its budgets."""
  plan = allocate.plan(model, budgets, run.config.bit_choices or None)
  fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
  same = parallel.agreed(fields)
  for kind in ('weight_bits', 'act_bits'):
    same[kind] = {path: int(bits) for path, bits in same[kind].items()}
  return compress.Plan(**same)


def frozen(
  run: setting.Run, model: compress.Compressed, plan: compress.Plan
) -> compress.Compressed:
  """Carries a plan out."""
  net = compress.freeze(model, plan, run.sample())
  _agree_on_sides(net)
  return net


def _agree_on_sides(model: compress.Compressed) -> None:
  """Gives inputs' grids the levels below zero of process 0, in place."""
  acts = [o.act for _, _, o in compress.hooks(model) if o.act is not None]
  sides = [
    (act.signed, np.nan if act.below is None else act.below, act.bounds)
    for act in acts
  ]
  for act, (signed, below, bounds) in zip(acts, parallel.agreed(sides)):
    act.signed = bool(signed)
    act.below = None if np.isnan(below) else float(below)
    act.bounds = tuple(map(float, bounds))


def search(
  run: setting.Run,
  model: compress.Compressed,
  teacher,
  *,
  budgets: Budgets,
  epochs: float,
):
  """Learns channels and bits; a controller leads them to the budgets."""
  steps = run.steps(epochs)
  if budgets:
    # Again: what was learned may have raised the fewest bits of some grid.
    choices = run.config.bit_choices or None
    allocate.check_reachable(model, budgets, choices)
  _begin(run, model, budgets)
  state = search_state(run, model, teacher, budgets=budgets, steps=steps)
  return running.run_phase(run, 'search', state, steps)


def _begin(run: setting.Run, model: compress.Compressed, budgets: Budgets):
  """Brings the bits near to where the search will lead them, in place.

  What weights learn at bits that they will not have is of little use to them.
  """
  bits = run.config.search.bits
  kinds = allocate.counted_bits(budgets or {})
  if kinds and bits < FULL_BITS:
    # No bits meet a budget of MACs: that is for channels alone.
    goals = {
      name: HEADROOM * share
      for name, share in budgets.items()
      if allocate.counted_bits({name: share})
    }
    even = allocate.even_bits(model, goals)
    bits = min(max(bits, even), FULL_BITS)
    compress.regrid(model, bits, run.sample(), kinds=kinds)


def search_state(
  run: setting.Run,
  model: compress.Compressed,
  teacher,
  *,
  budgets: Budgets,
  steps: int,
) -> train.TrainState:
  """The state that a search begins with."""
  phase = run.config.search
  controller = None
  if budgets:
    controller = budget_lib.Controller(
      budget=next(iter(budgets.values())),
      start=float(parallel.agreed(jax.jit(_tightest(model, budgets))())),
      steps=max(1, steps),
      ramp=phase.ramp,
    )
  objective = train.Objective(
    smoothing=phase.smoothing,
    distill=phase.distill,
    temperature=phase.temperature,
    noisy=True,
    kl_weight=phase.kl_weight,
    strength=phase.strength,
    controller=controller,
    budgets=budgets,
    ramp_steps=round(phase.ramp * steps),
  )
  return train.init(
    model,
    objective,
    _optimizer(phase, max(1, steps)),
    seed=run.config.seed + 1,
    teacher=teacher if phase.distill else None,
    **_how(run),
  )


def _tightest(model, budgets):
  graphdef, state = nnx.split(model)
  pure = nnx.as_pure(state)

  def relative():
    costs = losses.relative_costs(nnx.merge(graphdef, pure))
    return budget_lib.tightest(costs, budgets)

  return relative


def finetune(run: setting.Run, model: compress.Compressed, teacher):
  """Trains what is left, at its bits; then re-estimates batch norm."""
  steps = run.steps(run.epochs()['finetune'])
  state = finetune_state(run, model, teacher, steps=steps)
  model = running.run_phase(run, 'finetune', state, steps)
  train.check_alive(model, run.sample())
  mesh = run.mesh()
  return evaluation.estimate_statistics(
    model, _parts_of_batches(run), mesh if mesh.size > 1 else None
  )


def _parts_of_batches(run: setting.Run) -> Iterator[np.ndarray]:
  """Images for the statistics, as many at a time as a step has in memory."""
  batch_at = run.batches(run.config.seed * 10 + 9)
  parts = run.config.step.accumulate
  for step in range(run.config.statistics_batches):
    images = batch_at(step)['image']
    for part in range(parts):
      yield images[part::parts]


def finetune_state(
  run: setting.Run, model: compress.Compressed, teacher, *, steps: int
) -> train.TrainState:
  """The state that the finetuning begins with."""
  phase = run.config.finetune
  objective = train.Objective(
    smoothing=phase.smoothing,
    distill=phase.distill,
    temperature=phase.temperature,
  )
  return train.init(
    model,
    objective,
    _optimizer(phase, max(1, steps)),
    seed=run.config.seed + 2,
    teacher=teacher if phase.distill else None,
    **_how(run),
  )
