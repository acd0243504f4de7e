"""The gates of channel groups: which channels stay, learned with noise."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax.ops import gate

OPEN_LOG_ALPHA = 9.0  # log alpha of a new gate, as in VIBNet's code


class GateParam(nnx.Param):
  """The log variance of a group's gates, one per channel."""


class GateMean(nnx.Param):
  """The mean of a group's gates: a scale per channel, learned like a weight."""


class Gate(nnx.Module):
  """The gates of one channel group (variational information bottleneck).

  Args:
    size: channels of the group.
    min_open: channels that stay open whatever happens, at least 1.
    scale: means to begin with, [size]; 1 by default.
    noisy: whether the gates are still searched for; else they are plain
      learned scales of the channels that were kept.
  """

  def __init__(
    self, size: int, *, min_open: int = 1, scale=None, noisy: bool = True
  ):
    self.size = size
    self.min_open = max(1, min_open)
    mu = np.ones(size) if scale is None else scale
    self.mu = GateMean(jnp.asarray(mu, jnp.float32))
    self.log_sigma2 = nnx.data(None)
    if noisy:
      self.log_sigma2 = GateParam(jnp.full(size, -OPEN_LOG_ALPHA, jnp.float32))

  def log_alpha(self):
    """Signal over noise of each channel, log(mu^2 / sigma^2), [size]."""
    assert self.log_sigma2 is not None
    return gate.log_alpha(self.mu[...], self.log_sigma2[...])

  def open_mask(self, threshold: float = 0.0):
    """Which channels are open, bool [size]: never fewer than `min_open`."""
    if self.log_sigma2 is None:
      return jnp.ones((self.size,), bool)
    score = jax.lax.stop_gradient(self.log_alpha())
    floor = jax.lax.top_k(score, min(self.min_open, self.size))[0][-1]
    return (score > threshold) | (score >= floor)

  def kl(self):
    """KL of the gates to their scale-free prior, per group [VIBNet]."""
    if self.log_sigma2 is None:
      return jnp.zeros(())
    return gate.gate_kl(self.mu[...], self.log_sigma2[...])

  def keep(self):
    """Open (1) or closed (0) per channel, [size], with a slope that reaches it.

    A sigmoid of log alpha is flat where a gate begins (its slope at 9 is
    1e-4), so a cost could never reach an open gate.  The value here is the
    hard mask; the derivative is that of softplus(log alpha), the gate's
    information in nats up to a factor of 2, times the group's open share: half
    a channel per e-fold of alpha where a gate of a whole group closes.  The
    scale was chosen among 0.11, 0.4 and 1 on digits.  It reaches the variance
    alone: shrinking the mean would take the signal away where noise only asks
    how much of it is needed, and a network can die of it.  Our choice.
    """
    if self.log_sigma2 is None:
      return jnp.ones((self.size,))
    hard = self.open_mask().astype(jnp.float32)
    assert self.log_sigma2 is not None
    mu = jax.lax.stop_gradient(self.mu[...])
    log_alpha = gate.log_alpha(mu, self.log_sigma2[...])
    # Widths multiply in the cost, so where one group shrinks its neighbours
    # become free; the share that is open keeps a small group from running away.
    soft = jnp.mean(hard) * jax.nn.softplus(log_alpha)
    return hard + (soft - jax.lax.stop_gradient(soft))

  def mean(self):
    """The gates without noise, closed ones at 0, [1, size]."""
    return (self.mu[...] * self.open_mask().astype(jnp.float32))[None]


def sample(gates: Sequence[Gate], key, batch: int) -> list[jax.Array]:
  """Draws the gates of `batch` examples, [batch, size] for each group.

  All groups are one draw: a generator for each would take long to compile.
  Gates that are settled have no noise: they are at their means, [1, size].
  """
  noise = [g.log_sigma2 for g in gates if g.log_sigma2 is not None]
  if len(noise) < len(gates) or not gates:
    return [g.mean() for g in gates]
  mu = jnp.concatenate([g.mu[...] for g in gates])
  log_sigma2 = jnp.concatenate([v[...] for v in noise])
  with jax.named_scope('gate'):
    z = gate.sample_gate(key, mu, log_sigma2, (batch, mu.size))
  ends = np.cumsum([g.size for g in gates])
  return jnp.split(z, ends[:-1], axis=1)
