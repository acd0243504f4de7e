"""Loss, accuracy, BOPs, bits and channels over the steps, for the page."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from djpq_jax import cost
from djpq_jax.report import chart
from djpq_jax.report import history as history_lib
from djpq_jax.report import text

# More points than this are fewer pixels than half of one apart.
MOST_POINTS = 700
Points = list[tuple[int, float, float]]  # index of the record, step, value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Series:
  key: str
  label: str
  colour: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """A chart to be: what it draws, in which unit, on which axis."""

  key: str
  title: str
  series: Sequence[_Series]
  show: Callable[[float], str]  # a value, with its unit
  axis: Callable[[list[float], list[float]], chart.Axis]  # of all, and later
  scale: float = 1
  references: Sequence[tuple[float, str, str]] = ()  # value, label, colour


def charts(report: Mapping[str, Any], prefix: str) -> list[chart.Chart]:
  """The training curves of a report.

  Args:
    report: see `djpq_jax.report`.
    prefix: of the charts' keys, to tell runs apart.

  Returns:
    One chart for each thing that the history holds; none without a history.
  """
  history = report.get('history') or []
  if not history:
    return []
  steps = history_lib.running_steps(history)
  kept = _kept(history)
  steps, history = [steps[i] for i in kept], [history[i] for i in kept]
  drawn = (
    _chart(plan, steps, history, prefix) for plan in _plans(report, history)
  )
  return [found for found in drawn if found is not None]


def _plans(report: Mapping[str, Any], history: history_lib.Records):
  percent = lambda value: f'{value:.2f} %'
  yield _Plan(
    key='loss',
    title='Loss',
    series=_losses(history),
    show='{:.4g}'.format,
    axis=lambda every, later: chart.vertical(*_loss_range(later or every)),
  )
  yield _cost('bops', report['budget'])
  for name, budget in (report.get('budgets') or {}).items():
    if name != 'bops':
      yield _cost(name, budget)
  yield _Plan(
    key='bits',
    title='Mean bits',
    series=[
      _Series(key='mean_weight_bits', label='weights', colour='blue'),
      _Series(key='mean_act_bits', label='activations', colour='orange'),
    ],
    show='{:.2f}'.format,
    axis=lambda every, later: chart.vertical(0, 1.08 * max([*every, 1])),
  )
  yield _Plan(
    key='kept',
    title='Channels kept, %',
    series=[_Series(key='kept_fraction', label='', colour='green')],
    show=percent,
    axis=lambda every, later: chart.vertical(0, 105),
    scale=100,
  )
  yield _Plan(
    key='accuracy',
    title='Accuracy, %',
    series=[
      _Series(key='accuracy', label='training batch', colour='blue'),
      _Series(
        key='eval_accuracy',
        label=history_lib.watched(report),
        colour='orange',
      ),
    ],
    show=percent,
    axis=lambda every, later: chart.vertical(
      min(90, 5 * (min(later or every) // 5)), 101
    ),
    scale=100,
    references=[
      (100 * report['float_accuracy'], 'float32, test', 'grey'),
      (100 * report['accuracy'], 'hardened, test', 'red'),
    ],
  )


def _cost(name: str, budget: float | None) -> _Plan:
  """One relative cost against its budget, if it has one."""
  title = f'{cost.COSTS[name]}, % of float32'
  return _Plan(
    key=name,
    title=title[0].upper() + title[1:],
    series=[_Series(key=f'relative_{name}', label='model', colour='blue')],
    show=lambda value: text.percent(value / 100),
    axis=lambda every, later: chart.vertical(
      *chart.padded_log([v for v in every if v > 0] or [1]), log=True
    ),
    scale=100,
    references=[(100 * budget, f'budget {text.percent(budget)}', 'red')]
    if budget
    else (),
  )


def _losses(history: history_lib.Records) -> list[_Series]:
  """The task's part of the loss, and the whole where it is another."""
  task = _Series(key='task_loss', label='task', colour='blue')
  whole = _Series(key='loss', label='with BOPs and gates', colour='orange')
  different = any(
    record.get('task_loss') is not None
    and record.get('loss') is not None
    and record['task_loss'] != record['loss']
    for record in history
  )
  if different:
    return [whole, task]  # where they are equal, the task covers the whole
  return [dataclasses.replace(whole, label='', colour='blue')]


