"""What `trace` finds, on one small model per architecture."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import flax
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import graph

# The arithmetic of flax's own activations mixes dtypes.
pytestmark = pytest.mark.standard_promotion

IMAGE = (2, 8, 8, 3)
TOKENS = (2, 6, 8)


class Net(nnx.Module):
  """Some modules, and a function that calls them."""

  def __init__(self, forward, **modules):
    self.forward = forward
    for name, module in modules.items():
      setattr(self, name, nnx.data(module))

  def __call__(self, *args, **kwargs):
    return self.forward(self, *args, **kwargs)


class Branch(nnx.Module):
  """A convolution with a norm, to nest."""

  def __init__(self, n_in, n_out, rngs):
    self.conv = conv(n_in, n_out, rngs)
    self.bn = nnx.BatchNorm(n_out, use_running_average=True, rngs=rngs)

  def __call__(self, x):
    return nnx.relu(self.bn(self.conv(x)))


def conv(n_in, n_out, rngs, size=3, **kwargs):
  return nnx.Conv(n_in, n_out, (size, size), rngs=rngs, **kwargs)


def batch_norm(n, rngs):
  return nnx.BatchNorm(n, use_running_average=True, rngs=rngs)


def pooled(x):
  return x.mean((1, 2))


def between(make=None, function=None):
  """conv1, then something on 8 channels, then conv2 and a classifier."""

  def build(rngs):
    def forward(m, x):
      x = m.conv1(x)
      x = m.middle(x) if make else function(x)
      return m.head(pooled(m.conv2(x)))

    middle = dict(middle=make(8, rngs)) if make else {}
    return Net(
      forward,
      conv1=conv(3, 8, rngs),
      conv2=conv(8, 6, rngs),
      head=nnx.Linear(6, 5, rngs=rngs),
      **middle,
    )

  return build


def flatten(size):
  def build(rngs):
    def forward(m, x):
      x = nnx.max_pool(m.bn(m.conv(x)), (size, size), (size, size))
      return m.head(nnx.relu(m.hidden(x.reshape(x.shape[0], -1))))

    return Net(
      forward,
      conv=conv(3, 6, rngs),
      bn=batch_norm(6, rngs),
      hidden=nnx.Linear(6 * (8 // size) ** 2, 7, rngs=rngs),
      head=nnx.Linear(7, 5, rngs=rngs),
    )

  return build


def norm_after_flatten(rngs):
  def forward(m, x):
    x = nnx.max_pool(m.conv(x), (4, 4), (4, 4))
    return m.head(m.bn(x.reshape(x.shape[0], -1)))

  return Net(
    forward,
    conv=conv(3, 6, rngs),
    bn=batch_norm(24, rngs),
    head=nnx.Linear(24, 5, rngs=rngs),
  )


def residual(rngs):
  """An identity block, then a block with a projection."""

  def forward(m, x):
    x = m.stem(x)
    x = nnx.relu(x + m.b1(m.a1(x)))
    x = nnx.relu(m.proj(x) + m.b2(m.a2(x)))
    return m.head(pooled(x))

  return Net(
    forward,
    stem=Branch(3, 8, rngs),
    a1=Branch(8, 6, rngs),
    b1=Branch(6, 8, rngs),
    a2=Branch(8, 7, rngs),
    b2=Branch(7, 10, rngs),
    proj=conv(8, 10, rngs, size=1),
    head=nnx.Linear(10, 5, rngs=rngs),
  )


def option_a(rngs):
  def forward(m, x):
    x = m.stem(x)
    y = m.b(m.a(x))
    x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return m.head(pooled(nnx.relu(x + y)))

  return Net(
    forward,
    stem=Branch(3, 4, rngs),
    a=conv(4, 6, rngs, strides=2),
    b=conv(6, 8, rngs),
    head=nnx.Linear(8, 5, rngs=rngs),
  )


def inverted_residual(rngs):
  def forward(m, x):
    x = m.stem(x)
    y = nnx.relu6(m.bn1(m.expand(x)))
    y = nnx.relu6(m.bn2(m.dw(y)))
    return m.head(pooled(x + m.project(y)))

  return Net(
    forward,
    stem=Branch(3, 4, rngs),
    expand=conv(4, 12, rngs, size=1, use_bias=False),
    bn1=batch_norm(12, rngs),
    dw=conv(12, 12, rngs, feature_group_count=12),
    bn2=batch_norm(12, rngs),
    project=conv(12, 4, rngs, size=1),
    head=nnx.Linear(4, 5, rngs=rngs),
  )


def grouped(features, groups):
  def build(rngs):
    def forward(m, x):
      return m.head(pooled(m.b(m.grouped(m.a(x)))))

    return Net(
      forward,
      a=conv(3, 8, rngs),
      grouped=conv(8, features, rngs, feature_group_count=groups),
      b=conv(features, 6, rngs),
      head=nnx.Linear(6, 5, rngs=rngs),
    )

  return build


def squeeze_excite(rngs):
  def forward(m, x):
    x = m.conv1(x)
    s = nnx.sigmoid(m.up(nnx.relu(m.down(pooled(x)))))
    return m.head(pooled(m.conv2(x * s[:, None, None, :])))

  return Net(
    forward,
    conv1=conv(3, 8, rngs),
    down=nnx.Linear(8, 4, rngs=rngs),
    up=nnx.Linear(4, 8, rngs=rngs),
    conv2=conv(8, 6, rngs),
    head=nnx.Linear(6, 5, rngs=rngs),
  )


def dense_block(rngs):
  def forward(m, x):
    x = m.stem(x)
    for layer in m.layers:
      x = jnp.concatenate([x, layer(nnx.relu(x))], axis=-1)
    return m.head(pooled(m.bn(x)))

  layers = [conv(4, 3, rngs), conv(7, 3, rngs)]
  return Net(
    forward,
    stem=conv(3, 4, rngs),
    layers=nnx.List(layers),
    bn=batch_norm(10, rngs),
    head=nnx.Linear(10, 5, rngs=rngs),
  )


def two_poolings(rngs):
  """The head reads each channel twice."""

  def forward(m, x):
    x = m.conv(x)
    return m.head(jnp.concatenate([pooled(x), x.max((1, 2))], axis=-1))

  return Net(forward, conv=conv(3, 6, rngs), head=nnx.Linear(12, 5, rngs=rngs))


def zeros_concatenated(rngs):
  def forward(m, x):
    x = m.conv1(x)
    return m.conv2(jnp.concatenate([x, jnp.zeros_like(x)], axis=-1))

  return Net(forward, conv1=conv(3, 4, rngs), conv2=conv(8, 5, rngs))


def channel_split(rngs):
  def forward(m, x):
    a, b = jnp.split(m.conv1(x), 2, axis=-1)
    return m.conv2(a * nnx.sigmoid(b))

  return Net(forward, conv1=conv(3, 8, rngs), conv2=conv(4, 5, rngs))


def transposed(transpose_kernel):
  def build(rngs):
    kwargs = dict(transpose_kernel=transpose_kernel, rngs=rngs)
    return Net(
      lambda m, x: m.up2(nnx.relu(m.up1(nnx.relu(m.conv(x))))),
      conv=conv(3, 6, rngs, strides=2),
      up1=nnx.ConvTranspose(6, 4, (3, 3), strides=(2, 2), **kwargs),
      up2=nnx.ConvTranspose(4, 3, (2, 2), **kwargs),
    )

  return build


def transformer_mlp(rngs):
  def forward(m, x):
    x = m.embed(x)
    x = x + m.fc2(nnx.gelu(m.fc1(m.norm(x))))
    return m.head(x)

  return Net(
    forward,
    embed=nnx.Linear(8, 10, rngs=rngs),
    norm=nnx.LayerNorm(10, rngs=rngs),
    fc1=nnx.Linear(10, 16, rngs=rngs),
    fc2=nnx.Linear(16, 10, rngs=rngs),
    head=nnx.Linear(10, 5, rngs=rngs),
  )


def attention(rngs):
  def forward(m, x):
    return m.head(m.fc(m.attention(m.embed(x))))

  return Net(
    forward,
    embed=nnx.Linear(8, 12, rngs=rngs),
    attention=nnx.MultiHeadAttention(
      num_heads=2, in_features=12, decode=False, rngs=rngs
    ),
    fc=nnx.Linear(12, 7, rngs=rngs),
    head=nnx.Linear(7, 5, rngs=rngs),
  )


def single_head(rngs):
  """Attention written by hand: the values can be pruned, q and k cannot."""

  def forward(m, x):
    scores = nnx.softmax(jnp.einsum('btc,bsc->bts', m.q(x), m.k(x)))
    return m.out(jnp.einsum('bts,bsc->btc', scores, m.v(x)))

  return Net(
    forward,
    q=nnx.Linear(8, 6, rngs=rngs),
    k=nnx.Linear(8, 6, rngs=rngs),
    v=nnx.Linear(8, 7, rngs=rngs),
    out=nnx.Linear(7, 5, rngs=rngs),
  )


def mixer(rngs):
  """An MLP over tokens, on the transposed feature map."""

  def forward(m, x):
    x = m.embed(x)
    x = x + m.t2(nnx.gelu(m.t1(x.swapaxes(1, 2)))).swapaxes(1, 2)
    return m.head(x.mean(1))

  return Net(
    forward,
    embed=nnx.Linear(8, 9, rngs=rngs),
    t1=nnx.Linear(6, 10, rngs=rngs),
    t2=nnx.Linear(10, 6, rngs=rngs),
    head=nnx.Linear(9, 5, rngs=rngs),
  )


def called_twice(rngs):
  def forward(m, x):
    x = nnx.relu(m.conv1(x))
    x = nnx.relu(m.shared(x))
    return m.head(pooled(nnx.relu(m.shared(x))))

  return Net(
    forward,
    conv1=conv(3, 6, rngs),
    shared=conv(6, 6, rngs),
    head=nnx.Linear(6, 5, rngs=rngs),
  )


def nested(rngs):
  """nnx.List in nnx.Sequential, and a Python loop."""
  blocks = nnx.List([Branch(6, 6, rngs), Branch(6, 4, rngs)])

  def forward(m, x):
    x = m.stem(x)
    for block in m.blocks:
      x = block(x)
    return m.head(pooled(x))

  return Net(
    forward,
    stem=nnx.Sequential(conv(3, 6, rngs), nnx.relu),
    blocks=blocks,
    head=nnx.Sequential(
      nnx.Linear(4, 7, rngs=rngs), nnx.relu, nnx.Linear(7, 5, rngs=rngs)
    ),
  )


def hard_coded(rngs):
  def forward(m, x):
    x = nnx.max_pool(nnx.relu(m.conv2(m.conv1(x))), (4, 4), (4, 4))
    return m.head(x.reshape(x.shape[0], 2 * 2 * 6))

  return Net(
    forward,
    conv1=conv(3, 5, rngs),
    conv2=conv(5, 6, rngs),
    head=nnx.Linear(24, 5, rngs=rngs),
  )


def equal_sizes(rngs):
  """Code that needs two unrelated groups to have one size."""

  def forward(m, x):
    a, b = m.a(x), m.b(x)
    if a.shape != b.shape:
      raise ValueError('a and b differ')
    return m.c(a) + m.d(b)

  return Net(
    forward,
    a=nnx.Linear(8, 6, rngs=rngs),
    b=nnx.Linear(8, 6, rngs=rngs),
    c=nnx.Linear(6, 5, rngs=rngs),
    d=nnx.Linear(6, 5, rngs=rngs),
  )


def hidden_batch(rngs):
  """Another size would quietly change the batch."""

  def forward(m, x):
    x = nnx.max_pool(m.conv(x), (8, 8), (8, 8))
    return m.head(x.reshape(-1, 6))

  return Net(forward, conv=conv(3, 6, rngs), head=nnx.Linear(6, 5, rngs=rngs))


def scaled_by_size(rngs):
  """Another size would quietly change the values."""

  def forward(m, x):
    x = m.fc1(x)
    return m.fc2(x / x.shape[-1])

  return Net(
    forward, fc1=nnx.Linear(8, 6, rngs=rngs), fc2=nnx.Linear(6, 5, rngs=rngs)
  )


def raw_parameter(rngs):
  def forward(m, x):
    x = m.fc2(nnx.relu(m.fc1(x)))
    x = jnp.einsum('btc,cd->btd', x, m.weight[...])
    return m.head(x)

  return Net(
    forward,
    fc1=nnx.Linear(8, 6, rngs=rngs),
    fc2=nnx.Linear(6, 7, rngs=rngs),
    weight=nnx.Param(jax.random.normal(rngs.params(), (7, 9))),
    head=nnx.Linear(9, 5, rngs=rngs),
  )


def masked(rngs):
  """A mask over positions is harmless; one over channels is not."""

  def forward(m, x):
    x = m.fc1(x)
    x = jnp.where(jnp.arange(x.shape[1])[:, None] < 4, x, 0.0)
    x = m.fc2(nnx.relu(x))
    x = jnp.where(jnp.array([True, False] * 3), x, 0.0)
    return m.head(x)

  return Net(
    forward,
    fc1=nnx.Linear(8, 7, rngs=rngs),
    fc2=nnx.Linear(7, 6, rngs=rngs),
    head=nnx.Linear(6, 5, rngs=rngs),
  )


def gated_pair(rngs):
  """Two producers that are multiplied are one group, and no residual."""

  def forward(m, x):
    return m.out(nnx.silu(m.a(x)) * m.b(x))

  return Net(
    forward,
    a=nnx.Linear(8, 9, rngs=rngs),
    b=nnx.Linear(8, 9, rngs=rngs),
    out=nnx.Linear(9, 5, rngs=rngs),
  )


def einsums(rngs):
  """The second contracts an axis that is not the last."""

  def forward(m, x):
    x = nnx.relu(m.a(x))
    return m.c(nnx.relu(m.b(x.swapaxes(1, 2))))

  return Net(
    forward,
    a=nnx.Einsum('btc,cd->btd', (8, 7), (7,), rngs=rngs),
    b=nnx.Einsum('bct,cd->bdt', (7, 6), rngs=rngs),
    c=nnx.Einsum('bct,dc->btd', (5, 6), (5,), rngs=rngs),
  )


def linear_general(rngs):
  def forward(m, x):
    x = nnx.relu(m.a(x).swapaxes(1, 2))
    return m.heads(m.b(x)).sum((-2, -1))

  return Net(
    forward,
    a=nnx.LinearGeneral(8, 7, rngs=rngs),
    b=nnx.LinearGeneral(7, 6, axis=1, rngs=rngs),
    heads=nnx.LinearGeneral(6, (3, 4), rngs=rngs),
  )


def rematerialised(rngs):
  def forward(m, x):
    block = nnx.remat(lambda block, x: block(x))
    return m.head(pooled(block(m.b, block(m.a, x))))

  return Net(
    forward,
    a=Branch(3, 6, rngs),
    b=Branch(6, 7, rngs),
    head=nnx.Linear(7, 5, rngs=rngs),
  )


def per_example(rngs):
  """Written for one example and mapped over the batch."""

  def forward(m, x):
    return jax.vmap(lambda x: m.head(nnx.relu(m.conv(x)).mean((0, 1))))(x)

  return Net(forward, conv=conv(3, 6, rngs), head=nnx.Linear(6, 5, rngs=rngs))


def mapped_over_later_axes(rngs):
  """A layer that sees neither of the two axes that follow its channels."""

  def forward(m, x):
    x = m.conv(x).transpose(0, 3, 1, 2)  # [B, C, H, W]
    over = dict(in_axes=2, out_axes=2)
    x = jax.vmap(jax.vmap(m.inner, **over), **over)(x)
    return m.head(nnx.relu(x).mean((2, 3)))

  return Net(
    forward,
    conv=conv(3, 6, rngs),
    inner=nnx.Linear(6, 7, rngs=rngs),
    head=nnx.Linear(7, 5, rngs=rngs),
  )


def channels_moved(rngs):
  """Channels wander to the front, positions are merged, and back."""

  def forward(m, x):
    x = m.conv1(x).transpose(0, 3, 1, 2)
    x = x.reshape(*x.shape[:2], -1) * 2.0
    x = m.fc(x.swapaxes(1, 2))
    return m.head(x.max(1, keepdims=True)[:, 0])

  return Net(
    forward,
    conv1=conv(3, 6, rngs),
    fc=nnx.Linear(6, 7, rngs=rngs),
    head=nnx.Linear(7, 5, rngs=rngs),
  )


def pixel_shuffle(rngs):
  def forward(m, x):
    x = m.conv1(x)
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return m.conv2(x.reshape(b, 2 * h, 2 * w, -1))

  return Net(forward, conv1=conv(3, 8, rngs), conv2=conv(2, 5, rngs))


def standardised(rngs):
  """Weights that are normalised over their inputs tie those inputs."""

  def standardise(args, dtype):
    inputs, kernel, bias = nnx.nn.dtypes.promote_dtype(args, dtype=dtype)
    return inputs, kernel - kernel.mean((0, 1, 2), keepdims=True), bias

  return Net(
    lambda m, x: m.conv2(m.conv1(x)),
    conv1=conv(3, 6, rngs),
    conv2=conv(6, 5, rngs, promote_dtype=standardise),
  )


def efficient(rngs):
  """Depthwise and squeeze-and-excitation in one inverted residual block."""

  def forward(m, x):
    x = m.stem(x)
    y = nnx.silu(m.dw(nnx.silu(m.expand(x))))
    s = m.down(y.mean((1, 2), keepdims=True))
    x = x + m.project(y * nnx.sigmoid(m.up(nnx.silu(s))))
    return m.head(pooled(x))

  return Net(
    forward,
    stem=conv(3, 6, rngs),
    expand=conv(6, 14, rngs, size=1),
    dw=conv(14, 14, rngs, feature_group_count=14, use_bias=False),
    down=conv(14, 3, rngs, size=1),
    up=conv(3, 14, rngs, size=1),
    project=conv(14, 6, rngs, size=1),
    head=nnx.Linear(6, 5, rngs=rngs),
  )


def unet(rngs):
  """Skip connections, and two ways to grow."""

  def forward(m, x):
    a = nnx.relu(m.enter(x))
    b = nnx.max_pool(a, (2, 2), (2, 2))
    c = nnx.relu(m.middle(nnx.max_pool(b, (2, 2), (2, 2))))
    up = jax.image.resize(c, (*b.shape[:3], c.shape[-1]), 'bilinear')
    d = nnx.relu(m.decode(jnp.concatenate([up, b], axis=-1)))
    return m.leave(jnp.concatenate([m.up(d), a], axis=-1))

  return Net(
    forward,
    enter=conv(3, 4, rngs),
    middle=conv(4, 8, rngs),
    decode=conv(12, 6, rngs),
    up=nnx.ConvTranspose(6, 5, (2, 2), strides=(2, 2), rngs=rngs),
    leave=conv(9, 2, rngs),
  )


def vision_transformer(rngs):
  def forward(m, x):
    x = m.patch(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    token = jnp.tile(m.token[...], (x.shape[0], 1, 1))
    x = jnp.concatenate([token, x], axis=1) + m.position[...]
    x = x + m.fc2(nnx.gelu(m.fc1(m.norm(x))))
    return m.head(x[:, 0])

  return Net(
    forward,
    patch=conv(3, 12, rngs, size=4, strides=4, padding='VALID'),
    token=nnx.Param(jnp.zeros((1, 1, 12))),
    position=nnx.Param(jnp.zeros((1, 5, 12))),
    norm=nnx.LayerNorm(12, rngs=rngs),
    fc1=nnx.Linear(12, 20, rngs=rngs),
    fc2=nnx.Linear(20, 12, rngs=rngs),
    head=nnx.Linear(12, 5, rngs=rngs),
  )


def tied_outputs(rngs):
  """A flattened map plus a Linear ties several outputs of the Linear."""

  def forward(m, x):
    x = nnx.max_pool(m.conv(x), (4, 4), (4, 4)).reshape(x.shape[0], -1)
    return m.head(x + m.b(m.a(x)))

  return Net(
    forward,
    conv=conv(3, 4, rngs),
    a=nnx.Linear(16, 6, rngs=rngs),
    b=nnx.Linear(6, 16, rngs=rngs),
    head=nnx.Linear(16, 5, rngs=rngs),
  )


def one_channel(rngs):
  return Net(
    lambda m, x: m.conv3(m.conv2(m.conv1(x))),
    conv1=conv(3, 1, rngs),
    conv2=conv(1, 2, rngs),
    conv3=conv(2, 5, rngs),
  )


def circular(rngs):
  return Net(
    lambda m, x: m.conv2(m.conv1(x)),
    conv1=conv(3, 6, rngs, padding='CIRCULAR'),
    conv2=conv(6, 5, rngs, padding='REFLECT', kernel_dilation=2),
  )


def group_norm(groups):
  return lambda n, rngs: nnx.GroupNorm(n, groups, rngs=rngs)


def layer_norm(n, rngs):
  return nnx.LayerNorm(n, rngs=rngs)


def rms_norm(n, rngs):
  return nnx.RMSNorm(n, rngs=rngs)


def instance_norm(n, rngs):
  return nnx.InstanceNorm(n, rngs=rngs)


def prelu(n, rngs):
  del n, rngs
  return nnx.PReLU()


def dropout(n, rngs):
  del n
  return nnx.Dropout(0.5, deterministic=True, rngs=rngs)


def average(x):
  return nnx.avg_pool(x, (2, 2), (2, 2), padding='SAME')


CHAIN = {'input': 'input', 'conv1': '', 'conv2': '', 'head': 'output'}
NORMED = {**CHAIN, 'conv1': 'normalised over the channel axis'}
FIXED = "the model's code fixes this size"

# name -> (builder, shape of the input, group -> part of its reason)
ARCHITECTURES = {
  'chain': (between(function=nnx.relu), IMAGE, CHAIN),
  'batch_norm': (between(batch_norm), IMAGE, CHAIN),
  'instance_norm': (between(instance_norm), IMAGE, CHAIN),
  'group_norm': (
    between(group_norm(4)),
    IMAGE,
    {**CHAIN, 'conv1': 'split by a reshape into [4, 2]'},
  ),
  'group_norm_1': (between(group_norm(1)), IMAGE, NORMED),
  'group_norm_8': (between(group_norm(8)), IMAGE, CHAIN),
  'layer_norm': (between(layer_norm), IMAGE, NORMED),
  'rms_norm': (between(rms_norm), IMAGE, NORMED),
  'prelu': (between(prelu), IMAGE, CHAIN),
  'dropout': (between(dropout), IMAGE, CHAIN),
  'gelu': (between(function=nnx.gelu), IMAGE, CHAIN),
  'silu': (between(function=nnx.silu), IMAGE, CHAIN),
  'hard_swish': (between(function=nnx.hard_swish), IMAGE, CHAIN),
  'softmax': (between(function=nnx.softmax), IMAGE, NORMED),
  'average': (between(function=average), IMAGE, CHAIN),
  'cumsum': (
    between(function=lambda x: jnp.cumsum(x, -1)),
    IMAGE,
    {**CHAIN, 'conv1': 'accumulated'},
  ),
  'a_constant': (
    between(function=lambda x: x / np.full((1,) * x.ndim, x.shape[-1], 'f4')),
    IMAGE,
    {**CHAIN, 'conv1': f'{FIXED}: it computes something else'},
  ),
  'roll': (
    between(function=lambda x: x + jnp.roll(x, 1, -1)),
    IMAGE,
    {**CHAIN, 'conv1': 'cut at fixed positions'},
  ),
  'flip': (
    between(function=lambda x: x + x[..., ::-1]),
    IMAGE,
    {**CHAIN, 'conv1': 'reversed'},
  ),
  'take': (
    between(function=lambda x: jnp.take(x, np.arange(8), axis=-1)),
    IMAGE,
    {**CHAIN, 'conv1': 'cut at fixed positions'},
  ),
  'sort': (
    between(function=lambda x: jnp.sort(x, -1)),
    IMAGE,
    {**CHAIN, 'conv1': 'sorted'},
  ),
  'fft': (
    between(function=lambda x: jnp.fft.fft(x).real),
    IMAGE,
    {**CHAIN, 'conv1': 'passes through "fft"'},
  ),
  'position_fft': (
    between(function=lambda x: jnp.fft.fft(x, axis=1).real),
    IMAGE,
    {**CHAIN, 'conv1': 'passes through "fft"'},
  ),
  'channel_constant': (
    between(function=lambda x: x * np.ones((1, 1, 1, 8), np.float32)),
    IMAGE,
    {**CHAIN, 'conv1': 'combined with a constant array of fixed size'},
  ),
  'position_constant': (
    between(function=lambda x: x * np.ones((1, 8, 8, 1), np.float32)),
    IMAGE,
    CHAIN,
  ),
  'channel_range': (
    between(function=lambda x: x * jnp.arange(8.0)[None, None, None]),
    IMAGE,
    {**CHAIN, 'conv1': 'range of numbers'},
  ),
  'fori_loop': (
    between(function=lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y + 1, x)),
    IMAGE,
    {**CHAIN, 'conv1': 'goes through a scan'},
  ),
  'while': (
    between(
      function=lambda x: jax.lax.while_loop(
        lambda y: y.sum() < 0, lambda y: y + 1, x
      )
    ),
    IMAGE,
    {**CHAIN, 'conv1': 'goes through a while'},
  ),
  'cond': (
    between(
      function=lambda x: jax.lax.cond(jnp.array(True), nnx.relu, jnp.sin, x)
    ),
    IMAGE,
    {**CHAIN, 'conv1': 'goes through a cond'},
  ),
  'flatten_1x1': (
    flatten(8),
    IMAGE,
    {'input': 'input', 'conv': '', 'hidden': '', 'head': 'output'},
  ),
  'flatten_4x4': (
    flatten(2),
    IMAGE,
    {'input': 'input', 'conv': '', 'hidden': '', 'head': 'output'},
  ),
  'norm_after_flatten': (
    norm_after_flatten,
    IMAGE,
    {'input': 'input', 'conv': '', 'head': 'output'},
  ),
  'residual': (
    residual,
    IMAGE,
    {
      'input': 'input',
      'stem/conv+b1/conv': '',
      'a1/conv': '',
      'proj+b2/conv': '',
      'a2/conv': '',
      'head': 'output',
    },
  ),
  'option_a': (
    option_a,
    IMAGE,
    {
      'input': 'input',
      'stem/conv+b': 'option-A',
      'a': '',
      'b': 'option-A',
      'head': 'output',
    },
  ),
  'inverted_residual': (
    inverted_residual,
    IMAGE,
    {
      'input': 'input',
      'stem/conv+project': '',
      'expand': '',
      'head': 'output',
    },
  ),
  'grouped': (
    grouped(8, 2),
    IMAGE,
    {
      'input': 'input',
      'a': 'grouped convolution',
      'grouped': 'grouped convolution',
      'b': '',
      'head': 'output',
    },
  ),
  'multiplier': (
    grouped(16, 8),
    IMAGE,
    {
      'input': 'input',
      'a': 'multiplier',
      'grouped': 'multiplier',
      'b': '',
      'head': 'output',
    },
  ),
  'squeeze_excite': (
    squeeze_excite,
    IMAGE,
    {
      'input': 'input',
      'conv1+up': '',
      'down': '',
      'conv2': '',
      'head': 'output',
    },
  ),
  'dense_block': (
    dense_block,
    IMAGE,
    {
      'input': 'input',
      'stem': '',
      'layers/0': '',
      'layers/1': '',
      'head': 'output',
    },
  ),
  'two_poolings': (
    two_poolings,
    IMAGE,
    {'input': 'input', 'conv': '', 'head': 'output'},
  ),
  'zeros_concatenated': (
    zeros_concatenated,
    IMAGE,
    {'input': 'input', 'conv1': 'fixed number of zero', 'conv2': 'output'},
  ),
  'channel_split': (
    channel_split,
    IMAGE,
    {'input': 'input', 'conv1': 'cut at fixed positions', 'conv2': 'output'},
  ),
  'transposed': (
    transposed(False),
    IMAGE,
    {'input': 'input', 'conv': '', 'up1': '', 'up2': 'output'},
  ),
  'transposed_kernel': (
    transposed(True),
    IMAGE,
    {'input': 'input', 'conv': '', 'up1': '', 'up2': 'output'},
  ),
  'transformer_mlp': (
    transformer_mlp,
    TOKENS,
    {
      'input': 'input',
      'embed+fc2': 'normalised over the channel axis',
      'fc1': '',
      'head': 'output',
    },
  ),
  'attention': (
    attention,
    TOKENS,
    {
      'input': 'input',
      'embed': '',
      'attention/query+attention/key+attention/value': 'several',
      'attention/query': 'product of two activations',
      'attention/key': 'product of two activations',
      'attention/value': 'several',
      'attention/out': '',
      'fc': '',
      'head': 'output',
    },
  ),
  'single_head': (
    single_head,
    TOKENS,
    {
      'input': 'input',
      'q': 'product of two activations',
      'k': 'product of two activations',
      'v': '',
      'out': 'output',
    },
  ),
  'mixer': (
    mixer,
    TOKENS,
    {
      'input': 'input',
      'embed': '',
      't1': '',
      't2': 'axis of positions',
      'head': 'output',
    },
  ),
  'called_twice': (
    called_twice,
    IMAGE,
    {'input': 'input', 'conv1+shared': '', 'head': 'output'},
  ),
  'nested': (
    nested,
    IMAGE,
    {
      'input': 'input',
      'stem/layers/0': '',
      'blocks/0/conv': '',
      'blocks/1/conv': '',
      'head/layers/0': '',
      'head/layers/2': 'output',
    },
  ),
  'hard_coded': (
    hard_coded,
    IMAGE,
    {'input': 'input', 'conv1': '', 'conv2': FIXED, 'head': 'output'},
  ),
  'equal_sizes': (
    equal_sizes,
    TOKENS,
    {'input': 'input', 'a': 'a and b differ', 'b': FIXED, 'c+d': 'output'},
  ),
  'hidden_batch': (
    hidden_batch,
    IMAGE,
    {'input': 'input', 'conv': FIXED, 'head': 'output'},
  ),
  'scaled_by_size': (
    scaled_by_size,
    TOKENS,
    {'input': 'input', 'fc1': FIXED, 'fc2': 'output'},
  ),
  'raw_parameter': (
    raw_parameter,
    TOKENS,
    {
      'input': 'input',
      'fc1': '',
      'fc2': 'raw parameter weight',
      'weight': 'raw parameter weight',
      'head': 'output',
    },
  ),
  'masked': (
    masked,
    TOKENS,
    {'input': 'input', 'fc1': '', 'fc2': 'constant', 'head': 'output'},
  ),
  'gated_pair': (
    gated_pair,
    TOKENS,
    {'input': 'input', 'a+b': '', 'out': 'output'},
  ),
  'einsums': (
    einsums,
    TOKENS,
    {'input': 'input', 'a': '', 'b': '', 'c': 'output'},
  ),
  'linear_general': (
    linear_general,
    TOKENS,
    {
      'input': 'input',
      'a': '',
      'b': '',
      'heads': 'reduced over it',
      'heads#2': 'reduced over it',
    },
  ),
  'rematerialised': (
    rematerialised,
    IMAGE,
    {'input': 'input', 'a/conv': '', 'b/conv': '', 'head': 'output'},
  ),
  'mapped_over_later_axes': (
    mapped_over_later_axes,
    IMAGE,
    {'input': 'input', 'conv': '', 'inner': '', 'head': 'output'},
  ),
  'per_example': (
    per_example,
    IMAGE,
    {'input': 'input', 'conv': '', 'head': 'output'},
  ),
  'channels_moved': (
    channels_moved,
    IMAGE,
    {'input': 'input', 'conv1': '', 'fc': '', 'head': 'output'},
  ),
  'pixel_shuffle': (
    pixel_shuffle,
    IMAGE,
    {'input': 'input', 'conv1': 'split by a reshape', 'conv2': 'output'},
  ),
  'standardised': (
    standardised,
    IMAGE,
    {'input': 'input', 'conv1': 'normalised over', 'conv2': 'output'},
  ),
  'efficient': (
    efficient,
    IMAGE,
    {
      'input': 'input',
      'stem+project': '',
      'expand+up': '',
      'down': '',
      'head': 'output',
    },
  ),
  'unet': (
    unet,
    IMAGE,
    {
      'input': 'input',
      'enter': '',
      'middle': '',
      'decode': '',
      'up': '',
      'leave': 'output',
    },
  ),
  'vision_transformer': (
    vision_transformer,
    IMAGE,
    {
      'input': 'input',
      'patch+fc2': 'normalised over',
      'fc1': '',
      'head': 'output',
    },
  ),
  'tied_outputs': (
    tied_outputs,
    IMAGE,
    {'input': 'input', 'conv+b': 'tied together', 'a': '', 'head': 'output'},
  ),
  'stacked': (
    between(function=lambda x: jnp.stack([x, 2 * x], axis=-1)[..., 0]),
    IMAGE,
    CHAIN,
  ),
  'unstacked': (
    between(function=lambda x: jnp.stack(jnp.unstack(x, axis=-1), axis=-1)),
    IMAGE,
    {**CHAIN, 'conv1': 'cut at fixed positions'},
  ),
  'tiled': (
    between(function=lambda x: jnp.tile(x, (1, 2, 1, 1))),
    IMAGE,
    CHAIN,
  ),
  'one_channel': (
    one_channel,
    IMAGE,
    {'input': 'input', 'conv1': 'one channel', 'conv2': '', 'conv3': 'output'},
  ),
  'circular': (
    circular,
    IMAGE,
    {'input': 'input', 'conv1': '', 'conv2': 'output'},
  ),
}


def build(name):
  """Returns the model of an architecture and the shape of its input."""
  make, shape, _ = ARCHITECTURES[name]
  model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  return model, jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def traced(name):
  """The graph of an architecture, and its groups by name."""
  found = graph.trace(*build(name))
  return found, {group.name: group for group in found.groups}


def shape(*dims, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype)


def sizes(group):
  """Path -> (axis, shape of the indices) of a group's slices."""
  return {part.path: (part.axis, part.indices.shape) for part in group.slices}


