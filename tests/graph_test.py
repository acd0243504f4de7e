"""What `trace` finds, on one small model per architecture."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import graph

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

  return Net(
    forward, conv=conv(3, 6, rngs), head=nnx.Linear(12, 5, rngs=rngs)
  )


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

  def forward(m, x):
    x = m.conv1(x)
    kernel = m.conv2.kernel[...]
    mean = kernel.mean((0, 1, 2), keepdims=True)
    m.conv2.kernel = nnx.Param(kernel - mean)
    return m.conv2(x)

  return Net(forward, conv1=conv(3, 6, rngs), conv2=conv(6, 5, rngs))


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
MERGED = 'is an output of the model'

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
      function=lambda x: jax.lax.cond(x.sum() > 0, nnx.relu, jnp.sin, x)
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
      'attention/query+attention/key': 'product of two activations',
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
      'q+k': 'product of two activations',
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
  return make(nnx.Rngs(0)), jax.ShapeDtypeStruct(shape, jnp.float32)


class ArchitectureTest(parameterized.TestCase):
  @parameterized.parameters(*ARCHITECTURES)
  def test_groups(self, name):
    model, x = build(name)
    found = graph.trace(model, x)
    expected = ARCHITECTURES[name][2]
    reasons = {group.name: group.reason for group in found.groups}
    self.assertSameElements(reasons, expected)
    for group, part in expected.items():
      with self.subTest(group):
        if part:
          self.assertIn(part, reasons[group])
        else:
          self.assertEqual(reasons[group], '')


if __name__ == '__main__':
  absltest.main()
