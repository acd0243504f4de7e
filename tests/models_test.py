import math

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import models
from djpq_jax.models import cnn
from djpq_jax.models import resnet
from djpq_jax.models import vgg

# (output pixels per side, kernel side, input channels, output channels)
DIGITS_CNN = [(8, 3, 1, 32), (8, 3, 32, 32), (4, 3, 32, 64), (4, 3, 64, 64)]
DIGITS_CNN += [(1, 1, 1024, 10)]
LENET5 = [(28, 5, 1, 32), (14, 5, 32, 64), (1, 1, 3136, 512), (1, 1, 512, 10)]
VGG7 = [(32, 3, 3, 128), (32, 3, 128, 128), (16, 3, 128, 256)]
VGG7 += [(16, 3, 256, 256), (8, 3, 256, 512), (8, 3, 512, 512)]
VGG7 += [(1, 1, 8192, 1024), (1, 1, 1024, 10)]
RESNET20 = [(32, 3, 3, 16)] + [(32, 3, 16, 16)] * 6
RESNET20 += [(16, 3, 16, 32)] + [(16, 3, 32, 32)] * 5
RESNET20 += [(8, 3, 32, 64)] + [(8, 3, 64, 64)] * 5 + [(1, 1, 64, 10)]

SMALL = {
  'digits_cnn': {},
  'lenet5': dict(input_shape=(8, 8, 1)),
  'vgg7': dict(channels=(4, 8), hidden=8, input_shape=(8, 8, 3)),
  'resnet8': dict(input_shape=(8, 8, 3)),
  'resnet20': dict(input_shape=(8, 8, 3)),
  'resnet56': dict(input_shape=(4, 4, 1)),
  'resnet32': dict(input_shape=(4, 4, 1)),
  'resnet44': dict(input_shape=(4, 4, 1)),
  'cifar_resnet': dict(depth=8, input_shape=(8, 8, 3)),
  'resnet18': dict(input_shape=(32, 32, 3)),
  'resnet34': dict(input_shape=(32, 64, 3)),
  'resnet50': dict(input_shape=(32, 32, 1)),
  'vgg11': dict(input_shape=(32, 32, 3), batch_norm=True),
  'vgg16': dict(input_shape=(32, 32, 3)),
  'mobilenet_v2': dict(width=0.25, input_shape=(32, 32, 3)),
  'efficientnet_lite0': dict(input_shape=(32, 32, 3)),
  'vit_s16': dict(input_shape=(32, 48, 3)),
  'vision_transformer': dict(
    patch=4, width=8, depth=2, heads=2, hidden=12, input_shape=(8, 12, 1)
  ),
}


def table_macs(table):
  return [side**2 * k**2 * cin * cout for side, k, cin, cout in table]


def abstract(name, **kwargs):
  """The model without numbers, in eval mode: shapes only, no compilation."""
  model = nnx.eval_shape(lambda: models.create(name, **kwargs))
  model.eval()
  return model


def pure_call(model):
  """(function of state and images, state)."""
  graphdef, state = nnx.split(model)
  call = lambda state, x: nnx.merge(graphdef, state)(x)
  return call, nnx.as_pure(state)