class ArchitectureTest(parameterized.TestCase):
  @parameterized.parameters(*ARCHITECTURES)
  def test_groups(self, name):
    _, groups = traced(name)
    expected = ARCHITECTURES[name][2]
    self.assertSameElements(groups, expected)
    for group, part in expected.items():
      with self.subTest(group):
        reason = groups[group].reason
        self.assertTrue(part in reason if part else not reason, reason)

  @parameterized.parameters('residual', 'inverted_residual', 'dense_block')
  def test_batch_size_does_not_matter(self, name):
    model, x = build(name)
    one = graph.trace(model, shape(1, *x.shape[1:]))
    many = graph.trace(model, shape(12, *x.shape[1:]))
    for a, b in zip(one.groups, many.groups, strict=True):
      self.assertEqual((a.name, a.reason), (b.name, b.reason))
      self.assertEqual(a.positions, b.positions)
    self.assertEqual(one.float_macs, many.float_macs)

  def test_train_mode_gives_the_same_groups(self):
    def make(rngs):
      def forward(m, x):
        return m.conv2(m.dropout(nnx.relu(m.bn(m.conv1(x)))))

      return Net(
        forward,
        conv1=conv(3, 8, rngs),
        bn=nnx.BatchNorm(8, rngs=rngs),
        dropout=nnx.Dropout(0.3, rngs=rngs),
        conv2=conv(8, 5, rngs),
      )

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    x = shape(*IMAGE)
    names = {'input': False, 'conv1': True, 'conv2': False}
    for train in (True, False):
      view = nnx.view(model, deterministic=not train)
      view = nnx.view(view, use_running_average=not train)
      groups = graph.trace(view, x).groups
      self.assertEqual({g.name: not g.reason for g in groups}, names)


