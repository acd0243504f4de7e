"""What the benchmarks wrote to benchmarks/results."""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'


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
