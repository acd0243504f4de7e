"""Every term of the loss against its closed form."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import compress
from djpq_jax import graph
from djpq_jax import losses

LOGITS = jnp.asarray([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
LABELS = jnp.asarray([2, 1])
TEACHER = jnp.asarray([[1.0, 1.0, -2.0], [0.5, 0.0, 4.0]])


def _log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# -- cross-entropy ------------------------------------------------------------


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 1.0])
def test_cross_entropy_in_closed_form(smoothing):
  targets = (1 - smoothing) * np.eye(3)[np.asarray(LABELS)] + smoothing / 3
  want = -(targets * _log_softmax(LOGITS)).sum(axis=-1).mean()
  got = losses.cross_entropy(LOGITS, LABELS, smoothing=smoothing)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_logits_that_know_nothing_cost_log_classes():
  got = losses.cross_entropy(jnp.full((2, 3), 7.0), LABELS)
  np.testing.assert_allclose(got, np.log(3), rtol=1e-6)


def test_half_precision_logits_give_a_float32_loss():
  low = LOGITS.astype(jnp.bfloat16)
  assert losses.cross_entropy(low, LABELS).dtype == jnp.float32
  assert losses.distillation(low, low).dtype == jnp.float32


def test_huge_logits_stay_finite():
  f = lambda x: losses.cross_entropy(x, LABELS)
  value, grad = jax.value_and_grad(f)(1e30 * LOGITS)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


# -- distillation -------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_distillation_in_closed_form(temperature):
  student = _log_softmax(np.asarray(LOGITS) / temperature)
  teacher = np.exp(_log_softmax(np.asarray(TEACHER) / temperature))
  want = -(temperature**2) * (teacher * student).sum(axis=-1).mean()
  got = losses.distillation(LOGITS, TEACHER, temperature=temperature)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_teacher_learns_nothing_and_its_copy_has_nothing_to_learn():
  f = lambda student, teacher: losses.distillation(
    student, teacher, temperature=2.0
  )
  student, teacher = jax.grad(f, argnums=(0, 1))(LOGITS, TEACHER)
  np.testing.assert_array_equal(teacher, np.zeros((2, 3)))
  assert np.abs(student).max() > 0.1
  same, _ = jax.grad(f, argnums=(0, 1))(TEACHER, TEACHER)
  np.testing.assert_allclose(same, np.zeros((2, 3)), atol=1e-6)


# -- gates and BOPs -----------------------------------------------------------


class Net(nnx.Module):
  """Two gated groups: 4 channels on 8x8 positions, 6 channels on one."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.hidden = nnx.Linear(4, 6, rngs=rngs)
    self.head = nnx.Linear(6, 5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv(x)).mean((1, 2))
    return self.head(nnx.relu(self.hidden(x)))


X = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
MACS = dict(conv=8 * 8 * 9 * 3 * 4, hidden=24, head=30)


@functools.cache
def _traced():
  model = Net(nnx.Rngs(0))
  return model, graph.trace(model, X)


def _compressed(*rules):
  model, found = _traced()
  return compress.assemble(model, compress.resolve(found, rules))


def test_gate_kl_weights_groups_by_positions_and_averages_to_one():
  net = _compressed()
  assert [gate.size for gate in net.gates] == [4, 6]
  net.gates[0].log_sigma2[...] = jnp.asarray([-9.0, 0.0, 3.0, 1.0])
  net.gates[1].log_sigma2[...] = jnp.full(6, -2.0)
  kl = [
    0.5 * np.log1p(np.exp([9.0, 0.0, -3.0, -1.0])).sum(),
    0.5 * 6 * np.log1p(np.exp(2.0)),
  ]
  weights = np.asarray([64, 1]) / 32.5
  assert weights.mean() == 1
  np.testing.assert_allclose(losses.gate_kl(net), weights @ kl, rtol=1e-5)


def test_no_gates_no_kl():
  net = _compressed(compress.Rule(pattern='*', prune=False))
  assert float(losses.gate_kl(net)) == 0.0


def test_relative_bops_of_a_dense_model_of_8_bits():
  net = _compressed()
  np.testing.assert_allclose(losses.relative_bops(net), 64 / 1024, rtol=1e-5)


def test_relative_bops_counts_bits_and_open_gates():
  net = _compressed(compress.Rule(pattern='head', quantize=False))
  net.gates[0].log_sigma2[...] = jnp.asarray([-9.0, 9.0, 9.0, -9.0])
  weight = net.model.conv.promote_dtype.weight
  weight.log_step[...] = weight.log_clip[...] - jnp.log(jnp.float32(7))
  bops = MACS['conv'] / 2 * 4 * 8 + MACS['hidden'] / 2 * 64
  bops += MACS['head'] * 1024
  want = bops / (1024 * sum(MACS.values()))
  np.testing.assert_allclose(losses.relative_bops(net), want, rtol=1e-5)


def test_fewer_bops_is_downhill_in_every_step_and_gate():
  net = _compressed(compress.Rule(pattern='*', weight_bits=(2, 16)))
  graphdef, state = nnx.split(net)
  pure = nnx.as_pure(state)
  f = lambda pure: losses.relative_bops(nnx.merge(graphdef, pure))
  grads = dict(nnx.to_flat_state(jax.jit(jax.grad(f))(pure)))
  for hook in compress.hooks(net):
    where = ('model', hook.path, 'promote_dtype', 'weight')
    assert float(grads[(*where, 'log_step')]) < 0
    assert float(grads[(*where, 'log_clip')]) > 0
  for i in range(2):
    assert np.all(np.asarray(grads['gates', i, 'log_sigma2']) < 0)
  np.testing.assert_array_equal(grads['model', 'conv', 'kernel'], 0)