class GroupTest(absltest.TestCase):
  def test_order_and_roles(self):
    found, groups = traced('inverted_residual')
    names = ['input', 'stem/conv+project', 'expand', 'head']
    self.assertEqual([group.name for group in found.groups], names)
    hidden = groups['expand']
    self.assertEqual(hidden.producers, ('expand',))
    self.assertEqual(hidden.consumers, ('project',))
    self.assertEqual(hidden.passes, ('dw',))
    self.assertEqual((hidden.size, hidden.positions), (12, 64))

  def test_slices_name_all_that_a_channel_owns(self):
    _, groups = traced('inverted_residual')
    owned = sizes(groups['expand'])
    norms = [
      f'{bn}/{name}'
      for bn in ('bn1', 'bn2')
      for name in ('scale', 'bias', 'mean', 'var')
    ]
    kernels = {'expand/kernel': 3, 'dw/kernel': 3, 'project/kernel': 2}
    expected = dict.fromkeys([*norms, 'dw/bias'], (0, (12, 1)))
    expected |= {path: (axis, (12, 1)) for path, axis in kernels.items()}
    self.assertEqual(owned, expected)

  def test_a_flattened_channel_owns_one_input_per_position(self):
    found, groups = traced('flatten_4x4')
    part = {p.path: p for p in groups['conv'].slices}['hidden/kernel']
    rows = np.arange(96).reshape(16, 6).T
    np.testing.assert_array_equal(part.indices, rows)
    hidden = found.layers['hidden']
    np.testing.assert_array_equal(hidden.in_channel, np.tile(range(6), 16))

  def test_channels_that_are_read_twice(self):
    found, groups = traced('two_poolings')
    self.assertEqual(sizes(groups['conv'])['head/kernel'], (0, (6, 2)))
    channels = found.layers['head'].in_channel
    np.testing.assert_array_equal(channels, [*range(6), *range(6)])

  def test_concatenated_channels_keep_their_groups(self):
    found, groups = traced('dense_block')
    head = found.layers['head']
    names = [found.groups[i].name for i in head.in_group]
    expected = ['stem'] * 4 + ['layers/0'] * 3 + ['layers/1'] * 3
    self.assertEqual(names, expected)
    rows = {p.path: p.indices for p in groups['layers/1'].slices}
    np.testing.assert_array_equal(rows['bn/scale'].ravel(), [7, 8, 9])
    self.assertEqual(groups['stem'].consumers, ('layers/0', 'layers/1', 'head'))

  def test_an_add_of_producers_is_residual_and_a_product_is_not(self):
    _, groups = traced('residual')
    streams = {name for name, group in groups.items() if group.residual}
    self.assertEqual(streams, {'stem/conv+b1/conv', 'proj+b2/conv'})
    for name in ('gated_pair', 'squeeze_excite', 'gelu'):
      found, _ = traced(name)
      self.assertFalse(any(group.residual for group in found.groups))

  def test_option_a_keeps_apart_what_is_not_padded(self):
    _, groups = traced('option_a')
    self.assertEqual(groups['stem/conv+b'].size, 4)
    self.assertEqual(groups['b'].size, 4)
    rows = {p.path: p.indices for p in groups['b'].slices}
    np.testing.assert_array_equal(rows['b/kernel'].ravel(), [0, 1, 6, 7])

  def test_names_are_unique(self):
    for name in ('linear_general', 'attention', 'option_a'):
      found, groups = traced(name)
      self.assertLen(groups, len(found.groups))

  def test_integer_inputs_select_from_an_embedding(self):
    def make(rngs):
      return Net(
        lambda m, ids, *, flip=False: m.head(nnx.relu(m.fc(m.embed(ids)))),
        embed=nnx.Embed(11, 6, rngs=rngs),
        fc=nnx.Linear(6, 7, rngs=rngs),
        head=nnx.Linear(7, 5, rngs=rngs),
      )

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    found = graph.trace(model, shape(2, 4, dtype=jnp.int32), flip=True)
    reasons = {group.name: group.reason for group in found.groups}
    self.assertEqual(reasons['embed/embedding'], 'no MAC layer produces it')
    self.assertEqual(reasons['fc'], '')
    self.assertFalse(found.layers['fc'].first)  # it reads no image

  def test_several_inputs(self):
    def make(rngs):
      return Net(
        lambda m, x, context: m.head(m.a(x) + m.b(context['image'])),
        a=nnx.Linear(8, 6, rngs=rngs),
        b=nnx.Linear(3, 6, rngs=rngs),
        head=nnx.Linear(6, 5, rngs=rngs),
      )

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    found = graph.trace(model, shape(2, 8), context={'image': shape(2, 3)})
    names = [group.name for group in found.groups]
    self.assertEqual(names, ['input', 'input#2', 'a+b', 'head'])


