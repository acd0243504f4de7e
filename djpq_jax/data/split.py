"""Images and labels of one split, checked when it is made."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, Protocol

import numpy as np


class Images(Protocol):
  """What a split may hold in place of an array: images that stay on disk.

  They look like uint8 [N, H, W, C]; `images[rows]` gives some as evaluation
  sees them. See `djpq_jax.data.stored`.
  """

  @property
  def shape(self) -> tuple[int, ...]:
    """(N, H, W, C), after the crop."""

  def __getitem__(self, rows) -> np.ndarray:
    """The images of a slice or an array of indices, cropped for evaluation."""

  def read(
    self,
    rows: np.ndarray,
    finish: Callable[[int, np.ndarray], None],
    bits: np.ndarray | None = None,
    mirror: np.ndarray | None = None,
  ) -> None:
    """Calls finish(i, image i of `rows`) for each, from several threads.

    Args:
      rows: indices [B].
      finish: takes i and a uint8 image [H, W, C] that it may keep.
      bits: uint64 [B, geometry.WORDS] to cut each image out at random; None:
        as for evaluation.
      mirror: bool [B], the images to mirror left-right; None: none.
    """


class Pixels(NamedTuple):
  """What a byte means: a model takes (byte / 255 - mean) / std."""

  mean: tuple[float, ...]
  std: tuple[float, ...]

  def line(self, scale: float = 255) -> tuple[np.ndarray, np.ndarray]:
    """(factor, offset) float32 [C]: factor * level - offset is normalized.

    Args:
      scale: the level of full brightness; 1 for images that are float.
    """
    std = np.asarray(self.std)
    factor, offset = 1 / (scale * std), np.asarray(self.mean) / std
    return factor.astype(np.float32), offset.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images and labels of one split, checked on construction.

  Raises ValueError, in one sentence that names the split, for anything that
  would go wrong later.
  """

  # [N, H, W, C]; uint8 in 0..255, or float32; or images that stay on disk.
  images: np.ndarray | Images
  labels: np.ndarray  # [N] int32, 0 <= label < num_classes
  num_classes: int
  name: str  # for messages, such as 'cifar10/train'
  # Per channel, of images scaled to [0, 1]; a model takes (image - mean) / std.
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    if not hasattr(self.images, 'read'):
      _check_images(self.images, self.name)
    _check_labels(self)
    _check_constants(self)

  def __len__(self):
    return len(self.labels)

  @property
  def pixels(self) -> Pixels:
    """What images of bytes become in a batch."""
    return Pixels(tuple(self.mean), tuple(self.std))


def _check_images(images, name):
  if not isinstance(images, np.ndarray) or images.ndim != 4:
    raise ValueError(
      f'{name}: images must be a NumPy array [N, H, W, C]; '
      f'got {_describe(images)}'
    )
  if images.dtype not in (np.uint8, np.float32):
    raise ValueError(
      f'{name}: images must be uint8 or float32; got {images.dtype}'
    )
  if images.size == 0:
    raise ValueError(f'{name}: images are empty, shape {images.shape}')
  if images.dtype == np.float32:
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():
      raise ValueError(
        f'{name}: image {int(np.argmin(finite))} has a pixel that is not '
        f'finite, one of {int((~finite).sum())} such images'
      )


def _check_labels(split):
  labels, name = split.labels, split.name
  if not isinstance(labels, np.ndarray) or labels.dtype != np.int32:
    raise ValueError(
      f'{name}: labels must be a NumPy array of int32; got {_describe(labels)}'
    )
  if labels.shape != split.images.shape[:1]:
    raise ValueError(
      f'{name}: labels must have shape {split.images.shape[:1]}, one per '
      f'image; got {labels.shape}'
    )
  bad = (labels < 0) | (labels >= split.num_classes)
  if bad.any():
    i = int(np.argmax(bad))
    raise ValueError(
      f'{name}: label {labels[i]} at index {i} is outside '
      f'0..{split.num_classes - 1}'
    )


def _check_constants(split):
  channels = split.images.shape[-1]
  for field in ('mean', 'std'):
    if len(getattr(split, field)) not in (1, channels):
      raise ValueError(
        f'{split.name}: {field} must have 1 or {channels} values; '
        f'got {getattr(split, field)}'
      )
  if min(split.std) <= 0:
    raise ValueError(f'{split.name}: std must be positive; got {split.std}')


def _describe(value):
  """Shape and dtype of an array, or the type of anything else."""
  if isinstance(value, np.ndarray):
    return f'shape {value.shape}, {value.dtype}'
  return type(value).__name__
