r"""DJPQ beside its controls, at equal epochs, from reloaded artifacts.

    python benchmarks/compare.py --config configs/digits.py --seeds 0 1 2 \\
        --out benchmarks/results/digits.json

Every contestant of a seed starts from the same trained float model and has the
same number of epochs; controls spend what DJPQ searches on finetuning.  Each
finished run is added to the file at once, and runs that it holds are skipped,
so an interrupted comparison goes on where it stopped.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import flax
import jax
import numpy as np

from djpq_jax import config as config_lib
from djpq_jax import experiment

CONTROLS = {
  'W8A8': {'method': 'uniform', 'uniform_bits': (8, 8)},
  'W4A4': {'method': 'uniform', 'uniform_bits': (4, 4)},
  'W3A3': {'method': 'uniform', 'uniform_bits': (3, 3)},
  'W2A2': {'method': 'uniform', 'uniform_bits': (2, 2)},
}
# A search that begins where grids nearly copy their tensors.
FROM_8_BITS = {'search': {'bits': 8.0, 'ramp': 0.7}}
NO_PRUNING = {'pattern': '*', 'prune': False}


def contestants(base, budgets, shares=()):
  """Name -> what changes in the config `base`.

  Args:
    base: of all contestants.
    budgets: relative BOPs.
    shares: MACs that two-stage may leave after its first stage, in place of
      what `base` says; how much to prune is that method's to guess.
  """
  rules = [dict(rule) for rule in base.rules]
  rows = dict(CONTROLS)
  for budget in budgets:
    at = f'@{budget:.3%}'
    rows[f'DJPQ {at}'] = {'budget': budget}
    rows[f'DJPQ from 8 bits {at}'] = FROM_8_BITS | {'budget': budget}
    rows[f'DJPQ from 8 bits, rewound {at}'] = FROM_8_BITS | {
      'budget': budget,
      'finetune': {'rewind': True},
    }
    rows[f'DJPQ-restrict {at}'] = {
      'budget': budget,
      'bit_choices': (2, 4, 8, 16, 32),
    }
    rows[f'two-stage {at}'] = {'method': 'two_stage', 'budget': budget}
    for share in shares:
      rows[f'two-stage {share:.0%} MACs {at}'] = {
        'method': 'two_stage',
        'two_stage_macs': share,
        'budget': budget,
      }
    for multiple in (4, 8, 16):
      rule = {'pattern': '*', 'align': multiple}
      rows[f'DJPQ align {multiple} {at}'] = {
        'budget': budget,
        'rules': [*rules, rule],
      }
    rows[f'bits only {at}'] = {
      'budget': budget,
      'rules': [*rules, NO_PRUNING],
    }
  return rows


def one(config, model, float_accuracy) -> dict:
  """Compresses a float model as a config says; the figures to compare."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    report = experiment.run(
      config,
      folder,
      trained=model,
      progress=lambda *_: None,
    )
  keys = ('accuracy', 'relative_bops', 'bops', 'macs', 'artifact_bytes')
  kept = {k: report[k] for k in keys}
  kept['float_accuracy'] = float_accuracy
  kept['layers'] = [
    [r['name'], r['kept_in'], r['kept_out'], r['weight_bits'], r['act_bits']]
    for r in report['layers']
  ]
  return kept | {'seconds': round(time.monotonic() - start, 1)}


def commit() -> str:
  """The state of the code."""
  git = ['git', 'describe', '--always', '--dirty', '--exclude=*']
  done = subprocess.run(git, capture_output=True, text=True, check=False)
  return done.stdout.strip()


def environment() -> dict:
  """What made the figures."""
  return {
    'command': ' '.join(['python', *sys.argv]),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores',
    'device': jax.devices()[0].device_kind,
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'flax': flax.__version__,
      'numpy': np.__version__,
    },
  }


def table(runs: list[dict]) -> str:
  """Mean and standard deviation over seeds, as Markdown."""
  lines = [
    '| contestant | seeds | accuracy | relative BOPs |',
    '| --- | --- | --- | --- |',
  ]
  rows: dict[str, list[dict]] = {}
  for run in runs:
    rows.setdefault(run['contestant'], []).append(run)
  for name, found in rows.items():
    accuracy = 100 * np.array([r['accuracy'] for r in found])
    relative = 100 * np.mean([r['relative_bops'] for r in found])
    spread = f' ± {accuracy.std(ddof=1):.2f}' if len(found) > 1 else ''
    lines.append(
      f'| {name} | {len(found)} | {accuracy.mean():.2f}{spread} % | '
      f'{relative:.4f} % |'
    )
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--budgets', type=float, nargs='+')
  parser.add_argument('--two-stage-macs', type=float, nargs='+', default=[])
  parser.add_argument('--only', nargs='+', help='names of contestants')
  parser.add_argument('--out', required=True, type=pathlib.Path)
  args = parser.parse_args()
  base = config_lib.load(args.config, args.set)
  rows = contestants(base, args.budgets or [base.budget], args.two_stage_macs)
  result = {'environment': environment(), 'config': args.config, 'runs': []}
  if args.out.exists():
    result = json.loads(args.out.read_text())
  done = {(r['contestant'], r['seed']) for r in result['runs']}
  wanted = [n for n in rows if not args.only or n in args.only]
  for seed in args.seeds:
    if all((name, seed) in done for name in wanted):
      continue
    config = config_lib.change(base, seed=seed)
    model, accuracy = experiment.float_model(config)
    print(f'seed {seed}: float {accuracy:.2%}', flush=True)
    for name in wanted:
      if (name, seed) in done:
        continue
      changed = config_lib.change(config, **rows[name])
      run = {'contestant': name, 'seed': seed, 'commit': commit()}
      try:
        run |= one(changed, model, accuracy)
      except ValueError as error:  # as a budget that bits alone cannot reach
        print(f'seed {seed}: {name}: {error}', flush=True)
        continue
      if args.out.exists():  # another process may work on other seeds
        result = json.loads(args.out.read_text())
      result['runs'].append(run)
      args.out.parent.mkdir(parents=True, exist_ok=True)
      args.out.write_text(json.dumps(result, indent=1) + '\n')
      print(
        f'seed {seed}: {name} {run["accuracy"]:.2%} at '
        f'{run["relative_bops"]:.4%}, {run["seconds"]} s',
        flush=True,
      )
  print(table(result['runs']))


if __name__ == '__main__':
  main()
