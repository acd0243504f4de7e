"""Accuracy, BOPs, bits and channels over the steps, as a PNG."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from djpq_jax import cost
from djpq_jax.report import history as history_lib
from djpq_jax.report import style
from djpq_jax.report import text

Records = history_lib.Records


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
  steps = history_lib.running_steps(history)
  figure = style.figure(text.verdict(report), 6.8)
  (accuracy, bops), (bits, kept) = figure.subplots(2, 2, sharex=True)
  _draw_accuracy(accuracy, steps, report)
  _draw_costs(bops, steps, report)
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
  train = history_lib.series(steps, history, 'accuracy', 100)
  test = history_lib.series(steps, history, 'eval_accuracy', 100)
  watched = history_lib.watched(report)
  final = 100 * report['float_accuracy'], 100 * report['accuracy']
  axes.axhline(final[0], color=style.GREY, lw=1.2, ls='--', label='float32')
  axes.plot(*train, color=style.BLUE, alpha=0.45, lw=1, label='training batch')
  if test[0]:
    axes.plot(
      *test, color=style.ORANGE, lw=1.5, marker='o', ms=3, label=watched
    )
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
  start = history_lib.settled_from(steps)
  seen = [y for x, y in [*zip(*train), *zip(*test)] if x > start]
  axes.set_ylim(min(90, 5 * (min([*seen, *final]) // 5)), 100.6)
  style.title(axes, 'Accuracy, %', lift=10)


def _draw_costs(
  axes: Any, steps: Sequence[float], report: Mapping[str, Any]
) -> None:
  """BOPs, and what else has a budget, each with its budget dashed."""
  from matplotlib import ticker

  budgets = {'bops': report['budget'], **(report.get('budgets') or {})}
  alone = len(budgets) == 1
  for (name, budget), colour in zip(
    budgets.items(), (style.BLUE, style.ORANGE, style.GREEN)
  ):
    x, y = history_lib.series(steps, report['history'], f'relative_{name}', 100)
    said = 'model' if alone else cost.COSTS[name]
    axes.plot(x, y, color=colour, lw=1.5, label=said)
    if budget:
      label = f'budget {text.percent(budget)}'
      colour = style.RED if alone else colour
      axes.axhline(100 * budget, color=colour, lw=1.2, ls='--', label=label)
  axes.set_yscale('log')
  low, high = axes.get_ylim()
  digits = (1, 2, 5) if high < 300 * low else (1,)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits))
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.yaxis.set_minor_formatter(lambda value, _: '')
  what = 'BOPs' if alone else 'Costs'
  style.title(axes, f'{what}, % of float32', lift=10)


def _draw_mean_bits(
  axes: Any, steps: Sequence[float], history: Records
) -> None:
  for key, label, colour in (
    ('mean_weight_bits', 'weights', style.BLUE),
    ('mean_act_bits', 'activations', style.ORANGE),
  ):
    series = history_lib.series(steps, history, key)
    axes.plot(*series, color=colour, lw=1.5, label=label)
  axes.set_ylim(bottom=0)
  style.title(axes, 'Mean bits')


def _draw_kept(axes: Any, steps: Sequence[float], history: Records) -> None:
  series = history_lib.series(steps, history, 'kept_fraction', 100)
  axes.plot(*series, color=style.GREEN, lw=1.5)
  axes.set_ylim(0, 104)
  style.title(axes, 'Channels kept, %')


def _shade_phases(
  axes: Any, steps: Sequence[float], history: Records, *, names: bool
) -> None:
  """Every other phase on grey, with its name on top."""
  spans = history_lib.phase_spans(steps, history)
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
