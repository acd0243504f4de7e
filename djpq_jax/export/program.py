"""A hardened model as a jaxpr in which each grid is a single equation.

Traced as it is, a quantizer is several equations and an integer kernel a
product of floats, and what was one number to a layer is lost.  Here the hooks
of the layers bind a marker instead, so that a translator meets the input of a
layer and its kernel as what they are.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.extend import core as jex_core
from jax.interpreters import batching
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import harden
from djpq_jax import stablehlo
from djpq_jax.integer import reproducible

input_p = jex_core.Primitive('djpq_input')
kernel_p = jex_core.Primitive('djpq_kernel')


@input_p.def_abstract_eval
def _input_abstract(x, *, layer):
  del layer
  return x


@kernel_p.def_abstract_eval
def _kernel_abstract(kernel, *, layer):
  del layer
  return kernel.update(dtype=jnp.dtype('float32'), weak_type=False)


def _register_batching(primitive) -> None:
  def batch(args, dims, *, layer):
    return primitive.bind(*args, layer=layer), dims[0]

  batching.primitive_batchers[primitive] = batch


_register_batching(input_p)


class _Marker(nnx.Module):
  """Takes the place of a quantizer."""

  def __init__(self, primitive, layer: str):
    self.primitive = nnx.static(primitive)
    self.layer = layer

  def __call__(self, x):
    return self.primitive.bind(x, layer=self.layer)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A forward pass whose only invar is the batch of images.

  Attributes:
    jaxpr: closed; arrays of the model are its constants.
    grids: of the input of each quantized layer.
    steps: of the kernel of each quantized layer, float32, broadcasts to it.
  """

  jaxpr: Any
  grids: dict[str, harden.FixedQuantizer]
  steps: dict[str, np.ndarray]


def trace(
  model: harden.HardenedModel, input_shape, batch: int | None = None
) -> Program:
  """Traces a hardened model for prediction; nothing is computed.

  Args:
    model: from `harden.harden` or an artifact; it is left as it is.
    input_shape: of one example, as (8, 8, 1).
    batch: examples of a call, or None for any number.

  Returns:
    The program.

  Raises:
    ValueError: the model cannot be traced, or gives more than one array.
  """
  marked = nnx.clone(compress.eval_view(model))
  grids, steps = {}, {}
  for path, _, operands in compress.hooks(marked):
    if isinstance(operands.weight, harden.Dequantizer):
      grids[path] = operands.act
      steps[path] = np.asarray(operands.weight.step[...], np.float32)
      operands.act = nnx.data(_Marker(input_p, path))
      operands.weight = nnx.data(_Marker(kernel_p, path))
  x = jax.ShapeDtypeStruct(shape(input_shape, batch), jnp.float32)
  graphdef, state = nnx.split(marked)

  def call(x):  # which may count what it draws, so not `marked` itself
    return nnx.merge(graphdef, nnx.as_pure(state))(x)

  try:
    jaxpr = jax.make_jaxpr(reproducible.reproducible(call))(x)
  except Exception as error:
    open_batch = ' with an open batch; a fixed one may do' * (batch is None)
    first = (str(error).splitlines() or [''])[0]
    raise ValueError(
      f'the model cannot be traced{open_batch}: {type(error).__name__}: {first}'
    ) from error
  if len(jaxpr.out_avals) != 1:
    raise ValueError(
      f'the model has {len(jaxpr.out_avals)} outputs; one array is expected'
    )
  return Program(jaxpr, grids, steps)


def shape(input_shape, batch: int | None):
  """Shape of a batch of examples; its first dimension may be symbolic."""
  return stablehlo.images(input_shape, batch).shape
