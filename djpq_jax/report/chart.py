"""Charts of the HTML page, as plain coordinates that a template draws.

A chart is `WIDTH` x `HEIGHT` pixels of an SVG. Colours are words that the
page's style sheet gives a value, one in light and one in dark mode.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 16, 178
MARKS = ('circle', 'square', 'diamond', 'triangle', 'cross')
COLOURS = ('blue', 'red', 'green', 'orange', 'purple')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """Maps values to pixels, linearly or by their logarithms."""

  low: float
  high: float
  start: float  # pixel of `low`
  end: float
  log: bool = False

  def __call__(self, value: float) -> float:
    """The pixel of a value, rounded to a tenth."""
    low, high, value = (
      math.log(v) if self.log else v for v in (self.low, self.high, value)
    )
    share = (value - low) / ((high - low) or 1)
    return round(self.start + share * (self.end - self.start), 1)

  def ticks(self) -> list[tuple[float, str]]:
    """Pixels and texts of round values."""
    values = _log_ticks(self.low, self.high) if self.log else []
    if len(values) < 2:
      values = linear_ticks(self.low, self.high)
    return [(self(value), plain(value)) for value in values]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """A line of a chart; without a label it is not in the legend."""

  path: str  # of an SVG
  colour: str
  label: str = ''
  dashed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """A symbol at a place, with a name beside it if there is room."""

  x: float
  y: float
  colour: str
  shape: str = 'circle'
  name: str = ''
  place: tuple[float, float] | None = None  # of the middle of the name
  hollow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
  """A span of the horizontal axis, with a name above it if it fits."""

  start: float
  width: float
  name: str
  shaded: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tip:
  """What the page says where the pointer or the keyboard is."""

  x: float
  y: float | None  # None: the whole height
  text: str  # lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
  """All that one chart draws, in pixels."""

  key: str  # unique on the page
  title: str
  description: str  # what it shows, for who cannot see it
  x_label: str
  x_ticks: Sequence[tuple[float, str]]
  y_ticks: Sequence[tuple[float, str]]
  x_notes: Sequence[tuple[float, str]] = ()  # a second row below the ticks
  bands: Sequence[Band] = ()
  lines: Sequence[Line] = ()
  bars: Sequence[Line] = ()
  marks: Sequence[Mark] = ()
  tips: Sequence[Tip] = ()
  legend_marks: Sequence[Mark] = ()  # their names are what they stand for

  @property
  def has_legend(self) -> bool:
    """Whether anything in it needs to be told apart."""
    return bool(self.legend_marks) or any(
      line.label for line in (*self.lines, *self.bars)
    )


def horizontal(low: float, high: float, *, log: bool = False) -> Axis:
  """The axis along the bottom of a chart."""
  return Axis(low=low, high=high, start=LEFT, end=RIGHT, log=log)


def vertical(low: float, high: float, *, log: bool = False) -> Axis:
  """The axis along the left side of a chart, upwards."""
  return Axis(low=low, high=high, start=BOTTOM, end=TOP, log=log)


def path(points: Sequence[tuple[float, float]]) -> str:
  """A line through pixels; a dot where there is only one.

  >>> path([(1, 2), (3, 4.5)])
  'M1 2L3 4.5'
  """
  if len(points) == 1:
    points = [*points, *points]
  return 'M' + 'L'.join(f'{x:g} {y:g}' for x, y in points)


def level_line(axis: Axis, value: float) -> str:
  """A horizontal line at a value."""
  return path([(LEFT, axis(value)), (RIGHT, axis(value))])


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
  """About `count` round values within a range.

  >>> linear_ticks(0, 2940), linear_ticks(96.8, 100.6)
  ([0.0, 1000.0, 2000.0], [97.0, 98.0, 99.0, 100.0])
  """
  if not high > low:
    return [low]
  raw = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(raw))
  step = unit * min((1, 2, 5, 10), key=lambda n: abs(math.log(n * unit / raw)))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [float(f'{n * step:.12g}') for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  digits = (1, 2, 5) if high < 200 * low else (1,)
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  values = [float(f'{n}e{decade}') for decade in decades for n in digits]
  return [v for v in values if low <= v <= high]


def plain(value: float) -> str:
  """A number on an axis, with few characters.

  >>> plain(0.05), plain(2000), plain(250_000), plain(-3)
  ('0.05', '2,000', '250k', '−3')
  """
  if abs(value) >= 1e5:
    for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
      if abs(value) >= size:
        return f'{value / size:g}{unit}'.replace('-', '−')
  return f'{value:,g}'.replace('-', '−')


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
  """A range around values, wider on both sides by a share of it."""
  low, high = min(values), max(values)
  room = share * (high - low) or abs(high) * share or 1.0
  return low - room, high + room


def padded_log(values: Sequence[float]) -> tuple[float, float]:
  """A range around positive values, in which at least a factor of 4 fits."""
  low, high = (math.log(v) for v in (min(values), max(values)))
  room = max(0.08 * (high - low), (math.log(4) - (high - low)) / 2)
  return math.exp(low - room), math.exp(high + room)


def thinned(count: int, most: int, keep: Callable[[int], bool]) -> list[int]:
  """At most about `most` of `count` indices, evenly, and those to keep."""
  every = max(1, math.ceil(count / most))
  return [i for i in range(count) if i % every == 0 or keep(i)]
