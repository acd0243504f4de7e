"""The tables of time, memory and size; see tables.py."""

import collections

import compare
import numpy as np
import result_files


def inference(name: str = 'inference') -> str:
  """Milliseconds of float32, and how many times faster the others are."""
  found = result_files.read(name)
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
  return compare.markdown(head, rows) + result_files.made(found)


PROFILED = ('dequantized', 'float', 'int8')


def layer_profile() -> str:
  """Where the time of ResNet-20 goes: each layer alone, at batch 64."""
  found = result_files.read('inference_cifar')
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
  return compare.markdown(head, lines) + result_files.made(found)


STEPS = ('float', 'search', 'gates alone', 'bits alone', 'finetune')


def step_cost() -> str:
  """What a step of each phase takes of the float step."""
  found = result_files.read('step_cost')
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
  return compare.markdown(head, rows) + result_files.made(found)


# The last commit whose kernels' slopes are XLA's own.
BEFORE_SLOPES = '537cfa7'
# What tells glibc so, in a command.
TUNABLES = {'huge pages': 'hugetlb=1', 'kept': 'arena_max=1'}


def step_memory() -> str:
  """Milliseconds of steps by what glibc does with memory that is freed."""
  found = result_files.read('step_memory')
  phases = ('float', 'search', 'finetune')
  times = collections.defaultdict(list)
  for run in found['runs']:
    command = run['environment']['command']
    said = [w for w, at in TUNABLES.items() if at in command]
    setting = run['model'], run['batch'], ', '.join(said) or 'as it is'
    times[*setting, run['phase']].append(1e3 * run['step_seconds'])
  rows = []
  for setting in dict.fromkeys(key[:-1] for key in times):
    row = [str(s) for s in setting]
    row += [f'{np.mean(times[*setting, phase]):.0f} ms' for phase in phases]
    rows.append(row)
  head = ' | '.join(['model | batch | memory', *phases])
  return compare.markdown(head, rows) + result_files.made(found)


def step_slopes() -> str:
  """Milliseconds of steps with kernels' slopes by XLA, and as they are now."""
  found = result_files.read('step_slopes')
  phases = ('float', 'search', 'finetune')
  times: dict[tuple[str, ...], dict[str, float]] = {}
  for run in found['runs']:
    how = 'all at once' if run['commit'] == BEFORE_SLOPES else 'a few'
    setting = run['model'], str(run['batch']), how
    times.setdefault(setting, {})[run['phase']] = 1e3 * run['step_seconds']
  rows = [
    [*setting, *(f'{found[phase]:.0f} ms' for phase in phases)]
    for setting, found in times.items()
  ]
  head = ' | '.join(['model | batch | images', *phases])
  return compare.markdown(head, rows) + result_files.made(found)


def step_profile() -> str:
  """Milliseconds of each part of a step, of the float step and the search."""
  found = result_files.read('step_profile')
  parts = ('products', 'quantizers', 'gates', 'cost', 'optimizer', 'other')
  rows = [
    [
      run['model'],
      str(run['batch']),
      run['phase'],
      *(f'{run["milliseconds"].get(part, 0):.1f}' for part in parts),
      f'{run["step_milliseconds"]:.1f}',
    ]
    for run in found['runs']
  ]
  head = ' | '.join(['model | batch | step', *parts, 'the whole step'])
  return compare.markdown(head, rows) + result_files.made(found)


def vectorised_search() -> str:
  """Steps of several budgets in one program, and one after the other."""
  found = result_files.read('vectorised_search')
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
  return compare.markdown(head, rows) + result_files.made(found)


def devices() -> str:
  """Steps per second on several devices, and what they exchange."""
  found = result_files.read('devices')
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
  return compare.markdown(head, rows) + result_files.made(found)


def export() -> str:
  """How far each written file is from its model."""
  found = result_files.read('export')
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
  return compare.markdown(head, rows) + result_files.made(found)


def artifact_size() -> str:
  """What artifacts take, beside their numbers at their bits."""
  found = result_files.read('export')
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
  return compare.markdown(head, rows) + result_files.made(found)


def _network(run: dict) -> str:
  size = ' x '.join(map(str, run['input_shape'][:2]))
  return (
    f'{run["model"]}, {size}, {run["weights"]} weights, '
    f'{run["relative_macs"]:.0%} of the MACs'
  )
