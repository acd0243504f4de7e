"""What networks in torch share: weights from flax, and their training."""

import itertools
import math

import feeding
import numpy as np
import torch
from torch import nn
from torch.nn import functional


@torch.no_grad()
def put(given, layer: int, conv, norm):
  """Copies a convolution and its batch norm in, from the layout of flax."""
  conv.weight.copy_(torch.tensor(given[f'kernel{layer}'].transpose(3, 2, 0, 1)))
  scale, bias, mean, deviation = torch.tensor(given[f'norm{layer}'])
  norm.weight.copy_(scale)
  norm.bias.copy_(bias)
  norm.running_mean.copy_(mean)
  norm.running_var.copy_(deviation**2 - feeding.EPSILON)


def from_flax(images) -> torch.Tensor:
  """[B, H, W, C] -> [B, C, H, W]."""
  return torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())


def loss(logits, labels, teacher):
  """Half the labels, half the teacher: as the other contestants."""
  hard = functional.cross_entropy(logits, labels)
  warm = feeding.TEMPERATURE
  soft = functional.cross_entropy(
    logits / warm, functional.softmax(teacher / warm, dim=1)
  )
  return 0.5 * hard + 0.5 * warm**2 * soft


def train(
  model, batches, epochs: int, *, rate=feeding.RATE, own=(), extra=None
):
  """Trains as DJPQ's controls are, with AdamW and a cosine.

  Args:
    model: images -> logits; trained in place.
    batches: a `feeding.Batches` or `feeding.Crops`.
    epochs: of them.
    rate: the highest rate of learning.
    own: (parameters, rate) with a rate of their own, whose gradients are not
      clipped.
    extra: () -> what is added to the loss.
  """
  kinds = groups(model, rate, own)
  optimizer = torch.optim.AdamW(kinds)
  clipped = [parameter for kind in kinds[:2] for parameter in kind['params']]
  steps = epochs * len(batches)
  warm = max(1, round(feeding.WARMUP * steps))

  def schedule(step):
    if step < warm:
      return 0.1 + 0.9 * step / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))

  scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
  model.train()
  for _ in range(epochs):
    for images, labels, teacher in batches.epoch():
      logits = model(from_flax(images))
      labels, teacher = torch.from_numpy(labels), torch.from_numpy(teacher)
      total = loss(logits, labels.long(), teacher)
      if extra is not None:
        total = total + extra()
      optimizer.zero_grad()
      total.backward()
      nn.utils.clip_grad_norm_(clipped, feeding.CLIP_NORM)
      optimizer.step()
      scheduler.step()


@torch.no_grad()
def estimate_statistics(model, batches, count: int):
  """Replaces batch-norm statistics by their mean over some batches."""
  norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
  for norm in norms:
    norm.reset_running_stats()
    norm.momentum = None  # the mean of all
  model.train()
  for images, *_ in itertools.islice(batches.epoch(), count):
    model(from_flax(images))


def groups(model, rate: float, own) -> list[dict]:
  """Parameters as AdamW takes them; only kernels decay."""
  apart = {id(p) for parameters, _ in own for p in parameters}
  rest = [p for p in model.parameters() if id(p) not in apart]
  kernels = [p for p in rest if squeezed(p) > 1]
  others = [p for p in rest if squeezed(p) <= 1]
  found = [
    {'params': kernels, 'lr': rate, 'weight_decay': feeding.DECAY},
    {'params': others, 'lr': rate, 'weight_decay': 0.0},
  ]
  for parameters, value in own:
    found.append({'params': parameters, 'lr': value, 'weight_decay': 0.0})
  return found


def squeezed(parameter) -> int:
  """Axes of more than one; a kernel has several, a scale of channels one."""
  return sum(size > 1 for size in parameter.shape)


@torch.no_grad()
def logits(model, images) -> np.ndarray:
  """Of images [N, H, W, C], in evaluation mode."""
  model.eval()
  parts = torch.split(from_flax(images), 1024)
  return torch.cat([model(part) for part in parts]).numpy()
