"""What every peer is fed with, the same for all, in NumPy alone."""

import numpy as np

BATCH = 64
TEMPERATURE = 2.0  # of the teacher, whose share in the loss is a half
# As the finetuning of configs/digits.py, in which the controls are trained.
RATE, WARMUP, CLIP_NORM, DECAY = 2e-3, 0.05, 5.0, 1e-4
EPSILON = 1e-5  # of batch norm


class Batches:
  """Shifted images, with labels and what the teacher says of them.

  Args:
    given: arrays from benchmarks/peer_arrays.py.
    seed: of order and shifts.
  """

  def __init__(self, given, seed: int):
    self.images, self.labels = given['shifted'], given['labels']
    self.teacher = given['teacher']  # logits, [shifts, images, classes]
    self.rng = np.random.default_rng(seed)

  def __len__(self):
    return len(self.labels) // BATCH

  def epoch(self):
    """Yields (images, labels, the teacher's logits) of one epoch."""
    count = len(self.labels)
    order = self.rng.permutation(count)
    shifts = self.rng.integers(0, len(self.images), count)
    for k in range(len(self)):
      rows = order[k * BATCH : (k + 1) * BATCH]
      which = shifts[rows]
      images, teacher = self.images[which, rows], self.teacher[which, rows]
      yield images, self.labels[rows], teacher


class Crops:
  """Images moved and mirrored anew each time, and what a teacher says of them.

  Args:
    given: arrays from benchmarks/peer_arrays.py.
    seed: of order, shifts and mirrors.
    teacher: images [B, H, W, C] -> logits [B, classes].
  """

  def __init__(self, given, seed: int, teacher):
    self.given, self.teacher = given, teacher
    self.batch, self.shift = int(given['batch']), int(given['shift'])
    self.flip = bool(given['flip'])
    self.rng = np.random.default_rng(seed)

  def __len__(self):
    return len(self.given['labels']) // self.batch

  def epoch(self):
    """Yields (images, labels, the teacher's logits) of one epoch."""
    images, labels = self.given['images'], self.given['labels']
    order = self.rng.permutation(len(labels))
    for k in range(len(self)):
      rows = order[k * self.batch : (k + 1) * self.batch]
      moved = normalized(self.given, self.changed(images[rows]))
      yield moved, labels[rows], self.teacher(moved)

  def changed(self, images):
    """Moves each image, zeros come in, and mirrors half of them if asked."""
    height, width = images.shape[1:3]
    edge = (self.shift, self.shift)
    padded = np.pad(images, [(0, 0), edge, edge, (0, 0)])
    corners = self.rng.integers(0, 2 * self.shift + 1, (len(images), 2))
    mirrored = self.flip & (self.rng.random(len(images)) < 0.5)
    return np.stack(
      [
        one[y : y + height, x : x + width][:, :: -1 if mirror else 1]
        for one, (y, x), mirror in zip(padded, corners, mirrored)
      ]
    )


def normalized(given, images) -> np.ndarray:
  """Bytes as the network takes them."""
  return ((images / np.float32(255) - given['mean']) / given['std']).astype(
    np.float32
  )


def tiled(given) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """All training images in all shifts, their labels, the teacher's logits."""
  images = given['shifted']
  labels = np.tile(given['labels'], len(images))
  teacher = given['teacher'].reshape(len(labels), -1)
  return images.reshape(-1, *images.shape[2:]), labels, teacher


def folded(given, layer: int) -> tuple[np.ndarray, np.ndarray]:
  """Kernel and bias of a layer, its batch norm multiplied in."""
  kernel = given[f'kernel{layer}']
  if f'norm{layer}' not in given:
    return kernel, given[f'bias{layer}']
  scale, bias, mean, deviation = given[f'norm{layer}']
  return kernel * (scale / deviation), bias - mean * scale / deviation


def softmax(logits) -> np.ndarray:
  """Along the last axis."""
  raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return raised / raised.sum(axis=-1, keepdims=True)


def loss(logits, labels, teacher) -> float:
  """Half the labels, half the teacher, in nats: what all peers minimize."""
  hard = -np.log(softmax(logits)[np.arange(len(labels)), labels] + 1e-30)
  soft = -(
    softmax(teacher / TEMPERATURE)
    * np.log(softmax(logits / TEMPERATURE) + 1e-30)
  ).sum(axis=-1)
  return float(0.5 * hard.mean() + 0.5 * TEMPERATURE**2 * soft.mean())
