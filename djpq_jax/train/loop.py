"""The loop around the step: data, metrics, checkpoints, interruption."""

from collections.abc import Callable

import jax

from djpq_jax import data
from djpq_jax import parallel
from djpq_jax.train import diagnosis
from djpq_jax.train import state as state_lib
from djpq_jax.train import step as step_lib


class Interrupted(Exception):
  """Training was asked to stop; the message says where, and what is saved."""


def fit(
  state: state_lib.TrainState,
  batch_at: Callable[[int], state_lib.Batch],
  steps: int,
  *,
  log_every: int = 20,
  on_log: Callable[[int, state_lib.Metrics], None] | None = None,
  step_fn=step_lib.jit_step,
  save: Callable[[state_lib.TrainState, float | None], None] | None = None,
  save_every: int = 0,
  evaluate: Callable[[state_lib.TrainState], float] | None = None,
  evaluate_every: int = 0,
  stop: Callable[[], bool] | None = None,
  place: Callable[[state_lib.Batch], state_lib.Batch] | None = None,
) -> state_lib.TrainState:
  """Runs steps `state.step` .. `steps`.

  Batches and noise are functions of the step number, so a training that goes
  on from a checkpoint ends with the bits that it would have ended with.

  Args:
    state: a fresh or restored state; it is donated.
    batch_at: gives the batch of a step number.
    steps: where to end.
    log_every: steps between looks at the metrics (the only host syncs).
    on_log: called with (steps done, metrics as floats).
    step_fn: `jit_step`, or another wrapper of `train_step`.
    save: called with the state at the end, before an interruption, and after
      each look at the accuracy; it is given that, too, or None.
    save_every: steps after which it is called, too; 0 for never.
    evaluate: gives the accuracy of a state, the metric 'eval_accuracy'.
    evaluate_every: steps after which it is called, and at the end; 0 for never.
    stop: asked after each step whether to save and stop, as on a signal.
    place: puts a batch on the devices.

  Raises:
    TrainingError: a loss or gradient was not finite; names the layer.
    Interrupted: `stop` said so.
  """
  numbers = range(int(state.step), steps)
  looked = numbers.start
  place = place or (lambda batch: batch)
  batches = data.prefetch(place(batch_at(step)) for step in numbers)
  for step, batch in zip(numbers, batches):
    state, metrics = step_fn(state, batch)
    done = step + 1
    parallel.pace(step, metrics)
    stopping = stop is not None and stop() and done < steps
    looking = evaluate_every and (_due(done, evaluate_every) or done == steps)
    saving = save is not None and (
      stopping or looking or _due(done, save_every) or done == steps
    )
    logging = looking or _due(done, log_every) or done == steps
    if saving or logging:
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      if metrics['bad_steps']:  # not to be saved: it would stop here again
        raise diagnosis.TrainingError(
          diagnosis.where(state, batch_at, range(looked, done))
        )
      looked = done
      if looking:
        assert evaluate is not None
        metrics['eval_accuracy'] = evaluate(state)
      if on_log is not None and logging:
        on_log(done, metrics)
    if saving:
      assert save is not None
      save(state, metrics.get('eval_accuracy'))
    if stopping:
      saved = ' and saved; the same command goes on from there' if save else ''
      raise Interrupted(f'stopped after step {done} of {steps}{saved}')
  return state


def _due(done: int, every: int) -> bool:
  return every > 0 and done % every == 0
