"""Depthwise convolutions for training on a CPU, where XLA's are slow.

A depthwise convolution does little arithmetic; on a CPU, XLA's own spends its
time elsewhere.  Written as a sum of products, one for each place in the
kernel's window, it is fused into one pass over the images.
"""

from collections.abc import Iterator, Sequence
import itertools

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
    **others: as `jax.lax.conv_general_dilated` has them.

  Returns:
    [B, *spatial, outputs].
  """
  if kernel.shape[-2] != 1 or kernel.shape[-1] != feature_group_count:
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
      [(n - 1) * d + 1 for n, d in zip(inputs.shape[1:-1], lhs_dilation)],
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
  seen = _windows(padded, window, strides, dilation)
  ones = [1] * (padded.ndim - 1)
  weights = kernel.reshape(*window, *ones, kernel.shape[-1])
  first, *rest = (x * weights[place] for place, x in seen)
  return sum(rest, first)


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
    one, slope = example
    products = (
      x[0] * slope for _, x in _windows(one[None], window, strides, dilation)
    )
    return [s + p.astype(s.dtype) for s, p in zip(sums, products)], None

  zeros = jnp.zeros(g.shape[1:], jnp.float32)
  sums, _ = jax.lax.scan(add, [zeros] * int(np.prod(window)), (padded, g))
  spatial = tuple(range(g.ndim - 2))
  of_kernel = jnp.stack([s.sum(spatial) for s in sums]).reshape(kernel.shape)
  (of_padded,) = jax.vjp(of_inputs, padded)[1](g)
  return of_padded, of_kernel.astype(kernel.dtype)


_sum.defvjp(_forward, _backward)
