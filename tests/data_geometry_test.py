"""Crops lie in the image, have the stated law, and never change."""

import numpy as np
import pytest

from djpq_jax.data import geometry

PINNED = [(21, 46, 316, 303), (80, 124, 266, 224), (71, 217, 184, 197)]


def words(count, seed=0):
  rng = np.random.Philox(seed)
  return rng.random_raw((count, geometry.WORDS))


def crops(height, width, count=500, min_area=0.08, seed=0):
  return [
    geometry.random_crop(height, width, bits, min_area)
    for bits in words(count, seed)
  ]


@pytest.mark.parametrize(
  'size', [(1, 1), (1, 50), (50, 1), (2, 3), (100, 100), (375, 500), (90, 900)]
)
def test_crops_lie_in_the_image(size):
  height, width = size
  for box in crops(height, width, 100):
    assert box.height >= 1
    assert box.width >= 1
    assert 0 <= box.top <= height - box.height
    assert 0 <= box.left <= width - box.width


def test_area_and_aspect_have_the_stated_law():
  """Of a huge image nearly all first tries fit when they are small."""
  boxes = crops(10_000, 10_000, 2000, min_area=0.08)
  areas = np.array([b.height * b.width / 1e8 for b in boxes])
  aspects = np.array([b.width / b.height for b in boxes])
  assert areas.min() >= 0.0799
  assert areas.max() > 0.97
  assert aspects.min() == pytest.approx(3 / 4, rel=0.01)
  assert aspects.max() == pytest.approx(4 / 3, rel=0.01)
  # Small areas always fit: there the logarithm is uniform.
  logs = np.log(aspects[areas < 0.5]) / np.log(4 / 3)
  assert abs(logs.mean()) < 0.06
  assert logs.var() == pytest.approx(1 / 3, abs=0.04)
  inside = areas[areas < 0.5]
  assert inside.mean() == pytest.approx((0.08 + 0.5) / 2, abs=0.02)


def test_every_position_is_reached():
  """A box of 9 x 9 in 10 x 10 has four places."""
  places = {b[:2] for b in crops(10, 10, 3000) if b[2:] == (9, 9)}
  assert places == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(
  ('size', 'box'),
  [
    ((10, 1000), (0, 494, 10, 13)),  # as wide as 4 : 3 allows
    ((1000, 9), (494, 0, 12, 9)),  # as high as 3 : 4 allows
  ],
)
def test_the_middle_is_taken_if_nothing_fits(size, box):
  assert set(crops(*size, min_area=0.9)) == {box}


def test_whole_area_is_as_much_as_fits():
  for box in crops(40, 40, 50, min_area=1.0):
    assert box.height * box.width > 0.9 * 1600


def test_crops_never_change():
  """A resumed run may meet newer packages: its crops are pinned here."""
  assert crops(375, 500, 3, seed=7) == PINNED


@pytest.mark.parametrize(
  ('size', 'scaled'),
  [
    ((375, 500), (256, 341)),
    ((500, 375), (341, 256)),
    ((256, 256), (256, 256)),
    ((32, 32), (256, 256)),
    ((1, 1000), (256, 256_000)),
    ((600, 601), (256, 256)),
  ],
)
def test_shorter_side(size, scaled):
  """int(256 * long / short), as torchvision rounds."""
  assert geometry.shorter_side(*size, 256) == scaled


@pytest.mark.parametrize(
  ('size', 'corner'),
  [
    ((256, 341), (16, 58)),  # 58.5 rounds to even
    ((256, 343), (16, 60)),  # 59.5 too
    ((224, 224), (0, 0)),
  ],
)
def test_center_crop(size, corner):
  assert geometry.center_crop(*size, 224) == (*corner, 224, 224)
