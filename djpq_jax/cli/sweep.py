"""`djpq sweep`: several budgets from one float model."""

import argparse
import json
from typing import Any

import jax
import rich.console
import rich.table

from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import files
from djpq_jax import parallel
from djpq_jax import report as report_lib
from djpq_jax import train
from djpq_jax import workdir
from djpq_jax.cli import options
from djpq_jax.cli import training

FILE_NAME = 'sweep.json'
POINT_KEYS = (
  'budget',
  'relative_bops',
  'accuracy',
  'float_accuracy',
  'macs',
  'float_macs',
  'bops',
  'artifact_bytes',
)


def add_command(commands) -> None:
  """Adds `sweep` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'sweep', help='run an experiment at several budgets, from one float model'
  )
  options.add_config(command)
  command.add_argument(
    '--budgets',
    required=True,
    type=_budgets,
    metavar='B,B,...',
    help='relative BOPs, as 0.02,0.01,0.005',
  )
  options.add_workdir(command)
  options.add_cluster(command)
  command.set_defaults(run=_run)


def _budgets(text: str) -> list[float]:
  try:
    budgets = sorted({float(part) for part in text.split(',')}, reverse=True)
  except ValueError:
    budgets = []
  if not budgets or not all(0 < budget < 1 for budget in budgets):
    raise argparse.ArgumentTypeError(
      f'{text!r} is no list of fractions of the float32 BOPs, as 0.02,0.01'
    )
  return budgets


def _run(args) -> None:
  base = config_lib.change(
    config_lib.load(args.config, args.set), budget=args.budgets[-1]
  )
  if base.method not in experiment.SEARCHING:
    raise ValueError(f'method {base.method} has no budget to sweep over')
  options.join_cluster(args)
  console = rich.console.Console(quiet=not parallel.is_first())
  # The folder stands for all budgets, so that more can be added later.
  home = workdir.Workdir(
    files.path(args.workdir), config_lib.change(base, budget=0.0)
  )
  home.check(overwrite=args.overwrite)
  experiment.check(base)  # the smallest budget is the hardest to reach
  parallel.wait('checked the sweep')
  if parallel.is_first():
    home.claim(overwrite=args.overwrite)
  parallel.wait('claimed the sweep')
  points: list[dict[str, Any]] = []
  try:
    with training.stopping() as stop:
      _run_all(args.budgets, base, home, console, stop, points)
  except (train.TrainingError, ValueError):  # of one budget; others stand
    _finish(points, base, home, console)
    raise
  _finish(points, base, home, console)


def _run_all(budgets, base, home, console, stop, points) -> None:
  """Runs all budgets, or what is left of them; appends to `points`."""
  for number, budget in enumerate(budgets, 1):
    if stop():  # it came when the budget before had no step left to stop at
      raise train.Interrupted(
        f'stopped after {len(points)} of {len(budgets)} budgets; the same '
        'command goes on from there'
      )
    folder = home.path / f'budget-{budget:g}'
    console.rule(f'budget {budget:.3%}, {number} of {len(budgets)}')
    config = config_lib.change(base, budget=budget)
    work = workdir.Workdir(folder, config)
    work.check()
    report, _ = training.carry_out(
      config, work, console, stop, float_dir=home.path
    )
    points.append(_point(report, folder.name))
    # No other budget has the same programs, and a process that kept those of
    # nineteen runs was seen to end for want of memory to compile in.
    jax.clear_caches()


def _earlier(home, base, listed: set[str]) -> list[dict[str, Any]]:
  """Points of budgets that are finished there, and not listed this time."""
  points = []
  for path in home.path.glob('budget-*'):
    report = workdir.Workdir(path, base).report()
    if path.name not in listed and report is not None:
      points.append(_point(report, path.name))
  return points


def _point(report: dict[str, Any], folder: str) -> dict[str, Any]:
  return {key: report[key] for key in POINT_KEYS} | {'folder': folder}


def _finish(points, base, home: workdir.Workdir, console) -> None:
  """Writes, draws and prints what the budgets came to, if any did."""
  if not parallel.is_first():
    return
  points = points + _earlier(home, base, {p['folder'] for p in points})
  if not points:
    return
  points.sort(key=lambda point: -point['budget'])
  folder = home.path
  content = json.dumps({'points': points}, indent=1) + '\n'
  files.replace(folder / FILE_NAME, content)
  picture = report_lib.plot_pareto(
    {'': points}, folder / 'pareto.png', points[0]['float_accuracy']
  )
  table = rich.table.Table()
  for name in ('budget', 'BOPs', 'fewer', 'accuracy', 'MACs', 'bytes'):
    table.add_column(name, justify='right')
  for point in points:
    relative = point['relative_bops']
    table.add_row(
      f'{point["budget"]:.3%}',
      f'{relative:.4%}',
      f'{1 / relative:,.0f}x',
      f'{point["accuracy"]:.2%}',
      f'{point["macs"] / point["float_macs"]:.1%}',
      f'{point["artifact_bytes"]:,}',
    )
  console.print(table)
  console.print(f'float accuracy {points[0]["float_accuracy"]:.2%}')
  console.print(f'points    {folder / FILE_NAME}', markup=False)
  console.print(f'picture   {picture}', markup=False)
