"""A hardened model predicts what the frozen one did, and is as small as told.

Channels, bits and costs are counted from the arrays and the traced program,
and compared with what was planned.
"""

import dataclasses
import functools
import typing

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import cost
from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import layers
from djpq_jax import losses
from djpq_jax.ops import quantize

# They run flax's batch norm.
pytestmark = pytest.mark.standard_promotion

X = jax.ShapeDtypeStruct((2, *tiny.SHAPE), jnp.float32)
PRUNE_ALL = compress.Rule(pattern='*', prune=True)
KINDS = {
  'flatten': (tiny.Normed, ()),
  'depthwise': (tiny.Depthwise, ()),
  'residual': (tiny.Residual, (PRUNE_ALL,)),
}


class Built(typing.NamedTuple):
  plan: compress.Plan
  frozen: compress.Compressed
  hardened: harden.HardenedModel


@functools.cache
def build(name):
  net = tiny.compressed(*KINDS[name])
  plan = tiny.some_plan(net)
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  return Built(plan, frozen, harden.harden(frozen))


@pytest.fixture(params=KINDS)
def built(request):
  return build(request.param)


def test_predictions_stay(built):
  split = tiny.split(200, seed=5)
  before = evaluation.predictions(built.frozen, split)
  after = evaluation.predictions(built.hardened, split)
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(after.argmax(-1), before.argmax(-1))
  assert np.ptp(after, axis=0).min() > 0.01


def test_kernels_are_integers_that_fit_their_bits(built):
  for path, layer, operands in compress.hooks(built.hardened):
    assert isinstance(layer.kernel, layers.IntegerParam)
    kernel = np.asarray(layer.kernel[...])
    assert kernel.dtype == np.int8
    bits = built.plan.weight_bits[path]
    assert operands.weight.odd is (bits == 2)
    if operands.weight.odd:
      assert np.all(kernel % 2)
      kernel = kernel >> 1
    half = 2 ** (bits - 1)
    assert -half <= kernel.min() <= kernel.max() < half
    assert operands.act.bits() <= built.plan.act_bits[path]
  # Nothing that an optimizer would train is left of grids and gates.
  left = nnx.state(built.hardened)
  for kind in (layers.QuantParam, layers.GateParam):
    assert not jax.tree.leaves(nnx.filter_state(left, kind))


def test_inputs_are_on_their_grid(built):
  x = tiny.batch(32)['image']
  taps = compress.inputs_of(built.hardened, x)
  for path, _, operands in compress.hooks(built.hardened):
    step = float(operands.act.step[...])
    levels = np.asarray(jax.jit(operands.act.__call__)(taps[path][0])) / step
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    bits = built.plan.act_bits[path] - operands.act.signed
    assert np.round(levels).max() <= operands.act.highest == 2**bits - 1
    assert np.round(levels).min() >= operands.act.lowest
    assert operands.act.lowest in (-(2**bits), 1 - 2**bits, 0)


SIDES = [
  (dict(signed=False), 0, 7),
  (dict(signed=True), -7, 7),
  (dict(signed=True, narrow_range=False), -8, 7),
  (dict(signed=True, below=2 / 7), -2, 7),
]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize(('sides', 'lowest', 'highest'), SIDES, ids=str)
def test_a_settled_grid_is_the_one_that_was_trained(
  sides, lowest, highest, dtype
):
  clip = 1.7
  step = jnp.float32(clip / highest)
  act = harden.FixedQuantizer(step, lowest, highest)
  x = np.random.default_rng(0).normal(0, 1.5, 1000)
  x = jnp.asarray([*x, -np.inf, np.inf, np.nan, 0, -0.0, clip], dtype)
  expected = jax.jit(lambda x: quantize.quantize(x, step, clip, **sides))(x)
  for quantizer in (act, jax.jit(act.__call__)):
    got = quantizer(x)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(
      got.astype(jnp.float32), expected.astype(jnp.float32)
    )
  finite = x[jnp.isfinite(x)]
  np.testing.assert_array_equal(
    act.integers(finite), quantize.quantize_to_int(finite, step, clip, **sides)
  )
  assert act.signed == (lowest < 0)


