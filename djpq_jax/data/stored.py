"""Large sets: images that stay encoded on disk until a batch wants them.

A set is a tfds folder in array_record form, as `djpq data` writes it. Reading
needs no TensorFlow and keeps no state: any image can be had at any time, so
that a batch stays a pure function of (seed, step), and a run resumes from its
step number alone, on any number of threads.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import numpy as np

from djpq_jax import files
from djpq_jax import machine
from djpq_jax.data import decode
from djpq_jax.data import folders
from djpq_jax.data import split as split_lib

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class StoredImages:
  """The images of one split of a prepared set; see `split.Images`."""

  folder: pathlib.Path  # the one that holds dataset_info.json
  split: str
  size: int  # pixels of a side, after the crop
  resize: int  # pixels of the shorter side before the crop, in evaluation
  min_area: float  # least share of an image that a random crop takes
  threads: int

  def __post_init__(self):
    if not 1 <= self.size <= self.resize:
      raise ValueError(
        'size must be >= 1 and resize at least as much; got '
        f'{self.size} and {self.resize} pixels'
      )
    if not 0 < self.min_area <= 1:
      raise ValueError(f'min_area must be in (0, 1]; got {self.min_area}')
    if self.threads < 1:
      raise ValueError(f'threads must be >= 1; got {self.threads}')

  @functools.cached_property
  def source(self):
    """The tfds source: indexing gives records, see `parse`."""
    tfds = decode.require('tensorflow_datasets')  # Slow to import.
    try:
      return tfds.builder_from_directory(self.folder).as_data_source(
        split=self.split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      )
    except ImportError:
      raise
    except Exception as error:  # of many kinds, for what may be in the files
      files.raise_if_it_may_pass(error)
      raise folders.unreadable(self.folder, self.folder, error) from error

  def __reduce__(self):  # Workers open the files anew.
    return StoredImages, dataclasses.astuple(self)

  def __len__(self) -> int:
    return len(self.source)

  @property
  def shape(self) -> tuple[int, ...]:
    """(N, size, size, 3)."""
    return len(self), self.size, self.size, 3

  def __getitem__(self, rows) -> np.ndarray:
    """uint8 [B, size, size, 3], cropped for evaluation."""
    rows = np.arange(len(self))[rows]
    out = np.empty((rows.size, *self.shape[1:]), np.uint8)
    self.read(rows.ravel(), out.__setitem__)
    return out.reshape(*rows.shape, *self.shape[1:])

  def read(
    self,
    rows: np.ndarray,
    finish: Callable[[int, np.ndarray], None],
    bits: np.ndarray | None = None,
    mirror: np.ndarray | None = None,
  ) -> None:
    """Calls finish(i, image i of `rows`) for each; see `split.Images.read`.

    Raises:
      ValueError: an image cannot be read or decoded; the message names it, or
        the file that it should be in.
    """

    def read_one(i):
      row = int(rows[i])
      example = self.example(row)
      try:
        if bits is None:
          image = decode.center_view(example.image, self.size, self.resize)
        else:
          image = decode.random_view(
            example.image, self.size, bits[i], self.min_area
          )
      except ValueError as error:
        raise ValueError(
          f'{self.folder} {self.split}: image {row} {example.name} cannot be '
          f'decoded: {error}'
        ) from error
      if mirror is not None and mirror[i]:
        image = decode.mirrored(image)
      finish(i, image)

    numbers = iter(range(len(rows)))

    def read_some():
      for i in numbers:  # Shared: each thread takes the next when it is free.
        read_one(i)

    if self.threads == 1:
      read_some()
      return
    pool = _pool(self.threads)
    for future in [pool.submit(read_some) for _ in range(self.threads)]:
      future.result()  # raises what a thread raised

  def example(self, row: int) -> 'Example':
    """An image as it is stored, with its label.

    Raises:
      ValueError: it cannot be read; the message names the file.
      OSError: the disk or the network failed, which may pass.
    """
    source = self.source
    try:
      return parse(source[row])
    except Exception as error:  # RuntimeError of the reader, among others
      split = source.dataset_info.splits[self.split]
      ends = np.cumsum(split.shard_lengths)
      path = split.filepaths[np.searchsorted(ends, row, side='right')]
      files.raise_if_it_may_pass(error)
      raise folders.unreadable(path, self.folder, error) from error


class Example(NamedTuple):
  """One record of a set."""

  image: bytes  # JPEG or PNG
  label: int
  name: str  # of the file that it came from


def parse(record: bytes) -> Example:
  """Reads a record, in a quarter of the time that tfds takes in general."""
  feature = _proto().FromString(record).features.feature
  image, label = feature['image'].bytes_list, feature['label'].int64_list
  if not (image.value and label.value):
    raise ValueError('a record in it has no image or no label')
  return Example(
    image.value[0],
    label.value[0],
    b''.join(feature['file_name'].bytes_list.value).decode(),
  )


@functools.cache
def _proto():
  decode.require('tensorflow_datasets')
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example


def open_splits(
  name: str,
  splits: tuple[str, str],
  *,
  data_dir: str | None,
  size: int,
  resize: int | None,
  min_area: float,
  threads: int,
) -> tuple[split_lib.Split, split_lib.Split]:
  """Two splits of a prepared set; no image is read yet.

  Args:
    name: of the set; the newest version in `data_dir/name` is taken.
    splits: those to train and to test on.
    data_dir: where it was prepared; None: where tfds puts its sets.
    size: see `StoredImages`.
    resize: see `StoredImages`; None: 8 / 7 of `size`, as 256 is of 224.
    min_area: see `StoredImages`.
    threads: that decode; 0: one per core that this process may use.

  Raises:
    FileNotFoundError: the set is not there; the message says what makes it.
    ValueError: it is there in another form, or damaged, or an argument is out
      of range.
  """
  folder = folders.find(name, data_dir)
  form, there = folders.facts(folder)
  if form != 'array_record':
    raise ValueError(
      f'{folder} is in {form} form, which only TensorFlow reads; prepare it as '
      f'array_record with: djpq data {folders.command(name)}'
    )
  missing = {*splits} - there
  if missing:
    raise ValueError(f'{folder} has no split {sorted(missing)[0]!r}')
  resize = round(size * 8 / 7) if resize is None else resize
  train, test = (
    StoredImages(
      folder, split, size, resize, min_area, threads or machine.cores()
    )
    for split in splits
  )
  return _split(name, train), _split(name, test)


def _split(name: str, images: StoredImages) -> split_lib.Split:
  names = images.source.dataset_info.features['label'].names
  return split_lib.Split(
    images, _labels(images), len(names), f'{name}/{images.split}', MEAN, STD
  )


def _labels(images: StoredImages) -> np.ndarray:
  """All labels of a split, int32 [N].

  `djpq data` writes them into a file of their own. In a folder that tfds made
  they stand among the images only: then all of it is read, once if the file
  can be written afterwards.
  """
  labels = folders.read_labels(images.folder, images.split, len(images))
  if labels is None:
    found = (images.example(row).label for row in range(len(images)))
    labels = np.fromiter(found, np.int32, len(images))
    folders.write_labels(images.folder, images.split, labels)
  return labels


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(threads, 'djpq-decode')
