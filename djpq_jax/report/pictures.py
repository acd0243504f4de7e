"""The report as two PNGs, for a README or a pull request.

Matplotlib is imported when a picture is drawn. Figures are plain objects here:
nothing touches pyplot, its windows or its global state. The colours are those
of Okabe and Ito, which colour-blind eyes tell apart.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import os
import pathlib
from typing import Any

from djpq_jax.report import text

Report = Mapping[str, Any]
Records = Sequence[Mapping[str, Any]]

_BLUE, _ORANGE, _GREEN, _RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
_GREY, _PALE, _SHADE, _INK = '#8C8C8C', '#DEDEDE', '#F3F3F3', '#262626'
_WIDTH = 10  # inches: 1000 px at the 100 dpi of a README
_DPI = 160
_SMALL = 8.5  # points


def plot_layers(report: Report, path: str | os.PathLike[str]) -> pathlib.Path:
  """Draws bits, kept channels and share of BOPs per layer, as a PNG.

  Args:
    report: see `djpq_jax.report`.
    path: of the PNG; its folder is created if missing.

  Returns:
    The path.

  Raises:
    ImportError: matplotlib is not installed.
  """
  layers = report['layers']
  row = 0.38 if len(layers) <= 12 else 0.3
  figure = _figure(report, 1.7 + row * max(len(layers), 3))
  bits, channels, share = figure.subplots(1, 3, sharey=True)
  _draw_bits(bits, layers)
  _draw_channels(channels, layers)
  _draw_share(share, layers)
  bits.set_yticks(range(len(layers)), [_short(l['name']) for l in layers])
  bits.set_ylim(len(layers) - 0.45, -0.55)  # the first layer on top
  for axes in (bits, channels, share):
    _dress(axes, 'x')
    axes.tick_params(axis='y', length=0)
  return _save(figure, path)


def plot_curves(report: Report, path: str | os.PathLike[str]) -> pathlib.Path:
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
  figure = _figure(report, 6.8)
  (accuracy, bops), (bits, kept) = figure.subplots(2, 2, sharex=True)
  _draw_accuracy(accuracy, steps, report)
  _draw_bops(bops, steps, history, report['budget'])
  _draw_mean_bits(bits, steps, history)
  _draw_kept(kept, steps, history)
  bits.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
  for axes in (accuracy, bops, bits, kept):
    _dress(axes, 'y')
    _shade_phases(axes, steps, history, names=axes in (accuracy, bops))
  for axes in (bits, kept):
    axes.set_xlabel('training step', fontsize=_SMALL, color=_INK)
  return _save(figure, path)


def _draw_bits(axes: Any, layers: Records) -> None:
  kinds = (
    ('weight_bits', 'weights', _BLUE),
    ('act_bits', 'activations', _ORANGE),
  )
  values = {name: [l[key] for l in layers] for key, name, _ in kinds}
  _draw_pairs(axes, values, [colour for _, _, colour in kinds], '{:g}'.format)
  _title(axes, 'Bits')


def _draw_channels(axes: Any, layers: Records) -> None:
  """Output channels as a share, since widths differ by orders."""
  sizes = [layer.get('out_size') or layer['kept_out'] for layer in layers]
  kept = [l['kept_out'] for l in layers]
  shares = [100 * k / s for k, s in zip(kept, sizes, strict=True)]
  rows = range(len(layers))
  axes.barh(rows, shares, 0.74, color=_GREEN, label='kept', zorder=2)
  axes.barh(rows, 100, 0.74, color=_PALE, label='removed', zorder=1)
  labels = [f'{k} of {s}' for k, s in zip(kept, sizes, strict=True)]
  _label_bars(axes, rows, [100] * len(layers), labels)
  axes.set_xlim(0, 135)
  axes.set_xticks([0, 50, 100], ['0', '50 %', '100 %'])
  _title(axes, 'Output channels')


def _draw_share(axes: Any, layers: Records) -> None:
  """A layer's share of the float32 BOPs is its share of the dense MACs."""
  amounts, colours = {}, []
  if all('float_macs' in layer for layer in layers):
    amounts['float32'] = [layer['float_macs'] for layer in layers]
    colours.append(_GREY)
  amounts['hardened'] = [layer['bops'] for layer in layers]
  colours.append(_RED)
  shares = {
    name: [100 * value / (sum(values) or 1) for value in values]
    for name, values in amounts.items()
  }
  _draw_pairs(axes, shares, colours, _whole_percent)
  _title(axes, 'Share of all BOPs, %')


def _draw_pairs(
  axes: Any,
  values: Mapping[str, Sequence[float]],
  colours: Sequence[str],
  form: Callable[[float], str],
) -> None:
  """One or two bars for each layer, with the number at their ends."""
  height = 0.74 / len(values)
  for i, (name, numbers) in enumerate(values.items()):
    offset = (i - (len(values) - 1) / 2) * height
    rows = [row + offset for row in range(len(numbers))]
    axes.barh(rows, numbers, 0.94 * height, color=colours[i], label=name)
    _label_bars(axes, rows, numbers, [form(number) for number in numbers])
  axes.set_xlim(0, 1.15 * max(1, *itertools.chain(*values.values())))