def test_the_derivative_of_a_settled_grid_is_straight_through():
  act = harden.FixedQuantizer(jnp.float32(0.5), -2, 3)
  x = jnp.array([-9, -0.9, -0.2, 0, 0.7, 1.4, 2.0])
  slopes = jax.vmap(jax.grad(act.__call__))(x)
  np.testing.assert_array_equal(slopes, [0, 1, 1, 1, 1, 1, 0])


@pytest.mark.parametrize(
  'x', [0.7, [0.7], np.float64(0.7), np.array([0.7]), np.array(0.7, 'float16')]
)
def test_a_settled_grid_takes_what_jax_takes(x):
  act = harden.FixedQuantizer(jnp.float32(0.5), -2, 3)
  np.testing.assert_array_equal(act(x), np.full(np.shape(x), 0.5, 'float16'))
  np.testing.assert_array_equal(act.integers(x), np.full(np.shape(x), 1))


def test_layers_of_bfloat16_without_implicit_promotion():
  with jax.numpy_dtype_promotion('strict'):
    act = harden.FixedQuantizer(jnp.float32(0.5), -2, 3)
    assert act(jnp.full(3, 0.7, jnp.bfloat16)).dtype == jnp.bfloat16


def test_bytes_are_no_input_of_a_grid():
  act = harden.FixedQuantizer(jnp.float32(0.1), 0, 7)
  with pytest.raises(TypeError, match='must be floating, not uint8'):
    act(jnp.zeros(3, jnp.uint8))
  with pytest.raises(TypeError, match='must be floating, not uint8'):
    act.integers(jnp.zeros(3, jnp.uint8))


def test_count_of_the_arrays_is_what_was_planned(built):
  planned = compress.planned_usage(built.hardened.structure, built.plan)
  rows = harden.count(built.hardened, X)
  assert [row.name for row in rows] == [use.name for use in planned]
  for row, use in zip(rows, planned):
    assert row.macs == cost.macs([use])
    assert row.weights == use.weights * use.keep_in * use.keep_out
    assert (row.weight_bits, row.act_bits) == (use.weight_bits, use.act_bits)
    assert row.bops == cost.bops([use])
  totals = harden.totals(built.hardened, rows)
  assert totals['macs'] == cost.macs(planned) < totals['float_macs']
  assert totals['bops'] == cost.bops(planned)
  assert totals['float_macs'] == sum(row.float_macs for row in rows)
  assert totals['float_bops'] == 32 * 32 * totals['float_macs']
  assert totals['relative_bops'] == totals['bops'] / totals['float_bops']


def test_channels_are_gone():
  plan, _, hardened = build('flatten')
  kept = int(plan.open['conv'].sum())
  assert kept == 3
  model = hardened.model
  assert model.conv.kernel.shape == (3, 3, 1, kept)
  assert model.bn.scale.shape == (kept,)
  assert model.head.kernel.shape == (4 * 4 * kept, tiny.CLASSES)
  assert hardened.gates[0].scale.shape == (kept,)
  conv, head = harden.count(hardened, X)
  assert (conv.in_size, conv.out_size) == (1, 6)
  assert (conv.kept_in, conv.kept_out) == (1, kept)
  assert (head.kept_in, head.in_size) == (16 * kept, 96)
  assert conv.macs == 16 * 9 * kept
  assert head.macs == 16 * kept * tiny.CLASSES
  assert conv.weights == 9 * kept


def test_a_depthwise_layer_shrinks_once():
  plan, _, hardened = build('depthwise')
  kept = {name: int(mask.sum()) for name, mask in plan.open.items()}
  rows = {row.name: row for row in harden.count(hardened, X)}
  assert set(kept) == {'conv', 'pointwise'}
  assert rows['depthwise'].macs == 16 * 9 * kept['conv']
  assert rows['pointwise'].macs == 16 * kept['conv'] * kept['pointwise']
  assert hardened.model.depthwise.kernel.shape == (3, 3, 1, kept['conv'])


