"""`djpq train`: one experiment in its workdir."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
from typing import Any

import jax
import rich.console

from djpq_jax import config as config_lib
from djpq_jax import cost
from djpq_jax import experiment
from djpq_jax import files
from djpq_jax import interruption
from djpq_jax import parallel
from djpq_jax import report as report_lib
from djpq_jax import workdir
from djpq_jax.cli import bars
from djpq_jax.cli import options


def add_command(commands) -> None:
  """Adds `train` to the subparsers of `djpq`."""
  command = commands.add_parser('train', help='run an experiment')
  options.add_config(command)
  options.add_workdir(command)
  command.add_argument(
    '--dry-run',
    action='store_true',
    help='check all, say what would be done and what memory it takes, and stop',
  )
  options.add_cluster(command)
  command.set_defaults(run=_run)


def _run(args) -> None:
  config = config_lib.load(args.config, args.set)
  options.join_cluster(args)
  work = workdir.Workdir(files.path(args.workdir), config)
  try:
    work.check(overwrite=args.overwrite)
  except OSError as error:
    if files.may_pass(error):
      raise Fault(error) from error
    raise
  console = rich.console.Console(quiet=not parallel.is_first())
  if args.dry_run:
    _print_preview(experiment.preview(config), console)
    return
  with stopping() as stop:
    report, there = carry_out(
      config, work, console, stop, overwrite=args.overwrite
    )
  if there:
    console.print(f'{work.path} holds this experiment, finished:', markup=False)
  report_lib.print_report(report, console)
  if not there:
    _print_paths(work.path, console)


class Fault(Exception):
  """A disk or the network failed amid a run, which may go on from there."""

  def __init__(self, error: OSError):
    super().__init__(str(error))
    self.error = error


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
  """While it is open, a signal only asks to stop; gives the question for it."""
  if jax.process_count() > 1:  # JAX itself waits for the signals of all
    yield parallel.Preemption().seen
    return
  with interruption.Signals() as signals:
    yield signals.seen


def _check_pictures() -> None:
  """Refuses to begin in all processes if the first cannot draw."""
  lacking = None
  if parallel.is_first():
    try:
      report_lib.check_pictures()
    except ImportError as error:
      lacking = error
  if parallel.agreed(lacking is not None):
    raise lacking or ImportError('the first process cannot draw pictures')


def carry_out(
  config,
  work: workdir.Workdir,
  console: rich.console.Console,
  stop: Callable[[], bool],
  *,
  overwrite: bool = False,
  float_dir: pathlib.Path | None = None,
) -> tuple[dict[str, Any], bool]:
  """Runs an experiment, or what is left of it, and writes its report.

  Args:
    config: complete.
    work: its folder, checked.
    console: quiet in all processes but the first.
    stop: asked after every step whether to save and stop, see `stopping`.
    overwrite: whether to discard what the folder holds.
    float_dir: where experiments share the float model's training.

  Returns:
    The report, and whether it was there already.

  Raises:
    Fault: once the folder was claimed.
  """
  report = None if overwrite else work.report()
  if report is not None:
    return report, True
  if work.claimed and not overwrite:
    console.print(f'going on with {work.path}', markup=False)
  _check_pictures()  # now, and not once all is trained

  claimed = work.claimed and not overwrite

  def claim():
    nonlocal claimed
    parallel.wait('checked')
    if parallel.is_first():
      work.claim(overwrite=overwrite)
    parallel.wait('claimed')
    claimed = True

  try:
    with bars.Bars(console) as shown:
      report = experiment.run(
        config,
        work.path,
        shown.show,
        ready=claim,
        stop=stop,
        float_dir=float_dir,
      )
    if parallel.is_first():
      _write(report, work.path)
      report = report_lib.read(work.path)  # numbers as they were written
  except OSError as error:
    if claimed and files.may_pass(error):
      raise Fault(error) from error
    raise
  return report, False


def _print_preview(found: dict[str, Any], console) -> None:
  height, width, channels = found['image_shape']
  budgets = []
  for name, share in found['budgets'].items():
    budget = f'{share:.3%} of the {cost.COSTS[name]}'
    if f'float_{name}' in found:
      budget += f', {share * found[f"float_{name}"]:,.0f}'
    budgets.append(budget)
  held = found['held_out_images']
  steps = ', '.join(
    f'{count:,} {name}' for name, count in found['steps'].items()
  )
  groups = 'all are kept'
  if found['method'] in experiment.SEARCHING:
    groups = (
      f'{found["prunable_groups"]} of {found["groups"]} groups can be pruned; '
      'djpq inspect lists them'
    )
  memory = 'no step is run'
  if found['step_phase']:
    memory = (
      f'{found["step_bytes"] / 2**20:,.0f} MiB on each for a step of '
      f'{_PHASES[found["step_phase"]]}'
    )
  rows = [
    ('model', f'{found["model"]}, {found["parameters"]:,} parameters'),
    ('MACs', f'{found["float_macs"]:,}'),
    ('BOPs', f'{found["float_bops"]:,} (32 x 32 bits)'),
    ('method', f'{found["method"]}: {_method(found)}'),
    ('budget', '; '.join(budgets) or 'none'),
    ('channels', groups),
    (
      'data',
      f'{found["data"]}: {found["train_images"]:,} images to train, '
      + (f'{held:,} held out, ' if held else '')
      + f'{found["test_images"]:,} to test, {height} x {width} x {channels}',
    ),
    ('steps', f'{steps}, of {found["batch_size"]} images'),
    ('devices', f'{found["devices"]} x {found["device_kind"]}'),
    ('memory', memory),
  ]
  for name, text in rows:
    console.print(f'{name:<10}{text}', soft_wrap=True, highlight=False)


_PHASES = {
  'float': 'the float training',
  'search': 'the search',
  'finetune': 'the finetuning',
}


def _method(found: dict[str, Any]) -> str:
  """What a method does, with the numbers that tell one variant from others."""
  if found['uniform_bits']:
    weights, activations = found['uniform_bits']
    text = f'{weights} bits for weights, {activations} for activations'
    if others := found['layers_of_other_bits']:
      text += f'; others in {others} of {found["layers"]} layers, by the rules'
    return text
  bits = ', '.join(map(str, found['bit_choices'])) or 'any whole number'
  match found['method']:
    case 'djpq':
      return f'channels and bits together; bits of {bits}'
    case 'two_stage':
      return (
        f'channels to {found["two_stage_macs"]:.3%} of the MACs, then bits of '
        f'{bits}'
      )
  return 'nothing is pruned or quantized'


def _write(report: dict[str, Any], folder: pathlib.Path) -> None:
  """Draws and writes a report."""
  for name, plot in (
    ('layers.png', report_lib.plot_layers),
    ('curves.png', report_lib.plot_curves),
  ):
    if name != 'curves.png' or report['history']:  # else no phase had a step
      plot(report, folder / name)
  # Last of all: with it the experiment is finished.
  report_lib.write(report, folder)


def _print_paths(folder: pathlib.Path, console) -> None:
  pictures = sorted(map(str, folder.glob('*.png')))
  console.print(f'report    {folder / "report.json"}', markup=False)
  console.print(f'artifact  {folder / "artifact"}', markup=False)
  console.print(f'pictures  {", ".join(pictures)}', markup=False)
