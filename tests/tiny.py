"""Networks and images that are small enough to compile in a second."""

import contextlib
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import data
from djpq_jax import models
from djpq_jax.data import sources

SHAPE = (4, 4, 1)
CLASSES = 3


class Mlp(nnx.Module):
  """Flatten, 12 hidden units, relu; no batch norm."""

  input_shape = SHAPE

  def __init__(self, rngs):
    self.hidden = nnx.Linear(16, 12, rngs=rngs)
    self.head = nnx.Linear(12, CLASSES, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


class Dropped(nnx.Module):
  """The same with dropout; has keys, so `make` is not for it."""

  input_shape = SHAPE

  def __init__(self, rngs):
    self.hidden = nnx.Linear(16, 12, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(12, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
    return self.head(self.dropout(x))


class Normed(nnx.Module):
  """A convolution with batch norm, then a linear layer on all its pixels."""

  input_shape = SHAPE

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 6, (3, 3), use_bias=False, rngs=rngs)
    self.bn = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(4 * 4 * 6, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.bn(self.conv(x)))
    return self.head(x.reshape(x.shape[0], -1))


class Depthwise(nnx.Module):
  """A convolution, a depthwise and a pointwise one, a linear layer."""

  input_shape = SHAPE

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
    self.pointwise = nnx.Conv(8, 6, (1, 1), rngs=rngs)
    self.head = nnx.Linear(6, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.depthwise(nnx.relu(self.conv(x))))
    x = nnx.relu(self.pointwise(x))
    return self.head(x.mean((1, 2)))


class Residual(nnx.Module):
  """A stem, a block of two convolutions with a shortcut, a linear layer."""

  input_shape = SHAPE

  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 6, (3, 3), rngs=rngs)
    self.conv1 = nnx.Conv(6, 8, (3, 3), use_bias=False, rngs=rngs)
    self.bn1 = nnx.BatchNorm(8, rngs=rngs)
    self.conv2 = nnx.Conv(8, 6, (3, 3), rngs=rngs)
    self.head = nnx.Linear(6, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.stem(x))
    y = self.conv2(nnx.relu(self.bn1(self.conv1(x))))
    return self.head(nnx.relu(x + y).mean((1, 2)))


def make(kind, seed=0):
  """A model with numbers from NumPy: those of jax.random compile."""
  rng = np.random.default_rng(seed)
  model = nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
  graphdef, params, stats, rest = nnx.split(
    model, nnx.Param, nnx.BatchStat, ...
  )
  weight = lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype)
  stat = lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
  params, stats = jax.tree.map(weight, params), jax.tree.map(stat, stats)
  return nnx.merge(graphdef, params, stats, rest)


def split(size=96, shape=SHAPE, seed=0):
  """Noise with a pattern per class: easy to learn."""
  rng = np.random.default_rng(seed)
  patterns = np.random.default_rng(99).uniform(-1, 1, (CLASSES, *shape))
  labels = rng.integers(0, CLASSES, size).astype(np.int32)
  images = patterns[labels] + rng.normal(0, 0.3, (size, *shape))
  return data.Split(images.astype(np.float32), labels, CLASSES, 'tiny')


def batch(size=16, seed=0):
  found = split(size, seed=seed)
  return {'image': found.images, 'label': found.labels}


def compressed(kind=Mlp, rules=(), seed=0):
  return compress.compress(make(kind, seed), rules, batch(64)['image'])


def some_plan(model, seed=0):
  """Closes about half of the channels; bits of all kinds."""
  rng = np.random.default_rng(seed)
  masks = {}
  for g in model.structure.gated:
    group = model.structure.groups[g]
    masks[group.name] = rng.permutation(group.size) < (group.size + 1) // 2
  paths = [path for path, _, _ in compress.hooks(model)]
  weight_bits = dict(zip(paths, [3, 5, 2, 8, 4]))
  act_bits = dict(zip(paths, [8, 4, 3, 6, 5]))
  return compress.Plan(open=masks, weight_bits=weight_bits, act_bits=act_bits)


def source(*, data_dir=None):
  """A data set for `data.load`."""
  del data_dir
  train, test = split(96, seed=1), split(50, seed=2)
  return train, data.Split(test.images, test.labels, CLASSES, 'tiny/test')


def normed(rngs):
  """A model for `models.create`."""
  del rngs
  return make(Normed)


CONFIG = '''"""The smallest experiment that learns something."""

from djpq_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.name = 'tiny'
  config.model.name = 'tiny'
  config.batch_size = 32
  config.step.devices = 1
  config.budget = 0.02
  config.statistics_batches = 2

  config.float.epochs = 20.0
  config.float.optimizer.learning_rate = 1e-2
  config.search.epochs = 40.0
  config.search.optimizer.quantizer_rate = 5e-2
  config.search.optimizer.gate_rate = 5e-2
  config.search.optimizer.decay_gates = False
  config.finetune.epochs = 10.0
  config.finetune.optimizer.learning_rate = 1e-2
  return config
'''


@contextlib.contextmanager
def registered():
  """Within it, models and data know 'tiny'."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', normed)
    patch.setitem(sources.SOURCES, 'tiny', source)
    yield


def experiment_config(folder, *overrides):
  """The config above, loaded from a file in a folder."""
  path = pathlib.Path(folder) / 'tiny.py'
  path.write_text(CONFIG)
  return config_lib.load(str(path), overrides)
