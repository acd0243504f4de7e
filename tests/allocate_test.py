"""Plans that meet their budget, on real models as a search might leave them."""

import dataclasses
import functools
import itertools
import re

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import cost
from djpq_jax import graph
from djpq_jax import models
from djpq_jax.allocate import rounding
from djpq_jax.ops import grid

MODELS = ['digits_cnn', 'lenet5', 'vgg7', 'resnet20']


@functools.cache
def found(name, **kwargs):
  """A model of zeros (nothing here depends on weights), and its graph."""
  abstract = nnx.eval_shape(lambda: models.create(name, **kwargs))
  abstract.eval()
  x = jax.ShapeDtypeStruct((2, *abstract.input_shape), jnp.float32)
  graphdef, state = nnx.split(abstract)
  zeros = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), state)
  return nnx.merge(graphdef, zeros), graph.trace(abstract, x)


def searched(name, *rules, seed=0):
  """The model with random bits in every tensor and random gates."""
  model, channels = found(name)
  rules = [compress.Rule(pattern='*', min_channels=1), *rules]
  net = compress.assemble(model, compress.resolve(channels, rules))
  rng = np.random.default_rng(seed)
  for hook in compress.hooks(net):
    for quantizer in (hook.operands.weight, hook.operands.act):
      if quantizer is not None:
        bits = rng.uniform(*quantizer.bounds)
        step = -np.log(grid.levels_above(bits, **quantizer.extent))
        # The clip is 1.
        quantizer.log_clip.set_value(jnp.zeros(()))
        quantizer.log_step.set_value(jnp.float32(step))
  for gate in net.gates:
    gate.log_sigma2.set_value(jnp.float32(rng.normal(-2, 4, gate.size)))
  return net


def test_bits_are_read_as_they_are_learned():
  """Not as a restricted search rounds them: many would tie."""
  net = searched('lenet5')
  before = allocate.read(net)
  compress.restrict(net, (2, 4, 8))
  after = allocate.read(net)
  for kind in ('weight_bits', 'act_bits'):
    chex.assert_trees_all_close(
      dict(getattr(after, kind)), dict(getattr(before, kind)), rtol=1e-5
    )


@functools.cache
def shared(name):
  """One such model for all tests that only read it."""
  return searched(name)


def relative(net, plan):
  return allocate.relative_bops(net.structure, plan)


def assert_within(net, plan):
  """Every layer within its bounds, every group with enough channels."""
  for path, _, operands in compress.hooks(net):
    for kind in ('weight', 'act'):
      low, high = getattr(operands, kind).bounds
      assert low <= getattr(plan, f'{kind}_bits')[path] <= high
  for g in net.structure.gated:
    group = net.structure.groups[g]
    kept = int(plan.open[group.name].sum())
    assert group.min_channels <= kept <= group.size
    assert kept % group.align == 0 or kept == group.size


# -- on budget ----------------------------------------------------------------


@pytest.mark.parametrize('name', MODELS)
def test_plans_are_at_or_just_below_any_budget(name):
  net = shared(name)
  least = allocate.reachable(net)
  budgets = np.geomspace(0.045, 1.05 * least, 6)
  plans = [allocate.plan(net, budget) for budget in budgets]
  spent = np.asarray([relative(net, plan) for plan in plans])
  assert np.all(spent <= budgets)
  np.testing.assert_allclose(spent, budgets, rtol=0.05)
  for plan in plans:
    assert_within(net, plan)
  assert np.all(np.diff(spent) < 0)


@pytest.mark.parametrize('choices', [(2, 4, 8, 16, 32), (2, 4, 8)])
@pytest.mark.parametrize('name', MODELS)
def test_only_allowed_bits_and_still_on_budget(name, choices):
  net = shared(name)
  for budget in (0.02, 0.008, 1.2 * allocate.reachable(net, choices)):
    plan = allocate.plan(net, budget, choices)
    bits = {*plan.weight_bits.values(), *plan.act_bits.values()}
    assert bits <= {2, 4, 8}  # the layers' bounds end at 8
    assert 0.95 * budget <= relative(net, plan) <= budget
    assert_within(net, plan)


@pytest.mark.parametrize(
  ('budget', 'choices'), [(0.03, (2, 4, 8)), (0.055, (2, 4, 8)), (0.055, None)]
)
def test_channels_pay_for_the_bits_of_a_layer_that_dominates(budget, choices):
  net = shared('lenet5')  # two thirds of its MACs are in conv2
  plan = allocate.plan(net, budget, choices)
  assert 0.95 * budget <= relative(net, plan) <= budget
  assert_within(net, plan)


