"""Accuracy against bit operations of several runs, for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from djpq_jax.report import chart
from djpq_jax.report import text

Named = Sequence[tuple[str, Mapping[str, Any]]]


def front(reports: Named) -> list[str]:
  """Names of the runs than which no other is as accurate with as few BOPs.

  Args:
    reports: names and reports.

  Returns:
    The names, fewest BOPs first.

  >>> run = lambda bops, acc: dict(relative_bops=bops, accuracy=acc)
  >>> front([('a', run(0.1, 0.9)), ('b', run(0.2, 0.8)), ('c', run(0.3, 1))])
  ['a', 'c']
  """
  best, names = -1.0, []
  ranked = sorted(
    reports, key=lambda r: (r[1]['relative_bops'], -r[1]['accuracy'])
  )
  for name, report in ranked:
    if report['accuracy'] > best:
      best = report['accuracy']
      names.append(name)
  return names


def draw(reports: Named, key: str = 'pareto') -> chart.Chart:
  """Each run as a mark, the front as a line, methods by colour and shape.

  Args:
    reports: names and reports, at least one.
    key: of the chart, unique on the page.

  Returns:
    The chart.
  """
  x = {name: 100 * report['relative_bops'] for name, report in reports}
  y = {name: 100 * report['accuracy'] for name, report in reports}
  floats = sorted({report['float_accuracy'] for _, report in reports})
  shared = 100 * floats[0] if len(floats) == 1 else None
  heights = [*y.values(), *([] if shared is None else [shared])]
  across = chart.horizontal(*chart.padded_log(list(x.values())), log=True)
  up = chart.vertical(*chart.padded(heights, 0.12))
  best = front(reports)
  methods = list(dict.fromkeys(method_of(report) for _, report in reports))
  looks = {
    method: (chart.COLOURS[i % 5], chart.MARKS[i % 5])
    for i, method in enumerate(methods)
  }
  level = None if shared is None else chart.level_line(up, shared)
  lines = _lines(level, [(across(x[name]), up(y[name])) for name in best])
  marks, tips = [], []
  places = _places([(n, across(x[n]), up(y[n])) for n, _ in reports])
  for name, report in reports:
    colour, shape = looks[method_of(report)]
    marks.append(
      chart.Mark(
        x=across(x[name]),
        y=up(y[name]),
        colour=colour,
        shape=shape,
        name=name,
        place=places.get(name),
        hollow=name not in best,
      )
    )
    tips.append(
      chart.Tip(x=across(x[name]), y=up(y[name]), text=_tip(name, report))
    )
  return chart.Chart(
    key=key,
    title='Accuracy, %',
    description=_description(reports, best),
    x_label='BOPs, % of float32 (fewer is better)',
    x_ticks=across.ticks(),
    y_ticks=up.ticks(),
    lines=lines,
    marks=marks,
    tips=sorted(tips, key=lambda tip: tip.x),
    legend_marks=[
      chart.Mark(x=0, y=0, colour=colour, shape=shape, name=method)
      for method, (colour, shape) in looks.items()
    ],
  )


def _lines(
  level: str | None, points: Sequence[tuple[float, float]]
) -> list[chart.Line]:
  """The level of the float model, if all runs share one, and the front."""
  lines = []
  if level is not None:
    lines.append(
      chart.Line(path=level, colour='grey', label='float32', dashed=True)
    )
  if len(points) > 1:
    lines.append(
      chart.Line(path=chart.path(points), colour='front', label='best of these')
    )
  return lines


def _places(
  marks: Sequence[tuple[str, float, float]],
) -> dict[str, tuple[float, float]]:
  """Where names have room: above a mark, else below, else nowhere.

  The tips tell the names that found no room.
  """
  taken = [(x - 6, x + 6, y - 6, y + 6) for _, x, y in marks]
  found: dict[str, tuple[float, float]] = {}
  for name, x, y in marks:
    half = 3.9 * len(name)
    low, high = chart.LEFT + half, chart.RIGHT + 8 - half
    middle = round(min(max(x, low), high), 1)
    for height in (y - 15, y + 15):
      box = middle - half, middle + half, height - 7, height + 7
      inside = low <= high and chart.TOP - 8 < height < chart.BOTTOM - 4
      if inside and not any(_overlap(box, other) for other in taken):
        found[name] = middle, round(height, 1)
        taken.append(box)
        break
  return found


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
  return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def method_of(report: Mapping[str, Any]) -> str:
  """What a run did, as its config calls it; 'run' if it does not say."""
  config = report['config']
  name = config.get('method') if isinstance(config, Mapping) else None
  return str(name or 'run')


def _tip(name: str, report: Mapping[str, Any]) -> str:
  return (
    f'{name}\n{100 * report["accuracy"]:.2f} % accuracy\n'
    f'{text.percent(report["relative_bops"])} of the BOPs'
  )


def _description(reports: Named, best: Sequence[str]) -> str:
  parts = [_tip(name, report).replace('\n', ', ') for name, report in reports]
  return (
    f'Accuracy against relative BOPs of {len(reports)} runs: '
    f'{"; ".join(parts)}. No other run is as accurate with as few BOPs as '
    f'{" or ".join(best)}.'
  )
