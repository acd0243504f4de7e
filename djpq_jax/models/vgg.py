"""VGG7 for 32x32 images, a first benchmark of the literature."""

from collections.abc import Sequence

from flax import nnx
import jax

from djpq_jax.models import cnn


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
    self.fc1 = nnx.Linear(
      height // shrink * (width // shrink) * inputs,
      hidden,
      kernel_init=cnn.HE_NORMAL,
      rngs=rngs,
    )
    self.fc2 = nnx.Linear(hidden, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    for i, block in enumerate(self.blocks):
      x = block(x)
      if i % 2:
        x = cnn.max_pool_2x2(x)
    return self.fc2(nnx.relu(self.fc1(cnn.flatten(x))))
