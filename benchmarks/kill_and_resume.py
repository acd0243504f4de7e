r"""Kills a run at random moments, resumes it, and compares all bits at the end.

    python benchmarks/kill_and_resume.py --config configs/digits.py --kills 10 \
        --set checkpoint_every=20 --out benchmarks/results/kill_and_resume.json

The undisturbed run comes first.  The other one is killed with SIGKILL after a
random time, again and again, and then left to end.  The reports (but the time
that they took) and all numbers of the artifacts must be the same.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from flax import nnx
import jax
import numpy as np
import result_files

from djpq_jax import experiment


def outcome(workdir: pathlib.Path):
  """What must be the same: the report, and all bits of the artifact."""
  report = json.loads((workdir / 'report.json').read_text())
  for name in ('seconds', 'artifact_bytes'):  # orbax writes dates and names
    del report[name]
  model = experiment.load_artifact(workdir / 'artifact')
  leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
  return report, [np.asarray(leaf).tobytes() for leaf in leaves]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  command = [sys.executable, '-m', 'djpq_jax.cli', 'train']
  command += ['--config', args.config]
  command += [word for text in args.set for word in ('--set', text)]
  moments = random.Random(args.seed)
  kills: list[float] = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    start = time.monotonic()
    whole = [*command, '--workdir', str(folder / 'whole')]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    print(f'undisturbed: {seconds:.0f} s', flush=True)
    killed = [*command, '--workdir', str(folder / 'killed')]
    while len(kills) < args.kills:
      process = subprocess.Popen(killed, stdout=subprocess.DEVNULL)
      wait = moments.uniform(0, 0.6 * seconds)
      try:
        process.wait(wait)
        break  # it ended before
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
      kills.append(round(wait, 2))
      found = sorted((folder / 'killed').glob('checkpoints/*/*'), key=_age)
      at = found[-1].relative_to(folder / 'killed') if found else 'the start'
      print(f'killed after {wait:.1f} s, with {at}', flush=True)
    subprocess.run(killed, check=True, stdout=subprocess.DEVNULL)
    same = outcome(folder / 'killed') == outcome(folder / 'whole')
  print(f'{len(kills)} kills; the same bits: {same}')
  if args.out:
    result: dict[str, Any] = {
      'environment': result_files.environment(),
      'commit': result_files.commit(),
      'kills_after_seconds': kills,
      'undisturbed_seconds': round(seconds, 1),
      'same_bits': same,
    }
    args.out.write_text(json.dumps(result, indent=1) + '\n')
  return 0 if same else 1


def _age(path: pathlib.Path) -> float:
  return os.path.getmtime(path)


if __name__ == '__main__':
  sys.exit(main())
