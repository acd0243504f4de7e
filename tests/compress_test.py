"""Rules, surgery and counts on small models of every shape of network."""

import dataclasses
import fractions
import functools
import json
import subprocess
import sys

from flax import nnx
import graph_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import surgery_test
import tiny

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import cost
from djpq_jax import graph
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import layers
from djpq_jax.compress import structure
from djpq_jax.models import cnn

# The arithmetic of flax's own layers mixes dtypes.
standard_promotion = pytest.mark.standard_promotion

FLOAT = compress.Rule(pattern='*', quantize=False)
WIDE = compress.Rule(
  pattern='*', prune=True, weight_bits=(16, 16), act_bits=(16, 16)
)


class Built:
  """A model of graph_test with values, a batch for it, and its graph."""

  def __init__(self, name):
    abstract, shape = graph_test.build(name)
    self.model = surgery_test.fill(abstract)
    rng = np.random.default_rng(1)
    self.x = jnp.asarray(rng.normal(size=shape.shape), jnp.float32)
    self.graph = graph.trace(abstract, shape)

  def assemble(self, *rules, bits=8.0):
    """The compressed model, its activations not calibrated."""
    structure = compress.resolve(self.graph, rules)
    return compress.assemble(self.model, structure, bits)

  def compress(self, *rules, bits=8.0):
    """What `compress.compress` does, without tracing again."""
    net = self.assemble(*rules, bits=bits)
    compress.calibrate(net, self.x)
    return net


@functools.cache
def built(name):
  return Built(name)


@functools.cache
def small_cnn():
  """A DigitsCNN in train mode, and a batch."""
  make = lambda: cnn.DigitsCNN(channels=(4, 4, 6, 6), rngs=nnx.Rngs(0))
  model = surgery_test.fill(nnx.eval_shape(make))
  rng = np.random.default_rng(1)
  return model, jnp.asarray(rng.random((4, 8, 8, 1)), jnp.float32)


def call(*models_and_x):
  *models, x = models_and_x
  return surgery_test.call([compress.eval_view(m) for m in models], x)


def pure(model):
  """The static half of a model and its values by path, keys left out."""
  graphdef, _ = nnx.split(model)
  return graphdef, surgery_test.values(model)


def assert_same(model, before):
  graphdef, values = pure(model)
  assert graphdef == before[0]
  assert list(values) == list(before[1])
  for path, value in values.items():
    np.testing.assert_array_equal(value, before[1][path], err_msg=path)


def operands_of(net):
  return {path: operands for path, _, operands in compress.hooks(net)}


def settle(net, masks, seed=0):
  """Gives every gate a scale, and closes what a mask leaves out."""
  rng = np.random.default_rng(seed)
  for g, gate in zip(net.structure.gated, net.gates):
    mask = masks[net.structure.groups[g].name]
    scale = rng.uniform(0.5, 1.5, gate.size) * rng.choice([-1, 1], gate.size)
    gate.mu[...] = jnp.asarray(scale, jnp.float32)
    gate.log_sigma2[...] = jnp.where(jnp.asarray(mask), -9.0, 9.0)


def masks_of(net, seed=0):
  rng = np.random.default_rng(seed)
  masks = {}
  for g in net.structure.gated:
    group = net.structure.groups[g]
    masks[group.name] = rng.random(group.size) < 0.6
    masks[group.name][rng.permutation(group.size)[:2]] = [True, False]
  return masks


def plan_for(net, masks, bits=16):
  bits = {p: bits for p, o in operands_of(net).items() if o.weight is not None}
  return compress.Plan(open=masks, weight_bits=bits, act_bits=bits)


def draws(net, x, *seeds):
  """(output, what entered each layer) per seed; None is without noise."""
  graphdef, state = nnx.split(net)

  @jax.jit
  def run(state, x):
    net = nnx.merge(graphdef, state)
    found = []
    for seed in seeds:
      key = None if seed is None else jax.random.key(seed)
      with layers.INPUTS.open() as taps:
        found.append((net(x, gate_key=key), taps))
    return found

  return run(state, x)


def counts(*nets):
  """(MACs, BOPs) now of each model, in one program."""
  graphdefs, states = zip(*map(nnx.split, nets))

  @jax.jit
  def run(states):
    uses = [compress.usage(nnx.merge(*pair)) for pair in zip(graphdefs, states)]
    return [(cost.macs(u), cost.bops(u)) for u in uses]

  return run(states)


# -- rules --------------------------------------------------------------------


def test_defaults():
  found = compress.resolve(built('residual').graph, [])
  first, *rest = found.layers.values()
  assert first.act_bits == (8, 8)  # an image
  assert first.weight_bits == (2, 8)
  assert {s.act_bits for s in rest} == {(2, 8)}
  assert all(s.quantize and not s.per_channel for s in found.layers.values())
  reasons = {g.name: g.reason for g in found.groups}
  kept = 'residual stream, kept by default; a rule can allow it'
  assert reasons.pop('stem/conv+b1/conv') == reasons.pop('proj+b2/conv') == kept
  assert reasons.pop('a1/conv') == reasons.pop('a2/conv') == ''
  assert all(reasons.values())  # input and output


def test_an_eighth_of_each_group_stays_by_default():
  found = compress.resolve(built('inverted_residual').graph, [])
  least = {g.name: g.min_channels for g in found.groups}
  assert least['expand'] == 2  # of 12
  net = built('inverted_residual').assemble()
  net.gates[0].log_sigma2[...] = jnp.arange(12.0) + 50
  np.testing.assert_array_equal(net.gates[0].open_mask(), np.arange(12) < 2)


def test_a_rule_allows_a_residual_group_if_it_allows_all_its_producers():
  def gated(*patterns):
    rules = [compress.Rule(pattern=p, prune=True) for p in patterns]
    found = compress.resolve(built('residual').graph, rules)
    return {found.groups[g].name for g in found.gated}

  branches = {'a1/conv', 'a2/conv'}
  assert gated('stem/*') == branches
  assert gated('stem/*', 'b1/*') == branches | {'stem/conv+b1/conv'}
  # Nobody can prune what the graph cannot.
  assert 'head' not in gated('*')


def test_a_rule_keeps_a_group():
  rule = compress.Rule(pattern='conv1', prune=False)
  found = compress.resolve(built('chain').graph, [rule])
  reasons = {g.name: g.reason for g in found.groups}
  assert reasons['conv1'] == 'a rule keeps its channels'
  assert reasons['conv2'] == ''


@pytest.mark.parametrize(
  'settings', [dict(exponent=True), dict(narrow_range=True), dict(mid_rise=0)]
)
def test_what_needs_a_zero_has_two_bits_in_any_case(settings):
  settings = {name: bool(value) for name, value in settings.items()}
  rules = [compress.Rule(pattern='conv2', **settings)]
  graph = built('chain').graph
  found = compress.resolve(graph, rules, one_bit=True).layers
  assert [s.weight_bits for s in found.values()] == [(1, 8), (2, 8), (1, 8)]
  rules = [compress.Rule(pattern='conv1', weight_bits=(3, 8))]
  found = compress.resolve(graph, rules, one_bit=True).layers
  assert [s.weight_bits for s in found.values()] == [(3, 8), (1, 8), (1, 8)]


def test_later_rules_win_field_by_field():
  rules = [
    compress.Rule(pattern='conv*', weight_bits=(3, 4), align=2),
    compress.Rule(pattern='conv2', weight_bits=(5, 6)),
    compress.Rule(pattern='*', act_bits=(4, 4)),
  ]
  found = compress.resolve(built('chain').graph, rules).layers
  assert [s.weight_bits for s in found.values()] == [(3, 4), (5, 6), (2, 8)]
  assert [s.align for s in found.values()] == [2, 2, 1]
  assert [s.act_bits for s in found.values()] == [(4, 4)] * 3
  found = compress.resolve(built('chain').graph, rules[1::-1]).layers
  assert found['conv2'].weight_bits == (3, 4)


def test_rules_that_match_nothing_are_named_with_the_layers():
  rules = [compress.Rule(pattern=p) for p in ('conv*', 'cnov1', 'Head')]
  message = 'match no layer: cnov1, Head; the layers are conv1, conv2, head'
  with pytest.raises(ValueError, match=message):
    compress.resolve(built('chain').graph, rules)


