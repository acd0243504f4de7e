r"""What a compressed training step costs over the float step of the same model.

    python benchmarks/step_cost.py --models resnet20 resnet56 --batches 128 \\
        --out benchmarks/results/step_cost.json

The float step, the search's, those of both stages of the two-stage control (of
gates and of bits alone) and the finetuning's, which is that of the uniform
controls too, take turns in one process, on random images; the ratio of their
medians counts.  With them come compile times and the memory that XLA plans: for
all of a step, and for temporaries alone.  On a GPU, as ImageNet is trained:

    python benchmarks/step_cost.py --models resnet18 --size 224 --batches 256 \\
        --dtype bfloat16 --steps 50 --out benchmarks/results/step_cost.json
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import result_files

from djpq_jax import allocate
from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import graph
from djpq_jax import models
from djpq_jax import optim
from djpq_jax import train
from djpq_jax.experiment import methods

WARM_UP = 2  # steps that do not count


class Contestant:
  """A compiled step and its state."""

  def __init__(self, model, objective, batch, dtype):
    tx = optim.make(optim.OptimizerConfig(), 1000)
    self.state = train.init(model, objective, tx, dtype=dtype)
    self.batch = batch
    start = time.perf_counter()
    self.step = train.jit_step.lower(self.state, batch).compile()
    self.compile_seconds = time.perf_counter() - start
    planned: Any = self.step.memory_analysis()
    self.temporaries = planned.temp_size_in_bytes
    self.memory = (  # bytes; a donated state is counted once
      planned.temp_size_in_bytes
      + planned.argument_size_in_bytes
      + planned.output_size_in_bytes
      - planned.alias_size_in_bytes
    )
    self.seconds: list[float] = []

  def run(self):
    """Takes a step."""
    start = time.perf_counter()
    self.state, metrics = self.step(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))
    self.seconds.append(time.perf_counter() - start)

  @property
  def median(self) -> float:
    """Seconds of a step."""
    return float(np.median(self.seconds[WARM_UP:]))


def random_batch(model, count: int) -> dict[str, np.ndarray]:
  """Images and labels that a model takes."""
  rng = np.random.default_rng(0)
  return {
    'image': rng.standard_normal((count, *model.input_shape), np.float32),
    'label': rng.integers(0, 10, count, np.int32),
  }


def contestants(model, count: int, dtype: str) -> dict[str, Contestant]:
  """All kinds of steps of one model at one batch size."""
  batch = jax.device_put(random_batch(model, count))
  sample = batch['image'][:8]
  net = compress.compress(model, (), sample)
  gated = compress.compress(model, [methods.UNQUANTIZED], sample)
  quantized = compress.compress(model, [methods.UNPRUNED], sample)
  controller = budget_lib.Controller(budget=0.01, start=0.06, steps=1000)
  plan = allocate.uniform(net, 4, 4)
  frozen = compress.freeze(net, plan, sample)
  objective = train.Objective(noisy=True, controller=controller)
  return {
    'float': Contestant(model, train.Objective(), batch, dtype),
    'search': Contestant(net, objective, batch, dtype),
    'gates alone': Contestant(gated, objective, batch, dtype),
    'bits alone': Contestant(quantized, objective, batch, dtype),
    'finetune': Contestant(frozen, train.Objective(), batch, dtype),
  }


def measure(
  name: str, size: int | None, count: int, steps: int, dtype: str
) -> list[dict]:
  """The steps of one model at one batch size, in turn."""
  kwargs: Any = {'input_shape': (size, size, 3)} if size else {}
  model = models.create(name, **kwargs)
  layers = len(graph.trace(model, random_batch(model, 1)['image']).layers)
  found = contestants(model, count, dtype)
  for _ in range(steps + WARM_UP):
    for contestant in found.values():
      contestant.run()
  base = found['float']
  return [
    {
      'model': name,
      'input_shape': list(model.input_shape),
      'batch': count,
      'dtype': dtype,
      'layers': layers,
      'phase': phase,
      'step_seconds': round(step.median, 4),
      'images_per_second': round(count / step.median, 1),
      'over_float': round(step.median / base.median, 3),
      'compile_seconds': round(step.compile_seconds, 2),
      'memory_MB': round(step.memory / 1e6, 1),
      'temporaries_MB': round(step.temporaries / 1e6, 1),
    }
    for phase, step in found.items()
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--models', nargs='+', default=['resnet20'])
  parser.add_argument('--batches', type=int, nargs='+', default=[128])
  parser.add_argument('--size', type=int, help='side of the images')
  parser.add_argument('--dtype', default='float32', help='or bfloat16')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path, help='rows are added to it')
  args = parser.parse_args()
  result: dict[str, Any] = {'runs': []}
  if args.out and args.out.exists():
    result = json.loads(args.out.read_text())
  environment = result_files.environment()
  for name in args.models:
    for count in args.batches:
      made = {
        'commit': result_files.commit(),
        'load': round(os.getloadavg()[0], 1),
        'environment': environment,
      }
      for row in measure(name, args.size, count, args.steps, args.dtype):
        result['runs'].append(row | made)
        print(json.dumps(row), flush=True)
      if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
