"""The hook that puts gates and quantizers into a layer.

Flax layers that multiply and accumulate call `promote_dtype` on
`(inputs, kernel, bias)` right before they do; `Operands` takes that place,
gates and quantizes the input, and quantizes the kernel.  The gates belong to
channel groups, not to layers, so `Compressed` draws them once per call and
hands each hook its own.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import taps

# What enters each layer, gated and not yet quantized: one array per call.
INPUTS = taps.Tap('djpq_inputs')
# The kernel that each layer hands over, not yet quantized.
KERNELS = taps.Tap('djpq_kernels')


class GateValue(nnx.Variable):
  """The gates of a layer's input during one call, [1 or B, channels]."""


class IntegerParam(nnx.Variable):
  """A kernel held as whole numbers of its step; it has no gradient."""


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
    """Returns the gated, quantized and promoted (inputs, kernel, bias).

    A layer without a bias may leave it out.
    """
    inputs, kernel, *bias = operands
    inputs = self.entering(inputs)
    KERNELS.see(self.name, kernel)
    with jax.named_scope('quantize'):  # a name for profilers
      if self.act is not None:
        inputs = self.act(inputs)
      if self.weight is not None:
        kernel = self.weight(kernel)
    return self.promote((inputs, kernel, *bias), **kwargs)

  def entering(self, inputs):
    """What is quantized next: the inputs, gated; `INPUTS` sees it."""
    if not jnp.issubdtype(jnp.result_type(inputs), jnp.inexact):
      # Layers take integers and promote them; images of bytes are such.
      inputs = jnp.asarray(inputs, jnp.float32)
    with jax.named_scope('gate'):
      inputs = self._gated(inputs)
    INPUTS.see(self.name, inputs)
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
    assert self.feature_axis is not None  # else its group has no gate
    if z.shape[0] > 1 and inputs.ndim + self.feature_axis == 0:
      raise ValueError(
        f'layer {self.name} gets a single example, as under jax.vmap, but each '
        'of a batch has gates of its own; call it on the whole batch'
      )
    if z.shape[0] not in (1, inputs.shape[0]):
      if inputs.shape[0] % z.shape[0]:
        raise ValueError(
          f'layer {self.name} gets inputs whose leading axis has '
          f'{inputs.shape[0]} entries, of a batch of {z.shape[0]} examples: '
          'each example has gates of its own, so the batch has to stay the '
          'leading axis, alone or folded with others'
        )
      # A batch of examples folded with another axis, as in [B * T, C].
      z = jnp.repeat(z, inputs.shape[0] // z.shape[0], axis=0)
    shape = [1] * inputs.ndim
    shape[0] = z.shape[0]
    shape[self.feature_axis] = z.shape[1]
    # The product is taken in the input's dtype: it is quantized next.
    return inputs * z.reshape(shape).astype(inputs.dtype)