@pytest.mark.parametrize(
  ('settings', 'align', 'least'),
  [
    (dict(min_channels=1), 1, 1),
    (dict(min_channels=3), 1, 3),
    (dict(align=3), 3, 3),
    (dict(align=2, min_channels=3), 2, 4),
  ],
)
def test_align_and_min_channels(settings, align, least):
  rule = compress.Rule(pattern='conv1', **settings)
  found = compress.resolve(built('chain').graph, [rule])
  group = {g.name: g for g in found.groups}['conv1']
  assert (group.align, group.min_channels) == (align, least)
  assert group.reason == ''


@pytest.mark.parametrize('settings', [dict(align=8), dict(min_channels=8)])
def test_settings_that_leave_nothing_to_remove(settings):
  rule = compress.Rule(pattern='conv1', **settings)
  found = compress.resolve(built('chain').graph, [rule])
  reasons = {g.name: g.reason for g in found.groups}
  assert 'leave nothing to remove' in reasons['conv1']


def test_producers_of_one_group_agree_on_the_least_common_multiple():
  rules = [
    compress.Rule(pattern='stem/*', align=2, prune=True),
    compress.Rule(pattern='b1/*', align=4, min_channels=3, prune=True),
  ]
  found = compress.resolve(built('residual').graph, rules)
  group = {g.name: g for g in found.groups}['stem/conv+b1/conv']
  assert (group.align, group.min_channels, group.reason) == (4, 4, '')


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(weight_bits=(0, 8)), r"weight_bits .*'c\*'.*1 <= min <= max <= 16"),
    (dict(weight_bits=(4, 17)), 'weight_bits'),
    (dict(weight_bits=(6, 4)), r'got \(6, 4\)'),
    (dict(weight_bits=(4,)), 'weight_bits'),
    (dict(act_bits=(0, 8)), 'act_bits.*1 <= min'),
    (dict(act_bits=(2, float('nan'))), 'act_bits'),
    (dict(weight_bits=(2.5, 2.7)), r'a whole number within, got \(2.5, 2.7\)'),
    (dict(weight_bits=8), r'weight_bits .* must be \(min, max\) .*, got 8'),
    (dict(weight_bits='48'), "weight_bits .*, got '48'"),
    (dict(act_bits=('a', 8)), r"act_bits .*, got \('a', 8\)"),
    (dict(act_bits=(True, 8)), r'act_bits .*, got \(True, 8\)'),
    (dict(align=0), "align .*'c\\*' must be a whole number, at .* 1, got 0"),
    (dict(align='a'), "align .* whole number, at least 1, got 'a'"),
    (dict(align=2.5), 'align .* whole number, at least 1, got 2.5'),
    (dict(min_channels=True), 'min_channels .* whole number, .* got True'),
    *[
      ({flag: value}, rf"{flag} .*'c\*' must be True or False, got {value!r}")
      for flag in structure.FLAGS
      for value in ('False', 0)
    ],
    (dict(min_channels=-2), 'min_channels .*got -2'),
  ],
)
def test_bad_rules(settings, message):
  with pytest.raises(ValueError, match=message) as info:
    compress.Rule(pattern='c*', **settings)
  assert '\n' not in str(info.value)


def test_a_pattern_is_text():
  with pytest.raises(ValueError, match='a pattern must be text, got 3'):
    compress.Rule(pattern=3)


def test_flags_are_all_that_is_true_or_false():
  fields = dataclasses.fields(compress.Rule)
  assert {f.name for f in fields if f.type == bool | None} == {*structure.FLAGS}


def test_numbers_of_numpy_are_numbers():
  bits = (np.float32(2), np.int64(4))
  rule = compress.Rule(pattern='*', act_bits=bits, align=np.int64(2))
  assert (rule.act_bits, rule.align) == ((2, 4), 2)


# -- compress -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (None, 'needs a batch of real inputs'),
    (jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32), 'real inputs'),
    ((jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32),), 'real inputs'),
    (np.full((2, 8, 8, 1), np.nan, np.float32), 'not numbers'),
    (np.full((2, 8, 8, 1), np.inf, np.float32), 'inputs of .* not finite'),
    (np.zeros((2, 8, 8, 3), np.float32), r'cannot trace .*\(2, 8, 8, 3\)'),
  ],
)
def test_bad_batches(x, message):
  with pytest.raises(ValueError, match=message):
    compress.compress(small_cnn()[0], x=x)


class Switched(nnx.Module):
  """A model whose code asks whether it is trained, and how it pools."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 16, rngs=rngs)
    self.head = nnx.Linear(16, 2, rngs=rngs)

  def __call__(self, x, train, pool='mean'):
    x = nnx.relu(self.hidden(x))
    if train:
      raise RuntimeError('it is not trained here')
    return self.head(x.mean(1) if pool == 'mean' else x.max(1))


def test_arguments_that_are_no_arrays_reach_the_code_as_they_are():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
  net = compress.compress(Switched(nnx.Rngs(0)), x=(x, False, 'max'))
  frozen = compress.freeze(net, plan_for(net, masks_of(net), 4), x, False)
  assert frozen(x, False).shape == (4, 2)
  inputs = compress.inputs_of(frozen, x, False, 'max')
  assert inputs['head'][0].shape == (4, frozen.gates[0].size)


def test_a_compressed_model_is_not_compressed_again():
  chain = built('chain')
  net = chain.assemble()
  for model in (net, compress.eval_view(net)):
    with pytest.raises(ValueError, match='compressed already'):
      compress.compress(model, x=chain.x)


@standard_promotion
def test_the_model_stays_and_its_compressed_copy_computes_nearly_the_same():
  model, x = small_cnn()
  before, (float_out,) = pure(model), call(model, x)
  hook = model.block1.conv.promote_dtype
  net = compress.compress(model, x=x)
  assert_same(model, before)
  assert model.block1.conv.promote_dtype is hook
  out, again = call(net, model, x)
  np.testing.assert_array_equal(again, float_out)
  # Five layers, each within 1/255 of its clip on both of its operands.
  scale = np.abs(float_out).max()
  assert 0 < np.abs(out - float_out).max() < 0.03 * scale
  # Nor do training and surgery reach the model.
  settle(net, masks_of(net))
  frozen = compress.freeze(net, plan_for(net, masks_of(net), 4), x)
  frozen.model.linear.kernel[...] *= 2.0
  assert_same(model, before)


@standard_promotion
def test_hooks_do_not_leak_into_the_float_model():
  chain = built('chain')
  net = chain.assemble()
  settle(net, masks_of(net))

  @jax.jit
  def outputs(x):
    before = chain.model(x)
    compressed = net(x), net(x, gate_key=jax.random.key(0))
    return before, compressed, chain.model(x)

  before, (quiet, noisy), after = outputs(chain.x)
  (want,) = call(chain.model, chain.x)
  np.testing.assert_allclose(before, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(after, before)
  assert np.abs(quiet - want).max() > 1e-2
  assert np.abs(quiet - noisy).max() > 1e-2
  fresh = nnx.eval_shape(lambda: nnx.Linear(3, 8, rngs=nnx.Rngs(0)))
  assert not isinstance(fresh.promote_dtype, layers.Operands)


@standard_promotion
def test_bits_begin_as_asked_for_within_their_bounds():
  model, x = small_cnn()
  rules = [
    compress.Rule(pattern='block2/*', weight_bits=(6, 7), act_bits=(2, 3)),
    compress.Rule(pattern='linear', exponent=True),
  ]
  net = compress.compress(model, rules, x, bits=4.5)
  found = operands_of(net)
  weight = [float(o.weight.bits()) for o in found.values()]
  act = [float(o.act.bits()) for o in found.values()]
  np.testing.assert_allclose(weight, [4.5, 6, 4.5, 4.5, 4.5], atol=1e-4)
  np.testing.assert_allclose(act, [8, 3, 4.5, 4.5, 4.5], atol=1e-4)
  exponents = [o.weight.log_exponent is not None for o in found.values()]
  assert exponents == [False] * 4 + [True]


@standard_promotion
def test_calibration_finds_sign_and_clip_of_each_input():
  chain = built('chain')
  net = chain.compress()
  inputs = compress.inputs_of(net, chain.x)
  signs = {path: o.act.signed for path, o in operands_of(net).items()}
  # relu is between conv1 and conv2, and no other.
  assert signs == dict(conv1=True, conv2=False, head=True)
  clip = np.exp(operands_of(net)['conv1'].act.log_clip[...])
  largest = np.abs(inputs['conv1'][0]).max()
  assert 0.8 * largest < clip <= largest
  kernel = np.asarray(chain.model.conv1.kernel[...])
  clip = np.exp(operands_of(net)['conv1'].weight.log_clip[...])
  np.testing.assert_allclose(clip, np.abs(kernel).max(), rtol=1e-6)


@standard_promotion
def test_a_dead_layer_is_calibrated_to_something_finite():
  chain = Built('chain')
  chain.model.conv1.bias[...] = jnp.full(8, -1e4)
  chain.model.head.kernel[...] = jnp.zeros((6, 5))
  net = chain.compress()
  assert all(np.isfinite(v).all() for v in surgery_test.values(net).values())
  out, want = call(net, chain.model, chain.x)
  np.testing.assert_allclose(out, want, rtol=1e-5)


@standard_promotion
def test_without_quantizers_and_with_new_gates_nothing_changes():
  chain = built('chain')
  net = chain.compress(FLOAT)
  assert all(o.weight is o.act is None for o in operands_of(net).values())
  out, want = call(net, chain.model, chain.x)
  np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
  uses = compress.usage(net)
  assert float(cost.bops(uses)) == cost.float_bops(uses)


def test_while_bits_are_searched_a_kernel_has_one_grid():
  rule = compress.Rule(pattern='*', per_channel=True)
  net = built('chain').assemble(rule)
  for operands in operands_of(net).values():
    assert operands.weight.log_clip.shape == ()
    assert operands.weight.log_step.shape == ()


def test_bits_can_be_restricted():
  net = built('chain').assemble(compress.Rule(pattern='*', act_bits=(2, 8)))
  compress.restrict(net, (2, 4, 8, 16, 32))
  for operands in operands_of(net).values():
    assert operands.weight.choices == operands.act.choices == (2.0, 4.0, 8.0)


class Held(nnx.Module):
  """Holds something beside a layer."""

  def __init__(self, thing):
    self.layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    self.thing = nnx.Variable(thing)

  def __call__(self, x):
    return self.layer(x)


@pytest.mark.parametrize('thing', [2.0, {'x': jnp.ones(3)}])
def test_what_no_artifact_can_hold_is_refused(thing):
  message = f'thing holds {type(thing).__name__}, which no artifact can'
  with pytest.raises(ValueError, match=message):
    compress.compress(Held(thing), (), jnp.ones((2, 6)))


class Deep(nnx.Module):
  """Runs a layer if it is told to, and draws with a key."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(6, 8, rngs=rngs)
    self.inner = nnx.Linear(8, 8, rngs=rngs)
    self.head = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x, key, deep):
    x = self.first(x) + jax.random.normal(key, (1, 8))
    return self.head(jax.lax.cond(deep, self.inner, lambda x: x, x))


