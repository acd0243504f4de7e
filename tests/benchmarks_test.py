"""Comparisons: what they write, what they go on with, what they change."""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import allocate
from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import interruption
from djpq_jax import layers
from djpq_jax import optim
from djpq_jax import train

pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.usefixtures('registered'),
]
BENCHMARKS = pathlib.Path(__file__).parent.parent / 'benchmarks'


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  # Between runs they forget what was compiled, which the next test needs.
  monkeypatch.setattr(jax, 'clear_caches', lambda: None)


@pytest.fixture
def ablations():
  return importlib.import_module('ablations')


@pytest.fixture
def command(monkeypatch, tmp_path):
  """Runs a benchmark on the tiny experiment; returns what it wrote."""
  (tmp_path / 'tiny.py').write_text(tiny.CONFIG)
  epochs = ['float.epochs=4', 'search.epochs=10', 'finetune.epochs=2']
  sets = [part for field in epochs for part in ('--set', field)]
  out = tmp_path / 'out.json'

  def run(name, *args):
    argv = [name, '--config', str(tmp_path / 'tiny.py'), *sets, *args]
    monkeypatch.setattr(sys, 'argv', [*argv, '--out', str(out)])
    importlib.import_module(name).main()
    return json.loads(out.read_text())

  return run


def test_contestants_share_a_float_model_and_meet_the_budget(
  command, tmp_path, capsys
):
  floats = ['--float-dir', str(tmp_path / 'floats')]
  always = ['--seeds', '3', '--budgets', '0.05', *floats, '--only', 'W4A4']
  assert len(command('compare', *always)['runs']) == 1
  floats = tmp_path / 'floats' / 'seed-3'
  files = [f for f in floats.rglob('*') if f.is_file()]
  assert len(files) > 2
  before = {f: f.stat().st_mtime_ns for f in files}
  names = ['DJPQ @5.000%']
  runs = command('compare', *always, *names)['runs']
  assert [r['contestant'] for r in runs] == ['W4A4', *names]
  assert len({r['float_accuracy'] for r in runs}) == 1
  for run in runs:
    assert 0 <= run['accuracy'] <= 1
    assert run['cross_entropy'] > 0
    assert run['artifact_bytes'] > 0
  for run in runs[1:]:
    assert 0.9 * 0.05 < run['relative_bops'] <= 0.05
  # What is there is not run again.
  assert command('compare', *always, *names)['runs'] == runs
  told = capsys.readouterr().out
  assert told.count('float') == 2
  assert '| DJPQ @5.000% | 1 |' in told
  assert before == {f: f.stat().st_mtime_ns for f in files}
  with pytest.raises(SystemExit, match='choose another --float-dir'):
    command('compare', *always[:-1], 'W8A8', '--set', 'batch_size=16')


def test_an_interrupted_run_of_a_comparison_goes_on(
  command, tmp_path, monkeypatch, capsys
):
  always = ['--seeds', '3', '--budgets', '0.05', '--only', 'DJPQ @5.000%']
  always += ['--set', 'checkpoint_every=5']
  (whole,) = command('compare', *always)['runs']
  assert whole['seconds'] > 0
  (tmp_path / 'out.json').unlink()
  always += ['--workdirs', str(tmp_path / 'runs')]

  class Stopped(interruption.Signals):
    """A signal comes in the seventh step."""

    asked = 0

    def seen(self) -> bool:
      self.asked += 1
      return self.asked == 7

  with monkeypatch.context() as patched:
    patched.setattr(interruption, 'Signals', Stopped)
    with pytest.raises(SystemExit) as stop:
      command('compare', *always)
  assert stop.value.code == interruption.EXIT_STATUS
  assert not (tmp_path / 'out.json').exists()
  folder = tmp_path / 'runs' / 'DJPQ-5.000-seed-3'
  assert f'{folder}: stopped after step 7 of' in capsys.readouterr().out
  (run,) = command('compare', *always)['runs']
  assert 'seconds' not in run  # those of a part say nothing
  # Orbax writes into an artifact where it is, so its size differs.
  told = ('seconds', 'artifact_bytes')
  assert {k: v for k, v in run.items() if k not in told} == {
    k: v for k, v in whole.items() if k not in told
  }
  assert (folder / 'artifact' / 'manifest.json').exists()
  (tmp_path / 'out.json').unlink()
  with pytest.raises(SystemExit, match='or --workdirs'):
    command('compare', *always, '--set', 'finetune.epochs=3')


def test_a_contestant_that_there_is_not_is_an_error(command, capsys):
  with pytest.raises(SystemExit):
    command('compare', '--budgets', '0.004463', '--only', 'DJPQ @0.4463%')
  told = capsys.readouterr().err
  assert "there is no contestant 'DJPQ @0.4463%' at these budgets" in told
  assert 'near: DJPQ @0.446%' in told


