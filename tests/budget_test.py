"""The controller on plants that are simpler than a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import budget

# Steps are counted in int32, as in a training loop.
pytestmark = pytest.mark.standard_promotion


def _controller(**changes):
  settings = dict(budget=0.002, start=0.06, steps=400) | changes
  return budget.Controller(**settings)


def _run(controller, *, gain, pull=0.0):
  """Follows a plant: log BOPs fall by gain * strength - pull in each step.

  Returns:
    (relative BOPs, strength, log strength kept), one per step.
  """

  def advance(carry, step):
    control, log_bops = carry
    strength, control = controller.update(control, step, jnp.exp(log_bops))
    after = log_bops - gain * strength + pull
    return (control, after), (jnp.exp(after), strength, control.log_strength)

  start = jnp.log(jnp.float32(controller.start))
  steps = jnp.arange(controller.steps)
  return jax.lax.scan(advance, (controller.init(), start), steps)[1]


def test_its_state_stays_float32_with_64_bits_on():
  with jax.enable_x64(True):
    controller = _controller()
    control = controller.init()
    strength, after = controller.update(
      control, jnp.int32(3), jnp.float64(0.05)
    )
  dtypes = [x.dtype for x in (*jax.tree.leaves((control, after)), strength)]
  assert dtypes == [jnp.float32] * 3


@pytest.mark.parametrize('target', [0.02, 0.002])
@pytest.mark.parametrize('gain', [0.02, 0.2, 2.0])
@pytest.mark.parametrize('pull', [0.004, 0.02])
def test_a_plant_ends_near_the_budget(target, gain, pull):
  relative, _, _ = _run(_controller(budget=target), gain=gain, pull=pull)
  # What is missing the allocation settles, in whole channels and bits.
  np.testing.assert_allclose(relative[-40:], target, rtol=0.25)


@pytest.mark.parametrize('gain', [0.02, 0.2, 2.0])
def test_a_plant_that_never_comes_back_is_not_driven_far_below(gain):
  relative, _, _ = _run(_controller(), gain=gain)
  assert 0.5 * 0.002 < float(relative[-1]) <= 0.002


def test_the_tightest_of_several_budgets():
  costs = {'bops': jnp.float32(0.02), 'macs': 0.5, 'weights': jnp.float32(0.3)}

  def tightest(**budgets):
    return float(budget.tightest(costs, budgets))

  assert tightest(bops=0.01) == np.float32(0.02)  # itself, to the bit
  # Three times over is the weights' load: as far over as BOPs of 3 %.
  assert tightest(bops=0.01, weights=0.1) == pytest.approx(0.03, rel=1e-3)
  assert tightest(weights=0.1, bops=0.01) == pytest.approx(0.3, rel=1e-3)
  assert tightest(bops=0.01, weights=0.9) == pytest.approx(0.02, rel=1e-3)


def test_all_tight_budgets_get_pressure():
  def loss(logs):
    costs = {'bops': jnp.exp(logs[0]), 'weights': jnp.exp(logs[1])}
    return jnp.log(budget.tightest(costs, {'bops': 0.01, 'weights': 0.1}))

  slope = jax.grad(loss)
  logs = jnp.log(jnp.float32([0.02, 0.2]))
  np.testing.assert_allclose(slope(logs), [0.5, 0.5], rtol=1e-4)
  apart = slope(logs + jnp.float32([0.3, 0.0]))
  assert apart[0] > 0.99
  np.testing.assert_allclose(apart.sum(), 1, rtol=1e-4)


def test_strength_stays_in_bounds_and_answers_in_the_right_direction():
  low, high = budget.LOG_STRENGTH_RANGE
  controller = _controller()
  _, strength, kept = _run(controller, gain=0.0)  # nothing helps: push
  assert np.all(np.diff(kept) >= 0)
  np.testing.assert_allclose(kept[-1], high, rtol=1e-6)
  assert np.max(strength) <= np.exp(high + controller.proportional) * 1.001
  _, strength, kept = _run(controller, gain=0.0, pull=-0.5)  # too far: let go
  assert kept[-1] < kept[0]
  assert np.min(kept) >= low - 1e-6
  assert np.min(strength) >= np.exp(low - controller.proportional) * 0.999


def test_on_target_the_strength_stays():
  controller = _controller(initial_strength=0.05)
  on_target = controller.target(17)
  strength, control = controller.update(controller.init(), 17, on_target)
  np.testing.assert_allclose(strength, 0.05, rtol=1e-5)
  np.testing.assert_allclose(jnp.exp(control.log_strength), 0.05, rtol=1e-5)


def test_the_target_falls_steadily_and_then_rests():
  controller = _controller(budget=0.01, start=0.04, steps=100, ramp=0.5)
  target = np.asarray(controller.target(jnp.arange(101)))
  np.testing.assert_allclose(target[[0, 25, 50]], [0.04, 0.02, 0.01], rtol=1e-5)
  np.testing.assert_allclose(
    target[:51] / target[0], 0.25 ** (np.arange(51) / 50), rtol=1e-5
  )
  assert np.all(np.diff(target) <= 0)
  np.testing.assert_allclose(target[50:], 0.01, rtol=1e-5)


def test_a_model_that_is_below_its_budget_is_not_asked_to_grow():
  controller = _controller(budget=0.05, start=0.01)
  target = controller.target(jnp.arange(400))
  np.testing.assert_allclose(target, 0.05, rtol=1e-5)


def test_the_strength_is_a_constant_to_the_gradient():
  controller = _controller()

  def strength(relative):
    return controller.update(controller.init(), 3, relative)[0]

  assert float(jax.grad(strength)(0.01)) == 0.0


@pytest.mark.parametrize('bad', [0.0, -0.1, 1.0, 2.0, float('nan')])
def test_a_budget_is_a_fraction(bad):
  with pytest.raises(ValueError, match='fraction of what the float32 model'):
    _controller(budget=bad)


def test_without_a_ramp_the_target_is_the_budget_at_once():
  controller = _controller(ramp=0.0)
  control = controller.init()
  for step in range(3):
    strength, control = controller.update(control, jnp.int32(step), 0.01)
    assert jnp.isfinite(strength)
  np.testing.assert_allclose(controller.target(1), 0.002, rtol=1e-5)
