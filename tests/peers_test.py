"""What other libraries are told, and how what they return is counted."""

import importlib
import pathlib

import numpy as np
import pytest

from djpq_jax import cost

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


@pytest.fixture
def counting(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('peers.counting')


@pytest.fixture
def compare_peers(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('compare_peers')


def use(name, macs, weight_bits, act_bits):
  return cost.LayerUse(
    name=name,
    macs=macs,
    weights=1,
    keep_in=1,
    keep_out=1,
    weight_bits=weight_bits,
    act_bits=act_bits,
  )


def test_uniform_bits_cost_what_our_own_counter_says(counting):
  made = {
    'weight_bits0': np.full((3, 3, 2, 5), 4),
    'act_bits0': np.full((8, 6, 2), 3),
    'weight_bits1': np.full((240, 10), 6),
    'act_bits1': np.full(240, 7),
  }
  uses = [use('conv', 8 * 6 * 9 * 2 * 5, 4, 3), use('linear', 2400, 6, 7)]
  assert counting.bops(made) == (cost.bops(uses), cost.float_bops(uses))


def test_each_product_costs_its_own_bits(counting):
  rng = np.random.default_rng(0)
  weights = rng.integers(0, 5, (3, 3, 2, 4))
  inputs = rng.integers(0, 5, (4, 5, 2))
  padded = np.pad(inputs, [(1, 1), (1, 1), (0, 0)], 'edge')
  expected = 0
  for y, x, dy, dx, c, o in np.ndindex(4, 5, 3, 3, 2, 4):
    expected += padded[y + dy, x + dx, c] * weights[dy, dx, c, o]
  made = {'weight_bits0': weights, 'act_bits0': inputs}
  assert counting.bops(made)[0] == expected


def test_what_has_no_bits_costs_nothing(counting):
  made = {'weight_bits0': np.eye(3), 'act_bits0': np.array([0, 2, 3])}
  assert counting.bops(made)[0] == 5


def test_a_peer_of_learned_bits_is_told_the_bops_of_each_budget(compare_peers):
  found = compare_peers.contestants('hgq2', [0.002, 0.001], macs=1000)
  assert found == {'HGQ2 @0.200%': '2048.0', 'HGQ2 @0.100%': '1024.0'}


def test_a_peer_of_fixed_bits_has_the_same_contestants_at_any_budget(
  compare_peers,
):
  found = compare_peers.contestants('qwix', [0.002], macs=1000)
  assert found == compare_peers.contestants('qwix', [], macs=1)
  assert found['qwix W4A4'] == '4,4,4'