@pytest.mark.parametrize('given', ['--budgets', '--two-stage-macs'])
def test_two_contestants_of_one_name_are_an_error(command, capsys, given):
  with pytest.raises(SystemExit):
    command('compare', given, '0.0500001', '0.0500002', '--only', 'W8A8')
  assert 'would have one name, 5' in capsys.readouterr().err


def test_runs_of_other_settings_are_not_taken_for_these(command):
  always = ['--seeds', '0', '--budgets', '0.05', '--only', 'W8A8']
  command('compare', *always)
  moved = ['--set', 'data.dir=elsewhere']
  assert len(command('compare', *always, *moved)['runs']) == 1
  with pytest.raises(SystemExit, match='W8A8, 0 with other settings'):
    command('compare', *always, '--set', 'finetune.epochs=3')


def test_processes_that_add_to_one_file_lose_nothing(tmp_path):
  path = tmp_path / 'runs.json'
  code = f"""
import pathlib, result_files
for k in range(20):
  result_files.add(pathlib.Path({str(path)!r}), [dict(k=k)])
"""
  command = [sys.executable, '-c', code]
  both = [subprocess.Popen(command, cwd=BENCHMARKS) for _ in range(2)]
  assert [process.wait() for process in both] == [0, 0]
  assert len(json.loads(path.read_text())['runs']) == 40


def test_a_patch_takes_no_overrides(command):
  variants = ['--variant', 'gates without noise: search.epochs=5']
  with pytest.raises(SystemExit, match='takes no overrides'):
    command('crossvalidate', *variants)


def test_every_contestant_is_drawn_or_hidden(monkeypatch):
  # Not by its name, which is also that of a module of these tests.
  path = BENCHMARKS / 'pictures.py'
  spec = importlib.util.spec_from_file_location('benchmark_pictures', path)
  pictures = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(pictures)
  run = {'float_accuracy': 0.9, 'relative_bops': 0.01}
  runs = [
    run | {'contestant': 'two-stage 80% MACs @1.000%', 'accuracy': 0.8},
    run | {'contestant': 'two-stage 50% MACs @1.000%', 'accuracy': 0.7},
    run | {'contestant': 'brevitas W2A2', 'accuracy': 0.6},
    {'contestant': 'W1A1', 'error': 'there are no such bits'},
  ]
  monkeypatch.setattr(pictures.result_files, 'read', lambda _: {'runs': runs})
  picture = pictures.Picture('a title', ['a file'], pictures.OURS)
  with pytest.raises(ValueError, match='nor hidden: brevitas W2A2'):
    pictures.curves(picture)
  found, floats = pictures.curves(picture._replace(hidden='brevitas .*'))
  assert [p['accuracy'] for p in found['two-stage']] == [0.8]
  assert not found['DJPQ']
  assert floats == pytest.approx(0.9)


def test_files_tell_all_commands_that_added_to_them(command, monkeypatch):
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
  flags = '--xla_force_host_platform_device_count=4 --xla_dump_to='
  monkeypatch.setenv('XLA_FLAGS', flags)
  always = ['--seeds', '0', '--budgets', '0.05', '--only']
  command('compare', *always, 'W8A8')
  monkeypatch.delenv('GLIBC_TUNABLES')
  monkeypatch.delenv('XLA_FLAGS')
  found = command('compare', *always, 'W8A8', 'DJPQ one schedule @5.000%')
  first, second = found['environment']['commands']
  assert first.startswith(
    f"GLIBC_TUNABLES=glibc.malloc.hugetlb=1 XLA_FLAGS='{flags}' python compare"
  )
  assert second.startswith('python compare --config ')
  assert "W8A8 'DJPQ one schedule @5.000%' --out " in second


def test_the_commit_of_a_run_is_that_of_its_code(tmp_path, monkeypatch):
  """Another run's figures, written meanwhile, change nothing."""
  monkeypatch.chdir(tmp_path)
  result_files = importlib.import_module('result_files')
  git = ['git', '-c', 'user.name=n', '-c', 'user.email=n@example.org']
  code = pathlib.Path('code.py')
  results = pathlib.Path('benchmarks/results')
  results.mkdir(parents=True)
  for path in (code, results / 'a.json'):
    path.touch()
  for args in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'all']):
    subprocess.run([*git, *args], check=True)
  clean = result_files.commit()
  assert len(clean) >= 7
  (results / 'a.json').write_text('{}')
  assert result_files.commit() == clean
  code.write_text('1')
  assert result_files.commit() == f'{clean}-dirty'
  monkeypatch.chdir(results)
  assert result_files.commit() == f'{clean}-dirty'


