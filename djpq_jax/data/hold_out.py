"""Cuts a part off a split, to look at while training on the rest."""

from collections.abc import Callable
import dataclasses

import numpy as np

from djpq_jax.data import split as split_lib


@dataclasses.dataclass(frozen=True, eq=False)
class SomeImages:
  """Some of the images that stay on disk; see `split.Images`."""

  images: split_lib.Images
  rows: np.ndarray  # int [N], which ones

  @property
  def shape(self) -> tuple[int, ...]:
    """(N, H, W, C), after the crop."""
    return len(self.rows), *self.images.shape[1:]

  def __getitem__(self, rows) -> np.ndarray:
    return self.images[self.rows[rows]]

  def read(
    self,
    rows: np.ndarray,
    finish: Callable[[int, np.ndarray], None],
    bits: np.ndarray | None = None,
    mirror: np.ndarray | None = None,
  ) -> None:
    """Calls finish(i, image i of `rows`) for each; see `split.Images.read`."""
    self.images.read(self.rows[rows], finish, bits, mirror)


def hold_out(
  split: split_lib.Split, share: float
) -> tuple[split_lib.Split, split_lib.Split]:
  """Cuts a split in two, in a way that is the same for every seed.

  Args:
    split: of any kind.
    share: part of the images that is held out, in (0, 1).

  Returns:
    (the rest, what is held out), each in the order of `split`.

  Raises:
    ValueError: one of the two would be empty.
  """
  size = round(share * len(split))
  if not 0 < size < len(split):
    raise ValueError(
      f'{split.name}: {share:.4g} of {len(split)} images would hold out {size}'
    )
  order = np.argsort(np.random.Philox(key=0).random_raw(len(split)))
  return (
    _rows(split, np.sort(order[size:]), 'rest'),
    _rows(split, np.sort(order[:size]), 'held out'),
  )


def _rows(split, rows, what):
  if isinstance(split.images, np.ndarray):
    images = split.images[rows]
  else:
    images = SomeImages(split.images, rows)
  return dataclasses.replace(
    split,
    images=images,
    labels=split.labels[rows],
    name=f'{split.name} ({what})',
  )
