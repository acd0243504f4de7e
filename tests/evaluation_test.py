"""Every image counts once, and batch statistics are plain averages."""

from flax import nnx
import jax
import numpy as np
import pytest
import tiny

from djpq_jax import evaluation
from djpq_jax import losses
from djpq_jax import parallel

# They run flax's batch norm.
pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope='module')
def normed():
  """A model with batch norm, in train mode."""
  return tiny.make(tiny.Normed)


def values(model):
  return [np.array(x) for x in jax.tree.leaves(nnx.as_pure(nnx.state(model)))]


def assert_same_values(a, b):
  jax.tree.map(np.testing.assert_array_equal, values(a), values(b))


def test_accuracy_counts():
  split = tiny.split(4)
  logits = np.eye(3, dtype=np.float32)[split.labels]
  assert evaluation.accuracy(logits, split) == 1
  logits[0] = np.roll(logits[0], 1)
  assert evaluation.accuracy(logits, split) == 0.75
  assert evaluation.accuracy(-logits, split) == 0


def test_a_model_of_fewer_classes_than_the_data_is_refused():
  split = tiny.split(4)
  with pytest.raises(ValueError, match=r'logits of 2 classes, but .* has 3'):
    evaluation.accuracy(np.zeros((4, 2)), split)


def test_cross_entropy_is_that_of_the_loss():
  split = tiny.split(4)
  logits = 1e3 * np.random.default_rng(0).normal(size=(4, 3))  # none overflows
  expected = losses.cross_entropy(logits, split.labels)
  found = evaluation.cross_entropy(logits.astype(np.float32), split)
  assert found == pytest.approx(float(expected), rel=1e-5)
  assert evaluation.cross_entropy(np.zeros((4, 3)), split) == pytest.approx(
    np.log(3)
  )


@pytest.mark.parametrize('batch_size', [5, 37, 64])
def test_the_padding_of_the_last_batch_does_not_count(normed, batch_size):
  split = tiny.split(37)
  logits = evaluation.predictions(normed, split, batch_size)
  assert logits.shape == (37, tiny.CLASSES)
  assert logits.dtype == np.float32
  whole = evaluation.predict(normed, [split.images])
  np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-5)
  right = sum(
    int(row.argmax()) == label for row, label in zip(whole, split.labels)
  )
  assert evaluation.evaluate(normed, split, batch_size) == right / 37


@pytest.mark.parametrize('kind', [tiny.Normed, tiny.Residual, tiny.Depthwise])
def test_devices_share_the_images(kind):
  """Each computes as one alone would, to the last bit."""
  if jax.device_count() < 4:
    pytest.skip('needs four devices')
  seen = []

  class Seen(kind):
    def __call__(self, x):
      seen.append(x.shape)
      return super().__call__(x)

  model, split = tiny.make(Seen), tiny.split(75)
  mesh = parallel.mesh(jax.devices()[:4])
  expected = evaluation.predictions(model, split, 8)
  seen.clear()
  found = evaluation.predictions(model, split, 8, mesh)
  assert seen == [(8, *tiny.SHAPE)]  # traced once, for a device's own share
  np.testing.assert_array_equal(found, expected, strict=True)
  assert evaluation.evaluate(model, split, 8, mesh) == evaluation.accuracy(
    expected, split
  )


def test_a_function_runs_where_it_likes():
  split = tiny.split(20)
  function = lambda x: x.reshape(len(x), -1)[:, :3]
  found = evaluation.predictions(function, split, 8, parallel.mesh())
  expected = split.images.reshape(20, -1)[:, :3]
  np.testing.assert_array_equal(found, expected, strict=True)


def test_prediction_does_not_depend_on_the_batch_or_change_the_model(normed):
  """Running averages are used, although the model is in train mode."""
  before = values(normed)
  images = tiny.split(8).images
  together = evaluation.predict(normed, [images])
  alone = evaluation.predict(normed, [images[:4], 9 * images[4:]])
  np.testing.assert_allclose(alone[:4], together[:4], rtol=1e-5, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, values(normed), before)
  assert not normed.bn.use_running_average


def test_statistics_are_the_means_over_batches(normed):
  batches = [tiny.split(16, seed=s).images * (1 + s) for s in range(3)]
  seen = [np.asarray(normed.conv(x), np.float64) for x in batches]
  mean = np.mean([x.mean((0, 1, 2)) for x in seen], axis=0)
  var = np.mean([x.var((0, 1, 2)) for x in seen], axis=0)
  before = values(normed)
  new = evaluation.estimate_statistics(normed, iter(batches))
  np.testing.assert_allclose(new.bn.mean[...], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(new.bn.var[...], var, rtol=1e-5, atol=1e-6)
  # Nothing else moves, and training goes on with the momentum it had.
  for name in ('scale', 'bias'):
    np.testing.assert_array_equal(
      getattr(new.bn, name)[...], getattr(normed.bn, name)[...]
    )
  assert new.bn.momentum == normed.bn.momentum == 0.9
  jax.tree.map(np.testing.assert_array_equal, values(normed), before)


def test_statistics_of_a_compressed_model_see_its_grids():
  net = tiny.compressed(tiny.Normed)
  images = tiny.split(32).images
  new = evaluation.estimate_statistics(net, [images])
  conv = lambda x: net.model.conv(x)
  # The hook of the convolution quantizes both of its operands.
  x = np.asarray(jax.jit(conv)(images), np.float64)
  np.testing.assert_allclose(
    new.model.bn.mean[...], x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6
  )
  gates = lambda model: nnx.as_pure(nnx.state(model.gates))
  jax.tree.map(np.testing.assert_array_equal, gates(new), gates(net))


def test_statistics_over_devices_are_those_of_the_whole_batch(normed):
  if jax.device_count() < 4:
    pytest.skip('needs four devices')
  batches = [tiny.split(16, seed=s).images * (1 + s) for s in range(3)]
  expected = evaluation.estimate_statistics(normed, batches)
  mesh = parallel.mesh(jax.devices()[:4])
  found = evaluation.estimate_statistics(normed, batches, mesh)
  for name in ('mean', 'var'):
    moved = getattr(found.bn, name)[...]
    assert moved.devices() == {jax.local_devices()[0]}
    np.testing.assert_allclose(
      moved, getattr(expected.bn, name)[...], rtol=1e-5, atol=1e-6
    )
  assert_same_values(evaluation.estimate_statistics(normed, [], mesh), normed)


def test_models_without_statistics_stay_as_they_are(normed):
  model = tiny.make(tiny.Mlp)
  new = evaluation.estimate_statistics(model, [tiny.split(8).images])
  assert_same_values(new, model)
  assert_same_values(evaluation.estimate_statistics(normed, []), normed)
