"""`djpq report`: one HTML page of one or several finished runs."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import jax
import numpy as np

from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import files
from djpq_jax import harden
from djpq_jax import machine
from djpq_jax import models
from djpq_jax import report as report_lib
from djpq_jax import speed as speed_lib
from djpq_jax import workdir
from djpq_jax.cli import artifacts
from djpq_jax.cli import sweep

SPEED = 'speed.json'
TIMED_IMAGES = 64  # of one batch


def add_command(commands) -> None:
  """Adds `report` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'report', help='make one HTML page of finished runs'
  )
  command.add_argument(
    'runs',
    nargs='+',
    metavar='RUN',
    help='the workdir of a finished run, or of a sweep for all its budgets',
  )
  command.add_argument(
    '--out',
    metavar='FILE',
    help=f'the page; by default {report_lib.PAGE_NAME} in the one folder that '
    'was given, or here for several',
  )
  command.add_argument(
    '--time',
    action='store_true',
    help='measure on this machine how fast the model runs, and keep the result '
    f'in the workdir as {SPEED}',
  )
  command.set_defaults(run=_run)


def _run(args) -> None:
  given = [files.path(run) for run in args.runs]
  folders = _unique([folder for run in given for folder in _folders(run)])
  home = given[0] if len(given) == 1 else pathlib.Path()
  out = files.path(args.out) if args.out else home / report_lib.PAGE_NAME
  files.check_place(out)
  reports = [_read(folder) for folder in folders]
  runs = []
  for folder, name, report in zip(folders, _names(folders), reports):
    weights, speed, problem = None, None, ''
    try:
      artifact = folder / report['artifact']
      manifest = checkpoint.read_manifest(artifact)
      model = artifacts.load_model(artifact, manifest)
      weights = _weights(manifest, model)
      if args.time:
        _measure_speed(folder, manifest, model)
      speed = _read_speed(folder, manifest)
    except ValueError as error:
      # The page is worth having without them, and says so.
      problem = f'The artifact could not be read: {error}'
      print(f'{name}: without what needs the artifact: {error}')
    runs.append(
      report_lib.Run(
        name=name,
        report=report,
        weights=weights,
        why_no_weights=problem,
        speed=speed,
      )
    )
  print(f'report    {report_lib.write_page(runs, out)}')


def _measure_speed(folder: pathlib.Path, manifest: dict, hardened) -> None:
  """Times the dense and the hardened model of a run in turn."""
  spec = manifest['model']
  dense: Any = models.create(spec['name'], **spec['kwargs'])
  x = np.random.default_rng(0).standard_normal(
    (TIMED_IMAGES, *dense.input_shape), np.float32
  )
  measured = {
    'images_per_second': speed_lib.images_per_second(dense, hardened, x),
    'batch': TIMED_IMAGES,
    'device': jax.devices()[0].device_kind,
    'cores': machine.cores(),
    'artifact': manifest['sha256'],
  }
  files.replace(folder / SPEED, json.dumps(measured, indent=1) + '\n')


def _read_speed(folder: pathlib.Path, manifest: dict) -> dict | None:
  """What was measured of a run's artifact; None if that is not there."""
  path = folder / SPEED
  if not path.exists():
    return None
  try:
    measured = json.loads(path.read_text(encoding='utf-8'))
    if measured['artifact'] == manifest['sha256']:
      return measured
    problem = 'is of another artifact'
  except (ValueError, LookupError, TypeError):
    problem = 'is damaged'
  print(f'{path} {problem}: --time measures again')
  return None


def _folders(run: pathlib.Path) -> list[pathlib.Path]:
  """A run's folder, or those of a sweep's budgets."""
  if not run.exists():
    raise FileNotFoundError(f'there is no run {run}')
  if not run.is_dir():
    raise ValueError(f'{run} is no run: it is a file, not a folder')
  path = run / sweep.FILE_NAME
  if not path.is_file():
    return [run]
  try:
    points = json.loads(path.read_text(encoding='utf-8'))['points']
    return [run / point['folder'] for point in points]
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f'{path} is truncated or is not a sweep') from error


def _unique(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """Each folder once, in order."""
  return list({_whole(folder): folder for folder in folders}.values())


def _whole(folder: pathlib.Path) -> pathlib.Path:
  return folder if files.is_remote(folder) else folder.resolve()


def _read(folder: pathlib.Path) -> dict:
  try:
    return report_lib.read(folder)
  except FileNotFoundError:
    if (folder / workdir.CONFIG).exists():
      raise FileNotFoundError(
        f'{folder} is not finished: the same command goes on with it'
      ) from None
    raise FileNotFoundError(
      f'{folder} is no finished run: it has no {report_lib.FILE_NAME}'
    ) from None


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
  """As much of the end of each path as tells them apart.

  >>> _names([pathlib.Path('/a/x/seed0'), pathlib.Path('/a/y/seed0')])
  ['x/seed0', 'y/seed0']
  """
  parts = [_whole(folder).parts for folder in folders]
  for length in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(part[-length:]) for part in parts]
    if len(set(names)) == len(names):
      return names
  return [str(folder) for folder in folders]


def _weights(manifest: dict, model) -> dict[str, report_lib.Weights]:
  """The integers of each kernel by their levels, from the files alone."""
  bits = {row['name']: row['weight_bits'] for row in manifest['layers']}
  return {
    path: report_lib.count_weights(
      np.asarray(layer.kernel[...]),
      bits[path],
      np.asarray(operands.weight.step[...]),
      odd=operands.weight.odd,
    )
    for path, layer, operands in compress.hooks(model)
    if isinstance(operands.weight, harden.Dequantizer)
  }
