"""Each float operation is rounded by itself, whatever a compiler would do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import taps
from djpq_jax.integer import reproducible


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def affine(x, factor, summand):
  return x * factor + summand


def test_a_product_is_rounded_before_it_is_added():
  x, factor, summand = (normal(seed, 4096) for seed in range(3))
  found = jax.jit(reproducible.reproducible(affine))(x, factor, summand)
  np.testing.assert_array_equal(found, x * factor + summand)


def test_a_compiler_would_fuse_them():
  """Else the test above would show nothing."""
  if jax.default_backend() != 'cpu':
    pytest.skip('other compilers than that of CPUs may not')
  x, factor, summand = (normal(seed, 4096) for seed in range(3))
  fused = jax.jit(affine)(x, factor, summand)
  assert np.any(np.asarray(fused) != x * factor + summand)


def test_products_of_constants_are_not_merged():
  x = normal(0, 4096)
  twice = lambda x: (x * np.float32(0.1)) * np.float32(0.7)
  found = jax.jit(reproducible.reproducible(twice))(x)
  np.testing.assert_array_equal(found, (x * np.float32(0.1)) * np.float32(0.7))


@pytest.mark.parametrize('sizes', [(7, 7), (8, 8), (1, 5), (1, 1)])
def test_sums_have_an_order(sizes):
  def halves(x):
    """Adds the second half of an axis to the first, until one is left."""
    for axis in (1, 2):
      while x.shape[axis] > 1:
        half = (x.shape[axis] + 1) // 2
        first, second = np.split(x, [half], axis)
        missing = [
          (0, half - second.shape[a] if a == axis else 0) for a in range(4)
        ]
        missing = [m if a == axis else (0, 0) for a, m in enumerate(missing)]
        x = first + np.pad(second, missing)
    return x[:, 0, 0]

  x = normal(1, 3, *sizes, 4)
  run = jax.jit(reproducible.reproducible(lambda x: x.sum((1, 2))))
  np.testing.assert_array_equal(run(x), halves(x))


def test_a_mean_is_a_sum_times_a_number():
  x = normal(2, 64, 7, 9)
  run = jax.jit(reproducible.reproducible(lambda x: x.mean(1)))
  total = jax.jit(reproducible.reproducible(lambda x: x.sum(1)))(x)
  wanted = np.asarray(total) * (np.float32(1) / np.float32(7))
  np.testing.assert_array_equal(run(x), wanted)


def test_inner_programs_are_reached():
  @jax.custom_jvp
  def inner(x, factor, summand):
    return jax.jit(affine)(x, factor, summand)

  inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[0]))
  x, factor, summand = (normal(seed, 4096) for seed in range(3))
  found = jax.jit(reproducible.reproducible(inner))(x, factor, summand)
  np.testing.assert_array_equal(found, x * factor + summand)


def test_control_flow_and_empty_sums_stay():
  def loop(x, empty):
    total = jax.lax.fori_loop(0, 3, lambda _, y: y * 2 + x, x)
    return total, empty.sum(0), jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

  x = normal(3, 5)
  empty = np.zeros((0, 2), np.float32)
  wanted = loop(x, empty)
  found = reproducible.reproducible(loop)(x, empty)
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_arguments_that_are_no_arrays():
  def power(x, *, n, names):
    assert names == ['a']
    return x if n is None else functools.reduce(jnp.multiply, [x] * n)

  run = reproducible.reproducible(power)
  x = normal(4, 6)
  np.testing.assert_array_equal(run(x, n=3, names=['a']), x * x * x)
  np.testing.assert_array_equal(run(x, n=None, names=['a']), x)


def test_taps_see_what_is_inside():
  tap = taps.Tap('test_reproducible')

  def model(x):
    tap.see('layer', x + 1)
    return x * 2

  @jax.jit
  def run(x):
    with tap.open() as seen:
      reproducible.reproducible(model)(x)
    return seen

  x = normal(5, 3)
  np.testing.assert_array_equal(run(x)['layer'][0], x + 1)
  assert not tap.is_open