def _loss_range(values: list[float]) -> tuple[float, float]:
  low, high = chart.padded(values)
  return (0 if min(values) >= 0 else low), high


def _kept(history: history_lib.Records) -> list[int]:
  """So few records that the page stays small; ends of phases stay."""
  phases = [record.get('phase') for record in history]
  last = len(phases) - 1
  ends = lambda i: i == last or phases[i] != phases[i + 1]
  return chart.thinned(len(history), MOST_POINTS, ends)


def _chart(plan: _Plan, steps, history, prefix: str) -> chart.Chart | None:
  found = {s: _points(steps, history, s.key, plan.scale) for s in plan.series}
  found = {s: points for s, points in found.items() if points}
  if not found:
    return None
  every = [y for points in found.values() for _, _, y in points]
  references = [value for value, _, _ in plan.references]
  start = history_lib.settled_from(steps)
  later = [y for points in found.values() for _, x, y in points if x > start]
  axis = plan.axis([*every, *references], [*later, *references])
  across = chart.horizontal(steps[0], max(steps[-1], steps[0] + 1))
  lines = [
    chart.Line(
      path=chart.level_line(axis, value), colour=c, label=label, dashed=True
    )
    for value, label, c in plan.references
  ]
  for series, points in found.items():
    path = ''.join(_phase_paths(points, history, across, axis))
    lines.append(
      chart.Line(path=path, colour=series.colour, label=series.label)
    )
  return chart.Chart(
    key=f'{prefix}-{plan.key}',
    title=plan.title,
    description=_description(plan, found),
    x_label='training step',
    x_ticks=across.ticks(),
    y_ticks=axis.ticks(),
    bands=_bands(steps, history, across),
    lines=lines,
    tips=_tips(plan, found, history, across),
  )


def _points(steps, history, key: str, scale: float) -> Points:
  """Not at zero on an axis of logarithms, which no run reaches."""
  return [
    (i, step, scale * record[key])
    for i, (step, record) in enumerate(zip(steps, history, strict=True))
    if record.get(key) is not None
  ]


def _phase_paths(points: Points, history, across, axis) -> list[str]:
  """One line per phase: losses of two phases are of two kinds."""
  parts: dict[str, list[tuple[float, float]]] = {}
  for i, step, value in points:
    if axis.log and value <= 0:
      continue
    name = str(history[i].get('phase') or '')
    parts.setdefault(name, []).append((across(step), axis(value)))
  return [chart.path(part) for part in parts.values()]


def _bands(steps, history, across: chart.Axis) -> list[chart.Band]:
  spans = history_lib.phase_spans(steps, history)
  bands = []
  for number, (name, start, end) in enumerate(spans):
    width = across(end) - across(start)
    fits = width > 6.2 * len(name)
    bands.append(
      chart.Band(
        start=across(start),
        width=round(width, 1),
        name=name if fits else '',
        shaded=number % 2 == 0,
      )
    )
  return bands


def _tips(plan: _Plan, found, history, across) -> list[chart.Tip]:
  rows: dict[int, list[str]] = {}
  places: dict[int, float] = {}
  for series, points in found.items():
    for i, step, value in points:
      phase = history[i].get('phase')
      head = f'step {step:,g}' + (f', {phase}' if phase else '')
      name = f'{series.label}: ' if series.label else ''
      rows.setdefault(i, [head]).append(name + plan.show(value))
      places[i] = across(step)
  return [
    chart.Tip(x=places[i], y=None, text='\n'.join(rows[i]))
    for i in sorted(rows)
  ]


def _description(plan: _Plan, found: Mapping[_Series, Points]) -> str:
  parts = []
  for series, points in found.items():
    (_, first, start), (_, last, end) = points[0], points[-1]
    name = f'{series.label} ' if series.label else ''
    parts.append(
      f'{name}from {plan.show(start)} at step {first:,g} to {plan.show(end)} '
      f'at step {last:,g}'
    )
  lines = [f'{label}: {plan.show(v)}' for v, label, _ in plan.references]
  return f'{plan.title} over the training steps: {"; ".join(parts + lines)}.'
