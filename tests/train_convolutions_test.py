"""Convolutions of training on a CPU: the values and slopes of XLA's own."""

import functools
from unittest import mock

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import optim
from djpq_jax import parallel
from djpq_jax import train
from djpq_jax.train import convolutions

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
LEFT_TO_XLA = ('two inputs each', 'one axis', 'three axes')  # if dense
DENSE = {
  **{name: how for name, how in LAYERS.items() if name not in LEFT_TO_XLA},
  'one place': dict(kernel_size=(1, 1)),
  'one place of four': dict(kernel_size=(1, 1), strides=2),
  'exact products': dict(kernel_size=(3, 3), precision='highest'),
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  monkeypatch.setattr(convolutions, 'FEWEST_PIXELS', 0)


def _value_and_slopes(layer, x):
  graphdef, state = nnx.split(layer)

  def loss(state, x):
    y = nnx.merge(graphdef, state)(x)
    return jnp.sum(jnp.sin(y)), y

  grads = jax.grad(loss, (0, 1), has_aux=True)(nnx.as_pure(state), x)
  return jax.tree.leaves(grads)


@pytest.mark.parametrize(
  ('groups', 'batch', 'name'),
  [(6, 3, name) for name in LAYERS]
  + [(1, 4, name) for name in DENSE]
  + [(1, 5, 'padded')],
)
def test_values_and_slopes_are_those_of_a_convolution(groups, batch, name):
  kwargs = {'in_features': 6, 'out_features': 6, 'feature_group_count': groups}
  how = (LAYERS if groups > 1 else DENSE)[name]
  layer = nnx.Conv(**(kwargs | how), rngs=nnx.Rngs(0))
  shape = (batch, 7, 6, 5)[: len(layer.kernel_size) + 1]
  x = jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 6)), 'float32')
  expected = jax.jit(functools.partial(_value_and_slopes, layer))(x)
  view = nnx.view(layer)
  convolutions.speed_up(view)
  assert view.conv_general_dilated is convolutions.convolve
  changed = functools.partial(_value_and_slopes, view)
  if groups == 1:  # else XLA's would be compared with itself
    assert ' scan[' in str(jax.make_jaxpr(changed)(x))
  found = jax.jit(changed)(x)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_depthwise_layer_is_no_convolution_any_more():
  layer = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
  view = nnx.view(layer)
  convolutions.speed_up(view)
  x = jnp.zeros((2, 5, 5, 4))
  assert 'conv_general_dilated' in str(jax.make_jaxpr(layer)(x))
  assert 'conv_general_dilated' not in str(jax.make_jaxpr(view)(x))


