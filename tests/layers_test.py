"""Bounds, quantizers, gates and the operand hook, without a model around."""

import contextlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import layers


def _split(module):
  """(function of the parameters that rebuilds the module, parameters)."""
  graphdef, state = nnx.split(module)
  return lambda pure: nnx.merge(graphdef, pure), nnx.as_pure(state)


def _grad(f, module):
  """Gradient of f(module), by variable name."""
  merge, pure = _split(module)
  return jax.jit(jax.grad(lambda pure: f(merge(pure))))(pure)


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


# -- bounded ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('x', 'g', 'want'),
  [
    (0.0, 1.0, (1.0, 0.0, 0.0)),
    (0.0, -1.0, (-1.0, 0.0, 0.0)),
    # Below: downhill is where x goes against g, so g > 0 leads further out.
    (-2.0, 1.0, (0.0, 1.0, 0.0)),
    (-2.0, -1.0, (-1.0, -1.0, 0.0)),
    (2.0, 1.0, (1.0, 0.0, 1.0)),
    (2.0, -1.0, (0.0, 0.0, -1.0)),
    # On a bound: inwards x follows, outwards the bound does in its place.
    (-1.0, 1.0, (0.0, 1.0, 0.0)),
    (-1.0, -1.0, (-1.0, 0.0, 0.0)),
    (1.0, 1.0, (1.0, 0.0, 0.0)),
    (1.0, -1.0, (0.0, 0.0, -1.0)),
  ],
)
def test_bounded_passes_what_leads_back_and_moves_the_active_bound(x, g, want):
  args = [jnp.asarray(a) for a in (x, -1.0, 1.0)]
  value, pullback = jax.vjp(layers.bounded, *args)
  assert float(value) == np.clip(x, -1, 1)
  assert tuple(map(float, pullback(jnp.asarray(g)))) == want


@pytest.mark.parametrize('start', [-3.0, 0.1, 3.0])
@pytest.mark.parametrize(
  ('goal', 'end'), [(0.5, 0.5), (4.0, 1.0), (-4.0, -1.0)]
)
def test_descent_comes_back_from_outside_and_never_drifts_away(
  start, goal, end
):
  low, high = -jnp.ones(()), jnp.ones(())

  def loss(x):
    return (layers.bounded(x, low, high) - goal) ** 2

  def step(x, _):
    return x - 0.05 * jax.grad(loss)(x), None

  x, _ = jax.lax.scan(step, jnp.asarray(start), length=200)
  np.testing.assert_allclose(layers.bounded(x, low, high), end, atol=1e-3)
  assert abs(float(x)) <= max(abs(start), 1.5)


# -- Quantizer: the grid ------------------------------------------------------


def _quantizer(clip=1.5, bits=4.0, **changes):
  settings = dict(signed=True, bounds=(2, 8)) | changes
  return layers.Quantizer(clip, bits, **settings)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [2.0, 3.5, 8.0])
@pytest.mark.parametrize('exponent', [None, 0.7])
def test_bits_begin_where_they_were_asked_to(bits, signed, exponent):
  learned = {}
  if exponent:
    learned = dict(learn_exponent=True, exponent=exponent)
  q = _quantizer(bits=bits, signed=signed, **learned)
  np.testing.assert_allclose(q.bits(), bits, atol=1e-5)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_whole_bits_have_as_many_levels(bits, signed):
  q = _quantizer(1.5, bits, signed=signed, fixed=True)
  x = jnp.linspace(-2.0, 2.0, 4001)
  levels = np.unique(q.integers(x))
  top = 2 ** (bits - signed) - 1
  np.testing.assert_array_equal(levels, np.arange(-top * signed, top + 1))
  np.testing.assert_allclose(np.max(q(x)), 1.5, rtol=1e-6)


