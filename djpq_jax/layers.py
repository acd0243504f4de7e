"""Quantizers, gates and the operand hook that puts them into a layer.

Flax layers that multiply and accumulate call `promote_dtype` on
`(inputs, kernel, bias)` right before they do; `Operands` takes that place,
gates and quantizes the input, and quantizes the kernel.  The gates belong to
channel groups, not to layers, so `Compressed` draws them once per call and
hands each hook its own.
"""

from collections.abc import Callable, Sequence
import contextlib
import contextvars
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax.ops import gate
from djpq_jax.ops import quantize

OPEN_LOG_ALPHA = 9.0  # log alpha of a new gate, as in VIBNet's code
EXPONENT_RANGE = (0.5, 2.0)


class QuantParam(nnx.Param):
  """A learned quantizer parameter: log clip, log step or log exponent."""


class GateParam(nnx.Param):
  """The log variance of a group's gates, one per channel."""


class GateMean(nnx.Param):
  """The mean of a group's gates: a scale per channel, learned like a weight."""


class GateValue(nnx.Variable):
  """The gates of a layer's input during one call, [1 or B, channels]."""


class IntegerParam(nnx.Variable):
  """A kernel held as whole numbers of its step; it has no gradient."""


@jax.custom_vjp
def bounded(x, low, high):
  """Clamps `x` to [low, high]; at a bound only the way back has a gradient.

  A plain clamp has no gradient outside, so what once hit a bound never
  returns; straight-through lets `x` drift ever further out.  Here a gradient
  reaches `x` unless following it (downhill) would leave the range further.
  The active bound gets the gradient too, since the value moves with it.

  Args:
    x: float array.
    low: smallest value, same shape.
    high: largest value, same shape.

  Returns:
    Array like `x`.
  """
  return jnp.clip(x, low, high)


def _bounded_fwd(x, low, high):
  return jnp.clip(x, low, high), (x, low, high)


def _bounded_bwd(residuals, g):
  x, low, high = residuals
  # On a bound, what x may not follow the bound does.
  below = (x < low) | ((x == low) & (g > 0))
  above = (x > high) | ((x == high) & (g < 0))
  leaves = (below & (g > 0)) | (above & (g < 0))
  return (
    jnp.where(leaves, 0.0, g),
    jnp.where(below, g, 0.0),
    jnp.where(above, g, 0.0),
  )


bounded.defvjp(_bounded_fwd, _bounded_bwd)


class Quantizer(nnx.Module):
  """A learned grid for one tensor: clip q_m, step d and, if asked, exponent t.

  All three are learned as logarithms, so they stay positive, and the step is
  held between those of the largest and of the smallest allowed bits.  A
  quantizer whose bits are `fixed` learns its clip alone and its step follows,
  which is the learned step size of LSQ (Esser et al. 2020) for that grid.

  Args:
    clip: largest magnitude kept, > 0; scalar, or an array that broadcasts to
      the tensor for one grid per channel.
    bits: bits to begin with, inside `bounds`.
    signed: whether the tensor has negative values.
    bounds: smallest and largest bits.
    learn_exponent: whether to learn t (else it stays 1).
    fixed: whether `bits` stay as they are.
    exponent: t to begin with.
    choices: bits that the grid may have, or () for any.  The learned bits go
      to the nearest of them (in octaves), with a straight-through gradient
      [DJPQ-restrict].
  """

  def __init__(
    self,
    clip,
    bits: float,
    *,
    signed: bool,
    bounds: tuple[float, float],
    learn_exponent: bool = False,
    fixed: bool = False,
    exponent: float = 1.0,
    choices: Sequence[float] = (),
  ):
    clip = jnp.asarray(clip, jnp.float32)
    self.signed = signed
    self.bounds = (float(bounds[0]), float(bounds[1]))
    self.fixed_bits = float(bits) if fixed else None
    self.choices = tuple(sorted(map(float, choices)))
    self.log_clip = QuantParam(jnp.log(clip))
    self.log_exponent = nnx.data(None)
    self.log_step = nnx.data(None)
    t: Any = 1.0
    if learn_exponent:
      t = jnp.asarray(exponent, jnp.float32)
      self.log_exponent = QuantParam(jnp.log(t))
    if not fixed:
      step = quantize.step_for_bits(float(bits), clip, t, signed=signed)
      self.log_step = QuantParam(jnp.log(step))

  def grid(self, *, restricted: bool = True):
    """Returns (step, clip, exponent) as they apply now.

    Args:
      restricted: whether the bits are one of the choices, if there are any;
        else they are those that are learned.
    """
    log_clip = self.log_clip[...]
    clip = jnp.exp(log_clip)
    exponent: Any = 1.0
    log_range = log_clip
    if self.log_exponent is not None:
      raw = self.log_exponent[...]
      low, high = (jnp.full_like(raw, np.log(e)) for e in EXPONENT_RANGE)
      exponent = jnp.exp(bounded(raw, low, high))
      log_range = exponent * log_clip
    if self.fixed_bits is not None:
      return jnp.exp(log_range) / self._levels(self.fixed_bits), clip, exponent
    assert self.log_step is not None
    low, high = (log_range - np.log(self._levels(b)) for b in self.bounds[::-1])
    log_step = bounded(self.log_step[...], low, high)
    if self.choices and restricted:
      bits = quantize.bit_width(
        jnp.exp(log_step), clip, exponent, signed=self.signed
      )
      allowed = log_range - jnp.log(self._nearest_levels(bits))
      log_step += jax.lax.stop_gradient(allowed - log_step)
    return jnp.exp(log_step), clip, exponent

  def _nearest_levels(self, bits):
    """Levels of the allowed bits that are nearest in octaves."""
    choices = np.array(self.choices, np.float32)
    # From the geometric mean of two choices on, the larger one is nearer.
    edges = np.sqrt(choices[1:] * choices[:-1])
    levels = np.array([self._levels(b) for b in self.choices], np.float32)
    return jnp.asarray(levels)[jnp.searchsorted(edges, bits)]

  def _levels(self, bits: float) -> float:
    return 2.0 ** (bits - self.signed) - 1.0

  def bits(self, *, restricted: bool = True):
    """Bits of the grid: differentiable, or a whole float if fixed."""
    if self.fixed_bits is not None:
      return self.fixed_bits
    step, clip, exponent = self.grid(restricted=restricted)
    # One grid per channel shares one width: that of its widest channel.
    return jnp.max(quantize.bit_width(step, clip, exponent, signed=self.signed))

  def __call__(self, x):
    """Quantizes `x`, of any shape; the result has its shape and dtype."""
    step, clip, exponent = self.grid()
    return quantize.quantize(x, step, clip, exponent, signed=self.signed)

  def integers(self, x):
    """The whole numbers n, int32, for which `self(x)` is step * n."""
    step, clip, exponent = self.grid()
    return quantize.quantize_to_int(x, step, clip, exponent, signed=self.signed)


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
    mu = jnp.ones((size,)) if scale is None else jnp.asarray(scale, jnp.float32)
    self.mu = GateMean(mu)
    self.log_sigma2 = nnx.data(None)
    if noisy:
      self.log_sigma2 = GateParam(jnp.full((size,), -OPEN_LOG_ALPHA))

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
    return score >= jnp.minimum(floor, threshold)

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
  z = gate.sample_gate(key, mu, log_sigma2, (batch, mu.size))
  ends = np.cumsum([g.size for g in gates])
  return jnp.split(z, ends[:-1], axis=1)