def relative_costs(net, plan):
  return cost.relative(compress.planned_usage(net.structure, plan))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize(
  'budgets',
  [
    {'weights': 0.05},
    {'macs': 0.4},
    {'bops': 0.02, 'weights': 0.05},
    {'bops': 0.01, 'macs': 0.7, 'weights': 0.2},
  ],
  ids=' '.join,
)
def test_budgets_of_other_costs(name, budgets):
  """All are met, the tightest nearly spent; what none counts is untouched."""
  net = shared(name)
  plan = allocate.plan(net, budgets)
  found = relative_costs(net, plan)
  loads = [found[cost_name] / limit for cost_name, limit in budgets.items()]
  assert 0.95 <= max(loads) <= 1
  assert_within(net, plan)
  whole = allocate.plan(net, None)
  if 'bops' not in budgets:
    assert plan.act_bits == whole.act_bits
  if [*budgets] == ['macs']:
    assert plan.weight_bits == whole.weight_bits


@pytest.mark.parametrize(
  ('tight', 'loose'),
  [({'macs': 0.4}, {'bops': 0.5}), ({'weights': 0.05}, {'bops': 0.9})],
)
@pytest.mark.parametrize('name', MODELS)
def test_a_budget_that_is_met_anyway_costs_nothing(name, tight, loose):
  net = shared(name)
  found, expected = (allocate.plan(net, b) for b in (tight | loose, tight))
  assert found.to_json() == expected.to_json()


def test_budgets_that_cannot_be():
  net = shared('digits_cnn')
  with pytest.raises(ValueError, match='the float32 MACs cannot be reached'):
    allocate.plan(net, {'bops': 0.02, 'macs': 1e-5})
  with pytest.raises(ValueError, match="no cost 'bytes'; known: bops, macs"):
    allocate.plan(net, {'bytes': 0.1})
  with pytest.raises(ValueError, match='there is no budget'):
    allocate.plan(net, {})


@pytest.mark.parametrize('share', [float('nan'), float('inf'), 0.0, -0.1])
def test_budgets_that_are_no_shares(share):
  net = shared('lenet5')
  for f in (allocate.plan, allocate.check_reachable, allocate.even_bits):
    with pytest.raises(ValueError, match=f'budget of BOPs .*not {share}'):
      f(net, share)
    with pytest.raises(ValueError, match=f'budget of MACs .*not {share}'):
      f(net, {'bops': 0.1, 'macs': share})


@pytest.mark.parametrize('budget', [None, 0.1, {'macs': 0.5}])
def test_a_frozen_model_has_nothing_left_to_plan(budget):
  net = shared('lenet5')
  plan = allocate.uniform(net, 4, 4)
  settled = dataclasses.replace(net.structure, plan=plan)
  frozen = compress.Compressed(net.model, net.gates, settled)
  with pytest.raises(ValueError, match='the model is frozen'):
    allocate.plan(frozen, budget)


def test_a_budget_beyond_the_bounds_gives_all_that_they_allow():
  net = shared('digits_cnn')
  plan = allocate.plan(net, 0.5)
  assert {*plan.weight_bits.values(), *plan.act_bits.values()} == {8}
  assert all(mask.all() for mask in plan.open.values())
  assert relative(net, plan) == 64 / 1024


def test_the_smallest_budget_is_reached_exactly():
  net = shared('digits_cnn')
  least = allocate.reachable(net)
  plan = allocate.plan(net, least)
  assert relative(net, plan) == least
  assert all(mask.sum() == 1 for mask in plan.open.values())
  assert set(plan.weight_bits.values()) == {2}
  assert sorted(plan.act_bits.values()) == [2, 2, 2, 2, 8]  # 8: the image


def test_kernels_that_may_have_one_bit_reach_smaller_budgets():
  rules = [compress.Rule(pattern='*', weight_bits=(1, 8), prune=False)]
  net = tiny.compressed(tiny.Mlp, rules)
  least = allocate.reachable(net)
  plan = allocate.plan(net, least)
  assert set(plan.weight_bits.values()) == {1}
  assert allocate.relative_bops(net.structure, plan) == pytest.approx(least)
  two = allocate.plan(net, 2 * least)
  assert set(two.weight_bits.values()) <= {1, 2}


@pytest.mark.parametrize('choices', [None, (4, 8)])
def test_a_budget_out_of_reach_says_how_far_it_goes(choices):
  net = shared('digits_cnn')
  least = allocate.reachable(net, choices)
  half = f'{100 * least / 2:.4g} %'
  message = (
    f'budget of {half} .*cannot be reached.* {100 * least:.4g} % are left'
  )
  for f in (allocate.plan, allocate.check_reachable):
    with pytest.raises(ValueError, match=message):
      f(net, least / 2, choices)
  allocate.check_reachable(net, least, choices)
  with pytest.raises(ValueError, match='cannot be reached'):
    allocate.plan(net, 0.999 * least, choices)


