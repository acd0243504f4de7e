"""Prepares ImageNet (ILSVRC 2012), in the form that tfds knows it in."""

import pathlib

from djpq_jax.data import decode
from djpq_jax.data.prepare import folder as folder_lib
from djpq_jax.data.prepare import listing
from djpq_jax.data.prepare import sets

NAME, VERSION = 'imagenet2012', '5.1.0'
COUNTS = {'train': 1_281_167, 'validation': 50_000}
TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'


def prepare(
  source: str | pathlib.Path, data_dir: str | pathlib.Path, **kwargs
) -> sets.Summary:
  """Stores ImageNet as the tfds set 'imagenet2012'.

  The classes are the WordNet ids, sorted. These and the validation labels, in
  the order of the file names, ship with tfds; the devkit is not needed.

  Args:
    source: holds the two official tar files; or folders `train/WNID/*.JPEG`
      and `val/WNID/*.JPEG` or `val/*.JPEG`; or one of each.
    data_dir: `imagenet2012/5.1.0` is made in there.
    **kwargs: see `sets.write`.

  Raises:
    ValueError: images are missing or corrupt, or `data_dir` holds another set
      of that name.
  """
  source = pathlib.Path(source)
  classes = _lines('labels.txt')
  splits = {
    'train': _train(source, classes),
    'validation': _validation(source, classes),
  }
  for split, items in splits.items():
    if len(items) != COUNTS[split]:
      raise ValueError(
        f'{source}: ImageNet has {COUNTS[split]:,} {split} images, but '
        f'{len(items):,} are there; for another selection, use: djpq data '
        'folder'
      )
  layout = sets.Layout(NAME, VERSION, tuple(classes), lossless=False)
  return sets.write(data_dir, layout, splits, **kwargs)


def _lines(name: str) -> list[str]:
  """Lines of a file that ships with tfds."""
  tfds = decode.require('tensorflow_datasets')
  path = tfds.core.tfds_path(f'datasets/imagenet2012/{name}')
  return path.read_text().split()


def _train(source, classes) -> list[listing.Item]:
  path = source / TRAIN
  if not path.is_file():
    where = _folder(source, ['train'], TRAIN)
    return listing.class_folders(where, classes, short_names=True)
  labels = {f'{name}.tar': label for label, name in enumerate(classes)}
  items = []
  for tar_name, members in listing.nested_members(path):
    label = labels.get(pathlib.PurePosixPath(tar_name).name)
    if label is None:
      raise ValueError(f'{path} holds {tar_name}, which is no class')
    items += [
      listing.Item(_base(name), label, str(path), offset, size)
      for name, offset, size in members
    ]
  return sorted(items, key=lambda item: item.offset)


def _validation(source, classes) -> list[listing.Item]:
  path = source / VALIDATION
  if path.is_file():
    found = [
      (_base(name), str(path), offset, size)
      for name, offset, size in listing.members(path)
    ]
    return _labelled(found, classes, path)
  where = _folder(source, folder_lib.TEST_NAMES, VALIDATION)
  found = [(p.name, str(p), 0, p.stat().st_size) for p in where.glob('*.JPEG')]
  if found:
    return _labelled(found, classes, where)
  return listing.class_folders(where, classes, short_names=True)


def _labelled(found, classes, where) -> list[listing.Item]:
  """Joins the images, in the order of their names, with their labels."""
  wnids = _lines('validation_labels.txt')
  if len(found) != len(wnids):
    raise ValueError(
      f'{where} holds {len(found):,} images; ImageNet has {len(wnids):,} for '
      'validation'
    )
  labels = {name: label for label, name in enumerate(classes)}
  return [
    listing.Item(name, labels[wnid], path, offset, size)
    for (name, path, offset, size), wnid in zip(sorted(found), wnids)
  ]


def _folder(source, names, tar_name):
  try:
    return folder_lib.split_folder(source, names)
  except ValueError as error:
    raise ValueError(f'{error}, nor the file {tar_name}') from None


def _base(name: str) -> str:
  return pathlib.PurePosixPath(name).name
