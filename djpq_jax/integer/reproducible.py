"""Float arithmetic whose last bit no compiler decides.

What a model does between its integer products is float32: batch norm, gates,
residual sums, means over pixels.  A compiler may fuse a product and a sum,
which then rounds once instead of twice, may add numbers up in an order of its
own, and may take a division for a product.  Any of these moves a last bit, and
that now and then an activation to the next level, and a prediction with it.
Here a function is rewritten so that each operation is rounded by itself, in an
order that is part of the program.  Other runtimes can then do the same.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np

from djpq_jax import calls
from djpq_jax import graph
from djpq_jax import taps

# They round no further what they get, so no compiler fuses a product into them.
_SAFE = {'round', 'max', 'min', 'clamp', 'dot_general', 'conv_general_dilated'}
_PRODUCTS = {'mul', 'square', 'integer_pow'}


def reproducible(function: Callable) -> Callable:
  """A function of arrays that computes the same, with one way to round it.

  Transcendental functions, divisions by what is not a constant, float
  convolutions and dots, and what is in loops and branches stay as they are:
  their last bit is the platform's.

  Args:
    function: traceable; its results are arrays.
  """

  def call(*args, **kwargs):
    arrays, whole = graph.split_arrays((args, kwargs))

    def traced(*arrays):
      args, kwargs = whole(arrays)
      return taps.collecting(function)(*args, **kwargs)

    closed, shapes = jax.make_jaxpr(traced, return_shape=True)(*arrays)
    found = _run(closed.jaxpr, closed.consts, arrays)
    result, seen = jax.tree.unflatten(jax.tree.structure(shapes), found)
    taps.show(seen)
    return result

  return call


def guarded(product: jax.Array) -> jax.Array:
  """A product that no compiler fuses with a sum.

  The bound is never in force, but in the way.
  """
  return jnp.minimum(product, jnp.finfo(product.dtype).max)


def _run(jaxpr, consts, args) -> list[jax.Array]:
  """The outputs of a jaxpr, each equation in its reproducible form."""
  values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
  values.update(zip(jaxpr.invars, args))

  def read(var):
    return var.val if isinstance(var, jex_core.Literal) else values[var]

  loose = _loose_products(jaxpr)
  for eqn in jaxpr.eqns:
    outputs = _equation(eqn, [read(var) for var in eqn.invars])
    if loose.intersection(eqn.outvars):
      outputs = [guarded(outputs[0])]
    values.update(zip(eqn.outvars, outputs))
  return [read(var) for var in jaxpr.outvars]


def _equation(eqn, operands) -> list[jax.Array]:
  called = calls.inner(eqn)
  if called is not None:
    return _run(*called, operands)
  name = eqn.primitive.name
  if name == 'reduce_sum' and _is_float(eqn.outvars[0]):
    axes = eqn.params['axes']
    sizes = [operands[0].shape[axis] for axis in axes]
    if all(isinstance(n, int) and n > 0 for n in sizes):
      return [_sum(operands[0], axes)]
  if name == 'div' and _is_float(eqn.outvars[0]):
    _, divisor = eqn.invars
    if isinstance(divisor, jex_core.Literal):
      inverse = np.ones((), divisor.aval.dtype) / operands[1]
      return [guarded(operands[0] * inverse)]
  found = eqn.primitive.bind(*operands, **eqn.params)
  return list(found) if eqn.primitive.multiple_results else [found]


def _loose_products(jaxpr) -> set:
  """Outputs of float products that something else than `_SAFE` reads."""
  products = {
    eqn.outvars[0]
    for eqn in jaxpr.eqns
    if eqn.primitive.name in _PRODUCTS and _is_float(eqn.outvars[0])
  }
  loose = products.intersection(
    var for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)
  )
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    to_integer = name == 'convert_element_type' and not _is_float(
      eqn.outvars[0]
    )
    if name not in _SAFE and not to_integer:
      read = (v for v in eqn.invars if not isinstance(v, jex_core.Literal))
      loose |= products.intersection(read)
  return loose


def _is_float(var) -> bool:
  return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _sum(x: jax.Array, axes) -> jax.Array:
  """The sum over some axes, halves added to halves."""
  for axis in axes:
    while (size := x.shape[axis]) > 1:
      half = (size + 1) // 2
      first = lax.slice_in_dim(x, 0, half, axis=axis)
      second = lax.slice_in_dim(x, half, size, axis=axis)
      if size % 2:
        more = [(0, 0, 0)] * x.ndim
        more[axis] = (0, 1, 0)
        second = lax.pad(second, jnp.zeros((), x.dtype), more)
      x = first + second
  return lax.squeeze(x, axes)
