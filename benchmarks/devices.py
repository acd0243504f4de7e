r"""What data parallelism costs: steps per second over devices of one machine.

    python benchmarks/devices.py --model resnet20 --batch 64 --devices 1 2 4 \\
        --out benchmarks/results/devices.json

Every count of devices gets a process of its own, with as many virtual devices
of the CPU; they share its cores, so the same global batch would take the same
time on any number of them if nothing were lost.  What the devices tell each
other in a step is counted in the compiled program: the bytes of its
all-reduces.  They are timed alone, too.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import result_files
import step_cost

from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import models
from djpq_jax import optim
from djpq_jax import parallel
from djpq_jax import train

BYTES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'pred': 1, 'f16': 2}
WARM_UP = 2  # steps that do not count


def exchanged(program: str) -> int:
  """Bytes that each device gives to the all-reduces of a compiled program.

  >>> exchanged('%a = (f32[2,3]{1,0}, f32[]) all-reduce(%b, %c), channel_id=1')
  28
  """
  total = 0
  for line in program.splitlines():
    found = re.search(r'= (.*?) all-reduce(?:-start)?\(', line)
    for kind, shape in re.findall(
      r'(\w+)\[([\d,]*)\]', found[1] if found else ''
    ):
      total += BYTES[kind] * int(
        np.prod([int(n) for n in shape.split(',') if n])
      )
  return total


def seconds_of(fn, rounds: int) -> float:
  """Median wall clock of a function of no arguments."""
  times = []
  for _ in range(rounds + WARM_UP):
    start = time.perf_counter()
    jax.block_until_ready(fn())
    times.append(time.perf_counter() - start)
  return float(np.median(times[WARM_UP:]))


def measure(name: str, count: int, wrapper: str, steps: int) -> dict:
  """The step of the search on all devices of this process."""
  model = models.create(name)
  batch = step_cost.random_batch(model, count)
  net = compress.compress(model, (), batch['image'][:8])
  controller = budget_lib.Controller(budget=0.01, start=0.06, steps=1000)
  objective = train.Objective(noisy=True, controller=controller)
  tx = optim.make(optim.OptimizerConfig(), 1000)
  mesh = parallel.mesh()
  wrap = {'jit': parallel.jit_step, 'pmap': parallel.pmap_step}[wrapper]
  state = parallel.replicate(train.init(net, objective, tx), mesh)
  batch = parallel.spread(batch, mesh)
  jitted: Any = wrap(train.train_step, mesh)
  step = jitted.lower(state, batch).compile()

  def advance():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics

  seconds = seconds_of(advance, steps)
  size = exchanged(step.as_text())
  return {
    'model': name,
    'batch': count,
    'wrapper': wrapper,
    'devices': mesh.size,
    'steps_per_second': round(1 / seconds, 3),
    'images_per_second': round(count / seconds, 1),
    'exchanged_bytes': size,
    'exchange_seconds': round(exchange_seconds(mesh, size, steps), 5),
  }


def exchange_seconds(mesh, size: int, rounds: int) -> float:
  """Time of one all-reduce of so many bytes, alone."""
  if mesh.size == 1:
    return 0.0
  spec = jax.sharding.PartitionSpec
  numbers = jnp.zeros(max(1, size // 4), jnp.float32)

  @jax.jit
  @jax.shard_map(mesh=mesh, in_specs=spec(), out_specs=spec(), check_vma=False)
  def total(x):
    return jax.lax.psum(x, parallel.AXIS)

  numbers = parallel.replicate(numbers, mesh)
  return seconds_of(lambda: total(numbers), rounds)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='resnet20')
  parser.add_argument('--batch', type=int, default=64, help='of all devices')
  parser.add_argument('--devices', type=int, nargs='+', default=[1, 2, 4])
  parser.add_argument('--wrappers', nargs='+', default=['jit', 'pmap'])
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path, help='rows are added to it')
  parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.here:
    made = {
      'commit': result_files.commit(),
      'load': round(os.getloadavg()[0], 1),
      'environment': result_files.environment(),
    }
    row = measure(args.model, args.batch, args.wrappers[0], args.steps)
    print(json.dumps(row | made))
    return
  result: dict[str, Any] = {'runs': []}
  if args.out and args.out.exists():
    result = json.loads(args.out.read_text())
  for wrapper in args.wrappers:
    for count in args.devices:
      flag = f'--xla_force_host_platform_device_count={count}'
      command = [sys.executable, __file__, '--here', '--model', args.model]
      command += ['--batch', str(args.batch), '--steps', str(args.steps)]
      done = subprocess.run(
        [*command, '--wrappers', wrapper],
        env=os.environ | {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
      )
      row = json.loads(done.stdout.splitlines()[-1])
      row['environment']['command'] = result_files.environment()['command']
      result['runs'].append(row)
      print(json.dumps(result['runs'][-1]), flush=True)
  if args.out:
    args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
