"""`slice_channels`: equal to closed gates, on every architecture."""

from absl.testing import absltest
from absl.testing import parameterized
import chex
from flax import nnx
import graph_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import graph

# The arithmetic of flax's own activations mixes dtypes.
pytestmark = pytest.mark.standard_promotion


def fill(model, seed=0):
  """A copy of an abstract model with random values, variances positive."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if not isinstance(leaf, nnx.Variable):
      return leaf
    value = leaf.get_value()
    if not jnp.issubdtype(value.dtype, jnp.floating):
      fresh = jax.random.key(0) if 'key' in path else jnp.zeros((), 'uint32')
      return leaf.replace(fresh)
    noise = rng.normal(size=value.shape).astype(value.dtype)
    noise = 0.5 + np.abs(noise) if path[-1] == 'var' else 0.5 * noise
    return leaf.replace(jnp.asarray(noise))

  graphdef, state = nnx.split(model)
  flat = [(p, draw(p, leaf)) for p, leaf in nnx.to_flat_state(state)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))


def random_masks(found, seed=0):
  """A mask for each prunable group that closes some of its channels."""
  rng = np.random.default_rng(seed)
  masks = {}
  for group in found.groups:
    if not group.reason:
      mask = rng.random(group.size) < 0.6
      mask[rng.permutation(group.size)[:2]] = [True, False]
      masks[group.name] = mask
  return masks


def gated(model, found, masks):
  """The model with each consumer's input multiplied by the masks."""

  def close(path, module):
    layer = found.layers.get('/'.join(map(str, path)))
    if layer is None or layer.depthwise:
      return module
    gate = np.ones(len(layer.in_group), np.float32)
    for i, (group, channel) in enumerate(
      zip(layer.in_group, layer.in_channel, strict=True)
    ):
      if group >= 0:
        mask = masks.get(found.groups[group].name)
        gate[i] = 1.0 if mask is None else mask[channel]
    if not gate.all():
      module.promote_dtype = nnx.static(
        Close(module.promote_dtype, gate, layer.feature_axis)
      )
    return module

  return nnx.recursive_map(close, model)


class Close:
  """A `promote_dtype` that closes input channels."""

  def __init__(self, promote, gate, axis):
    self.promote, self.gate, self.axis = promote, gate, axis

  def __call__(self, args, **kwargs):
    inputs, *rest = self.promote(args, **kwargs)
    shape = np.ones(inputs.ndim, int)
    shape[self.axis] = -1
    return (inputs * self.gate.reshape(shape), *rest)


def call(models, x):
  """Outputs of all models, in one program."""
  graphdefs, states = zip(*map(nnx.split, models), strict=True)

  @jax.jit
  def run(states, x):
    pairs = zip(graphdefs, states, strict=True)
    return [nnx.merge(graphdef, state)(x) for graphdef, state in pairs]

  return run(states, x)


def values(model):
  """Path -> numpy value of each Variable."""
  _, state = nnx.split(model)
  return {
    '/'.join(map(str, path)): np.asarray(leaf.get_value())
    for path, leaf in nnx.to_flat_state(state)
    if not isinstance(leaf, nnx.RngState)
  }


PRUNABLE = [
  name
  for name, (_, _, groups) in graph_test.ARCHITECTURES.items()
  if '' in groups.values()
]


class EquivalenceTest(parameterized.TestCase):
  @parameterized.parameters(*PRUNABLE)
  def test_closed_gates_equal_slicing(self, name):
    model, shape = graph_test.build(name)
    found = graph.trace(model, shape)
    model = fill(model)
    before = values(model)
    masks = random_masks(found)
    sliced = graph.slice_channels(model, found, masks)
    closed = gated(model, found, masks)
    x = np.random.default_rng(1).normal(size=shape.shape).astype(np.float32)
    expected, actual, whole = call([closed, sliced, model], x)
    self.assertGreater(np.abs(expected - whole).max(), 1e-3)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(values(model), before)


class SurgeryTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.model, self.x = graph_test.build('inverted_residual')
    self.found = graph.trace(self.model, self.x)
    self.keep = {'expand': np.arange(12) % 3 > 0}

  def test_sizes_follow(self):
    sliced = graph.slice_channels(self.model, self.found, self.keep)
    self.assertEqual(sliced.expand.kernel.shape, (1, 1, 4, 8))
    self.assertEqual(sliced.expand.out_features, 8)
    self.assertEqual(sliced.bn1.num_features, 8)
    self.assertEqual(sliced.bn2.var.shape, (8,))
    self.assertEqual(sliced.dw.feature_group_count, 8)
    self.assertEqual((sliced.dw.in_features, sliced.dw.out_features), (8, 8))
    self.assertEqual(sliced.dw.kernel_shape, (3, 3, 1, 8))
    self.assertEqual(sliced.project.in_features, 8)
    self.assertEqual(sliced.project.out_features, 4)

  def test_the_right_positions_stay(self):
    model = fill(self.model)
    sliced = graph.slice_channels(model, self.found, self.keep)
    mask = self.keep['expand']
    old, new = values(model), values(sliced)
    chex.assert_trees_all_equal(
      new['project/kernel'], old['project/kernel'][:, :, mask]
    )
    chex.assert_trees_all_equal(new['bn2/mean'], old['bn2/mean'][mask])
    chex.assert_trees_all_equal(
      new['stem/conv/kernel'], old['stem/conv/kernel']
    )

  def test_abstract_models_stay_abstract(self):
    sliced = graph.slice_channels(self.model, self.found, self.keep)
    for leaf in jax.tree.leaves(nnx.state(sliced)):
      self.assertIsInstance(leaf, jax.ShapeDtypeStruct)

  def test_the_model_is_neither_changed_nor_shared(self):
    model = fill(self.model)
    before, old = nnx.split(model)[0], values(model)
    sliced = graph.slice_channels(model, self.found, self.keep)
    self.assertEqual(nnx.split(model)[0], before)
    chex.assert_trees_all_equal(values(model), old)
    sliced.head.kernel[...] = jnp.zeros_like(sliced.head.kernel[...])
    sliced.expand.strides = 5
    self.assertEqual(nnx.split(model)[0], before)
    chex.assert_trees_all_equal(values(model), old)

  def test_variable_types_and_metadata_stay(self):
    class Scale(nnx.Param):
      pass

    model = fill(self.model)
    model.bn1.scale = Scale(model.bn1.scale[...], note='mine')
    found = graph.trace(model, self.x)
    sliced = graph.slice_channels(model, found, self.keep)
    self.assertIsInstance(sliced.bn1.scale, Scale)
    self.assertEqual(sliced.bn1.scale.get_metadata('note'), 'mine')
    self.assertEqual(sliced.bn1.scale.shape, (8,))

  def test_hooks_stay(self):
    model = graph_test.between(function=nnx.relu)(nnx.Rngs(0))
    hook = graph_test.Hook(model.conv1.promote_dtype, 8)
    model.conv1.promote_dtype = nnx.data(hook)
    found = graph.trace(model, self.x)
    keep = {'conv1': np.arange(8) < 3}
    sliced = graph.slice_channels(model, found, keep)
    self.assertIsInstance(sliced.conv1.promote_dtype, graph_test.Hook)
    self.assertEqual(sliced.conv1.promote_dtype.step.shape, (3,))
    self.assertEqual(sliced(jnp.zeros(self.x.shape)).shape, (2, 5))

  def test_keeping_all_is_a_copy(self):
    model = fill(self.model)
    keep = {g.name: np.ones(g.size, bool) for g in self.found.groups}
    copy = graph.slice_channels(model, self.found, keep)
    self.assertEqual(nnx.split(copy)[0], nnx.split(model)[0])
    chex.assert_trees_all_equal(values(copy), values(model))
    self.assertIsNot(copy.head, model.head)

  def test_slicing_can_be_traced_and_repeated(self):
    sliced = graph.slice_channels(self.model, self.found, self.keep)
    again = graph.trace(sliced, self.x)
    names = [(group.name, group.reason) for group in self.found.groups]
    self.assertEqual([(g.name, g.reason) for g in again.groups], names)
    self.assertEqual(again.layers['dw'].macs, 8 * 8 * 9 * 8)
    mask = {'expand': np.arange(8) < 1}
    twice = graph.slice_channels(sliced, again, mask)
    self.assertEqual(twice.dw.feature_group_count, 1)

  @parameterized.parameters(
    ({'nobody': np.ones(3, bool)}, "no channel group 'nobody'"),
    ({'expand': np.ones(3, bool)}, "'expand' needs a boolean mask .*12"),
    ({'expand': np.ones(12)}, "'expand' needs a boolean mask"),
    ({'expand': np.zeros(12, bool)}, "'expand' keeps no channel"),
    ({'head': np.arange(5) < 2}, "'head' cannot be pruned: is an output"),
  )
  def test_wrong_masks(self, keep, message):
    with self.assertRaisesRegex(ValueError, message):
      graph.slice_channels(self.model, self.found, keep)

  def test_another_model(self):
    other, _ = graph_test.build('chain')
    with self.assertRaisesRegex(ValueError, 'no variables'):
      graph.slice_channels(other, self.found, self.keep)


if __name__ == '__main__':
  absltest.main()
