"""What a compressed training step costs, over the float step of the same model.

    python benchmarks/step_cost.py [--model resnet20] [--batch 128] [--steps 10]

Both steps run in turn in one process, on random images; the ratio of their
medians is printed, with compile times and the memory XLA plans for temporaries.
"""

import argparse
import json
import time

import jax
import numpy as np

from djpq_jax import allocate
from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import models
from djpq_jax import optim
from djpq_jax import train


def compiled(model, objective, batch):
  """Returns (state, compiled step, seconds to trace and compile)."""
  tx = optim.make(optim.OptimizerConfig(), 1000)
  state = train.init(model, objective, tx)
  start = time.perf_counter()
  step = train.jit_step.lower(state, batch).compile()
  return state, step, time.perf_counter() - start


def one_step(step, state, batch):
  """Returns (next state, seconds)."""
  start = time.perf_counter()
  state, metrics = step(state, batch)
  jax.block_until_ready((state, metrics))
  return state, time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet20')
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--steps', type=int, default=10)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  model = models.create(args.model)
  shape = (args.batch, *model.input_shape)
  batch = {
    'image': rng.standard_normal(shape, np.float32),
    'label': rng.integers(0, 10, args.batch, np.int32),
  }
  net = compress.compress(model, (), batch['image'])
  controller = budget_lib.Controller(budget=0.01, start=0.06, steps=1000)
  frozen = compress.freeze(net, allocate.uniform(net, 4, 4), batch['image'])
  contestants = {
    'float': (model, train.Objective()),
    'search': (net, train.Objective(noisy=True, controller=controller)),
    'finetune': (frozen, train.Objective()),
  }
  found = {}
  for name, (net_, objective) in contestants.items():
    state, step, seconds = compiled(net_, objective, batch)
    memory = step.memory_analysis().temp_size_in_bytes
    found[name] = dict(
      state=state, step=step, compile=seconds, memory=memory, seconds=[]
    )
  for _ in range(args.steps + 2):
    for row in found.values():
      row['state'], seconds = one_step(row['step'], row['state'], batch)
      row['seconds'].append(seconds)
  base = np.median(found['float']['seconds'][2:])
  for name, row in found.items():
    median = np.median(row['seconds'][2:])
    result = {
      'phase': name,
      'step_seconds': round(float(median), 4),
      'over_float': round(float(median / base), 3),
      'compile_seconds': round(row['compile'], 2),
      'temporaries_MB': round(row['memory'] / 1e6, 1),
    }
    print(json.dumps(result))


if __name__ == '__main__':
  main()
