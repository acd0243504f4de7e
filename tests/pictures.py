"""Small image files of every kind, for the tests of data on disk."""

import io
import pathlib

import numpy as np
from PIL import Image


def smooth(height, width, seed=0):
  """Random pixels that vary slowly, as photographs do; uint8 [H, W, 3]."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
  image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
  return np.array(image)


def plain(height, width, level):
  """One grey level all over."""
  return np.full((height, width, 3), level, np.uint8)


def encoded(pixels, form='JPEG', mode='RGB', **options):
  """The bytes of an image file."""
  out = io.BytesIO()
  if form == 'JPEG':
    options = dict(quality=95, subsampling=0) | options
  Image.fromarray(pixels).convert(mode).save(out, form, **options)
  return out.getvalue()


def write(path, data):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def class_folders(folder, train=5, val=3, classes=('ant', 'bee')):
  """train/CLASS/I.jpg and val/CLASS/I.jpg, each of its own grey and size.

  The grey level of image i of class c is 40 c + 8 i + 8 in train, 4 more in
  val.
  """
  for split, count, more in (('train', train, 0), ('val', val, 4)):
    for c, name in enumerate(classes):
      for i in range(count):
        pixels = plain(20 + i, 30 - c, 40 * c + 8 * i + 8 + more)
        write(folder / split / name / f'{i}.jpg', encoded(pixels))