def logits_and_stats(model, x):
  """Compiled as one program, which is quicker than one per operation."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, x):
    model = nnx.merge(graphdef, state)
    return model(x), nnx.as_pure(nnx.state(model, nnx.BatchStat))

  logits, new = run(nnx.as_pure(state), x)
  return np.array(logits), jax.tree.leaves(new)


def logits_of(model, x):
  return logits_and_stats(model, x)[0]


def program_macs(model):
  """MACs of each convolution and product that the model really runs."""
  call, state = pure_call(model)
  program = jax.make_jaxpr(call)(state, jnp.zeros((1, *model.input_shape)))
  return [
    math.prod(eqn.outvars[0].aval.shape[:-1] + eqn.invars[1].aval.shape)
    for eqn in program.eqns
    if eqn.primitive.name in ('conv_general_dilated', 'dot_general')
  ]


def count(model, kind=nnx.Param):
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))


def images(model, batch=3, seed=0):
  shape = (batch, *model.input_shape)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stats(model):
  leaves = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
  return [np.array(x) for x in leaves]


def evaluated(name, **kwargs):
  """A model in eval mode with numbers from NumPy: jax.random compiles."""
  rng = np.random.default_rng(0)
  weight = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)
  statistic = lambda x: jnp.asarray(rng.uniform(0.1, 0.3, x.shape), x.dtype)
  model = abstract(name, **kwargs)
  graphdef, weights, statistics = nnx.split(model, nnx.Param, ...)
  weights = jax.tree.map(weight, weights)
  return nnx.merge(graphdef, weights, jax.tree.map(statistic, statistics))


class CostTest(parameterized.TestCase):
  @parameterized.parameters(
    ('digits_cnn', DIGITS_CNN),
    ('lenet5', LENET5),
    ('vgg7', VGG7),
    ('resnet20', RESNET20),
  )
  def test_program_runs_the_table(self, name, table):
    self.assertEqual(program_macs(abstract(name)), table_macs(table))

  def test_published_macs(self):
    self.assertEqual(sum(table_macs(VGG7)), 615_917_568)
    self.assertEqual(round(sum(table_macs(VGG7)) * 32 * 32 / 1e9, 1), 630.7)
    self.assertEqual(sum(table_macs(RESNET20[:-1])), 40_550_400)
    self.assertEqual(table_macs(RESNET20)[-1], 640)
    self.assertEqual(sum(table_macs(LENET5)), 12_273_152)

  @parameterized.parameters(
    ('resnet8', 75_290),
    ('resnet20', 269_722),
    ('resnet32', 464_154),
    ('resnet44', 658_586),
    ('resnet56', 853_018),
    ('lenet5', 800 + 32 + 51_200 + 64 + 3136 * 512 + 512 + 5130),
    ('digits_cnn', 9 * (32 + 32**2 + 32 * 64 + 64**2) + 2 * 192 + 10_250),
  )
  def test_parameters(self, name, expected):
    self.assertEqual(count(abstract(name)), expected)

  def test_parameters_of_vgg7(self):
    weights = sum(k**2 * cin * cout for _, k, cin, cout in VGG7)
    affine = 2 * 2 * (128 + 256 + 512)
    self.assertEqual(count(abstract('vgg7')), weights + affine + 1024 + 10)


class CallTest(parameterized.TestCase):
  @parameterized.product(name=list(models.MODELS), num_classes=[3, 10])
  def test_shape_of_logits(self, name, num_classes):
    model = abstract(name, num_classes=num_classes, **SMALL[name])
    logits = jax.eval_shape(*pure_call(model), images(model))
    self.assertEqual(logits.shape, (3, num_classes))
    self.assertEqual(logits.dtype, jnp.float32)

  @parameterized.parameters(
    ('digits_cnn', (8, 8, 1)),
    ('lenet5', (28, 28, 1)),
    ('resnet8', (32, 32, 3)),
    ('resnet20', (32, 32, 3)),
    ('resnet32', (32, 32, 3)),
    ('resnet44', (32, 32, 3)),
    ('resnet56', (32, 32, 3)),
    ('cifar_resnet', (32, 32, 3)),
    ('vgg7', (32, 32, 3)),
  )
  def test_default_input_shape(self, name, shape):
    self.assertEqual(abstract(name).input_shape, shape)

  @parameterized.parameters('digits_cnn', 'cifar_resnet')
  def test_only_train_mode_changes_statistics(self, name):
    model = evaluated(name, **SMALL[name])
    before = stats(model)
    logits, after = logits_and_stats(model, images(model))
    self.assertTrue(np.isfinite(logits).all())
    chex.assert_trees_all_equal(before, after)
    model.train()
    _, after = logits_and_stats(model, images(model))
    for old, new in zip(before, after, strict=True):
      self.assertFalse(np.array_equal(old, new))

  def test_eval_mode_sees_one_image_at_a_time(self):
    model = evaluated('digits_cnn')
    others = images(model)
    others[1:] *= 3
    first = [logits_of(model, x)[0] for x in (images(model), others)]
    np.testing.assert_array_equal(*first)

  def test_lenet5_has_no_statistics(self):
    self.assertEqual(count(abstract('lenet5'), nnx.BatchStat), 0)

  def test_eager_call_agrees_with_the_compiled_one(self):
    model = evaluated('digits_cnn')
    logits = logits_of(model, images(model))
    np.testing.assert_allclose(logits, model(images(model)), atol=1e-5)

  def test_two_models_have_one_graph_definition(self):
    first, second = (abstract('digits_cnn', seed=s) for s in (0, 1))
    self.assertEqual(nnx.split(first)[0], nnx.split(second)[0])

  @parameterized.parameters('digits_cnn', 'lenet5')
  def test_channels_may_be_cut(self, name):
    """No size in the code: cutting dead channels changes nothing."""
    model = evaluated(name, **SMALL[name])
    outer = model.linear if name == 'digits_cnn' else model.fc1
    inner = model.block4.conv if name == 'digits_cnn' else model.conv2
    kernel = np.array(inner.kernel[...])
    kernel[..., 5:] = 0
    inner.kernel.set_value(jnp.asarray(kernel))
    for param in cut_with(model, name):
      alive = np.arange(64) < 5
      param.set_value(jnp.asarray(np.where(alive, param[...], np.float32(0))))
    expected = logits_of(model, images(model))
    inner.kernel.set_value(jnp.asarray(kernel[..., :5]))
    for param in cut_with(model, name):
      param.set_value(jnp.asarray(np.array(param[...])[:5]))
    kernel = np.array(outer.kernel[...])
    width = kernel.shape[-1]
    kernel = kernel.reshape(-1, 64, width)[:, :5].reshape(-1, width)
    outer.kernel.set_value(jnp.asarray(kernel))
    actual = logits_of(model, images(model))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def cut_with(model, name):
  """Per-channel variables of the last convolution."""
  if name == 'lenet5':
    return [model.conv2.bias]
  bn = model.block4.bn
  return [bn.scale, bn.bias, bn.mean, bn.var]


class ResNetTest(absltest.TestCase):
  def test_names_of_torch(self):
    model = abstract('resnet20')
    paths = {'.'.join(map(str, p)) for p, _ in nnx.iter_modules(model)}
    blocks = {f'layer{s}.{b}' for s in (1, 2, 3) for b in (0, 1, 2)}
    parts = ('conv1', 'bn1', 'conv2', 'bn2')
    names = {f'{block}.{part}' for block in blocks for part in parts}
    names |= blocks | {'layer1', 'layer2', 'layer3', 'conv1', 'bn1', 'linear'}
    self.assertEqual(paths - {''}, names)

  def test_shortcut_subsamples_and_pads(self):
    make = lambda: resnet.BasicBlock(2, 6, 2, rngs=nnx.Rngs(0))
    block = nnx.eval_shape(make)
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    y = block.shortcut(x)
    np.testing.assert_array_equal(y[..., 2:4], x[:, ::2, ::2])
    self.assertEqual(y.shape, (1, 2, 2, 6))
    self.assertEqual(float(jnp.abs(y).sum()), float(y[..., 2:4].sum()))

  def test_stride_2_pads_like_torch(self):
    """torch starts at pixel -1; flax's SAME would start at pixel 0."""
    conv = resnet.BasicBlock(1, 1, 2, rngs=nnx.Rngs(0)).conv1
    corner = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1)
    conv.kernel.set_value(corner)
    y = conv(jnp.arange(1.0, 17).reshape(1, 4, 4, 1))
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 0], [0, 6]])


