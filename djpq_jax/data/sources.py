"""Data sets by name: small ones in memory, large ones on disk."""

from collections.abc import Callable
import difflib
import inspect
import os
from typing import Any

import numpy as np

from djpq_jax import packages
from djpq_jax.data import stored
from djpq_jax.data.split import Split


def digits(*, data_dir: str | None = None) -> tuple[Split, Split]:
  """The 1797 8x8 grey digits of scikit-learn: 1400 to train, 397 to test.

  Pixels are float32 in [0, 1].  The split comes from the frozen RandomState
  generator, so it is the same everywhere.  Needs no `data_dir`.
  """
  del data_dir
  # Slow to import, too.
  datasets = packages.require(
    'sklearn.datasets', extra='demo', use='the digits'
  )
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
      f'CIFAR-10 is not in {data_dir!r} in array_record form: give the '
      'data_dir that has it, or put it there with: djpq data cifar10 --out '
      f'{data_dir}'
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

  Raises:
    ValueError: a number that is none from 1 on.
  """
  del data_dir
  counts = {
    **{'classes': classes, 'train_size': train_size, 'test_size': test_size},
    **{f'shape[{i}]': extent for i, extent in enumerate(shape)},
  }
  for name, count in counts.items():
    if not isinstance(count, int) or count < 1:
      raise ValueError(
        f'{name} of synthetic data is a whole number from 1 on, not {count!r}'
      )
  rng = np.random.RandomState(seed)
  patterns = rng.randint(0, 2, (classes, *shape)).astype(np.uint8) * 64

  def split(size, name):
    labels = rng.randint(0, classes, size).astype(np.int32)
    noise = rng.randint(0, 192, (size, *shape)).astype(np.uint8)
    return Split(noise + patterns[labels], labels, classes, name)

  return split(train_size, 'synthetic/train'), split(
    test_size, 'synthetic/test'
  )


def imagenet(
  *,
  data_dir: str | None = None,
  size: int = 224,
  resize: int | None = None,
  min_area: float = 0.08,
  threads: int = 0,
) -> tuple[Split, Split]:
  """ImageNet (ILSVRC 2012) from the folder that `djpq data imagenet` writes.

  The images stay on disk. Training batches are random crops, evaluation sees
  the middle; see `djpq_jax.data.decode`.

  Args:
    data_dir: the folder that holds `imagenet2012/5.1.0`; None: that of tfds.
    size: pixels of a side, after the crop.
    resize: pixels of the shorter side in evaluation, before the crop; None:
      8 / 7 of `size`.
    min_area: least share of an image that a random crop takes, in (0, 1].
    threads: that decode; 0: one per core that this process may use.

  Returns:
    The splits 'train' and 'validation', with labels in the order of the
    WordNet ids.

  Raises:
    FileNotFoundError: no such folder there.
    ValueError: an argument out of range.
  """
  return stored.open_splits(
    'imagenet2012',
    ('train', 'validation'),
    data_dir=data_dir,
    size=size,
    resize=resize,
    min_area=min_area,
    threads=threads,
  )


def folder(
  *,
  data_dir: str | None = None,
  size: int = 224,
  resize: int | None = None,
  min_area: float = 0.08,
  threads: int = 0,
) -> tuple[Split, Split]:
  """Any images in class folders, from what `djpq data folder` wrote.

  Arguments, results and errors are those of `imagenet`.
  """
  return stored.open_splits(
    'folder',
    ('train', 'validation'),
    data_dir=data_dir,
    size=size,
    resize=resize,
    min_area=min_area,
    threads=threads,
  )


SOURCES: dict[str, Callable[..., tuple[Split, Split]]] = {
  'digits': digits,
  'cifar10': cifar10,
  'synthetic': synthetic,
  'imagenet': imagenet,
  'folder': folder,
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
  known = arguments(name)
  for key in kwargs:
    if key not in known:
      hint = _hint(key, known) if known else ''
      raise ValueError(f'{name} takes no argument {key!r}{hint}')
  try:
    return SOURCES[name](data_dir=data_dir, **kwargs)
  except TypeError as error:
    raise ValueError(f'{name} refuses {kwargs}: {error}') from error


def arguments(name: str) -> set[str]:
  """Names of what a source takes besides its folder; none if there is none.

  >>> sorted(arguments('folder'))
  ['min_area', 'resize', 'size', 'threads']
  """
  if name not in SOURCES:
    return set()
  return set(inspect.signature(SOURCES[name]).parameters) - {'data_dir'}


def _hint(name, known):
  """The nearest known name, if one is near, and the list of all."""
  near = difflib.get_close_matches(str(name), known, n=1)
  nearest = f'; did you mean {near[0]!r}?' if near else ';'
  return f'{nearest} known: {", ".join(sorted(known))}'
