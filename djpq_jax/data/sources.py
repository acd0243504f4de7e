"""Data sets as arrays in memory: digits, CIFAR-10, synthetic."""

from collections.abc import Callable
import dataclasses
import difflib
import inspect
import os
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Images and labels of one split, checked on construction.

  Raises ValueError, in one sentence that names the split, for anything that
  would go wrong later.
  """

  images: np.ndarray  # [N, H, W, C]; uint8 in 0..255, or float32
  labels: np.ndarray  # [N] int32, 0 <= label < num_classes
  num_classes: int
  name: str  # for messages, such as 'cifar10/train'
  # Per channel, of images scaled to [0, 1]; a batch is (image - mean) / std.
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    _check_images(self.images, self.name)
    _check_labels(self)
    _check_constants(self)

  def __len__(self):
    return len(self.labels)


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


def digits(*, data_dir: str | None = None) -> tuple[Split, Split]:
  """The 1797 8x8 grey digits of scikit-learn: 1400 to train, 397 to test.

  Pixels are float32 in [0, 1].  The split comes from the frozen RandomState
  generator, so it is the same everywhere.  Needs no `data_dir`.
  """
  del data_dir
  from sklearn import datasets  # Optional, and slow to import.

  bunch = datasets.load_digits()
  order = np.random.RandomState(0).permutation(len(bunch.target))
  images = (bunch.images[order, :, :, None] / 16).astype(np.float32)
  labels = bunch.target[order].astype(np.int32)
  return (
    Split(images[:1400], labels[:1400], 10, 'digits/train'),
    Split(images[1400:], labels[1400:], 10, 'digits/test'),
  )


def cifar10(*, data_dir: str | None = None) -> tuple[Split, Split]:
  """CIFAR-10 from a tfds folder in array_record form, without TensorFlow.

  Args:
    data_dir: the folder that holds `cifar10/3.0.2`; None: that of tfds.

  Returns:
    50,000 and 10,000 images, uint8 [N, 32, 32, 3], with the mean and std under
    which the common torch checkpoints were trained.

  Raises:
    FileNotFoundError: no such folder there.
  """
  import tensorflow_datasets as tfds  # Slow to import.

  data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
  return (
    _cifar10_split(tfds, 'train', data_dir),
    _cifar10_split(tfds, 'test', data_dir),
  )


def _cifar10_split(tfds, split, data_dir):
  """Reads and decodes one split."""
  try:
    source = tfds.data_source(
      'cifar10', split=split, data_dir=data_dir, download=False
    )
  except (AssertionError, FileNotFoundError, NotImplementedError) as error:
    raise FileNotFoundError(
      f'CIFAR-10 is not in {data_dir!r} in array_record form: pass the '
      "data_dir that has it, or write it there with tfds.builder('cifar10', "
      "data_dir=..., file_format='array_record').download_and_prepare(), "
      'which needs TensorFlow'
    ) from error
  images, labels = _read_all(source)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  return Split(images, labels, 10, f'cifar10/{split}', mean, std)


def _read_all(source):
  """Decodes a tfds source: images uint8 [N, H, W, C], labels int32 [N]."""
  images, labels = [], []
  for start in range(0, len(source), 1000):  # Faster than one at a time.
    rows = range(start, min(start + 1000, len(source)))
    for example in source.__getitems__(rows):
      images.append(example['image'])
      labels.append(example['label'])
  return np.stack(images), np.asarray(labels, np.int32)


def synthetic(
  *,
  data_dir: str | None = None,
  shape: tuple[int, int, int] = (32, 32, 3),
  classes: int = 10,
  train_size: int = 1024,
  test_size: int = 256,
  seed: int = 0,
) -> tuple[Split, Split]:
  """Uniform noise with a fixed faint pattern per class: learnable, no files.

  Args:
    data_dir: not used.
    shape: (height, width, channels) of one image.
    classes: number of classes.
    train_size: images to train.
    test_size: images to test.
    seed: of patterns, noise and labels.

  Returns:
    Train and test split, uint8.
  """
  del data_dir
  rng = np.random.RandomState(seed)
  patterns = rng.randint(0, 2, (classes, *shape)).astype(np.uint8) * 64

  def split(size, name):
    labels = rng.randint(0, classes, size).astype(np.int32)
    noise = rng.randint(0, 192, (size, *shape)).astype(np.uint8)
    return Split(noise + patterns[labels], labels, classes, name)

  return split(train_size, 'synthetic/train'), split(
    test_size, 'synthetic/test'
  )


SOURCES: dict[str, Callable[..., tuple[Split, Split]]] = {
  'digits': digits,
  'cifar10': cifar10,
  'synthetic': synthetic,
}


def load(
  name: str, *, data_dir: str | None = None, **kwargs: Any
) -> tuple[Split, Split]:
  """Loads a data set by name; the same call gives the same bits.

  Args:
    name: a key of `SOURCES`.
    data_dir: where prepared data lie, for the sources that read files.
    **kwargs: arguments of the source, such as `shape` for 'synthetic'.

  Returns:
    (train, test).

  Raises:
    ValueError: no such source, or no such argument.
    FileNotFoundError: the data are not in `data_dir`.

  >>> train, test = load('digits')
  >>> len(train), len(test)
  (1400, 397)
  """
  if name not in SOURCES:
    raise ValueError(f'no data source {name!r}{_hint(name, SOURCES)}')
  known = inspect.signature(SOURCES[name]).parameters
  for key in kwargs:
    if key not in known:
      raise ValueError(f'{name} takes no argument {key!r}{_hint(key, known)}')
  return SOURCES[name](data_dir=data_dir, **kwargs)


def _hint(name, known):
  """The nearest known name, if one is near, and the list of all."""
  near = difflib.get_close_matches(str(name), known, n=1)
  nearest = f'; did you mean {near[0]!r}?' if near else ';'
  return f'{nearest} known: {", ".join(sorted(known))}'
