"""EfficientNet-Lite0: EfficientNet without squeeze-and-excitation and swish.

Made for integer hardware: relu6 throughout  [Tan and Le 2019; Lite: Liu 2020].
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax

from djpq_jax.models import cnn
from djpq_jax.models import mobilenet

# Kernel, expansion, channels, blocks, stride of the first block.
_STAGES = (
  (3, 1, 16, 1, 1),
  (3, 6, 24, 2, 2),
  (5, 6, 40, 2, 2),
  (3, 6, 80, 3, 2),
  (5, 6, 112, 3, 1),
  (5, 6, 192, 4, 2),
  (3, 6, 320, 1, 1),
)
# TensorFlow's, which the released weights were trained with.
_NORM = {'momentum': 0.99, 'epsilon': 1e-3}


class EfficientNetLite0(nnx.Module):
  """Inverted residuals of 3x3 and 5x5 windows, SAME padding, relu6.

  At 224x224x3 and 1000 classes: 0.38519 GMACs, 4,652,008 parameters.  The
  released weights expect pixels (x - 127) / 128 of 0..255.

  Args:
    num_classes: length of the logits.
    input_shape: (height, width, channels) of one image; height and width
      multiples of 32.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    *,
    rngs: nnx.Rngs,
  ):
    self.input_shape = cnn.check_input_shape(input_shape, 32)
    kwargs: dict[str, Any] = dict(same=True, norm=_NORM, rngs=rngs)
    channels = 32
    self.stem = mobilenet.ConvNorm(
      self.input_shape[2], channels, 3, 2, **kwargs
    )
    blocks = []
    for kernel, expansion, outputs, count, stride in _STAGES:
      for i in range(count):
        blocks.append(
          mobilenet.InvertedResidual(
            channels,
            outputs,
            expansion,
            kernel,
            1 if i else stride,
            **kwargs,
          )
        )
        channels = outputs
    self.blocks = nnx.List(blocks)
    self.head = mobilenet.ConvNorm(channels, 1280, 1, **kwargs)
    self.classifier = cnn.head(1280, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = nnx.relu6(self.stem(x))
    for block in self.blocks:
      x = block(x)
    x = nnx.relu6(self.head(x))
    return self.classifier(x.mean((1, 2)))
