"""Writes the tables of the documents from benchmarks/results, never by hand.

    python benchmarks/tables.py [--check] [--demo runs/digits]

A block between `<!-- table NAME -->` and `<!-- end -->` is replaced by what its
result file says; `--check` only tells whether they are up to date, and
`--demo` first records a finished demo, its picture too.
"""

import argparse
import inspect
import io
import json
import math
import pathlib
import re
import shutil
import sys
import textwrap
from typing import Any

import compare
import crossvalidate
import result_files
import rich.console
import tables_speed

from djpq_jax import config
from djpq_jax import report

BLOCK = re.compile(
  r'(<!-- table (\w+) -->\n)(?:(?!<!-- table ).)*?(<!-- end -->)', re.DOTALL
)


def demo() -> str:
  """What `make demo` printed."""
  found = result_files.read('demo')
  file = io.StringIO()
  console = rich.console.Console(file=file, width=80, color_system=None)
  report.print_report(found['report'], console)
  lines = [line.rstrip() for line in file.getvalue().splitlines()]
  return '```text\n' + '\n'.join(lines).strip('\n') + '\n```\n'


def record(workdir: pathlib.Path) -> None:
  """Keeps a finished demo as the one that the README shows."""
  commit = result_files.commit()
  if commit.endswith('dirty'):
    raise SystemExit('commit first: the demo is to be that of a commit')
  found = report.read(workdir)
  del found['history']  # the pictures have it
  environment = result_files.environment() | {'command': 'make demo'}
  result: dict[str, Any] = {
    'environment': environment,
    'commit': commit,
    'report': found,
  }
  (result_files.RESULTS / 'demo.json').write_text(
    json.dumps(result, indent=1) + '\n'
  )
  picture = result_files.ROOT / 'docs' / 'images' / 'digits_layers.png'
  picture.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(workdir / 'layers.png', picture)


def comparison(name: str) -> str:
  """A table of contestants, and how to make it again."""
  found = result_files.read(name)
  return f'{compare.table(found["runs"])}\n\n{result_files.made(found)}'


# The results of each task, later versions first: what they have counts.
HEADLINES = {
  'digits': ['digits'],
  'ResNet-20, CIFAR-10, 5 epochs': [
    'resnet20_cifar10_now',
    'resnet20_cifar10_5_epochs',
  ],
  'MobileNetV2, CIFAR-10, 5 epochs': ['mobilenet_v2_cifar10'],
}
# Those of versions with other defaults than now.
OLDER = {'resnet20_cifar10_5_epochs', 'mobilenet_v2_cifar10'}


def headline() -> str:
  """DJPQ at each budget, the best two-stage there, the nearest uniform bits."""
  rows = []
  for task, names in HEADLINES.items():
    groups, older = _latest(names)
    bops = {n: _mean(runs, 'relative_bops') for n, runs in groups.items()}
    for contestant in sorted(groups, key=bops.__getitem__, reverse=True):
      runs = groups[contestant]
      found = re.fullmatch(r'DJPQ (@.*)', contestant)
      if not found:
        continue
      own = bops[contestant]
      floats = _mean(runs, 'float_accuracy')
      where = task + r' \*' * (contestant in older)
      cells = [where, f'{floats:.2%}', f'{own:.3%}', _accuracy(runs)]
      cells += ['not run', '']
      staged = [n for n in groups if _is_two_stage(n, found[1])]
      if staged:
        best = max(staged, key=lambda n: _mean(groups[n], 'accuracy'))
        cells[4] = _accuracy(groups[best])
      uniform = [n for n in groups if re.fullmatch(r'W\dA\d', n)]
      if uniform:
        near = min(uniform, key=lambda n: abs(math.log(bops[n] / own)))
        cells[5] = f'{near}: {_accuracy(groups[near])} at {bops[near]:.2%}'
      rows.append(cells)
  return compare.markdown(
    'task | float32 | relative BOPs | DJPQ | two-stage | nearest uniform bits',
    rows,
  )


def _latest(names: list[str]) -> tuple[dict[str, list[dict]], set[str]]:
  """Each contestant's good runs of the first file that has it; who is older."""
  groups: dict[str, list[dict]] = {}
  older: set[str] = set()
  for name in names:
    runs = [
      run for run in result_files.read(name)['runs'] if 'error' not in run
    ]
    found = compare.grouped(runs)
    if name in OLDER:
      older |= found.keys() - groups.keys()
    groups = found | groups
  return groups, older


def _is_two_stage(name: str, budget: str) -> bool:
  return bool(re.fullmatch(rf'two-stage( \d+% MACs)? {budget}', name))


def _mean(runs: list[dict], key: str) -> float:
  return sum(run[key] for run in runs) / len(runs)


def _accuracy(runs: list[dict]) -> str:
  count = len(runs)
  seeds = '' if count == 3 else f' ({count} seed{"s" * (count > 1)})'
  return compare.accuracy(runs) + seeds


