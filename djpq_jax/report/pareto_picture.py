"""Accuracy against bit operations of several models, as a PNG."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from djpq_jax import packages
from djpq_jax.report import style

_MARKS = 'osD^vPX'


def plot_pareto(
  curves: Mapping[str, Sequence[Mapping[str, Any]]],
  path: str | os.PathLike[str],
  float_accuracy: float | None = None,
  title: str = 'Accuracy against bit operations',
) -> pathlib.Path:
  """Draws accuracy over relative BOPs, a line for each curve.

  Args:
    curves: name -> points with `accuracy` and `relative_bops`, fractions of
      one; with `deviation` too, of the accuracy, if it is known.  Colours and
      marks follow the order of names, those without points included.
    path: of the PNG; its folder is created if missing.
    float_accuracy: of the float32 model, drawn as a line.
    title: of the picture.

  Returns:
    The path.

  Raises:
    ImportError: matplotlib is not installed.
    ValueError: there is no point to draw.
  """
  if not any(curves.values()):
    raise ValueError('there is no point to draw')
  packages.require('matplotlib', extra='demo', use='pictures')
  from matplotlib import ticker

  figure = style.figure(title, 4.6)
  axes = figure.subplots()
  colours = [style.BLUE, style.RED, style.GREEN, style.ORANGE, style.PURPLE]
  colours += [style.SKY, style.INK]
  for number, (name, points) in enumerate(curves.items()):
    if not points:  # its colour stays its own
      continue
    points = sorted(points, key=lambda point: point['relative_bops'])
    axes.errorbar(
      [100 * point['relative_bops'] for point in points],
      [100 * point['accuracy'] for point in points],
      yerr=[100 * point.get('deviation', 0) for point in points],
      color=colours[number % len(colours)],
      marker=_MARKS[number % len(_MARKS)],
      ms=5,
      lw=1.5,
      elinewidth=1,
      label=name or None,
    )
  if float_accuracy is not None:
    axes.axhline(
      100 * float_accuracy, color=style.GREY, lw=1.2, ls='--', label='float32'
    )
  axes.set_xscale('log')
  low, high = axes.get_xlim()
  wide = high > 5 * low  # else a decade has hardly a tick in it
  axes.xaxis.set_major_locator(
    ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(8)
  )
  axes.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.xaxis.set_minor_formatter(lambda value, _: '')
  axes.margins(y=0.08)
  named = dict(fontsize=style.SMALL, color=style.INK)
  axes.set_xlabel('BOPs, % of float32', **named)
  axes.set_ylabel('Accuracy, %', **named)
  style.legend(axes)
  style.dress(axes, 'both')
  return style.save(figure, path)
