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
from typing import Any

import compare
import rich.console

from djpq_jax import report

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
BLOCK = re.compile(r'(<!-- table (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)


def demo() -> str:
  """What `make demo` printed."""
  found = _result('demo')
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
  result: dict[str, Any] = {
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
  found = _result(name)
  return f'{compare.table(found["runs"])}\n\n{_made(found)}'


HEADLINES = {
  'digits': 'digits',
  'ResNet-20, CIFAR-10': 'resnet20_cifar10',
}


def headline() -> str:
  """DJPQ at each budget, two-stage at the same, and the nearest uniform bits.

  Uniform bits cannot meet a budget: theirs are the fewest that cost as much.
  """
  rows = []
  for task, name in HEADLINES.items():
    groups = compare.grouped(_result(name)['runs'])
    bops = {n: _mean(runs, 'relative_bops') for n, runs in groups.items()}
    for contestant, runs in groups.items():
      budget = re.fullmatch(r'DJPQ (@.*)', contestant)
      if not budget:
        continue
      own = bops[contestant]
      staged = [n for n in groups if _is_two_stage(n, budget[1])]
      uniform = [n for n in groups if re.fullmatch(r'W\dA\d', n)]
      uniform = [n for n in uniform if bops[n] > 0.99 * own]
      others = [
        min(uniform, key=lambda n: bops[n]) if uniform else None,
        *(staged or [None]),
      ]
      cells = [_accuracy(groups[n]) if n else '' for n in others]
      if uniform:
        cells[0] = f'{others[0]}: {cells[0]} at {bops[others[0]]:.2%}'
      rows.append([task, f'{own:.3%}', _accuracy(runs), *reversed(cells)])
  head = 'task | BOPs | DJPQ | two-stage | the fewest uniform bits above'
  return compare.markdown(head, rows)


def _is_two_stage(name: str, budget: str) -> bool:
  return bool(re.fullmatch(rf'two-stage( \d+% MACs)? {budget}', name))


def _mean(runs: list[dict], key: str) -> float:
  return sum(run[key] for run in runs) / len(runs)


def _accuracy(runs: list[dict]) -> str:
  seeds = f'{len(runs)} seeds' if len(runs) > 1 else '1 seed'
  return f'{_mean(runs, "accuracy"):.2%} ({seeds})'


def alignment() -> str:
  """What channels in multiples cost, and which are left with one seed."""
  found = _result('alignment')
  rows = []
  for name, runs in compare.grouped(found['runs']).items():
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
  return compare.markdown(head, rows) + _made(found)


def reliability() -> str:
  """Of each contestant, how many seeds failed, and the worst of the others."""
  found = _result('reliability')
  rows = []
  for name, runs in compare.grouped(found['runs']).items():
    good = [run for run in runs if 'error' not in run]
    cells = [name, str(len(runs)), str(len(runs) - len(good))]
    if good:
      accuracy = [run['accuracy'] for run in good]
      relative = [run['relative_bops'] for run in good]
      mean = sum(accuracy) / len(accuracy)
      cells += [f'{a:.2%}' for a in (min(accuracy), mean, max(accuracy))]
      cells += [f'{r:.4%}' for r in (max(relative), min(relative))]
    rows.append(cells + [''] * (8 - len(cells)))
  head = (
    'contestant | seeds | failed | least accuracy | mean | best | BOPs, most '
    '| least'
  )
  return compare.markdown(head, rows) + _made(found)


def inference(name: str = 'inference') -> str:
  """Milliseconds of float32, and how many times faster the others are."""
  found = _result(name)
  rows = []
  for run in found['runs']:
    cells = [
      f'{row["median_ms"]:.1f} ms'
      if name == 'float32'
      else f'{row["median_ms_float32_over_this"]:.2f}x'
      for name, row in run['rows'].items()
    ]
    rows.append([run['model'], f'{run["keep"]:.0%}', str(run['batch']), *cells])
  head = ' | '.join(['model | channels | batch', *found['runs'][0]['rows']])
  return compare.markdown(head, rows) + _made(found)


def layer_profile() -> str:
  """Where the time of ResNet-20 goes: each layer alone, at batch 64."""
  found = _result('inference_cifar')
  run = next(r for r in found['runs'] if (r['keep'], r['batch']) == (1, 64))
  stages: dict[str, list[dict]] = {}
  for row in run['layers']:
    stages.setdefault(row['layer'].partition('/')[0], []).append(row)
  stages['all'] = run['layers']
  lines = []
  for name, rows in stages.items():
    total = {k: sum(r[k] for r in rows) for k in ('macs', *PROFILED)}
    lines.append(
      [
        name,
        f'{total["macs"] / 1e6:.0f} M',
        *(f'{total[k]:.1f} ms' for k in PROFILED),
        f'{total["macs"] / total["int8"] / 1e6:.0f} G',
      ]
    )
  head = 'layers | MACs of a batch | dequantized | float | int8 | int8, MACs/s'
  return compare.markdown(head, lines) + _made(found)


PROFILED = ('dequantized', 'float', 'int8')


STEPS = ('float', 'search', 'gates alone', 'bits alone', 'finetune')


def step_cost() -> str:
  """What a step of each phase takes of the float step."""
  found = _result('step_cost')
  rows = []
  for k in range(0, len(found['runs']), len(STEPS)):
    run = found['runs'][k : k + len(STEPS)]
    assert tuple(step['phase'] for step in run) == STEPS
    one = run[0]
    cells = [
      one['model'],
      'x'.join(map(str, one['input_shape'])),
      str(one['batch']),
      f'{1e3 * one["step_seconds"]:.0f} ms',
      *(f'{step["over_float"]:.2f}x' for step in run[1:]),
    ]
    shown = [step for step in run if 'alone' not in step['phase']]
    cells += [
      ' / '.join(f'{step["compile_seconds"]:.0f}' for step in shown),
      ' / '.join(f'{step["temporaries_MB"]:.0f}' for step in shown),
    ]
    rows.append(cells)
  head = (
    'model | image | batch | float step | search | gates alone | bits alone '
    '| finetuning | compile, s | temporaries, MB'
  )
  return compare.markdown(head, rows) + _made(found)


def step_profile() -> str:
  """Milliseconds of each part of a step, of the float step and the search."""
  found = _result('step_profile')
  parts = ('products', 'quantizers', 'gates', 'cost', 'optimizer', 'other')
  rows = [
    [
      run['model'],
      str(run['batch']),
      run['phase'],
      *(f'{run["milliseconds"].get(part, 0):.1f}' for part in parts),
    ]
    for run in found['runs']
  ]
  head = ' | '.join(['model | batch | step', *parts])
  return compare.markdown(head, rows) + _made(found)


def vectorised_search() -> str:
  """Steps of several budgets in one program, and one after the other."""
  found = _result('vectorised_search')
  rows = [
    [
      run['model'],
      str(run['batch']),
      str(run['budgets']),
      f'{1e3 * run["in_turn_seconds"]:.0f} ms',
      f'{1e3 * run["together_seconds"]:.0f} ms',
      f'{run["speedup"]:.2f}x',
      f'{run["compile_one_seconds"]:.0f} / {run["compile_seconds"]:.0f} s',
    ]
    for run in found['runs']
  ]
  head = (
    'model | batch | budgets | in turn | in one program | speed-up | compile, '
    'one / all'
  )
  return compare.markdown(head, rows) + _made(found)


def devices() -> str:
  """Steps per second on several devices, and what they exchange."""
  found = _result('devices')
  rows = [
    [
      run['model'],
      str(run['batch']),
      run['wrapper'],
      str(run['devices']),
      f'{run["steps_per_second"]:.2f}',
      f'{run["exchanged_bytes"] / 1e6:.2f} MB',
      f'{1e3 * run["exchange_seconds"]:.1f} ms',
    ]
    for run in found['runs']
  ]
  head = (
    'model | batch | step | devices | steps/s | exchanged | the exchange alone'
  )
  return compare.markdown(head, rows) + _made(found)


def peers_digits() -> str:
  """Other libraries, and what their user had to train for a row."""
  found = _result('peers_digits')
  lines = compare.table(found['runs']).splitlines()
  lines[0] += ' trainings of each seed |'
  lines[1] += ' --- |'
  for k, runs in enumerate(compare.grouped(found['runs']).values(), start=2):
    counts = ', '.join(str(run['trainings']) for run in runs)
    lines[k] += f' {counts} |'
  return '\n'.join(lines) + '\n\n' + _made(found)


def export() -> str:
  """How far each written file is from its model."""
  found = _result('export')
  rows = []
  for run in found['runs']:
    least, most = run['bits']
    for file in run['files']:
      rows.append(
        [
          _network(run),
          f'{least}-{most}' if least < most else str(least),
          f'{file["format"]} {file["form"] or file["batch"]}',
          f'{file["images"]:,}',
          f'{file["predictions"]:,}',
          f'{file["beyond_step"]:,}',
          f'{100 * file["largest"] / file["logit_range"]:.2g}',
          f'{file["bytes"]:,}',
        ]
      )
  head = (
    'network | bits | file | images | other predictions | logits off by more '
    'than a step | at most, % of their range | bytes'
  )
  return compare.markdown(head, rows) + _made(found)


def artifact_size() -> str:
  """What artifacts take, beside their numbers at their bits."""
  found = _result('export')
  rows = []
  for run in found['runs']:
    size = run['size']
    parts = size['parts']
    rows.append(
      [
        _network(run),
        f'{size["integers_at_their_bits"]:,}',
        f'{size["floats"]:,}',
        f'{size["bytes"]:,}',
        f'{size["over_integers_and_floats"]:.3f}',
        f'{parts["arrays"]:,}',
        f'{parts["program.xz"]:,}',
        f'{parts["manifest.json"] + parts["index.xz"]:,}',
      ]
    )
  head = (
    'network | integers at their bits | floats | artifact | over both | of '
    'it arrays | program | manifest, index'
  )
  return compare.markdown(head, rows) + _made(found)


def _network(run: dict) -> str:
  size = ' x '.join(map(str, run['input_shape'][:2]))
  return (
    f'{run["model"]}, {size}, {run["weights"]} weights, '
    f'{run["relative_macs"]:.0%} of the MACs'
  )


def _result(name: str) -> dict:
  """What a benchmark wrote."""
  return json.loads((RESULTS / f'{name}.json').read_text())


def _made(found: dict) -> str:
  """How to make a result again.

  A file says it once or each run for itself; commits may differ by run in any
  case, and a file that several commands added to has them all.
  """
  runs = found['runs']
  made = [r['environment'] for r in runs if 'environment' in r]
  made = made or [found['environment']]
  commands = [c for m in made for c in m.get('commands') or [m['command']]]
  commits = {r.get('commit') or found['commit'] for r in runs}
  versions = made[0]['versions'].items()
  return (
    '; '.join(f'`{command}`' for command in dict.fromkeys(commands))
    + f', commit {", ".join(sorted(commits))}, {made[0]["machine"]}, '
    + ', '.join(f'{name} {version}' for name, version in versions)
    + '.\n'
  )


def text(name: str) -> str:
  """The block of a name."""
  special = {
    'demo': demo,
    'headline': headline,
    'alignment': alignment,
    'reliability': reliability,
    'inference': inference,
    'inference_resnet18': lambda: inference('inference_resnet18'),
    'step_cost': step_cost,
    'step_profile': step_profile,
    'vectorised_search': vectorised_search,
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
