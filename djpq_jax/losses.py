"""The terms of the training loss: task, teacher, gates and BOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from djpq_jax import compress
from djpq_jax import cost


def cross_entropy(logits, labels, *, smoothing: float = 0.0):
  """Mean cross-entropy in nats.

  Args:
    logits: float [B, classes].
    labels: int [B].
    smoothing: probability spread evenly over all classes.

  Returns:
    float32 scalar.
  """
  logits = logits.astype(jnp.float32)
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  targets = optax.smooth_labels(targets, smoothing)
  return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def distillation(logits, teacher_logits, *, temperature: float = 1.0):
  """Cross-entropy to a teacher's softened predictions (Hinton et al. 2015).

  Args:
    logits: float [B, classes].
    teacher_logits: float [B, classes]; no gradient flows to them.
    temperature: softening, > 0; the result is scaled by its square.

  Returns:
    float32 scalar, in nats.
  """
  teacher = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
  targets = jax.nn.softmax(teacher / temperature)
  scaled = logits.astype(jnp.float32) / temperature
  loss = jnp.mean(optax.softmax_cross_entropy(scaled, targets))
  return temperature**2 * loss


def gate_kl(model: compress.Compressed):
  """KL of all gates, each group weighted by its share of feature-map positions.

  The weights average to 1, so layers with large feature maps are pruned more
  [VIBNet's code weights groups like this].  float32 scalar, in nats.
  """
  compress.check(model, 'gate_kl')
  if not len(model.gates):
    return jnp.zeros(())
  groups = [model.structure.graph.groups[g] for g in model.structure.gated]
  positions = np.array([g.positions for g in groups], np.float32)
  weights = positions / positions.mean()
  return sum(float(w) * g.kl() for w, g in zip(weights, model.gates))


def relative_costs(model: compress.Compressed):
  """All costs now, as `cost.relative` has them; differentiable."""
  return cost.relative(compress.usage(model))


def relative_bops(model: compress.Compressed):
  """BOPs now, relative to the dense model at 32 x 32 bits; differentiable."""
  uses = compress.usage(model)
  return cost.relative_bops(uses, cost.float_bops(uses))
