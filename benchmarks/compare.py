r"""DJPQ beside its controls, at equal epochs, from reloaded artifacts.

    python benchmarks/compare.py --config configs/digits.py --seeds 0 1 2 \\
        --out benchmarks/results/digits.json

Every contestant of a seed starts from the same trained float model and has the
same number of epochs; controls spend what DJPQ searches on finetuning.  Each
finished run is added to the file at once, and runs that it holds are skipped,
so an interrupted comparison goes on where it stopped: with the run that it was
at, or with --workdirs amid it.
"""

import argparse
import difflib
import pathlib
import re
import tempfile
import time
from typing import Any

import ablations
import jax
import numpy as np
import result_files

from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import files
from djpq_jax import interruption
from djpq_jax import train
from djpq_jax import workdir

CONTROLS: dict[str, dict[str, Any]] = {
  'W8A8': {'method': 'uniform', 'uniform_bits': (8, 8)},
  'W4A4': {'method': 'uniform', 'uniform_bits': (4, 4)},
  'W3A3': {'method': 'uniform', 'uniform_bits': (3, 3)},
  'W2A2': {'method': 'uniform', 'uniform_bits': (2, 2)},
  'W1A2': {'method': 'uniform', 'uniform_bits': (1, 2)},
}
# Bits between whole ones everywhere, and of kernels two at least; or whole ones
# alone, and one at least.
REAL_BITS = {'search': {'whole_bits_to': 0}}
WHOLE_BITS = {'search': {'whole_bits_to': 16}}
WHOLE_TO_2 = {'search': {'whole_bits_to': 2}}
# What is done otherwise, each alone: a contestant 'DJPQ NAME @BUDGET'.
FROM_8_BITS = {'search': {'bits': 8.0, 'ramp': 0.7}}
ABLATIONS: dict[str, dict[str, Any]] = {
  'from 8 bits': FROM_8_BITS,
  'from 8 bits, rewound': FROM_8_BITS | {'finetune': {'rewind': True}},
  'rewound': {'finetune': {'rewind': True}},
  'without teacher': {'search': {'distill': 0.0}, 'finetune': {'distill': 0.0}},
  # The rate of the weights falls once, not in the search and then again.
  'one schedule': {
    'search': {'optimizer': {'anneal': False}},
    'finetune': {'optimizer': {'warmup': 0.0}},
  },
  'a fast ramp': {'search': {'ramp': 0.1}},
  'KL 1e-4': {'search': {'kl_weight': 1e-4}},
  'KL 1e-3': {'search': {'kl_weight': 1e-3}},
  'statistics of the training': {'statistics_batches': 0},
  'without rules': {'rules': ()},
  'real-valued bits': REAL_BITS,
  'whole bits': WHOLE_BITS,
  'whole bits to 2': WHOLE_TO_2,
  'MACs to 80%': {'budget_macs': 0.8},
}
# Likewise, by a rule for all layers after those of the experiment.
RULES = {
  'per channel': {'per_channel': True},
  'exponents': {'exponent': True},
  'narrow range': {'narrow_range': True},
  'signed inputs': {'asymmetric': False},
  'with a zero': {'mid_rise': False},
  'bits only': {'prune': False},
  'channels only': {'weight_bits': (8, 8), 'act_bits': (8, 8)},
  'align 4': {'align': 4},
  'align 8': {'align': 8},
  'align 16': {'align': 16},
}


def contestants(base, budgets, shares=()):
  """Name -> what changes in the config `base`.

  Args:
    base: of all contestants.
    budgets: relative BOPs.
    shares: MACs that two-stage may leave after its first stage, in place of
      what `base` says; how much to prune is that method's to guess.

  Raises:
    ValueError: two budgets or two shares would have one name.
  """
  names = [f'{budget:.3%}' for budget in budgets]
  names += [f'{share:.0%} of the MACs' for share in shares]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise ValueError(f'two budgets or shares would have one name, {twice[0]}')

  rules = [dict(rule) for rule in base.rules]

  def ruled(fields):
    return {'rules': [*rules, {'pattern': '*', **fields}]}

  # What the experiment says of single layers still holds.
  two_bits = {'rules': [{'pattern': '*', 'weight_bits': (2, 8)}, *rules]}

  # Trained on for as long, to tell what longer training alone brings.
  rows: dict[str, dict[str, Any]] = {'float': {'method': 'float'}, **CONTROLS}
  for name, control in CONTROLS.items():
    for variant in ('per channel', 'signed inputs', 'with a zero'):
      rows[f'{name} {variant}'] = control | ruled(RULES[variant])
  del rows['W1A2 with a zero']  # of one bit there is none
  fast_gates = {'gate_rate': 2 * base.search.optimizer.gate_rate}
  methods = {
    'DJPQ': {},
    'DJPQ gates twice as fast': {'search': {'optimizer': fast_gates}},
    'DJPQ rates x 10': _rates(base, 10.0),
    'DJPQ rates / 10': _rates(base, 0.1),
    'DJPQ half the search': _half_the_search(base),
    **{f'DJPQ {name}': fields for name, fields in ABLATIONS.items()},
    **{f'DJPQ {name}': {} for name in ablations.PATCHES},
    **{f'DJPQ {name}': ruled(fields) for name, fields in RULES.items()},
    'DJPQ-restrict': {'bit_choices': (2, 4, 8, 16, 32)},
    'two-stage': {'method': 'two_stage'},
  }
  methods['DJPQ two bits or more'] = two_bits
  for share in shares:
    two_stage = {'method': 'two_stage', 'two_stage_macs': share}
    methods[f'two-stage {share:.0%} MACs'] = two_stage
  for budget in budgets:
    for name, fields in methods.items():
      rows[f'{name} @{budget:.3%}'] = fields | {'budget': budget}
  return rows


