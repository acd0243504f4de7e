"""The folder of a prepared set: where it is, and what its files say.

What is damaged in it is named, with what makes it anew.
"""

import contextlib
import io
import json
import os
import pathlib

import numpy as np

from djpq_jax import files
from djpq_jax.data import decode

INFO, FEATURES = 'dataset_info.json', 'features.json'


def command(name: str) -> str:
  """The arguments of `djpq data` that prepare a set."""
  return f'{name.removesuffix("2012")} --from DIR --out DIR'


def find(name: str, data_dir: str | None) -> pathlib.Path:
  """The folder of the newest version of a set."""
  if data_dir is None:
    tfds = decode.require('tensorflow_datasets')
    data_dir = tfds.core.constants.DATA_DIR
  parent = pathlib.Path(os.path.expanduser(data_dir)) / name
  found = {
    tuple(map(int, folder.name.split('.'))): folder
    for folder in parent.glob('[0-9]*.[0-9]*.[0-9]*')
    if folder.name.replace('.', '').isdigit() and (folder / INFO).is_file()
  }
  if not found:
    begun = any(parent.glob('incomplete.*'))
    state = 'is not prepared to its end in' if begun else 'is not in'
    raise FileNotFoundError(
      f'{name} {state} {str(data_dir)!r}: give the data_dir that has it, or '
      f'prepare it with: djpq data {command(name)}'
    )
  return found[max(found)]


def facts(folder: pathlib.Path) -> tuple[str | None, set[str]]:
  """In which form a set is, and the names of its splits."""
  path = folder / INFO
  try:
    info = json.loads(path.read_text())
    found = info.get('fileFormat'), {split['name'] for split in info['splits']}
    path = folder / FEATURES
    if path.exists():  # tfds has no good word for a damaged one
      json.loads(path.read_text())
  except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
    files.raise_if_it_may_pass(error)
    raise unreadable(path, folder, error) from error
  return found


def unreadable(path, folder: pathlib.Path, error: Exception) -> ValueError:
  """What to say of a file that the set in `folder` needs."""
  # A folder that is there would be taken for the finished set.
  return ValueError(
    f'{path} cannot be read ({files.first_line(error)}); if it is damaged, '
    f'remove {folder} and prepare the set again with: djpq data '
    f'{command(folder.parent.name)}'
  )


def labels_path(folder: pathlib.Path, split: str) -> pathlib.Path:
  """Where the labels of a split are kept beside its images."""
  return folder / f'labels-{split}.npy'


def read_labels(
  folder: pathlib.Path, split: str, count: int
) -> np.ndarray | None:
  """The labels of a split, int32 [count]; None if they have no file.

  Raises:
    ValueError: the file is damaged; the message says what to do.
  """
  path = labels_path(folder, split)
  if not path.is_file():
    return None
  try:
    labels = np.load(path)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(f'it does not hold {count} whole numbers')
  except Exception as error:  # of many kinds, for what may be in such a file
    files.raise_if_it_may_pass(error)
    raise ValueError(
      f'{path} cannot be read ({files.first_line(error)}); if it is damaged, '
      'delete it: it is made anew from the images'
    ) from error
  return labels


def write_labels(folder: pathlib.Path, split: str, labels: np.ndarray) -> None:
  """Keeps labels for the next time, if the folder can be written to."""
  content = io.BytesIO()
  np.save(content, labels)
  with contextlib.suppress(OSError):
    files.replace(labels_path(folder, split), content.getvalue())