def test_a_dense_kernels_slope_is_summed_a_few_images_at_a_time():
  """A slope of all images at once is what XLA is slow with."""
  layer = nnx.Conv(4, 5, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
  convolutions.speed_up(layer)
  x = jnp.zeros((4 * jax.device_count(), 32, 32, 4))

  def loss(kernel):
    return jnp.sum(_with_kernel(layer, kernel)(x))

  found = str(jax.make_jaxpr(jax.grad(loss))(layer.kernel[...]))
  assert 'f32[2,32,32,36]' in found
  assert 'f32[4,32,32,36]' not in found


def _is_summed(layer, x) -> bool:
  convolutions.speed_up(layer)

  def loss(kernel):
    return jnp.sum(_with_kernel(layer, kernel)(x))

  return ' scan[' in str(jax.make_jaxpr(jax.grad(loss))(layer.kernel[...]))


class OtherLayout(nnx.Conv):
  """Channels first, as `nnx.Conv` has not."""

  def __call__(self, x):
    layout = ('NCHW', 'HWIO', 'NCHW')
    return self.conv_general_dilated(
      x, self.kernel[...], (1, 1), 'SAME', dimension_numbers=layout
    )


def test_slopes_that_would_take_longer_are_left_to_xla(monkeypatch):
  """And those that would take much memory or compile for long."""
  rngs, x = nnx.Rngs(0), jnp.zeros((4, 8, 8, 3))
  assert _is_summed(nnx.Conv(3, 4, (3, 3), rngs=rngs), x)
  assert not _is_summed(nnx.Conv(3, 4, (7, 7), rngs=rngs), x)
  assert not _is_summed(nnx.Conv(8, 4, (3,), rngs=rngs), jnp.zeros((4, 8, 8)))
  assert not _is_summed(OtherLayout(8, 4, (3, 3), rngs=rngs), x)
  nothing = jnp.zeros((4, 2, 2, 3))
  layer = nnx.Conv(3, 4, (3, 3), padding='VALID', rngs=rngs)
  monkeypatch.undo()
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  assert not _is_summed(layer, nothing)
  assert not _is_summed(nnx.Conv(3, 4, (3, 3), rngs=rngs), x)
  many = jnp.zeros((128, 8, 8, 3))
  assert _is_summed(nnx.Conv(3, 4, (3, 3), rngs=rngs), many)
  assert _is_summed(nnx.Conv(3, 4, (1, 1), rngs=rngs), x)
  large = jnp.zeros((1, 1024, 1024, 3))
  assert not _is_summed(nnx.Conv(3, 4, (3, 3), rngs=rngs), large)


def test_devices_sum_their_shares_where_each_is_mapped():
  if jax.device_count() < 4:
    pytest.skip('needs four devices')
  mesh = parallel.mesh(jax.devices()[:4])
  spec = jax.sharding.PartitionSpec
  layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 3)), 'float32')

  def slope(kernel, x):
    def loss(kernel):
      return jnp.sum(jnp.sin(_with_kernel(layer, kernel)(x)))

    return jax.grad(loss)(kernel)

  expected = jax.jit(slope)(layer.kernel[...], x)
  convolutions.speed_up(layer)
  mapped = jax.shard_map(
    slope, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec()
  )
  found = jax.jit(mapped)(layer.kernel[...], x)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('groups', [1, 4])