@standard_promotion
def test_a_layer_that_does_not_run_is_named():
  x, key = jnp.ones((2, 6)), jax.random.key(0)
  compress.compress(Deep(), (), (x, key, jnp.array(True)))
  with pytest.raises(ValueError, match='layer inner was not run on the calib'):
    compress.compress(Deep(), (), (x, key, jnp.array(False)))


class Unbiased(nnx.Linear):
  """Promotes no bias."""

  def __call__(self, x):
    x, kernel = self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
    return x @ kernel


def test_a_layer_may_leave_its_bias_out():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(Unbiased(6, 8, rngs=rngs), Unbiased(8, 4, rngs=rngs))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
  net = compress.compress(model, (), x)
  error = jnp.linalg.norm(net(x) - model(x)) / jnp.linalg.norm(model(x))
  assert error < 0.03  # of eight bits


def test_a_kernel_of_one_axis():
  rngs, init = nnx.Rngs(0), nnx.initializers.normal()
  model = nnx.Sequential(
    nnx.Linear(6, 8, rngs=rngs),
    nnx.Einsum('bd,d->b', (8,), kernel_init=init, rngs=rngs),
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
  net = compress.compress(model, (), x, choices=range(1, 9))
  frozen = compress.freeze(net, allocate.plan(net, None), x)
  np.testing.assert_array_equal(harden.harden(frozen)(x), frozen(x))


@standard_promotion
def test_heads_have_grids_of_their_own():
  chain = built('attention')
  net = chain.compress(compress.Rule(pattern='*', per_channel=True))
  frozen = compress.freeze(net, plan_for(net, {}, 4), chain.x)
  for path, operands in operands_of(frozen).items():
    kernel = compress.layer_modules(frozen.model)[path].kernel
    axes = chain.graph.layers[path].out_axes
    expected = [n if d in axes else 1 for d, n in enumerate(kernel.shape)]
    assert operands.weight.log_clip.shape == tuple(expected), path
  hardened = harden.harden(frozen)
  np.testing.assert_array_equal(hardened(chain.x), frozen(chain.x))
  lowered = integer.lower(hardened)
  assert 'attention/query' not in integer.left_float(hardened)
  np.testing.assert_allclose(lowered(chain.x), frozen(chain.x), atol=1e-4)


@standard_promotion
def test_a_layer_that_is_used_twice_is_one_layer():
  twice = built('called_twice')
  net = twice.compress()
  inputs = compress.inputs_of(net, twice.x)
  assert [len(inputs[p]) for p in ('conv1', 'shared', 'head')] == [1, 2, 1]
  (use,) = [u for u in compress.usage(net) if u.name == 'shared']
  assert use.macs == 2 * 64 * 9 * 36
  # Calibrated to the larger of its inputs.
  largest = [np.max(x) for x in inputs['shared']]
  clip = np.exp(operands_of(net)['shared'].act.log_clip[...])
  assert min(largest) < 0.9 * clip < max(largest)


# -- gates --------------------------------------------------------------------


@standard_promotion
def test_tokens_of_an_example_share_its_noise():
  mlp = built('transformer_mlp')
  net = mlp.compress(FLOAT)
  assert [net.structure.groups[g].name for g in net.structure.gated] == ['fc1']
  net.gates[0].log_sigma2[...] = jnp.full(16, -1.0)

  (out, quiet), (_, noisy) = draws(net, mlp.x, None, 0)
  (want,) = call(mlp.model, mlp.x)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  (clean,), (noisy,) = quiet['fc2'], noisy['fc2']
  assert noisy.shape == (2, 6, 16)
  safe = np.abs(clean) > 1e-2
  z = np.where(safe, noisy / np.where(safe, clean, 1), np.nan)
  np.testing.assert_allclose(np.nanstd(z, axis=1), 0.0, atol=1e-4)
  assert np.abs(np.nanmean(z[0] - z[1], axis=0)).min() > 1e-4


@standard_promotion
def test_noise_comes_from_the_key_alone():
  chain = built('chain')
  net = chain.assemble(FLOAT)
  for gate in net.gates:
    gate.log_sigma2[...] = jnp.full(gate.size, -1.0)
  found = draws(net, chain.x, 0, 0, 1, None, None)
  one, again, other, quiet, quiet_again = (np.asarray(out) for out, _ in found)
  np.testing.assert_array_equal(one, again)
  np.testing.assert_array_equal(quiet, quiet_again)
  assert np.abs(one - other).min() > 0
  assert np.abs(one - quiet).min() > 0


def test_arguments_by_name_have_noise_too():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
  net = compress.compress(Switched(nnx.Rngs(0)), x=(x, False))
  key = jax.random.key(0)
  want = net(x, False, gate_key=key)
  for got in (
    net(x=x, train=False, gate_key=key),
    net(train=False, x=x, gate_key=key),
  ):
    np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match='no array argument'):
    net(train=False, gate_key=key)


class DropPath(nnx.Module):
  """Knows what `Module.eval` sets, and nothing of views."""

  def __init__(self, rngs):
    self.rngs, self.deterministic = rngs, False

  def __call__(self, x):
    if self.deterministic:
      return x
    kept = jax.random.bernoulli(self.rngs.dropout(), 0.5, (len(x), 1))
    return jnp.where(kept, 2 * x, 0)


@standard_promotion
def test_views_switch_classes_of_ones_own():
  model = graph_test.Net(
    lambda m, x: m.head(m.drop(nnx.relu(m.stem(x)))),
    stem=nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
    drop=DropPath(nnx.Rngs(3)),
    head=nnx.Linear(6, 4, rngs=nnx.Rngs(1)),
  )
  x = np.random.default_rng(0).normal(size=(8, 8)).astype('float32')
  net = compress.compress(model, (), x)
  view = compress.eval_view(net)
  np.testing.assert_array_equal(view(x), view(x))
  assert not net.model.drop.deterministic  # the model itself stays
  net.eval()
  view = compress.train_view(net)
  assert np.any(view(x) != view(x))
  assert net.model.drop.deterministic
  frozen = compress.freeze(net, allocate.plan(net, 0.05), x)
  frozen.train()
  hardened = harden.harden(frozen)
  np.testing.assert_allclose(
    compress.eval_view(hardened)(x), compress.eval_view(frozen)(x), rtol=1e-5
  )


