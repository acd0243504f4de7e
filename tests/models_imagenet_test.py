"""Sizes of the ImageNet models, counted by hand, and what can be pruned."""

import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import graph
from djpq_jax import models
from djpq_jax.models import imagenet_resnet
from djpq_jax.models import mobilenet
from djpq_jax.models import vit


# One MAC layer in a table: (output pixels per side, kernel side, input channels
# of one group, output channels).
def linear(inputs, outputs):
  return (1, 1, inputs, outputs)


def basic_stage(side, inputs, width, blocks):
  rows = [(side, 3, inputs, width), (side, 3, width, width)]
  if inputs != width:
    rows.append((side, 1, inputs, width))
  return rows + [(side, 3, width, width)] * (2 * (blocks - 1))


def basic_resnet(blocks):
  table = [(112, 7, 3, 64), *basic_stage(56, 64, 64, blocks[0])]
  table += basic_stage(28, 64, 128, blocks[1])
  table += basic_stage(14, 128, 256, blocks[2])
  table += basic_stage(7, 256, 512, blocks[3])
  return [*table, linear(512, 1000)]


def bottleneck_stage(side, before, inputs, width, blocks):
  """The first 1x1 convolution still sees the pixels of the stage before."""
  out = 4 * width
  rows = [(before, 1, inputs, width), (side, 3, width, width)]
  rows += [(side, 1, width, out), (side, 1, inputs, out)]
  block = [(side, 1, out, width), (side, 3, width, width)]
  return rows + [*block, (side, 1, width, out)] * (blocks - 1)


def resnet50():
  table = [(112, 7, 3, 64), *bottleneck_stage(56, 56, 64, 64, 3)]
  table += bottleneck_stage(28, 56, 256, 128, 4)
  table += bottleneck_stage(14, 28, 512, 256, 6)
  table += bottleneck_stage(7, 14, 1024, 512, 3)
  return [*table, linear(2048, 1000)]


def inverted(before, side, kernel, inputs, hidden, outputs):
  rows = [(before, 1, inputs, hidden)] if hidden != inputs else []
  return [*rows, (side, kernel, 1, hidden), (side, 1, hidden, outputs)]


def inverted_net(stages, head):
  table = [(112, 3, 3, 32)]
  for stage in stages:
    table += inverted(*stage)
  return [*table, (7, 1, 320, head), linear(head, 1000)]


MOBILENET_V2 = [
  (112, 112, 3, 32, 32, 16),
  (112, 56, 3, 16, 96, 24),
  (56, 56, 3, 24, 144, 24),
  (56, 28, 3, 24, 144, 32),
  *[(28, 28, 3, 32, 192, 32)] * 2,
  (28, 14, 3, 32, 192, 64),
  *[(14, 14, 3, 64, 384, 64)] * 3,
  (14, 14, 3, 64, 384, 96),
  *[(14, 14, 3, 96, 576, 96)] * 2,
  (14, 7, 3, 96, 576, 160),
  *[(7, 7, 3, 160, 960, 160)] * 2,
  (7, 7, 3, 160, 960, 320),
]
EFFICIENTNET_LITE0 = [
  (112, 112, 3, 32, 32, 16),
  (112, 56, 3, 16, 96, 24),
  (56, 56, 3, 24, 144, 24),
  (56, 28, 5, 24, 144, 40),
  (28, 28, 5, 40, 240, 40),
  (28, 14, 3, 40, 240, 80),
  *[(14, 14, 3, 80, 480, 80)] * 2,
  (14, 14, 5, 80, 480, 112),
  *[(14, 14, 5, 112, 672, 112)] * 2,
  (14, 7, 5, 112, 672, 192),
  *[(7, 7, 5, 192, 1152, 192)] * 3,
  (7, 7, 3, 192, 1152, 320),
]
VGG11 = [(224, 3, 3, 64), (112, 3, 64, 128), (56, 3, 128, 256)]
VGG11 += [(56, 3, 256, 256), (28, 3, 256, 512), (28, 3, 512, 512)]
VGG11 += [(14, 3, 512, 512)] * 2
VGG16 = [(224, 3, 3, 64), (224, 3, 64, 64), (112, 3, 64, 128)]
VGG16 += [(112, 3, 128, 128), (56, 3, 128, 256)] + [(56, 3, 256, 256)] * 2
VGG16 += [(28, 3, 256, 512)] + [(28, 3, 512, 512)] * 2
VGG16 += [(14, 3, 512, 512)] * 3
VGG_HEAD = [linear(7 * 7 * 512, 4096), linear(4096, 4096), linear(4096, 1000)]
TABLES = {
  'resnet18': basic_resnet((2, 2, 2, 2)),
  'resnet34': basic_resnet((3, 4, 6, 3)),
  'resnet50': resnet50(),
  'vgg11': VGG11 + VGG_HEAD,
  'vgg16': VGG16 + VGG_HEAD,
  'mobilenet_v2': inverted_net(MOBILENET_V2, 1280),
  'efficientnet_lite0': inverted_net(EFFICIENTNET_LITE0, 1280),
}
NAMES = (*TABLES, 'vit_s16')


