r"""Where the time of a compressed training step goes.

    taskset -c 0 python benchmarks/step_profile.py --models resnet20 \\
        --batches 32 128 --out benchmarks/results/step_profile.json

Steps of the float model and of the search are traced; each operation that XLA
ran is put down to the part of the step that it was compiled from: products
(convolutions and matrices), quantizers, gates, the cost with its controller,
the optimizer, and what is left, as batch norm.  On one core, so that the times
of operations add up.
"""

import argparse
import collections
import json
import pathlib
import re
import tempfile
from typing import Any

import jax
import result_files
import step_cost

from djpq_jax import models

# The parts are named scopes of the library; an operation belongs to the first
# of them in its name, a fusion to the part of its result.
PARTS = {
  'quantizers': 'quantize',
  'gates': 'gate',
  'cost': 'cost',
  'optimizer': 'optimizer',
  'products': 'conv_general_dilated|dot_general|conv2d',
}


def parts_of(compiled) -> dict[str, str]:
  """Instruction of a compiled program -> the part that it belongs to."""
  found = {}
  line = re.compile(r'%?([\w.\-]+) = .*op_name="([^"]*)"')
  for instruction, name in line.findall(compiled.as_text()):
    names = re.split(r'[/()]', name)
    found[instruction] = next(
      (
        part
        for part, pattern in PARTS.items()
        if any(re.fullmatch(pattern, n) for n in names)
      ),
      'other',
    )
  return found


def traced(contestant: step_cost.Contestant, steps: int) -> dict[str, float]:
  """Milliseconds of a step, by part."""
  parts = parts_of(contestant.step)
  total: collections.Counter[str] = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        contestant.run()
    (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = (
      e for plane in planes for line in plane.lines for e in line.events
    )
    for event in events:
      name = dict(event.stats).get('hlo_op')
      if name in parts:
        total[parts[name]] += event.duration_ns / 1e6 / steps
  return {part: round(ms, 2) for part, ms in total.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--models', nargs='+', default=['resnet20'])
  parser.add_argument('--batches', type=int, nargs='+', default=[128])
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  made = {
    'commit': result_files.commit(),
    'environment': result_files.environment(),
  }
  runs: list[dict[str, Any]] = []
  for name in args.models:
    for count in args.batches:
      found = step_cost.contestants(models.create(name), count, 'float32')
      for phase in ('float', 'search'):
        step = found[phase]
        for _ in range(step_cost.WARM_UP):
          step.run()
        row = {'model': name, 'batch': count, 'phase': phase}
        row |= {'milliseconds': traced(step, args.steps)}
        row |= {'step_milliseconds': round(1e3 * step.median, 2)}
        runs.append(row)
        print(json.dumps(row), flush=True)
  args.out.write_text(json.dumps(made | {'runs': runs}, indent=1) + '\n')


if __name__ == '__main__':
  main()
