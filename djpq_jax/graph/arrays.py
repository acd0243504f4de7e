"""What the tracer knows of each array in the program."""

import dataclasses
from typing import Any

import numpy as np

# Stand in `Traced.sources` for the model's input, and for what was picked from
# a parameter by it.
INPUT, PICKED = '', ' '


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
  """An operand of a MAC layer, after `promote_dtype`.

  Attributes:
    layer: path of the layer.
    call: number of the call of the layer.
    role: 'inputs' or 'kernel'.
    ndim: its number of axes when it was marked, as its layer saw them.
    axes: for each axis of the array, the axis when it was marked, or None; also
      of one that the layer did not see, as it was called under `jax.vmap`.
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
      another MAC layer, `INPUT` and `PICKED`; empty if it does not depend on
      data.
    params: paths of the Variables that it is made of without a MAC layer.
    batched: whether anything that has the batch axis reaches it.
  """

  shape: tuple[int, ...]
  axes: tuple[np.ndarray | None, ...]
  tag: Tag | None = None
  sources: frozenset[str] = frozenset()
  params: frozenset[str] = frozenset()
  batched: bool = False


def uniform(shape) -> Traced:
  """An array that is the same, or equally random, all over."""
  return Traced(tuple(shape), (None,) * len(shape))


def heritage(operands) -> dict[str, Any]:
  """The fields of `Traced` that outputs take from all operands."""
  empty: frozenset[str] = frozenset()
  return dict(
    sources=empty.union(*(x.sources for x in operands)),
    params=empty.union(*(x.params for x in operands)),
    batched=any(x.batched for x in operands),
  )


def out_shape(eqn, i=0) -> tuple[int, ...]:
  """Shape of an output of an equation."""
  return tuple(eqn.outvars[i].aval.shape)


def single(eqn, operands, axes, tag=None) -> list[Traced]:
  """The outputs of an equation that has one, with these axes."""
  return [Traced(out_shape(eqn), tuple(axes), tag, **heritage(operands))]


def moved(tag, kept) -> Tag | None:
  """The tag after axes moved; `kept` holds the old axis of each new axis."""
  if tag is None:
    return None
  axes = tuple(None if k is None else tag.axes[k] for k in kept)
  return dataclasses.replace(tag, axes=axes)