def test_bfloat16_is_summed_in_float32(groups):
  """Values and slopes lie within the last of bfloat16's bits."""
  kwargs = dict(feature_group_count=groups, use_bias=False, rngs=nnx.Rngs(0))
  layer = nnx.Conv(4, 4, (5, 5), dtype=jnp.bfloat16, **kwargs)
  layer.kernel[...] = layer.kernel[...].astype(jnp.bfloat16).astype('float32')
  convolutions.speed_up(layer)
  x = np.random.default_rng(0).normal(1, 1, (64, 9, 9, 4))
  x = jnp.asarray(x, jnp.bfloat16)
  found = _value_and_slopes(layer, x)
  assert [v.dtype for v in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
  # The same slopes at the outputs, with all else in float32.
  layer.dtype = jnp.float32
  y, vjp = jax.vjp(lambda k, x: _with_kernel(layer, k)(x), *_wide(layer, x))
  of_kernel, of_x = vjp(jnp.cos(found[2]).astype(jnp.float32))
  for got, want in zip(found, (of_kernel, of_x, y)):
    # Rounded once, to eight bits.
    np.testing.assert_allclose(
      got.astype(jnp.float32), want, rtol=1.01 * 2**-8, atol=1e-5
    )


def _wide(layer, x):
  return layer.kernel[...], x.astype(jnp.float32)


def _with_kernel(layer, kernel):
  new = nnx.clone(layer)
  new.kernel[...] = kernel
  return new


@pytest.mark.parametrize(
  'asks', ['preferred_element_type', 'padding of spread inputs']
)
def test_what_is_asked_for_besides_is_left_to_xla(asks):
  """A type of the outputs; padding by name, which XLA refuses there."""
  x, kernel = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 1, 4))
  kwargs = dict(
    strides=(1, 1),
    padding='SAME',
    lhs_dilation=(1, 1),
    rhs_dilation=(1, 1),
    feature_group_count=4,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  if asks == 'preferred_element_type':
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    kwargs |= {asks: jnp.float32}
    assert convolutions.convolve(x, kernel, **kwargs).dtype == jnp.float32
  else:
    kwargs |= {'lhs_dilation': (2, 2)}
    with pytest.raises(ValueError, match='padding'):
      convolutions.convolve(x, kernel, **kwargs)


def _changed(model) -> int:
  """How many of its layers are other than XLA's now."""
  return sum(
    module.conv_general_dilated is convolutions.convolve
    for _, module in nnx.iter_modules(model)
    if isinstance(module, nnx.Conv)
  )


def _grouped(step, *args) -> int:
  """How many depthwise convolutions of XLA a step has."""
  # A function of its own, as a trace is kept for each.
  found = str(jax.make_jaxpr(lambda *args: step(*args))(*args))
  return found.count('_group_count=8')


def test_only_on_a_cpu():
  model = tiny.make(tiny.Depthwise)
  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    convolutions.speed_up(model)
  assert not _changed(model)
  convolutions.speed_up(model)
  assert _changed(model) == 3


@pytest.mark.standard_promotion  # optax
def test_a_step_sums_them_and_its_model_has_convolutions():
  model = tiny.make(tiny.Depthwise)
  optimizer = optim.make(optim.OptimizerConfig(), 10)
  state = train.init(model, train.Objective(), optimizer)
  batch = tiny.batch()

  assert _grouped(train.train_step, state, batch) == 0
  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    # The layer itself, its slope by inputs and by kernel.
    assert _grouped(train.train_step, state, batch) == 3
  assert not _changed(model)
  assert not _changed(train.model_of(state))


@pytest.mark.standard_promotion
@pytest.mark.parametrize('accumulate', [1, 2])
def test_each_device_sums_its_own_share_of_the_batch(accumulate):
  if jax.device_count() < 4:
    pytest.skip('needs four devices')
  mesh = parallel.mesh(jax.devices()[:4])

  def state():
    optimizer = optim.make(optim.OptimizerConfig(), 10)
    model = tiny.make(tiny.Depthwise)
    objective = train.Objective()
    return train.init(model, objective, optimizer, accumulate=accumulate)

  batch = tiny.batch(32)
  expected, _ = jax.jit(train.train_step)(state(), batch)
  step = parallel.jit_step(train.train_step, mesh)
  placed = parallel.replicate(state(), mesh), parallel.spread(batch, mesh)
  compiled = step.lower(*placed).compile()
  assert 'all-gather' not in compiled.as_text()
  found, _ = compiled(*placed)
  chex.assert_trees_all_close(
    parallel.gather(found.params), expected.params, rtol=1e-5, atol=1e-6
  )


@pytest.mark.standard_promotion
def test_steps_sum_with_a_teacher_and_where_they_keep_less():
  model, batch = tiny.make(tiny.Depthwise), tiny.batch(32)
  optimizer = optim.make(optim.OptimizerConfig(), 10)
  objective = train.Objective(distill=0.5)
  teacher = tiny.make(tiny.Depthwise, seed=1)
  state = train.init(model, objective, optimizer, teacher=teacher)

  def plain(step, *args):
    with mock.patch.object(jax, 'default_backend', return_value='gpu'):
      return _grouped(step, *args)

  # The layer and its two slopes, and the teacher's.
  assert plain(train.train_step, state, batch) == 4
  assert _grouped(train.train_step, state, batch) == 0
  batch |= {'mask': np.ones(32, np.float32)}
  step = train.eval_step.__wrapped__
  assert plain(step, state, batch) == 1
  assert _grouped(step, state, batch) == 0
  how = {'teacher': teacher, 'remat': True}
  kept = train.init(model, objective, optimizer, **how)
  batch.pop('mask')
  expected, _ = jax.jit(train.train_step)(state, batch)
  found, _ = jax.jit(train.train_step)(kept, batch)
  chex.assert_trees_all_close(found.params, expected.params, rtol=1e-5)


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
  convolutions.speed_up(layer)
  assert layer.conv_general_dilated is own
