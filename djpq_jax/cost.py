"""What a network costs: MACs, bit operations and bits of weights.

A multiply-accumulate (MAC) of a b_w-bit weight and a b_a-bit activation costs
b_w * b_a bit operations (BOPs).  The sums are differentiable in the kept
fractions and in the bits, and exact in Python integers once those are whole.
"""

import dataclasses
import fractions
import math
import numbers
from typing import TypeAlias

import jax
import jax.numpy as jnp

Number: TypeAlias = jax.Array | float | fractions.Fraction

# What can have a budget, and in words; 'weights' are those of all kernels.
COSTS = {'bops': 'BOPs', 'macs': 'MACs', 'weights': 'weight bits'}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerUse:
  """What one layer costs now.

  The dynamic fields are scalars: jax arrays or floats while training, ints
  and `fractions.Fraction` for an exact count.  A depthwise layer shrinks once
  when a channel goes: give it keep_out = 1.

  >>> LayerUse(name='conv', macs=100, weights=9, keep_in=1, keep_out=1,
  ...          weight_bits=4, act_bits=8).macs
  100
  """

  name: str = dataclasses.field(metadata=dict(static=True))
  macs: int = dataclasses.field(metadata=dict(static=True))  # dense, 1 example
  weights: int = dataclasses.field(metadata=dict(static=True))  # in the kernel
  keep_in: Number  # fraction of input channels kept
  keep_out: Number  # fraction of output channels kept
  weight_bits: Number
  act_bits: Number  # bits of the layer's input


def macs(uses):
  """MACs of one forward pass of one example, after pruning.

  sum of macs * keep_in * keep_out.

  Args:
    uses: iterable of `LayerUse`.

  Returns:
    Python int if all fields are ints or Fractions, else a float32 scalar.

  Raises:
    ValueError: an exact sum is not whole, or a field is not a scalar.

  >>> use = LayerUse(name='conv', macs=100, weights=9, keep_in=1,
  ...                keep_out=fractions.Fraction(1, 2), weight_bits=4,
  ...                act_bits=8)
  >>> macs([use])
  50
  """
  return _total((u.macs, u.keep_in, u.keep_out) for u in uses)


def bops(uses):
  """Bit operations of one forward pass of one example.

  sum of macs * keep_in * keep_out * weight_bits * act_bits
  The measure that DJPQ reports, arXiv 2007.10463.

  Args:
    uses: iterable of `LayerUse`.

  Returns:
    Python int if all fields are ints or Fractions, else a float32 scalar.

  Raises:
    ValueError: an exact sum is not whole, or a field is not a scalar.

  >>> use = LayerUse(name='conv', macs=100, weights=9, keep_in=1,
  ...                keep_out=fractions.Fraction(1, 2), weight_bits=4,
  ...                act_bits=8)
  >>> bops([use])
  1600
  """
  return _total(
    (u.macs, u.keep_in, u.keep_out, u.weight_bits, u.act_bits) for u in uses
  )


def size_bits(uses):
  """Bits that the kept kernel weights take.

  sum of weights * keep_in * keep_out * weight_bits.

  Args:
    uses: iterable of `LayerUse`.

  Returns:
    Python int if all fields are ints or Fractions, else a float32 scalar.

  Raises:
    ValueError: an exact sum is not whole, or a field is not a scalar.

  >>> use = LayerUse(name='conv', macs=100, weights=10, keep_in=1,
  ...                keep_out=fractions.Fraction(1, 2), weight_bits=4,
  ...                act_bits=8)
  >>> size_bits([use])
  20
  """
  return _total((u.weights, u.keep_in, u.keep_out, u.weight_bits) for u in uses)


def float_bops(uses):
  """Bit operations of the dense float32 network, 32 * 32 * MACs.

  Args:
    uses: iterable of `LayerUse`; only their `macs` are read.

  Returns:
    Python int, the usual baseline of `relative_bops`.

  >>> use = LayerUse(name='conv', macs=100, weights=9, keep_in=1, keep_out=1,
  ...                weight_bits=4, act_bits=8)
  >>> float_bops([use])
  102400
  """
  return 32 * 32 * sum(int(u.macs) for u in uses)


def relative_bops(uses, baseline):
  """Bit operations as a fraction of a baseline.

  Each layer's MACs are divided by the baseline in Python first, so that the
  float32 sum has terms of order one at most.

  Args:
    uses: iterable of `LayerUse`.
    baseline: bit operations, Python int > 0, mostly `float_bops(uses)`.

  Returns:
    Python float if all fields are ints or Fractions, else a float32 scalar.

  Raises:
    ValueError: the baseline is not positive, or a field is not a scalar.

  >>> use = LayerUse(name='conv', macs=100, weights=9, keep_in=1, keep_out=1,
  ...                weight_bits=4, act_bits=8)
  >>> relative_bops([use], float_bops([use]))
  0.03125
  """
  return _ratio(
    ((u.macs, u.keep_in, u.keep_out, u.weight_bits, u.act_bits) for u in uses),
    baseline,
  )


def relative(uses) -> dict[str, Number]:
  """All costs as fractions of those of the dense float32 network.

  Args:
    uses: iterable of `LayerUse`.

  Returns:
    By name of the cost, see `COSTS`: Python floats if all fields are ints or
    Fractions, else float32 scalars.

  Raises:
    ValueError: a network without MACs or weights, or a field is no scalar.

  >>> use = LayerUse(name='conv', macs=100, weights=9, keep_in=1,
  ...                keep_out=fractions.Fraction(1, 2), weight_bits=4,
  ...                act_bits=8)
  >>> relative([use])
  {'bops': 0.015625, 'macs': 0.5, 'weights': 0.0625}
  """
  uses = list(uses)
  return {
    'bops': relative_bops(uses, float_bops(uses)),
    'macs': _ratio(
      ((u.macs, u.keep_in, u.keep_out) for u in uses),
      sum(int(u.macs) for u in uses),
    ),
    'weights': _ratio(
      ((u.weights, u.keep_in, u.keep_out, u.weight_bits) for u in uses),
      32 * sum(int(u.weights) for u in uses),
    ),
  }


def _ratio(terms, baseline: int) -> Number:
  """A sum of products over a whole number; each has a whole number first."""
  if baseline <= 0:
    raise ValueError(f'baseline must be positive, not {baseline}')
  ratio = _sum_of_products(
    (_exact(first) / _exact(baseline), *others) for first, *others in terms
  )
  return float(ratio) if isinstance(ratio, numbers.Rational) else ratio


def _total(terms):
  """The sum of products as a Python int where it is exact."""
  total = _sum_of_products(terms)
  if not isinstance(total, numbers.Rational):
    return total
  if total.denominator != 1:
    raise ValueError(f'the exact sum {total} is not whole')
  return int(total.numerator)


def _sum_of_products(terms):
  """Exact if all factors are rational, else in float32."""
  terms = [tuple(term) for term in terms]
  if all(isinstance(f, numbers.Rational) for term in terms for f in term):
    return sum(math.prod(map(_exact, term)) for term in terms)
  return sum(math.prod(map(_scalar, term)) for term in terms)


def _exact(factor) -> fractions.Fraction:
  """NumPy's integers would stay what they are, and overflow."""
  if isinstance(factor, numbers.Integral):
    return fractions.Fraction(int(factor))
  return fractions.Fraction(factor)


def _scalar(factor):
  if isinstance(factor, numbers.Rational):
    factor = float(factor)
  factor = jnp.asarray(factor, jnp.float32)
  if factor.shape:
    raise ValueError(f'a cost factor must be a scalar, not {factor.shape}')
  return factor
