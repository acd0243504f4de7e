"""The report on a terminal: 80 columns, and no need of colour."""

from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import rich.text

from djpq_jax import cost

Report = Mapping[str, Any]


def table(report: Report) -> rich.table.Table:
  """The layers, one per row: channels, bits, MACs and BOPs that are left.

  Args:
    report: see `djpq_jax.report`.

  Returns:
    A table that fits 80 columns; print it with rich.
  """
  out = _frame(show_footer=True)
  out.add_column('Layer', 'total', overflow='fold', min_width=6)
  for name, total in (
    ('Inputs', ''),
    ('Outputs', ''),
    ('Wgt\nbits', ''),
    ('Act\nbits', ''),
    ('MACs', si(report['macs'])),
    ('BOPs', si(report['bops'])),
    ('BOPs\nshare', '100 %'),
  ):
    out.add_column(
      name, total, justify='right', vertical='bottom', no_wrap=True
    )
  for layer in report['layers']:
    out.add_row(rich.text.Text(layer['name']), *_cells(layer, report['bops']))
  return out


def summary(report: Report) -> rich.table.Table:
  """The float32 model against the hardened one.

  Args:
    report: see `djpq_jax.report`.

  Returns:
    A table that fits 80 columns; print it with rich.
  """
  out = _frame()
  out.add_column('')
  for name in ('float32', 'hardened', ''):
    out.add_column(name, justify='right', no_wrap=True)
  old, new = report['float_accuracy'], report['accuracy']
  points = f'{100 * (new - old):+.2f} points'
  out.add_row('accuracy', f'{100 * old:.2f} %', f'{100 * new:.2f} %', points)
  for name, key in (('MACs', 'macs'), ('bit operations (BOPs)', 'bops')):
    old, new = report[f'float_{key}'], report[key]
    out.add_row(name, si(old), si(new), f'{times(old, new)} fewer')
  old, new = report.get('float_bytes'), report['artifact_bytes']
  if old is None:
    out.add_row('size of the file', '', f'{si(new)}B', '')
  else:
    ratio = times(old, new)
    out.add_row('size', f'{si(old)}B', f'{si(new)}B', f'{ratio} smaller')
  return out


def headline(report: Report) -> str:
  """The result in one line.

  >>> headline(dict(relative_bops=0.00198, budget=0.002))
  'BOPs: 0.198 % of float32 (505x fewer), budget 0.2 %'
  """
  relative = report['relative_bops']
  line = f'BOPs: {percent(relative)} of float32'
  if relative > 0:
    line += f' ({times(1, relative)} fewer)'
  if report['budget'] is not None:
    line += f', budget {percent(report["budget"])}'
  return line


def other_budgets(report: Report) -> list[str]:
  """What became of the budgets of other costs than BOPs, a line for each.

  >>> other_budgets(dict(budgets={'bops': 0.01, 'weights': 0.05},
  ...                    relative_weights=0.0493))
  ['weight bits: 4.93 % of float32, budget 5 %']
  """
  return [
    f'{cost.COSTS[name]}: {percent(report[f"relative_{name}"])} of float32, '
    f'budget {percent(limit)}'
    for name, limit in report.get('budgets', {}).items()
    if name != 'bops'
  ]


def print_report(
  report: Report, console: rich.console.Console | None = None
) -> None:
  """Prints the layers, what could not be pruned and why, and the summary.

  Args:
    report: see `djpq_jax.report`.
    console: where to; the standard output if None.
  """
  console = console or rich.console.Console()
  console.print(table(report))
  _line(console, '')
  for reason, names in _unpruned(report.get('groups') or ()).items():
    _line(console, f'Not pruned: {", ".join(names)} ({reason})')
  _line(console, '')
  console.print(summary(report))
  _line(console, '')
  for line in [headline(report), *other_budgets(report)]:
    _line(console, line)
  _line(
    console,
    f'seed {report["seed"]}, {report["seconds"]:.0f} seconds; accuracy and '
    'BOPs are those of the reloaded file',
  )


def si(value: float) -> str:
  """Three digits and a prefix.

  >>> si(40_813_184), si(630.7e9), si(512), si(0), si(999_999)
  ('40.8 M', '631 G', '512 ', '0 ', '1.00 M')
  """
  prefixes = ['', 'k', 'M', 'G', 'T', 'P', 'E']
  while abs(value) >= 999.5 and len(prefixes) > 1:
    value, prefixes = value / 1000, prefixes[1:]
  whole = prefixes[0] == '' and float(value).is_integer()
  return f'{value:.0f} ' if whole else f'{_digits(value)} {prefixes[0]}'


def percent(fraction: float) -> str:
  """Three digits, without trailing zeros.

  >>> percent(0.00198), percent(0.002), percent(1.0), percent(0.123456)
  ('0.198 %', '0.2 %', '100 %', '12.3 %')
  """
  return f'{float(f"{100 * fraction:.3g}"):g} %'


def times(old: float, new: float) -> str:
  """How many times less.

  >>> times(8.1e9, 16e6), times(10, 4), times(3, 3), times(3, 0)
  ('506x', '2.5x', '1x', 'infinitely')
  """
  if not new:
    return 'infinitely'
  return f'{float(f"{old / new:.{3 if old > 9.95 * new else 2}g}"):g}x'


def _frame(**options: Any) -> rich.table.Table:
  return rich.table.Table(
    box=rich.box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    collapse_padding=True,
    **options,
  )


def _cells(layer: Report, total: float) -> list[str]:
  """All but the name."""
  return [
    _of(layer['kept_in'], layer.get('in_size')),
    _of(layer['kept_out'], layer.get('out_size')),
    f'{layer["weight_bits"]:g}',
    f'{layer["act_bits"]:g}',
    si(layer['macs']),
    si(layer['bops']),
    f'{100 * layer["bops"] / (total or 1):.1f} %',
  ]


def _of(kept: int, size: int | None) -> str:
  return f'{kept}' if size is None else f'{kept} of {size}'


def _digits(value: float) -> str:
  """Three digits, with the zeros that a column of numbers wants."""
  decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
  return f'{value:.{decimals}f}'


def _unpruned(groups: Sequence[Report]) -> dict[str, list[str]]:
  """The names of the groups behind each reason."""
  out: dict[str, list[str]] = {}
  for group in groups:
    if group.get('reason'):
      out.setdefault(group['reason'], []).append(group['name'])
  return out


def _line(console: rich.console.Console, text: str) -> None:
  console.print(text, markup=False, highlight=False)


def verdict(report: Mapping[str, Any]) -> str:
  """Accuracy and BOPs in one line, for the top of a picture."""
  relative = report['relative_bops']
  return (
    f'{100 * report["accuracy"]:.2f} % accuracy at {percent(relative)} of '
    f'the bit operations (float32: {100 * report["float_accuracy"]:.2f} %)'
  )
