r"""The searches of several budgets in one program, beside one after the other.

    python benchmarks/vectorised_search.py --models digits_cnn resnet8 \\
        --batches 64 --budgets 3 --out benchmarks/results/vectorised_search.json

Several states are stacked and `train_step` is mapped over them with `jax.vmap`;
all see the same batch.  The step that results and as many single ones take
turns on random images, and the ratio of their medians counts.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import result_files
import step_cost

from djpq_jax import models
from djpq_jax import train


def measure(name: str, count: int, budgets: int, steps: int) -> dict[str, Any]:
  """Seconds of a step for all budgets, vectorised and one by one."""
  single = step_cost.contestants(models.create(name), count, 'float32')[
    'search'
  ]
  states = jax.tree.map(lambda x: jnp.stack([x] * budgets), single.state)
  start = time.perf_counter()
  mapped = jax.vmap(train.train_step, in_axes=(0, None))
  step = jax.jit(mapped, donate_argnums=0).lower(states, single.batch).compile()
  compile_seconds = time.perf_counter() - start
  seconds = []
  for _ in range(steps + step_cost.WARM_UP):
    single.run()
    start = time.perf_counter()
    states, metrics = step(states, single.batch)
    jax.block_until_ready((states, metrics))
    seconds.append(time.perf_counter() - start)
  together = float(np.median(seconds[step_cost.WARM_UP :]))
  return {
    'model': name,
    'batch': count,
    'budgets': budgets,
    'together_seconds': round(together, 4),
    'in_turn_seconds': round(budgets * single.median, 4),
    'speedup': round(budgets * single.median / together, 2),
    'compile_seconds': round(compile_seconds, 1),
    'compile_one_seconds': round(single.compile_seconds, 1),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--models', nargs='+', default=['resnet8'])
  parser.add_argument('--batches', type=int, nargs='+', default=[64])
  parser.add_argument('--budgets', type=int, default=3)
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  result: dict[str, Any] = {
    'commit': result_files.commit(),
    'environment': result_files.environment(),
    'runs': [],
  }
  for name in args.models:
    for count in args.batches:
      row = measure(name, count, args.budgets, args.steps)
      result['runs'].append(row)
      print(json.dumps(row), flush=True)
  args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
