"""The command line: `djpq train | inspect | evaluate | data`."""

import argparse
from collections.abc import Sequence
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress
import rich.table

from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import data
from djpq_jax import data_cli
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax import harden
from djpq_jax import report as report_lib
from djpq_jax import train

PHASES = {
  'float': 'float training',
  'search': 'searching channels and bits',
  'finetune': 'finetuning',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status.

  A user's mistake ends in one sentence on standard error and status 2, a
  training that cannot go on in one and status 1.
  """
  args = _parser().parse_args(argv)
  try:
    args.run(args)
  except train.TrainingError as error:
    print(f'djpq: {error}', file=sys.stderr)
    return 1
  except (ValueError, FileNotFoundError, ImportError) as error:
    if args.debug:
      raise
    print(f'djpq: {error}', file=sys.stderr)
    return 2
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='djpq',
    description='Joint pruning and quantization of Flax models.',
  )
  parser.add_argument(
    '--debug', action='store_true', help='show tracebacks of errors'
  )
  commands = parser.add_subparsers(required=True, metavar='command')

  command = commands.add_parser('train', help='run an experiment')
  _add_config(command)
  command.add_argument('--workdir', required=True, help='where results go')
  command.add_argument(
    '--overwrite', action='store_true', help='discard what the workdir holds'
  )
  command.set_defaults(run=_train)

  command = commands.add_parser(
    'inspect', help='show layers, MACs and channel groups of a model'
  )
  _add_config(command)
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_inspect)

  command = commands.add_parser(
    'evaluate', help='measure a hardened model from its files alone'
  )
  command.add_argument('--artifact', required=True, help='its folder')
  command.add_argument(
    '--data', help='data set; by default the one it was measured on'
  )
  command.add_argument('--data-dir', help='where the data set was prepared')
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_evaluate)

  data_cli.add_command(commands)
  return parser


def _add_config(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    '--config', required=True, help='a config file, or a packaged name'
  )
  command.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='override a field, as search.epochs=10; may be repeated',
  )


def _train(args) -> None:
  config = config_lib.load(args.config, args.set)
  workdir = pathlib.Path(args.workdir)
  _check_workdir(workdir, config, args.overwrite)
  console = rich.console.Console()
  with _Bars(console) as bars:
    report = experiment.run(
      config, workdir, bars.show, ready=lambda: _claim(workdir, config)
    )
  report_lib.write(report, workdir)
  report_lib.print_report(report, console)
  pictures = []
  for plot, name in (
    (report_lib.plot_layers, 'layers.png'),
    (report_lib.plot_curves, 'curves.png'),
  ):
    if name == 'curves.png' and not report['history']:
      continue  # no phase had a step
    plot(report, workdir / name)
    pictures.append(str(workdir / name))
  console.print(f'report    {workdir / "report.json"}')
  console.print(f'artifact  {workdir / "artifact"}')
  console.print(f'pictures  {", ".join(pictures)}')


def _check_workdir(workdir: pathlib.Path, config, overwrite: bool) -> None:
  """Refuses a workdir that is in use; files of others in any case."""
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f'{workdir} is a file, not a folder')
  if not workdir.is_dir() or not any(workdir.iterdir()):
    return
  experiment_there = (workdir / 'config.json').exists()
  if not (overwrite and experiment_there):
    raise ValueError(
      f'{workdir} already holds {_contents(workdir, config)}; choose another '
      'workdir' + (', or --overwrite' if experiment_there else '')
    )


def _claim(workdir: pathlib.Path, config) -> None:
  """Empties the workdir and writes the config into it."""
  if (workdir / 'config.json').exists():
    shutil.rmtree(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(config.to_dict(), indent=1)
  (workdir / 'config.json').write_text(text + '\n')


def _contents(workdir: pathlib.Path, config) -> str:
  try:
    before = json.loads((workdir / 'config.json').read_text())
  except (OSError, ValueError):
    return 'files that are no experiment'
  now = json.loads(json.dumps(config.to_dict()))
  changed = sorted(_differences(before, now))
  if changed:
    return f'another experiment (it differs in {", ".join(changed[:3])})'
  return 'this experiment'


def _differences(a: dict, b: dict, prefix: str = ''):
  for key in a.keys() | b.keys():
    left, right = a.get(key), b.get(key)
    if isinstance(left, dict) and isinstance(right, dict):
      yield from _differences(left, right, f'{prefix}{key}.')
    elif left != right:
      yield f'{prefix}{key}'


class _Bars:
  """One progress bar per phase; in a log file, a line every tenth of it."""

  def __init__(self, console: rich.console.Console):
    self._console = console
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn('{task.description:<28}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(compact=True),
      rich.progress.TextColumn('{task.fields[note]}'),
      console=console,
      disable=not console.is_terminal,
    )
    self._tasks: dict[str, rich.progress.TaskID] = {}
    self._tenths: dict[str, int] = {}

  def __enter__(self):
    self._progress.start()
    return self

  def __exit__(self, *_):
    self._progress.stop()

  def show(self, phase: str, step: int, steps: int, metrics: dict) -> None:
    """Moves the bar of a phase."""
    note = f'loss {metrics["task_loss"]:.3f}'
    if phase == 'search':
      note += f'  BOPs {metrics["relative_bops"]:.3%}'
    if not self._console.is_terminal:
      tenth = 10 * step // steps
      if tenth > self._tenths.get(phase, 0):
        print(f'{PHASES[phase]}: step {step} of {steps}  {note}', flush=True)
      self._tenths[phase] = tenth
      return
    if phase not in self._tasks:
      self._tasks[phase] = self._progress.add_task(
        PHASES[phase], total=steps, note=''
      )
    self._progress.update(self._tasks[phase], completed=step, note=note)


def _inspect(args) -> None:
  config = config_lib.load(args.config, args.set)
  table = _inspection(experiment.dense_structure(config))
  if args.json:
    print(json.dumps(table, indent=1))
  else:
    _print_inspection(table, rich.console.Console())


def _inspection(structure: compress.Structure) -> dict[str, Any]:
  graph = structure.graph
  names = [g.name for g in structure.groups]

  def of(groups):
    return [names[g] for g in np.unique(groups) if g >= 0]

  return {
    'float_macs': graph.float_macs,
    'float_bops': compress.FLOAT_BITS**2 * graph.float_macs,
    'layers': [
      {
        'name': layer.path,
        'kind': layer.kind,
        'macs': layer.macs,
        'weights': layer.weights,
        'in': len(layer.in_group),
        'out': len(layer.out_group),
        'reads': of(layer.in_group),
        'writes': of(layer.out_group),
        'weight_bits': structure.layers[layer.path].weight_bits,
        'act_bits': structure.layers[layer.path].act_bits,
        'quantize': structure.layers[layer.path].quantize,
      }
      for layer in graph.layers.values()
    ],
    'other': [{'name': n, 'macs': m} for n, m in graph.other_macs],
    'groups': [
      {
        'name': s.name,
        'channels': g.size,
        'consumers': list(g.consumers),
        'prunable': not s.reason,
        'reason': s.reason,
      }
      for g, s in zip(graph.groups, structure.groups)
    ],
  }


def _print_inspection(found: dict[str, Any], console) -> None:
  table = rich.table.Table(title='Layers', title_justify='left')
  for name in ('layer', 'kind'):
    table.add_column(name)
  for name in ('in', 'out', 'MACs', 'share'):
    table.add_column(name, justify='right')
  for row in found['layers']:
    table.add_row(
      row['name'],
      row['kind'],
      str(row['in']),
      str(row['out']),
      f'{row["macs"]:,}',
      f'{row["macs"] / found["float_macs"]:.1%}',
    )
  for row in found['other']:
    share = f'{row["macs"] / found["float_macs"]:.1%}'
    table.add_row(row['name'], '', '', '', f'{row["macs"]:,}', share)
  console.print(table)
  table = rich.table.Table(title='Channel groups', title_justify='left')
  for name in ('group', 'channels', 'pruned?'):
    table.add_column(name, justify='right' if name == 'channels' else 'left')
  for group in found['groups']:
    verdict = 'yes' if group['prunable'] else f'no: {group["reason"]}'
    table.add_row(group['name'], str(group['channels']), verdict)
  console.print(table)
  console.print(
    f'float_macs  {found["float_macs"]:,}\n'
    f'float_bops  {found["float_bops"]:,} (32 x 32 bits)'
  )


def _evaluate(args) -> None:
  manifest = checkpoint.read_manifest(args.artifact)
  model = experiment.load_artifact(args.artifact)
  name = args.data or manifest.get('measured_on', {}).get('data')
  if not name:
    raise ValueError(
      f'{args.artifact} does not say what it was measured on; give --data'
    )
  _, split = data.load(name, data_dir=args.data_dir)
  shape = split.images.shape[1:]
  if list(shape) != manifest['input_shape']:
    raise ValueError(
      f'the artifact takes images of shape {tuple(manifest["input_shape"])}, '
      f'but {name} has {shape}'
    )
  accuracy = evaluation.evaluate(model, split)
  sample = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  totals = harden.totals(model, harden.count(model, sample))
  result = {'accuracy': accuracy, 'images': len(split), **totals}
  if args.json:
    print(json.dumps(result, indent=1))
    return
  ratio = 1 / totals['relative_bops']
  print(f'accuracy       {accuracy:.2%} of {len(split)} images of {name}')
  print(f'relative BOPs  {totals["relative_bops"]:.4%} ({ratio:.0f}x fewer)')
  print(f'BOPs           {totals["bops"]:,} of {totals["float_bops"]:,}')
  print(f'MACs           {totals["macs"]:,} of {totals["float_macs"]:,}')


if __name__ == '__main__':
  sys.exit(main())