def test_one_unsigned_bit_is_all_or_nothing():
  q = _quantizer(2.0, 1, signed=False, bounds=(1, 1))
  x = jnp.asarray([-3.0, 0.0, 0.9, 1.1, 2.0, 9.0])
  np.testing.assert_allclose(q(x), [0, 0, 0, 2, 2, 2], rtol=1e-6)
  np.testing.assert_allclose(q.bits(), 1.0, atol=1e-6)


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('exponent', [True, False])
def test_bounds_hold_whatever_is_learned(exponent, signed):
  merge, pure = _split(_quantizer(signed=signed, learn_exponent=exponent))
  extremes = dict(
    log_clip=[-20.0, 0.0, 20.0],
    log_exponent=[-9.0, 0.1, 9.0],
    log_step=[-60.0, -3.0, 60.0],
  )
  mesh = np.meshgrid(*(extremes[k] for k in pure))
  learned = {k: jnp.float32(v.ravel()) for k, v in zip(pure, mesh)}

  def read(pure):
    q = merge(pure)
    x = jnp.exp(q.log_clip[...]) * _normal(64)
    return q.bits(), q.grid(), q(x), q.integers(x)

  bits, grid, values, integers = jax.jit(jax.vmap(read))(learned)
  assert all(np.isfinite(x).all() for x in (*grid, values))
  np.testing.assert_array_equal(np.clip(bits, 2 - 1e-4, 8 + 1e-4), bits)
  assert np.max(np.abs(integers)) == 2 ** (8 - signed) - 1
  low, high = layers.EXPONENT_RANGE
  np.testing.assert_allclose(np.clip(grid[2], low, high), grid[2], rtol=1e-6)
  if exponent:
    assert len(np.unique(np.round(grid[2], 4))) == 3


@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('exponent', [False, True])
def test_integers_times_step_is_the_value(fixed, exponent):
  q = _quantizer(fixed=fixed, learn_exponent=exponent)
  x = _normal(100)
  want = q.grid()[0] * q.integers(x).astype(jnp.float32)
  np.testing.assert_array_equal(q(x), want)


def test_the_dtype_and_the_shape_of_the_tensor_stay():
  x = _normal(2, 3, 4).astype(jnp.bfloat16)
  got = _quantizer()(x)
  assert (got.dtype, got.shape) == (x.dtype, x.shape)


def test_one_clip_per_channel_is_one_quantizer_per_channel():
  clips = np.asarray([0.5, 1.0, 2.0], np.float32)
  x = _normal(50, 3)
  q = _quantizer(clips[None], 3.0)
  for i, clip in enumerate(clips):
    want = _quantizer(clip, 3.0)(x[:, i])
    np.testing.assert_allclose(q(x)[:, i], want, rtol=1e-6)
  # A finer step in one channel widens the whole tensor.
  steps = np.asarray(q.log_step[...])
  q.log_step[...] = jnp.asarray(steps - [[0.0, np.log(2), 0.0]], jnp.float32)
  np.testing.assert_allclose(q.bits(), 1 + np.log2(7), rtol=1e-6)


@pytest.mark.parametrize('below', [None, 0.25])
def test_restricted_bits_are_the_nearest_in_octaves(below):
  sides = dict(signed=True, bounds=(2, 8), below=below)
  for bits, want in (
    (2.0, 2),
    (2.8, 2),
    (2.9, 4),
    (5.6, 4),
    (5.7, 8),
    (8.0, 8),
  ):
    q = layers.Quantizer(1.5, bits, choices=(4, 2, 8), **sides)
    np.testing.assert_allclose(q.bits(), want, rtol=1e-5)
    np.testing.assert_allclose(q.bits(restricted=False), bits, rtol=1e-5)
    x = _normal(100)
    plain = layers.Quantizer(1.5, want, **sides)
    np.testing.assert_allclose(q(x), plain(x), atol=1e-6)


def test_restricted_bits_pass_gradients_straight_through():
  kwargs = dict(signed=False, bounds=(2, 8))
  free = layers.Quantizer(1.5, 4.0, **kwargs)
  held = layers.Quantizer(1.5, 4.0, **kwargs, choices=(2, 4, 8))
  x = _normal(100)

  def gradient(q):
    graphdef, state = nnx.split(q)
    f = lambda s: (
      nnx.merge(graphdef, s)(x).sum() + nnx.merge(graphdef, s).bits()
    )
    return jax.grad(f)(nnx.as_pure(state))

  expected, found = gradient(free), gradient(held)
  assert float(expected['log_step']) != 0
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4)


