"""Batches as a pure function of (seed, step), exact evaluation.

There is no iterator state: a run that resumes at step k calls
`train_batch(split, k, ...)` and gets the bits that it would have got.  All
randomness is raw bits of Philox, which NumPy keeps the same for ever, unlike
the distributions of its Generator.
"""

from collections.abc import Iterator
import dataclasses
import functools

import numpy as np

from djpq_jax.data import buffers
from djpq_jax.data import decode
from djpq_jax.data import geometry
from djpq_jax.data.split import Split

Batch = dict[str, np.ndarray]

# Independent streams of random bits under one seed.
_ORDER, _AUGMENT = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
  """Random changes to training images.

  Images that stay on disk are always cut out at random on top of that; they
  take no shift.
  """

  shift: int = 0  # pixels; translate by up to this much, zeros come in
  flip: bool = False  # mirror left-right half of the time

  def __post_init__(self):
    if self.shift < 0:
      raise ValueError(f'shift must be >= 0 pixels; got {self.shift}')


def steps_per_epoch(split: Split, batch_size: int) -> int:
  """Full batches in one pass; the images left over wait for another epoch.

  Raises:
    ValueError: `batch_size` is < 1 or larger than the split.
  """
  if not 1 <= batch_size <= len(split):
    raise ValueError(
      f'{split.name}: batch_size must be in 1..{len(split)}, the size of the '
      f'split; got {batch_size}'
    )
  return len(split) // batch_size


def train_batch(
  split: Split,
  step: int,
  *,
  batch_size: int,
  seed: int,
  augment: Augment | None = None,
  process_index: int = 0,
  process_count: int = 1,
  as_bytes: bool = False,
) -> Batch:
  """The batch of one step: shuffled per epoch, augmented, normalized.

  Args:
    split: where the images come from.
    step: counts from 0 over all epochs.
    batch_size: images over all processes.
    seed: >= 0; with `step` it fixes order and augmentation.
    augment: None for none.
    process_index: which share of the batch this process wants.
    process_count: number of equal, contiguous shares.
    as_bytes: leaves images that are uint8 as they are, a quarter of the bytes
      to move, for a step that normalizes them by `split.pixels`.

  Returns:
    dict(image=float32 [B, H, W, C], or uint8, label=int32 [B]) where B is
    batch_size / process_count.

  Raises:
    ValueError: a size, index or seed out of range, or an augmentation that
      images on disk do not take.
  """
  epoch, position = divmod(step, steps_per_epoch(split, batch_size))
  if step < 0 or seed < 0:
    raise ValueError(f'step and seed must be >= 0; got {step} and {seed}')
  rows = _share(batch_size, process_index, process_count)
  order = _epoch_order(len(split), seed, epoch)
  indices = order[position * batch_size :][:batch_size][rows]
  words = 3 if _in_memory(split) else geometry.WORDS + 1
  bits = None
  if augment is not None:
    bits = _random_bits(seed, _AUGMENT, step).random_raw((words, batch_size))
    bits = bits[:, rows]
  images = _images(split, indices, augment, bits, as_bytes)
  return dict(image=images, label=split.labels[indices])


