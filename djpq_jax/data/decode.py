"""From the bytes of an image file to pixels.

JPEGs are decoded by libjpeg-turbo through simplejpeg, at a half, a quarter or
an eighth of their size when all of it would be thrown away again. Training
crops are resized by OpenCV, about twice as fast as Pillow; evaluation resizes
with Pillow, because published accuracies were measured with its antialiasing.
All three release Python's lock, so that threads decode in parallel.
"""

import functools
from typing import Any

import numpy as np

from djpq_jax import packages
from djpq_jax.data import geometry

JPEG = b'\xff\xd8'


@functools.cache
def require(name: str) -> Any:
  """Imports one of the packages that reading image files needs."""
  return packages.require(name, extra='images', use='image files')


def random_view(
  encoded: bytes, size: int, bits: np.ndarray, min_area: float
) -> np.ndarray:
  """A random crop of an image file, resized to a square.

  Args:
    encoded: a JPEG or PNG file.
    size: pixels of a side of the result.
    bits: uint64 [geometry.WORDS].
    min_area: see `geometry.random_crop`.

  Returns:
    uint8 [size, size, 3], RGB.

  Raises:
    ValueError: the file cannot be decoded.
  """
  cv2 = require('cv2')
  image, factor = None, 1
  if encoded[:2] == JPEG:
    height, width, _ = jpeg_header(encoded)
  else:
    image = pixels(encoded)
    height, width = image.shape[:2]
  box = geometry.random_crop(height, width, bits, min_area)
  if image is None:
    # The largest power of two that leaves as many pixels as are wanted.
    factor = min(8, max(1, min(box.height, box.width) // size))
    factor = 1 << (factor.bit_length() - 1)
    image = pixels(encoded, factor)
  top, left, height, width = geometry.shrunk(box, factor)
  cut = image[top : top + height, left : left + width]
  # Bilinear weights reach two pixels: a larger step would skip some.
  shrinks = min(cut.shape[:2]) >= 2 * size
  method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  return cv2.resize(cut, (size, size), interpolation=method)


def center_view(encoded: bytes, size: int, resize: int) -> np.ndarray:
  """The middle of an image file whose shorter side is made `resize` pixels.

  The pixels are those of torchvision's Resize(resize) and CenterCrop(size) on
  a Pillow image. Arguments, result and errors are those of `random_view`.
  """
  image_lib = require('PIL.Image')
  image = pixels(encoded)
  height, width = image.shape[:2]
  height, width = geometry.shorter_side(height, width, resize)
  resized = image_lib.fromarray(image).resize(
    (width, height), image_lib.Resampling.BILINEAR
  )
  box = geometry.center_crop(height, width, size)
  return np.asarray(
    resized.crop(
      (box.left, box.top, box.left + box.width, box.top + box.height)
    )
  )


def mirrored(image: np.ndarray) -> np.ndarray:
  """An image [H, W, C] with left and right exchanged."""
  return require('cv2').flip(image, 1)


def looked_up(image: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
  """Writes table[level] of every byte of an image into `out`, in one pass.

  Args:
    image: uint8 [H, W, 3].
    table: float32 [256, 1, 3], a column for each color.
    out: float32 [H, W, 3], contiguous.
  """
  require('cv2').LUT(image, table, dst=out)


def pixels(encoded: bytes, factor: int = 1) -> np.ndarray:
  """All pixels of a JPEG or PNG file, uint8 [H, W, 3], RGB.

  Args:
    encoded: the file.
    factor: 1, 2, 4 or 8; a JPEG is decoded at 1 / factor of its size, rounded
      up.

  Raises:
    ValueError: the file cannot be decoded.
  """
  if encoded[:2] == JPEG:
    jpeg = require('simplejpeg')
    if factor == 1:
      return jpeg.decode_jpeg(encoded, 'RGB', strict=False)
    height, width, _ = jpeg_header(encoded)
    return jpeg.decode_jpeg(
      encoded,
      'RGB',
      min_height=-(-height // factor),
      min_width=-(-width // factor),
      strict=False,
    )
  cv2 = require('cv2')
  # The orientation that a camera notes down is left alone, as JPEGs' is.
  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  data = np.frombuffer(encoded, np.uint8)
  image = cv2.imdecode(data, flags) if data.size else None
  if image is None:
    raise ValueError('the image file cannot be decoded')
  return image


def jpeg_header(encoded: bytes) -> tuple[int, int, str]:
  """Height and width in pixels, and the color space, of a JPEG.

  Raises:
    ValueError: the header cannot be read.
  """
  jpeg = require('simplejpeg')
  try:
    return jpeg.decode_jpeg_header(encoded, strict=False)[:3]
  except KeyError as error:  # simplejpeg 1.9 looks up what it did not find
    raise ValueError('the JPEG ends within its header') from error
