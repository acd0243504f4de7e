"""Every execution sums up the same whole numbers, those that NumPy finds.

The oracle is int64 arithmetic on the levels that enter a layer and on the
integers of its kernel, with windows written out.
"""

import dataclasses
import functools
import itertools
from typing import Any

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import compress
from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import layers
from djpq_jax.integer import planning
from djpq_jax.integer import products
from djpq_jax.models import resnet

# They run flax's batch norm.
pytestmark = pytest.mark.standard_promotion


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  layers: dict


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
  graph: Graph


class Single(nnx.Module):
  """One layer, called `calls` times on the same input."""

  def __init__(self, layer, calls=1):
    self.layer = layer
    self.calls = calls

  def __call__(self, x):
    return sum(self.layer(x * 0.5**i) for i in range(self.calls))


def hardened(
  layer, weight_bits, act_bits, *, signed, step=None, calls=1, below=None
):
  """A hardened model of one layer with random integers of all sizes.

  `below` is how many levels its input has below zero, if any number.
  """
  rng = np.random.default_rng(weight_bits + 100 * act_bits)
  top = 2 ** (weight_bits - 1) - 1
  dtype = np.int8 if weight_bits <= 8 else np.int16
  lowest = -top - (weight_bits < 8)
  kernel = rng.integers(lowest, top + 1, layer.kernel.shape).astype(dtype)
  kernel.flat[:2] = top, lowest
  step = np.float32(0.01) if step is None else step
  highest = 2 ** (act_bits - signed) - 1
  if below is not None:
    highest = 2**act_bits - 1 - below
  elif signed:
    below = highest + (act_bits < 8)
  else:
    below = 0
  act = harden.FixedQuantizer(jnp.float32(1 / highest), -below, highest)
  layer.kernel = layers.IntegerParam(jnp.asarray(kernel))
  layer.promote_dtype = nnx.data(
    layers.Operands(
      'layer',
      weight=harden.Dequantizer(jnp.asarray(step)),
      act=act,
      gate=None,
      feature_axis=-1,
      promote=layer.promote_dtype,
    )
  )
  structure: Any = Structure(Graph({'layer': None}))
  return harden.HardenedModel(Single(layer, calls), [], structure)


def make(kind, *args, **kwargs):
  """A layer with numbers from NumPy: those of jax.random compile."""
  layer = nnx.eval_shape(lambda: kind(*args, **kwargs, rngs=nnx.Rngs(0)))
  graphdef, shapes = nnx.split(layer)
  rng = np.random.default_rng(0)
  number = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(np.float32))
  return nnx.merge(graphdef, jax.tree.map(number, shapes))


def conv(inputs, outputs, window=(3, 3), **kwargs):
  return make(nnx.Conv, inputs, outputs, window, **kwargs)


def linear(inputs, outputs, **kwargs):
  return make(nnx.Linear, inputs, outputs, **kwargs)


def images(*shape, seed=1):
  """Between -1.2 and 1.2, with zeros, so that clips are met too."""
  x = np.random.default_rng(seed).uniform(-1.2, 1.2, shape)
  return np.where(np.abs(x) < 0.1, 0, x).astype(np.float32)


LAYERS = {
  'same': (lambda: conv(5, 7), (2, 6, 5, 5)),
  'valid_strided': (
    lambda: conv(3, 9, strides=2, padding='VALID'),
    (2, 7, 6, 3),
  ),
  'same_strided': (lambda: conv(20, 4, strides=(2, 1)), (2, 5, 6, 20)),
  'large_window': (lambda: conv(3, 4, (5, 5), strides=2), (2, 7, 7, 3)),
  'padded_dilated': (
    lambda: conv(18, 6, padding=((1, 2), (0, 3)), kernel_dilation=2),
    (2, 6, 6, 18),
  ),
  'point': (lambda: conv(6, 8, (1, 1)), (2, 4, 4, 6)),
  'point_strided_padded': (
    lambda: conv(6, 8, (1, 1), strides=2, padding=1),
    (2, 5, 5, 6),
  ),
  'depthwise': (lambda: conv(6, 6, feature_group_count=6), (2, 5, 5, 6)),
  'depthwise_strided': (
    lambda: conv(6, 6, feature_group_count=6, strides=2, padding=1),
    (2, 6, 7, 6),
  ),
  'multiplier': (lambda: conv(4, 8, feature_group_count=4), (2, 5, 5, 4)),
  'grouped': (lambda: conv(6, 4, feature_group_count=2), (2, 5, 5, 6)),
  'circular': (lambda: conv(3, 4, padding='CIRCULAR'), (2, 5, 5, 3)),
  'input_dilated': (lambda: conv(3, 4, input_dilation=2), (2, 4, 4, 3)),
  'line': (lambda: conv(3, 4, (3,), padding='CAUSAL'), (2, 8, 3)),
  'linear': (lambda: linear(9, 5), (2, 9)),
  'linear_no_bias': (lambda: linear(9, 5, use_bias=False), (2, 3, 9)),
  'general': (
    lambda: make(nnx.LinearGeneral, (3, 4), (2, 5), axis=(1, 2)),
    (2, 3, 4),
  ),
}