def test_the_frozen_model_is_left_as_it_was():
  _, frozen, _ = build('flatten')
  before = nnx.as_pure(nnx.state(frozen))
  again = harden.harden(frozen)
  again.model.conv.kernel.set_value(jnp.zeros_like(again.model.conv.kernel))
  again.model.bn.mean.set_value(jnp.zeros_like(again.model.bn.mean))
  after = nnx.as_pure(nnx.state(frozen))
  jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize('epsilon', [1e-5, 1e-3, 0.3])
def test_a_batch_norm_is_one_product_and_one_sum(epsilon):
  _, frozen, _ = build('flatten')
  frozen = nnx.clone(frozen)
  was = frozen.model.bn
  was.epsilon = epsilon
  rng = np.random.default_rng(4)
  for variable in (was.mean, was.var, was.scale, was.bias):
    shape = variable[...].shape
    variable.set_value(jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32))
  norm = harden.harden(frozen).model.bn
  np.testing.assert_array_equal(norm.mean[...], 0)
  np.testing.assert_array_equal(norm.var[...] + jnp.float32(epsilon), 1)
  x = jnp.asarray(rng.normal(size=(4, *was.mean[...].shape)), jnp.float32)
  factor, summand = norm.scale[...][None], norm.bias[...][None]
  found = norm(x, use_running_average=True)
  np.testing.assert_allclose(found, x * factor + summand, rtol=1e-6)
  wanted = was(x, use_running_average=True)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_batch_norm_without_a_place_for_its_statistics_keeps_them():
  _, frozen, _ = build('flatten')
  frozen = nnx.clone(frozen)
  frozen.model.bn.bias = nnx.data(None)
  norm = harden.harden(frozen).model.bn
  for name in ('mean', 'var', 'scale'):
    was = getattr(frozen.model.bn, name)
    np.testing.assert_array_equal(getattr(norm, name)[...], was[...])


def test_bits_are_counted_from_what_is_there():
  """Not from the plan: smaller integers are cheaper integers."""
  plan, _, hardened = build('flatten')
  changed = nnx.clone(hardened)
  kernel = changed.model.head.kernel
  kernel.set_value(jnp.clip(kernel[...], -1, 1))
  act = changed.model.head.promote_dtype.act
  act.highest = 3
  was, now = harden.count(hardened, X)[1], harden.count(changed, X)[1]
  assert (was.weight_bits, was.act_bits) == (
    plan.weight_bits['head'],
    plan.act_bits['head'],
  )
  assert (now.weight_bits, now.act_bits) == (2, 2)
  assert now.bops == 4 * now.macs


def test_wide_and_float_layers():
  """More than 8 bits take int16; a layer that a rule spares stays float."""
  rules = [compress.Rule(pattern='head', quantize=False)]
  net = tiny.compressed(tiny.Mlp, rules)
  plan = compress.Plan(
    open={}, weight_bits={'hidden': 12}, act_bits={'hidden': 8}
  )
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  hardened = harden.harden(frozen)
  hidden, head = harden.count(hardened, X)
  assert hardened.model.hidden.kernel[...].dtype == jnp.int16
  assert (hidden.weight_bits, hidden.act_bits) == (12, 8)
  assert hardened.model.head.kernel[...].dtype == jnp.float32
  assert (head.weight_bits, head.act_bits) == (32, 32)
  assert head.bops == 32 * 32 * head.macs
  split = tiny.split(64)
  np.testing.assert_allclose(
    evaluation.predictions(hardened, split),
    evaluation.predictions(frozen, split),
    rtol=1e-5,
    atol=1e-5,
  )


