"""Pixels: exactly those of Pillow in evaluation, nearly so in training."""

import numpy as np
import pictures
from PIL import Image
import pytest

from djpq_jax.data import decode
from djpq_jax.data import geometry


def bits(seed=0):
  return np.random.Philox(seed).random_raw(geometry.WORDS)


def pillow(encoded):
  with Image.open(pictures.io.BytesIO(encoded)) as image:
    return image.convert('RGB')


FILES = {
  'jpeg': pictures.encoded(pictures.smooth(61, 83)),
  'subsampled': pictures.encoded(pictures.smooth(61, 83), subsampling=2),
  'progressive': pictures.encoded(pictures.smooth(61, 83), progressive=True),
  'grey jpeg': pictures.encoded(pictures.smooth(61, 83), mode='L'),
  'png': pictures.encoded(pictures.smooth(61, 83), 'PNG'),
  'grey png': pictures.encoded(pictures.smooth(61, 83), 'PNG', 'L'),
}


@pytest.mark.parametrize('kind', FILES)
def test_pixels_are_those_of_pillow(kind):
  found = decode.pixels(FILES[kind])
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, np.asarray(pillow(FILES[kind])))


@pytest.mark.parametrize('factor', [1, 2, 4, 8])
def test_a_jpeg_can_be_decoded_smaller(factor):
  image = pictures.smooth(64, 96)
  small = decode.pixels(pictures.encoded(image), factor)
  assert small.shape == (64 // factor, 96 // factor, 3)
  mean = image.reshape(64 // factor, factor, 96 // factor, factor, 3)
  mean = mean.mean((1, 3))
  assert np.abs(small - mean).max() < 6
  odd = decode.pixels(FILES['jpeg'], factor)
  assert odd.shape == (-(-61 // factor), -(-83 // factor), 3)


@pytest.mark.parametrize('kind', FILES)
def test_center_view_is_that_of_the_published_accuracies(kind):
  """Resize(40) and CenterCrop(32) on a Pillow image: (40, 54), (4, 11)."""
  image = pillow(FILES[kind]).resize((54, 40), Image.BILINEAR)
  expected = np.asarray(image.crop((11, 4, 43, 36)))
  found = decode.center_view(FILES[kind], 32, 40)
  np.testing.assert_array_equal(found, expected)


def resized(file, box, size, factor, method):
  """By Pillow, of a box whose edges fall on multiples of `factor`."""
  box = geometry.shrunk(box, factor)
  left, top = factor * box.left, factor * box.top
  corner = left + factor * box.width, top + factor * box.height
  image = pillow(file).crop((left, top, *corner)).resize((size, size), method)
  return np.asarray(image, float)


@pytest.mark.parametrize('kind', FILES)
def test_random_view_is_the_crop_resized(kind):
  for seed in range(5):
    box = geometry.random_crop(61, 83, bits(seed), 0.3)
    expected = resized(FILES[kind], box, 40, 1, Image.BILINEAR)
    found = decode.random_view(FILES[kind], 40, bits(seed), 0.3)
    assert found.shape == (40, 40, 3)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).mean() < 1


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
@pytest.mark.parametrize(('size', 'factor'), [((400, 640), 8), ((257, 301), 4)])
def test_random_view_of_a_large_image(form, size, factor):
  """Here a JPEG is decoded at a fraction of its size."""
  file = pictures.encoded(pictures.smooth(*size), form)
  box = geometry.random_crop(*size, bits(3), 0.5)
  assert factor == 1 << int(np.log2(min(box.height, box.width) // 32))
  factor = factor if form == 'JPEG' else 1
  expected = resized(file, box, 32, factor, Image.BOX)
  found = decode.random_view(file, 32, bits(3), 0.5)
  assert np.abs(found - expected).mean() < 1.5


def test_small_images_are_enlarged():
  file = pictures.encoded(pictures.plain(1, 1, 77))
  view = decode.random_view(file, 8, bits(), 0.08)
  np.testing.assert_array_equal(view, pictures.plain(8, 8, 77))
  view = decode.center_view(file, 8, 9)
  np.testing.assert_array_equal(view, pictures.plain(8, 8, 77))


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_the_noted_orientation_is_left_alone(form):
  """As torchvision and TensorFlow do, and as the labels were measured."""
  exif = Image.Exif()
  exif[0x0112] = 6  # turned by 90 degrees
  file = pictures.encoded(pictures.smooth(20, 30), form, exif=exif)
  assert decode.pixels(file).shape == (20, 30, 3)


@pytest.mark.parametrize(
  'view',
  [
    lambda file: decode.random_view(file, 8, bits(), 0.08),
    lambda file: decode.center_view(file, 8, 8),
  ],
  ids=['random', 'center'],
)
@pytest.mark.parametrize(
  'file',
  [b'', b'no image', FILES['jpeg'][:20], FILES['png'][:20]],
  ids=['empty', 'text', 'jpeg', 'png'],
)
def test_what_is_no_image_raises(view, file):
  with pytest.raises(ValueError, match=r'JPEG|decoded'):
    view(file)


def test_mirrored():
  image = pictures.smooth(5, 6)
  np.testing.assert_array_equal(decode.mirrored(image), image[:, ::-1])


def test_looked_up():
  image = pictures.smooth(5, 6)
  table = np.arange(256 * 3, dtype=np.float32).reshape(256, 1, 3)
  out = np.empty((2, 5, 6, 3), np.float32)
  decode.looked_up(image, table, out[1])
  np.testing.assert_array_equal(out[1], 3 * image.astype(int) + [0, 1, 2])


def test_a_missing_package_is_named():
  with pytest.raises(ImportError, match=r"'no_such'.*djpq-jax\[images\]"):
    decode.require('no_such.part')
