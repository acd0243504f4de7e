"""How fast models run: measured, on this machine, taking turns."""

from collections.abc import Callable, Mapping
import time

from flax import nnx
import jax
import numpy as np

from djpq_jax import compress
from djpq_jax import harden
from djpq_jax import integer

FLOAT = 'float32'  # the dense model


def compiled(model, x) -> tuple[Callable[[], jax.Array], float]:
  """Compiles a model for one batch.

  Args:
    model: to be run as it predicts.
    x: the batch, [B, ...].

  Returns:
    A function of no arguments that runs it and waits for the result; and the
    seconds that compiling took.
  """
  graphdef, state = nnx.split(compress.eval_view(model))
  state, x = jax.device_put((nnx.as_pure(state), x))
  start = time.perf_counter()
  traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
  run = traced.lower(state, x).compile()
  seconds = time.perf_counter() - start
  return lambda: jax.block_until_ready(run(state, x)), seconds


def take_turns(
  runs: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
  """Times functions in turn, so that a busy machine slows all of them.

  Args:
    runs: by name; each is called once more before, to warm up.
    rounds: how often.

  Returns:
    For each name (wall clock, CPU seconds of this process) of all rounds.
  """
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  for run in runs.values():
    run()
  for _ in range(rounds):
    for name, run in runs.items():
      wall, cpu = time.perf_counter(), time.process_time()
      run()
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      times[name].append((wall, cpu))
  return times


def images_per_second(
  dense, hardened: harden.HardenedModel, x, *, rounds: int = 10
) -> dict[str, float]:
  """Speed of a float model and of what was hardened of it.

  Args:
    dense: the model before compression; its weights do not matter.
    hardened: the model after it.
    x: one batch, [B, ...].
    rounds: how often each runs; the median counts.

  Returns:
    Images per second of 'float32' and of each execution of the integers.
  """
  models = {FLOAT: dense}
  models |= {e: integer.lower(hardened, e) for e in integer.EXECUTIONS}
  runs = {name: compiled(model, x)[0] for name, model in models.items()}
  return {
    name: len(x) / float(np.median([wall for wall, _ in found]))
    for name, found in take_turns(runs, rounds).items()
  }