_taps: contextvars.ContextVar[dict | None]
_taps = contextvars.ContextVar('djpq_taps', default=None)


@contextlib.contextmanager
def tap():
  """Collects what enters each layer: yields a dict, layer -> list of inputs.

  One array per call of the layer, gated and not yet quantized.  To use it
  under `jax.jit`, open it inside of the jitted function and return the dict.
  """
  taps: dict[str, list[jax.Array]] = {}
  token = _taps.set(taps)
  try:
    yield taps
  finally:
    _taps.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class GateIndex:
  """Where a layer's input channels find their gates.

  Attributes:
    gates: indices into the model's gates.
    index: int [input channels], positions in the concatenation of a leading
      1 (for channels without a gate) and the values of `gates`; None where
      it is just one whole gate in order.
  """

  gates: tuple[int, ...]
  index: np.ndarray | None

  def pick(self, values: Sequence[jax.Array]) -> jax.Array:
    """Gathers gate values [B, size] into [B, input channels]."""
    parts = [values[g] for g in self.gates]
    if self.index is None:
      return parts[0]
    one = jnp.ones_like(parts[0][:, :1])
    return jnp.concatenate([one, *parts], axis=1)[:, self.index]


class Operands(nnx.Module):
  """The hook: gates and quantizes a layer's input, quantizes its kernel.

  Args:
    name: path of the layer in the model.
    weight: quantizer of the kernel, or None to leave it.
    act: quantizer of the input, or None to leave it.
    gate: where the input's gates are, or None.
    feature_axis: axis of the input that holds its channels (negative).
    promote: the `promote_dtype` that the layer had.
  """

  def __init__(
    self,
    name: str,
    *,
    weight: Any | None,  # a Quantizer, or what harden leaves of it
    act: Any | None,
    gate: GateIndex | None,
    feature_axis: int | None,
    promote: Callable[..., Any],
  ):
    self.name = name
    self.weight: Any = nnx.data(weight)
    self.act: Any = nnx.data(act)
    self.gate = gate
    self.feature_axis = feature_axis
    self.promote = promote
    self.values: Any = nnx.data(None)  # set in a view for the time of a call

  def __call__(self, operands, **kwargs):
    """Returns the gated, quantized and promoted (inputs, kernel, bias)."""
    inputs, kernel, bias = operands
    inputs = self.entering(inputs)
    if self.act is not None:
      inputs = self.act(inputs)
    if self.weight is not None:
      kernel = self.weight(kernel)
    return self.promote((inputs, kernel, bias), **kwargs)

  def entering(self, inputs):
    """What is quantized next: the inputs, gated; a `tap` sees it."""
    inputs = self._gated(inputs)
    taps = _taps.get()
    if taps is not None:
      taps.setdefault(self.name, []).append(inputs)
    return inputs

  def _gated(self, inputs):
    if self.gate is None:
      return inputs
    if self.values is None:
      raise RuntimeError(
        f'layer {self.name} was called outside of its Compressed model, so '
        'its gates are missing; call the Compressed model instead'
      )
    z = self.values[...]
    if z.shape[0] not in (1, inputs.shape[0]):
      # A batch of examples folded with another axis, as in [B * T, C].
      z = jnp.repeat(z, inputs.shape[0] // z.shape[0], axis=0)
    shape = [1] * inputs.ndim
    shape[0] = z.shape[0]
    assert self.feature_axis is not None  # else its group has no gate
    shape[self.feature_axis] = z.shape[1]
    # The product is taken in the input's dtype: it is quantized next.
    return inputs * z.reshape(shape).astype(inputs.dtype)
