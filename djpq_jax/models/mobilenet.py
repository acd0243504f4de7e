"""MobileNetV2, and the block it shares with its successors.

Paddings, epsilons and the rounding of channels are torchvision's.  There is no
dropout: none of the models here has any.
"""

from collections.abc import Sequence
import math
from typing import Any

from flax import nnx
import jax

from djpq_jax.models import cnn

# Expansion, channels, blocks  [Sandler et al. 2018].
_STAGES = (
  (1, 16, 1),
  (6, 24, 2),
  (6, 32, 3),
  (6, 64, 4),
  (6, 96, 3),
  (6, 160, 3),
  (6, 320, 1),
)
_STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)  # of the stem and of each stage


class ConvNorm(nnx.Module):
  """A convolution without bias and its batch normalization.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    kernel: side of the window.
    stride: in pixels.
    groups: `inputs` makes it depthwise.
    same: pad as TensorFlow's SAME instead of as torch.
    norm: arguments of `nnx.BatchNorm` in place of torch's constants.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    same: bool = False,
    norm: dict[str, Any] | None = None,
    rngs: nnx.Rngs,
  ):
    padding = 'SAME' if same else None
    self.conv = cnn.conv(
      inputs, outputs, kernel, stride, groups=groups, padding=padding, rngs=rngs
    )
    if norm is None:
      self.bn = cnn.batch_norm(outputs, rngs=rngs)
    else:
      self.bn = nnx.BatchNorm(outputs, **norm, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H/stride, W/stride, outputs]."""
    return self.bn(self.conv(x))


class InvertedResidual(nnx.Module):
  """1x1 expansion, depthwise convolution, 1x1 projection; relu6 inside.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    expansion: channels inside, over `inputs`; 1 leaves the first layer out.
    kernel: side of the depthwise window.
    stride: of the depthwise convolution; input and output are added where it
      is 1 and they have as many channels.
    same: as in `ConvNorm`.
    norm: as in `ConvNorm`.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    expansion: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    same: bool = False,
    norm: dict[str, Any] | None = None,
    rngs: nnx.Rngs,
  ):
    hidden = inputs * expansion
    kwargs: dict[str, Any] = dict(same=same, norm=norm, rngs=rngs)
    wide = expansion > 1
    self.expand = ConvNorm(inputs, hidden, 1, **kwargs) if wide else None
    self.depthwise = ConvNorm(
      hidden, hidden, kernel, stride, groups=hidden, **kwargs
    )
    self.project = ConvNorm(hidden, outputs, 1, **kwargs)
    self.residual = stride == 1 and inputs == outputs

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, inputs] -> [B, H/stride, W/stride, outputs]."""
    y = x if self.expand is None else nnx.relu6(self.expand(x))
    y = self.project(nnx.relu6(self.depthwise(y)))
    return x + y if self.residual else y


def round_channels(channels: float, divisor: int = 8) -> int:
  """The nearest multiple of `divisor` that loses at most 10 %.

  >>> [round_channels(c) for c in (32 * 0.75, 24 * 0.5, 1, 16 * 1.4)]
  [24, 16, 8, 24]
  """
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class MobileNetV2(nnx.Module):
  """Inverted residuals with linear bottlenecks  [Sandler et al. 2018].

  At width 1, 224x224x3 and 1000 classes: 0.30077 GMACs, 308.0 GBOPs at 32/32,
  3,504,872 parameters.

  Args:
    num_classes: length of the logits.
    width: multiplier of all channels; the last layer never gets narrower.
    input_shape: (height, width, channels) of one image; height and width
      multiples of 32, or of the product of other `strides`.
    strides: of the stem and of the seven stages; images of 32 pixels keep more
      of them with (1, 1, 1, 2, 2, 1, 2, 1).
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 1000,
    width: float = 1.0,
    input_shape: Sequence[int] = (224, 224, 3),
    strides: Sequence[int] = _STRIDES,
    *,
    rngs: nnx.Rngs,
  ):
    if not width > 0:
      raise ValueError(f'width must be positive; got {width}')
    if len(strides) != len(_STRIDES) or not set(strides) <= {1, 2}:
      raise ValueError(
        f'strides must be {len(_STRIDES)} numbers, each 1 or 2; got {strides}'
      )
    self.input_shape = cnn.check_input_shape(input_shape, math.prod(strides))
    first, *firsts = strides
    channels = round_channels(32 * width)
    self.stem = ConvNorm(self.input_shape[2], channels, 3, first, rngs=rngs)
    blocks = []
    for (expansion, outputs, count), stride in zip(_STAGES, firsts):
      outputs = round_channels(outputs * width)
      for i in range(count):
        blocks.append(
          InvertedResidual(
            channels,
            outputs,
            expansion,
            stride=1 if i else stride,
            rngs=rngs,
          )
        )
        channels = outputs
    self.blocks = nnx.List(blocks)
    last = round_channels(1280 * max(1.0, width))
    self.head = ConvNorm(channels, last, 1, rngs=rngs)
    self.classifier = cnn.head(last, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = nnx.relu6(self.stem(x))
    for block in self.blocks:
      x = block(x)
    x = nnx.relu6(self.head(x))
    return self.classifier(x.mean((1, 2)))