class LayerTest(parameterized.TestCase):
  @parameterized.parameters(
    ('chain', 'conv1', 8 * 8 * 9 * 3 * 8),
    ('chain', 'head', 6 * 5),
    ('flatten_4x4', 'hidden', 96 * 7),
    ('option_a', 'a', 4 * 4 * 9 * 4 * 6),
    ('inverted_residual', 'dw', 8 * 8 * 9 * 12),
    ('grouped', 'grouped', 8 * 8 * 9 * 4 * 8),
    ('transposed', 'up1', 4 * 4 * 9 * 6 * 4),
    ('transposed', 'up2', 8 * 8 * 4 * 4 * 3),
    ('transformer_mlp', 'fc1', 6 * 10 * 16),
    ('called_twice', 'shared', 2 * 8 * 8 * 9 * 6 * 6),
    ('attention', 'attention/query', 6 * 12 * 12),
    ('attention', 'attention/out', 6 * 12 * 12),
    ('mixer', 't1', 9 * 6 * 10),
    ('einsums', 'b', 6 * 7 * 6),
    ('linear_general', 'heads', 6 * 6 * 12),
    ('per_example', 'conv', 8 * 8 * 9 * 3 * 6),
    ('circular', 'conv1', 8 * 8 * 9 * 3 * 6),
  )
  def test_macs(self, name, path, macs):
    found, _ = traced(name)
    self.assertEqual(found.layers[path].macs, macs)

  def test_products_outside_of_layers_count(self):
    found, _ = traced('attention')
    products = [p.macs for p in found.products]
    self.assertEqual(products, [2 * 6 * 6 * 6] * 2)
    inside = sum(layer.macs for layer in found.layers.values())
    self.assertEqual(found.float_macs, inside + sum(products))
    found, _ = traced('raw_parameter')
    (product,) = found.products
    self.assertIn('raw parameter weight', product.name)
    self.assertEqual(product.macs, 6 * 7 * 9)

  @parameterized.parameters(
    ('chain', 'conv1', 'Conv', -1, 2, (3,)),
    ('transposed', 'up1', 'ConvTranspose', -1, 2, (3,)),
    ('transposed_kernel', 'up1', 'ConvTranspose', -1, 3, (2,)),
    ('flatten_4x4', 'hidden', 'Linear', -1, 0, (1,)),
    ('einsums', 'b', 'Einsum', -2, 0, (1,)),
    ('einsums', 'c', 'Einsum', -2, 1, (0,)),
    ('linear_general', 'b', 'LinearGeneral', -2, 0, (1,)),
    ('linear_general', 'heads', 'LinearGeneral', -1, 0, (1, 2)),
    ('attention', 'attention/out', 'LinearGeneral', None, None, (2,)),
    ('per_example', 'head', 'Linear', -1, 0, (1,)),
    ('mapped_over_later_axes', 'inner', 'Linear', -1, 0, (1,)),
  )
  def test_axes(self, name, path, kind, feature_axis, in_axis, out_axes):
    layer = traced(name)[0].layers[path]
    self.assertEqual((layer.path, layer.kind), (path, kind))
    axes = (layer.feature_axis, layer.in_axis, layer.out_axes)
    self.assertEqual(axes, (feature_axis, in_axis, out_axes))

  def test_every_channel_of_a_layer_is_placed(self):
    for name in ARCHITECTURES:
      found, _ = traced(name)
      for layer in found.layers.values():
        self.assertEqual(layer.in_group.shape, layer.in_channel.shape)
        self.assertEqual(layer.out_group.shape, layer.out_channel.shape)
        for groups, channels in (
          (layer.in_group, layer.in_channel),
          (layer.out_group, layer.out_channel),
        ):
          for group, channel in zip(groups, channels, strict=True):
            if group >= 0:
              self.assertBetween(channel, 0, found.groups[group].size - 1)

  def test_first_last_and_calls(self):
    found, _ = traced('residual')
    layers = found.layers.values()
    self.assertEqual([x.path for x in layers if x.first], ['stem/conv'])
    self.assertEqual([x.path for x in layers if x.last], ['head'])
    self.assertEqual({x.calls for x in layers}, {1})
    self.assertEqual(found.layers['a2/conv'].weights, 9 * 8 * 7)
    found, _ = traced('called_twice')
    self.assertEqual(found.layers['shared'].calls, 2)

  def test_a_sum_of_the_input_and_an_activation_is_no_input(self):
    model = Net(
      lambda m, x: m.head(x + m.fc(x)),
      fc=nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
      head=nnx.Linear(8, 5, rngs=nnx.Rngs(1)),
    )
    layers = graph.trace(model, shape(2, 8)).layers
    self.assertTrue(layers['fc'].first)
    self.assertFalse(layers['head'].first)

  def test_a_kernel_that_is_read_outside_of_its_layer_is_no_integers(self):
    readers = {
      'a product': lambda m, h: h @ m.fc.kernel[...].T,
      'a sum': lambda m, h: m.head(h) + m.fc.kernel[...].mean(),
      'an input': lambda m, h: m.head(h * m.fc.kernel[0][None]),
    }
    for name, reader in readers.items():
      with self.subTest(name):
        model = Net(
          lambda m, x, reader=reader: reader(m, m.fc(x)),
          fc=nnx.Linear(5, 5, rngs=nnx.Rngs(0)),
          head=nnx.Linear(5, 5, rngs=nnx.Rngs(1)),
        )
        layers = graph.trace(model, shape(2, 5)).layers
        self.assertIn('reads fc/kernel outside', layers['fc'].float_reason)
        others = [x.float_reason for p, x in layers.items() if p != 'fc']
        self.assertEqual(''.join(others), '')

  def test_a_stack_of_kernels_is_no_integers(self):
    def forward(m, x):
      graphdef, stacked = nnx.split(m.blocks)
      step = lambda x, state: (nnx.merge(graphdef, state)(x), None)
      return m.head(jax.lax.scan(step, x, stacked)[0])

    make = nnx.vmap(lambda key: nnx.Linear(5, 5, rngs=nnx.Rngs(key)))
    model = Net(
      forward,
      blocks=make(jax.random.split(jax.random.key(0), 3)),
      head=nnx.Linear(5, 5, rngs=nnx.Rngs(1)),
    )
    layers = graph.trace(model, shape(2, 5)).layers
    self.assertIn('has the kernels of several', layers['blocks'].float_reason)
    self.assertEqual(layers['head'].float_reason, '')

  def test_an_input_that_parameters_shift_is_still_the_input(self):
    model = Net(
      lambda m, x: m.head(m.fc(x - m.mean[...][None])),
      mean=nnx.Param(jnp.ones(8)),
      fc=nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
      head=nnx.Linear(8, 5, rngs=nnx.Rngs(1)),
    )
    layers = graph.trace(model, shape(2, 8)).layers
    self.assertTrue(layers['fc'].first)

  def test_a_kernel_of_two_layers_can_be_integers(self):
    if not flax.config.nnx_graph_mode:
      self.skipTest('trees of flax.nnx share nothing')
    model = Net(
      lambda m, x: m.b(m.a(x)),
      a=nnx.Linear(5, 5, rngs=nnx.Rngs(0)),
      b=nnx.Linear(5, 5, rngs=nnx.Rngs(1)),
    )
    model.b.kernel = model.a.kernel
    layers = graph.trace(model, shape(2, 5)).layers
    self.assertEqual([x.float_reason for x in layers.values()], ['', ''])

  def test_depthwise(self):
    found, _ = traced('inverted_residual')
    depthwise = [x.path for x in found.layers.values() if x.depthwise]
    self.assertEqual(depthwise, ['dw'])
    layer = found.layers['dw']
    self.assertLen(layer.in_group, 12)
    np.testing.assert_array_equal(layer.in_group, layer.out_group)
    np.testing.assert_array_equal(layer.in_channel, layer.out_channel)
    for name in ('grouped', 'multiplier', 'one_channel'):
      found, _ = traced(name)
      self.assertFalse(any(x.depthwise for x in found.layers.values()))

  @parameterized.parameters(1, 2, 8, 32)
  def test_what_does_not_depend_on_the_batch_counts_whole(self, batch):
    def forward(m, x):  # positions get their biases from a network
      at = jnp.linspace(-1.0, 1.0, x.shape[1])
      bias = m.second(nnx.relu(m.first(jnp.stack([at, at**2], -1))))
      return m.head(nnx.relu(m.inner(x) + bias[None]).mean(1))

    def make(rngs):
      return Net(
        forward,
        first=nnx.Linear(2, 32, rngs=rngs),
        second=nnx.Linear(32, 7, rngs=rngs),
        inner=nnx.Linear(6, 7, rngs=rngs),
        head=nnx.Linear(7, 4, rngs=rngs),
      )

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    found = graph.trace(model, shape(batch, 5, 6))
    macs = {path: layer.macs for path, layer in found.layers.items()}
    expected = dict(first=5 * 64, second=5 * 224, inner=5 * 42, head=28)
    self.assertEqual(macs, expected)
    reasons = {group.name: group.reason for group in found.groups}
    self.assertEqual(reasons['first'], 'is read by second without a batch')

  @parameterized.parameters(1, 2, 32)
  def test_what_a_loop_carries_is_of_each_example(self, batch):
    def forward(m, x):
      xs = x.swapaxes(0, 1)  # steps first
      graphdef, state = nnx.split(m)

      def body(s, x):
        layers = nnx.merge(graphdef, state)
        return nnx.relu(layers.inner(s) + layers.first(x)[None]), None

      s, _ = jax.lax.scan(body, jnp.zeros((1, x.shape[0], 6)), xs)
      return m.head(s[0])

    def make(rngs):
      return Net(
        forward,
        first=nnx.Linear(8, 6, rngs=rngs),
        inner=nnx.Linear(6, 6, rngs=rngs),
        head=nnx.Linear(6, 5, rngs=rngs),
      )

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    found = graph.trace(model, shape(batch, 3, 8))
    macs = {path: layer.macs for path, layer in found.layers.items()}
    self.assertEqual(macs, dict(first=3 * 48, inner=3 * 36, head=30))

  def test_layers_in_a_loop_count_each_trip(self):
    def forward(m, x):
      graphdef, state = nnx.split(m.shared)

      def step(x, _):
        return nnx.merge(graphdef, state)(x), None

      x, _ = jax.lax.scan(step, m.first(x), length=3)
      return m.head(x)

    def make(rngs):
      return Net(
        forward,
        first=nnx.Linear(8, 6, rngs=rngs),
        shared=nnx.Linear(6, 6, rngs=rngs),
        head=nnx.Linear(6, 5, rngs=rngs),
      )

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    found = graph.trace(model, shape(2, 8))
    layer = found.layers['shared']
    self.assertEqual((layer.macs, layer.calls), (3 * 36, 3))
    self.assertFalse(found.layers['head'].first)
    reasons = {group.name: group.reason for group in found.groups}
    self.assertIn('goes through a scan', reasons['first'])
    self.assertIn('goes through a scan', reasons['shared'])