@standard_promotion
@pytest.mark.parametrize('dtype', ['uint8', 'bool'])
def test_integers_are_promoted_as_layers_do_it(dtype):
  images = np.random.default_rng(0).integers(0, 255, (8, 8)).astype(dtype)

  def made(images):
    model = graph_test.Net(
      lambda m, x: m.head(nnx.relu(m.stem(x))),
      stem=nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
      head=nnx.Linear(6, 4, rngs=nnx.Rngs(1)),
    )
    net = compress.compress(model, (), images)
    frozen = compress.freeze(net, allocate.plan(net, 0.05), images)
    return [model, net, frozen, harden.harden(frozen)]

  floats = images.astype('float32')
  for model, other in zip(made(images), made(floats)):
    np.testing.assert_array_equal(model(images), other(floats))


@standard_promotion
def test_a_closed_channel_does_not_matter_and_an_open_one_does():
  chain = built('chain')
  net = chain.assemble(FLOAT)
  net.gates[0].log_sigma2[...] = jnp.asarray([-9.0] * 7 + [9.0])
  graphdef, state = nnx.split(net)

  def output(state):
    return nnx.merge(graphdef, state)(chain.x).sum()

  grads = jax.jit(jax.grad(output))(nnx.as_pure(state))
  grad = np.asarray(grads['model']['conv1']['bias'])
  assert float(grad[7]) == 0
  assert np.all(grad[:7] != 0)


@standard_promotion
@pytest.mark.parametrize('transform', [nnx.jit, nnx.remat])
def test_gates_reach_through_transformed_methods(transform):
  @transform
  def block(layer, x):
    return layer(nnx.relu(x))

  model = graph_test.Net(
    lambda m, x: block(m.fc2, m.fc1(x)),
    fc1=nnx.Linear(3, 6, rngs=nnx.Rngs(0)),
    fc2=nnx.Linear(6, 2, rngs=nnx.Rngs(1)),
  )
  x = jnp.ones((2, 3))
  structure = compress.resolve(graph.trace(model, x), [FLOAT])
  net = compress.assemble(model, structure)
  graphdef, state = nnx.split(net)

  def outputs(state):
    return nnx.merge(graphdef, state)(x)

  before = jax.jit(outputs)(state)
  state['gates'][0]['mu'][...] = jnp.full(6, 3.0)
  after = jax.jit(lambda state: outputs(state))(state)
  np.testing.assert_allclose(after, 3 * before, rtol=1e-5)


def _in_a_scan(layer, x):
  graphdef, state = nnx.split(layer)
  step = lambda x, _: (nnx.merge(graphdef, state)(x), None)
  return jax.lax.scan(step, x, length=2)[0]


INNER = {
  'jit': nnx.jit(lambda layer, x: layer(x)),
  'remat': nnx.remat(lambda layer, x: layer(x)),
  'checkpoint': lambda layer, x: jax.checkpoint(lambda x: layer(x))(x),
  'scan': _in_a_scan,
  'cond': lambda layer, x: jax.lax.cond(x[0, 0] < 9, layer, lambda x: x, x),
}


@standard_promotion
@pytest.mark.parametrize('name', INNER)
def test_layers_in_inner_programs_are_calibrated_frozen_and_hardened(name):
  def forward(m, x, run=INNER[name]):
    return m.head(nnx.relu(run(m.inner, nnx.relu(m.stem(x)))))

  def made(forward):
    return graph_test.Net(
      forward,
      stem=nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
      inner=nnx.Linear(6, 6, rngs=nnx.Rngs(1)),
      head=nnx.Linear(6, 4, rngs=nnx.Rngs(2)),
    )

  x = jax.random.normal(jax.random.key(0), (16, 8))
  model = made(forward)
  model(x)  # JAX keeps its inner programs, and nobody looked at them
  net = compress.compress(model, (), x)
  if name != 'scan':  # which calls its layer twice
    plain = made(lambda m, x: forward(m, x, run=lambda layer, x: layer(x)))
    expected = compress.compress(plain, (), x)
    for hook, other in zip(compress.hooks(net), compress.hooks(expected)):
      np.testing.assert_array_equal(
        hook.operands.act.log_clip[...], other.operands.act.log_clip[...]
      )
  seen = compress.inputs_of(net, x)
  assert len(seen['inner']) == (2 if name == 'scan' else 1)
  frozen = compress.freeze(net, allocate.plan(net, 0.1), x)
  hardened = harden.harden(frozen)
  np.testing.assert_allclose(hardened(x), frozen(x), atol=1e-6)
  lowered = integer.lower(hardened)
  np.testing.assert_allclose(lowered(x), hardened(x), atol=1e-5)
  sums = integer.accumulators(lowered, x)
  assert [np.asarray(s).dtype for s in sums['inner']] == [
    np.dtype(np.int32)
  ] * len(seen['inner'])


def test_a_look_into_inner_programs_ends_on_one_core_and_leaves_nothing():
  code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp
from djpq_jax import taps
tap = taps.Tap('test')
inner = jax.jit(lambda x: tap.see('layer', x))
x = jnp.ones((3_000_000,))
for _ in range(3):
  seen, = taps.look([tap], inner, x)
  assert seen['layer'][0].sum() == x.size
  del seen
