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
from collections.abc import Callable
import difflib
import functools
import pathlib
import re
import tempfile
import time

import ablations
import contestants
import jax
import numpy as np
import result_files

from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import files
from djpq_jax import interruption
from djpq_jax import train
from djpq_jax import workdir


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
    found = figures(config, folder, trained=model)
  return found | {'seconds': round(time.monotonic() - start, 1)}


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
      found = figures(config, folder, float_dir=float_dir, stop=signals.seen)
  except train.Interrupted as error:
    print(f'{folder}: {error}', flush=True)
    raise SystemExit(interruption.EXIT_STATUS) from error
  return found | {'commit': ', '.join(commits)}


def figures(config, folder, **options) -> dict:
  """Runs an experiment; what is compared of its report."""
  report = experiment.run(config, folder, lambda *_: None, **options)
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


def outcome(name: str, make: Callable[[], dict]) -> tuple[dict, str]:
  """What a contestant's run ends with, and the same in words."""
  found = {'commit': result_files.commit()}
  try:
    with ablations.patched(name.partition(' @')[0]):
      found |= make()
    said = f'{found["accuracy"]:.2%} at {found["relative_bops"]:.4%}'
  except train.CheckpointError:
    raise  # says nothing about the contestant
  except (ValueError, train.TrainingError) as error:
    # As a budget that bits alone cannot reach: one sentence for the user.
    found['error'] = said = f'{type(error).__name__}: {error}'
  # A process that kept the programs of nineteen runs ended in the next, where
  # the compiler could not allocate memory.
  jax.clear_caches()
  return found, said


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


def arguments() -> argparse.ArgumentParser:
  """What the command line takes."""
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
  return parser


def wanted_rows(base, args) -> dict[str, dict]:
  """Name -> what changes in the config, of the contestants asked for.

  Raises:
    ValueError: names that say two things, or one that says nothing.
  """
  budgets = args.budgets or [base.budget]
  rows = contestants.named(base, budgets, args.two_stage_macs)
  unknown = [name for name in args.only or () if name not in rows]
  if unknown:
    near = difflib.get_close_matches(unknown[0], rows, n=3)
    raise ValueError(
      f'there is no contestant {unknown[0]!r} at these budgets'
      + (f'; near: {", ".join(near)}' if near else '')
    )
  return {
    name: fields
    for name, fields in rows.items()
    if not args.only or name in args.only
  }


def main():
  parser = arguments()
  args = parser.parse_args()
  base = config_lib.load(args.config, args.set)
  try:
    rows = wanted_rows(base, args)
  except ValueError as error:
    parser.error(str(error))
  wanted = {
    (name, seed): config_lib.change(base, seed=seed, **fields)
    for seed in args.seeds
    for name, fields in rows.items()
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
    for name, _ in left:
      config = wanted[name, seed]
      if args.workdirs:
        folder = args.workdirs / folder_name(name, seed)
        floats = float_dir / f'seed-{seed}'
        make = functools.partial(one_kept, config, folder, floats)
      else:
        make = functools.partial(one, config, model)
      run = {'contestant': name, 'seed': seed, 'settings': told[name, seed]}
      found, said = outcome(name, make)
      result_files.add(args.out, [run | found], config=args.config)
      print(f'seed {seed}: {name} {said}', flush=True)
  print(table(result_files.runs_of(args.out)))


if __name__ == '__main__':
  main()