def test_variants_are_compared_on_the_same_folds(command):
  runs = command('crossvalidate', '--folds', '2', '--variant', 'DJPQ')['runs']
  assert [(r['fold'], r['images']) for r in runs] == [(0, 48), (1, 48)]
  assert {r['variant'] for r in runs} == {'DJPQ'}
  assert len({r['cross_entropy'] for r in runs}) == 2
  with pytest.raises(SystemExit, match="no ablation has the name 'nothing'"):
    command('crossvalidate', '--variant', 'nothing')


def test_differences_are_those_of_pairs():
  crossvalidate = importlib.import_module('crossvalidate')
  runs = [
    {
      'variant': variant,
      'seed': 0,
      'fold': fold,
      'errors': 1 + fold,
      'images': 50,
      'cross_entropy': 0.1 * fold + more,
    }
    for fold in range(3)
    for variant, more in (('first', 0.5), ('second', 0.6 + 0.01 * fold))
  ]
  rows = crossvalidate.table(runs).splitlines()
  assert rows[2] == '| first | 6 | 6 | 150 | 96.00% | 0.6000 |  |'
  assert rows[3] == (
    '| second | 6 | 6 | 150 | 96.00% | 0.7100 | +0.1100 ± 0.0058 |'
  )


@pytest.mark.parametrize('falls', [True, False])
def test_the_strength_grows_unless_the_cost_falls(ablations, falls):
  controller = budget_lib.Controller(budget=0.01, start=0.04, steps=100)

  def last_strength():
    control = controller.init()
    for step in range(20):  # above the target, which falls by 2 % a step
      relative = jnp.float32(0.04 * (0.985**step if falls else 1.0))
      _, control = controller.update(control, step, relative)
    return float(jnp.exp(control.log_strength))

  usual = last_strength()
  assert usual > 1.3 * controller.initial_strength
  with ablations.patched('no push while it falls'):
    found = last_strength()
  if falls:  # which the mean of the cost has to show first
    assert controller.initial_strength < found < usual / 1.2
  else:
    assert found == usual


@pytest.mark.parametrize('kept', ['step', 'clip'])
def test_bops_can_move_steps_or_clips_alone(ablations, kept):
  def slopes(log_step, log_clip):
    grid = layers.Quantizer(1.0, 4.0, signed=True, bounds=(2, 8))
    grid.log_step[...], grid.log_clip[...] = log_step, log_clip
    return grid.bits()

  here = jnp.log(0.13), jnp.log(1.1)
  plain = jax.grad(slopes, (0, 1))(*here)
  with ablations.patched(f'BOPs move {kept}s alone'):
    alone = jax.grad(slopes, (0, 1))(*here)
  for name, before, after in zip(('step', 'clip'), plain, alone):
    assert before != 0
    np.testing.assert_allclose(after, before if name == kept else 0, rtol=1e-6)


def test_bits_can_be_planned_by_what_they_cost(ablations):
  """The least sum within the budget, as trying all plans finds it."""
  sensitivity = importlib.import_module('sensitivity')
  net = tiny.compressed(tiny.Mlp)
  plan = allocate.plan(net, None)
  bounds = {(k, p): (2, 5) for k in sensitivity.KINDS for p in plan.act_bits}
  costs = sensitivity.divergences(net, plan, bounds, tiny.batch()['image'])
  assert costs.keys() == bounds.keys()
  for by_bits in costs.values():
    assert list(by_bits) == [2, 3, 4, 5]
    assert by_bits[2] > by_bits[5] >= 0
  budget = 0.012
  found = sensitivity.least(net.structure, plan, costs, budget)

  def loss(weight_bits, act_bits):
    bits = {'weight': weight_bits, 'act': act_bits}
    return sum(costs[k, p][bits[k][p]] for k, p in costs)

  best = np.inf
  for bits in itertools.product(range(2, 6), repeat=len(costs)):
    each = dict(zip(costs, bits))
    tried = dataclasses.replace(
      plan,
      weight_bits={p: b for (k, p), b in each.items() if k == 'weight'},
      act_bits={p: b for (k, p), b in each.items() if k == 'act'},
    )
    if allocate.relative_bops(net.structure, tried) <= budget:
      best = min(best, loss(tried.weight_bits, tried.act_bits))
  assert loss(found.weight_bits, found.act_bits) == pytest.approx(best)
  assert 0.9 * budget < allocate.relative_bops(net.structure, found) <= budget
  np.testing.assert_equal(found.open, plan.open)
  with pytest.raises(ValueError, match=r'no bits meet 0\.1000% of the BOPs'):
    sensitivity.least(net.structure, plan, costs, 0.001)