def alignment() -> str:
  """What channels in multiples cost, and which are left with one seed."""
  found = result_files.read('alignment')
  rows = []
  good = [run for run in found['runs'] if 'error' not in run]
  for name, runs in compare.grouped(good).items():
    accuracy = [f'{run["accuracy"]:.2%}' for run in runs]
    relative = sum(run['relative_bops'] for run in runs) / len(runs)
    layers = runs[0]['layers'][:-1]  # the classes stay
    kept = ', '.join(str(outputs) for _, _, outputs, *_ in layers)
    mean = sum(run['accuracy'] for run in runs) / len(runs)
    rows.append(
      [name, f'{mean:.2%}', ', '.join(accuracy), f'{relative:.4%}', kept]
    )
  head = (
    'contestant | mean accuracy | of each seed | BOPs | channels, first seed'
  )
  return compare.markdown(head, rows) + result_files.made(found)


def reliability() -> str:
  """Of each contestant, how many seeds failed, and the worst of the others."""
  found = result_files.read('reliability')
  rows = []
  for name, runs in compare.grouped(found['runs']).items():
    good = [run for run in runs if 'error' not in run]
    cells = [name, str(len(runs)), str(len(runs) - len(good))]
    if good:
      accuracy = [run['accuracy'] for run in good]
      relative = [run['relative_bops'] for run in good]
      mean = sum(accuracy) / len(accuracy)
      cells += [f'{a:.2%}' for a in (min(accuracy), mean, max(accuracy))]
      cells.append(f'{100 * (mean - _mean(good, "float_accuracy")):+.2f}')
      cells += [f'{r:.4%}' for r in (max(relative), min(relative))]
    rows.append(cells + [''] * (9 - len(cells)))
  head = (
    'contestant | seeds | failed | least accuracy | mean | best '
    '| points above float32 | BOPs, most | least'
  )
  return compare.markdown(head, rows) + result_files.made(found)


def ablations(name: str) -> str:
  """What single changes of the method bring on images that were held out."""
  found = result_files.read(name)
  return f'{crossvalidate.table(found["runs"])}\n\n{result_files.made(found)}'


def fields() -> str:
  """All fields of a config, as the source has them."""
  source = inspect.getsource(config)
  blocks = []
  for start, end in (
    ('ConfigDict(\n', '\n  )\n'),
    ('_optimizer() -> dict[str, Any]:\n', '\n\n'),
  ):
    block = source[source.index(start) + len(start) :]
    blocks.append(textwrap.dedent(block[: block.index(end)]))
  shown = '\n\n'.join(blocks).replace('return {', 'OPTIMIZER = {')
  return f'```python\n{shown.replace("_optimizer()", "OPTIMIZER")}\n```\n'


def peers_digits() -> str:
  """Other libraries, and what their user had to train for a row."""
  found = result_files.read('peers_digits')
  lines = compare.table(found['runs']).splitlines()
  lines[0] += ' trainings of each seed |'
  lines[1] += ' --- |'
  for k, runs in enumerate(compare.grouped(found['runs']).values(), start=2):
    counts = ', '.join(str(run['trainings']) for run in runs)
    lines[k] += f' {counts} |'
  return '\n'.join(lines) + '\n\n' + result_files.made(found)


def text(name: str) -> str:
  """The block of a name."""
  special = {
    'demo': demo,
    'headline': headline,
    'fields': fields,
    'ablations': lambda: ablations('ablations'),
    'ablations_bits': lambda: ablations('ablations_bits'),
    'ablations_zero': lambda: ablations('ablations_zero'),
    'ablations_whole': lambda: ablations('ablations_whole'),
    'ablations_swish': lambda: ablations('ablations_swish'),
    'alignment': alignment,
    'reliability': reliability,
    'inference': tables_speed.inference,
    'inference_resnet18': lambda: tables_speed.inference('inference_resnet18'),
    'step_cost': tables_speed.step_cost,
    'step_memory': tables_speed.step_memory,
    'step_profile': tables_speed.step_profile,
    'step_slopes': tables_speed.step_slopes,
    'vectorised_search': tables_speed.vectorised_search,
    'devices': tables_speed.devices,
    'peers_digits': peers_digits,
    'export': tables_speed.export,
    'artifact_size': tables_speed.artifact_size,
    'layer_profile': tables_speed.layer_profile,
  }
  return special[name]() if name in special else comparison(name)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--demo', type=pathlib.Path, metavar='WORKDIR')
  args = parser.parse_args()
  if args.demo:
    record(args.demo)
  stale = []
  for path in (
    result_files.ROOT / 'README.md',
    *sorted((result_files.ROOT / 'docs').glob('*.md')),
  ):
    before = path.read_text()
    after = BLOCK.sub(lambda m: f'{m[1]}{text(m[2])}{m[3]}', before)
    if before != after:
      stale.append(path.name)
    if not args.check:
      path.write_text(after)
  if args.check and stale:
    print(f'{", ".join(stale)} out of date: run python benchmarks/tables.py')
  return int(args.check and bool(stale))


if __name__ == '__main__':
  sys.exit(main())
