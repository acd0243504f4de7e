"""Convolutions and dots whose sums are exact whole numbers.

They take the place of `lax.conv_general_dilated` and `lax.dot_general` in a
layer.  Inputs are int32 levels; the result is the accumulator times a scale.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from djpq_jax import taps
from djpq_jax.integer import planning

# XLA hands int8 convolutions to its library only from more channels on.
LEAST_OUTPUTS = 17

# The accumulators of each layer: one int32 array per call.
ACCUMULATORS = taps.Tap('djpq_accumulators')


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
  """What a layer hands on in place of its kernel.

  Attributes:
    integers: the kernel, int8 or int16 [contracted..., out...].
    scale: what one unit of an accumulator is worth, float32 [] or [out...].
    offset: int32 [out...] that undoes the input's shift, or None.
    dtype: of the result.
  """

  integers: jax.Array
  scale: jax.Array
  offset: jax.Array | None
  dtype: Any

  def giving(self, dtype) -> 'Weights':
    """For another dtype of the result, if it is not None."""
    return self if dtype is None else dataclasses.replace(self, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Conv:
  """Takes the place of `lax.conv_general_dilated`, channels last."""

  plan: planning.Plan

  def __call__(
    self,
    x,
    weights: Weights,
    strides,
    padding,
    *,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    preferred_element_type=None,
    **_,
  ):
    """Int32 levels [B, ..., in] -> scaled accumulators [B, ..., out]."""
    weights = weights.giving(preferred_element_type)
    window = [
      (k - 1) * d + 1 for k, d in zip(weights.integers.shape[:-2], rhs_dilation)
    ]
    size = [
      (n - 1) * d + 1 if n else 0 for n, d in zip(x.shape[1:-1], lhs_dilation)
    ]
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(size, window, strides, padding)
    if self.plan.shift or self.plan.method != 'xla':
      # Here, so that what surrounds an image is level 0 too after the shift.
      edges = [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)]
      x = lax.pad(x, jnp.zeros((), x.dtype), edges)
      padding = [(0, 0)] * len(padding)

    if self.plan.method == 'xla':
      product = functools.partial(
        _conv,
        self.plan,
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
      )
    else:
      product = functools.partial(
        _depthwise if self.plan.method == 'taps' else _by_columns,
        self.plan,
        strides=strides,
        dilation=rhs_dilation,
      )
    # Channels are the last axis of the input, the last but one of the kernel.
    axes = -1, weights.integers.ndim - 2
    return _scaled(self.plan, x, weights, product, axes)


@dataclasses.dataclass(frozen=True)
class Dot:
  """Takes the place of `lax.dot_general`, the kernel on its right."""

  plan: planning.Plan

  def __call__(
    self,
    x,
    weights: Weights,
    dimension_numbers,
    *,
    preferred_element_type=None,
    **_,
  ):
    """Int32 levels -> scaled accumulators [..., out...]."""
    weights = weights.giving(preferred_element_type)
    (left, right), _ = dimension_numbers
    product = lambda x, w: _dot(self.plan, x, w, dimension_numbers)
    return _scaled(self.plan, x, weights, product, (left[-1], right[-1]))


def _conv(plan: planning.Plan, x, w, *, feature_group_count, **where):
  """A convolution of XLA."""
  outputs = w.shape[-1]
  few = max(x.shape[-1], outputs) < LEAST_OUTPUTS
  if plan.carrier == 'int8' and feature_group_count == 1 and few:
    more = [(0, 0)] * (w.ndim - 1) + [(0, LEAST_OUTPUTS - outputs)]
    w = jnp.pad(w, more)
  y = lax.conv_general_dilated(
    x,
    w,
    feature_group_count=feature_group_count,
    precision=_precision(plan),
    preferred_element_type=_sum_dtype(plan),
    **where,
  )
  return y[..., :outputs]


def _by_columns(plan: planning.Plan, x, w, *, strides, dilation):
  """A convolution as one product of matrices."""
  pixels = jnp.concatenate(list(_shifted(x, w, strides, dilation)), -1)
  flat = w.reshape(-1, w.shape[-1])
  return _dot(plan, pixels, flat, (((3,), (0,)), ((), ())))


def _depthwise(_: planning.Plan, x, w, *, strides, dilation):
  """A depthwise convolution as a sum of shifted inputs."""
  flat = w.reshape(-1, w.shape[-1])
  shifted = _shifted(x, w, strides, dilation)
  return sum(x * row[None, None, None] for x, row in zip(shifted, flat))


def _shifted(x, w, strides, dilation):
  """The pixels under each position of the window [B, H', W', C], row by row."""
  step = (1, *strides, 1)
  reach = [(k - 1) * d for k, d in zip(w.shape[:2], dilation)]
  counts = [
    (n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:3], reach, strides)
  ]
  for i in range(w.shape[0]):
    for j in range(w.shape[1]):
      start = (0, i * dilation[0], j * dilation[1], 0)
      stop = [
        first + (count - 1) * s + 1
        for first, count, s in zip(start[1:3], counts, strides)
      ]
      yield lax.slice(x, start, (x.shape[0], *stop, x.shape[3]), step)


def _dot(plan: planning.Plan, x, w, dimension_numbers):
  return lax.dot_general(
    x,
    w,
    dimension_numbers,
    precision=_precision(plan),
    preferred_element_type=_sum_dtype(plan),
  )


def _sum_dtype(plan: planning.Plan):
  return jnp.int32 if plan.carrier.startswith('int') else jnp.float32


def _precision(plan: planning.Plan):
  """Accelerators round float32 operands to 8 bits or more unless told."""
  return lax.Precision.HIGHEST if plan.wide else None


def _scaled(plan: planning.Plan, x, weights: Weights, product: Callable, axes):
  """Accumulators times the scale; `axes` hold the channels that are cut."""
  total = _accumulated(plan, x, weights.integers, product, axes)
  if weights.offset is not None:
    total = total + _to_rank(weights.offset, total.ndim)
  ACCUMULATORS.see(plan.name, total.astype(jnp.int32))
  y = total.astype(jnp.float32) * _to_rank(weights.scale, total.ndim)
  return y.astype(weights.dtype)


def _to_rank(x, ndim: int):
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _accumulated(plan: planning.Plan, x, w, product: Callable, axes):
  """The sums: int16, int32, or float32 that holds a whole number."""
  if plan.shift:
    x = x - jnp.int32(plan.shift)
  terms = []
  for i, a in enumerate(planning.cut(x, plan.act_digits, jnp)):
    left = a.astype(plan.carrier)
    digits = planning.cut(w.astype(jnp.int32), plan.weight_digits, jnp)
    for j, b in enumerate(digits):
      right = b.astype(plan.carrier)
      worth = 2 ** (planning.DIGIT_BITS * (i + j))
      for start, stop in plan.parts:
        term = product(
          _slice(left, start, stop, axes[0], plan),
          _slice(right, start, stop, axes[1], plan),
        )
        terms.append((term, worth))
  if len(terms) == 1:
    return terms[0][0]
  # Sums of terms may wrap around: the whole one fits, and int32 is modular.
  wrapped = [t.astype(jnp.int32) * jnp.int32(n) for t, n in terms]
  return sum(wrapped[1:], wrapped[0])


def _slice(x, start: int, stop: int, axis: int, plan: planning.Plan):
  if len(plan.parts) == 1:
    return x
  return lax.slice_in_dim(x, start, stop, axis=axis % x.ndim)
