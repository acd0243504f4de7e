"""VGG: seven layers for 32x32 images, and the ImageNet networks.

VGG7 is the quantization literature's own; torchvision has no such network.
"""

from collections.abc import Sequence
import math

from flax import nnx
import jax

from djpq_jax.models import cnn
from djpq_jax.models import kernels

# Outputs of the convolutions between two pools  [Simonyan and Zisserman 2014].
_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


def _linear(inputs, outputs, *, rngs):
  return nnx.Linear(inputs, outputs, kernel_init=kernels.he_normal, rngs=rngs)


class VGG7(nnx.Module):
  """128-128-M-256-256-M-512-512-M-FC1024-FC  [Bayesian Bits, DJPQ].

  Every convolution is 3x3 SAME without bias, followed by batch normalization
  and relu.  At 32x32x3 and 10 classes: 0.61592 GMACs, 630.7 GBOPs at 32/32.

  Args:
    num_classes: length of the logits.
    channels: outputs of each pair of convolutions.
    hidden: width of the first linear layer.
    input_shape: (height, width, channels) of one image; height and width
      multiples of 2 to the power `len(channels)`.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 10,
    channels: Sequence[int] = (128, 256, 512),
    hidden: int = 1024,
    input_shape: Sequence[int] = (32, 32, 3),
    *,
    rngs: nnx.Rngs,
  ):
    shrink = 2 ** len(channels)
    self.input_shape = cnn.check_input_shape(input_shape, shrink)
    height, width, inputs = self.input_shape
    blocks = []
    for outputs in channels:
      blocks.append(cnn.ConvBN(inputs, outputs, rngs=rngs))
      blocks.append(cnn.ConvBN(outputs, outputs, rngs=rngs))
      inputs = outputs
    self.blocks = nnx.List(blocks)
    features = height // shrink * (width // shrink) * inputs
    self.fc1 = _linear(features, hidden, rngs=rngs)
    self.fc2 = cnn.head(hidden, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    for i, block in enumerate(self.blocks):
      x = block(x)
      if i % 2:
        x = cnn.max_pool_2x2(x)
    return self.fc2(nnx.relu(self.fc1(cnn.flatten(x))))


class Convolution(nnx.Module):
  """3x3 convolution with bias, batch normalization if wanted, relu.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    batch_norm: whether a norm follows the convolution.
    rngs: needs a `params` stream.
  """

  def __init__(
    self, inputs: int, outputs: int, batch_norm: bool, *, rngs: nnx.Rngs
  ):
    self.conv = cnn.conv(inputs, outputs, 3, bias=True, rngs=rngs)
    self.bn = cnn.batch_norm(outputs, rngs=rngs) if batch_norm else None

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H, W, outputs]."""
    x = self.conv(x)
    return nnx.relu(x if self.bn is None else self.bn(x))


class VGG(nnx.Module):
  """Stages of 3x3 convolutions and a pool, then three linear layers.

  Torchvision's VGG without dropout; VGG16 has 15.47026 GMACs at 224x224x3 and
  1000 classes.

  Args:
    stages: outputs of the convolutions before each pool.
    num_classes: length of the logits.
    input_shape: (height, width, channels) of one image; height and width
      multiples of 2 to the power `len(stages)`.
    batch_norm: the variant with batch normalization (torchvision's `_bn`).
    hidden: width of the first two linear layers.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    stages: Sequence[Sequence[int]],
    num_classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    batch_norm: bool = False,
    hidden: int = 4096,
    *,
    rngs: nnx.Rngs,
  ):
    shrink = 2 ** len(stages)
    self.input_shape = cnn.check_input_shape(input_shape, shrink)
    height, width, inputs = self.input_shape
    made = []
    for stage in stages:
      blocks = []
      for outputs in stage:
        blocks.append(Convolution(inputs, outputs, batch_norm, rngs=rngs))
        inputs = outputs
      made.append(nnx.List(blocks))
    self.stages = nnx.List(made)
    # What the last pool leaves, as torchvision flattens it.
    self.map_shape = (inputs, height // shrink, width // shrink)
    features = math.prod(self.map_shape)
    self.fc1 = _linear(features, hidden, rngs=rngs)
    self.fc2 = _linear(hidden, hidden, rngs=rngs)
    self.fc3 = cnn.head(hidden, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    for stage in self.stages:
      for block in stage:
        x = block(x)
      x = cnn.max_pool_2x2(x)
    x = nnx.relu(self.fc1(cnn.flatten(x)))
    return self.fc3(nnx.relu(self.fc2(x)))


def vgg11(
  num_classes: int = 1000,
  input_shape: Sequence[int] = (224, 224, 3),
  batch_norm: bool = False,
  *,
  rngs: nnx.Rngs,
) -> VGG:
  """VGG11: 8 convolutions."""
  return VGG(_VGG11, num_classes, input_shape, batch_norm, rngs=rngs)


def vgg16(
  num_classes: int = 1000,
  input_shape: Sequence[int] = (224, 224, 3),
  batch_norm: bool = False,
  *,
  rngs: nnx.Rngs,
) -> VGG:
  """VGG16: 13 convolutions."""
  return VGG(_VGG16, num_classes, input_shape, batch_norm, rngs=rngs)