# -- Quantizer: the gradients -------------------------------------------------


def _lsq(x, log_clip, bits, signed):
  """LSQ with its step at clip / levels, by stop_gradient alone."""
  levels = 2.0 ** (bits - signed) - 1
  step = jnp.exp(log_clip) / levels
  level = jnp.clip(x / step, -levels * signed, levels)
  return step * (level + jax.lax.stop_gradient(jnp.round(level) - level))


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('bits', [2, 4])
@pytest.mark.parametrize('clip', [0.8, [[0.4, 0.8, 1.6]]])
def test_fixed_bits_learn_the_clip_alone_as_lsq(clip, bits, signed):
  x, weights = _normal(200, 3), _normal(200, 3, seed=1)
  q = _quantizer(clip, bits, signed=signed, fixed=True)
  assert q.bits() == bits
  assert isinstance(q.bits(), float)
  got = _grad(lambda q: jnp.sum(weights * q(x)), q)
  assert set(got) == {'log_clip'}

  def oracle(log_clip):
    full = jnp.broadcast_to(log_clip, x.shape)
    return jnp.sum(weights * _lsq(x, full, bits, signed))

  want = jax.jit(jax.grad(oracle))(jnp.log(jnp.asarray(clip)))
  np.testing.assert_allclose(got['log_clip'], want, rtol=1e-4, atol=1e-4)
  d_x = jax.grad(lambda x: jnp.sum(q(x)))(x)
  lower = -np.asarray(clip) * signed
  np.testing.assert_array_equal(d_x, (x >= lower) & (x <= np.asarray(clip)))


def test_step_clip_and_exponent_learn_as_the_stop_gradient_oracle():
  x, weights = _normal(300), _normal(300, seed=1)
  q = _quantizer(0.9, 3.3, learn_exponent=True, exponent=1.2)

  def oracle(log_clip, log_exponent, log_step):
    clip, t, step = map(jnp.exp, (log_clip, log_exponent, log_step))
    u = jnp.minimum(jnp.abs(x), clip) ** t / step
    rounded = u + jax.lax.stop_gradient(jnp.round(u) - u)
    return jnp.sum(weights * jnp.sign(x) * step * rounded)

  got = _grad(lambda q: jnp.sum(weights * q(x)), q)
  _, pure = _split(q)
  want = jax.jit(jax.grad(lambda pure: oracle(**pure)))(pure)
  assert set(got) == {'log_clip', 'log_exponent', 'log_step'}
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('signed', [True, False])
def test_gradients_of_bits_in_closed_form(signed):
  clip, t = 0.9, 1.2
  q = _quantizer(clip, 3.3, signed=signed, learn_exponent=True, exponent=t)
  got = _grad(lambda q: q.bits(), q)
  levels = 2 ** (3.3 - signed) - 1
  slope = levels / (levels + 1) / np.log(2)
  want = dict(
    log_step=-slope, log_clip=slope * t, log_exponent=slope * t * np.log(clip)
  )
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_bits_at_a_bound_do_not_move_with_the_clip():
  q = _quantizer()
  q.log_step[...] = jnp.asarray(-20.0)
  shrink = _grad(lambda q: q.bits(), q)
  grow = _grad(lambda q: -q.bits(), q)
  np.testing.assert_allclose(shrink['log_clip'], 0.0, atol=1e-6)
  np.testing.assert_allclose(grow['log_clip'], 0.0, atol=1e-6)
  # Descent may take the step back into the range, and no further out.
  assert float(shrink['log_step']) < 0
  assert float(grow['log_step']) == 0


