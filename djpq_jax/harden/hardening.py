"""Rounds a frozen model for good."""

from flax import nnx
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import layers
from djpq_jax.harden import norms
from djpq_jax.harden import parts


def harden(model: compress.Compressed) -> parts.HardenedModel:
  """Rounds a frozen model for good.

  Args:
    model: from `compress.freeze`, usually finetuned.

  Returns:
    A new model with integer kernels; its predictions are the frozen model's.

  Raises:
    TypeError: no compressed model, or one that is hardened already.
    ValueError: the model still has channels and bits to settle, or a
      variable of it is not finite (named).
  """
  compress.check(model, 'harden')
  if model.structure.plan is None:
    raise ValueError(
      'harden needs a model whose channels and bits are settled: freeze it '
      'with a plan first'
    )
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    value = leaf[...] if isinstance(leaf, nnx.Variable) else leaf
    if not jnp.issubdtype(value.dtype, jnp.floating):
      continue
    # What is not learned may be infinite, as a mask of attention.
    learned = isinstance(leaf, nnx.Param | nnx.BatchStat)
    # In NumPy, so that no program is compiled for each shape.
    value = np.asarray(value)
    bad = ~np.isfinite(value) if learned else np.isnan(value)
    if np.any(bad):
      raise ValueError(
        f'{"/".join(map(str, path))} is not finite; nothing was hardened'
      )
  inner = nnx.clone(compress.eval_view(model.model))
  gates = [parts.Scales(gate.mu[...]) for gate in model.gates]
  hardened = parts.HardenedModel(inner, gates, model.structure)
  for hook in compress.hooks(hardened):
    if hook.operands.weight is not None:
      _settle(hook)
  norms.settle(hardened)
  return hardened


def _settle(hook: compress.Hook):
  weight, act = hook.operands.weight, hook.operands.act
  integers = weight.integers(hook.layer.kernel[...])
  width = int(np.max(np.abs(np.asarray(integers))))
  dtype = jnp.int8 if width < 2**7 else jnp.int16
  hook.layer.kernel = layers.IntegerParam(integers.astype(dtype))
  hook.operands.weight = nnx.data(
    parts.Dequantizer(weight.unit, odd=weight.mid_rise)
  )
  lowest, highest = map(int, act.integers(jnp.array([-jnp.inf, jnp.inf])))
  hook.operands.act = nnx.data(
    parts.FixedQuantizer(act.grid()[0], lowest, highest)
  )