def macs_of(row):
  side, kernel, inputs, outputs = row
  return side**2 * kernel**2 * inputs * outputs


@functools.cache
def traced(name, **kwargs):
  """(parameters, structure without rules); shapes only."""
  model = nnx.eval_shape(lambda: models.create(name, **kwargs))
  sample = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
  found = graph.trace(compress.eval_view(model), sample)
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  return sum(x.size for x in leaves), compress.resolve(found, ())


def prunable(structure):
  """Name -> size of the groups that get a gate."""
  groups = structure.groups
  return {groups[i].name: groups[i].size for i in structure.gated}


def matching(structure, pattern):
  """Layers whose whole path a regular expression matches."""
  return [p for p in structure.graph.layers if re.fullmatch(pattern, p)]


class CostTest(parameterized.TestCase):
  @parameterized.parameters(*TABLES.items())
  def test_macs_are_those_of_the_table(self, name, table):
    found = traced(name)[1].graph
    # A shortcut's convolution may run before or after its block.
    actual = sorted(layer.macs for layer in found.layers.values())
    self.assertEqual(actual, sorted(map(macs_of, table)))
    self.assertEqual(found.float_macs, sum(map(macs_of, table)))

  def test_macs_of_vit_s16(self):
    found = traced('vit_s16')[1].graph
    tokens, width, hidden = 14 * 14 + 1, 384, 1536
    projections = 4 * tokens * width**2
    perceptron = 2 * tokens * width * hidden
    layers = 14 * 14 * 16**2 * 3 * width
    layers += 12 * (projections + perceptron) + width * 1000
    self.assertEqual(sum(x.macs for x in found.layers.values()), layers)
    others = [p.macs for p in found.products]
    self.assertEqual(others, [tokens**2 * width] * 24)

  @parameterized.parameters(
    ('resnet18', 1857.6),
    ('mobilenet_v2', 308.0),
    ('vgg7', 630.7),
  )
  def test_gbops_of_the_literature(self, name, expected):
    macs = traced(name)[1].graph.float_macs
    self.assertEqual(round(macs * 32 * 32 / 1e9, 1), expected)

  # As torchvision, timm and the EfficientNet-Lite release state them.
  @parameterized.parameters(
    ('resnet18', 11_689_512),
    ('resnet34', 21_797_672),
    ('resnet50', 25_557_032),
    ('vgg11', 132_863_336),
    ('vgg16', 138_357_544),
    ('mobilenet_v2', 3_504_872),
    ('efficientnet_lite0', 4_652_008),
    ('vit_s16', 22_050_664),
  )
  def test_parameters(self, name, expected):
    self.assertEqual(traced(name)[0], expected)

  @parameterized.parameters((0.75, 2_636_424), (1.4, 6_108_776))
  def test_parameters_of_other_widths(self, width, expected):
    self.assertEqual(traced('mobilenet_v2', width=width)[0], expected)

  def test_small_images_keep_their_size_with_smaller_strides(self):
    found = traced(
      'mobilenet_v2',
      num_classes=10,
      input_shape=(32, 32, 3),
      width=0.5,
      strides=(1, 1, 1, 2, 2, 1, 2, 1),
    )[1].graph.layers
    self.assertEqual(found['stem/conv'].macs, 32 * 32 * 3 * 9 * 16)
    self.assertEqual(found['head/conv'].macs, 4 * 4 * 160 * 1280)

  def test_width_rounds_channels_and_keeps_the_last_layer(self):
    found = traced('mobilenet_v2', width=0.35)[1].graph.layers
    sizes = {path: len(layer.out_group) for path, layer in found.items()}
    self.assertEqual(sizes['stem/conv'], 16)
    self.assertEqual(sizes['blocks/0/project/conv'], 8)
    self.assertEqual(sizes['head/conv'], 1280)