@pytest.mark.parametrize('clip', [0.37, 0.5, 0.81, 1.0, 1.3, 2.0])
def test_equal_bounds_learn_the_clip_as_fixed_bits_do(clip):
  x = _normal(300)
  grads = [
    _grad(lambda q: jnp.sum(q(x) ** 3), _quantizer(clip, 8, **settings))
    for settings in (dict(bounds=(8, 8)), dict(fixed=True))
  ]
  got, want = (float(g['log_clip']) for g in grads)
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize('fixed', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 7])
def test_a_grid_that_is_not_narrow_has_all_levels(bits, fixed):
  """One more below zero, as two's complement has."""
  q = _quantizer(1.5, bits, fixed=fixed, narrow_range=False)
  levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
  x = jnp.linspace(-9, 9, 1000)
  np.testing.assert_array_equal(np.unique(q.integers(x)), levels)
  step = float(q.grid()[0])
  np.testing.assert_allclose(q(x), step * np.asarray(q.integers(x)), rtol=1e-6)
  # What it costs is as before.
  assert float(q.bits()) == pytest.approx(bits)


@pytest.mark.parametrize('bits', [1, 2, 3])
def test_a_grid_with_no_level_at_zero(bits):
  q = _quantizer(1.5, bits, fixed=True, narrow_range=False, mid_rise=True)
  x = jnp.linspace(-9, 9, 1000)
  levels = np.arange(1 - 2**bits, 2**bits, 2)
  np.testing.assert_array_equal(np.unique(q.integers(x)), levels)
  expected = float(q.unit) * np.asarray(q.integers(x))
  np.testing.assert_allclose(q(x), expected, rtol=1e-6)
  assert float(q(x).max()) == pytest.approx(1.5)
  assert q.levels(bits) == ((2**bits - 1) / 2,) * 2
  assert q.symmetric
  assert float(q.bits()) == bits


@pytest.mark.parametrize(
  ('least', 'most', 'bits'),
  [
    (least, most, bits)
    for least, most in [(1, 8), (2, 8), (1, 2)]
    for bits in range(least, min(most, 5) + 1)
  ],
)
def test_choices_have_the_grids_that_are_left_once_bits_are_fixed(
  least, most, bits
):
  choices = tuple(range(least, most + 1))
  kwargs = dict(signed=True, narrow_range=False)
  searched = layers.Quantizer(
    1.5,
    bits + 0.1,
    bounds=(least, 8),
    choices=choices,
    mid_rise=least < 2,
    may_lack_zero=True,
    **kwargs,
  )
  fixed = layers.Quantizer(
    1.5, bits, bounds=(bits, bits), fixed=True, mid_rise=bits < 3, **kwargs
  )
  x = _normal(1000)
  assert float(searched.bits()) == bits
  np.testing.assert_allclose(searched(x), fixed(x), rtol=1e-6)
  np.testing.assert_array_equal(searched.integers(x), fixed.integers(x))
  np.testing.assert_allclose(searched.unit, fixed.unit, rtol=1e-6)
  # What is quantized learns as it does then, and so does the grid, from two
  # bits on; of one a step has to learn whether more of them would be better.
  got, want = (
    jax.grad(lambda x, q=q: jnp.sum(q(x) ** 3))(x) for q in (searched, fixed)
  )
  if bits < 2:  # what lies beyond the level is held back, while it is searched
    want = jnp.where(jnp.abs(x) > 1.5, 0, want)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  got, want = (
    _grad(lambda q: jnp.sum(q(x) ** 3), q) for q in (searched, fixed)
  )
  if bits > 1:
    np.testing.assert_allclose(sum(got.values()), want['log_clip'], rtol=1e-4)
  # Both of its parts learn from the bits, as they do without choices.
  grads = _grad(lambda q: q.bits(), searched)
  assert grads['log_clip'] > 0.5
  np.testing.assert_allclose(grads['log_step'], -grads['log_clip'], rtol=1e-5)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'narrow_range': True}, 'may_lack_zero is for'),
    ({'below': 0.5}, 'may_lack_zero is for'),
    ({'learn_exponent': True}, 'may_lack_zero is for'),
    ({'signed': False}, 'may_lack_zero is for'),
    ({'may_lack_zero': False, 'mid_rise': False}, 'of 1 bits has no level'),
  ],
)
def test_grids_that_there_are_not(changed, message):
  settings = dict(signed=True, bounds=(1, 8), choices=(1, 2, 3))
  settings |= dict(mid_rise=True, narrow_range=False, may_lack_zero=True)
  layers.Quantizer(0.9, 4.0, **settings)
  with pytest.raises(ValueError, match=message):
    layers.Quantizer(0.9, 4.0, **(settings | changed))


