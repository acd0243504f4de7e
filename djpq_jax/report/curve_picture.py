"""Accuracy, BOPs, bits and channels over the steps, as a PNG."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from djpq_jax.report import style
from djpq_jax.report import text

Records = Sequence[Mapping[str, Any]]


def plot_curves(
  report: Mapping[str, Any], path: str | os.PathLike[str]
) -> pathlib.Path:
  """Draws accuracy, BOPs, bits and kept channels over the steps, as a PNG.

  Args:
    report: see `djpq_jax.report`; it needs a `history`.
    path: of the PNG; its folder is created if missing.

  Returns:
    The path.

  Raises:
    ImportError: matplotlib is not installed.
    ValueError: the report has no history.
  """
  history = report.get('history')
  if not history:
    raise ValueError('the report has no history, so there are no curves')
  steps = _running_steps(history)
  figure = style.figure(text.verdict(report), 6.8)
  (accuracy, bops), (bits, kept) = figure.subplots(2, 2, sharex=True)
  _draw_accuracy(accuracy, steps, report)
  _draw_bops(bops, steps, history, report['budget'])
  _draw_mean_bits(bits, steps, history)
  _draw_kept(kept, steps, history)
  bits.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
  for axes in (accuracy, bops, bits, kept):
    style.dress(axes, 'y')
    _shade_phases(axes, steps, history, names=axes in (accuracy, bops))
  for axes in (bits, kept):
    axes.set_xlabel('training step', fontsize=style.SMALL, color=style.INK)
  return style.save(figure, path)


def _draw_accuracy(
  axes: Any, steps: Sequence[float], report: Mapping[str, Any]
) -> None:
  history = report['history']
  train = _series(steps, history, 'accuracy', 100)
  test = _series(steps, history, 'eval_accuracy', 100)
  final = 100 * report['float_accuracy'], 100 * report['accuracy']
  axes.axhline(final[0], color=style.GREY, lw=1.2, ls='--', label='float32')
  axes.plot(*train, color=style.BLUE, alpha=0.45, lw=1, label='training batch')
  if test[0]:
    axes.plot(*test, color=style.ORANGE, lw=1.5, marker='o', ms=3, label='test')
  axes.plot(
    steps[-1:],
    final[1:],
    color=style.RED,
    marker='D',
    ms=5,
    ls='',
    clip_on=False,
    zorder=3,
    label='hardened',
  )
  # The first steps are guesses; they would squeeze all the others.
  seen = [y for _, y in _later(steps, train) + _later(steps, test)]
  axes.set_ylim(min(90, 5 * (min([*seen, *final]) // 5)), 100.6)
  style.title(axes, 'Accuracy, %', lift=10)


def _later(
  steps: Sequence[float], series: tuple[Sequence[float], Sequence[float]]
) -> list[tuple[float, float]]:
  """The points after the first twentieth of the run."""
  start = steps[0] + (steps[-1] - steps[0]) / 20
  return [(x, y) for x, y in zip(*series, strict=True) if x > start]


def _draw_bops(
  axes: Any,
  steps: Sequence[float],
  history: Records,
  budget: float | None,
) -> None:
  from matplotlib import ticker

  x, y = _series(steps, history, 'relative_bops', 100)
  axes.plot(x, y, color=style.BLUE, lw=1.5, label='model')
  if budget:
    label = f'budget {text.percent(budget)}'
    axes.axhline(100 * budget, color=style.RED, lw=1.2, ls='--', label=label)
  axes.set_yscale('log')
  low, high = axes.get_ylim()
  digits = (1, 2, 5) if high < 300 * low else (1,)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits))
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.yaxis.set_minor_formatter(lambda value, _: '')
  style.title(axes, 'BOPs, % of float32', lift=10)


def _draw_mean_bits(
  axes: Any, steps: Sequence[float], history: Records
) -> None:
  for key, label, colour in (
    ('mean_weight_bits', 'weights', style.BLUE),
    ('mean_act_bits', 'activations', style.ORANGE),
  ):
    series = _series(steps, history, key)
    axes.plot(*series, color=colour, lw=1.5, label=label)
  axes.set_ylim(bottom=0)
  style.title(axes, 'Mean bits')


def _draw_kept(axes: Any, steps: Sequence[float], history: Records) -> None:
  series = _series(steps, history, 'kept_fraction', 100)
  axes.plot(*series, color=style.GREEN, lw=1.5)
  axes.set_ylim(0, 104)
  style.title(axes, 'Channels kept, %')


def _series(
  steps: Sequence[float], history: Records, key: str, scale: float = 1
) -> tuple[list[float], list[float]]:
  """The steps at which something was measured, and what."""
  points = [
    (step, scale * record[key])
    for step, record in zip(steps, history, strict=True)
    if record.get(key) is not None
  ]
  return [x for x, _ in points], [y for _, y in points]


def _running_steps(history: Records) -> list[float]:
  """Steps that go on where a phase starts to count from zero again.

  >>> _running_steps([{'step': s} for s in (0, 10, 20, 0, 10)])
  [0, 10, 20, 20, 30]
  """
  steps: list[float] = []
  offset = 0
  for record in history:
    if steps and record['step'] + offset < steps[-1]:
      offset = steps[-1] - record['step']
    steps.append(record['step'] + offset)
  return steps


def _shade_phases(
  axes: Any, steps: Sequence[float], history: Records, *, names: bool
) -> None:
  """Every other phase on grey, with its name on top."""
  spans = _phase_spans(steps, history)
  width = max(spans[-1][2] - spans[0][1], 1)
  for index, (name, start, end) in enumerate(spans):
    if index % 2 == 0:
      axes.axvspan(start, end, color=style.SHADE, lw=0, zorder=0)
    if names and (end - start) / width > 0.014 * len(name):
      axes.annotate(
        name,
        ((start + end) / 2, 1),
        (0, 3),
        xycoords=axes.get_xaxis_transform(),
        textcoords='offset points',
        ha='center',
        fontsize=7.5,
        color='#666666',
      )


def _phase_spans(
  steps: Sequence[float], history: Records
) -> list[tuple[str, float, float]]:
  """Name, start and end of each phase; a phase lasts until the next starts.

  >>> rows = [{'phase': p} for p in ('float', 'float', 'joint', 'joint')]
  >>> _phase_spans([0, 10, 20, 30], rows)
  [('float', 0, 20), ('joint', 20, 30)]
  """
  names = [str(record.get('phase') or '') for record in history]
  starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
  ends = [steps[i] for i in starts[1:]] + [steps[-1]]
  return [
    (names[i], steps[i], end) for i, end in zip(starts, ends, strict=True)
  ]