def _rates(base, factor: float) -> dict:
  """Every learning rate of the compression, times a factor."""
  found = {}
  for phase in ('search', 'finetune'):
    optimizer = base[phase].optimizer
    names = [n for n in optimizer if n.endswith('_rate')]
    found[phase] = {'optimizer': {n: factor * optimizer[n] for n in names}}
  return found


def _half_the_search(base) -> dict:
  """Half of it goes to finetuning; bits and gates move twice as fast."""
  epochs = base.search.epochs / 2
  optimizer = base.search.optimizer
  rates = {n: 2 * optimizer[n] for n in ('quantizer_rate', 'gate_rate')}
  return {
    'search': {'epochs': epochs, 'optimizer': rates},
    'finetune': {'epochs': base.finetune.epochs + epochs},
  }


def float_model(config, folder: pathlib.Path | None):
  """A float model and its accuracy; `folder` keeps those of all seeds."""
  if folder is None:
    return experiment.float_model(config)
  path = folder / f'seed-{config.seed}'
  claim(path, config, 'the float model')
  return experiment.float_model(config, float_dir=path)


def claim(path: pathlib.Path, config, what: str) -> None:
  """Makes a folder that of a config and its seed, which it may be already."""
  home = workdir.Workdir(path, config)
  try:
    home.check()
  except ValueError as error:
    raise SystemExit(
      f'{path} is not {what} of this config and seed: choose another '
      '--float-dir or --workdirs'
    ) from error
  home.claim()


def one(config, model) -> dict:
  """Compresses a float model as a config says; the figures to compare."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    report = experiment.run(
      config,
      folder,
      trained=model,
      progress=lambda *_: None,
    )
  seconds = round(time.monotonic() - start, 1)
  return figures(report) | {'seconds': seconds}


def folder_name(contestant: str, seed: int) -> str:
  """Where a run is kept, among those of others.

  >>> folder_name('DJPQ rates / 10 @0.200%', 3)
  'DJPQ-rates-10-0.200-seed-3'
  """
  words = re.findall(r'[\w.-]+', contestant)
  return '-'.join([*words, 'seed', str(seed)])


def one_kept(config, folder: pathlib.Path, float_dir: pathlib.Path) -> dict:
  """Likewise, in a folder that is kept and gone on with.

  Args:
    config: of the contestant, with its seed.
    folder: of the run; has its checkpoints and, in the end, its artifact.
    float_dir: that of the float model.

  Raises:
    SystemExit: a signal came; the run is saved.
  """
  claim(folder, config, 'the run')
  # A run may be begun by one version, and ended by another.
  made_by = folder / 'commits.txt'
  commits = made_by.read_text().split() if made_by.exists() else []
  commits = list(dict.fromkeys([*commits, result_files.commit()]))
  files.replace(made_by, ('\n'.join(commits) + '\n').encode())
  try:
    with interruption.Signals() as signals:
      report = experiment.run(
        config,
        folder,
        float_dir=float_dir,
        progress=lambda *_: None,
        stop=signals.seen,
      )
  except train.Interrupted as error:
    print(f'{folder}: {error}', flush=True)
    raise SystemExit(interruption.EXIT_STATUS) from error
  return figures(report) | {'commit': ', '.join(commits)}


def figures(report: dict) -> dict:
  """What is compared, of a report."""
  keys = [
    *('accuracy', 'cross_entropy'),
    *('relative_bops', 'bops', 'macs', 'artifact_bytes', 'float_accuracy'),
  ]
  kept = {k: report[k] for k in keys}
  kept['layers'] = [
    [r['name'], r['kept_in'], r['kept_out'], r['weight_bits'], r['act_bits']]
    for r in report['layers']
  ]
  return kept


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
  """Contestant -> its runs, in the order in which they were first met."""
  found: dict[str, list[dict]] = {}
  for run in runs:
    found.setdefault(run['contestant'], []).append(run)
  return found


def markdown(head: str, rows: list[list[str]]) -> str:
  """A table; `head` has the columns' names with ` | ` between them."""
  lines = [f'| {head} |', '| --- ' * (head.count(' | ') + 1) + '|']
  lines += [f'| {" | ".join(cells)} |' for cells in rows]
  return '\n'.join(lines) + '\n\n'