class CreateTest(parameterized.TestCase):
  def test_seed_decides_the_weights(self):
    a, b, c = (models.create('digits_cnn', seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(a.linear.kernel[...], b.linear.kernel[...])
    self.assertFalse(np.array_equal(a.linear.kernel[...], c.linear.kernel[...]))

  @parameterized.parameters(
    ('resnet21', {}, "no model 'resnet21'; did you mean 'resnet.*vgg7"),
    ('lenet5', {'num_classes': 0}, 'num_classes of lenet5 must be .*; got 0'),
    ('vgg7', {'num_classes': 2.5}, 'whole number, at least 1; got 2.5'),
    ('?', {}, "no model '\\?'; known: cifar_resnet, .*vgg7"),
    ('vgg7', dict(hiden=3), "no argument 'hiden'; did you mean 'hidden'"),
    ('lenet5', dict(rngs=3), "no argument 'rngs'"),
    ('resnet20', dict(depth=56), "no argument 'depth'"),
    ('cifar_resnet', dict(depth=21), 'depth must be 6n \\+ 2.*got 21'),
    ('vgg7', dict(input_shape=(28, 28, 1)), 'multiples of 8'),
    ('lenet5', dict(input_shape=(28, 28)), r'height, width, channels.*28\)'),
    ('lenet5', dict(input_shape=(0, 4, 1)), '>= 1'),
    ('digits_cnn', dict(channels=(1, 2)), r'4 convolutions.*\(1, 2\)'),
    ('digits_cnn', dict(channels=(0, 4, 4, 4)), 'digits_cnn refuses .*by zero'),
  )
  def test_refuses(self, name, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      models.create(name, **kwargs)

  def test_constructors_work_directly(self):
    model = nnx.eval_shape(lambda: vgg.VGG7(3, (2, 4), rngs=nnx.Rngs(0)))
    self.assertLen(model.blocks, 4)
    model = nnx.eval_shape(lambda: cnn.LeNet5(rngs=nnx.Rngs(0)))
    self.assertEqual(count(model), count(abstract('lenet5')))


if __name__ == '__main__':
  absltest.main()