def windows(x, layer):
  """What NumPy sums up for a convolution: int64 [B, ..., out]."""
  kernel = np.asarray(layer.kernel[...], np.int64)
  n = kernel.ndim - 2
  many = lambda v: (v or 1,) * n if isinstance(v or 1, int) else tuple(v)
  strides, dilation = many(layer.strides), many(layer.kernel_dilation)
  spread = many(layer.input_dilation)
  padding = layer.padding
  reach = [(k - 1) * d for k, d in zip(kernel.shape, dilation)]
  if padding == 'CIRCULAR':
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], mode='wrap')
    padding = 'VALID'
  wide = np.zeros(
    (len(x), *((s - 1) * d + 1 for s, d in zip(x.shape[1:], spread)))
    + x.shape[-1:],
    np.int64,
  )
  wide[(slice(None), *(slice(None, None, d) for d in spread))] = x
  if padding == 'CAUSAL':
    padding = [(r, 0) for r in reach]
  elif padding == 'VALID':
    padding = [(0, 0)] * n
  elif padding == 'SAME':
    out = [-(-s // t) for s, t in zip(wide.shape[1:], strides)]
    total = [
      max(0, (o - 1) * t + r + 1 - s)
      for o, t, r, s in zip(out, strides, reach, wide.shape[1:])
    ]
    padding = [(t // 2, t - t // 2) for t in total]
  elif isinstance(padding, int):
    padding = [(padding, padding)] * n
  wide = np.pad(wide, [(0, 0), *padding, (0, 0)])
  counts = [
    (s - r - 1) // t + 1 for s, r, t in zip(wide.shape[1:], reach, strides)
  ]
  groups = layer.feature_group_count
  total = np.zeros((len(x), *counts, kernel.shape[-1]), np.int64)
  per_in, per_out = kernel.shape[-2], kernel.shape[-1] // groups
  for at in itertools.product(*map(range, kernel.shape[:n])):
    picked = wide[
      (
        slice(None),
        *(
          slice(i * d, i * d + (c - 1) * t + 1, t)
          for i, d, c, t in zip(at, dilation, counts, strides)
        ),
      )
    ]
    for g in range(groups):
      out = slice(g * per_out, (g + 1) * per_out)
      total[..., out] += (
        picked[..., g * per_in : (g + 1) * per_in] @ kernel[at][:, out]
      )
  return total


def expected(model, x):
  """NumPy's accumulators for a model of one layer."""
  layer, act = model.model.layer, model.model.layer.promote_dtype.act
  # No level of these is a tie.
  levels = np.round(x / float(act.step[...]))
  levels = np.clip(levels, act.lowest, act.highest).astype(np.int64)
  kernel = np.asarray(layer.kernel[...], np.int64)
  if isinstance(layer, nnx.Conv):
    return windows(levels, layer)
  if isinstance(layer, nnx.LinearGeneral):
    return np.einsum('bij,ij...->b...', levels, kernel)
  return levels @ kernel


def run(models, x):
  """(Accumulators, outputs) of many models, compiled together."""
  split = [nnx.split(compress.eval_view(m)) for m in models]

  @jax.jit
  def all_of_them(states, x):
    found = []
    for (graphdef, _), state in zip(split, states):
      with products.ACCUMULATORS.open() as taps:
        out = nnx.merge(graphdef, state)(x)
      found.append((taps, out))
    return found

  found = all_of_them([nnx.as_pure(state) for _, state in split], x)
  return zip(*jax.device_get(found))


def lowered(model):
  return [integer.lower(model, execution) for execution in integer.EXECUTIONS]


@pytest.mark.parametrize('name', LAYERS)
def test_all_executions_sum_up_what_numpy_does(name):
  layer, shape = LAYERS[name]
  cases = [(8, 8, False), (9, 10, True)]
  models = [hardened(layer(), w, a, signed=s) for w, a, s in cases]
  x = images(*shape)
  executed = [l for m in models for l in lowered(m)]
  sums, outputs = run(executed, x)
  for i, model in enumerate(models):
    right = expected(model, x)
    bias = model.model.layer.bias
    step = model.model.layer.promote_dtype.weight.step[...]
    scale = float(step) * float(model.model.layer.promote_dtype.act.step[...])
    y = scale * right + (0 if bias is None else np.asarray(bias[...]))
    assert np.abs(right).max() > 20
    for k in range(3):
      (found,), out = sums[3 * i + k]['layer'], outputs[3 * i + k]
      assert found.dtype == np.int32
      np.testing.assert_array_equal(found, right, err_msg=str(cases[i]))
      np.testing.assert_allclose(out, y, rtol=1e-5, atol=1e-5)
      np.testing.assert_array_equal(out, outputs[3 * i])
    plan = integer.plans(executed[3 * i])['layer']
    assert np.abs(right).max() <= plan.largest


@pytest.mark.parametrize('signed', [False, True], ids=['unsigned', 'signed'])
def test_bits(signed):
  """1 to 16 bits, one more for a sign; up to 16 x 11."""
  act_bits = [*range(1 + signed, 17)]
  weight_bits = [min(16, max(2, 19 - a if a > 8 else a)) for a in act_bits]
  models = [
    hardened(linear(6, 4), w, a, signed=signed)
    for w, a in zip(weight_bits, act_bits)
  ]
  x = images(3, 6)
  sums, _ = run([l for m in models for l in lowered(m)], x)
  for i, model in enumerate(models):
    assert model.model.layer.promote_dtype.act.bits() == act_bits[i]
    for taps in sums[3 * i : 3 * i + 3]:
      (found,) = taps['layer']
      np.testing.assert_array_equal(found, expected(model, x))


@pytest.mark.parametrize('below', [0, 1, 5])
def test_inputs_with_few_levels_below_zero(below):
  depthwise = conv(6, 6, feature_group_count=6)
  for weight_bits, bits, layer, shape in [
    (4, 3, conv(5, 7), (2, 5, 5, 5)),
    (8, 7, depthwise, (2, 5, 5, 6)),
    (8, 7, linear(9, 5), (2, 9)),
  ]:
    model = hardened(layer, weight_bits, bits, signed=True, below=below)
    act = model.model.layer.promote_dtype.act
    assert (act.lowest, act.highest) == (-below, 2**bits - 1 - below)
    assert act.bits() == bits
    x = images(*shape)
    sums, outputs = run(lowered(model), x)
    for taps, out in zip(sums, outputs):
      (found,) = taps['layer']
      np.testing.assert_array_equal(found, expected(model, x))
      np.testing.assert_array_equal(out, outputs[0])


def test_steps_per_channel():
  steps = np.linspace(0.01, 0.07, 7, dtype=np.float32)
  layer = lambda: conv(5, 7, use_bias=False)
  x = images(2, 6, 5, 5)
  model = hardened(layer(), 4, 4, signed=False, step=steps.reshape(1, 1, 1, 7))
  sums, outputs = run(lowered(model), x)
  for taps, out in zip(sums, outputs):
    (found,) = taps['layer']
    np.testing.assert_array_equal(found, expected(model, x))
    np.testing.assert_allclose(out, found * steps / 15, rtol=1e-5, atol=1e-6)
  # Where a step differs along what is summed, there is no one scale.
  step = np.full((1, 1, 5, 1), 0.01, np.float32)
  model = hardened(layer(), 4, 4, signed=False, step=step)
  assert 'steps differ along an axis' in integer.left_float(model)['layer']
  assert integer.plans(integer.lower(model)) == {}


def test_a_layer_that_is_called_twice():
  model = hardened(conv(5, 7), 4, 4, signed=True, calls=2)
  x = images(2, 5, 5, 5)
  sums, outputs = run(lowered(model), x)
  for taps, out in zip(sums, outputs):
    first, second = taps['layer']
    np.testing.assert_array_equal(first, expected(model, x))
    np.testing.assert_array_equal(second, expected(model, x / 2))
    np.testing.assert_array_equal(out, outputs[0])


@pytest.mark.parametrize('batch', [1, 64])
def test_sums_beyond_float32_are_cut(batch):
  """Every product the largest: plain float32 sums of these are wrong."""
  model = hardened(linear(1500, 3), 8, 8, signed=False)
  kernel = np.full((1500, 3), 127, np.int8)
  model.model.layer.kernel.set_value(jnp.asarray(kernel))
  x = np.ones((batch, 1500), np.float32)
  x[:, ::2] = 254 / 255
  models = lowered(model)
  sums, outputs = run(models, x)
  right = 127 * (750 * 255 + 750 * 254)
  assert right > 2**24
  for taps, out in zip(sums, outputs):
    (found,) = taps['layer']
    assert np.all(found == right)
    np.testing.assert_array_equal(out, outputs[0])
  plan = integer.plans(models[0])['layer']
  assert plan.largest == 127 * 255 * 1500
  assert plan.parts == ((0, 518), (518, 1036), (1036, 1500))
  assert 127 * 255 * 518 < 2**24 <= 127 * 255 * 519
  assert integer.plans(models[2])['layer'].parts == ((0, 1500),)


def test_sums_beyond_int32_stay_float():
  model = hardened(linear(6, 4), 16, 16, signed=True)
  why = integer.left_float(model)['layer']
  assert 'int32 ends at 2**31' in why
  model = hardened(conv(6, 4, (1, 1)), 16, 12, signed=True)
  assert integer.left_float(model) == {}


def test_what_has_no_integer_product_says_so():
  layer = make(nnx.ConvTranspose, 3, 4, (3, 3))
  model = hardened(layer, 4, 4, signed=True)
  why = integer.left_float(model)['layer']
  assert why == 'ConvTranspose has no integer product here'
  x = images(1, 4, 4, 3)
  np.testing.assert_array_equal(integer.lower(model)(x), model(x))


class Doubled(nnx.Linear):
  """Multiplies in a way of its own."""

  def __call__(self, x):
    x, kernel = self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
    return 2 * (x @ kernel)


def test_a_class_of_ones_own_keeps_its_product():
  model = hardened(make(Doubled, 6, 4), 4, 4, signed=True)
  assert integer.accumulators(integer.lower(model), images(3, 6)) == {}
  assert integer.left_float(model)['layer'].startswith('Doubled has no integer')
  x = images(3, 6)
  np.testing.assert_array_equal(integer.lower(model)(x), model(x))


def test_a_promotion_that_changes_values_stays():
  def scaled(operands, dtype=None):
    x, kernel, bias = nnx.nn.dtypes.promote_dtype(operands, dtype=dtype)
    return x, kernel * 0.25, bias

  model = hardened(linear(6, 4, promote_dtype=scaled), 4, 4, signed=True)
  assert 'promote_dtype may change' in integer.left_float(model)['layer']
  x = images(3, 6)
  np.testing.assert_array_equal(integer.lower(model)(x), model(x))


@pytest.mark.parametrize('kind', [nnx.Linear, nnx.Conv])
def test_the_dtype_that_a_product_is_asked_for(kind):
  how = dict(dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
  if kind is nnx.Conv:
    layer, x = conv(6, 4, use_bias=False, **how), images(3, 4, 4, 6)
  else:
    layer, x = linear(6, 4, use_bias=False, **how), images(3, 6)
  model = hardened(layer, 4, 4, signed=True)
  assert integer.left_float(model) == {}
  want, found = model(x), integer.lower(model)(x)
  assert (found.dtype, want.dtype) == (jnp.float32, jnp.float32)
  np.testing.assert_allclose(found, want, rtol=0.02, atol=0.02)


def test_a_product_of_ones_own_stays():
  def product(x, kernel, dimensions, **kwargs):
    return jnp.tanh(jax.lax.dot_general(x, kernel, dimensions, **kwargs))

  model = hardened(linear(6, 4, dot_general=product), 4, 4, signed=True)
  assert integer.left_float(model)['layer'].startswith('Linear has no integer')
  x = images(3, 6)
  np.testing.assert_array_equal(integer.lower(model)(x), model(x))


def test_lower_refuses():
  model = hardened(linear(6, 4), 4, 4, signed=True)
  with pytest.raises(ValueError, match="no execution 'int4'; there are sim"):
    integer.lower(model, 'int4')
  with pytest.raises(ValueError, match='runs on integers already'):
    integer.lower(integer.lower(model))


@pytest.mark.parametrize(
  ('bits', 'carrier'), [((4, 4), 'int16'), ((8, 8), 'int32')]
)
def test_depthwise_sums_are_as_narrow_as_they_may_be(bits, carrier):
  layer = conv(6, 6, feature_group_count=6)
  model = integer.lower(hardened(layer, *bits, signed=False), 'int8')
  plan = integer.plans(model)['layer']
  assert (plan.method, plan.carrier) == ('taps', carrier)


def test_eight_unsigned_bits_are_shifted():
  for act_bits, signed, shift in [(7, False, 0), (8, False, 128), (8, True, 0)]:
    model = hardened(linear(6, 4), 8, act_bits, signed=signed)
    plan = integer.plans(integer.lower(model, 'int8'))['layer']
    assert plan.shift == shift
    assert (plan.act_digits, plan.weight_digits) == (1, 1)


@pytest.mark.parametrize('count', [1, 2, 3])
def test_digits_make_up_the_number(count):
  top = 2 ** (7 * count) - 1
  n = np.arange(-top, top + 1, max(1, top // 1000))
  digits = planning.cut(n, count, np)
  np.testing.assert_array_equal(
    sum(d * 128**i for i, d in enumerate(digits)), n
  )
  if count > 1:
    assert max(np.abs(d).max() for d in digits) <= 127


class OptionA(nnx.Module):
  """A stem, a block with a shortcut of option A, a pool, one float layer."""

  def __init__(self, rngs):
    self.stem = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
    self.block = resnet.BasicBlock(4, 8, 2, rngs=rngs)
    self.head = nnx.Linear(8, tiny.CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.max_pool(nnx.relu(self.stem(x)), (2, 2), padding='SAME')
    return self.head(self.block(x).mean((1, 2)))


FLOAT_HEAD = compress.Rule(pattern='head', quantize=False)
PER_CHANNEL = compress.Rule(pattern='*', per_channel=True)
KINDS = {
  'depthwise': (tiny.Depthwise, (PER_CHANNEL,)),
  'residual': (tiny.Residual, (compress.Rule(pattern='*', prune=True),)),
  'option_a': (OptionA, (FLOAT_HEAD,)),
}


@functools.cache
def build(name):
  net = tiny.compressed(*KINDS[name])
  plan = tiny.some_plan(net)
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  return harden.harden(frozen)


@pytest.mark.parametrize('name', KINDS)
def test_models_run_alike(name):
  model = build(name)
  quantized = {
    hook.path for hook in compress.hooks(model) if hook.operands.weight
  }
  executed = lowered(model)
  for batch in (1, 64):
    x = tiny.batch(batch, seed=3)['image']
    sums, logits = run(executed, x)
    assert sums[0].keys() == quantized
    for found, predicted in zip(sums[1:], logits[1:]):
      chex.assert_trees_all_equal(found, sums[0])
      np.testing.assert_array_equal(predicted, logits[0])
    assert all(np.ptp(a) > 0 for kinds in sums[0].values() for a in kinds)
  # The hardened model itself rounds its products, and its sums.
  near = evaluation.predict(model, [x])
  np.testing.assert_allclose(logits[0], near, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_equal(integer.accumulators(executed[2], x), sums[2])


def test_rules_that_leave_a_layer_float():
  left = integer.left_float(build('option_a'))
  assert left == {'head': 'a rule leaves it in float32'}
  assert integer.left_float(build('residual')) == {}


class Counting(nnx.Module):
  """Writes to a Variable of its own when it is called."""

  def __init__(self, rngs):
    self.fc = nnx.Linear(5, 4, rngs=rngs)
    self.calls = nnx.Cache(jnp.zeros(()))

  def __call__(self, x):
    self.calls[...] = self.calls[...] + 1
    return self.fc(x) * self.calls[...]


def test_what_a_model_writes_is_kept():
  x = jnp.ones((2, 5))
  net = compress.compress(Counting(nnx.Rngs(0)), (), x)
  plan = compress.Plan(open={}, weight_bits={'fc': 4}, act_bits={'fc': 8})
  model = harden.harden(compress.freeze(net, plan, x))
  lowered = integer.lower(model)
  for _ in range(3):
    np.testing.assert_allclose(lowered(x), model(x), rtol=1e-5)


def test_lowering_leaves_the_model_as_it_was():
  model = build('residual')
  before = nnx.as_pure(nnx.state(model))
  integer.lower(model, 'int8')
  chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model)), before)
  assert integer.plans(model) == {}