def _label_bars(
  axes: Any,
  rows: Sequence[float],
  ends: Sequence[float],
  labels: Sequence[str],
) -> None:
  for row, end, label in zip(rows, ends, labels, strict=True):
    axes.annotate(
      label,
      (end, row),
      (3, 0),
      textcoords='offset points',
      va='center_baseline',
      fontsize=7.5,
      color=_INK,
    )


def _draw_accuracy(axes: Any, steps: Sequence[float], report: Report) -> None:
  history = report['history']
  train = _series(steps, history, 'accuracy', 100)
  test = _series(steps, history, 'eval_accuracy', 100)
  final = 100 * report['float_accuracy'], 100 * report['accuracy']
  axes.axhline(final[0], color=_GREY, lw=1.2, ls='--', label='float32')
  axes.plot(*train, color=_BLUE, alpha=0.45, lw=1, label='training batch')
  if test[0]:
    axes.plot(*test, color=_ORANGE, lw=1.5, marker='o', ms=3, label='test')
  axes.plot(
    steps[-1:],
    final[1:],
    color=_RED,
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
  _title(axes, 'Accuracy, %', lift=10)


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
  axes.plot(x, y, color=_BLUE, lw=1.5, label='model')
  if budget:
    label = f'budget {text.percent(budget)}'
    axes.axhline(100 * budget, color=_RED, lw=1.2, ls='--', label=label)
  axes.set_yscale('log')
  low, high = axes.get_ylim()
  digits = (1, 2, 5) if high < 300 * low else (1,)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=digits))
  axes.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
  axes.yaxis.set_minor_formatter(lambda value, _: '')
  _title(axes, 'BOPs, % of float32', lift=10)


def _draw_mean_bits(
  axes: Any, steps: Sequence[float], history: Records
) -> None:
  for key, label, colour in (
    ('mean_weight_bits', 'weights', _BLUE),
    ('mean_act_bits', 'activations', _ORANGE),
  ):
    series = _series(steps, history, key)
    axes.plot(*series, color=colour, lw=1.5, label=label)
  axes.set_ylim(bottom=0)
  _title(axes, 'Mean bits')


def _draw_kept(axes: Any, steps: Sequence[float], history: Records) -> None:
  series = _series(steps, history, 'kept_fraction', 100)
  axes.plot(*series, color=_GREEN, lw=1.5)
  axes.set_ylim(0, 104)
  _title(axes, 'Channels kept, %')


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
      axes.axvspan(start, end, color=_SHADE, lw=0, zorder=0)
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


def _figure(report: Report, height: float) -> Any:
  try:
    from matplotlib import figure
    from matplotlib import layout_engine
    from matplotlib.backends import backend_agg
  except ImportError as error:
    raise ImportError(
      'pictures need matplotlib: pip install "djpq-jax[demo]"'
    ) from error
  layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
  out = figure.Figure((_WIDTH, height), facecolor='white', layout=layout)
  backend_agg.FigureCanvasAgg(out)
  out.suptitle(_result(report), x=0.012, ha='left', fontsize=12, color=_INK)
  return out


def _result(report: Report) -> str:
  relative = report['relative_bops']
  return (
    f'{100 * report["accuracy"]:.2f} % accuracy at {text.percent(relative)} of '
    f'the bit operations (float32: {100 * report["float_accuracy"]:.2f} %)'
  )


def _title(axes: Any, title: str, *, lift: float = 0) -> None:
  """The title, the legend below it, and `lift` points of room below both."""
  from matplotlib import transforms

  style = dict(fontsize=10, fontweight='bold', color=_INK)
  axes.set_title(title, loc='left', pad=lift + 20, **style)
  if axes.get_legend_handles_labels()[0]:
    raised = transforms.offset_copy(
      axes.transAxes, axes.get_figure(), y=lift + 5, units='points'
    )
    axes.legend(
      loc='lower left',
      bbox_to_anchor=(0, 1),
      bbox_transform=raised,
      ncols=4,
      frameon=False,
      fontsize=_SMALL,
      handlelength=1.3,
      columnspacing=1.1,
      borderpad=0,
      borderaxespad=0,
    )


def _dress(axes: Any, grid: str) -> None:
  axes.grid(axis=grid, color=_PALE, lw=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=_SMALL, colors=_INK, width=0.6)
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    axes.spines[side].set(color=_GREY, linewidth=0.6)


def _short(name: str, width: int = 26) -> str:
  """Names keep their ends, which tell layers apart.

  >>> _short('stages.0.blocks.11.shortcut.conv')
  '…0.blocks.11.shortcut.conv'
  """
  return name if len(name) <= width else f'…{name[1 - width :]}'


def _whole_percent(value: float) -> str:
  """Whole, but never a nought for something.

  >>> _whole_percent(12.7), _whole_percent(0.2), _whole_percent(0)
  ('13', '<1', '0')
  """
  return '<1' if 0 < value < 0.5 else f'{value:.0f}'


def _save(figure: Any, path: str | os.PathLike[str]) -> pathlib.Path:
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=_DPI, format='png')
  return path
