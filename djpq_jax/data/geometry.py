"""Which part of an image is looked at: the crops of training and evaluation.

Both follow the recipe under which ResNets are compared on ImageNet
[Szegedy et al. 2015; He et al. 2016], with torchvision's constants and
rounding. All randomness comes in as bits, so a crop is a pure function.
"""

import math
from typing import NamedTuple

import numpy as np

# Random words that one crop may use: four for each try.
TRIES = 10
WORDS = 4 * TRIES

ASPECTS = 3 / 4, 4 / 3  # width over height


class Box(NamedTuple):
  """A part of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


def random_crop(
  height: int, width: int, bits: np.ndarray, min_area: float
) -> Box:
  """A box of random area and aspect, somewhere in the image.

  Its area is uniform in min_area..1 of the image's and the logarithm of its
  aspect is uniform. Of ten tries the first that fits is taken; if none fits,
  it is the largest box in the middle whose aspect is allowed.

  Args:
    height: of the image, pixels.
    width: of the image, pixels.
    bits: uint64 [WORDS], uniform.
    min_area: least share of the area, in (0, 1].

  >>> random_crop(100, 200, np.zeros(WORDS, np.uint64), min_area=0.25)
  Box(top=0, left=0, height=82, width=61)

  Of nearly the whole area and 3 wide by 4 high, none would fit:

  >>> random_crop(100, 200, np.zeros(WORDS, np.uint64), min_area=0.9)
  Box(top=0, left=34, height=100, width=133)
  """
  low, high = (math.log(aspect) for aspect in ASPECTS)
  for start in range(0, WORDS, 4):
    area, aspect, top, left = (_unit(word) for word in bits[start : start + 4])
    area = height * width * (min_area + area * (1 - min_area))
    aspect = math.exp(low + aspect * (high - low))
    box_width = round(math.sqrt(area * aspect))
    box_height = round(math.sqrt(area / aspect))
    if 0 < box_width <= width and 0 < box_height <= height:
      return Box(
        int(top * (height - box_height + 1)),
        int(left * (width - box_width + 1)),
        box_height,
        box_width,
      )
  box_width = max(1, min(width, round(height * ASPECTS[1])))
  box_height = max(1, min(height, round(width / ASPECTS[0])))
  return _middle(height, width, box_height, box_width)


def shrunk(box: Box, factor: int) -> Box:
  """The nearest box in an image that is `factor` times as small.

  >>> shrunk(Box(9, 4, 42, 38), 4)
  Box(top=2, left=1, height=11, width=10)
  """
  nearest = lambda edge: (edge + factor // 2) // factor
  top, left = nearest(box.top), nearest(box.left)
  bottom, right = nearest(box.top + box.height), nearest(box.left + box.width)
  return Box(top, left, bottom - top, right - left)


def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
  """(height, width) scaled so that the shorter one is `size` pixels.

  >>> shorter_side(375, 500, 256)
  (256, 341)
  """
  if height <= width:
    return size, max(size, int(size * width / height))
  return max(size, int(size * height / width)), size


def center_crop(height: int, width: int, size: int) -> Box:
  """The square of `size` pixels in the middle.

  >>> center_crop(256, 341, 224)
  Box(top=16, left=58, height=224, width=224)
  """
  return _middle(height, width, size, size)


def _middle(height, width, box_height, box_width):
  top, left = (height - box_height) / 2, (width - box_width) / 2
  return Box(round(top), round(left), box_height, box_width)


def _unit(word: np.uint64) -> float:
  """53 of 64 random bits as a float in [0, 1)."""
  return (int(word) >> 11) * 2.0**-53
