"""How all pictures look: colours, sizes, titles, frames.

Matplotlib is imported when a picture is drawn. Figures are plain objects here:
nothing touches pyplot, its windows or its global state. The colours are those
of Okabe and Ito, which colour-blind eyes tell apart.
"""

import io
import math
import os
import pathlib
from typing import Any

from djpq_jax import files
from djpq_jax import packages

BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
PURPLE, SKY = '#CC79A7', '#56B4E9'
GREY, PALE, SHADE, INK = '#8C8C8C', '#DEDEDE', '#F3F3F3', '#262626'
WIDTH = 10  # inches: 1000 px at the 100 dpi of a README
DPI = 160
SMALL = 8.5  # points
COLUMNS = 4  # of a legend


def check_pictures() -> None:
  """Finds out whether pictures can be drawn.

  Raises:
    ImportError: matplotlib is not installed; the message says how to get it.
  """
  packages.require('matplotlib', extra='demo', use='pictures')


def figure(title: str, height: float) -> Any:
  """An empty figure of one width with a title, `height` in inches."""
  check_pictures()
  from matplotlib import figure
  from matplotlib import layout_engine
  from matplotlib.backends import backend_agg

  layout = layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
  out = figure.Figure((WIDTH, height), facecolor='white', layout=layout)
  backend_agg.FigureCanvasAgg(out)
  out.suptitle(title, x=0.012, ha='left', fontsize=12, color=INK)
  return out


def title(axes: Any, text: str, *, lift: float = 0) -> None:
  """The title, the legend below it, and `lift` points of room below both."""
  style = dict(fontsize=10, fontweight='bold', color=INK)
  entries = len(axes.get_legend_handles_labels()[0])
  rows = max(1, math.ceil(entries / COLUMNS))
  axes.set_title(text, loc='left', pad=lift + 6 + 14 * rows, **style)
  legend(axes, lift=lift)


def legend(axes: Any, *, lift: float = 0) -> None:
  """The legend, if there is anything to tell, `lift` points above the axes."""
  from matplotlib import transforms

  if axes.get_legend_handles_labels()[0]:
    raised = transforms.offset_copy(
      axes.transAxes, axes.get_figure(), y=lift + 5, units='points'
    )
    axes.legend(
      loc='lower left',
      bbox_to_anchor=(0, 1),
      bbox_transform=raised,
      ncols=COLUMNS,
      frameon=False,
      fontsize=SMALL,
      handlelength=1.3,
      columnspacing=1.1,
      borderpad=0,
      borderaxespad=0,
    )


def dress(axes: Any, grid: str) -> None:
  """A pale grid along one axis ('x' or 'y') and a quiet frame."""
  axes.grid(axis=grid, color=PALE, lw=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=SMALL, colors=INK, width=0.6)
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    axes.spines[side].set(color=GREY, linewidth=0.6)


def short(name: str, width: int = 26) -> str:
  """Names keep their ends, which tell layers apart.

  >>> short('stages.0.blocks.11.shortcut.conv')
  '…0.blocks.11.shortcut.conv'
  """
  return name if len(name) <= width else f'…{name[1 - width :]}'


def save(figure: Any, path: str | os.PathLike[str]) -> pathlib.Path:
  """Writes a figure as a PNG; makes its folder if it is missing."""
  picture = io.BytesIO()
  figure.savefig(picture, dpi=DPI, format='png')
  return files.replace(path, picture.getvalue())