class PrunableTest(parameterized.TestCase):
  @parameterized.parameters('resnet18', 'resnet34')
  def test_inner_convolutions_of_resnets(self, name):
    structure = traced(name)[1]
    inner = matching(structure, r'layer\d/\d/conv1')
    self.assertLen(inner, {'resnet18': 8, 'resnet34': 16}[name])
    self.assertEqual(list(prunable(structure)), inner)

  def test_both_inner_convolutions_of_bottlenecks(self):
    structure = traced('resnet50')[1]
    # Behind the stem there is a convolution on every path.
    inner = matching(structure, r'conv1|layer\d/\d/conv[12]')
    self.assertLen(inner, 33)
    self.assertEqual(list(prunable(structure)), inner)

  @parameterized.parameters('resnet18', 'resnet34', 'resnet50')
  def test_streams_are_kept_unless_a_rule_allows_them(self, name):
    found = traced(name)[1].graph
    streams = [g.name for g in found.groups if g.residual]
    self.assertLen(streams, 4)
    rule = compress.Rule(pattern='*', prune=True)
    allowed = prunable(compress.resolve(found, [rule]))
    self.assertLess(set(streams), set(allowed))

  @parameterized.parameters('mobilenet_v2', 'efficientnet_lite0')
  def test_expanded_channels(self, name):
    structure = traced(name)[1]
    found = prunable(structure)
    expand = matching(structure, r'blocks/\d+/expand/conv')
    self.assertLen(expand, len(structure.graph.layers) // 3 - 1)
    for path in expand:
      depthwise = path.replace('expand', 'depthwise')
      self.assertIn(path, found)
      self.assertTrue(structure.graph.layers[depthwise].depthwise)
      group = next(g for g in structure.graph.groups if g.name == path)
      self.assertEqual(group.passes, (depthwise,))
    # The rest is what no sum ties: first and last blocks, stem, head.
    alone = set(found) - set(expand)
    projects = {p for p in alone if p.endswith('project/conv')}
    self.assertEqual(alone - projects, {'stem/conv', 'head/conv'})
    self.assertLen(projects, 2)

  @parameterized.parameters('vgg11', 'vgg16')
  def test_all_of_vgg(self, name):
    structure = traced(name)[1]
    self.assertEqual(
      list(prunable(structure)), list(structure.graph.layers)[:-1]
    )

  def test_hidden_channels_of_vit(self):
    structure = traced('vit_s16')[1]
    hidden = {f'blocks/{i}/fc1': 1536 for i in range(12)}
    self.assertEqual(prunable(structure), hidden)
    reasons = {g.name: g.reason for g in structure.graph.groups}
    self.assertIn('split by a reshape', reasons['blocks/0/attention/query'])

  @parameterized.parameters(*NAMES)
  def test_input_reads_eight_bits_and_logits_stay(self, name):
    structure = traced(name)[1]
    layers = structure.graph.layers
    first = [p for p, layer in layers.items() if layer.first]
    last = [p for p, layer in layers.items() if layer.last]
    self.assertEqual([first[0], last[-1]], [next(iter(layers)), [*layers][-1]])
    self.assertEqual(structure.layers[first[0]].act_bits, (8, 8))
    self.assertLen(last, 1)


class SmallTest(parameterized.TestCase):
  """Properties that need numbers, on few of them."""

  def test_torch_pads_both_sides_and_same_the_right_one(self):
    corner = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1)
    x = jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    for same, expected in (
      (False, [[0, 0], [0, 6]]),
      (True, [[1, 3], [9, 11]]),
    ):
      layer = mobilenet.ConvNorm(1, 1, 3, 2, same=same, rngs=nnx.Rngs(0))
      layer.conv.kernel.set_value(corner)
      np.testing.assert_array_equal(layer.conv(x)[0, :, :, 0], expected)

  def test_a_shortcut_projects_only_where_the_shape_changes(self):
    make = imagenet_resnet.Bottleneck
    for inputs, stride, layers in ((16, 1, 0), (8, 1, 2), (16, 2, 2)):
      build = lambda i=inputs, s=stride: make(i, 4, s, rngs=nnx.Rngs(0))
      block = nnx.eval_shape(build)
      self.assertLen(block.downsample, layers)

  def test_tokens_keep_their_order(self):
    """Patches count row by row, behind the class token."""
    model = vit.VisionTransformer(2, (4, 6, 1), 2, 4, 0, 1, 4, rngs=nnx.Rngs(0))
    kernel = jnp.zeros((2, 2, 1, 4)).at[..., 0].set(0.25)
    model.patches.kernel.set_value(kernel)
    x = jnp.repeat(jnp.repeat(jnp.arange(6.0).reshape(2, 3), 2, 0), 2, 1)
    tokens = model.patches(x.reshape(1, 4, 6, 1)).reshape(1, -1, 4)
    np.testing.assert_array_equal(tokens[0, :, 0], range(6))
    self.assertEqual(model.positions.shape, (1, 7, 4))

  def test_attention_mixes_within_heads(self):
    """Against loops over heads and queries."""
    rng = np.random.default_rng(0)
    layer = vit.Attention(6, 2, rngs=nnx.Rngs(0))
    x = rng.normal(size=(1, 5, 6)).astype(np.float32)
    parts = [np.array(f(x))[0] for f in (layer.query, layer.key, layer.value)]
    mixed = np.zeros((5, 6), np.float32)
    for head in (slice(0, 3), slice(3, 6)):
      query, key, value = (part[:, head] for part in parts)
      for t in range(5):
        weights = np.exp(key @ query[t] / np.sqrt(3))
        mixed[t, head] = weights @ value / weights.sum()
    expected = layer.out(mixed[None])
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)

  @parameterized.parameters(
    ('mobilenet_v2', dict(width=0), 'width must be positive; got 0'),
    ('mobilenet_v2', dict(strides=(2, 2)), 'strides must be 8 numbers'),
    ('mobilenet_v2', dict(input_shape=(100, 96, 3)), 'multiples of 32'),
    ('resnet18', dict(input_shape=(224, 100, 3)), 'multiples of 32'),
    ('vit_s16', dict(input_shape=(24, 32, 3)), 'multiples of 16'),
    ('vision_transformer', dict(heads=5), 'heads must divide width; got 5'),
  )
  def test_refuses(self, name, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      models.create(name, **kwargs)


if __name__ == '__main__':
  absltest.main()
