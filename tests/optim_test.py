"""Which optimizer moves which variable, one step by hand, and schedules."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from djpq_jax import compress
from djpq_jax import graph
from djpq_jax import layers
from djpq_jax import optim


class Net(nnx.Module):
  """One of each kind of variable that a compressed model can have."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.bn = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.bn(self.conv(x))).mean((1, 2))
    return self.head(self.dropout(x))


X = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)


@pytest.fixture(scope='module')
def net():
  model = Net(nnx.Rngs(0))
  found = graph.trace(compress.eval_view(model), X)
  rule = compress.Rule(pattern='*', exponent=True)
  net = compress.assemble(model, compress.resolve(found, [rule]))
  net.model.table = layers.IntegerParam(jnp.arange(3, dtype=jnp.int8))
  return net


def _names(state):
  return {'/'.join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_every_variable_lands_where_it_should(net):
  _, params, rest = optim.split(net)
  hook = 'model/{}/promote_dtype/{}/{}'
  assert _names(params['quantizers']) == {
    hook.format(layer, *kind)
    for layer in ('conv', 'head')
    for kind in [
      ('act', 'log_clip'),
      ('act', 'log_step'),
      ('weight', 'log_clip'),
      ('weight', 'log_step'),
      ('weight', 'log_exponent'),
    ]
  }
  assert _names(params['gates']) == {'gates/0/log_sigma2'}
  assert _names(params['weights']) == {
    'gates/0/mu',
    'model/conv/kernel',
    'model/conv/bias',
    'model/bn/scale',
    'model/bn/bias',
    'model/head/kernel',
    'model/head/bias',
  }
  assert _names(rest) == {
    'model/bn/mean',
    'model/bn/var',
    'model/table',
    'model/dropout/rngs/key',
    'model/dropout/rngs/count',
  }


def test_merge_undoes_split(net):
  graphdef, params, rest = optim.split(net)
  again = optim.merge(graphdef, params, rest)
  assert nnx.split(again)[0] == nnx.split(net)[0]
  wanted, got = (nnx.to_flat_state(nnx.state(m)) for m in (net, again))
  assert len(wanted) == len(got) == 10 + 1 + 7 + 5
  for (path, want), (path_again, value) in zip(wanted, got):
    assert (path, type(want)) == (path_again, type(value))
    assert want[...] is value[...] or np.all(want[...] == value[...])


# -- one step by hand ---------------------------------------------------------

PARAMS = {
  'gates': {'log_sigma2': jnp.asarray([1.0, -2.0])},
  'quantizers': {'log_step': jnp.asarray([[3.0, -4.0]])},
  'weights': {
    'kernel': jnp.asarray([[1.0, -2.0], [0.5, 4.0]]),
    'bias': jnp.asarray([5.0, -6.0]),
  },
}
GRADS = jax.tree.map(lambda p: 0.1 + 0.01 * p, PARAMS)


def _config(**changes):
  settings = dict(
    learning_rate=0.1, weight_decay=0.01, warmup=0.0, clip_norm=1e6
  )
  return optim.OptimizerConfig(**(settings | changes))


def _steps(config, count=1, grads=GRADS):
  """Parameters after some steps with the same gradients."""
  optimizer = optim.make(config, 1000)

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = PARAMS, optimizer.init(PARAMS)
  (params, _), _ = jax.lax.scan(step, start, length=count)
  return params


def test_one_step_of_adam():
  config = _config(name='adam', quantizer_rate=0.02, gate_rate=0.05)
  got = _steps(config)
  # The first Adam step is the sign of the gradient.
  signs = jax.tree.map(lambda g: g / (jnp.abs(g) + 1e-8), GRADS)
  old, sign = PARAMS['weights'], signs['weights']
  kernel = old['kernel'] - 0.1 * (sign['kernel'] + 0.01 * old['kernel'])
  np.testing.assert_allclose(got['weights']['kernel'], kernel, rtol=1e-5)
  bias = old['bias'] - 0.1 * sign['bias']
  np.testing.assert_allclose(got['weights']['bias'], bias, rtol=1e-5)
  for kind, name, rate in [
    ('gates', 'log_sigma2', 0.05),
    ('quantizers', 'log_step', 0.02),
  ]:
    want = PARAMS[kind][name] - rate * signs[kind][name]
    np.testing.assert_allclose(got[kind][name], want, rtol=1e-5)


def test_two_steps_of_sgd_with_nesterov_momentum():
  config = _config(name='sgd', momentum=0.9, weight_decay=0.0)
  old, grad = PARAMS['weights']['bias'], GRADS['weights']['bias']
  one = old - 0.1 * 1.9 * grad
  got = _steps(config)['weights']['bias']
  np.testing.assert_allclose(got, one, rtol=1e-5)
  rate = 0.1 * (1 + np.cos(np.pi / 1000)) / 2
  two = one - rate * (grad + 0.9 * 1.9 * grad)
  got = _steps(config, 2)['weights']['bias']
  np.testing.assert_allclose(got, two, rtol=1e-5)


def test_decay_of_sgd_goes_through_its_momentum():
  got = _steps(_config(name='sgd'))['weights']
  old, grad = PARAMS['weights'], GRADS['weights']
  kernel = old['kernel'] - 0.19 * (grad['kernel'] + 0.01 * old['kernel'])
  np.testing.assert_allclose(got['kernel'], kernel, rtol=1e-5)
  bias = old['bias'] - 0.19 * grad['bias']
  np.testing.assert_allclose(got['bias'], bias, rtol=1e-5)


@pytest.mark.parametrize('name', ['adam', 'sgd'])
def test_without_gradients_only_kernels_decay(name):
  zeros = jax.tree.map(jnp.zeros_like, GRADS)
  got = _steps(_config(name=name), 3, zeros)
  kernel = got['weights'].pop('kernel')
  assert np.all(np.abs(kernel) < np.abs(PARAMS['weights']['kernel']))
  for path, leaf in jax.tree_util.tree_leaves_with_path(got):
    want = PARAMS[path[0].key][path[1].key]  # of rank 2, too: quantizers
    np.testing.assert_array_equal(leaf, want)


def test_the_gradients_of_weights_are_clipped_together():
  config = _config(name='sgd', weight_decay=0.0, momentum=0.0, clip_norm=0.01)
  got = _steps(config)
  moved = jax.tree.map(lambda a, b: a - b, got['weights'], PARAMS['weights'])
  norm = np.sqrt(sum(np.square(x).sum() for x in moved.values()))
  np.testing.assert_allclose(norm, 0.1 * 0.01, rtol=1e-3)
  # Those of gates are not: they do not count, nor are they scaled.
  assert (
    np.min(np.abs(got['gates']['log_sigma2'] - jnp.asarray([1, -2]))) > 0.02
  )


@pytest.mark.parametrize('decay_gates', [True, False])
def test_rates_of_gates_and_quantizers_fall_only_if_asked_to(decay_gates):
  config = _config(decay_gates=decay_gates, gate_rate=0.05)
  optimizer = optim.make(config, 10)
  state = optimizer.init(PARAMS)
  update = jax.jit(optimizer.update)
  moves = []
  for _ in range(11):
    updates, state = update(GRADS, state, PARAMS)
    moves.append(float(jnp.abs(updates['gates']['log_sigma2'][0])))
  np.testing.assert_allclose(moves[0], 0.05, rtol=1e-4)
  last = 0.0 if decay_gates else 0.05
  np.testing.assert_allclose(moves[-1], last, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(updates['weights']['bias'], 0.0, atol=1e-7)


# -- schedules and bad settings -----------------------------------------------


def test_cosine_rises_and_ends_at_zero():
  schedule = optim.cosine(0.4, 100, 0.1)
  got = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 150)]
  np.testing.assert_allclose(got, [0.04, 0.22, 0.4, 0.2, 0, 0], atol=1e-6)


@pytest.mark.parametrize('steps', [1, 2, 7])
def test_short_phases_have_a_schedule_too(steps):
  for warmup in (0.0, 0.05, 1.0):
    schedule = optim.cosine(0.4, steps, warmup)
    rates = [float(schedule(step)) for step in range(steps + 2)]
    assert np.isfinite(rates).all()
    assert 0 < rates[0] <= 0.4 + 1e-6
    np.testing.assert_allclose(rates[-1], 0.0, atol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(name='adamw'), "'adam' or 'sgd', got 'adamw'"),
    (dict(learning_rate=0.0), 'learning_rate must be positive'),
    (dict(clip_norm=0.0), 'clip_norm must be positive, and large for none'),
    (dict(clip_norm=float('nan')), 'clip_norm must be positive'),
    (dict(momentum=1.0), 'momentum must be from 0 to below 1'),
    (dict(learning_rate=-1.0), 'learning_rate must be positive'),
    (dict(learning_rate=float('nan')), 'learning_rate must be positive'),
  ],
)
def test_bad_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    optim.OptimizerConfig(**changes)


def test_settings_do_not_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    optim.OptimizerConfig().learning_rate = 1.0
