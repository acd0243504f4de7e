"""Reaches a stated budget during training, without coefficient search.

The strength of the cost's term is a Lagrange multiplier.  A target falls
geometrically from the model's first relative cost to the budget, and a
proportional-integral controller on the logarithm of the multiplier follows
it.  What is missing at the end `allocate` settles exactly, in whole channels
and bits.
"""

from collections.abc import Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp

SHARPNESS = 20.0  # of the maximum over budgets
LOG_STRENGTH_RANGE = (math.log(1e-4), math.log(10.0))


def tightest(relative: Mapping[str, jax.Array], budgets: Mapping[str, float]):
  """One relative cost that stands for several with a budget each.

  It is that of the first budget which would be as far over it as the furthest
  of all is over its own; a smooth maximum, so that all that are nearly as far
  over are pushed down.  With one budget it is just that cost.

  Args:
    relative: relative costs by name, float32 scalars, as `cost.relative` has
      them.
    budgets: the largest each may be, by name; at least one.

  Returns:
    float32 scalar, to be led to `next(iter(budgets.values()))`.

  >>> relative = {'bops': jnp.float32(0.02), 'weights': jnp.float32(0.3)}
  >>> float(tightest(relative, {'bops': 0.01, 'weights': 0.1})).__round__(4)
  0.03
  """
  (first, budget), *others = budgets.items()
  if not others:
    return relative[first]
  over = jnp.stack([jnp.log(relative[k] / b) for k, b in budgets.items()])
  return budget * jnp.exp(jax.nn.logsumexp(SHARPNESS * over) / SHARPNESS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
  """The controller's state: the logarithm of the strength, float32 scalar."""

  log_strength: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controller:
  """Follows a falling target of a relative cost, as that of BOPs.

  Attributes:
    budget: relative cost to end at, in (0, 1).
    start: relative cost to begin with.
    steps: steps of the search.
    ramp: fraction of the steps after which the target is the budget.
    initial_strength: strength to begin with.
    integral: e-folds of strength per unit of log error, over the whole search.
    proportional: e-folds of strength per unit of log error, at once.
  """

  budget: float
  start: float
  steps: int
  ramp: float = 0.7
  initial_strength: float = 0.03
  integral: float = 40.0
  proportional: float = 2.0

  def __post_init__(self):
    if not 0 < self.budget < 1:
      raise ValueError(
        'the budget is a fraction of what the float32 model costs, between 0 '
        f'and 1; got {self.budget}'
      )

  def init(self) -> Control:
    """Returns the state before the first step."""
    strength = jnp.float32(math.log(self.initial_strength))
    return Control(log_strength=strength)

  def target(self, step):
    """Relative cost aimed at in `step`."""
    step = jnp.asarray(step, jnp.float32)
    done = jnp.minimum(step / max(self.ramp * self.steps, 1.0), 1.0)
    low, high = math.log(self.budget), math.log(max(self.start, self.budget))
    return jnp.exp(high + (low - high) * done)

  def update(self, control: Control, step, relative):
    """Returns (strength for this step, the next state)."""
    relative = jnp.asarray(relative, jnp.float32)  # with 64 bits on, too
    error = jnp.log(relative / self.target(step))
    error = jax.lax.stop_gradient(jnp.clip(error, -1.0, 1.0))
    total = control.log_strength + self.integral / self.steps * error
    total = jnp.clip(total, *LOG_STRENGTH_RANGE)
    now = jnp.clip(total + self.proportional * error, *LOG_STRENGTH_RANGE)
    return jnp.exp(now), Control(log_strength=total)
