"""Whole experiments, and what their reports claim."""

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest
import tiny

from djpq_jax import allocate
from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax import graph as graph_lib
from djpq_jax import losses
from djpq_jax import models
from djpq_jax import train
from djpq_jax.data import sources
from djpq_jax.experiment import layer_rules
from djpq_jax.experiment import phases
from djpq_jax.experiment import previewing
from djpq_jax.experiment import running
from djpq_jax.experiment import setting

# They run whole training loops.
pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.usefixtures('registered'),
]

BUDGET = 0.02


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return tiny.experiment_config(tmp_path_factory.mktemp('config'))


def untrained(config, **fields):
  """The config without a training step, so that nothing is compiled for one."""
  none = {'epochs': 0}
  return config_lib.change(
    config, **{'float': none, 'search': none, 'finetune': none} | fields
  )


def check_report(report, workdir):
  """What is true of every report."""
  json.dumps(report, allow_nan=False)
  rows = report['layers']
  assert report['macs'] == sum(row['macs'] for row in rows)
  assert report['bops'] == sum(row['bops'] for row in rows)
  assert report['relative_bops'] == report['bops'] / report['float_bops']
  assert report['relative_macs'] == report['macs'] / report['float_macs']
  assert report['float_bops'] == 32 * 32 * report['float_macs']
  for row in rows:
    assert row['bops'] == row['macs'] * row['weight_bits'] * row['act_bits']
  folder = workdir / report['artifact']
  assert report['artifact_bytes'] == checkpoint.size_bytes(folder)
  reloaded = experiment.load_artifact(folder)
  _, test = tiny.source()
  assert report['accuracy'] == evaluation.evaluate(reloaded, test)


def test_a_phase_compiles_its_step_once(config, tmp_path, caplog):
  """Also where its model comes from a checkpoint, and its grids do not."""
  one = {'epochs': 1}
  config = config_lib.change(config, float=one, search=one, finetune=one)
  with jax.log_compiles():
    experiment.run(config, tmp_path)
  ends = 'Finished XLA compilation of jit(train_step)'
  assert sum(ends in message for message in caplog.messages) == 3


@pytest.mark.parametrize('saved', [True, False])
def test_keep_best_ends_with_the_best_look(
  config, tmp_path, monkeypatch, saved
):
  """Of a float training: after 1 of 2 epochs, or after both of them."""
  config = untrained(
    config,
    method='float',
    float={'epochs': 2.0},
    evaluate_every=1.0,
    validation=0.2,
    keep_best=True,
  )
  looks: list[float] = []
  seen = []

  def accuracy_of(_):
    def accuracy(state):
      seen.append(nnx.to_pure_dict(nnx.state(train.model_of(state), nnx.Param)))
      return looks[len(seen) % 2 - 1]

    return accuracy

  monkeypatch.setattr(running, 'accuracy_of', accuracy_of)
  for looks, best in (([0.5, 0.4], 0), ([0.4, 0.5], 1)):
    seen.clear()
    if saved:
      report = experiment.run(config, tmp_path / f'{best}')
      found = experiment.load_artifact(tmp_path / f'{best}' / 'artifact')
      found = found.model
      assert report['history'][-1]['eval_accuracy'] == looks[-1]
      assert report['best_steps']['float'] == [2, 4][best]
    else:
      found, _ = experiment.float_model(config)
    found = nnx.to_pure_dict(nnx.state(found, nnx.Param))
    if saved:  # with the statistics in them, see harden
      del found['bn'], seen[best]['bn']
    assert found
    jax.tree.map(np.testing.assert_array_equal, found, seen[best])


@pytest.mark.parametrize(
  'budgets',
  [{'weights': 0.06}, {'bops': 0.02, 'macs': 0.5}],
  ids=' '.join,
)
def test_budgets_of_other_costs(config, tmp_path, budgets):
  fields = {setting.BUDGETS[name]: limit for name, limit in budgets.items()}
  fast = {'optimizer': {'gate_rate': 0.2}}  # in a short search
  config = config_lib.change(config, search=fast, **{'budget': 0.0} | fields)
  report = experiment.run(config, tmp_path, trained=tiny.make(tiny.Normed))
  check_report(report, tmp_path)
  assert report['budgets'] == budgets
  assert report['budget'] == budgets.get('bops')
  loads = [report[f'relative_{k}'] / limit for k, limit in budgets.items()]
  assert 0.9 <= max(loads) <= 1  # channels of this model are few
  # The search has led there, so that the plan had little left to do.
  last = [row for row in report['history'] if row['phase'] == 'search'][-1]
  found = [last[f'relative_{k}'] / limit for k, limit in budgets.items()]
  assert max(found) < 1.5


