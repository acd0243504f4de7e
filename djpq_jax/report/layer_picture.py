"""Bits, channels and share of BOPs of every layer, as a PNG."""

from collections.abc import Callable, Mapping, Sequence
import itertools
import os
import pathlib
from typing import Any

from djpq_jax.report import style
from djpq_jax.report import text

Records = Sequence[Mapping[str, Any]]


def plot_layers(
  report: Mapping[str, Any], path: str | os.PathLike[str]
) -> pathlib.Path:
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
  figure = style.figure(text.verdict(report), 1.7 + row * max(len(layers), 3))
  bits, channels, share = figure.subplots(1, 3, sharey=True)
  _draw_bits(bits, layers)
  _draw_channels(channels, layers)
  _draw_share(share, layers)
  bits.set_yticks(range(len(layers)), [style.short(l['name']) for l in layers])
  bits.set_ylim(len(layers) - 0.45, -0.55)  # the first layer on top
  for axes in (bits, channels, share):
    style.dress(axes, 'x')
    axes.tick_params(axis='y', length=0)
  return style.save(figure, path)


def _draw_bits(axes: Any, layers: Records) -> None:
  kinds = (
    ('weight_bits', 'weights', style.BLUE),
    ('act_bits', 'inputs', style.ORANGE),
  )
  values = {name: [l[key] for l in layers] for key, name, _ in kinds}
  _draw_pairs(axes, values, [colour for _, _, colour in kinds], '{:g}'.format)
  style.title(axes, 'Bits')


def _draw_channels(axes: Any, layers: Records) -> None:
  """Output channels as a share, since widths differ by orders."""
  sizes = [layer.get('out_size') or layer['kept_out'] for layer in layers]
  kept = [l['kept_out'] for l in layers]
  shares = [100 * k / s for k, s in zip(kept, sizes, strict=True)]
  rows = range(len(layers))
  axes.barh(rows, shares, 0.74, color=style.GREEN, label='kept', zorder=2)
  axes.barh(rows, 100, 0.74, color=style.PALE, label='removed', zorder=1)
  labels = [f'{k} of {s}' for k, s in zip(kept, sizes, strict=True)]
  _label_bars(axes, rows, [100] * len(layers), labels)
  axes.set_xlim(0, 135)
  axes.set_xticks([0, 50, 100], ['0', '50 %', '100 %'])
  style.title(axes, 'Output channels')


def _draw_share(axes: Any, layers: Records) -> None:
  """A layer's share of the float32 BOPs is its share of the dense MACs."""
  amounts, colours = {}, []
  if all('float_macs' in layer for layer in layers):
    amounts['float32'] = [layer['float_macs'] for layer in layers]
    colours.append(style.GREY)
  amounts['hardened'] = [layer['bops'] for layer in layers]
  colours.append(style.RED)
  shares = {
    name: [100 * value / (sum(values) or 1) for value in values]
    for name, values in amounts.items()
  }
  _draw_pairs(axes, shares, colours, _whole_percent)
  style.title(axes, "Share of its model's BOPs, %")


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
      color=style.INK,
    )


def _whole_percent(value: float) -> str:
  """Whole, but never a nought for something.

  >>> _whole_percent(12.7), _whole_percent(0.2), _whole_percent(0)
  ('13', '<1', '0')
  """
  return '<1' if 0 < value < 0.5 else f'{value:.0f}'
