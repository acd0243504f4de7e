"""Depthwise convolutions for training on a CPU, where XLA's are slow.

A depthwise convolution does little arithmetic; on a CPU, XLA's own spends its
time elsewhere.  Written as a sum of products, one for each place in the
kernel's window, it is fused into one pass over the images.
"""

from collections.abc import Iterator, Sequence
import itertools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

Sizes = tuple[int, ...]  # one for each spatial axis


def speed_up(model) -> None:
  """Lets the depthwise layers of a model be summed, if that is faster here.

  Args:
    model: what a step has merged for itself; its `nnx.Conv`s are changed.
      Nothing but steps may have it, since graphs look for convolutions.
  """
  if jax.default_backend() != 'cpu':
    return
  for _, module in nnx.iter_modules(model):
    if (
      isinstance(module, nnx.Conv)
      and module.feature_group_count > 1
      and module.conv_general_dilated is jax.lax.conv_general_dilated
    ):
      module.conv_general_dilated = convolve


def convolve(
  inputs,
  kernel,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int],
  rhs_dilation: Sequence[int],
  feature_group_count: int,
  **others,
):
  """What `nnx.Conv` calls, in place of `jax.lax.conv_general_dilated`.

  Args:
    inputs: [B, *spatial, C].
    kernel: [*window, C / groups, outputs]; any but a depthwise kernel with
      one output per channel is left to XLA.
    strides: of the window, one per spatial axis.
    padding: low and high of each spatial axis, or 'SAME' or 'VALID'.
    lhs_dilation: of the inputs.
    rhs_dilation: of the window.
    feature_group_count: groups.
    **others: as `jax.lax.conv_general_dilated` has them; what asks for a
      type or a sharding of the outputs is left to XLA.

  Returns:
    [B, *spatial, outputs].
  """
  asks = (others.get(k) for k in ('preferred_element_type', 'out_sharding'))
  if (
    kernel.shape[-2:] != (1, feature_group_count)
    or any(x is not None for x in asks)
    or (isinstance(padding, str) and max(lhs_dilation) > 1)
  ):
    return jax.lax.conv_general_dilated(
      inputs,
      kernel,
      strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      feature_group_count=feature_group_count,
      **others,
    )
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(
      inputs.shape[1:-1],
      [(n - 1) * d + 1 for n, d in zip(kernel.shape, rhs_dilation)],
      strides,
      padding,
    )
  edges = [(0, 0, 0)]
  edges += [(*p, d - 1) for p, d in zip(padding, lhs_dilation)]
  edges += [(0, 0, 0)]
  padded = jax.lax.pad(inputs, jnp.zeros((), inputs.dtype), edges)
  return _sum(padded, kernel, tuple(strides), tuple(rhs_dilation))


def _windows(
  padded: jax.Array, window: Sizes, strides: Sizes, dilation: Sizes
) -> Iterator[tuple[Sizes, jax.Array]]:
  """What each place of the window sees: yields (place, [B, *spatial, C])."""
  sizes = [
    (n - (w - 1) * d - 1) // s + 1
    for n, w, s, d in zip(padded.shape[1:-1], window, strides, dilation)
  ]
  for place in itertools.product(*map(range, window)):
    first = np.multiply(place, dilation)
    at = tuple(
      slice(f, f + (n - 1) * s + 1, s) for f, n, s in zip(first, sizes, strides)
    )
    yield place, padded[:, *at]


def _products(padded, kernel, strides: Sizes, dilation: Sizes):
  """The sum of the products of all places, [B, *spatial, C]."""
  window = kernel.shape[:-2]
  ones = [1] * (padded.ndim - 1)
  weights = _wide(kernel).reshape(*window, *ones, kernel.shape[-1])
  seen = _windows(_wide(padded), window, strides, dilation)
  first, *rest = (x * weights[place] for place, x in seen)
  return sum(rest, first).astype(padded.dtype)


def _wide(x: jax.Array) -> jax.Array:
  """In float32 at least, as sums should be."""
  return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


_sum = jax.custom_vjp(_products, nondiff_argnums=(2, 3))


def _forward(padded, kernel, strides: Sizes, dilation: Sizes):
  return _sum(padded, kernel, strides, dilation), (padded, kernel)


def _backward(strides: Sizes, dilation: Sizes, residuals, g):
  padded, kernel = residuals
  window = kernel.shape[:-2]

  def of_inputs(padded):
    return _products(padded, kernel, strides, dilation)

  # XLA's sums over batch and space down to a vector of channels are slow; so
  # examples are added up one by one, all places of the window in one pass.
  def add(sums, example):
    one, slope = map(_wide, example)
    seen = _windows(one[None], window, strides, dilation)
    return [s + x[0] * slope for s, (_, x) in zip(sums, seen)], None

  def sums(padded, g):
    zeros = jnp.zeros(g.shape[1:], _wide(g).dtype)
    places = [zeros] * math.prod(window)
    return jax.lax.scan(add, places, (padded, g))[0]

  # Each device goes through its own share of the batch: were the whole batch
  # gone through at once, all of them would go through all of it.
  shares = math.gcd(len(g), jax.device_count())
  spread = (x.reshape(shares, -1, *x.shape[1:]) for x in (padded, g))
  found = jax.vmap(sums)(*spread)  # places of [shares, *spatial, C]
  rest = tuple(range(g.ndim - 1))
  of_kernel = jnp.stack([s.sum(rest) for s in found]).reshape(kernel.shape)
  (of_padded,) = jax.vjp(of_inputs, padded)[1](g)
  return of_padded, of_kernel.astype(kernel.dtype)


_sum.defvjp(_forward, _backward)