held = [a for a in jax.live_arrays() if a is not x and a.size == x.size]
assert not held, held
"""
  subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


@pytest.mark.parametrize('other', [np.ones((6, 6)), np.full((4, 9), 2.0)])
def test_a_kernel_of_another_shape_or_scale_is_another_kernel(other):
  with pytest.raises(ValueError, match='another kernel than it holds'):
    compress.quantizers._check_kernel(
      'fc', jnp.ones((4, 9)), [jnp.asarray(other)]
    )


def test_a_kernel_in_half_precision_is_the_one_that_is_held():
  held = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
  masked = held.astype(jnp.bfloat16).at[0].set(0)
  compress.quantizers._check_kernel('fc', held, [masked])


def check_refused_unless_float(model, pattern, message, budget):
  """A rule takes back the refusal, and all forms of the model compute alike."""
  x = jax.random.normal(jax.random.key(0), (16, 8))
  with pytest.raises(ValueError, match=message):
    compress.compress(model, (), x)
  kept = compress.Rule(pattern=pattern, quantize=False, prune=False)
  net = compress.compress(model, [kept], x)
  frozen = compress.freeze(net, allocate.plan(net, budget), x)
  hardened = harden.harden(frozen)
  np.testing.assert_allclose(hardened(x), frozen(x), atol=1e-6)
  lowered = integer.lower(hardened)
  np.testing.assert_allclose(lowered(x), hardened(x), atol=1e-5)


@standard_promotion
def test_a_layer_with_two_kernels_is_refused_unless_it_stays_float():
  model = graph_test.Net(
    lambda m, x: m.head(nnx.relu(m.normed(nnx.relu(m.stem(x))))),
    stem=nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
    normed=nnx.WeightNorm(nnx.Linear(6, 6, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(3)),
    head=nnx.Linear(6, 4, rngs=nnx.Rngs(2)),
  )
  message = r'normed/.* another kernel than it'
  check_refused_unless_float(model, 'normed/*', message, 0.5)


@standard_promotion
def test_a_kernel_that_the_model_reads_itself_is_refused_unless_float():
  model = graph_test.Net(
    lambda m, x: m.mid(nnx.relu(m.fc(x))) @ m.fc.kernel[...].T,
    fc=nnx.Linear(8, 6, rngs=nnx.Rngs(0)),
    mid=nnx.Linear(6, 6, rngs=nnx.Rngs(1)),
  )
  message = r"fc/kernel outside.*pattern='fc'"
  check_refused_unless_float(model, 'fc', message, 0.9)


# -- counts -------------------------------------------------------------------

# 8x8 positions, 3x3 kernels, 3 -> 8 -> 6 channels, then a linear layer.
CHAIN_MACS = [64 * 9 * 3 * 8, 64 * 9 * 8 * 6, 6 * 5]


def chain_with_gates():
  """conv1 keeps 3 of 8 channels, conv2 2 of 6."""
  net = built('chain').assemble()
  masks = dict(conv1=np.arange(8) < 3, conv2=np.arange(6) >= 4)
  settle(net, masks)
  return net, masks


def test_usage_equals_counts_by_hand():
  net, _ = chain_with_gates()
  conv2 = operands_of(net)['conv2']
  conv2.weight.log_step[...] = conv2.weight.log_clip[...] - np.log(7.0)
  conv2.act.log_step[...] = conv2.act.log_clip[...] - np.log(15.0)
  graphdef, state = nnx.split(net)
  uses = jax.jit(lambda s: compress.usage(nnx.merge(graphdef, s)))(state)
  assert [u.name for u in uses] == ['conv1', 'conv2', 'head']
  assert [u.macs for u in uses] == CHAIN_MACS
  assert [u.weights for u in uses] == [27 * 8, 72 * 6, 30]
  got = np.asarray(
    [[u.keep_in, u.keep_out, u.weight_bits, u.act_bits] for u in uses]
  )
  want = [[1, 3 / 8, 8, 8], [3 / 8, 1 / 3, 4, 5], [1 / 3, 1, 8, 8]]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  bops = CHAIN_MACS[0] * 3 / 8 * 64 + CHAIN_MACS[1] / 8 * 20 + 10 * 64
  np.testing.assert_allclose(cost.bops(uses), bops, rtol=1e-5)


def test_usage_is_differentiable_and_a_gate_counts_where_it_is_made_and_read():
  net, _ = chain_with_gates()
  net.gates[0].log_sigma2[...] = jnp.linspace(-8.0, 8.0, 8)
  net.gates[0].mu[...] = jnp.ones(8)
  graphdef, state = nnx.split(net)

  def bops(state):
    return cost.bops(compress.usage(nnx.merge(graphdef, state)))

  grads = jax.jit(jax.grad(bops))(nnx.as_pure(state))
  # The mean over eight channels, of which four are open.
  slope = 0.5 / (1 + np.exp(np.linspace(-8, 8, 8))) / 8
  want = -slope * 64 * (CHAIN_MACS[0] + CHAIN_MACS[1] / 3)
  np.testing.assert_allclose(grads['gates'][0]['log_sigma2'], want, rtol=1e-4)


def test_planned_usage_is_exact():
  net, masks = chain_with_gates()
  plan = compress.Plan(
    open=masks, weight_bits=dict(conv1=3, conv2=5), act_bits=dict(conv1=7)
  )
  uses = compress.planned_usage(net.structure, plan)
  assert uses[0].keep_out == uses[1].keep_in == fractions.Fraction(3, 8)
  bops = cost.bops(uses)
  assert type(bops) is int
  conv1, conv2 = 64 * 9 * 3 * 3, 64 * 9 * 3 * 2
  assert bops == conv1 * 3 * 7 + conv2 * 5 * 32 + 10 * 1024
  assert cost.macs(uses) == conv1 + conv2 + 10


def test_products_outside_of_layers_count_in_float32():
  # Untraced channels are in attention, too: its heads are an axis of their own.
  attention = built('attention')
  net = attention.assemble(FLOAT, compress.Rule(pattern='head', quantize=True))
  uses = compress.usage(net)
  inside = {p: layer.macs for p, layer in attention.graph.layers.items()}
  outside = sum(p.macs for p in attention.graph.products)
  assert outside == 2 * 2 * 6 * 6 * 6  # two products, heads, tokens, features
  head = inside.pop('head')
  want = 64 * head + 1024 * (sum(inside.values()) + outside)
  np.testing.assert_allclose(cost.bops(uses), want, rtol=1e-5)


class Resized(nnx.Module):
  """Products with a constant between two layers, and of two activations."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.before = nnx.Conv(3, 12, (3, 3), rngs=rngs)
    self.values = nnx.Conv(3, 12, (1, 1), rngs=rngs)
    self.after = nnx.Conv(12, 4, (1, 1), rngs=rngs)
    self.head = nnx.Linear(12, 4, rngs=rngs)

  def __call__(self, x):
    y = nnx.relu(self.before(x))
    y = jax.image.resize(y, (y.shape[0], 8, 8, y.shape[3]), 'bilinear')
    v = self.values(x).reshape(x.shape[0], 16, -1)
    tokens = x.reshape(x.shape[0], 16, 3)
    v = jax.nn.softmax(tokens @ tokens.swapaxes(1, 2)) @ v
    return self.after(y).mean((1, 2)) + self.head(v).mean(1)


@standard_promotion
def test_products_outside_of_layers_lose_channels_too():
  x = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)
  net = compress.compress(Resized(), x=x)
  masks = {
    net.structure.groups[g].name: np.arange(12) < 3 + g
    for g in net.structure.gated
  }
  assert masks.keys() == {'before', 'values'}
  paths = list(net.structure.layers)
  plan = compress.Plan(
    open=masks,
    weight_bits=dict.fromkeys(paths, 4),
    act_bits=dict.fromkeys(paths, 8),
  )
  frozen = compress.freeze(net, plan, x)
  hardened = harden.harden(frozen)
  rows = harden.count(hardened, x)
  products = [row for row in rows if row.kind == 'product']
  left = [row.macs / row.float_macs for row in products]
  before, values = (masks[name].mean() for name in ('before', 'values'))
  assert sorted(left) == sorted([before, before, 1, values])
  uses = compress.planned_usage(net.structure, plan)
  assert sum(row.macs for row in rows) == cost.macs(uses)
  assert float(cost.macs(compress.usage(frozen))) == cost.macs(uses)
  counts = compress.PlanCosts(net.structure).relative(plan)
  total = harden.totals(hardened, rows)
  assert counts['macs'] == pytest.approx(total['relative_macs'])
  assert counts['bops'] == pytest.approx(total['relative_bops'], rel=0.05)


# -- freeze -------------------------------------------------------------------


@pytest.mark.parametrize(
  'rules', [None, compress.Rule(pattern='*'), [{'pattern': '*'}], ['*']]
)
def test_rules_that_are_none(rules):
  with pytest.raises(TypeError, match=r'^a rule is a|^rules are several Rules'):
    tiny.compressed(tiny.Mlp, rules)


