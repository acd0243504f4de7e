"""What the tracer knows of each array in the program."""

import dataclasses

import numpy as np

INPUT = ''  # stands for the model's input in `Traced.sources`


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
  """An operand of a MAC layer, after `promote_dtype`.

  Attributes:
    layer: path of the layer.
    call: number of the call of the layer.
    role: 'inputs' or 'kernel'.
    ndim: its number of axes when it was marked.
    axes: for each axis of the array, the axis when it was marked, or None.
  """

  layer: str
  call: int
  role: str
  ndim: int
  axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
  """Channel identity of one array.

  Attributes:
    shape: its shape.
    axes: for each axis, int [extent] unit ids, or None where the array is
      equal all along the axis (a broadcast), so that any extent will do.
    tag: set if it is an operand of a MAC layer.
    sources: paths of the MAC layers whose output reaches it without passing
      another MAC layer, and `INPUT`; empty if it does not depend on data.
    params: paths of the Variables that it is made of without a MAC layer.
  """

  shape: tuple[int, ...]
  axes: tuple[np.ndarray | None, ...]
  tag: Tag | None = None
  sources: frozenset[str] = frozenset()
  params: frozenset[str] = frozenset()


def uniform(shape) -> Traced:
  """An array that is the same, or equally random, all over."""
  return Traced(tuple(shape), (None,) * len(shape))


def heritage(operands) -> dict[str, frozenset[str]]:
  """The fields of `Traced` that outputs take from all operands."""
  empty: frozenset[str] = frozenset()
  return dict(
    sources=empty.union(*(x.sources for x in operands)),
    params=empty.union(*(x.params for x in operands)),
  )