def accuracy(runs: list[dict]) -> str:
  """Mean and standard deviation over seeds, in percent."""
  percent = 100 * np.array([run['accuracy'] for run in runs])
  spread = f' ± {percent.std(ddof=1):.2f}' if len(runs) > 1 else ''
  return f'{percent.mean():.2f}{spread} %'


def table(runs: list[dict]) -> str:
  """Mean and standard deviation over seeds that ended well, as Markdown."""
  rows = []
  for name, all_seeds in grouped(runs).items():
    found = [r for r in all_seeds if 'error' not in r]
    if not found:
      rows.append([name, f'0 of {len(all_seeds)}', '', ''])
      continue
    relative = 100 * np.mean([r['relative_bops'] for r in found])
    seeds = str(len(found))
    if len(found) < len(all_seeds):
      seeds += f' of {len(all_seeds)}'
    rows.append([name, seeds, accuracy(found), f'{relative:.4f} %'])
  return markdown(
    'contestant | seeds | accuracy | relative BOPs', rows
  ).rstrip()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--budgets', type=float, nargs='+')
  parser.add_argument('--two-stage-macs', type=float, nargs='+', default=[])
  parser.add_argument('--only', nargs='+', help='names of contestants')
  parser.add_argument(
    '--float-dir', type=pathlib.Path, help='where float models are kept'
  )
  parser.add_argument(
    '--workdirs',
    type=pathlib.Path,
    help='where runs, and float models, are kept; interrupted, they go on',
  )
  parser.add_argument('--out', required=True, type=pathlib.Path)
  args = parser.parse_args()
  base = config_lib.load(args.config, args.set)
  try:
    rows = contestants(base, args.budgets or [base.budget], args.two_stage_macs)
  except ValueError as error:
    parser.error(str(error))
  unknown = [name for name in args.only or () if name not in rows]
  if unknown:
    near = difflib.get_close_matches(unknown[0], rows, n=3)
    parser.error(
      f'there is no contestant {unknown[0]!r} at these budgets'
      + (f'; near: {", ".join(near)}' if near else '')
    )
  wanted = {
    (name, seed): config_lib.change(base, seed=seed, **rows[name])
    for seed in args.seeds
    for name in rows
    if not args.only or name in args.only
  }
  told = {key: result_files.settings(config) for key, config in wanted.items()}
  done = result_files.finished(args.out, ('contestant', 'seed'), told)
  float_dir = args.float_dir
  if args.workdirs and not float_dir:
    float_dir = args.workdirs / 'float'
  for seed in args.seeds:
    left = [key for key in wanted if key[1] == seed and key not in done]
    if not left:
      continue
    config = config_lib.change(base, seed=seed)
    model, float_accuracy = float_model(config, float_dir)
    print(f'seed {seed}: float {float_accuracy:.2%}', flush=True)
    for key in left:
      name, _ = key
      run = {'contestant': name, 'seed': seed, 'settings': told[key]}
      run |= {'commit': result_files.commit()}
      try:
        with ablations.patched(name.partition(' @')[0]):
          if args.workdirs:
            folder = args.workdirs / folder_name(*key)
            floats = float_dir / f'seed-{seed}'
            run |= one_kept(wanted[key], folder, floats)
          else:
            run |= one(wanted[key], model)
        said = f'{run["accuracy"]:.2%} at {run["relative_bops"]:.4%}'
      except train.CheckpointError:
        raise  # says nothing about the contestant
      except (ValueError, train.TrainingError) as error:
        # As a budget that bits alone cannot reach: one sentence for the user.
        run['error'] = said = f'{type(error).__name__}: {error}'
      # A process that kept the programs of nineteen runs ended in the next,
      # where the compiler could not allocate memory.
      jax.clear_caches()
      result_files.add(args.out, [run], config=args.config)
      print(f'seed {seed}: {name} {said}', flush=True)
  print(table(result_files.runs_of(args.out)))


if __name__ == '__main__':
  main()