class Ensemble(nnx.Module):
  """Three heads in one, mapped over with nnx.vmap."""

  def __init__(self, rngs):
    self.first = nnx.Linear(8, 6, rngs=rngs)
    self.second = nnx.Linear(6, 6, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def heads(rngs):
      return nnx.Linear(6, 4, rngs=rngs)

    self.heads = heads(rngs)

  def __call__(self, x):
    x = nnx.relu(self.second(nnx.relu(self.first(x))))
    run = nnx.vmap(lambda head, x: head(x), in_axes=(0, None))
    return run(self.heads, x).mean(0)


def test_layers_that_are_mapped_over():
  x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  model = Ensemble(nnx.Rngs(0))
  with pytest.raises(
    ValueError, match='heads/kernel has the kernels of several'
  ):
    compress.compress(model, x=x)
  rule = compress.Rule(pattern='heads', quantize=False, prune=False)
  net = compress.compress(model, [rule], x)
  reasons = {group.name: group.reason for group in net.structure.groups}
  assert not reasons['first']
  assert 'read by several layers at once, as heads' in reasons['second']
  np.testing.assert_allclose(net(x), model(x), atol=0.05)
  noisy = net(x, gate_key=jax.random.key(0))
  assert noisy.shape == (5, 4)
  assert np.isfinite(noisy).all()


def test_a_calibration_batch_without_examples():
  with pytest.raises(ValueError, match='calibration batch has no examples'):
    compress.compress(tiny.Mlp(nnx.Rngs(0)), x=np.zeros((0, *tiny.SHAPE)))


def assert_costs_as_planned(net, frozen, plan, x):
  """The plan's count, the trace of the smaller model, and usage agree."""
  planned = compress.planned_usage(net.structure, plan)
  now = graph.trace(frozen, x)
  for use in planned:
    layer = now.layers[f'model/{use.name}']
    assert layer.macs == cost.macs([use])
    assert layer.weights == use.weights * use.keep_in * use.keep_out
  for macs, bops in counts(net, frozen):
    np.testing.assert_allclose(macs, cost.macs(planned), rtol=1e-5)
    np.testing.assert_allclose(bops, cost.bops(planned), rtol=1e-5)


@standard_promotion
@pytest.mark.parametrize('name', ['inverted_residual', 'transformer_mlp'])
def test_a_frozen_model_is_the_masked_one_and_costs_what_was_planned(name):
  here = built(name)
  net = here.assemble(WIDE)
  masks = masks_of(net)
  settle(net, masks)
  compress.calibrate(net, here.x)
  for operands in operands_of(net).values():  # no clipping
    for log in (operands.act.log_clip, operands.act.log_step):
      log[...] += np.log(1.05)
  plan = plan_for(net, masks)
  before = pure(net)
  frozen = compress.freeze(net, plan, here.x)
  assert_same(net, before)
  masked, sliced, whole = call(net, frozen, here.model, here.x)
  scale = np.abs(masked).max()
  assert np.abs(masked - whole).max() > 0.05 * scale  # the gates say something
  # 16 bits are 3e-5 of a clip, and a clip is fitted to within 7 %.
  np.testing.assert_allclose(sliced, masked, atol=1e-3 * scale)
  assert_costs_as_planned(net, frozen, plan, here.x)


@standard_promotion
@pytest.mark.parametrize(
  'name', ['dense_block', 'flatten_4x4', 'squeeze_excite']
)
def test_gates_fold_into_a_plain_model(name):
  here = built(name)
  net = here.assemble(FLOAT)
  masks = masks_of(net)
  settle(net, masks)
  plan = plan_for(net, masks)
  frozen = compress.freeze(net, plan, here.x)
  plain = compress.fold_gates(frozen)
  assert type(plain) is type(here.model)
  for _, module in nnx.iter_modules(plain):
    assert not isinstance(module, layers.Operands)
  masked, sliced, folded, whole = call(net, frozen, plain, here.model, here.x)
  scale = np.abs(masked).max()
  assert np.abs(masked - whole).max() > 0.05 * scale
  np.testing.assert_allclose(sliced, masked, atol=1e-5 * scale)
  np.testing.assert_allclose(folded, masked, atol=1e-5 * scale)
  assert_costs_as_planned(net, frozen, plan, here.x)


class Helped(nnx.Module):
  """With a head that helps it to learn."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(6, 8, rngs=rngs)
    self.aux = nnx.Linear(8, 3, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.hidden(x))
    logits = self.head(self.dropout(x))
    return logits if self.dropout.deterministic else (logits, self.aux(x))


class Scaled(Helped):
  """What helps it is no layer."""

  def __call__(self, x):
    x = nnx.relu(self.hidden(x))
    logits = self.head(self.dropout(x))
    return (
      logits if self.dropout.deterministic else (logits, x * jnp.ones((1, 8)))
    )


class Elsewhere(Helped):
  """What helps it reads nothing that may be cut."""

  def __init__(self):
    super().__init__()
    self.aux = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

  def __call__(self, x):
    logits = self.head(self.dropout(nnx.relu(self.hidden(x))))
    return logits if self.dropout.deterministic else (logits, self.aux(x))


@standard_promotion
@pytest.mark.parametrize('kind', [Helped, Scaled])
def test_a_part_that_runs_in_training_alone(kind):
  x = np.ones((4, 6), np.float32)
  with pytest.raises(
    ValueError, match='runs in training alone, and cannot without'
  ):
    compress.compress(kind(), x=x)
  assert compress.compress(Elsewhere(), x=x).gates
  rules = [compress.Rule(pattern='*', prune=False)]
  net = compress.compress(kind(), rules, x)
  plan = compress.Plan(
    open={},
    weight_bits={'hidden': 4, 'head': 4},
    act_bits={'hidden': 8, 'head': 4},
  )
  frozen = compress.freeze(net, plan, x)
  logits, aux = compress.train_view(frozen)(x)
  assert logits.shape == (4, 3)
  assert aux.shape[0] == 4


@pytest.mark.parametrize('whole_to', [2.5, -1])
def test_whole_to_is_a_whole_number(whole_to):
  with pytest.raises(ValueError, match='whole_to takes a whole number from 0'):
    compress.compress(Helped(), x=np.ones((4, 6)), whole_to=whole_to)


class Tied(nnx.Module):
  """Two layers with one kernel, which reads gated channels in both."""

  def __init__(self, rngs):
    self.inp = nnx.Linear(3, 8, rngs=rngs)
    self.one = nnx.Linear(8, 8, rngs=rngs)
    self.two = nnx.Linear(8, 8, rngs=rngs)
    self.two.kernel = self.one.kernel
    self.head = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.one(nnx.relu(self.inp(x))))
    return self.head(nnx.relu(self.two(x)))


def test_gates_fold_once_into_a_kernel_that_layers_share():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
  net = compress.compress(Tied(nnx.Rngs(0)), [FLOAT], x)
  assert {'one', 'two'} <= {p for p, o in operands_of(net).items() if o.gate}
  for gate in net.gates:
    gate.mu[...] = jnp.full(gate.size, 2.0)
  frozen = compress.freeze(net, plan_for(net, {}), x)
  before = pure(frozen)
  plain = compress.fold_gates(frozen)
  np.testing.assert_allclose(plain(x), frozen(x), rtol=1e-5)
  assert_same(frozen, before)


@standard_promotion
def test_gates_of_models_that_are_not_settled_or_quantized_do_not_fold():
  chain = built('chain')
  net = chain.assemble(FLOAT)
  with pytest.raises(ValueError, match='frozen with a plan'):
    compress.fold_gates(net)
  structure = dataclasses.replace(net.structure, plan=plan_for(net, {}))
  net = compress.Compressed(chain.assemble().model, net.gates, structure)
  with pytest.raises(ValueError, match='conv1 is quantized'):
    compress.fold_gates(net)


@standard_promotion
def test_what_freeze_leaves():
  chain = built('chain')
  net = chain.compress()
  masks = dict(conv1=np.arange(8) < 3, conv2=np.arange(6) >= 4)
  settle(net, masks)
  plan = compress.Plan(
    open=masks,
    weight_bits=dict(conv1=2, conv2=3, head=4),
    act_bits=dict(conv1=8, conv2=1, head=7),
  )
  frozen = compress.freeze(net, plan, chain.x)
  assert frozen.model.conv2.kernel.shape == (3, 3, 3, 2)
  assert [gate.size for gate in frozen.gates] == [3, 2]
  for gate, old, mask in zip(frozen.gates, net.gates, masks.values()):
    np.testing.assert_array_equal(gate.mu[...], old.mu[...][mask])
    assert gate.log_sigma2 is None
  found = operands_of(frozen)
  assert {p: o.weight.bits() for p, o in found.items()} == plan.weight_bits
  assert {p: o.act.bits() for p, o in found.items()} == plan.act_bits
  (quiet, taps), (keyed, _) = draws(frozen, chain.x, None, 0)
  np.testing.assert_array_equal(quiet, keyed)
  kernel = frozen.model.conv1.kernel[...]
  levels = np.unique(found['conv1'].weight.integers(kernel))
  np.testing.assert_array_equal(levels, [-3, -1, 1, 3])  # half steps
  assert len(np.unique(found['conv2'].act(taps['conv2'][0]))) == 2


@standard_promotion
def test_bits_that_were_fixed_at_eight_leave_no_trace():
  chain = built('chain')
  net = chain.compress()
  net = compress.freeze(net, plan_for(net, {}, 8), chain.x)
  grid = operands_of(net)['conv1'].weight
  assert grid.symmetric
  kernel = net.model.conv1.kernel[...]
  grid = compress.quantizers.at_bits(grid, 2, [kernel], fixed=True)
  levels = grid.integers(jnp.array([-9.0, 9.0]))
  np.testing.assert_array_equal(levels, [-2, 1])


@standard_promotion
def test_a_frozen_model_is_not_frozen_again():
  chain = built('chain')
  net = chain.compress()
  plan = plan_for(net, masks_of(net), 4)
  frozen = compress.freeze(net, plan, chain.x)
  for model in (frozen, harden.harden(frozen)):
    with pytest.raises(ValueError, match='frozen already'):
      compress.freeze(model, plan, chain.x)


@standard_promotion
def test_the_clip_counts_the_level_below():
  """With a tail below zero it may be nearer to zero."""
  x = np.random.default_rng(0).normal(size=3000)
  x = np.where(x < 0, 2 * x, x).astype(np.float32)
  start = np.float32(np.abs(x).max())
  both = [
    float(compress.clips.of_least_error(start, 1.0, below, [x]))
    for below in (1.0, 2.0)
  ]
  assert both[1] < 0.8 * both[0]


@standard_promotion
def test_a_clip_is_fitted_to_all_channels():
  x = np.random.default_rng(0).normal(size=(100, 32, 32, 16))
  x[..., 0] *= 0.01
  x = x.astype(np.float32)
  clip = compress.clips.of_least_error(np.abs(x).max(), 3.0, 4.0, [x])
  # Seven or eight levels of a normal distribution: steps of 0.6.
  assert 1.5 < clip < 2.5


@standard_promotion
def test_a_clip_may_be_far_below_the_largest_magnitude():
  x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
  x[0] = 20.0
  clip = compress.clips.of_least_error(
    np.float32(20), 1.5, 1.5, [x], mid_rise=True
  )
  # Four levels of a normal distribution: steps of 0.996 (Max 1960).
  np.testing.assert_allclose(clip, 1.494, rtol=0.04)


@standard_promotion
def test_a_rule_keeps_grids_narrow():
  chain = built('chain')
  net = chain.compress(compress.Rule(pattern='conv1', narrow_range=True))
  frozen = compress.freeze(net, plan_for(net, {}, 2), chain.x)
  modules = compress.layer_modules(frozen.model)
  lowest = {
    path: int(operands.weight.integers(modules[path].kernel[...]).min())
    for path, operands in operands_of(frozen).items()
  }
  assert lowest.pop('conv1') == -1
  assert set(lowest.values()) == {-3}  # of -3, -1, 1, 3 half steps
  inputs = {
    path: int(operands.act.integers(jnp.float32(-1e6)))
    for path, operands in operands_of(frozen).items()
  }
  assert inputs == {'conv1': -1, 'conv2': 0, 'head': -2}


@standard_promotion
@pytest.mark.parametrize(
  ('settings', 'bits', 'levels'),
  [
    (dict(), 2, [-3, -1, 1, 3]),
    (dict(per_channel=True), 2, [-3, -1, 1, 3]),
    (dict(), 3, range(-4, 4)),
    (dict(mid_rise=False), 2, [-2, -1, 0, 1]),
    (dict(narrow_range=True), 2, [-1, 0, 1]),
    (dict(exponent=True), 2, [-1, 0, 1]),
  ],
)
def test_kernels_of_two_bits_have_no_level_at_zero(settings, bits, levels):
  chain = built('chain')
  net = chain.compress(compress.Rule(pattern='*', **settings))
  frozen = compress.freeze(net, plan_for(net, {}, bits), chain.x)
  hardened = harden.harden(frozen)
  kernel = np.asarray(hardened.model.conv2.kernel[...])
  assert set(np.unique(kernel)) <= set(levels)
  assert len(np.unique(kernel)) > 2
  odd = levels == [-3, -1, 1, 3]
  for path, operands in operands_of(hardened).items():
    assert operands.weight.odd is odd, path
  np.testing.assert_array_equal(hardened(chain.x), frozen(chain.x))
  rows = harden.count(hardened, chain.x)
  assert {row.weight_bits for row in rows} == {bits}


@standard_promotion
@pytest.mark.parametrize('per_channel', [False, True])
def test_kernels_of_one_bit_have_two_levels(per_channel):
  chain = built('chain')
  rule = compress.Rule(pattern='*', weight_bits=(1, 8), per_channel=per_channel)
  net = chain.compress(rule)
  assert all(o.weight.mid_rise for o in operands_of(net).values())
  compress.regrid(net, 1.0, chain.x, kinds=['weight'])
  for path, operands in operands_of(net).items():
    assert float(operands.weight.bits()) == pytest.approx(1, abs=1e-5)
    kernel = compress.layer_modules(net.model)[path].kernel[...]
    # Of least squared error, however far the largest weights are.
    level = np.abs(kernel).mean()
    found = np.unique(operands.weight(kernel))
    np.testing.assert_allclose(found, [-level, level], rtol=1e-5)
  plan = plan_for(net, {}, 4)
  ones = dict.fromkeys(plan.weight_bits, 1)
  frozen = compress.freeze(
    net, dataclasses.replace(plan, weight_bits=ones), chain.x
  )
  hardened = harden.harden(frozen)
  for _, module, operands in compress.hooks(hardened):
    assert set(np.unique(module.kernel[...])) == {-1, 1}
    assert operands.weight.odd
  np.testing.assert_array_equal(hardened(chain.x), frozen(chain.x))
  assert {row.weight_bits for row in harden.count(hardened, chain.x)} == {1}


@pytest.mark.parametrize(
  'settings',
  [dict(mid_rise=False), dict(narrow_range=True), dict(exponent=True)],
)
def test_one_bit_has_no_level_at_zero(settings):
  rule = compress.Rule(pattern='*', weight_bits=(1, 8), **settings)
  with pytest.raises(
    ValueError, match=r'conv1 cannot have weight_bits=\(1, 8\): of less than'
  ):
    built('chain').compress(rule)


def test_one_bit_is_of_no_concern_to_a_float_layer():
  rules = [
    compress.Rule(pattern='*', weight_bits=(1, 8)),
    compress.Rule(pattern='head', quantize=False, exponent=True, prune=False),
  ]
  assert operands_of(built('chain').compress(*rules))['head'].weight is None


def test_bounds_between_whole_bits_hold():
  rule = compress.Rule(pattern='*', weight_bits=(1.5, 8), act_bits=(1.5, 8))
  net = built('chain').compress(rule)
  plan = allocate.uniform(net, 2, 2)
  assert set(plan.weight_bits.values()) == {2}
  with pytest.raises(ValueError, match='uniform bits of 1 for weights'):
    allocate.uniform(net, 1, 2)


def test_one_bit_is_not_planned_where_no_rule_allows_it():
  chain = built('chain')
  net = chain.compress()
  with pytest.raises(
    ValueError, match=r'kernel of conv1 one bit.*\(1, 8\) of a rule allows one'
  ):
    compress.freeze(net, plan_for(net, {}, 1), chain.x)


def masked_chain():
  """The chain, whose second kernel is masked at one place."""
  model = nnx.clone(built('chain').model)
  mask = np.ones(model.conv2.kernel.shape, np.float32)
  mask[0, 0, 0, 0] = 0
  model.conv2.mask = nnx.data(jnp.asarray(mask))
  return model


@standard_promotion
def test_a_masked_kernel_cannot_have_one_bit():
  chain, model = built('chain'), masked_chain()
  rules = [compress.Rule(pattern='*', prune=False)]
  net = compress.compress(model, rules, chain.x, choices=range(1, 9))
  bounds = {p: o.weight.bounds for p, o in operands_of(net).items()}
  assert bounds == {'conv1': (1, 8), 'conv2': (2, 8), 'head': (1, 8)}
  compress.regrid(net, 2.0, chain.x)
  held = [o.weight(jnp.zeros(())) for o in operands_of(net).values()]
  assert [bool(v) for v in held] == [True, False, True]
  rules.append(compress.Rule(pattern='conv2', weight_bits=(1, 1)))
  with pytest.raises(
    ValueError,
    match=r"kernel of conv2 .*pattern='conv2' and weight_bits=\(1, 8",
  ):
    compress.compress(model, rules, chain.x)


@standard_promotion
def test_a_kernel_that_its_layer_masks_keeps_a_level_at_zero():
  """However few are masked, and what is hardened predicts the same."""
  chain, model = built('chain'), masked_chain()
  net = compress.compress(
    model, [compress.Rule(pattern='*', prune=False)], chain.x
  )
  frozen = compress.freeze(net, plan_for(net, {}, 2), chain.x)
  odd = {p: o.weight.mid_rise for p, o in operands_of(frozen).items()}
  assert odd == {'conv1': True, 'conv2': False, 'head': True}
  hardened = harden.harden(frozen)
  np.testing.assert_array_equal(hardened(chain.x), frozen(chain.x))


@standard_promotion
@pytest.mark.parametrize('axis', [0, 1])
def test_a_dead_channel_stays_dead(axis):
  """However wide the layer is."""
  kernel = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
  assert not compress.quantizers.needs_zero(kernel, [kernel])
  kernel[(slice(None), 7) if axis else 7] = 0
  assert compress.quantizers.needs_zero(kernel, [kernel])


@standard_promotion
def test_a_kernel_with_zeros_keeps_them():
  chain = built('chain')
  mask = np.ones(chain.model.conv2.kernel.shape, np.float32)
  mask[0] = 0
  kernel = chain.model.conv2.kernel
  model = nnx.clone(chain.model)
  model.conv2.kernel = kernel.replace(kernel[...] * mask)
  net = compress.compress(model, (), chain.x)
  frozen = compress.freeze(net, plan_for(net, {}, 2), chain.x)
  found = harden.harden(frozen).model
  np.testing.assert_array_equal(found.conv2.kernel[0], 0)
  assert np.all(np.asarray(found.conv1.kernel[...]) % 2)


def squared_error(quantizer, clip, x):
  if quantizer.mid_rise:
    step = clip / quantizer.levels(quantizer.fixed_bits)[0]
    level = np.floor(np.abs(np.clip(x, -clip, clip)) / step * (1 - 1e-9)) + 0.5
    return np.square(step * np.copysign(level, x) - x).sum()
  top = 2.0 ** (quantizer.fixed_bits - quantizer.signed) - 1
  step = clip / top
  low = 0
  if quantizer.signed:
    low = -top if quantizer.symmetric else -top - 1
  return np.square(step * np.clip(np.round(x / step), low, top) - x).sum()


def mostly_positive(*rules, bits=8.0):
  """A compressed network with gelu, and its batch."""
  make = lambda: cnn.DigitsCNN(
    channels=(4, 4, 6, 6), activation='gelu', rngs=nnx.Rngs(0)
  )
  model = surgery_test.fill(nnx.eval_shape(make))
  for _, module in nnx.iter_modules(model):
    if isinstance(module, nnx.BatchNorm):
      module.scale[...] = jnp.full(module.scale.shape, 3.0)
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(8, 8, 8, 1)), jnp.float32)
  return compress.compress(model, rules, x, bits=bits), x


@standard_promotion
@pytest.mark.parametrize('bits', [2, 3, 6])
def test_inputs_that_are_mostly_positive_have_few_levels_below_zero(bits):
  net, x = mostly_positive(bits=4.0)
  found = operands_of(net)
  assert found.pop('block1/conv').act.symmetric  # of eight bits
  (inputs,) = compress.inputs_of(net, x)['block2/conv']
  reach = -inputs.min() / inputs.max()
  below = found['block2/conv'].act.below
  assert below == pytest.approx(float(reach), rel=0.1)
  for operands in found.values():
    assert 0 <= operands.act.below < 0.5
    assert float(operands.act.bits()) == pytest.approx(4)
  frozen = compress.freeze(net, plan_for(net, {}, bits), x)
  hardened = harden.harden(frozen)
  rows = {row.name: row for row in harden.count(hardened, x)}
  kept = operands_of(hardened)
  for path, operands in operands_of(frozen).items():
    act, fixed = operands.act, kept[path].act
    far = jnp.asarray([-np.inf, np.inf])
    lowest, highest = act.integers(far).tolist()
    assert highest - lowest == 2**bits - 1
    assert rows[path].act_bits == bits
    assert (fixed.lowest, fixed.highest) == (lowest, highest)
    np.testing.assert_array_equal(fixed(inputs), act(inputs))
    if path in found:
      assert -lowest < highest


@standard_promotion
@pytest.mark.parametrize('bits', [1, 2, 3, 5, 7])
@pytest.mark.parametrize('scale', [0.25, 1.0, 4.0])
def test_the_levels_below_zero_have_the_least_squared_error(scale, bits):
  """Whatever they were calibrated on."""
  x = scale * np.random.default_rng(0).normal(size=3000)
  x = np.asarray(jax.nn.gelu(jnp.float32(x)))
  others = 2**bits - 1

  def error(below, clip):
    step = clip / (others - below)
    levels = np.clip(np.round(x / step), -below, others - below)
    return np.square(step * levels - x).sum()

  start = np.float32(1.5 * x.max())
  clip, ratio = compress.clips.asymmetric(start, bits, [x])
  below = round(ratio * others / (1 + ratio))
  assert ratio == below / (others - below)
  best = min(
    error(n, c)
    for n in range(min(2 ** (bits - 1) + 1, others))
    for c in np.geomspace(0.2, 1.5, 150) * start
  )
  assert error(below, float(clip)) <= 1.05 * best


@standard_promotion
def test_a_few_values_below_zero_among_zeros_keep_their_levels():
  chain = built('chain')
  net = chain.assemble()
  x = np.zeros((1000, *chain.x.shape[1:]), np.float32)
  x.flat[:2] = -5.0, 1.0
  compress.calibrate(net, x)
  image = operands_of(net)['conv1'].act
  assert image.below is None
  assert float(image(jnp.float32(-5.0))) == pytest.approx(-5.0)


@standard_promotion
@pytest.mark.parametrize(
  'settings',
  [
    dict(asymmetric=False),
    dict(narrow_range=True),
    dict(act_bits=(8, 8)),
  ],
)
def test_inputs_whose_grids_are_as_if_they_reached_as_far(settings):
  net, x = mostly_positive(compress.Rule(pattern='*', **settings))
  bits = settings.get('act_bits', (4, 4))[0]
  frozen = compress.freeze(net, plan_for(net, {}, bits), x)
  even = set(settings) & {'narrow_range', 'act_bits'}
  for model in (net, frozen):
    for operands in operands_of(model).values():
      assert operands.act.sides['below'] is None
      lowest, highest = operands.act.integers(
        jnp.asarray([-np.inf, np.inf])
      ).tolist()
      assert -lowest == highest + (not even and not operands.act.symmetric)


@standard_promotion
def test_inputs_that_reach_far_below_zero_keep_their_levels():
  net = built('chain').compress(bits=4.0)
  head = operands_of(net)['head'].act
  assert head.signed
  assert head.below is None


@standard_promotion
@pytest.mark.parametrize('bits', [2, 4])
def test_the_clip_has_the_least_squared_error(bits):
  chain = built('chain')
  net = chain.compress(compress.Rule(pattern='*', act_bits=(2, 8)))
  frozen = compress.freeze(net, plan_for(net, {}, bits), chain.x)
  operands = operands_of(frozen)['conv1']
  kernel = np.asarray(frozen.model.conv1.kernel[...], np.float64)
  for quantizer, x in (
    (operands.weight, kernel),
    (operands.act, np.asarray(chain.x, np.float64)),
  ):
    clip = float(np.exp(quantizer.log_clip[...]))
    assert clip < 0.95 * np.abs(x).max()
    error = squared_error(quantizer, clip, x)
    np.testing.assert_allclose(
      np.square(quantizer(jnp.float32(x)) - x).sum(), error, rtol=1e-3
    )
    best = min(
      squared_error(quantizer, c, x)
      for c in np.linspace(0.1, 1.2, 400) * np.abs(x).max()
    )
    assert error <= 1.05 * best


@standard_promotion
def test_all_grids_get_the_same_bits_and_clips_for_them():
  chain = built('chain')
  rule = compress.Rule(pattern='conv2', weight_bits=(5, 8), exponent=True)
  net = chain.compress(rule)
  compress.restrict(net, (2, 3, 5, 8))
  before = operands_of(net)['conv1'].weight
  compress.regrid(net, 3.0, chain.x)
  found = operands_of(net)
  assert float(found['conv2'].weight.bits()) == pytest.approx(5, abs=1e-4)
  assert found['conv2'].weight.log_exponent is not None
  after = found['conv1'].weight
  assert float(after.bits()) == pytest.approx(3, abs=1e-4)
  assert after.log_clip[...] < before.log_clip[...]
  assert after.bounds == before.bounds
  assert after.choices == before.choices
  assert after.narrow_range is before.narrow_range is False


@standard_promotion
@pytest.mark.parametrize(
  ('name', 'pruned'),
  [
    ('transposed_kernel', False),
    ('inverted_residual', True),
    ('chain', True),
  ],
)
def test_grids_per_channel_are_fitted_and_go_with_their_channels(name, pruned):
  here = built(name)
  net = here.compress(compress.Rule(pattern='*', per_channel=True))
  masks = masks_of(net)
  if not pruned:
    masks = {name: np.ones_like(mask) for name, mask in masks.items()}
  settle(net, masks)
  frozen = compress.freeze(net, plan_for(net, masks, 3), here.x)
  modules = compress.layer_modules(frozen.model)
  for path, operands in operands_of(frozen).items():
    kernel = np.asarray(modules[path].kernel[...], np.float64)
    clips = np.exp(np.asarray(operands.weight.log_clip[...], np.float64))
    axis = int(np.argmax(clips.shape))
    assert clips.size == clips.shape[axis] == kernel.shape[axis]
    got = want = 0.0
    for clip, x in zip(clips.ravel(), np.moveaxis(kernel, axis, 0)):
      got += squared_error(operands.weight, clip, x)
      want += min(
        squared_error(operands.weight, c, x)
        for c in np.linspace(0.2, 1.2, 200) * np.abs(x).max()
      )
    assert got <= 1.2 * want


def test_a_plan_survives_json():
  plan = compress.Plan(
    open=dict(a=np.asarray([True, False, True]), b=np.ones(2, bool)),
    weight_bits=dict(x=3, y=8),
    act_bits=dict(x=2, y=4),
  )
  again = compress.Plan.from_json(json.loads(json.dumps(plan.to_json())))
  assert again.weight_bits == plan.weight_bits
  assert again.act_bits == plan.act_bits
  assert list(again.open) == ['a', 'b']
  for name, mask in plan.open.items():
    np.testing.assert_array_equal(again.open[name], mask)
    assert again.open[name].dtype == bool


def test_records_do_not_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    FLOAT.quantize = True
