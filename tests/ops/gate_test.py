"""Gates against their closed forms, at the extremes, under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax.ops import gate

# From a dead mean to an immense one, from no noise to immense noise.
MU = [0.0, 1e-30, 1e-13, -1e-3, 1.0, -7.0, 1e6]
LOG_SIGMA2 = [-40.0, -9.0, 0.0, 9.0, 40.0]


def _grid():
  mu, log_sigma2 = np.meshgrid(MU, LOG_SIGMA2)
  return jnp.float32(mu.ravel()), jnp.float32(log_sigma2.ravel())


def test_sample_has_the_mean_and_the_noise():
  mu, log_sigma2 = jnp.asarray([1.0, -2.0, 0.0]), jnp.asarray([-2.0, 0.0, 1.0])
  z = gate.sample_gate(jax.random.key(0), mu, log_sigma2, (40_000, 3))
  np.testing.assert_allclose(jnp.mean(z, 0), mu, atol=0.03)
  sigma = jnp.exp(log_sigma2 / 2)
  np.testing.assert_allclose(jnp.std(z, 0), sigma, rtol=0.02)


def test_sample_is_mu_without_noise():
  mu = jnp.asarray([0.3, -0.7])
  z = gate.sample_gate(jax.random.key(0), mu, jnp.full(2, -200.0), (5, 1, 2))
  np.testing.assert_array_equal(z, jnp.broadcast_to(mu, (5, 1, 2)))


def test_sample_gradients_in_closed_form():
  mu, log_sigma2 = jnp.asarray([1.0, 2.0]), jnp.asarray([-1.0, 0.5])
  key, shape = jax.random.key(3), (8, 1, 1, 2)

  def total(mu, log_sigma2):
    return jnp.sum(gate.sample_gate(key, mu, log_sigma2, shape))

  d_mu, d_log = jax.grad(total, (0, 1))(mu, log_sigma2)
  noise = gate.sample_gate(key, mu, log_sigma2, shape) - mu[None, None, None]
  np.testing.assert_allclose(d_mu, [8.0, 8.0])
  np.testing.assert_allclose(d_log, jnp.sum(noise, (0, 1, 2)) / 2, rtol=1e-5)


def test_sample_broadcasts_and_keeps_the_dtype_of_mu():
  mu = jnp.ones(4, jnp.bfloat16)
  z = gate.sample_gate(jax.random.key(0), mu, 0.0, (3, 4))
  assert z.shape == (3, 4)
  assert z.dtype == jnp.bfloat16
  # One draw per channel and example: no two are the same.
  z = gate.sample_gate(jax.random.key(0), jnp.ones(4), 0.0, (3, 4))
  assert len(np.unique(z)) == 12


def test_sample_under_jit_vmap_and_equal_keys():
  mu, log_sigma2 = jnp.ones(4), jnp.zeros(4)
  keys = jax.random.split(jax.random.key(0), 3)
  sample = lambda key: gate.sample_gate(key, mu, log_sigma2, (2, 4))
  got = jax.jit(jax.vmap(sample))(keys)
  want = jnp.stack([sample(key) for key in keys])
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_kl_in_closed_form():
  mu, log_sigma2 = jnp.asarray([1.0, 0.3, 2.0]), jnp.asarray([-9.0, 0.0, 2.0])
  got = gate.gate_kl(mu, log_sigma2)
  want = 0.5 * np.sum(np.log1p(np.square(mu) / np.exp(log_sigma2)))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_kl_gradients_in_closed_form():
  mu, log_sigma2 = np.meshgrid([1e-6, 0.1, -1.0, 30.0], [-12.0, -1.0, 3.0])
  d_mu, d_log = jax.grad(gate.gate_kl, (0, 1))(
    jnp.float32(mu), jnp.float32(log_sigma2)
  )
  sigma2 = np.exp(log_sigma2)
  np.testing.assert_allclose(d_mu, mu / (sigma2 + mu**2), rtol=1e-5)
  want = -0.5 * mu**2 / (sigma2 + mu**2)
  np.testing.assert_allclose(d_log, want, rtol=1e-5)


def test_kl_of_tiny_and_huge_alpha():
  small = gate.gate_kl(jnp.float32(1e-6), jnp.float32(0.0))
  np.testing.assert_allclose(small, 0.5e-12, rtol=1e-5)
  huge = gate.gate_kl(jnp.float32(1e6), jnp.float32(-200.0))
  np.testing.assert_allclose(huge, np.log(1e6) + 100, rtol=1e-6)


@pytest.mark.parametrize(
  'f', [gate.gate_kl, gate.log_alpha, gate.keep_prob, gate.sample_gate]
)
def test_values_and_gradients_are_finite(f):
  mu, log_sigma2 = _grid()

  def total(mu, log_sigma2):
    if f is gate.sample_gate:
      return jnp.sum(f(jax.random.key(0), mu, log_sigma2, (2, *mu.shape)))
    return jnp.sum(f(mu, log_sigma2))

  value, grads = jax.value_and_grad(total, (0, 1))(mu, log_sigma2)
  assert bool(jnp.isfinite(value))
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)


def test_log_alpha_in_closed_form():
  got = gate.log_alpha(jnp.asarray([1.0, -0.1, 5.0]), -9.0)
  want = 2 * np.log([1.0, 0.1, 5.0]) + 9
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('threshold', [-3.0, 0.0, 2.0])
def test_keep_prob_in_closed_form(threshold, temperature):
  mu, log_sigma2 = jnp.asarray([1.0, 0.1, 0.01]), jnp.asarray([0.0, -4.0, -9.0])
  got = gate.keep_prob(mu, log_sigma2, threshold, temperature)
  alpha = np.square(np.float64(mu)) / np.exp(np.float64(log_sigma2))
  want = 1 / (1 + (alpha / np.exp(threshold)) ** (-1 / temperature))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('threshold', [-3.0, 0.0, 2.0])
def test_keep_prob_is_above_half_where_open(threshold):
  mu, log_sigma2 = _grid()
  keep = gate.keep_prob(mu, log_sigma2, threshold, 2.0)
  is_open = gate.is_open(mu, log_sigma2, threshold)
  assert is_open.dtype == jnp.bool_
  np.testing.assert_array_equal(keep > 0.5, is_open)
  assert 0 < int(jnp.sum(is_open)) < is_open.size


def test_a_gate_is_closed_where_noise_is_no_less_than_the_mean():
  mu = jnp.asarray([0.0, 0.5, -1.0, 1.01, -2.0])
  got = gate.is_open(mu, jnp.zeros(5))
  np.testing.assert_array_equal(got, [False, False, False, True, True])


def test_keep_prob_gradient_reopens_with_the_sign_of_mu():
  mu = jnp.asarray([-0.5, 0.5])
  grad = jax.grad(lambda mu: jnp.sum(gate.keep_prob(mu, 0.0)))(mu)
  np.testing.assert_array_equal(jnp.sign(grad), [-1.0, 1.0])


@pytest.mark.parametrize('f', [gate.log_alpha, gate.keep_prob])
def test_broadcasting_dtype_jit_and_vmap(f):
  mu = jnp.linspace(0.1, 2.0, 6, dtype=jnp.bfloat16).reshape(2, 3)
  log_sigma2 = jnp.asarray([-9.0, 0.0, 1.0], jnp.bfloat16)
  out = f(mu, log_sigma2)
  assert out.shape == (2, 3)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(jax.jit(f)(mu, log_sigma2), out, rtol=1e-5)
  mapped = jax.vmap(f, (0, None))(mu, log_sigma2)
  np.testing.assert_allclose(mapped, out, rtol=1e-5)
  grad = jax.grad(lambda m: jnp.sum(f(m, log_sigma2)))(mu)
  assert grad.dtype == jnp.bfloat16


def test_what_does_not_broadcast_raises_with_shapes():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r'\(3,\) does not end as.*\(2, 4\)'):
    gate.sample_gate(key, jnp.ones(3), jnp.zeros(3), (2, 4))
  with pytest.raises(TypeError, match='mu must be floating, not int32'):
    gate.sample_gate(key, jnp.arange(3), jnp.zeros(3), (2, 3))
  with pytest.raises(ValueError, match=r'\(3,\).*\(2,\)'):
    gate.gate_kl(jnp.ones(3), jnp.zeros(2))
  with pytest.raises(ValueError, match=r'\(5, 3\).*\(2, 3\)'):
    gate.sample_gate(key, jnp.ones(3), jnp.zeros((5, 3)), (2, 3))
