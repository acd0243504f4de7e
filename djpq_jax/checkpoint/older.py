"""What artifacts of older versions said otherwise.

Up to version 6 an input had a clip, and the index told what was below zero:
whether anything (`signed_inputs`); since version 5 where it was a level more
than above (`uneven_inputs`); since version 6 where it was a share of what is
above (`asymmetric_inputs`).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from djpq_jax.ops import quantize

LEVELS_SINCE = 7  # the index has the levels of each input


def inputs(
  index: Mapping[str, Any], values: dict[str, np.ndarray]
) -> dict[str, tuple[int, int]]:
  """The lowest and the highest level of each quantized layer's input.

  Args:
    index: of an older artifact, with its version.
    values: each array of the model, by name; the clips are taken out.
  """
  version = index['version']
  uneven = index['uneven_inputs'] if version >= 5 else ()
  below = index['asymmetric_inputs'] if version >= 6 else {}
  found = {}
  for path, signed in index['signed_inputs'].items():
    act = f'model/{path}/promote_dtype/act'
    levels = quantize.quantize_to_int(
      jnp.array([-jnp.inf, jnp.inf]),
      values[f'{act}/step'],
      values.pop(f'{act}/clip'),
      signed=signed,
      narrow_range=path not in uneven,
      below=below.get(path),
    )
    found[path] = int(levels[0]), int(levels[1])
  return found
