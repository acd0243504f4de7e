"""Result files: what made the figures of a benchmark, and how it is told."""

import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import flax
import jax
import numpy as np

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
    '; '.join(f'`{command}`' for command in dict.fromkeys(commands))
    + f', commit {", ".join(sorted(commits))}, {", ".join(machine)}, '
    + ', '.join(f'{name} {version}' for name, version in versions)
    + '.'
  )
  return '\n\n'.join([said, *(m['note'] for m in made if 'note' in m)]) + '\n'


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
  if path.exists():  # another process may have written to it
    result = json.loads(path.read_text())
  made = result['environment']
  commands = made.setdefault('commands', [])
  if 'command' in made:
    commands.append(made.pop('command'))
  if command not in commands:
    commands.append(command)
  made['versions'] |= dict(versions)
  result['runs'] += runs
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + '\n')
