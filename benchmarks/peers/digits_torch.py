"""The digits' network and its training in torch, for the peers that use it."""

import math

import counting
import feeding
import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Digits(nn.Module):
  """Four convolutions with batch norm, a pooling after two, and a linear layer.

  Args:
    given: arrays from benchmarks/compare_peers.py; their weights are put in.
    conv: (layer, channels in, out) -> a convolution without a bias.
    linear: (features in, out) -> a linear layer.
    relu: layer -> the module after each batch norm.
    entry: what the images pass first.
  """

  def __init__(self, given, *, conv, linear, relu, entry):
    super().__init__()
    kernels = [given[f'kernel{k}'] for k in range(5)]
    self.entry = entry
    self.convs = nn.ModuleList(
      [conv(k, *kernels[k].shape[2:]) for k in range(4)]
    )
    self.norms = nn.ModuleList(
      [nn.BatchNorm2d(w.shape[-1], feeding.EPSILON) for w in kernels[:4]]
    )
    self.relus = nn.ModuleList([relu(k) for k in range(4)])
    self.linear = linear(*kernels[4].shape)
    self.put(given)

  @torch.no_grad()
  def put(self, given):
    """Copies the float weights in, from the layout of flax to that of torch."""
    for k, (conv, norm) in enumerate(zip(self.convs, self.norms)):
      conv.weight.copy_(torch.tensor(given[f'kernel{k}'].transpose(3, 2, 0, 1)))
      scale, bias, mean, deviation = torch.tensor(given[f'norm{k}'])
      norm.weight.copy_(scale)
      norm.bias.copy_(bias)
      norm.running_mean.copy_(mean)
      norm.running_var.copy_(deviation**2 - feeding.EPSILON)
    # Rows of (height, width, channel) become those of (channel, height, width).
    side = math.isqrt(len(given['kernel4']) // self.norms[-1].num_features)
    kernel = given['kernel4'].reshape(
      side, side, self.norms[-1].num_features, -1
    )
    kernel = kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[-1], -1)
    self.linear.weight.copy_(torch.tensor(kernel))
    self.linear.bias.copy_(torch.tensor(given['bias4']))

  def forward(self, x):
    """Images [B, C, H, W] -> logits [B, classes]."""
    x = self.entry(x)
    for k, layers in enumerate(zip(self.convs, self.norms, self.relus)):
      for layer in layers:
        x = layer(x)
      if k == 1:
        x = functional.max_pool2d(x, 2)
    return self.linear(torch.flatten(x, 1))


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
    batches: a `feeding.Batches`.
    epochs: of them.
    rate: the highest rate of learning.
    own: (parameters, rate) with a rate of their own.
    extra: () -> what is added to the loss.
  """
  optimizer = torch.optim.AdamW(groups(model, rate, own))
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
      nn.utils.clip_grad_norm_(model.parameters(), feeding.CLIP_NORM)
      optimizer.step()
      scheduler.step()


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


def training_loss(model, given) -> float:
  """On all training images in all shifts."""
  images, labels, teacher = feeding.tiled(given)
  return feeding.loss(logits(model, images), labels, teacher)


def shapes(model, size: int) -> tuple[list, list]:
  """Of the kernels and of the inputs, as `counting.whole_tensors` takes them.

  Args:
    model: a `Digits`, or one of which channels were removed.
    size: height and width of an image.
  """
  kernels, inputs = [], []
  for k, conv in enumerate(model.convs):
    out, into, *window = conv.weight.shape
    kernels.append((*window, into, out))
    side = size if k < 2 else size // 2
    inputs.append((side, side, into))
  out, into = model.linear.weight.shape
  return [*kernels, (into, out)], [*inputs, (into,)]


def macs(model, size: int) -> list[int]:
  """Of each layer."""
  ones = [1] * 5
  found = []
  for kernel, entry in zip(*shapes(model, size)):
    made = counting.whole_tensors([kernel], [entry], ones, ones)
    found.append(int(counting.bops(made)[0]))
  return found
