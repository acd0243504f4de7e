"""The digits' network in torch, for the peers that use it."""

import math

import counting
import feeding
import torch
from torch import nn
from torch.nn import functional
import training_torch


class Digits(nn.Module):
  """Four convolutions with batch norm, a pooling after two, and a linear layer.

  Args:
    given: arrays from benchmarks/peer_arrays.py; their weights are put in.
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
      training_torch.put(given, k, conv, norm)
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

  def layers(self):
    """In the order in which they are called."""
    return [*self.convs, self.linear]

  def entries(self):
    """What the input of each layer comes from."""
    return [self.entry, *self.relus]


batches = feeding.Batches


def training_loss(model, given) -> float:
  """On all training images in all shifts."""
  images, labels, teacher = feeding.tiled(given)
  return feeding.loss(training_torch.logits(model, images), labels, teacher)


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