def test_a_budget_that_training_has_put_out_of_reach(config, tmp_path):
  """A kernel with zeros takes two bits, which a fresh one did not."""
  rules = ({'pattern': '*', 'weight_bits': (1, 8), 'prune': False},)
  config = config_lib.change(config, rules=rules)
  trained = tiny.make(tiny.Normed)
  run = setting.prepare(config)
  least = allocate.reachable(phases.compressed(run, trained))
  trained.head.kernel[...] = trained.head.kernel[...].at[:, 0].set(0.0)
  config = config_lib.change(config, budget=1.01 * least)
  with pytest.raises(ValueError, match=r'cannot be reached: .* are left'):
    experiment.run(config, tmp_path / 'run', trained=trained)


def test_the_best_of_many_processes_needs_checkpoints(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(experiment, '_prepared', lambda *_: (None, None, None))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  config = config_lib.change(config, keep_best=True)
  with pytest.raises(ValueError, match='keep_best needs checkpoints that all'):
    experiment.run(config, tmp_path, trained=tiny.make(tiny.Normed))


@pytest.mark.parametrize('method', ['djpq', 'two_stage'])
def test_rewound_weights_are_those_of_the_float_model(config, method):
  config = config_lib.change(
    config,
    method=method,
    budget=0.01,
    two_stage_macs=0.6,
    rules=({'pattern': '*', 'exponent': True},),
    finetune={'rewind': True},
  )
  run = setting.prepare(config)
  model = tiny.make(tiny.Normed)
  net = experiment.METHODS[method](run, model)
  plan = net.structure.plan
  assert sum(len(m) - m.sum() for m in plan.open.values()) > 0
  exponents = [h.operands.weight.grid()[2] for h in compress.hooks(net)]
  assert max(abs(float(t) - 1) for t in exponents) > 1e-3
  if method == 'djpq':  # else the first stage has trained what it pruned
    cut = graph_lib.slice_channels(model, net.structure.graph, plan.open)
    expected = compress.layer_modules(cut)
    for hook in compress.hooks(net):
      kernel = expected[hook.path].kernel[...]
      np.testing.assert_array_equal(hook.layer.kernel[...], kernel)
    for gate in net.gates:
      np.testing.assert_array_equal(gate.mean(), 1)


def test_two_stage(config, tmp_path):
  config = config_lib.change(
    config,
    method='two_stage',
    two_stage_macs=0.6,
    finetune={'epochs': 0},
  )
  model = tiny.make(tiny.Normed)
  before = jax.tree.map(np.array, nnx.as_pure(nnx.state(model)))
  report = experiment.run(config, tmp_path, trained=model)
  check_report(report, tmp_path)
  # The float model that was given is the baseline, and stays as it was.
  _, test = tiny.source()
  assert report['float_accuracy'] == evaluation.evaluate(model, test)
  after = nnx.as_pure(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert 0.95 * BUDGET <= report['relative_bops'] <= BUDGET
  assert report['macs'] <= 0.6 * report['float_macs']
  assert report['layers'][0]['kept_out'] < 6
  assert report['layers'][1]['kept_in'] == 16 * report['layers'][0]['kept_out']
  assert report['accuracy'] > 0.8
  # All rows count what is left of the dense model, those of the second stage,
  # too, which begins with what the first one left.
  rows = [row for row in report['history'] if row['phase'] == 'search']
  assert max(row['kept_fraction'] for row in rows[len(rows) // 2 + 1 :]) < 0.9
  np.testing.assert_allclose(rows[-1]['relative_bops'], BUDGET, rtol=0.2)
  # Of the model the artifact needs the name and shapes, but no number.
  with pytest.MonkeyPatch.context() as patch:
    other = lambda rngs: tiny.make(tiny.Normed, seed=77)
    patch.setitem(models.MODELS, 'tiny', other)
    check_report(report, tmp_path)


def test_a_first_stage_may_leave_less_than_the_budget(config):
  config = config_lib.change(
    config,
    method='two_stage',
    two_stage_macs=0.6,
    budget=0.7,
    search={'epochs': 1},
  )
  net = experiment.METHODS['two_stage'](
    setting.prepare(config), tiny.make(tiny.Normed)
  )
  assert set(net.structure.plan.weight_bits.values()) == {8}


def test_two_stage_says_when_too_much_was_left_for_the_second(config):
  config = config_lib.change(
    config,
    method='two_stage',
    two_stage_macs=0.9,
    budget=0.001,
    search={'epochs': 1},
  )
  run = setting.prepare(config)
  told = r'of 0\.1 % .* left 8\d\.\d+ % of the MACs.* lower two_stage_macs'
  with pytest.raises(ValueError, match=told):
    experiment.METHODS['two_stage'](run, tiny.make(tiny.Normed))


@pytest.mark.parametrize(
  ('budgets', 'expected'),
  [
    ({'budget': 0.02}, 0.02 * phases.HEADROOM),
    ({'budget': 0.005}, (3 / 32) ** 2),  # what three bits cost
    ({'budget': 0.2}, (8 / 32) ** 2),  # no more than the default has
    ({'budget': 0.0, 'budget_macs': 0.5}, (8 / 32) ** 2),
    ({'budget': 0.02, 'budget_macs': 0.5}, 0.02 * phases.HEADROOM),
    ({'budget': 0.0, 'budget_weights': 0.05}, 8 / 32 * 3 / 32),
  ],
)
def test_a_search_begins_near_its_budget(config, budgets, expected):
  config = untrained(config, search={'epochs': 0, 'bits': 3.0}, **budgets)
  run = setting.prepare(config, None)
  model = setting.dense_model(run)
  wide = compress.Rule(pattern='*', weight_bits=(2, 8), act_bits=(2, 8))
  net = phases.compressed(run, model, [wide])
  net = phases.search(run, net, model, budgets=run.budgets, epochs=0.0)
  found = float(losses.relative_bops(net))
  np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
  ('fields', 'whole'),
  [
    ({}, tuple(range(1, compress.WHOLE_TO + 1))),
    ({'search': {'whole_bits_to': 0}}, ()),
    ({'search': {'whole_bits_to': 1}}, (1,)),
    ({'search': {'whole_bits_to': 16}}, tuple(range(1, 9))),
    ({'bit_choices': (2, 4, 8)}, (2, 4, 8)),
    ({'method': 'uniform'}, tuple(range(1, 9))),
  ],
)
def test_which_bits_are_whole_while_they_are_searched(config, fields, whole):
  config = untrained(config, **fields)
  run = setting.prepare(config)
  net = phases.compressed(run, setting.dense_model(run))
  grids = [hook.operands.weight for hook in compress.hooks(net)]
  least = 1 if 1 in whole else 2
  assert {g.bounds for g in grids} == {(least, 8)}
  assert {g.choices for g in grids} == {whole}
  above = bool(whole) and 'bit_choices' not in fields
  assert {g.real_above for g in grids} == {above}
  structure = layer_rules.dense_structure(config)
  assert structure.layers == net.structure.layers


def test_uniform(config, tmp_path):
  """Learns from a teacher too, which is not tied to a search."""
  config = config_lib.change(
    config,
    method='uniform',
    uniform_bits=(3, 4),
    float={'epochs': 0},
    finetune={'distill': 0.5, 'temperature': 2.0},
  )
  seen, ready = [], []

  def progress(phase, step, steps, metrics):
    assert np.isfinite(metrics['loss'])
    seen.append((phase, step, steps))

  report = experiment.run(
    config, tmp_path, progress, ready=lambda: ready.append(len(seen))
  )
  check_report(report, tmp_path)
  assert ready == [0]  # once, before the first step
  assert report['macs'] == report['float_macs']
  bits = [(row['weight_bits'], row['act_bits']) for row in report['layers']]
  assert bits == [(3, 8), (3, 4)]  # images keep their 8 bits
  assert report['accuracy'] > 0.8
  # The search's epochs go to the finetuning, so that methods compare.
  assert seen[-1] == ('finetune', 3 * (40 + 10), 3 * (40 + 10))
  assert len(seen) == len(report['history'])


def test_float(config, tmp_path):
  """The float control: as many epochs, nothing cut and nothing rounded."""
  config = config_lib.change(config, method='float', float={'epochs': 0})
  report = experiment.run(config, tmp_path)
  check_report(report, tmp_path)
  assert report['relative_bops'] == 1
  assert report['budget'] is None
  steps = [row['step'] for row in report['history']]
  assert steps[-1] == 3 * (40 + 10)
  assert report['accuracy'] > 0.8


def test_without_training_and_budget(config, tmp_path):
  config = untrained(config, budget=0.0)
  report = experiment.run(config, tmp_path)
  check_report(report, tmp_path)
  assert report['history'] == []
  assert report['budget'] is None
  assert report['macs'] == report['float_macs']
  assert {row['weight_bits'] for row in report['layers']} == {8}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'method': 'djqp'}, "unknown method 'djqp'; there are djpq, two_stage,"),
    ({'budget': 1e-6}, 'cannot be reached: .* are left; raise the budget'),
    ({'budget': 1.0}, 'budget is a fraction of the float32 BOPs'),
    ({'budget_macs': 1.0}, 'budget_macs is a fraction of the float32 MACs'),
    ({'budget_weights': 1e-4}, 'the float32 weight bits cannot be reached'),
    (
      {'method': 'two_stage', 'budget_macs': 0.5},
      'two_stage has a budget of BOPs, not budget_macs',
    ),
    ({'budget': -0.1}, 'budget takes a number from 0 on'),
    ({'budget': float('nan')}, 'budget takes a number from 0 on'),
    ({'method': 'two_stage', 'budget': 0}, 'two_stage needs a budget'),
    ({'method': 'two_stage', 'two_stage_macs': 1}, 'needs a budget, and two'),
    (
      {'method': 'two_stage', 'two_stage_macs': 0.001},
      'two_stage_macs=0.001 cannot be reached: with the fewest channels .*, '
      '0.1667 of the MACs are left; raise it',
    ),
    (
      {'method': 'uniform', 'uniform_bits': (4,)},
      r'uniform_bits takes two whole numbers, .*; got \(4,\)',
    ),
    (
      {'method': 'uniform', 'uniform_bits': (0, 0)},
      'uniform bits of 0 for weights are what no layer can have',
    ),
    (
      {'method': 'uniform', 'uniform_bits': (4, 0)},
      'of 0 for activations .* the rules allow 2 to 8, 8 to 8; take',
    ),
    ({'keep_best': True}, 'keep_best needs evaluate_every, and a part of the'),
    ({'evaluate_every': 1e-4}, '0.0001 epochs, less than a step'),
    ({'validation': 1e-4, 'evaluate_every': 1.0}, 'images would hold out 0'),
    ({'validation': 0.1}, 'validation holds images out .*: set evaluate_every'),
    ({'validation': 1.5}, 'validation takes a number from 0 to 1'),
    ({'bit_choices': (3,)}, 'none of the allowed bits .3,. is within'),
    ({'bit_choices': (3,), 'budget': 0}, 'none of the allowed bits'),
    ({'rules': [{'pattern': 'conv9'}]}, 'match no layer: conv9; the layers'),
    ({'rules': [{'patern': '*'}]}, "has no field 'patern'"),
    (
      {'rules': [{'pattern': '*', 'act_bits': (0, 9)}]},
      r"act_bits of the rule for '\*' must be",
    ),
    ({'finetune': {'optimizer': {'name': 'adem'}}}, "must be 'adam' or 'sgd'"),
    (
      {'search': {'optimizer': {'learning_rate': 0.0}}},
      'learning_rate must be positive',
    ),
    ({'data': {'name': 'tini'}}, "no data source 'tini'; did you mean 'tiny'"),
    ({'data': {'name': 'digits'}}, r'\(4, 4, 1\), but digits has \(8, 8, 1\)'),
    ({'model': {'name': 'tinny'}}, "no model 'tinny'; did you mean 'tiny'"),
    ({'model': {'kwargs': {'a': 1}}}, "tiny takes no argument 'a'"),
    (
      {'model': {'name': 'digits_cnn', 'kwargs': {'input_shape': 8}}},
      "digits_cnn refuses {'input_shape': 8}: ",
    ),
    (
      {'model': {'name': 'digits_cnn', 'kwargs': {'num_classes': 0}}},
      'num_classes of digits_cnn must be a whole number, at least 1; got 0',
    ),
    ({'rules': [{'pattern': '*', 'prune': 'False'}]}, 'must be True or False'),
    ({'batch_size': 97}, r'batch_size must be in 1\.\.96'),
    ({'batch_size': 0}, r'batch_size must be in 1\.\.96'),
    ({'augment': {'shift': -1}}, 'augment.shift takes a number from 0 on'),
    (
      {'finetune': {'temperature': 0.0}},
      'finetune.temperature must be above 0',
    ),
    ({'seed': -1}, 'seed takes a number from 0 on'),
  ],
  ids=lambda value: str(value)[:40] if isinstance(value, dict) else '',
)
def test_what_cannot_work_is_said_first(config, tmp_path, fields, message):
  """Before any training, and before the workdir is touched."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, 'jit_step', None)
    with pytest.raises(ValueError, match=message) as info:
      experiment.run(
        config_lib.change(config, **fields),
        tmp_path / 'run',
        ready=lambda: (tmp_path / 'run').mkdir(),
      )
  assert '\n' not in str(info.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('classes', [2, 3, 4])
def test_a_model_has_a_logit_for_each_class(config, classes, monkeypatch):
  """Before the float training, too; more are allowed."""

  def source(*, data_dir=None):
    return tuple(
      dataclasses.replace(
        split,
        labels=np.minimum(split.labels, classes - 1),
        num_classes=classes,
      )
      for split in tiny.source(data_dir=data_dir)
    )

  monkeypatch.setitem(sources.SOURCES, 'tiny', source)
  monkeypatch.setattr(phases, 'train_float', lambda _, model: model)
  if classes <= tiny.CLASSES:
    experiment.check(config)
    return
  message = (
    'tiny has logits of 3 classes, but tiny has 4; set model.kwargs.num_'
  )
  for checked in (experiment.check, experiment.preview, experiment.float_model):
    with pytest.raises(ValueError, match=message):
      checked(config)


def shapes(state):
  """Names, shapes and dtypes of all that a step takes but the batch."""
  found = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path): (x.shape, str(x.dtype)) for path, x in found
  }


@pytest.mark.parametrize(
  ('variant', 'phase'),
  [
    ('djpq', 'search'),
    ('djpq_restrict', 'search'),
    ('two_stage', 'search'),
    ('w4a4', 'finetune'),
    ('float', 'finetune'),
  ],
)
def test_a_preview_compiles_a_step_that_is_run(
  config, monkeypatch, variant, phase
):
  fields = config_lib.VARIANTS[variant]
  config = config_lib.change(config, two_stage_macs=0.6, **fields)
  config = config_lib.change(
    config, bit_choices=config.bit_choices and (2, 3, 4, 6, 8)
  )
  begun = {}

  def fit(state, *_, **__):
    begun.setdefault(names.pop(0), shapes(state))
    return state

  run = setting.prepare(config)
  model = tiny.make(tiny.Normed)
  found, states = previewing.largest_steps(run, model)
  assert found == phase
  monkeypatch.setattr(train, 'fit', fit)
  names = ['search', 'second search'] if phase == 'search' else []
  names = names[: 2 if variant == 'two_stage' else 1] + ['finetune']
  net = experiment.METHODS[config.method](run, model)
  phases.finetune(run, net, model)
  assert not names
  assert shapes(states[0]) == begun[phase]
  if variant == 'two_stage':  # its size is known when the first has pruned
    assert shapes(states[1]).keys() == begun['second search'].keys()
  else:
    assert len(states) == 1


def test_a_preview_of_what_has_no_search_or_no_step(config):
  run = setting.prepare(untrained(config, float={'epochs': 1.0}))
  model = tiny.make(tiny.Normed)
  phase, (state,) = previewing.largest_steps(run, model)
  assert phase == 'float'
  assert shapes(state) == shapes(phases.float_state(run, model, steps=5))
  run = setting.prepare(untrained(config, finetune={'epochs': 1.0}))
  phase, (state,) = previewing.largest_steps(run, model)
  assert phase == 'finetune'
  assert experiment.preview(untrained(config))['step_bytes'] == 0
