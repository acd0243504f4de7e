"""The vision transformer, ViT-S/16 by default  [Dosovitskiy et al. 2020].

Epsilons, the exact gelu and the order of norms are timm's
(`vit_small_patch16_224`) and torchvision's, which has no ViT of this size.
Weights are read under the names of either.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from djpq_jax.models import cnn
from djpq_jax.models import kernels

EPSILON = 1e-6  # of all norms


def _normal(key, shape, dtype=jnp.float32):
  return kernels.truncated_normal(key, shape, dtype, deviation=0.02)


def _linear(inputs, outputs, *, rngs):
  return nnx.Linear(inputs, outputs, kernel_init=_normal, rngs=rngs)


class Attention(nnx.Module):
  """Self-attention of several heads; one linear layer for each operand.

  Args:
    width: channels of the stream.
    heads: must divide `width`.
    rngs: needs a `params` stream.
  """

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.query = _linear(width, width, rngs=rngs)
    self.key = _linear(width, width, rngs=rngs)
    self.value = _linear(width, width, rngs=rngs)
    self.out = _linear(width, width, rngs=rngs)
    self.heads = heads

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, width] -> [B, T, width]."""
    query, key, value = (
      layer(x).reshape(*x.shape[:2], self.heads, -1)
      for layer in (self.query, self.key, self.value)
    )
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key)
    scores = nnx.softmax(scores * query.shape[-1] ** -0.5)
    mixed = jnp.einsum('bhqk,bkhd->bqhd', scores, value)
    return self.out(mixed.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
  """Attention and a two-layer perceptron, each normed first and added on.

  Args:
    width: channels of the stream.
    heads: of the attention.
    hidden: channels inside the perceptron.
    rngs: needs a `params` stream.
  """

  def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
    self.attention = Attention(width, heads, rngs=rngs)
    self.norm2 = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
    self.fc1 = _linear(width, hidden, rngs=rngs)
    self.fc2 = _linear(hidden, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, T, width] -> [B, T, width]."""
    x = x + self.attention(self.norm1(x))
    y = nnx.gelu(self.fc1(self.norm2(x)), approximate=False)
    return x + self.fc2(y)


class VisionTransformer(nnx.Module):
  """Patches and a class token through pre-norm blocks to one linear layer.

  ViT-S/16 at 224x224x3 and 1000 classes: 4.59888 GMACs, of which 0.35766 in
  products of two activations; 22,050,664 parameters.

  Args:
    num_classes: length of the logits.
    input_shape: (height, width, channels) of one image; height and width
      multiples of `patch`.
    patch: side of a patch, in pixels.
    width: channels of the stream.
    depth: blocks.
    heads: of each attention; divides `width`.
    hidden: channels inside the perceptrons.
    rngs: needs a `params` stream.
  """

  def __init__(
    self,
    num_classes: int = 1000,
    input_shape: Sequence[int] = (224, 224, 3),
    patch: int = 16,
    width: int = 384,
    depth: int = 12,
    heads: int = 6,
    hidden: int = 1536,
    *,
    rngs: nnx.Rngs,
  ):
    if width % heads:
      raise ValueError(f'heads must divide width; got {heads} and {width}')
    self.input_shape = cnn.check_input_shape(input_shape, patch)
    height, across, inputs = self.input_shape
    tokens = height // patch * (across // patch) + 1
    self.patches = nnx.Conv(
      inputs,
      width,
      (patch, patch),
      strides=(patch, patch),
      padding='VALID',
      kernel_init=kernels.lecun_normal,
      rngs=rngs,
    )
    self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
    self.positions = nnx.Param(_normal(rngs.params(), (1, tokens, width)))
    self.blocks = nnx.List(
      [Block(width, heads, hidden, rngs=rngs) for _ in range(depth)]
    )
    self.norm = nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
    self.head = _linear(width, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] -> logits [B, num_classes]."""
    x = self.patches(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    token = self.class_token[...]
    token = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
    x = jnp.concatenate([token, x], axis=1) + self.positions[...]
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x[:, 0]))


def vit_s16(
  num_classes: int = 1000,
  input_shape: Sequence[int] = (224, 224, 3),
  *,
  rngs: nnx.Rngs,
) -> VisionTransformer:
  """ViT-S/16: width 384, 12 blocks of 6 heads."""
  return VisionTransformer(num_classes, input_shape, rngs=rngs)
