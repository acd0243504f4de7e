"""The ResNets of CIFAR in torch, for the peers that use them."""

import feeding
import torch
from torch import nn
from torch.nn import functional
import training_torch

LOOKED_AT = 5000  # training images for the loss by which trainings are chosen


class ResNet(nn.Module):
  """6n + 2 layers, with shortcuts that have no parameters (option A).

  Args:
    given: arrays from benchmarks/peer_arrays.py; their weights are put in.
    conv: (layer, channels in, out, stride) -> a convolution without a bias.
    linear: (features in, out) -> a linear layer.
    entry: layer -> the module that its input passes first.
  """

  def __init__(self, given, *, conv, linear, entry):
    super().__init__()
    kernels = [given[f'kernel{k}'] for k in range(int(given['layers']))]
    strides = [int(stride) for stride in given['strides']]
    *kernels, last = [kernel.shape for kernel in kernels]
    self.convs = nn.ModuleList(
      [conv(k, *kernel[2:], strides[k]) for k, kernel in enumerate(kernels)]
    )
    self.norms = nn.ModuleList(
      [nn.BatchNorm2d(kernel[-1], feeding.EPSILON) for kernel in kernels]
    )
    self.linear = linear(*last)
    self.inputs = nn.ModuleList([entry(k) for k in range(len(kernels) + 1)])
    self.put(given)

  @torch.no_grad()
  def put(self, given):
    """Copies the float weights in, from the layout of flax to that of torch."""
    for k, (conv, norm) in enumerate(zip(self.convs, self.norms)):
      training_torch.put(given, k, conv, norm)
    last = len(self.convs)
    self.linear.weight.copy_(torch.tensor(given[f'kernel{last}'].T))
    self.linear.bias.copy_(torch.tensor(given[f'bias{last}']))

  def forward(self, x):
    """Images [B, C, H, W] -> logits [B, classes]."""
    x = functional.relu(self.normed(0, x))
    for k in range(1, len(self.convs), 2):
      y = functional.relu(self.normed(k, x))
      y = self.normed(k + 1, y)
      x = functional.relu(y + shortcut(x, y))
    return self.linear(self.inputs[-1](x.mean((2, 3))))

  def normed(self, k, x):
    """A convolution of what its entry makes of x, and its batch norm."""
    return self.norms[k](self.convs[k](self.inputs[k](x)))

  def layers(self):
    """In the order in which they are called."""
    return [*self.convs, self.linear]

  def entries(self):
    """What the input of each layer comes from."""
    return [*self.inputs]


def shortcut(x, like):
  """Every other pixel, and channels of zeros on both sides, where it has to."""
  step = x.shape[2] // like.shape[2]
  more = like.shape[1] - x.shape[1]
  x = x[:, :, ::step, ::step]
  return functional.pad(x, (0, 0, 0, 0, more // 2, more - more // 2))


def floats(given) -> ResNet:
  """The float model, as the teacher."""
  return ResNet(
    given,
    conv=lambda k, into, out, stride: nn.Conv2d(
      into, out, 3, stride, padding=1, bias=False
    ),
    linear=nn.Linear,
    entry=lambda k: nn.Identity(),
  )


def batches(given, seed: int) -> feeding.Crops:
  """Of moved and mirrored training images."""
  teacher = floats(given)
  return feeding.Crops(
    given, seed, lambda images: training_torch.logits(teacher, images)
  )


def training_loss(model, given) -> float:
  """On some training images, as they are."""
  images = feeding.normalized(given, given['images'][:LOOKED_AT])
  labels = given['labels'][:LOOKED_AT]
  teacher = training_torch.logits(floats(given), images)
  return feeding.loss(training_torch.logits(model, images), labels, teacher)


def shapes(model, size: int) -> tuple[list, list]:
  """Of the kernels and of the inputs, as `counting.whole_tensors` takes them.

  Args:
    model: a `ResNet`.
    size: height and width of an image.
  """
  kernels, inputs = [], []
  for conv in model.convs:
    out, into, *window = conv.weight.shape
    kernels.append((*window, into, out))
    inputs.append((size, size, into))
    size //= conv.stride[0]
  out, into = model.linear.weight.shape
  return [*kernels, (into, out)], [*inputs, (into,)]
