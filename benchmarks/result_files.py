"""Result files: what made the figures of a benchmark, and how it is told."""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
from typing import Any

import flax
import jax
import numpy as np

from djpq_jax import files

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
# Of the environment, what figures may depend on.
VARIABLES = ('GLIBC_TUNABLES', 'XLA_FLAGS')


def read(name: str) -> dict[str, Any]:
  """A result file."""
  return json.loads((RESULTS / f'{name}.json').read_text())


def made(found: dict) -> str:
  """How to make a result again.

  A file says it once or each run for itself; commits may differ by run in any
  case, and a file that several commands added to has them all.
  """
  runs = found['runs']
  made = [r['environment'] for r in runs if 'environment' in r]
  made = made or [found['environment']]
  commands = [c for m in made for c in m.get('commands') or [m['command']]]
  commits = {r.get('commit') or found['commit'] for r in runs}
  machine = [made[0]['machine']]
  if 'cpu' in found:
    machine.append(found['cpu']['name'])
  if 'threads' in found:
    machine.append(f'{found["threads"]} thread(s)')
  versions = made[0]['versions'].items()
  said = (
    f'Commit {", ".join(sorted(commits))}; {", ".join(machine)}; '
    + ', '.join(f'{name} {version}' for name, version in versions)
    + '.'
  )
  return '\n\n'.join(
    [
      '<details><summary>How it was made</summary>',
      '\n'.join(['```sh', *dict.fromkeys(commands), '```']),
      *(said, *(m['note'] for m in made if 'note' in m)),
      '</details>\n',
    ]
  )


def commit() -> str:
  """The state of the code, of which files of results are no part."""
  name = _git('describe', '--always', '--exclude=*')
  but_results = ':(top)', ':(top,exclude)benchmarks/results'
  changed = _git('status', '--porcelain', '-uno', '--', *but_results)
  return f'{name}-dirty' if changed else name


def _git(*args: str) -> str:
  git = ['git', *args]
  done = subprocess.run(git, capture_output=True, text=True, check=False)
  return done.stdout.strip()


def environment() -> dict:
  """What made the figures."""
  here = [(n, os.environ[n]) for n in VARIABLES if n in os.environ]
  given = [f'{name}={shlex.quote(value)}' for name, value in here]
  return {
    'command': ' '.join([*given, 'python', shlex.join(sys.argv)]),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores',
    'device': jax.devices()[0].device_kind,
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'flax': flax.__version__,
      'numpy': np.__version__,
    },
  }


def runs_of(path: pathlib.Path) -> list[dict]:
  """The runs that a result file holds."""
  return json.loads(path.read_text())['runs'] if path.exists() else []


def add(path: pathlib.Path, runs: list[dict], versions=(), **about) -> None:
  """Adds runs to a result file, and this command to those that made it.

  Args:
    path: a file; it is made if there is none.
    runs: what to add.
    versions: of libraries that this process does not have.
    **about: what a new file says besides.
  """
  made = environment()
  command = made.pop('command')
  result: dict[str, Any] = {'environment': made, **about, 'runs': []}
  path.parent.mkdir(parents=True, exist_ok=True)
  with _alone(path):
    if path.exists():
      result = json.loads(path.read_text())
    made = result['environment']
    commands = made.setdefault('commands', [])
    if 'command' in made:
      commands.append(made.pop('command'))
    if command not in commands:
      commands.append(command)
    made['versions'] |= dict(versions)
    result['runs'] += runs
    files.replace(path, (json.dumps(result, indent=1) + '\n').encode())


@contextlib.contextmanager
def _alone(path: pathlib.Path):
  """No other process adds to the same file meanwhile."""
  lock = pathlib.Path(tempfile.gettempdir()) / (
    'results-' + hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]
  )
  with lock.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def settings(config) -> str:
  """A hash of all that a config says, but for the folders of data."""
  fields = dict(_flat(config.to_dict()))
  del fields['data.dir']
  fields['model.weights'] = pathlib.Path(fields['model.weights']).name
  told = sorted((name, str(value)) for name, value in fields.items())
  return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def _flat(fields: Mapping, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in fields.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def finished(path: pathlib.Path, fields: tuple[str, ...], wanted) -> set[tuple]:
  """Which runs a result file holds.

  Args:
    path: of the file.
    fields: of a run, that tell it from the others.
    wanted: these fields' values -> `settings` of what would be run.

  Raises:
    SystemExit: the file has one of them with other settings.
  """
  done = set()
  for run in runs_of(path):
    found = tuple(run[field] for field in fields)
    if found not in wanted:
      continue
    # Older files do not tell.
    if run.get('settings', wanted[found]) != wanted[found]:
      raise SystemExit(
        f'{path} has {", ".join(map(str, found))} with other settings: choose '
        'another --out'
      )
    done.add(found)
  return done
