"""Prepares images that lie in class folders."""

import pathlib

from djpq_jax.data.prepare import listing
from djpq_jax.data.prepare import sets

VERSION = '1.0.0'
TEST_NAMES = 'validation', 'val', 'test'


def prepare(
  source: str | pathlib.Path, data_dir: str | pathlib.Path, **kwargs
) -> sets.Summary:
  """Stores `source/{train,val}/CLASS/IMAGE` as the set 'folder'.

  The names of the class folders in `train`, sorted, are the classes. JPEGs
  are stored as they are, to the byte, and other formats without loss.

  Args:
    source: holds the folders `train` and `val` (or `validation`, or `test`).
    data_dir: `folder/1.0.0` is made in there.
    **kwargs: see `sets.write`.

  Raises:
    ValueError: something is wrong with the images or their folders, or
      `data_dir` holds another set of that name.
  """
  source = pathlib.Path(source)
  train, test = (
    split_folder(source, ['train']),
    split_folder(source, TEST_NAMES),
  )
  classes = listing.class_names(train)
  splits = {
    'train': listing.class_folders(train, classes, short_names=False),
    'validation': listing.class_folders(test, classes, short_names=False),
  }
  layout = sets.Layout('folder', VERSION, tuple(classes), lossless=True)
  return sets.write(data_dir, layout, splits, **kwargs)


def split_folder(source: pathlib.Path, names) -> pathlib.Path:
  """The first of some folders that exists in `source`.

  Raises:
    ValueError: none does.
  """
  for name in names:
    if (source / name).is_dir():
      return source / name
  if not source.is_dir():
    raise ValueError(f'there is no folder {source}')
  there = ', '.join(sorted(p.name for p in source.iterdir())[:5])
  raise ValueError(
    f'{source} has no folder {" or ".join(names)} (there: {there or "nothing"})'
  )
