"""What other libraries are told, and how what they return is counted."""

import functools
import importlib
import pathlib

import numpy as np
import pytest

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import cost
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax import models

BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


@pytest.fixture
def counting(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('peers.counting')


@pytest.fixture
def searching(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('peers.searching')


@pytest.fixture
def feeding(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('peers.feeding')


@pytest.fixture
def digits_torch(monkeypatch):
  pytest.importorskip('torch', reason='peers have torch, the tests need none')
  monkeypatch.syspath_prepend(BENCHMARKS / 'peers')
  return importlib.import_module('digits_torch')


@pytest.fixture
def resnet_torch(digits_torch):
  del digits_torch  # has torch, and the folder on the path
  return importlib.import_module('resnet_torch')


@pytest.fixture
def peer_arrays(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('peer_arrays')


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


@pytest.mark.parametrize('stride', [None, 1, 2])
def test_each_product_costs_its_own_bits(counting, stride):
  rng = np.random.default_rng(0)
  weights = rng.integers(0, 5, (3, 3, 2, 4))
  inputs = rng.integers(0, 5, (4, 6, 2))
  made = {'weight_bits0': weights, 'act_bits0': inputs}
  if stride:
    made['stride0'] = stride
  s = stride or 1
  padded = np.pad(inputs, [(1, 1), (1, 1), (0, 0)], 'edge')
  expected = products = 0
  for y, x, dy, dx, c, o in np.ndindex(4 // s, 6 // s, 3, 3, 2, 4):
    expected += padded[s * y + dy, s * x + dx, c] * weights[dy, dx, c, o]
    products += 1
  assert counting.bops(made) == (expected, 1024 * products)


def test_what_has_no_bits_costs_nothing(counting):
  made = {'weight_bits0': np.eye(3), 'act_bits0': np.array([0, 2, 3])}
  assert counting.bops(made)[0] == 5


def test_bits_of_whole_tensors_cost_what_our_own_counter_says(counting):
  made = counting.whole_tensors(
    [(3, 3, 2, 5), (240, 10)], [(8, 6, 2), (240,)], [4, 6], [3, 7]
  )
  uses = [use('conv', 8 * 6 * 9 * 2 * 5, 4, 3), use('linear', 2400, 6, 7)]
  assert counting.bops(made) == (cost.bops(uses), cost.float_bops(uses))


def test_removed_channels_cost_nothing_and_stay_in_the_float_model(counting):
  full = [(3, 3, 2, 8), (96, 10)], [(6, 4, 2), (96,)]
  kept = [(3, 3, 2, 3), (36, 10)], [(6, 4, 2), (36,)]
  made = counting.whole_tensors(*kept, [8, 8], [8, 8], full)
  macs = 6 * 4 * 9 * 2 * 3 + 36 * 10
  dense = 6 * 4 * 9 * 2 * 8 + 96 * 10
  assert counting.bops(made) == (64 * macs, 1024 * dense)


def made_by(coefficient):
  """BOPs fall with the root of the coefficient, the loss rises with it."""
  return {'bops': 1e4 / coefficient**0.5, 'loss': coefficient}


@pytest.mark.parametrize('first', [0.01, 4.0, 5e4])
def test_a_search_ends_near_a_budget_and_within_it(searching, first):
  search = searching.Search(first=first, slope=0.6)
  (found,) = search(made_by, [1e3])
  assert 0.85e3 <= found['bops'] <= 1e3 or found['trainings'] == 4
  assert found['bops'] == made_by(found['coefficient'])['bops']


def test_a_search_of_a_right_guess_is_one_training(searching):
  search = searching.Search(first=115.0, slope=0.5)
  (found,) = search(made_by, [1e3])
  assert found['trainings'] == 1


def test_a_budget_takes_the_lowest_loss_within_it_not_the_nearest(searching):
  runs = [
    {'bops': 99, 'loss': 0.3},
    {'bops': 80, 'loss': 0.2},
    {'bops': 101, 'loss': 0.1},
  ]
  assert searching.best(runs, 100)['bops'] == 80
  assert searching.best(runs, 50)['bops'] == 80  # what comes nearest to it


@functools.cache
def structure(name='digits'):
  config = config_lib.load(f'configs/{name}.py')
  return experiment.dense_structure(config)


def test_a_peer_of_learned_bits_is_told_the_bops_of_each_budget(compare_peers):
  found = compare_peers.contestants('hgq2', [0.002, 0.001], structure())
  full = 1024 * structure().graph.float_macs
  assert found == {
    'HGQ2 @0.200%': str(0.002 * full),
    'HGQ2 @0.100%': str(0.001 * full),
  }


def test_a_peer_of_fixed_bits_has_the_same_contestants_at_any_budget(
  compare_peers,
):
  found = compare_peers.contestants('qwix', [0.002], structure())
  assert found == compare_peers.contestants('qwix', [], structure())
  assert found['qwix W4A4'] == '4,4,4'


def test_a_peer_can_have_both_fixed_bits_and_budgets(compare_peers):
  found = compare_peers.contestants('brevitas', [0.005], structure())
  full = 1024 * structure().graph.float_macs
  assert found['brevitas @0.500%'] == str(0.005 * full)
  assert found['brevitas W2A2'] == '2,2,2,2,6/8,2,2,2,6'


@pytest.mark.parametrize('name', ['digits', 'resnet20_cifar10'])
def test_fixed_bits_are_those_of_the_controls(compare_peers, name):
  found = compare_peers.contestants('brevitas', [], structure(name), ['W3A3'])
  config = config_lib.load(f'configs/{name}.py')
  model = models.create(config.model.name, seed=0)
  x = np.zeros((2, *model.input_shape), np.float32)
  net = compress.compress(model, experiment.rules_of(config), x)
  plan = allocate.uniform(net, 3, 3)
  expected = [list(plan.weight_bits.values()), list(plan.act_bits.values())]
  told = [part.split(',') for part in found['brevitas W3A3'].split('/')]
  assert [[int(n) for n in part] for part in told] == expected


def test_peers_refuse_what_they_do_not_do_as_the_config_says(compare_peers):
  config = config_lib.load('configs/resnet20_cifar10.py')
  compare_peers.check(config, ['brevitas'])
  with pytest.raises(ValueError, match=r'qwix does not know .* resnet20'):
    compare_peers.check(config, ['brevitas', 'qwix'])
  config = config_lib.change(config, finetune={'temperature': 3.0})
  with pytest.raises(ValueError, match=r'finetune.temperature of 2.0, not 3.0'):
    compare_peers.check(config, ['brevitas'])


def crops(feeding, seed):
  """Batches of ten images whose pixels are all different."""
  images = np.arange(10 * 8 * 8 * 3).reshape(10, 8, 8, 3)
  return feeding.Crops(
    {
      'images': (images % 251 + 1).astype(np.uint8),
      'labels': np.arange(10),
      'mean': np.zeros(3, np.float32),
      'std': np.ones(3, np.float32) / 255,
      'batch': 4,
      'shift': 2,
      'flip': True,
    },
    seed,
    teacher=lambda images: images.sum((1, 2)),
  )


def test_crops_are_parts_of_the_image_of_their_label(feeding):
  batches = crops(feeding, 0)
  edge = [(0, 0), (2, 2), (2, 2), (0, 0)]
  padded = np.pad(batches.given['images'], edge).astype(np.float32)
  seen = []
  for images, labels, teacher in batches.epoch():
    np.testing.assert_array_equal(teacher, images.sum((1, 2)))
    for image, label in zip(images, labels):
      found = [
        (y, x, mirror)
        for y, x, mirror in np.ndindex(5, 5, 2)
        if np.allclose(
          padded[label, y : y + 8, x : x + 8][:, :: -1 if mirror else 1], image
        )
      ]
      assert len(found) == 1
      seen += found
  assert len(batches) == 2
  assert len(seen) == 8
  assert len(set(seen)) > 4  # not all moved alike


def test_crops_follow_from_the_seed(feeding):
  first, again, other = (
    next(crops(feeding, seed).epoch())[0] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_rows_of_fixed_bits_can_be_chosen(compare_peers):
  found = compare_peers.contestants('brevitas', [], structure(), ['W2A2'])
  assert list(found) == ['brevitas W2A2']
  found = compare_peers.contestants('brevitas', [0.005], structure(), [])
  assert list(found) == ['brevitas @0.500%']


def test_the_network_in_torch_is_the_one_of_jax(digits_torch, peer_arrays):
  from torch import nn
  import training_torch

  model = models.create('digits_cnn', seed=0)
  rng = np.random.default_rng(0)
  for block in (model.block1, model.block2, model.block3, model.block4):
    block.bn.var[...] = rng.uniform(0.5, 2, block.bn.var.shape)
    block.bn.mean[...] = rng.normal(size=block.bn.mean.shape)
  given = peer_arrays.arrays(model, config_lib.load('configs/digits.py'))
  found = digits_torch.Digits(
    given,
    conv=lambda k, into, out: nn.Conv2d(into, out, 3, padding=1, bias=False),
    linear=nn.Linear,
    relu=lambda k: nn.ReLU(),
    entry=nn.Identity(),
  )
  logits = training_torch.logits(found, given['shifted'][0])
  np.testing.assert_allclose(logits, given['teacher'][0], atol=1e-4)
  macs = [18_432, 589_824, 294_912, 589_824, 10_240]
  assert digits_torch.macs(found, 8) == macs


def test_the_resnet_in_torch_is_the_one_of_jax(resnet_torch, peer_arrays):
  import training_torch

  model = models.create('resnet8', seed=0)
  rng = np.random.default_rng(0)
  for _, bn in peer_arrays.convolutions(model):
    bn.var[...] = rng.uniform(0.5, 2, bn.var.shape)
    bn.mean[...] = rng.normal(size=bn.mean.shape)
  given = peer_arrays.weights(model)
  images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
  found = resnet_torch.floats(given)
  np.testing.assert_allclose(
    training_torch.logits(found, images),
    evaluation.predict(model, [images]),
    atol=1e-3,
  )
