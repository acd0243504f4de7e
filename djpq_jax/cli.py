"""The command line: `djpq train | inspect | evaluate | data`."""

import argparse
from collections.abc import Sequence
import contextlib
import json
import pathlib
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
from djpq_jax import integer
from djpq_jax import interruption
from djpq_jax import parallel
from djpq_jax import report as report_lib
from djpq_jax import train
from djpq_jax import workdir

PHASES = {
  'float': 'float training',
  'search': 'searching channels and bits',
  'finetune': 'finetuning',
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status.

  A user's mistake ends in one sentence on standard error and status 2, a
  training that cannot go on in one and status 1, one that was asked to stop
  in one and status 143, so that whoever restarts failed jobs restarts it.
  """
  args = _parser().parse_args(argv)
  try:
    args.run(args)
  except train.TrainingError as error:
    print(f'djpq: {error}', file=sys.stderr)
    return 1
  except train.Interrupted as error:
    print(f'djpq: {error}', file=sys.stderr)
    return interruption.EXIT_STATUS
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
  command.add_argument(
    '--workdir',
    required=True,
    help='where results go; a run that was interrupted there goes on',
  )
  command.add_argument(
    '--overwrite', action='store_true', help='discard what the workdir holds'
  )
  command.add_argument(
    '--dry-run',
    action='store_true',
    help='check all, say what would be done and what memory it takes, and stop',
  )
  command.add_argument(
    '--distributed',
    action='store_true',
    help='join the other processes, which the cluster tells (TPU, SLURM, ...)',
  )
  command.add_argument(
    '--coordinator', metavar='HOST:PORT', help='of process 0, else'
  )
  command.add_argument('--process-count', type=int, metavar='N')
  command.add_argument('--process-index', type=int, metavar='I')
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
  command.add_argument(
    '--execution',
    choices=integer.EXECUTIONS,
    default='simulated',
    help='what multiplies the integers; the predictions are the same',
  )
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
  processes = args.coordinator, args.process_count, args.process_index
  if args.distributed or processes != (None, None, None):
    parallel.start(*processes)
  first = parallel.is_first()
  work = workdir.Workdir(pathlib.Path(args.workdir), config)
  work.check(overwrite=args.overwrite)
  console = rich.console.Console(quiet=not first)
  if args.dry_run:
    _print_preview(experiment.preview(config), console)
    return
  report = None if args.overwrite else work.report()
  if report is not None:
    console.print(f'{work.path} holds this experiment, finished:')
    report_lib.print_report(report, console)
    return
  if work.claimed and not args.overwrite:
    console.print(f'going on with {work.path}')

  def claim():
    parallel.wait('checked')
    if first:
      work.claim(overwrite=args.overwrite)
    parallel.wait('claimed')

  with contextlib.ExitStack() as stack:
    if jax.process_count() > 1:  # JAX itself waits for the signals of all
      stop = parallel.Preemption().seen
    else:
      stop = stack.enter_context(interruption.Signals()).seen
    bars = stack.enter_context(_Bars(console))
    report = experiment.run(
      config, work.path, bars.show, ready=claim, stop=stop
    )
  if first:
    _finish(report, work.path, console)


def _print_preview(found: dict[str, Any], console) -> None:
  height, width, channels = found['image_shape']
  budget = 'none'
  if found['budget']:
    bops = found['budget'] * found['float_bops']
    budget = f'{found["budget"]:.3%} of them, {bops:,.0f}'
  steps = ', '.join(
    f'{count:,} {name}' for name, count in found['steps'].items()
  )
  rows = [
    ('model', f'{found["model"]}, {found["parameters"]:,} parameters'),
    ('MACs', f'{found["float_macs"]:,}'),
    ('BOPs', f'{found["float_bops"]:,} (32 x 32 bits)'),
    ('method', found['method']),
    ('budget', budget),
    (
      'channels',
      f'{found["prunable_groups"]} of {found["groups"]} groups can be pruned; '
      'djpq inspect lists them',
    ),
    (
      'data',
      f'{found["data"]}: {found["train_images"]:,} images to train, '
      f'{found["test_images"]:,} to test, {height} x {width} x {channels}',
    ),
    ('steps', f'{steps}, of {found["batch_size"]} images'),
    ('devices', f'{found["devices"]} x {found["device_kind"]}'),
    ('memory', f'{found["step_bytes"] / 2**20:,.0f} MiB on each for a step'),
  ]
  for name, text in rows:
    console.print(f'{name:<10}{text}', soft_wrap=True, highlight=False)


def _finish(report: dict[str, Any], folder: pathlib.Path, console) -> None:
  """Draws, writes and prints a report."""
  for name, plot in (
    ('layers.png', report_lib.plot_layers),
    ('curves.png', report_lib.plot_curves),
  ):
    if name != 'curves.png' or report['history']:  # else no phase had a step
      plot(report, folder / name)
  # Last of all: with it the experiment is finished.
  report_lib.write(report, folder)
  report_lib.print_report(report, console)
  pictures = sorted(map(str, folder.glob('*.png')))
  console.print(f'report    {folder / "report.json"}')
  console.print(f'artifact  {folder / "artifact"}')
  console.print(f'pictures  {", ".join(pictures)}')


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
    if self._console.quiet:
      return
    note = _note(phase, metrics)
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


def _note(phase: str, metrics: dict) -> str:
  """What is worth knowing while one waits."""
  note = f'loss {metrics["task_loss"]:.3f}'
  if phase == 'search':
    note += f'  BOPs {metrics["relative_bops"]:.3%}'
    bits = metrics['mean_weight_bits'], metrics['mean_act_bits']
    note += '  bits {:.1f}/{:.1f}'.format(*bits)
    note += f'  channels {metrics["kept_fraction"]:.0%}'
  return note + f'  {metrics["images_per_second"]:,.0f} images/s'


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
  measured_on = manifest.get('measured_on', {})
  name = args.data or measured_on.get('data')
  if not name:
    raise ValueError(
      f'{args.artifact} does not say what it was measured on; give --data'
    )
  kwargs = {} if args.data else measured_on.get('kwargs', {})
  _, split = data.load(name, data_dir=args.data_dir, **kwargs)
  shape = split.images.shape[1:]
  if list(shape) != manifest['input_shape']:
    raise ValueError(
      f'the artifact takes images of shape {tuple(manifest["input_shape"])}, '
      f'but {name} has {shape}'
    )
  executed = integer.lower(model, args.execution)
  accuracy = evaluation.evaluate(executed, split)
  sample = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  totals = harden.totals(model, harden.count(model, sample))
  result = {
    'accuracy': accuracy,
    'images': len(split),
    **totals,
    'execution': args.execution,
    'float_layers': integer.left_float(executed),
  }
  if args.json:
    print(json.dumps(result, indent=1))
    return
  ratio = 1 / totals['relative_bops']
  print(f'accuracy       {accuracy:.2%} of {len(split)} images of {name}')
  print(f'relative BOPs  {totals["relative_bops"]:.4%} ({ratio:.0f}x fewer)')
  print(f'BOPs           {totals["bops"]:,} of {totals["float_bops"]:,}')
  print(f'MACs           {totals["macs"]:,} of {totals["float_macs"]:,}')
  for path, reason in result['float_layers'].items():
    print(f'stays float    {path}: {reason}')


if __name__ == '__main__':
  sys.exit(main())
