"""CIFAR ResNets, 6n + 2 layers, with option-A shortcuts  [He et al. 2015].

Attribute names, paddings and epsilons are those of the common torch
checkpoints (`conv1`, `bn1`, `layer1.0.conv1`, ..., `linear`), so that their
weights import one to one.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from djpq_jax.models import cnn


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions and a shortcut without parameters (option A).

  Args:
    inputs: channels that come in.
    outputs: channels that go out, >= `inputs`.
    stride: of the first convolution; the shortcut takes every stride-th pixel.
    rngs: needs a `params` stream.
  """

  def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
    self.conv1 = cnn.conv(inputs, outputs, 3, stride, rngs=rngs)
    self.bn1 = cnn.batch_norm(outputs, rngs=rngs)
    self.conv2 = cnn.conv(outputs, outputs, 3, rngs=rngs)
    self.bn2 = cnn.batch_norm(outputs, rngs=rngs)
    self.stride = stride
    # A fact of the stream, not of the shapes at hand: were the stream cut on
    # one side only, the sum below must fail instead of pairing wrong channels.
    low = (outputs - inputs) // 2
    self.pad = (low, outputs - inputs - low)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H/stride, W/stride, outputs]."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    return nnx.relu(y + self.shortcut(x))

  def shortcut(self, x: jax.Array) -> jax.Array:
    """Subsamples pixels and pads channels with zeros."""
    if self.stride > 1:
      strides = (1, self.stride, self.stride, 1)
      x = jax.lax.slice(x, (0, 0, 0, 0), x.shape, strides)
    if any(self.pad):
      x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.pad))
    return x


class CifarResNet(nnx.Module):
  """16-32-64 channels, (depth - 2) / 6 blocks in each of three stages.

  ResNet-20 at 32x32x3 and 10 classes: 40.55 M MACs in its convolutions, 640 in
  its linear layer, 269,722 trainable parameters.

  Args:
    num_classes: length of the logits.
    depth: layers with weights, 6n + 2: 20, 32, 44, 56, 110, ...
    input_shape: (height, width, channels) of one image; height and width
      multiples of 4.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 10,
    depth: int = 20,
    input_shape: Sequence[int] = (32, 32, 3),
    *,
    rngs: nnx.Rngs,
  ):
    if depth < 8 or depth % 6 != 2:
      raise ValueError(f'depth must be 6n + 2 with n >= 1; got {depth}')
    self.input_shape = cnn.check_input_shape(input_shape, 4)
    blocks = (depth - 2) // 6
    self.conv1 = cnn.conv(self.input_shape[2], 16, 3, rngs=rngs)
    self.bn1 = cnn.batch_norm(16, rngs=rngs)
    self.layer1 = _stage(blocks, 16, 16, 1, rngs=rngs)
    self.layer2 = _stage(blocks, 16, 32, 2, rngs=rngs)
    self.layer3 = _stage(blocks, 32, 64, 2, rngs=rngs)
    self.linear = cnn.head(64, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = nnx.relu(self.bn1(self.conv1(x)))
    for stage in (self.layer1, self.layer2, self.layer3):
      for block in stage:
        x = block(x)
    return self.linear(x.mean((1, 2)))


def _stage(blocks, inputs, outputs, stride, *, rngs):
  """A list of `blocks` BasicBlocks; the first one changes the shape."""
  first = BasicBlock(inputs, outputs, stride, rngs=rngs)
  rest = [BasicBlock(outputs, outputs, 1, rngs=rngs) for _ in range(1, blocks)]
  return nnx.List([first, *rest])


def resnet8(
  num_classes: int = 10,
  input_shape: Sequence[int] = (32, 32, 3),
  *,
  rngs: nnx.Rngs,
) -> CifarResNet:
  """The CIFAR ResNet of depth 8, the smallest one."""
  return CifarResNet(num_classes, 8, input_shape, rngs=rngs)


def resnet20(
  num_classes: int = 10,
  input_shape: Sequence[int] = (32, 32, 3),
  *,
  rngs: nnx.Rngs,
) -> CifarResNet:
  """The CIFAR ResNet of depth 20."""
  return CifarResNet(num_classes, 20, input_shape, rngs=rngs)


def resnet32(
  num_classes: int = 10,
  input_shape: Sequence[int] = (32, 32, 3),
  *,
  rngs: nnx.Rngs,
) -> CifarResNet:
  """The CIFAR ResNet of depth 32."""
  return CifarResNet(num_classes, 32, input_shape, rngs=rngs)


def resnet44(
  num_classes: int = 10,
  input_shape: Sequence[int] = (32, 32, 3),
  *,
  rngs: nnx.Rngs,
) -> CifarResNet:
  """The CIFAR ResNet of depth 44."""
  return CifarResNet(num_classes, 44, input_shape, rngs=rngs)


def resnet56(
  num_classes: int = 10,
  input_shape: Sequence[int] = (32, 32, 3),
  *,
  rngs: nnx.Rngs,
) -> CifarResNet:
  """The CIFAR ResNet of depth 56."""
  return CifarResNet(num_classes, 56, input_shape, rngs=rngs)