def test_products_outside_of_layers_are_counted():
  class Attention(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Linear(4, 6, rngs=rngs)
      self.head = nnx.Linear(6, tiny.CLASSES, rngs=rngs)

    def __call__(self, x):
      x = self.embed(x[..., 0])
      scores = nnx.softmax(jnp.einsum('btc,bsc->bts', x, x))
      return self.head(jnp.einsum('bts,bsc->btc', scores, x).mean(1))

  net = tiny.compressed(Attention)
  plan = tiny.some_plan(net)
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  rows = harden.count(harden.harden(frozen), X)
  products = [row for row in rows if row.kind == 'product']
  assert [row.macs for row in products] == [4 * 4 * 6] * 2
  assert all(row.bops == 32 * 32 * row.macs for row in products)
  planned = compress.planned_usage(frozen.structure, plan)
  assert sum(row.bops for row in rows) == cost.bops(planned)


def test_only_settled_models_are_hardened():
  net = tiny.compressed(tiny.Normed)
  with pytest.raises(ValueError, match='freeze it with a plan first'):
    harden.harden(net)


@pytest.mark.parametrize(
  ('path', 'bad'),
  [
    ('model/head/kernel', np.nan),
    ('model/bn/var', np.inf),
    ('model/conv/promote_dtype/act/log_clip', np.nan),
  ],
)
def test_what_is_not_finite_is_named(path, bad):
  broken = nnx.clone(build('flatten').frozen)
  variable = broken
  for name in path.split('/'):
    variable = getattr(variable, name)
  value = np.array(variable[...])
  value.flat[-1] = bad
  variable.set_value(jnp.asarray(value))
  with pytest.raises(ValueError, match=f'{path} is not finite; nothing was'):
    harden.harden(broken)


def _inner(bn, x):
  return bn(x, use_running_average=False)


CALLS = {
  'usual': lambda bn, x: bn(x),
  'running': lambda bn, x: bn(x, use_running_average=True),
  'batch': _inner,
  'jit': lambda bn, x: nnx.jit(_inner)(bn, x),
  'remat': lambda bn, x: nnx.remat(_inner)(bn, x),
  'both': lambda bn, x: bn(x) + _inner(bn, x),
  'read': lambda bn, x: bn(x) * jnp.sqrt(bn.var[...])[None],
  'read inside': lambda bn, x: nnx.jit(lambda bn, x: x - bn.bias[...][None])(
    bn, bn(x)
  ),
  'usual inside': lambda bn, x: nnx.remat(lambda bn, x: bn(x))(bn, x),
}


class Stated(nnx.Module):
  """A batch norm of some kind, and an array that nobody learns."""

  def __init__(self, call, param_dtype):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(6, 12, rngs=rngs)
    self.bn = nnx.BatchNorm(12, param_dtype=param_dtype, rngs=rngs)
    self.bn.mean[...] = jnp.linspace(-20, 20, 12)
    self.bn.var[...] = jnp.linspace(1, 9, 12)
    self.head = nnx.Linear(12, 5, rngs=rngs)
    self.mask = nnx.Variable(jnp.where(jnp.arange(5) == 3, -jnp.inf, 0.0))
    self.call = call

  def __call__(self, x):
    x = CALLS[self.call](self.bn, self.hidden(x))
    return self.head(nnx.relu(x)) + self.mask[...][None]


@pytest.mark.parametrize(
  ('call', 'param_dtype'),
  [*((call, jnp.float32) for call in CALLS), ('usual', jnp.bfloat16)],
)
def test_batch_norm_as_the_model_asks_for_it(call, param_dtype):
  x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
  net = compress.compress(Stated(call, param_dtype), x=x)
  bits = {'hidden': 4, 'head': 4}
  plan = compress.Plan(open={}, weight_bits=bits, act_bits=bits)
  frozen = compress.freeze(net, plan, x)
  hardened = harden.harden(frozen)
  want = compress.eval_view(frozen)(x)
  np.testing.assert_allclose(hardened(x), want, rtol=1e-5, atol=1e-5)
  settled = call in ('usual', 'running', 'usual inside')
  settled &= param_dtype == jnp.float32
  assert (not hardened.model.bn.mean[...].any()) == settled


class Domains(nnx.Module):
  """Two batch norms with statistics of their own, and one scale and bias."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(6, 12, rngs=rngs)
    self.norms = nnx.List([nnx.BatchNorm(12, rngs=rngs) for _ in range(2)])
    self.norms[0].mean[...] = jnp.linspace(-2, 2, 12)
    self.norms[1].var[...] = jnp.linspace(1, 9, 12)
    self.norms[1].scale = self.norms[0].scale
    self.norms[1].bias = self.norms[0].bias
    self.head = nnx.Linear(12, 5, rngs=rngs)

  def __call__(self, x):
    x = self.hidden(x)
    return self.head(nnx.relu(self.norms[0](x)) + nnx.relu(self.norms[1](x)))


def test_batch_norms_that_share_a_scale_stay():
  x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
  net = compress.compress(Domains(), x=x)
  frozen = compress.freeze(net, allocate.uniform(net, 4, 4), x)
  hardened = harden.harden(frozen)
  want = compress.eval_view(frozen)(x)
  np.testing.assert_allclose(hardened(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('largest', 'unsigned', 'signed'),
  [(1, 1, 2), (2, 2, 3), (3, 2, 3), (4, 3, 4), (127, 7, 8)]
  + [(128, 8, 9), (255, 8, 9), (32767, 15, 16)],
)
def test_bits_between(largest, unsigned, signed):
  assert harden.bits_between(0, largest) == unsigned
  assert harden.bits_between(-largest, largest) == signed
  assert harden.bits_between(-largest - 1, largest) == signed
  assert harden.bits_between(-1, largest - 1) == unsigned


def test_reports_are_plain_numbers():
  """They go into a manifest: no NumPy and no JAX scalars."""
  for row in harden.count(build('residual').hardened, X):
    for field, value in dataclasses.asdict(row).items():
      assert type(value) in (int, str), field


@pytest.mark.parametrize(
  ('lowest', 'largest', 'bits'),
  [(-1, 0, 2), (-1, 1, 2), (-2, 1, 2), (-2, 2, 3), (-3, 1, 3), (-4, 0, 3)]
  + [(-128, 127, 8), (-129, 0, 9), (0, 128, 9), (0, 0, 2)],
)
def test_bits_of_kernels_are_those_of_twos_complement(lowest, largest, bits):
  assert harden.kernel_bits(np.array([[lowest], [largest]], np.int16)) == bits


def plain():
  return tiny.Mlp(nnx.Rngs(0))


@pytest.mark.parametrize('kind', ['plain', 'hardened'])
@pytest.mark.parametrize(
  'call',
  [
    lambda model: harden.harden(model),
    lambda model: compress.usage(model),
    lambda model: losses.gate_kl(model),
    lambda model: losses.relative_bops(model),
    lambda model: allocate.plan(model, 0.01),
    lambda model: allocate.uniform(model, 4, 4),
  ],
)
def test_what_trains_is_neither_plain_nor_hardened(kind, call):
  model = plain() if kind == 'plain' else build('flatten').hardened
  with pytest.raises(TypeError, match='takes a compressed model, from'):
    call(model)


@pytest.mark.parametrize('kind', ['plain', 'frozen'])
@pytest.mark.parametrize(
  'call', [lambda model: harden.count(model, X), integer.lower]
)
def test_only_what_is_hardened_is_counted_and_lowered(kind, call):
  model = plain() if kind == 'plain' else build('flatten').frozen
  with pytest.raises(TypeError, match='takes a hardened model, from harden'):
    call(model)


def test_plans_that_are_none():
  images = tiny.batch(64)['image']
  net = compress.compress(plain(), (), images)
  with pytest.raises(TypeError, match='freeze takes a compressed model, from'):
    compress.freeze(plain(), allocate.uniform(net, 4, 4), images)
  with pytest.raises(TypeError, match='freeze takes a plan, as from'):
    compress.freeze(net, images, images)
  plan = allocate.uniform(net, 4, 4)
  path = next(iter(plan.act_bits))
  for bits in (0, 3.5, 17):
    odd = dataclasses.replace(plan, weight_bits=plan.weight_bits | {path: bits})
    with pytest.raises(ValueError, match=f'{bits} bits, which are whole'):
      compress.freeze(net, odd, images)
  del plan.act_bits[path]
  with pytest.raises(
    ValueError, match=f'the plan has no bits for layer {path}'
  ):
    compress.freeze(net, plan, images)
