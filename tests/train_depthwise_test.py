"""Depthwise convolutions as sums: the values and slopes of XLA's own."""

from unittest import mock

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import optim
from djpq_jax import train
from djpq_jax.train import depthwise

LAYERS = {
  'padded': dict(kernel_size=(3, 3), padding=1),
  'same': dict(kernel_size=(3, 3), padding='SAME', strides=2),
  'valid': dict(kernel_size=(5, 3), padding='VALID', strides=(1, 2)),
  'dilated': dict(kernel_size=(3, 3), padding='SAME', kernel_dilation=2),
  'spread inputs': dict(kernel_size=(3, 3), padding=1, input_dilation=(2, 1)),
  'circular': dict(kernel_size=(3, 3), padding='CIRCULAR'),
  'one axis': dict(kernel_size=(4,), padding='CAUSAL', strides=2),
  'three axes': dict(kernel_size=(2, 1, 3), padding='SAME'),
  'two outputs each': dict(kernel_size=(3, 3), out_features=12),
  'two inputs each': dict(kernel_size=(3, 3), feature_group_count=3),
}


def _value_and_slopes(layer, x):
  graphdef, state = nnx.split(layer)

  def loss(state, x):
    y = nnx.merge(graphdef, state)(x)
    return jnp.sum(jnp.sin(y)), y

  grads = jax.grad(loss, (0, 1), has_aux=True)(nnx.as_pure(state), x)
  return jax.tree.leaves(grads)


@pytest.mark.parametrize('name', LAYERS)
def test_values_and_slopes_are_those_of_a_convolution(name):
  kwargs = {'in_features': 6, 'out_features': 6, 'feature_group_count': 6}
  layer = nnx.Conv(**(kwargs | LAYERS[name]), rngs=nnx.Rngs(0))
  shape = (3, 9, 8, 7)[: len(layer.kernel_size) + 1]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 6)), 'float32')
  expected = _value_and_slopes(layer, x)
  view = nnx.view(layer)
  depthwise.speed_up(view)
  assert view.conv_general_dilated is depthwise.convolve
  chex.assert_trees_all_close(
    _value_and_slopes(view, x), expected, rtol=1e-5, atol=1e-5
  )


def test_a_depthwise_layer_is_no_convolution_any_more():
  layer = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
  view = nnx.view(layer)
  depthwise.speed_up(view)
  x = jnp.zeros((2, 5, 5, 4))
  assert 'conv_general_dilated' in str(jax.make_jaxpr(layer)(x))
  assert 'conv_general_dilated' not in str(jax.make_jaxpr(view)(x))


def test_bfloat16_stays_bfloat16():
  layer = nnx.Conv(
    4,
    4,
    (3, 3),
    feature_group_count=4,
    dtype=jnp.bfloat16,
    rngs=nnx.Rngs(0),
  )
  depthwise.speed_up(layer)
  x = jnp.ones((2, 5, 5, 4), jnp.bfloat16)
  of_kernel, of_x, y = (
    v.dtype for v in _value_and_slopes(layer, x) if v.ndim > 1
  )
  assert (of_kernel, of_x, y) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


def _summed(model) -> int:
  """How many of its layers are sums now."""
  return sum(
    module.conv_general_dilated is depthwise.convolve
    for _, module in nnx.iter_modules(model)
    if isinstance(module, nnx.Conv)
  )


def test_only_a_cpu_sums_them():
  model = tiny.make(tiny.Depthwise)
  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    depthwise.speed_up(model)
  assert not _summed(model)
  depthwise.speed_up(model)
  assert _summed(model) == 1


@pytest.mark.standard_promotion  # optax
def test_a_step_sums_them_and_its_model_has_convolutions():
  model = tiny.make(tiny.Depthwise)
  optimizer = optim.make(optim.OptimizerConfig(), 10)
  state = train.init(model, train.Objective(), optimizer)
  batch = tiny.batch()

  def convolutions():
    # A function of its own, as a trace is kept for each.
    step = jax.make_jaxpr(lambda *args: train.train_step(*args))
    return str(step(state, batch)).count(' conv_general_dilated[')

  summed = convolutions()
  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    plain = convolutions()
  # The layer itself, its slope by inputs and by kernel.
  assert plain == summed + 3
  assert not _summed(model)
  assert not _summed(train.model_of(state))


def test_a_convolution_of_the_users_own_is_left():
  def own(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)

  layer = nnx.Conv(
    4,
    4,
    (3, 3),
    feature_group_count=4,
    conv_general_dilated=own,
    rngs=nnx.Rngs(0),
  )
  depthwise.speed_up(layer)
  assert layer.conv_general_dilated is own