def test_infinities_saturate_at_one_bit_too():
  q = _quantizer(1.5, 1.1, bounds=(1, 8), choices=(1, 2, 3), mid_rise=True)
  np.testing.assert_allclose(q(jnp.array([-jnp.inf, jnp.inf])), [-1.5, 1.5])


@pytest.mark.parametrize('least', [1, 2])
def test_bits_above_the_choices_may_be_real_valued(least):
  kwargs = dict(bounds=(least, 8), signed=True, narrow_range=False)
  x = _normal(1000)

  def built(bits, **more):
    mid_rise = least < 2
    return layers.Quantizer(
      1.5, bits, mid_rise=mid_rise, may_lack_zero=True, **kwargs, **more
    )

  for bits in (3.2, 4.0, 4.7):
    q = built(bits, choices=range(least, 4), real_above=True)
    assert q.nearest(bits) == pytest.approx(bits)
    plain = layers.Quantizer(1.5, bits, **kwargs | {'bounds': (2, 8)})
    np.testing.assert_allclose(q.bits(), bits, rtol=1e-6)
    np.testing.assert_allclose(q.grid()[0], plain.grid()[0], rtol=1e-5)
    np.testing.assert_allclose(q(x), plain(x), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(q.integers(x), plain.integers(x))
  for bits, expected in ((2.3, 2), (2.6, 3), (2.99, 3)):
    q = built(bits, choices=range(least, 4), real_above=True)
    assert float(q.bits()) == q.nearest(bits) == expected
    whole = built(bits, choices=range(least, 9))
    np.testing.assert_array_equal(q(x), whole(x))


@pytest.mark.parametrize('fixed', [False, True])
def test_all_levels_learn_as_the_stop_gradient_oracle(fixed):
  x, weights = 2 * _normal(300), _normal(300, seed=1)
  q = _quantizer(0.9, 3, fixed=fixed, narrow_range=False)

  def oracle(log_clip, log_step=None):
    clip = jnp.exp(log_clip)
    step = clip / 3 if log_step is None else jnp.exp(log_step)
    u = jnp.clip(x, -clip - step, clip) / step
    rounded = u + jax.lax.stop_gradient(jnp.round(u) - u)
    return jnp.sum(weights * step * rounded)

  got = _grad(lambda q: jnp.sum(weights * q(x)), q)
  _, pure = _split(q)
  want = jax.jit(jax.grad(lambda pure: oracle(**pure)))(pure)
  names = {'log_clip'} if fixed else {'log_clip', 'log_step'}
  assert set(got) == set(want) == names
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('fixed', [False, True])
@pytest.mark.parametrize(('bits', 'count'), [(2, 0), (2, 1), (3, 1), (7, 20)])
def test_a_grid_with_few_levels_below_zero(bits, count, fixed):
  top = 2**bits - 1 - count
  q = _quantizer(1.5, bits, fixed=fixed, below=count / top)
  x = jnp.linspace(-3, 3, 2000)
  levels = np.arange(-count, top + 1)
  np.testing.assert_array_equal(np.unique(q.integers(x)), levels)
  step = float(q.grid()[0])
  np.testing.assert_allclose(q(x), step * np.asarray(q.integers(x)), rtol=1e-6)
  assert float(q.bits()) == pytest.approx(bits)
  np.testing.assert_allclose(q.levels(bits), (top, count), rtol=1e-6)
  assert not q.symmetric


@pytest.mark.parametrize('fixed', [False, True])
def test_few_levels_below_zero_learn_as_the_stop_gradient_oracle(fixed):
  x, weights = 2 * _normal(300), _normal(300, seed=1)
  q = _quantizer(0.9, 3, fixed=fixed, below=0.4)

  def oracle(log_clip, log_step=None):
    clip = jnp.exp(log_clip)
    step = clip / 5 if log_step is None else jnp.exp(log_step)
    u = jnp.clip(x, -0.4 * clip, clip) / step
    rounded = u + jax.lax.stop_gradient(jnp.round(u) - u)
    return jnp.sum(weights * step * rounded)

  got = _grad(lambda q: jnp.sum(weights * q(x)), q)
  _, pure = _split(q)
  want = jax.jit(jax.grad(lambda pure: oracle(**pure)))(pure)
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('below', [None, 0.25])
@pytest.mark.parametrize(
  'settings',
  [
    dict(signed=False),
    dict(learn_exponent=True),
    dict(fixed=True, bits=8),
    dict(bits=8, bounds=(8, 8)),
  ],
)
def test_some_grids_are_always_narrow(settings, below):
  settings = {'bits': 4} | settings | {'below': below}
  q = _quantizer(1.5, **settings, narrow_range=False)
  levels = np.asarray(q.integers(jnp.linspace(-9, 9, 1000)))
  lowest = -levels.max() if q.signed else 0
  assert levels.min() == lowest
  assert q.symmetric


# -- Gate ---------------------------------------------------------------------


def _gate(log_alpha, mu=None, **settings):
  """A gate with the given means and signal-to-noise ratios."""
  log_alpha = np.asarray(log_alpha, np.float32)
  mu = np.ones_like(log_alpha) if mu is None else np.asarray(mu, np.float32)
  gate = layers.Gate(len(log_alpha), **settings)
  gate.mu[...] = jnp.asarray(mu)
  gate.log_sigma2[...] = jnp.asarray(np.log(mu**2) - log_alpha)
  return gate


def test_a_new_gate_is_open():
  gate = layers.Gate(3)
  np.testing.assert_allclose(gate.log_alpha(), layers.OPEN_LOG_ALPHA)
  np.testing.assert_array_equal(gate.mean(), np.ones((1, 3)))
  np.testing.assert_allclose(gate.keep(), np.ones(3), rtol=1e-6)


def test_the_mean_closes_channels():
  gate = _gate([3.0, -1.0, 0.5, -8.0], mu=[0.7, 0.9, -1.2, 2.0])
  np.testing.assert_array_equal(gate.open_mask(), [True, False, True, False])
  mean = gate.mean()
  np.testing.assert_allclose(mean, [[0.7, 0.0, -1.2, 0.0]], rtol=1e-6)
  np.testing.assert_allclose(gate.keep(), [1, 0, 1, 0], atol=1e-6)


@pytest.mark.parametrize('min_open', [0, 1, 3, 5, 9])
def test_min_open_channels_stay_whatever_happens(min_open):
  log_alpha = [-90.0, -40.0, -300.0, -70.0, -41.0]
  gate = _gate(log_alpha, min_open=min_open)
  count = min(max(1, min_open), 5)
  best = np.argsort(log_alpha)[::-1][:count]
  np.testing.assert_array_equal(np.flatnonzero(gate.open_mask()), np.sort(best))
  # A mean of exactly zero has a log alpha too, and no channel is the best.
  gate.mu[...] = jnp.zeros(5)
  assert int(gate.open_mask().sum()) >= count


def test_min_open_closes_nothing_that_is_open():
  gate = _gate([3.0, 2.0, 1.0, -1.0], min_open=2)
  np.testing.assert_array_equal(gate.open_mask(), [True, True, True, False])


def test_keep_is_the_hard_mask_with_a_slope_that_reaches_an_open_gate():
  log_alpha = np.asarray([9.0, 2.0, -0.5, -20.0])
  mu = np.asarray([1.0, 0.5, -2.0, 0.1])
  weights = np.asarray([1.0, 2.0, 3.0, 4.0], np.float32)
  gate = _gate(log_alpha, mu)
  got = _grad(lambda gate: jnp.sum(weights * gate.keep()), gate)
  slope = 0.5 * weights / (1 + np.exp(-log_alpha))  # two of four are open
  np.testing.assert_allclose(got['log_sigma2'], -slope, rtol=1e-4)
  # A cost asks for more noise, never for less signal.
  np.testing.assert_array_equal(got['mu'], np.zeros(4))
  assert abs(float(got['log_sigma2'][0])) > 0.1  # where a sigmoid has 1e-4


def test_a_group_that_is_nearly_closed_is_pressed_less():
  def slope(log_alpha):
    gate = _gate(np.asarray(log_alpha))
    grads = _grad(lambda gate: jnp.sum(gate.keep()), gate)
    return float(grads['log_sigma2'][0])

  wide = slope([9.0, 9.0, 9.0, 9.0])
  narrow = slope([9.0, -9.0, -9.0, -9.0])
  np.testing.assert_allclose(narrow, wide / 4, rtol=1e-6)


def test_kl_in_closed_form():
  log_alpha = np.asarray([9.0, 0.0, -3.0])
  want = 0.5 * np.sum(np.log1p(np.exp(log_alpha)))
  np.testing.assert_allclose(_gate(log_alpha).kl(), want, rtol=1e-5)


def test_samples_differ_by_example_and_repeat_by_key():
  gate = _gate([0.0, 4.0], mu=[1.0, -2.0])
  z = layers.sample([gate], jax.random.key(0), 5000)[0]
  assert z.shape == (5000, 2)
  assert len(np.unique(z[:, 0])) > 4900
  np.testing.assert_array_equal(
    z, layers.sample([gate], jax.random.key(0), 5000)[0]
  )
  assert np.all(z != layers.sample([gate], jax.random.key(1), 5000)[0])
  np.testing.assert_allclose(z.mean(0), [1.0, -2.0], atol=0.06)
  np.testing.assert_allclose(z.std(0), [1.0, 2 * np.exp(-2.0)], rtol=0.05)


def test_a_settled_gate_is_a_scale():
  gate = layers.Gate(3, scale=[0.5, 2.0, -1.0], noisy=False)
  assert [path for path, _ in nnx.to_flat_state(nnx.state(gate))] == [('mu',)]
  assert float(gate.kl()) == 0.0
  np.testing.assert_array_equal(gate.keep(), np.ones(3))
  np.testing.assert_array_equal(gate.open_mask(), np.ones(3, bool))
  np.testing.assert_allclose(
    layers.sample([gate], jax.random.key(0), 7)[0], gate.mean()
  )
  np.testing.assert_allclose(gate.mean(), [[0.5, 2.0, -1.0]])


# -- GateIndex ----------------------------------------------------------------

A = jnp.asarray([[2.0, 3.0], [4.0, 5.0]])
B = jnp.asarray([[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]])


@pytest.mark.parametrize(
  ('gates', 'index', 'want'),
  [
    ((1,), None, [[6, 7, 8], [9, 10, 11]]),
    # A flatten of two positions reads each channel twice.
    ((0,), [1, 2, 1, 2], [[2, 3, 2, 3], [4, 5, 4, 5]]),
    # A concatenation, in either order.
    ((0, 1), [1, 2, 3, 4, 5], [[2, 3, 6, 7, 8], [4, 5, 9, 10, 11]]),
    ((1, 0), [4, 5, 1, 2, 3], [[2, 3, 6, 7, 8], [4, 5, 9, 10, 11]]),
    # Channels without a gate pass.
    ((0,), [0, 2, 0], [[1, 3, 1], [1, 5, 1]]),
  ],
)
def test_pick(gates, index, want):
  index = None if index is None else np.asarray(index)
  got = layers.GateIndex(gates, index).pick([A, B])
  np.testing.assert_array_equal(got, np.asarray(want, np.float32))


# -- Operands -----------------------------------------------------------------


def _linear(gate=None, weight=None, act=None, n=2, feature_axis=-1):
  """A linear layer that carries operands."""
  layer = nnx.Linear(n, 4, rngs=nnx.Rngs(0))
  layer.promote_dtype = nnx.data(
    layers.Operands(
      'a/b',
      weight=weight,
      act=act,
      gate=gate,
      feature_axis=feature_axis,
      promote=layer.promote_dtype,
    )
  )
  return layer


WHOLE = layers.GateIndex((0,), None)


def _gated(layer, values):
  """The layer as its Compressed model calls it."""
  layer.promote_dtype.values = layers.GateValue(values)
  return layer


def test_a_gated_layer_outside_of_its_model_raises():
  with pytest.raises(RuntimeError, match=r'layer a/b .*Compressed'):
    _linear(WHOLE)(jnp.ones((2, 2)))


def test_a_layer_without_gate_works_alone():
  plain = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
  x = _normal(3, 2)
  np.testing.assert_array_equal(_linear()(x), plain(x))


def test_gates_scale_inputs_then_both_operands_are_quantized():
  weight = _quantizer(0.7, 3, fixed=True)
  act = _quantizer(3.0, 2, signed=False, fixed=True)
  layer = _linear(WHOLE, weight, act)
  x = jnp.abs(_normal(2, 2))
  got = _gated(layer, A)(x)
  kernel = weight(layer.kernel[...])
  np.testing.assert_allclose(got, act(x * A) @ kernel, rtol=1e-6)
  assert not np.allclose(got, (act(x) * A) @ kernel)


def test_a_batch_folded_with_tokens_repeats_each_example():
  x = jnp.ones((6, 2))  # two examples of three tokens
  with layers.INPUTS.open() as taps:
    _gated(_linear(WHOLE), A)(x)
  np.testing.assert_array_equal(taps['a/b'][0], np.repeat(A, 3, axis=0))


@pytest.mark.parametrize('leading', [1, 3, 5])
def test_a_batch_that_is_not_the_leading_axis_is_refused(leading):
  x = jnp.ones((leading, 2, 2))  # as time, with the batch after it
  message = f'layer a/b .* has {leading} entries, of a batch of 2 examples'
  with pytest.raises(ValueError, match=message):
    _gated(_linear(WHOLE), A)(x)


def test_a_single_example_of_a_batch_is_refused():
  with pytest.raises(ValueError, match=r'a/b gets a single example, as under'):
    jax.vmap(_gated(_linear(WHOLE), A))(jnp.ones((2, 2)))


def test_the_feature_axis_need_not_be_the_last():
  x = jnp.ones((2, 2, 5))
  layer = _linear(WHOLE, n=5, feature_axis=-2)
  with layers.INPUTS.open() as taps:
    _gated(layer, A)(x)
  want = np.broadcast_to(np.asarray(A)[:, :, None], x.shape)
  np.testing.assert_array_equal(taps['a/b'][0], want)


def test_half_precision_inputs_stay_in_it():
  x = jnp.ones((2, 2), jnp.bfloat16)
  layer = _linear(WHOLE, act=_quantizer())
  layer.kernel = nnx.Param(layer.kernel[...].astype(jnp.bfloat16))
  layer.bias = nnx.Param(layer.bias[...].astype(jnp.bfloat16))
  assert _gated(layer, A)(x).dtype == jnp.bfloat16


def test_tap_collects_every_call_gated_and_not_quantized():
  layer = _linear(WHOLE, act=_quantizer())
  x, y = _normal(2, 2), _normal(1, 2)
  _gated(layer, A[:1])
  with layers.INPUTS.open() as taps:
    layer(x)
    layer(y)
  layer(x)
  assert list(taps) == ['a/b']
  want = [np.asarray(v) * np.asarray(A[:1]) for v in (x, y)]
  assert len(taps['a/b']) == 2
  for got, value in zip(taps['a/b'], want):
    np.testing.assert_array_equal(got, value)


def test_tap_ends_with_an_error():
  layer = _linear()
  with contextlib.suppress(ZeroDivisionError), layers.INPUTS.open() as taps:
    raise ZeroDivisionError
  layer(jnp.ones((2, 2)))
  assert taps == {}
