"""Runs one phase of an experiment: steps, looks, checkpoints.

Each phase saves its state as it goes, in a folder of its own, and goes on from
what it finds there.
"""

from collections.abc import Callable
import contextlib
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from djpq_jax import data
from djpq_jax import files
from djpq_jax import parallel
from djpq_jax import train
from djpq_jax.experiment import setting

NAMES = ('float', 'search', 'finetune')


def run_phase(run: setting.Run, name: str, state: train.TrainState, steps: int):
  """Runs one phase, or what is left of it; returns its model."""
  seed = run.config.seed * 10 + NAMES.index(name)
  rows: list[dict[str, Any]] = []  # of this phase
  seen: dict[str, float] = {}  # what the progress is told at every look
  clock = _Clock()
  accuracy = accuracy_of(run)

  def on_log(step, metrics):
    metrics = metrics | {k: metrics[k] * s for k, s in run.scale.items()}
    row = {'phase': name, 'step': run.steps_done + step, **metrics}
    rows.append({k: _plain(v) for k, v in row.items()})
    run.record(rows[-1:])
    if 'eval_accuracy' in metrics:
      seen['eval_accuracy'] = metrics['eval_accuracy']
    # Not a part of the history, which is the same whenever it is made.
    seen['images_per_second'] = clock.rate(step) * run.config.batch_size
    run.progress(name, step, steps, metrics | seen)

  def evaluate(state):
    with clock.stopped():
      return accuracy(state)

  to_devices, step_fn, place = spread(run)
  keep_best = run.config.keep_best and name != 'search'

  def fit(state, save=None):
    clock.start(int(state.step))
    return train.fit(
      state,
      run.batches(seed, as_bytes=True),
      steps,
      log_every=max(1, min(50, steps // 20)),
      on_log=on_log,
      step_fn=step_fn,
      save=save,
      save_every=run.config.checkpoint_every,
      evaluate=evaluate,
      evaluate_every=run.steps(run.config.evaluate_every),
      stop=run.stop,
      place=place,
    )

  state = to_devices(state)
  with _home(run, name, kept=keep_best) as home:
    if home is None or not steps:
      state = fit(state)
    else:
      folder = home / 'checkpoints' / f'{run.phases_done}-{name}'
      absolute = files.absolute(folder)
      with train.Checkpoints(absolute, keep_best=keep_best) as checkpoints:
        state, before = checkpoints.restore(state)
        rows += before
        run.record(before, restored=True)
        state = fit(state, lambda state, a: checkpoints.save(state, rows, a))
        if keep_best:
          state, _ = checkpoints.restore(state, best=True)
          run.best_steps[name] = run.steps_done + int(state.step)
  run.steps_done += steps
  run.phases_done += 1
  return train.model_of(parallel.gather(state))


@contextlib.contextmanager
def _home(run: setting.Run, name: str, *, kept: bool):
  """Where a phase keeps checkpoints; None if it keeps none."""
  home = run.float_dir if name == 'float' else run.workdir
  if home is not None or not kept:
    yield home
    return
  with tempfile.TemporaryDirectory() as folder:  # the best, until the end
    yield pathlib.Path(folder)


def accuracy_of(run: setting.Run) -> Callable[[train.TrainState], float]:
  """A function from a state to the share of watched images it gets right."""
  place = spread(run)[2] or (lambda batch: batch)

  def accuracy(state) -> float:
    batches = data.eval_batches(
      run.watched_split,
      run.config.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    placed = data.prefetch(place(batch) for batch in batches)
    counts = []
    for number, batch in enumerate(placed):
      counts.append(train.eval_step(state, batch))
      parallel.pace(number, counts[-1])
    right, images = np.sum(jax.device_get(counts), axis=0)
    return float(right / images)

  return accuracy


class _Clock:
  """Steps per second between looks, the first compilation included."""

  def start(self, step: int) -> None:
    self._step, self._time = step, time.monotonic()

  @contextlib.contextmanager
  def stopped(self):
    """What is done inside takes no time."""
    start = time.monotonic()
    yield
    self._time += time.monotonic() - start

  def rate(self, step: int) -> float:
    before, then = self._step, self._time
    self.start(step)
    return (step - before) / max(self._time - then, 1e-9)


def spread(run: setting.Run):
  """How a state and a batch get to the devices, and what steps there."""
  mesh, wrapper = run.mesh(), run.config.step.wrapper
  if mesh.size == 1 and wrapper == 'jit':
    # Some arrays of a state may be tied to the device, as those of a model that
    # was restored, and a step's results all are: it would compile twice.
    device = mesh.devices.item()
    return lambda state: jax.device_put(state, device), train.jit_step, None
  wrap = {'jit': parallel.jit_step, 'pmap': parallel.pmap_step}[wrapper]
  return (
    lambda state: parallel.replicate(state, mesh),
    wrap(train.train_step, mesh),
    lambda batch: parallel.spread(batch, mesh),
  )


def _plain(value):
  return value if isinstance(value, (str, int)) else float(value)