def test_what_one_bit_costs(ablations):
  sensitivity = importlib.import_module('sensitivity')
  net = tiny.compressed(
    tiny.Mlp, [compress.Rule(pattern='*', weight_bits=(1, 8))]
  )
  plan = allocate.plan(net, None)
  bounds = {('weight', p): (1, 3) for p in plan.weight_bits}
  bounds |= {('act', p): (8, 8) for p in plan.act_bits}
  images = tiny.batch()['image']
  costs = sensitivity.divergences(net, plan, bounds, images)
  for path in plan.weight_bits:
    one, two, three = costs['weight', path].values()
    assert one > max(two, three) > 0


def test_a_measured_plan_follows_the_measurement(
  ablations, command, monkeypatch
):
  """Where inputs alone are said to need bits, they get all they can have."""

  def divergences(model, plan, bounds, images):
    del model, plan, images
    return {
      (kind, path): {b: (kind == 'act') / b for b in range(low, high + 1)}
      for (kind, path), (low, high) in bounds.items()
    }

  net = tiny.compressed(tiny.Mlp)
  budgets = {'bops': 0.012}
  learned = allocate.plan(net, budgets)
  with ablations.patched('measured plan'), monkeypatch.context() as patch:
    patch.setattr(ablations.sensitivity, 'divergences', divergences)
    patch.setitem(ablations.SAMPLE, 'images', tiny.batch()['image'])
    measured = allocate.plan(net, budgets)
  np.testing.assert_equal(measured.open, learned.open)
  assert allocate.relative_bops(net.structure, measured) <= 0.012
  assert measured.act_bits['head'] > learned.act_bits['head']
  only = ['--seeds', '3', '--only', 'DJPQ measured plan @2.000%']
  (run,) = command('compare', '--budgets', '0.02', *only)['runs']
  assert run['relative_bops'] <= 0.02


def test_inputs_can_have_one_bit(ablations):
  with ablations.patched('inputs of one bit'):
    found = tiny.compressed(tiny.Mlp).structure.layers
  first, *others = [layer.act_bits for layer in found.values()]
  assert first == (8, 8)
  assert others == [(1, 8)] * len(others)


@pytest.mark.parametrize('bits', [1, 2])
def test_weights_beyond_one_bit_can_be_let_through(ablations, bits):
  settings = dict(signed=True, bounds=(1, 8), choices=(1, 2), mid_rise=True)
  grid = layers.Quantizer(
    0.5, bits, **settings, narrow_range=False, may_lack_zero=True
  )
  x = jnp.array([-2.0, 0.2, 0.4, 2.0])
  slope = jax.grad(lambda x: jnp.sum(grid(x)))
  np.testing.assert_array_equal(slope(x), [0, 1, 1, 0])
  with ablations.patched('DJPQ one bit let through'):
    np.testing.assert_array_equal(slope(x), [bits < 2, 1, 1, bits < 2])


def test_gates_can_be_without_noise(ablations):
  gates = [layers.Gate(5)]
  with ablations.patched('gates without noise'):
    (z,) = layers.sample(gates, jax.random.key(0), 7)
  np.testing.assert_array_equal(z, np.ones((1, 5)))
  (z,) = layers.sample(gates, jax.random.key(0), 7)
  assert z.shape == (7, 5)


def test_damping_draws_weights_to_their_cells(ablations):
  """The more, the later in the finetuning; nothing in the search."""
  model = tiny.compressed(tiny.Mlp)
  optimizer = optim.make(optim.OptimizerConfig(), 10)
  batch = tiny.batch()

  def loss(noisy, step):
    state = train.init(model, train.Objective(noisy=noisy), optimizer)
    state = dataclasses.replace(state, step=jnp.int32(step))
    total = ablations.step_lib.total_loss
    return float(total(state.params, state, batch, jax.random.key(0))[0])

  plain = loss(noisy=False, step=1), loss(noisy=True, step=1)
  with ablations.patched('damped weights'):
    assert loss(noisy=False, step=0) == plain[0]
    assert loss(noisy=False, step=2) > loss(noisy=False, step=1) > plain[0]
    assert loss(noisy=True, step=1) == plain[1]


def test_weights_can_be_averaged(ablations):
  rates = optim.OptimizerConfig(learning_rate=0.1, warmup=0.0)
  batch = tiny.batch()

  def trained(steps):
    optimizer = optim.make(rates, 60)  # averages look back on three steps
    state = train.init(tiny.make(tiny.Mlp), train.Objective(), optimizer)
    state = train.fit(state, lambda step: batch, steps)
    return state, train.model_of(state).head.kernel[...]

  kernels = [trained(steps)[1] for steps in (0, 1, 2)]
  average = kernels[0]
  for kernel in kernels[1:]:
    average = average + (kernel - average) / 3
  with ablations.patched('averaged weights'):
    state, found = trained(2)
  np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6)
  last = state.params['weights']['head']['kernel']
  np.testing.assert_array_equal(last, kernels[-1])
