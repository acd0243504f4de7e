"""Convolutions for training on a CPU, where some of XLA's are slow.

A depthwise convolution does little arithmetic; on a CPU, XLA's own spends its
time elsewhere.  Written as a sum of products, one for each place in the
kernel's window, it is fused into one pass over the images.

XLA has the slope of a kernel as one convolution over all images.  Here it is
a sum of products of matrices, each of what a few images bring, which takes a
fraction of the time where there are many pixels (the table in
docs/training.md).
"""

from collections.abc import Iterator, Sequence
import itertools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import parallel

Sizes = tuple[int, ...]  # one for each spatial axis

SUMMED = 1024  # pixels that a kernel's slope sums at once, or of two images
# Where XLA's own slopes stay.  Each place of a window is compiled, and what all
# places see is a copy.
MOST_PLACES = 25  # of a window
FEWEST_PIXELS = 8192  # of all images, where a window has several places
MOST_BYTES = 2**26  # of what all places see of an image


def speed_up(model) -> None:
  """Gives the layers of a model the convolutions that are faster here.

  Args:
    model: what a step has merged for itself; its `nnx.Conv`s are changed.
      Nothing but steps may have it, since graphs look for convolutions.
  """
  if jax.default_backend() != 'cpu':
    return
  for _, module in nnx.iter_modules(model):
    if (
      isinstance(module, nnx.Conv)
      # Others may call it in their own way.
      and type(module).__call__ is nnx.Conv.__call__
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
    kernel: [*window, C / groups, outputs]; what is neither dense nor depthwise
      with one output per channel is left to XLA.
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

  def as_xla(inputs, kernel):
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

  asks = (others.get(k) for k in ('preferred_element_type', 'out_sharding'))
  dense = feature_group_count == 1
  depthwise = not dense and kernel.shape[-2:] == (1, feature_group_count)
  if (
    not (depthwise or dense)
    or any(x is not None for x in asks)
    or (isinstance(padding, str) and max(lhs_dilation) > 1)
    or (dense and not _pays(as_xla, inputs, kernel))
  ):
    return as_xla(inputs, kernel)
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

  def pad(x):
    return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)

  places = tuple(strides), tuple(rhs_dilation)
  if depthwise:
    return _sum(pad(inputs), kernel, *places)
  # Where inputs vary over a manual mesh axis and the kernel does not, its slope
  # is summed over it: zeros bring that about.
  kernel += jnp.zeros_like(inputs, kernel.dtype, ())
  return _dense(as_xla, pad, *places)(inputs, kernel)


def _pays(convolve, inputs, kernel) -> bool:
  """Whether the slope of a dense kernel is summed faster a few at a time."""
  count, *spatial, _ = jax.eval_shape(convolve, inputs, kernel).shape
  pixels = count * math.prod(spatial) // parallel.shares()
  window = kernel.shape[:-2]
  if math.prod(window) == 1:
    return pixels > 0
  return (
    len(window) == 2
    and math.prod(window) <= MOST_PLACES
    and pixels >= FEWEST_PIXELS
    and _bytes_seen(spatial, kernel) <= MOST_BYTES
  )


def _bytes_seen(spatial: Sequence[int], kernel) -> int:
  """Bytes of what all places of a window see of one image, in float32."""
  return 4 * math.prod(spatial) * math.prod(kernel.shape[:-1])


def _dense(convolve, pad, strides: Sizes, dilation: Sizes):
  """A convolution by XLA, but for the slope of its kernel."""

  def forward(inputs, kernel):
    return convolve(inputs, kernel), (inputs, kernel)

  def backward(residuals, g):
    inputs, kernel = residuals
    transposed = jax.linear_transpose(lambda x: convolve(x, kernel), inputs)
    (of_inputs,) = transposed(g)
    how = kernel, strides, dilation
    of_kernel = _of_shares(_dense_slope, pad(inputs), g, *how)
    return of_inputs, of_kernel.reshape(kernel.shape).astype(kernel.dtype)

  dense = jax.custom_vjp(convolve)
  dense.defvjp(forward, backward)
  return dense


def _dense_slope(padded, g, kernel, strides: Sizes, dilation: Sizes):
  """The slope of a dense kernel, [places * C, outputs]."""
  window, spatial = kernel.shape[:-2], g.shape[1:-1]
  axes = tuple(range(g.ndim - 1))
  most = max(2, SUMMED // math.prod(spatial))
  most = max(1, min(most, MOST_BYTES // _bytes_seen(spatial, kernel)))
  few = max(n for n in range(1, most + 1) if len(g) % n == 0)

  def add(total, examples):
    some, slope = map(_wide, examples)
    places = _windows(some, window, strides, dilation)
    seen = jnp.concatenate([x for _, x in places], -1)
    return total + jnp.tensordot(seen, slope, (axes, axes)), None

  dtype = _wide(g).dtype
  zeros = jnp.zeros((math.prod(kernel.shape[:-1]), g.shape[-1]), dtype)
  for x in padded, g:  # varying over manual mesh axes as the sum does
    zeros += jnp.zeros_like(x, dtype, ())
  parts = [x.reshape(-1, few, *x.shape[1:]) for x in (padded, g)]
  return jax.lax.scan(add, zeros, parts)[0]


def _of_shares(slope, padded, g, *how):
  """The sum of the slopes of each device's share of the batch.

  Were the whole batch gone through at once, all of them would go through all
  of it.
  """
  shares = math.gcd(len(g), parallel.shares())
  if shares == 1:
    return slope(padded, g, *how)
  spread = [x.reshape(shares, -1, *x.shape[1:]) for x in (padded, g)]
  return jax.vmap(lambda padded, g: slope(padded, g, *how))(*spread).sum(0)


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

  def of_inputs(padded):
    return _products(padded, kernel, strides, dilation)

  how = kernel, strides, dilation
  of_kernel = _of_shares(_depthwise_slope, padded, g, *how)
  (of_padded,) = jax.vjp(of_inputs, padded)[1](g)
  return of_padded, of_kernel.reshape(kernel.shape).astype(kernel.dtype)


def _depthwise_slope(padded, g, kernel, strides: Sizes, dilation: Sizes):
  """The slope of a depthwise kernel, [places, C]."""
  window = kernel.shape[:-2]

  # XLA's sums over batch and space down to a vector of channels are slow; so
  # examples are added up one by one, all places of the window in one pass.
  def add(sums, example):
    one, slope = map(_wide, example)
    seen = _windows(one[None], window, strides, dilation)
    return [s + x[0] * slope for s, (_, x) in zip(sums, seen)], None

  zeros = jnp.zeros(g.shape[1:], _wide(g).dtype)
  places = [zeros] * math.prod(window)
  found = jax.lax.scan(add, places, (padded, g))[0]
  return jnp.stack([x.sum(range(x.ndim - 1)) for x in found])


_sum.defvjp(_forward, _backward)
