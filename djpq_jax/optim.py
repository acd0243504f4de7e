"""One optimizer per kind of variable: weights, quantizers, gates."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from djpq_jax import layers

KINDS = {'gates': layers.GateParam, 'quantizers': layers.QuantParam}
KINDS |= {'weights': nnx.Param}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """How one training phase optimizes.

  Attributes:
    name: 'adam' (decoupled weight decay) or 'sgd' (Nesterov momentum).
    learning_rate: peak rate of the weights.
    weight_decay: decay of kernels; biases and norm scales have none.
    momentum: of sgd.
    warmup: fraction of the steps with a linearly rising rate.
    anneal: whether the rate of the weights falls to zero after that.
    quantizer_rate: peak Adam rate of log clips, steps and exponents.
    gate_rate: peak Adam rate of the log variances of gates.
    clip_norm: largest global norm of the weights' gradients, > 0.
    decay_gates: whether the rates of gates and quantizers fall as the
      weights' do.
  """

  name: str = 'adam'
  learning_rate: float = 1e-3
  weight_decay: float = 1e-4
  momentum: float = 0.9
  warmup: float = 0.05
  anneal: bool = True
  quantizer_rate: float = 1e-2
  gate_rate: float = 3e-2
  clip_norm: float = 5.0
  decay_gates: bool = True

  def __post_init__(self):
    if self.name not in ('adam', 'sgd'):
      raise ValueError(
        f"optimizer name must be 'adam' or 'sgd', got {self.name!r}"
      )
    if not self.learning_rate > 0:
      raise ValueError(
        f'learning_rate must be positive, got {self.learning_rate}'
      )
    if not self.clip_norm > 0:  # no gradient at all would be left
      raise ValueError(
        f'clip_norm must be positive, and large for none; got {self.clip_norm}'
      )
    if not 0 <= self.momentum < 1:
      raise ValueError(f'momentum must be from 0 to below 1: {self.momentum}')


def split(model) -> tuple[nnx.GraphDef, dict[str, Any], Any]:
  """Splits a model by what its variables are.

  Returns:
    (graphdef, {'gates', 'quantizers', 'weights': pure states}, the rest:
    batch statistics, random states, integers).
  """
  graphdef, *states = nnx.split(model, *KINDS.values(), ...)
  *kinds, rest = map(nnx.as_pure, states)
  return graphdef, dict(zip(KINDS, kinds)), rest


def merge(graphdef, params: Mapping[str, Any], rest):
  """Puts back together what `split` took apart."""
  return nnx.merge(graphdef, *(params[k] for k in KINDS), rest)


def cosine(rate: float, steps: int, warmup: float) -> optax.Schedule:
  """A linear rise, then half a cosine down to zero at `steps`."""
  rise = round(warmup * steps)
  return optax.warmup_cosine_decay_schedule(
    rate / 10 if rise else rate, rate, rise, max(steps, rise + 1)
  )


def constant(rate: float, steps: int, warmup: float) -> optax.Schedule:
  """The same rise, then the rate itself."""
  rise = round(warmup * steps)
  return optax.linear_schedule(rate / 10 if rise else rate, rate, rise)


def make(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """One chain per kind, for params as `split` gives them."""
  schedule = (cosine if config.anneal else constant)(
    config.learning_rate, steps, config.warmup
  )
  decay = optax.add_decayed_weights(config.weight_decay, mask=_is_kernel)
  if config.name == 'adam':
    rule = [_flattened(optax.scale_by_adam()), decay]
  else:
    rule = [decay, optax.trace(config.momentum, nesterov=True)]

  def adam(rate):
    if config.decay_gates:
      rate = cosine(rate, steps, config.warmup)
    return _flattened(optax.adam(rate))

  chains = {
    'weights': optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      *rule,
      optax.scale_by_learning_rate(schedule),
    ),
    'quantizers': adam(config.quantizer_rate),
    'gates': adam(config.gate_rate),
  }
  return optax.multi_transform(chains, {k: k for k in chains})


def _flattened(inner: optax.GradientTransformation):
  """Runs `inner` on one vector: hundreds of small arrays compile slowly."""
  flat = optax.flatten(inner)

  def init(params):
    return flat.init(params) if jax.tree.leaves(params) else optax.EmptyState()

  def update(updates, state, params=None):
    if not jax.tree.leaves(updates):
      return updates, state
    return flat.update(updates, state, params)

  return optax.GradientTransformation(init, update)


def _is_kernel(params):
  return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
