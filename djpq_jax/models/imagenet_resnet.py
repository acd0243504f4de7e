"""ImageNet ResNet-18, -34 and -50 with projection shortcuts  [He et al. 2015].

Attribute names, paddings and epsilons are torchvision's (`layer1.0.conv1`,
`layer2.0.downsample.0`, ..., `fc`), so that its weights import one to one.
"""

from collections.abc import Sequence

from flax import nnx
import jax

from djpq_jax.models import cnn


def _shortcut(inputs, outputs, stride, *, rngs):
  """A 1x1 convolution and its norm where the shape changes, else empty."""
  if stride == 1 and inputs == outputs:
    return nnx.List([])
  conv = cnn.conv(inputs, outputs, 1, stride, rngs=rngs)
  return nnx.List([conv, cnn.batch_norm(outputs, rngs=rngs)])


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions beside a shortcut, of ResNet-18 and -34.

  Args:
    inputs: channels that come in.
    width: channels inside, and out.
    stride: of the first convolution and of the shortcut.
    rngs: needs a `params` stream.
  """

  expansion = 1

  def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
    self.conv1 = cnn.conv(inputs, width, 3, stride, rngs=rngs)
    self.bn1 = cnn.batch_norm(width, rngs=rngs)
    self.conv2 = cnn.conv(width, width, 3, rngs=rngs)
    self.bn2 = cnn.batch_norm(width, rngs=rngs)
    self.downsample = _shortcut(inputs, width, stride, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H/stride, W/stride, width]."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    for layer in self.downsample:
      x = layer(x)
    return nnx.relu(y + x)


class Bottleneck(nnx.Module):
  """1x1, 3x3 and 1x1 convolutions beside a shortcut, of ResNet-50.

  The 3x3 convolution strides, as in torchvision ("ResNet v1.5"); in the paper
  the first 1x1 does.

  Args:
    inputs: channels that come in.
    width: channels inside; four times as many go out.
    stride: of the 3x3 convolution and of the shortcut.
    rngs: needs a `params` stream.
  """

  expansion = 4

  def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs):
    outputs = width * self.expansion
    self.conv1 = cnn.conv(inputs, width, 1, rngs=rngs)
    self.bn1 = cnn.batch_norm(width, rngs=rngs)
    self.conv2 = cnn.conv(width, width, 3, stride, rngs=rngs)
    self.bn2 = cnn.batch_norm(width, rngs=rngs)
    self.conv3 = cnn.conv(width, outputs, 1, rngs=rngs)
    self.bn3 = cnn.batch_norm(outputs, rngs=rngs)
    self.downsample = _shortcut(inputs, outputs, stride, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H/stride, W/stride, 4 * width]."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = nnx.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(y))
    for layer in self.downsample:
      x = layer(x)
    return nnx.relu(y + x)


class ImageNetResNet(nnx.Module):
  """A 7x7 stem, a pool, four stages of 64 to 512 channels, one linear layer.

  At 224x224x3 and 1000 classes: ResNet-18 1.81407 GMACs, 1857.6 GBOPs at 32/32;
  ResNet-34 3.66376 and ResNet-50 4.08918 GMACs.

  Args:
    block: `BasicBlock` or `Bottleneck`.
    blocks: how many in each of the four stages.
    num_classes: length of the logits.
    input_shape: (height, width, channels) of one image; height and width
      multiples of 32.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    block: type[BasicBlock] | type[Bottleneck],
    blocks: Sequence[int],
    num_classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    *,
    rngs: nnx.Rngs,
  ):
    self.input_shape = cnn.check_input_shape(input_shape, 32)
    self.conv1 = cnn.conv(self.input_shape[2], 64, 7, 2, rngs=rngs)
    self.bn1 = cnn.batch_norm(64, rngs=rngs)
    first, second, third, fourth = blocks
    out = block.expansion
    self.layer1 = _stage(block, first, 64, 64, 1, rngs=rngs)
    self.layer2 = _stage(block, second, 64 * out, 128, 2, rngs=rngs)
    self.layer3 = _stage(block, third, 128 * out, 256, 2, rngs=rngs)
    self.layer4 = _stage(block, fourth, 256 * out, 512, 2, rngs=rngs)
    self.fc = cnn.head(512 * out, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = nnx.relu(self.bn1(self.conv1(x)))
    x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
      for block in stage:
        x = block(x)
    return self.fc(x.mean((1, 2)))


def _stage(block, blocks, inputs, width, stride, *, rngs):
  """A list of blocks; the first one changes the shape."""
  first = block(inputs, width, stride, rngs=rngs)
  outputs = width * block.expansion
  rest = [block(outputs, width, 1, rngs=rngs) for _ in range(1, blocks)]
  return nnx.List([first, *rest])


def resnet18(
  num_classes: int = 1000,
  input_shape: Sequence[int] = (224, 224, 3),
  *,
  rngs: nnx.Rngs,
) -> ImageNetResNet:
  """ResNet-18: 2-2-2-2 basic blocks, 11,689,512 parameters."""
  return ImageNetResNet(
    BasicBlock, (2, 2, 2, 2), num_classes, input_shape, rngs=rngs
  )


def resnet34(
  num_classes: int = 1000,
  input_shape: Sequence[int] = (224, 224, 3),
  *,
  rngs: nnx.Rngs,
) -> ImageNetResNet:
  """ResNet-34: 3-4-6-3 basic blocks, 21,797,672 parameters."""
  return ImageNetResNet(
    BasicBlock, (3, 4, 6, 3), num_classes, input_shape, rngs=rngs
  )


def resnet50(
  num_classes: int = 1000,
  input_shape: Sequence[int] = (224, 224, 3),
  *,
  rngs: nnx.Rngs,
) -> ImageNetResNet:
  """ResNet-50: 3-4-6-3 bottlenecks, 25,557,032 parameters."""
  return ImageNetResNet(
    Bottleneck, (3, 4, 6, 3), num_classes, input_shape, rngs=rngs
  )
