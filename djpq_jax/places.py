"""Takes places of an array without a program for each of its shapes."""

from collections.abc import Callable

import jax
import numpy as np


def pick(places: Callable, x):
  """`places(x)`, in NumPy where that is all the same.

  JAX compiles an indexing for each shape, which takes longer than to do it.

  Args:
    places: indexes or reshapes an array, of NumPy or of JAX.
    x: array.  One that is traced, or not whole on this process, is indexed by
      JAX.

  Returns:
    A new array, where x is.
  """
  whole = (
    isinstance(x, jax.Array)
    and not isinstance(x, jax.core.Tracer)
    and x.is_fully_replicated
    and x.is_fully_addressable
  )
  if not whole:
    return places(x)
  # A copy, since an array of JAX may be a view of NumPy's and keep all of it.
  taken = np.array(places(np.asarray(x)))
  return jax.device_put(taken, x.sharding if x.committed else None)