@pytest.mark.parametrize('choices', [4, '248', (2.5, 4), [[2, 4]]])
def test_choices_are_whole_numbers(choices):
  message = rf'choices are whole numbers .*, not {re.escape(repr(choices))}'
  with pytest.raises(ValueError, match=message):
    allocate.plan(shared('digits_cnn'), 0.02, choices)


@pytest.mark.parametrize('name', MODELS)
def test_the_fast_count_is_the_exact_one(name):
  net = shared(name)
  counts = compress.PlanCosts(net.structure)
  rng = np.random.default_rng(0)
  layers = list(net.structure.graph.layers)
  for _ in range(3):
    open_ = {
      net.structure.groups[g].name: rng.random(gate.size) < rng.random()
      for g, gate in zip(net.structure.gated, net.gates)
    }
    plan = compress.Plan(
      open=open_,
      weight_bits={path: int(rng.integers(2, 17)) for path in layers},
      act_bits={path: int(rng.integers(1, 17)) for path in layers[1:]},
    )
    uses = compress.planned_usage(net.structure, plan)
    exact = cost.bops(uses)
    assert isinstance(exact, int)
    total = 1024 * net.structure.graph.float_macs
    found, expected = counts.relative(plan), cost.relative(uses)
    assert found.keys() == cost.COSTS.keys()
    assert found == expected
    assert relative(net, plan) == exact / total


@pytest.mark.parametrize('budgets', [{'bops': 0.03}, {'weights': 0.15}])
def test_even_bits_just_meet_a_budget(budgets):
  net = searched('resnet20')
  bits = allocate.even_bits(net, budgets)
  for hook in compress.hooks(net):
    for kind in ('weight', 'act'):
      quantizer = getattr(hook.operands, kind)
      low, high = quantizer.bounds
      even = float(np.clip(bits, low, high))
      step = -np.log(grid.levels_above(even, **quantizer.extent))
      quantizer.log_step.set_value(jnp.float32(step))
  for gate in net.gates:
    gate.log_sigma2.set_value(jnp.full(gate.size, -9.0))
  (name, share), *_ = budgets.items()
  found = cost.relative(compress.usage(net))[name]
  np.testing.assert_allclose(found, share, rtol=1e-4)


def test_even_bits_beyond_all_bounds():
  net = searched('lenet5')
  assert allocate.even_bits(net, 0.9) == compress.MAX_BITS
  assert allocate.even_bits(net, 1e-6) == 1


# -- what is taken first ------------------------------------------------------


def test_the_best_channels_stay():
  net = shared('lenet5')
  plan = allocate.plan(net, 0.005)
  closed = 0
  for g, gate in zip(net.structure.gated, net.gates):
    mask = plan.open[net.structure.groups[g].name]
    log_alpha = np.asarray(gate.log_alpha())
    closed += (~mask).sum()
    if not mask.all():
      assert log_alpha[mask].min() >= log_alpha[~mask].max()
  assert closed > 0


def test_more_budget_never_takes_anything_away():
  rounder = rounding.Rounder(shared('resnet20'), None, {'bops': 1.0})
  plans = [rounder.at(slack) for slack in np.linspace(-8, 8, 33)]
  spent = [rounder.load(plan) for plan in plans]
  assert np.all(np.diff(spent) >= 0)
  for less, more in itertools.pairwise(plans):
    for path, bits in less.weight_bits.items():
      assert bits <= more.weight_bits[path]
      assert less.act_bits[path] <= more.act_bits[path]
    for name, mask in less.open.items():
      assert not np.any(mask & ~more.open[name])


def test_without_a_budget_only_rounds():
  net = searched('digits_cnn')
  plan = allocate.plan(net, None)
  for path, _, operands in compress.hooks(net):
    for kind in ('weight', 'act'):
      real = float(getattr(operands, kind).bits())
      got = getattr(plan, f'{kind}_bits')[path]
      assert abs(np.log2(got) - np.log2(real)) <= np.log2(3 / 2) / 2 + 1e-5
  for g, gate in zip(net.structure.gated, net.gates):
    mask = plan.open[net.structure.groups[g].name]
    np.testing.assert_array_equal(mask, gate.open_mask())
  powers = allocate.plan(net, None, (2, 4, 8))
  for path, bits in allocate.read(net).weight_bits.items():
    assert powers.weight_bits[path] == 2 ** round(np.log2(bits))


# -- rules --------------------------------------------------------------------


