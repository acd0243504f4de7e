"""Parts that convolutional networks share; two small ones: digits, LeNet-5."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax

from djpq_jax.models import kernels


def check_input_shape(shape: Sequence[int], multiple: int) -> tuple[int, ...]:
  """Returns `shape` as a tuple if a network can take it.

  Args:
    shape: (height, width, channels) of one image, in pixels.
    multiple: how often the pools divide height and width in all.

  Raises:
    ValueError: `shape` is no such triple, or a pool would drop pixels.
  """
  shape = tuple(shape)
  if len(shape) != 3 or any(n < 1 for n in shape):
    raise ValueError(
      f'input_shape must be (height, width, channels), each >= 1; got {shape}'
    )
  if shape[0] % multiple or shape[1] % multiple:
    raise ValueError(
      f'height and width must be multiples of {multiple} for this model; '
      f'got {shape}'
    )
  return shape


def max_pool_2x2(x: jax.Array) -> jax.Array:
  """Halves height and width: [B, H, W, C] -> [B, H/2, W/2, C]."""
  return nnx.max_pool(x, (2, 2), strides=(2, 2))


def flatten(x: jax.Array) -> jax.Array:
  """[B, ...] -> [B, features], whatever number of channels is left."""
  return x.reshape(x.shape[0], -1)


def head(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> nnx.Linear:
  """The last layer, from features to logits."""
  return nnx.Linear(
    inputs, outputs, kernel_init=kernels.lecun_normal, rngs=rngs
  )


def conv(
  inputs: int,
  outputs: int,
  kernel: int,
  stride: int = 1,
  *,
  groups: int = 1,
  bias: bool = False,
  padding: Any = None,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A square convolution that pads like torch, kernel // 2 on each side.

  Flax's SAME is the same at stride 1, but pads on the right only at stride 2.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    kernel: side of the window, odd.
    stride: in pixels, of both axes.
    groups: `inputs` makes the convolution depthwise.
    bias: whether it adds one.
    padding: what `nnx.Conv` takes, in place of torch's.
    rngs: needs a `params` stream.
  """
  side = (kernel // 2, kernel // 2)
  return nnx.Conv(
    inputs,
    outputs,
    (kernel, kernel),
    strides=(stride, stride),
    padding=(side, side) if padding is None else padding,
    feature_group_count=groups,
    use_bias=bias,
    kernel_init=kernels.he_normal,
    rngs=rngs,
  )


def batch_norm(channels: int, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
  """Batch normalization with torch's constants (its momentum 0.1 is 0.9)."""
  return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


# What may follow a convolution of `DigitsCNN`.
ACTIVATIONS = {'relu': nnx.relu, 'gelu': nnx.gelu, 'swish': nnx.swish}


class ConvBN(nnx.Module):
  """3x3 convolution without bias, batch normalization, an activation."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    activation: str = 'relu',
    *,
    rngs: nnx.Rngs,
  ):
    self.conv = nnx.Conv(
      in_channels,
      out_channels,
      (3, 3),
      padding='SAME',
      use_bias=False,
      kernel_init=kernels.he_normal,
      rngs=rngs,
    )
    self.bn = batch_norm(out_channels, rngs=rngs)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, in_channels] -> [B, H, W, out_channels]."""
    return ACTIVATIONS[self.activation](self.bn(self.conv(x)))


class DigitsCNN(nnx.Module):
  """Four 3x3 convolutions, one pool, one linear layer, for 8x8 digits.

  Args:
    num_classes: length of the logits.
    channels: outputs of the four convolutions; the pool follows the second.
    input_shape: (height, width, channels) of one image; height and width even.
    activation: 'relu', 'gelu' or 'swish'.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 10,
    channels: Sequence[int] = (32, 32, 64, 64),
    input_shape: Sequence[int] = (8, 8, 1),
    activation: str = 'relu',
    *,
    rngs: nnx.Rngs,
  ):
    self.input_shape = check_input_shape(input_shape, 2)
    if len(channels) != 4:
      raise ValueError(f'DigitsCNN has 4 convolutions; got channels {channels}')
    if activation not in ACTIVATIONS:
      known = ', '.join(ACTIVATIONS)
      raise ValueError(f'activation must be one of {known}; got {activation}')
    height, width, inputs = self.input_shape
    c1, c2, c3, c4 = channels
    self.block1 = ConvBN(inputs, c1, activation, rngs=rngs)
    self.block2 = ConvBN(c1, c2, activation, rngs=rngs)
    self.block3 = ConvBN(c2, c3, activation, rngs=rngs)
    self.block4 = ConvBN(c3, c4, activation, rngs=rngs)
    features = height // 2 * (width // 2) * c4
    self.linear = head(features, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = max_pool_2x2(self.block2(self.block1(x)))
    x = self.block4(self.block3(x))
    return self.linear(flatten(x))


class LeNet5(nnx.Module):
  """32C5-MP2-64C5-MP2-512FC-10, biases, relu  [VIBNet, Bayesian Bits].

  The quantization literature's "LeNet-5" for 28x28 digits, with SAME padding;
  it is wider than LeCun's and has no batch normalization.

  Args:
    num_classes: length of the logits.
    input_shape: (height, width, channels) of one image; height and width
      multiples of 4.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 10,
    input_shape: Sequence[int] = (28, 28, 1),
    *,
    rngs: nnx.Rngs,
  ):
    self.input_shape = check_input_shape(input_shape, 4)
    height, width, inputs = self.input_shape
    init: dict[str, Any] = dict(kernel_init=kernels.he_normal, rngs=rngs)
    self.conv1 = nnx.Conv(inputs, 32, (5, 5), padding='SAME', **init)
    self.conv2 = nnx.Conv(32, 64, (5, 5), padding='SAME', **init)
    self.fc1 = nnx.Linear(height // 4 * (width // 4) * 64, 512, **init)
    self.fc2 = head(512, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = max_pool_2x2(nnx.relu(self.conv1(x)))
    x = max_pool_2x2(nnx.relu(self.conv2(x)))
    return self.fc2(nnx.relu(self.fc1(flatten(x))))
