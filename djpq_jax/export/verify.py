"""Compares what a written file computes with what it was written from."""

from collections.abc import Callable
import dataclasses
import itertools

import numpy as np

from djpq_jax import compress
from djpq_jax import harden

LARGEST_SHARE = 0.05  # of the range of the logits; more is another model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
  """How far the logits of a file are from those of the model.

  Attributes:
    images: that both were run on.
    predictions: images with another prediction, the largest of the logits
      along their last axis; none where there is one number for each image.
    largest: of all differences, in units of the logits.
    logit_range: from the smallest logit to the largest.
    step: of the grid of the logits, step of the last kernel times step of its
      inputs; the largest of all classes, or None if that layer is in float.
    beyond_step: images with a logit that is further off than its step, or
      than 1e-5 of the range if there is none.
  """

  images: int
  predictions: int
  largest: float
  logit_range: float
  step: float | None
  beyond_step: int

  @property
  def steps(self) -> float | None:
    """The largest difference in steps of the logits."""
    return None if self.step is None else self.largest / self.step

  def fault(self, *, strict: bool = False) -> str:
    """What is wrong with the file, in words; '' if nothing is.

    Args:
      strict: whether all logits have to be within a step.
    """
    if self.predictions:
      return f'{self.predictions} of {self.images} predictions differ'
    if not self.largest <= LARGEST_SHARE * self.logit_range:
      return (
        f'logits differ by up to {self.largest:.3g}, of a range of '
        f'{self.logit_range:.3g}'
      )
    if strict and self.beyond_step:
      return (
        f'{self.beyond_step} of {self.images} images have logits that are '
        'off by more than one step of their grid'
      )
    return ''


def output_step(model: harden.HardenedModel) -> np.ndarray | None:
  """Step of the logits' grid: that of the last layer's sums.

  Returns:
    float32 scalar, or [classes]; None if the last layer is not quantized.
  """
  *_, last = compress.hooks(model)
  if not isinstance(last.operands.weight, harden.Dequantizer):
    return None
  step = np.asarray(
    last.operands.weight.step[...] * last.operands.act.step[...]
  )
  return step.reshape(-1) if step.size > 1 else step.reshape(())


def compare(
  wanted: np.ndarray, found: np.ndarray, step: np.ndarray | None
) -> Deviation:
  """Compares logits.

  Args:
    wanted: of the model, float32 [N, classes], or any shape [N, ...].
    found: of the file, likewise.
    step: from `output_step`.

  Returns:
    The deviation.

  Raises:
    ValueError: the shapes differ, or there are no images.

  >>> logits = np.array([[0.0, 1.0], [3.0, 2.0]])
  >>> found = compare(logits, logits + [[0.0, 0.5], [0.0, 0.0]], np.array(0.2))
  >>> found.predictions, found.beyond_step, found.steps
  (0, 1, 2.5)
  """
  if wanted.shape != found.shape or not wanted.size:
    raise ValueError(
      f'the file gives logits of shape {found.shape}, the model {wanted.shape}'
    )
  difference = np.abs(found.astype(np.float64) - wanted)
  # What is not a number differs, by any amount.
  difference = np.where(np.isnan(difference), np.inf, difference)
  span = float(wanted.max() - wanted.min())
  if step is not None and step.ndim and len(step) != wanted.shape[-1]:
    step = step.max()
  limit = 1e-5 * span if step is None else step
  other = np.zeros(len(wanted), bool)
  if wanted.ndim > 1:
    other = _any(wanted.argmax(-1) != found.argmax(-1))
  return Deviation(
    images=len(wanted),
    predictions=int(other.sum()),
    largest=float(difference.max()),
    logit_range=span,
    step=None if step is None else float(step.max()),
    beyond_step=int(_any(difference > limit).sum()),
  )


def _any(found: np.ndarray) -> np.ndarray:
  """Of which images anything is true, [N]."""
  return np.any(found.reshape(len(found), -1), axis=-1)


def run(
  call: Callable[[np.ndarray], np.ndarray],
  images: np.ndarray,
  batch: int | None,
) -> np.ndarray:
  """Logits of a file on images, [N, classes].

  Args:
    call: from a batch of images to logits.
    images: [N, H, W, C].
    batch: examples of a call, or None for any number; then the first call
      has one image, to see that other sizes work too.
  """
  if batch is None:
    cuts = [0, 1, *range(1 + 256, len(images), 256), len(images)]
    parts = [images[a:b] for a, b in itertools.pairwise(cuts) if a < b]
    return np.concatenate([np.asarray(call(part)) for part in parts])
  missing = -len(images) % batch
  filled = np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])
  found = [
    np.asarray(call(filled[i : i + batch]))
    for i in range(0, len(filled), batch)
  ]
  return np.concatenate(found)[: len(images)]