def eval_batches(
  split: Split,
  batch_size: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """All images once, in order, in batches of one shape.

  The last batch is filled up with zeros whose mask is 0, so that
  sum(correct * mask) / sum(mask) is exact to the image.

  Args:
    split: where the images come from.
    batch_size: images over all processes; may exceed the split.
    process_index: which share of every batch this process wants.
    process_count: number of equal, contiguous shares.

  Returns:
    An iterator of dict(image=float32 [B, H, W, C], label=int32 [B],
    mask=float32 [B]) where B is batch_size / process_count.  Every process
    gets the same number of batches.

  Raises:
    ValueError: a size or index out of range, at the call.
  """
  if batch_size < 1:
    raise ValueError(f'{split.name}: batch_size must be >= 1; got {batch_size}')
  rows = _share(batch_size, process_index, process_count)
  return (
    _eval_batch(split, start + rows.start, rows.stop - rows.start)
    for start in range(0, len(split), batch_size)
  )


def normalize(images: np.ndarray, split: Split) -> np.ndarray:
  """(image / 255 if uint8 - mean) / std, as float32 of the same shape."""
  out = np.empty(images.shape, np.float32)
  _normalize(images, split, out)
  return out


def _normalize(images, split, out):
  """Writes normalized images [..., H, W, C] into `out`."""
  scale = 255 if images.dtype == np.uint8 else 1
  factor, offset = _row(scale, split.pixels, *images.shape[-2:])
  rows = out.reshape(-1, factor.size)
  np.multiply(images.reshape(rows.shape), factor, out=rows)
  rows -= offset


@functools.lru_cache(maxsize=16)
def _row(scale, pixels, width, channels):
  """Factor and offset of a whole row: NumPy is slow on axes of 3 channels."""
  return tuple(
    np.tile(np.broadcast_to(x, channels), width) for x in pixels.line(scale)
  )


@functools.lru_cache(maxsize=16)
def _table(pixels):
  """What each byte becomes in each color, float32 [256, 1, 3]."""
  levels = np.arange(256, dtype=np.uint8)[:, None, None]
  table = np.empty((256, 1, 3), np.float32)
  factor, offset = pixels.line()
  np.multiply(levels, factor, out=table)
  table -= offset
  return table


def _in_memory(split):
  return isinstance(split.images, np.ndarray)


def check_augment(split: Split, augment: Augment) -> None:
  """Raises a ValueError if a split does not take an augmentation."""
  if augment.shift and not _in_memory(split):
    raise ValueError(
      f'{split.name}: images on disk are cropped at random, and take no shift; '
      f'got {augment.shift} pixels'
    )


def _images(split, indices, augment=None, bits=None, as_bytes=False):
  """Images of some indices, augmented by bits uint64 [., B].

  Normalized, unless they are bytes and are to stay so.
  """
  if _in_memory(split):
    images = split.images[indices]
    if augment is not None:
      images = _augment(images, augment, bits)
    if as_bytes and images.dtype == np.uint8:
      return images
    return normalize(images, split)
  if augment is not None:
    check_augment(split, augment)
  crops = mirror = None
  if augment is not None:
    crops = bits[:-1].T
    mirror = (bits[-1] & 1).astype(bool) if augment.flip else None
  shape = len(indices), *split.images.shape[1:]
  if as_bytes:
    out = buffers.empty(shape, np.uint8)
    finish = out.__setitem__
  else:
    out = buffers.empty(shape)
    table = _table(split.pixels)

    def finish(i, image):  # On the thread that decoded it, while it is cached.
      decode.looked_up(image, table, out[i])

  split.images.read(indices, finish, crops, mirror)
  return out


def _share(batch_size, index, count):
  """The slice of a global batch that belongs to one process."""
  if count < 1 or not 0 <= index < count:
    raise ValueError(
      f'process_index must be in 0..process_count - 1; got {index} of {count}'
    )
  if batch_size % count:
    raise ValueError(
      f'batch_size {batch_size} is not a multiple of process_count {count}'
    )
  size = batch_size // count
  return slice(index * size, (index + 1) * size)


def _random_bits(seed, stream, number):
  return np.random.Philox(np.random.SeedSequence((seed, stream, number)))


@functools.lru_cache(maxsize=4)
def _epoch_order(size, seed, epoch):
  """A permutation of range(size), int64; kept for the steps of the epoch."""
  bits = _random_bits(seed, _ORDER, epoch).random_raw(size)
  order = np.argsort(bits, kind='stable')
  order.flags.writeable = False
  return order


def _augment(images, augment, bits):
  """Applies `augment`, driven by bits uint64 [3, B]."""
  span = 2 * augment.shift + 1
  if augment.shift:
    images = _translate(images, augment.shift, *(bits[:2] % span).astype(int))
  if augment.flip:
    mirrored = (bits[2] & 1).astype(bool)
    images[mirrored] = images[mirrored, :, ::-1]
  return images


def _translate(images, most, rows, columns):
  """Cuts each image out of its zero-padded self, at (rows, columns) [B]."""
  margin = (most, most)
  padded = np.pad(images, ((0, 0), margin, margin, (0, 0)))
  # [B, 2 most + 1, 2 most + 1, C, H, W]: every cut, without a copy.
  cuts = np.lib.stride_tricks.sliding_window_view(
    padded, images.shape[1:3], axis=(1, 2)
  )
  cut = cuts[np.arange(len(images)), rows, columns]
  return np.ascontiguousarray(cut.transpose(0, 2, 3, 1))


def _eval_batch(split, start, size):
  """Rows start..start + size; rows past the end are zeros with mask 0."""
  labels = split.labels[start : start + size]
  images = _images(split, np.arange(start, start + len(labels)))
  mask = np.ones(len(labels), np.float32)
  batch = dict(image=images, label=labels, mask=mask)
  return {k: _fill(v, size) for k, v in batch.items()}


def _fill(array, size):
  """Appends zeros along the first axis."""
  missing = size - len(array)
  return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
