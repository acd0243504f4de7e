"""Writes the tables of the documents from benchmarks/results, never by hand.

    python benchmarks/tables.py [--check] [--demo runs/digits]

A block between `<!-- table NAME -->` and `<!-- end -->` is replaced by what its
result file says; `--check` only tells whether they are up to date, and
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
  return f'{compare.table(found["runs"])}\n\n{_made(found)}'


def _made(found: dict) -> str:
  """How to make a comparison again."""
  made = found['environment']
  versions = ', '.join(f'{k} {v}' for k, v in made['versions'].items())
  commits = ', '.join(sorted({run['commit'] for run in found['runs']}))
  return (
    f'`{made["command"]}`, commit {commits}, {made["machine"]}, {versions}.\n'
  )


def reliability() -> str:
  """Of each contestant, how many seeds failed, and the worst of the others."""
  found = json.loads((RESULTS / 'reliability.json').read_text())
  rows: dict[str, list[dict]] = {}
  for run in found['runs']:
    rows.setdefault(run['contestant'], []).append(run)
  lines = [
    '| contestant | seeds | failed | least accuracy | mean | best | BOPs, most '
    '| least |',
    '| --- ' * 8 + '|',
  ]
  for name, runs in rows.items():
    good = [run for run in runs if 'error' not in run]
    cells = [name, str(len(runs)), str(len(runs) - len(good))]
    if good:
      accuracy = [run['accuracy'] for run in good]
      relative = [run['relative_bops'] for run in good]
      mean = sum(accuracy) / len(accuracy)
      cells += [f'{a:.2%}' for a in (min(accuracy), mean, max(accuracy))]
      cells += [f'{r:.4%}' for r in (max(relative), min(relative))]
    lines.append('| ' + ' | '.join(cells + [''] * (8 - len(cells))) + ' |')
  return '\n'.join(lines) + '\n\n' + _made(found)


def inference(name: str = 'inference') -> str:
  """Milliseconds of float32, and how many times faster the others are."""
  found = json.loads((RESULTS / f'{name}.json').read_text())
  made = found['environment']
  lines: list[str] = []
  for run in found['runs']:
    rows = run['rows']
    if not lines:
      lines.append('| model | channels | batch | ' + ' | '.join(rows) + ' |')
      lines.append('| --- ' * (3 + len(rows)) + '|')
    cells = [
      f'{row["median_ms"]:.1f} ms'
      if name == 'float32'
      else f'{row["median_ms_float32_over_this"]:.2f}x'
      for name, row in rows.items()
    ]
    head = run['model'], f'{run["keep"]:.0%}', str(run['batch'])
    lines.append('| ' + ' | '.join([*head, *cells]) + ' |')
  return (
    '\n'.join(lines) + f'\n\n`{made["command"]}`, commit {found["commit"]}, '
    f'{made["machine"]}, jax {made["versions"]["jax"]}.\n'
  )


def layer_profile() -> str:
  """Where the time of ResNet-20 goes: each layer alone, at batch 64."""
  found = json.loads((RESULTS / 'inference_cifar.json').read_text())
  run = next(r for r in found['runs'] if (r['keep'], r['batch']) == (1, 64))
  lines = [
    '| layers | MACs of a batch | dequantized | float | int8 | int8, MACs/s |',
    '| --- ' * 6 + '|',
  ]
  stages: dict[str, list[dict]] = {}
  for row in run['layers']:
    stages.setdefault(row['layer'].partition('/')[0], []).append(row)
  stages['all'] = run['layers']
  for name, rows in stages.items():
    total = {k: sum(r[k] for r in rows) for k in ('macs', *PROFILED)}
    lines.append(
      f'| {name} | {total["macs"] / 1e6:.0f} M | '
      + ' | '.join(f'{total[k]:.1f} ms' for k in PROFILED)
      + f' | {total["macs"] / total["int8"] / 1e6:.0f} G |'
    )
  return '\n'.join(lines) + '\n\n' + _made_at_once(found)


PROFILED = ('dequantized', 'float', 'int8')


def step_cost() -> str:
  """What a step of each phase takes of the float step."""
  found = json.loads((RESULTS / 'step_cost.json').read_text())
  lines = [
    '| model | image | batch | float step | search | finetuning | compile, s '
    '| temporaries, MB |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  runs = found['runs']
  for phases in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
    one = phases[0]
    assert [p['phase'] for p in phases] == ['float', 'search', 'finetune']
    cells = [
      one['model'],
      ' x '.join(map(str, one['input_shape'])),
      str(one['batch']),
      f'{1e3 * one["step_seconds"]:.0f} ms',
      *(f'{p["over_float"]:.2f}x' for p in phases[1:]),
      ' / '.join(f'{p["compile_seconds"]:.1f}' for p in phases),
      ' / '.join(f'{p["temporaries_MB"]:.0f}' for p in phases),
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n\n' + _made_by(runs)


def _made_by(runs: list[dict]) -> str:
  """Commands, commits and machine of rows that say them one by one."""
  commands = list(dict.fromkeys(r['environment']['command'] for r in runs))
  commits = ', '.join(sorted({r['commit'] for r in runs}))
  made = runs[0]['environment']
  return (
    '; '.join(f'`{command}`' for command in commands)
    + f', commit {commits}, {made["machine"]}, jax {made["versions"]["jax"]}.\n'
  )


def devices() -> str:
  """Steps per second on several devices, and what they exchange."""
  found = json.loads((RESULTS / 'devices.json').read_text())
  lines = [
    '| model | batch | step | devices | steps/s | exchanged | the exchange '
    'alone |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for run in found['runs']:
    cells = [
      run['model'],
      str(run['batch']),
      run['wrapper'],
      str(run['devices']),
      f'{run["steps_per_second"]:.2f}',
      f'{run["exchanged_bytes"] / 1e6:.2f} MB',
      f'{1e3 * run["exchange_seconds"]:.1f} ms',
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n\n' + _made_by(found['runs'])


def peers_digits() -> str:
  """Other libraries, and what their user had to train for a row."""
  found = json.loads((RESULTS / 'peers_digits.json').read_text())
  made = found['environment']
  rows: dict[str, list[dict]] = {}
  for run in found['runs']:
    rows.setdefault(run['contestant'], []).append(run)
  lines = compare.table(found['runs']).splitlines()
  lines[0] += ' trainings of each seed |'
  lines[1] += ' --- |'
  for k, runs in enumerate(rows.values(), start=2):
    counts = ', '.join(str(run['trainings']) for run in runs)
    lines[k] += f' {counts} |'
  versions = ', '.join(f'{k} {v}' for k, v in made['versions'].items())
  commits = ', '.join(sorted({run['commit'] for run in found['runs']}))
  commands = '; '.join(f'`{command}`' for command in made['commands'])
  return (
    '\n'.join(lines)
    + f'\n\n{commands}, commit {commits}, {made["machine"]}, {versions}.\n'
  )


def export() -> str:
  """How far each written file is from its model."""
  found = json.loads((RESULTS / 'export.json').read_text())
  lines = [
    '| network | bits | file | images | other predictions | logits off by more '
    'than a step | at most, % of their range | bytes |',
    '| --- ' * 8 + '|',
  ]
  for run in found['runs']:
    for file in run['files']:
      cells = [
        _network(run),
        '{}-{}'.format(*run['bits'])
        if run['bits'][0] < run['bits'][1]
        else str(run['bits'][0]),
        f'{file["format"]} {file["form"] or file["batch"]}',
        f'{file["images"]:,}',
        f'{file["predictions"]:,}',
        f'{file["beyond_step"]:,}',
        f'{100 * file["largest"] / file["logit_range"]:.2g}',
        f'{file["bytes"]:,}',
      ]
      lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n\n' + _made_at_once(found)


def artifact_size() -> str:
  """What artifacts take, beside their numbers at their bits."""
  found = json.loads((RESULTS / 'export.json').read_text())
  lines = [
    '| network | integers at their bits | floats | artifact | over both | of '
    'it arrays | program | manifest, index |',
    '| --- ' * 8 + '|',
  ]
  for run in found['runs']:
    size = run['size']
    parts = size['parts']
    cells = [
      _network(run),
      f'{size["integers_at_their_bits"]:,}',
      f'{size["floats"]:,}',
      f'{size["bytes"]:,}',
      f'{size["over_integers_and_floats"]:.3f}',
      f'{parts["arrays"]:,}',
      f'{parts["program.xz"]:,}',
      f'{parts["manifest.json"] + parts["index.xz"]:,}',
    ]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n\n' + _made_at_once(found)


def _network(run: dict) -> str:
  size = ' x '.join(map(str, run['input_shape'][:2]))
  return (
    f'{run["model"]}, {size}, {run["weights"]} weights, '
    f'{run["relative_macs"]:.0%} of the MACs'
  )


def _made_at_once(found: dict) -> str:
  """How to make what one commit measured again."""
  made = found['environment']
  return (
    f'`{made["command"]}`, commit {found["commit"]}, {made["machine"]}, jax '
    f'{made["versions"]["jax"]}.\n'
  )


def text(name: str) -> str:
  """The block of a name."""
  special = {
    'demo': demo,
    'reliability': reliability,
    'inference': inference,
    'inference_resnet18': lambda: inference('inference_resnet18'),
    'step_cost': step_cost,
    'devices': devices,
    'peers_digits': peers_digits,
    'export': export,
    'artifact_size': artifact_size,
    'layer_profile': layer_profile,
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
  for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))):
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
