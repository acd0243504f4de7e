"""Checks an image file before it is stored, and repairs what can be."""

import io

import numpy as np

from djpq_jax.data import decode

# Losing as little as JPEG can when a file has to be written anew.
QUALITY = dict(quality=100, subsampling=0)


class CorruptImageError(ValueError):
  """An image file is cut off or unreadable."""


def checked(encoded: bytes, *, lossless: bool) -> tuple[bytes, str]:
  """The bytes to store for an image file, after decoding all of it.

  Sound RGB and grey JPEGs stay as they are, to the byte. Anything else that
  can be read is stored as RGB: JPEGs in CMYK, and files of another format
  whatever their name says.

  Args:
    encoded: the file.
    lossless: what is not a JPEG is stored as PNG; else as JPEG.

  Returns:
    The bytes, and in a few words what was wrong; '' if nothing was.

  Raises:
    CorruptImageError: the file is cut off or unreadable.
  """
  if encoded[:2] == decode.JPEG:
    return _checked_jpeg(encoded)
  image = _load(encoded)
  kind = image.format
  if not lossless:
    return _written(image, 'JPEG', **QUALITY), f'{kind} made JPEG'
  if kind == 'PNG' and image.mode in ('RGB', 'L'):
    return encoded, ''
  return _written(image, 'PNG'), f'{kind} {image.mode} made PNG RGB'


def _checked_jpeg(encoded):
  jpeg = decode.require('simplejpeg')
  try:
    colors = decode.jpeg_header(encoded)[2]
  except ValueError as error:
    raise CorruptImageError(str(error)) from None
  if colors in ('CMYK', 'YCCK'):
    return _written(_load(encoded), 'JPEG', **QUALITY), f'{colors} made RGB'
  # An eighth of the size: every coefficient is read, few are transformed.
  small = dict(min_height=1, min_width=1)
  try:
    jpeg.decode_jpeg(encoded, 'RGB', **small)
    return encoded, ''
  except ValueError as error:
    damage = str(error)
  if 'end of jpeg file' in damage.lower():
    raise CorruptImageError(damage)
  try:
    jpeg.decode_jpeg(encoded, 'RGB', strict=False, **small)
  except ValueError as error:
    raise CorruptImageError(str(error)) from None
  return encoded, f'readable, though: {damage}'


def _load(encoded):
  image_file = decode.require('PIL.ImageFile')
  image_lib = decode.require('PIL.Image')
  # What Pillow says of an image of too many pixels is an error of its own.
  too_large = image_lib.DecompressionBombError
  # Another library may have told Pillow to fill up what is missing with grey.
  before, image_file.LOAD_TRUNCATED_IMAGES = (
    image_file.LOAD_TRUNCATED_IMAGES,
    False,
  )
  try:
    image = image_lib.open(io.BytesIO(encoded))
    image.load()
  except image_lib.UnidentifiedImageError:  # its words name an object in memory
    raise CorruptImageError('it is no image file') from None
  except (OSError, ValueError, SyntaxError, EOFError, too_large) as error:
    raise CorruptImageError(' '.join(str(error).split())) from None
  finally:
    image_file.LOAD_TRUNCATED_IMAGES = before
  return image


def _written(image, form, **options):
  out = io.BytesIO()
  _eight_bits(image).convert('RGB').save(out, form, **options)
  return out.getvalue()


def _eight_bits(image):
  """The upper half of 16 bits: Pillow would make all above 255 white."""
  if image.mode in ('I', 'F'):
    raise CorruptImageError(
      f'its values ({image.format}, mode {image.mode}) have no known range; '
      'make it an image of 8 or 16 bits'
    )
  if not image.mode.startswith('I;16'):
    return image
  upper = (np.asarray(image) >> 8).astype(np.uint8)
  return decode.require('PIL.Image').fromarray(upper)
