"""Multiplicative channel gates with learned noise (information bottleneck).

A gate is z = mu + sigma * eps with eps ~ N(0, 1).  What it lets through is
measured by alpha = mu**2 / sigma**2: noise drowns the channel as alpha falls,
and the channel is closed, so removable, where log(alpha) <= threshold.

Formulas: github.com/zhuchen03/VIBNet (Dai et al., arXiv 1802.10399).  That the
keep probability is a sigmoid of log(alpha) is our choice.

`log_sigma2` is log(sigma**2).  All arithmetic is float32.
"""

import jax
import jax.numpy as jnp

# Added to mu**2 inside the logarithm: keeps log(alpha) finite at mu = 0, where
# it is about -55 - log_sigma2.
_TINY = 1e-24


def sample_gate(key, mu, log_sigma2, shape):
  """Draws gates z = mu + eps * exp(log_sigma2 / 2), eps ~ N(0, 1)  [VIBNet].

  Args:
    key: JAX random key.
    mu: mean, [C].
    log_sigma2: logarithm of the variance, broadcasts with mu.
    shape: shape of the sample, static; its last dimension is C, for example
      (N, 1, 1, C) for one gate per example and channel.

  Returns:
    Array of `shape`, in mu's dtype; differentiable in mu and log_sigma2.

  Raises:
    TypeError: mu is not floating.
    ValueError: mu or log_sigma2 do not broadcast to `shape`, or the last
      dimension of `shape` is not C.

  >>> z = sample_gate(jax.random.key(0), jnp.ones(3), jnp.zeros(3), (2, 3))
  >>> z.shape
  (2, 3)
  """
  mu, shape = jnp.asarray(mu), tuple(shape)
  dtype = mu.dtype
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f'mu must be floating, not {dtype}')
  if mu.shape[-1:] != shape[-1:]:
    raise ValueError(f'mu of shape {mu.shape} does not end as shape {shape}')
  mu, log_sigma2 = _float32(mu, log_sigma2)
  try:
    mu = jnp.broadcast_to(mu, shape)
    log_sigma2 = jnp.broadcast_to(log_sigma2, shape)
  except ValueError as error:
    raise ValueError(
      f'mu and log_sigma2 of common shape {mu.shape} do not broadcast to'
      f' {shape}'
    ) from error
  eps = jax.random.normal(key, shape, jnp.float32)
  return (mu + eps * jnp.exp(log_sigma2 / 2)).astype(dtype)


def log_alpha(mu, log_sigma2):
  """Log of the signal to noise ratio, log(mu**2 / sigma**2), in nats.

  Args:
    mu: mean, any shape.
    log_sigma2: logarithm of the variance, broadcasts with mu.

  Returns:
    float32 array of the common shape, finite also at mu = 0.

  Raises:
    ValueError: mu and log_sigma2 do not broadcast with each other.

  >>> float(log_alpha(1.0, -9.0))
  9.0
  """
  mu, log_sigma2 = _float32(mu, log_sigma2)
  return jnp.log(mu**2 + _TINY) - log_sigma2


def gate_kl(mu, log_sigma2):
  """Information that gates pass, 0.5 sum log(1 + mu**2 / sigma**2)  [VIBNet].

  Computed as a softplus of log(alpha), so that no alpha overflows.

  Args:
    mu: mean, any shape.
    log_sigma2: logarithm of the variance, broadcasts with mu.

  Returns:
    float32 scalar in nats, summed over all gates, with finite gradients.

  Raises:
    ValueError: mu and log_sigma2 do not broadcast with each other.

  >>> round(float(gate_kl(jnp.ones(2), jnp.zeros(2))), 4)
  0.6931
  """
  return 0.5 * jnp.sum(jax.nn.softplus(log_alpha(mu, log_sigma2)))


def keep_prob(mu, log_sigma2, threshold=0.0, temperature=1.0):
  """Soft count of a gate, sigmoid((log(alpha) - threshold) / temperature).

  The differentiable stand-in for `is_open`: above one half exactly where the
  gate is open  [our choice; in log(alpha) as alpha itself saturates].

  Args:
    mu: mean, any shape.
    log_sigma2: logarithm of the variance, broadcasts with mu.
    threshold: log(alpha) at which a gate closes, in nats; a scalar.
    temperature: width of the transition, > 0, in nats; a scalar.

  Returns:
    float32 array of the common shape in [0, 1], with finite gradients.

  Raises:
    ValueError: mu and log_sigma2 do not broadcast with each other.

  >>> float(keep_prob(1.0, 0.0))
  0.5
  """
  threshold = jnp.asarray(threshold, jnp.float32)
  temperature = jnp.asarray(temperature, jnp.float32)
  return jax.nn.sigmoid((log_alpha(mu, log_sigma2) - threshold) / temperature)


def is_open(mu, log_sigma2, threshold=0.0):
  """Whether a gate stays, log(mu**2 / sigma**2) > threshold  [VIBNet].

  At the default threshold a gate is closed where mu**2 <= sigma**2.

  Args:
    mu: mean, any shape.
    log_sigma2: logarithm of the variance, broadcasts with mu.
    threshold: log(alpha) at which a gate closes, in nats; a scalar.

  Returns:
    bool array of the common shape.

  Raises:
    ValueError: mu and log_sigma2 do not broadcast with each other.

  >>> is_open(jnp.array([1.0, 0.001, 0.0]), -9.0)
  Array([ True, False, False], dtype=bool)
  """
  return log_alpha(mu, log_sigma2) > jnp.asarray(threshold, jnp.float32)


def _float32(mu, log_sigma2):
  """Both as float32 arrays of their common shape."""
  mu = jnp.asarray(mu, jnp.float32)
  log_sigma2 = jnp.asarray(log_sigma2, jnp.float32)
  try:
    shape = jnp.broadcast_shapes(mu.shape, log_sigma2.shape)
  except ValueError as error:
    raise ValueError(
      f'mu of shape {mu.shape} and log_sigma2 of shape {log_sigma2.shape} do'
      ' not broadcast'
    ) from error
  return jnp.broadcast_to(mu, shape), jnp.broadcast_to(log_sigma2, shape)
