"""Writes the tables of README.md from benchmarks/results, never by hand.

    python benchmarks/tables.py [--check] [--demo runs/digits]

A block between `<!-- table NAME -->` and `<!-- end -->` is replaced by what its
result file says; `--check` only tells whether the README is up to date, and
`--demo` first records a finished demo, its picture too.
"""

import argparse
import io
import json
import pathlib
import re
import shutil
import sys

import compare
import rich.console

from djpq_jax import report

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
BLOCK = re.compile(r'(<!-- table (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)


def demo() -> str:
  """What `make demo` printed."""
  found = json.loads((RESULTS / 'demo.json').read_text())
  file = io.StringIO()
  console = rich.console.Console(file=file, width=80, color_system=None)
  report.print_report(found['report'], console)
  lines = [line.rstrip() for line in file.getvalue().splitlines()]
  return '```text\n' + '\n'.join(lines).strip('\n') + '\n```\n'


def record(workdir: pathlib.Path) -> None:
  """Keeps a finished demo as the one that the README shows."""
  found = report.read(workdir)
  del found['history']  # the pictures have it
  environment = compare.environment() | {'command': 'make demo'}
  result = {
    'environment': environment,
    'commit': compare.commit(),
    'report': found,
  }
  (RESULTS / 'demo.json').write_text(json.dumps(result, indent=1) + '\n')
  picture = ROOT / 'docs' / 'images' / 'digits_layers.png'
  picture.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(workdir / 'layers.png', picture)


def comparison(name: str) -> str:
  """A table of contestants, and how to make it again."""
  found = json.loads((RESULTS / f'{name}.json').read_text())
  made = found['environment']
  versions = ', '.join(f'{k} {v}' for k, v in made['versions'].items())
  commits = ', '.join(sorted({run['commit'] for run in found['runs']}))
  return (
    f'{compare.table(found["runs"])}\n\n'
    f'`{made["command"]}`, commit {commits}, {made["machine"]}, '
    f'{versions}.\n'
  )


def text(name: str) -> str:
  """The block of a name."""
  return demo() if name == 'demo' else comparison(name)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--demo', type=pathlib.Path, metavar='WORKDIR')
  args = parser.parse_args()
  if args.demo:
    record(args.demo)
  path = ROOT / 'README.md'
  before = path.read_text()
  after = BLOCK.sub(lambda m: f'{m[1]}{text(m[2])}{m[3]}', before)
  if args.check:
    if before != after:
      print('README.md is out of date: run python benchmarks/tables.py')
    return int(before != after)
  path.write_text(after)
  return 0


if __name__ == '__main__':
  sys.exit(main())