class Hook(nnx.Module):
  """A `promote_dtype` with its own Variables: one step per output channel."""

  def __init__(self, promote, features):
    self.promote = nnx.static(promote)
    self.step = nnx.Param(jnp.ones((features,)))

  def __call__(self, args, **kwargs):
    inputs, kernel, *rest = self.promote(args, **kwargs)
    step = jnp.reshape(self.step[...], (1, 1, 1, -1))
    return (jnp.round(inputs), jnp.round(kernel / step) * step, *rest)


class ModelTest(parameterized.TestCase):
  def test_own_hooks_are_called_and_their_channels_are_grouped(self):
    model = between(function=nnx.relu)(nnx.Rngs(0))
    hook = Hook(model.conv1.promote_dtype, 8)
    model.conv1.promote_dtype = nnx.data(hook)
    found = graph.trace(model, shape(*IMAGE))
    group = {group.name: group for group in found.groups}['conv1']
    self.assertEqual(group.reason, '')
    self.assertIn('conv1/promote_dtype/step', sizes(group))

  def test_the_model_stays_as_it_is(self):
    model = between(batch_norm)(nnx.Rngs(0))
    hook = model.conv1.promote_dtype
    before, old = nnx.split(model)
    old = jax.tree.map(np.asarray, nnx.to_pure_dict(old))
    graph.trace(model, shape(*IMAGE))
    after, new = nnx.split(model)
    self.assertEqual(before, after)
    self.assertIs(model.conv1.promote_dtype, hook)
    new = jax.tree.map(np.asarray, nnx.to_pure_dict(new))
    jax.tree.map(np.testing.assert_array_equal, old, new)

  def test_arrays_and_shapes_give_the_same_graph(self):
    model, _ = build('chain')
    for x in (np.zeros(IMAGE, np.float32), jnp.zeros(IMAGE), shape(*IMAGE)):
      found = graph.trace(model, x)
      self.assertEqual([g.name for g in found.groups], list(CHAIN))

  def test_needs_a_mac_layer(self):
    model = Net(lambda m, x: nnx.relu(x))
    with self.assertRaisesRegex(ValueError, 'Net calls no MAC layer'):
      graph.trace(model, shape(2, 3))

  def test_a_layer_is_no_model(self):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(ValueError, r'itself \(Linear\).*Sequential'):
      graph.trace(model, shape(2, 3))

  def test_needs_a_batch(self):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(ValueError, 'leading batch axis'):
      graph.trace(model)

  def test_a_call_that_fails_says_on_what(self):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(
      ValueError, r'cannot trace Linear .* shapes \[\(2, 5\)\]'
    ) as context:
      graph.trace(model, shape(2, 5))
    self.assertIsNotNone(context.exception.__cause__)


if __name__ == '__main__':
  absltest.main()