def test_align_and_min_channels_hold_down_to_the_kernels():
  rules = [
    compress.Rule(pattern='*', align=8, quantize=False),
    compress.Rule(pattern='block2/*', align=3, min_channels=10),
    compress.Rule(pattern='block4/*', prune=False),
  ]
  net = searched('digits_cnn', *rules)
  seen = set()
  for budget in (0.3, 0.5, 0.7):
    plan = allocate.plan(net, budget)
    assert plan.weight_bits == plan.act_bits == {}
    kept = {name: int(mask.sum()) for name, mask in plan.open.items()}
    assert list(kept) == ['block1/conv', 'block2/conv', 'block3/conv']
    assert kept['block1/conv'] % 8 == kept['block3/conv'] % 8 == 0
    assert kept['block2/conv'] % 3 == 0 or kept['block2/conv'] == 32
    assert kept['block2/conv'] >= 12
    assert relative(net, plan) <= budget
    seen.add(tuple(kept.values()))
  assert len(seen) == 3
  frozen = compress.freeze(net, plan, jnp.zeros((1, 8, 8, 1)))
  assert frozen.model.block3.conv.kernel.shape == (
    3,
    3,
    kept['block2/conv'],
    kept['block3/conv'],
  )


def test_bounds_of_single_layers_hold():
  rules = [
    compress.Rule(pattern='conv2', weight_bits=(5, 6), act_bits=(7, 7)),
    compress.Rule(pattern='fc2', quantize=False),
  ]
  net = searched('lenet5', *rules)
  for budget in (0.02, 0.006):
    plan = allocate.plan(net, budget)
    assert plan.weight_bits['conv2'] in (5, 6)
    assert plan.act_bits['conv2'] == 7
    assert 'fc2' not in plan.weight_bits
    assert 0.95 * budget <= relative(net, plan) <= budget


def test_choices_outside_of_the_bounds_name_the_layer():
  rule = compress.Rule(pattern='conv2', weight_bits=(5, 7))
  net = searched('lenet5', rule)
  message = r'\(2, 4, 8\) is within the bounds .*weight bits of layer conv2'
  with pytest.raises(ValueError, match=message):
    allocate.plan(net, 0.02, (2, 4, 8))


def test_nothing_is_pruned_where_rules_forbid_it():
  net = searched('digits_cnn', compress.Rule(pattern='*', prune=False))
  plan = allocate.plan(net, 0.01)
  assert plan.open == {}
  assert 0.95 * 0.01 <= relative(net, plan) <= 0.01


def test_uniform_is_the_same_everywhere_within_bounds():
  rule = compress.Rule(pattern='fc1', weight_bits=(4, 8), act_bits=(2, 2))
  net = searched('lenet5', rule)
  plan = allocate.uniform(net, 3, 5)
  assert plan.open == {}
  assert plan.weight_bits == dict(conv1=3, conv2=3, fc1=4, fc2=3)
  assert plan.act_bits == dict(conv1=8, conv2=5, fc1=2, fc2=5)


@pytest.mark.parametrize(
  ('bits', 'message'),
  [
    ((16, 4), r'of 16 for weights .*: the rules allow 2 to 8; take others, or'),
    ((4, 9), r'of 9 for activations .*: the rules allow 2 to 8, 8 to 8; take'),
    ((1, 4), 'of 1 for weights'),
    ((4, 1), 'of 1 for activations .* or change act_bits of the rules'),
  ],
)
def test_uniform_bits_that_no_layer_can_have(bits, message):
  with pytest.raises(ValueError, match=message):
    allocate.uniform(shared('lenet5'), *bits)


def test_uniform_bits_that_one_layer_can_have():
  rule = compress.Rule(pattern='fc2', weight_bits=(12, 16))
  plan = allocate.uniform(searched('lenet5', rule), 16, 8)
  assert plan.weight_bits == dict(conv1=8, conv2=8, fc1=8, fc2=16)
  none = searched('lenet5', compress.Rule(pattern='*', quantize=False))
  assert allocate.uniform(none, 99, 99).weight_bits == {}


def test_reading_a_model_gives_plain_numbers():
  net = shared('digits_cnn')
  got = allocate.read(net)
  for path, _, operands in compress.hooks(net):
    assert got.weight_bits[path] == pytest.approx(float(operands.weight.bits()))
    assert got.act_bits[path] == pytest.approx(float(operands.act.bits()))
  sizes = {name: len(values) for name, values in got.log_alpha.items()}
  assert list(sizes.values()) == [32, 32, 64, 64]
  assert list(sizes) == [f'block{i}/conv' for i in (1, 2, 3, 4)]
  with pytest.raises(dataclasses.FrozenInstanceError):
    got.weight_bits = {}
