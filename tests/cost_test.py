"""The cost sums: exact counts, derivatives, and what closed gates cost."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import cost
from djpq_jax.ops import gate

SUMS = [cost.macs, cost.bops, cost.size_bits]


def _use(**changes):
  fields = dict(
    name='conv',
    macs=1000,
    weights=96,
    keep_in=1,
    keep_out=1,
    weight_bits=4,
    act_bits=8,
  )
  return cost.LayerUse(**(fields | changes))


def _two(half, quarter, bits=(4, 8)):
  return [
    _use(name='a', keep_out=half, weight_bits=bits[0], act_bits=8),
    _use(name='b', keep_in=half, keep_out=quarter, act_bits=bits[1]),
  ]


def test_sums_in_closed_form():
  uses = _two(fractions.Fraction(1, 2), fractions.Fraction(1, 4))
  assert cost.macs(uses) == 500 + 125
  assert cost.bops(uses) == 500 * 4 * 8 + 125 * 4 * 8
  assert cost.size_bits(uses) == 48 * 4 + 12 * 4
  assert cost.float_bops(uses) == 2000 * 1024


@pytest.mark.parametrize('f', SUMS)
def test_exact_input_gives_an_int_beyond_float_precision(f):
  big = 3 * 10**18 + 3
  third = fractions.Fraction(1, 3)
  got = f([_use(macs=big, weights=big, keep_in=third), _use()])
  one = f([_use(macs=10**18 + 1, weights=10**18 + 1), _use()])
  assert type(got) is int
  assert got == one


def test_small_integers_of_numpy_do_not_overflow():
  small = [_use(macs=np.int16(2**14), weight_bits=np.int8(4))] * 9
  plain = [_use(macs=2**14, weight_bits=4)] * 9
  for f in (*SUMS, cost.float_bops):
    assert type(f(small)) is int
    assert f(small) == f(plain)
  assert cost.relative(small) == cost.relative(plain)


@pytest.mark.parametrize('f', SUMS)
def test_a_sum_that_is_not_whole_raises(f):
  with pytest.raises(ValueError, match='not whole'):
    f([_use(macs=1, weights=1, keep_in=fractions.Fraction(1, 7))])


@pytest.mark.parametrize('f', SUMS)
@pytest.mark.parametrize('kind', [float, jnp.float32, jnp.bfloat16, np.float32])
def test_real_input_gives_a_float32_scalar(f, kind):
  half, quarter = fractions.Fraction(1, 2), fractions.Fraction(1, 4)
  got = f(_two(kind(0.5), kind(0.25)))
  assert isinstance(got, jax.Array)
  assert got.dtype == jnp.float32
  assert got.shape == ()
  assert float(got) == f(_two(half, quarter))


@pytest.mark.parametrize('f', SUMS)
def test_nothing_costs_nothing(f):
  assert f([]) == 0
  assert cost.float_bops([]) == 0


def test_large_networks_neither_overflow_nor_lose_digits():
  uses = [_use(macs=4 * 10**12, keep_in=jnp.float32(1.0))] * 50
  got = cost.bops(uses)
  np.testing.assert_allclose(got, 50 * 4e12 * 32, rtol=1e-5)
  baseline = cost.float_bops(uses)
  ratio = cost.relative_bops(uses, baseline)
  np.testing.assert_allclose(ratio, 32 / 1024, rtol=1e-5)


def test_relative_bops_of_exact_input_is_a_float():
  uses = _two(fractions.Fraction(1, 2), fractions.Fraction(1, 7))
  got = cost.relative_bops(uses, cost.float_bops(uses))
  assert isinstance(got, float)
  assert got == pytest.approx(32 * (500 + 1000 / 14) / (2000 * 1024))


def test_relative_bops_equals_the_ratio_and_its_gradient():
  def ratio(half, bits):
    uses = _two(half, 0.25, (bits, bits))
    return cost.relative_bops(uses, cost.float_bops(uses))

  def quotient(half, bits):
    uses = _two(half, 0.25, (bits, bits))
    return cost.bops(uses) / cost.float_bops(uses)

  np.testing.assert_allclose(ratio(0.5, 3.7), quotient(0.5, 3.7), rtol=1e-6)
  got = jax.grad(ratio, (0, 1))(0.5, 3.7)
  want = jax.grad(quotient, (0, 1))(0.5, 3.7)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('baseline', [0, -5])
def test_a_baseline_must_be_positive(baseline):
  with pytest.raises(ValueError, match='positive'):
    cost.relative_bops([_use()], baseline)


def test_gradients_in_closed_form():
  def total(keep_in, keep_out, weight_bits, act_bits):
    use = _use(
      keep_in=keep_in,
      keep_out=keep_out,
      weight_bits=weight_bits,
      act_bits=act_bits,
    )
    return cost.bops([use])

  args = 0.5, 0.25, 3.5, 6.5
  got = jax.grad(total, (0, 1, 2, 3))(*args)
  want = [float(total(*args)) / a for a in args]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_gradients_flow_through_the_record():
  use = _use(
    keep_in=jnp.float32(0.5),
    keep_out=jnp.float32(1.0),
    weight_bits=jnp.float32(4.0),
    act_bits=jnp.float32(8.0),
  )
  grad = jax.jit(jax.grad(lambda use: cost.bops([use])))(use)
  assert (grad.name, grad.macs, grad.weights) == ('conv', 1000, 96)
  np.testing.assert_allclose(grad.keep_in, 1000 * 32.0)


def test_a_record_is_a_pytree_with_static_counts():
  leaves = jax.tree.leaves(_use(keep_in=0.5, keep_out=0.25))
  assert leaves == [0.5, 0.25, 4, 8]


def test_jit_and_vmap():
  f = lambda bits: cost.bops(_two(0.5, 0.25, (bits, 8)))
  bits = jnp.asarray([2.0, 3.5, 8.0])
  want = jnp.stack([f(b) for b in bits])
  np.testing.assert_allclose(jax.jit(jax.vmap(f))(bits), want, rtol=1e-6)


@pytest.mark.parametrize(
  'field', ['keep_in', 'keep_out', 'weight_bits', 'act_bits']
)
def test_a_factor_that_is_not_a_scalar_raises(field):
  with pytest.raises(ValueError, match=r'scalar.*\(2,\)'):
    cost.bops([_use(**{field: jnp.ones(2)})])


@pytest.mark.parametrize('closed', ['keep_in', 'keep_out'])
def test_a_closed_layer_costs_nothing_and_passes_no_gradient(closed):
  def total(weight_bits, act_bits):
    use = _use(
      weight_bits=weight_bits, act_bits=act_bits, **{closed: jnp.float32(0)}
    )
    return cost.bops([use])

  assert float(total(4.0, 8.0)) == 0.0
  assert jax.grad(total, (0, 1))(4.0, 8.0) == (0.0, 0.0)
  for f in SUMS:
    assert f([_use(**{closed: 0})]) == 0


def test_gates_that_are_closed_cost_nothing_and_get_no_gradient():
  def total(mu):
    keep = jnp.mean(gate.keep_prob(mu, jnp.zeros(4)))
    return cost.bops([_use(keep_out=keep)])

  dead, open_ = jnp.zeros(4), jnp.asarray([0.0, 0.0, 1e9, 1e9])
  np.testing.assert_allclose(total(dead), 0.0, atol=1e-12)
  np.testing.assert_array_equal(jax.grad(total)(dead), jnp.zeros(4))
  # Half of the gates open: half of the channels, half of the cost.
  np.testing.assert_allclose(total(open_), 16_000.0, rtol=1e-6)


def test_a_gate_between_the_extremes_gets_a_gradient_that_closes_it():
  def total(mu):
    keep = jnp.mean(gate.keep_prob(mu, jnp.zeros(2)))
    return cost.bops([_use(keep_out=keep)])

  grad = jax.grad(total)(jnp.asarray([0.9, -1.1]))
  np.testing.assert_array_equal(jnp.sign(grad), [1.0, -1.0])


def test_depthwise_shrinks_once():
  half = fractions.Fraction(1, 2)
  assert cost.macs([_use(keep_in=half, keep_out=1)]) == 500
