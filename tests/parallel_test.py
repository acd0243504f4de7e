"""One step over several devices and processes, against one device."""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from djpq_jax import cli
from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax import integer
from djpq_jax import parallel
from djpq_jax import train


def leaves(tree):
  found = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in found}


def start(kind=tiny.Normed, noisy=False, **how):
  """A state away from the bounds of the bits, where the last bit of a step
  decides which parameter a gradient goes to."""
  rules = [compress.Rule(pattern='*', act_bits=(2, 8))]
  model = compress.compress(
    tiny.make(kind), rules, tiny.batch(64)['image'], bits=6.0
  )
  objective = train.Objective(strength=0.05, noisy=noisy)
  return train.init(model, objective, optax.sgd(0.1), **how)


def close(found, expected, atol=1e-6):
  found, expected = leaves(found), leaves(expected)
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_allclose(
      found[name], leaf, atol=atol, rtol=atol, err_msg=name
    )


@pytest.fixture(scope='module')
def mesh():
  if jax.device_count() < 4:
    pytest.skip('needs four devices')
  return parallel.mesh(jax.devices()[:4])


def after_one_step(wrapped, state, batch, mesh):
  state = parallel.replicate(state, mesh)
  state, metrics = wrapped(state, parallel.spread(batch, mesh))
  return parallel.gather(state), metrics


@pytest.mark.parametrize('noisy', [False, True])
def test_jit_step_is_one_device_with_the_whole_batch(mesh, noisy):
  """Batch statistics of the whole batch, and the same noise."""
  batch = tiny.batch(32)
  expected, expected_metrics = train.jit_step(start(noisy=noisy), batch)
  wrapped = parallel.jit_step(train.train_step, mesh)
  found, metrics = after_one_step(wrapped, start(noisy=noisy), batch, mesh)
  close(found.params, expected.params)
  close(found.rest, expected.rest)
  close(metrics, expected_metrics, 1e-5)
  assert int(found.step) == 1
  for x in jax.tree.leaves(found.params):
    assert x.devices() == {jax.local_devices()[0]}


def test_devices_of_a_process_stand_together(monkeypatch):
  monkeypatch.setattr(jax.sharding, 'Mesh', lambda row, axes: row.tolist())
  device = lambda **of: types.SimpleNamespace(**of)
  row = [device(id=i, process_index=(i // 2) % 2) for i in range(8)]
  found = parallel.mesh(row)
  assert [d.id for d in found] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_pmap_step_is_the_literal_pmap(mesh):
  batch = tiny.batch(32)
  literal = jax.pmap(
    functools.partial(train.train_step, axis_name='data'), axis_name='data'
  )
  stacked = jax.tree.map(lambda x: jnp.stack([x] * 4), start(noisy=True))
  shards = jax.tree.map(lambda x: x.reshape(4, 8, *x.shape[1:]), batch)
  expected, expected_metrics = literal(stacked, shards)
  wrapped = parallel.pmap_step(train.train_step, mesh)
  found, metrics = after_one_step(wrapped, start(noisy=True), batch, mesh)
  first = lambda tree: jax.tree.map(lambda x: x[0], tree)
  close(found.params, first(expected.params))
  close(found.rest, first(expected.rest))
  close(metrics, first(expected_metrics), 1e-5)


def test_pmap_step_of_a_search_for_channels_alone(mesh):
  """No layer has bits, whose mean is among the metrics."""
  rules = [compress.Rule(pattern='*', quantize=False)]
  model = compress.compress(tiny.make(tiny.Mlp), rules, tiny.batch(64)['image'])
  objective = train.Objective(strength=0.05, noisy=True)
  state = train.init(model, objective, optax.sgd(0.1))
  wrapped = parallel.pmap_step(train.train_step, mesh)
  _, metrics = after_one_step(wrapped, state, tiny.batch(32), mesh)
  assert float(metrics['mean_weight_bits']) == 0
  assert np.isfinite(float(metrics['loss']))


@pytest.mark.parametrize('accumulate', [1, 2])
def test_pmap_step_draws_other_dropout_on_each_device(accumulate):
  """Two halves that are equal are not dropped out alike; the state is one."""
  if jax.device_count() < 2:
    pytest.skip('needs two devices')
  mesh = parallel.mesh(jax.devices()[:2])

  def start():
    model = tiny.Dropped(nnx.Rngs(0))
    how = {'accumulate': accumulate}
    return train.init(model, train.Objective(), optax.sgd(0.1), **how)

  half = tiny.batch(16)
  batch = jax.tree.map(lambda x: np.concatenate([x, x]), half)
  wrapped = parallel.pmap_step(train.train_step, mesh)
  many, metrics = wrapped(
    parallel.replicate(start(), mesh), parallel.spread(batch, mesh)
  )
  one, one_metrics = train.jit_step(start(), half)
  assert abs(float(metrics['loss']) - float(one_metrics['loss'])) > 1e-3
  stream, expected = (s.rest['dropout']['rngs'] for s in (many, one))
  assert int(stream['count']) == accumulate
  data = [jax.random.key_data(s['key']) for s in (stream, expected)]
  np.testing.assert_array_equal(*data)
  for x in jax.tree.leaves((many.params, stream['count'], data[0])):
    first, second = (np.asarray(s.data) for s in x.addressable_shards)
    np.testing.assert_array_equal(first, second)


def test_all_wrappers_agree_without_noise_and_statistics(mesh):
  batch = tiny.batch(32)
  one, _ = train.jit_step(start(tiny.Mlp), batch)
  for wrap in (parallel.jit_step, parallel.pmap_step):
    wrapped = wrap(train.train_step, mesh)
    found, _ = after_one_step(wrapped, start(tiny.Mlp), batch, mesh)
    close(found.params, one.params)


def test_parts_of_a_batch_add_up_on_devices_too(mesh):
  batch = tiny.batch(32)
  one, _ = train.jit_step(start(tiny.Mlp), batch)
  parts = lambda: start(tiny.Mlp, accumulate=4)
  close(train.jit_step(parts(), batch)[0].params, one.params)
  for wrap in (parallel.jit_step, parallel.pmap_step):
    wrapped = wrap(train.train_step, mesh)
    found, _ = after_one_step(wrapped, parts(), batch, mesh)
    close(found.params, one.params)


def test_parts_have_noise_and_statistics_of_their_own():
  batch = jax.tree.map(lambda x: np.concatenate([x, x]), tiny.batch(16))
  state, metrics = train.jit_step(start(noisy=True, accumulate=2), batch)
  one, one_metrics = train.jit_step(start(noisy=True), batch)
  assert float(metrics['task_loss']) != float(one_metrics['task_loss'])
  moved = [
    np.any(a != b)
    for a, b in zip(
      jax.tree.leaves(state.rest), jax.tree.leaves(one.rest), strict=True
    )
  ]
  assert any(moved)


def test_remat_gives_the_same_step():
  batch = tiny.batch(32)
  expected, _ = train.jit_step(start(noisy=True), batch)
  state = start(noisy=True, remat=True)
  assert 'remat' in str(jax.make_jaxpr(train.train_step)(state, batch))
  close(train.jit_step(state, batch)[0].params, expected.params)


def test_bfloat16_keeps_parameters_in_float32():
  batch = tiny.batch(32)
  expected, _ = train.jit_step(start(), batch)
  state = start(dtype='bfloat16')
  text = train.jit_step.lower(state, batch).as_text()
  assert 'bf16' in text
  found, metrics = train.jit_step(state, batch)
  for name, leaf in leaves((found.params, found.rest)).items():
    assert leaf.dtype == np.float32, name
  close(found.params, expected.params, 0.02)
  assert metrics['loss'].dtype == jnp.float32
  logits = train.model_of(found)(batch['image'])
  assert logits.dtype == jnp.float32  # what is measured computes in full


@pytest.mark.parametrize(
  ('how', 'message'),
  [
    ({'dtype': 'float16'}, "'bfloat16', got 'float16'"),
    ({'accumulate': 0}, 'ac'),
  ],
)
def test_how_to_compute_is_checked(how, message):
  with pytest.raises(ValueError, match=message):
    start(tiny.Mlp, **how)


def test_a_cluster_is_told_all_or_nothing():
  with pytest.raises(ValueError, match='all of coordinator, process count'):
    parallel.start('localhost:1')


def test_no_cluster_where_one_is_asked_for(monkeypatch):
  def initialize(*_):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(ValueError, match=r'no cluster is found here \(TPU'):
    parallel.start()


@pytest.mark.parametrize(
  'flag',
  ['--coordinator=localhost:1', '--process-count=2', '--process-index=0'],
)
def test_no_flag_of_a_cluster_is_passed_over(flag, tmp_path, capsys):
  args = ['train', '--config', 'digits', '--workdir', str(tmp_path / 'run')]
  assert cli.main([*args, flag]) == 2
  assert 'needs all of coordinator' in capsys.readouterr().err


def test_a_preemption_is_not_forgotten(monkeypatch):
  """JAX names one step; if it ends a phase, the next phase has to stop."""
  monkeypatch.setattr(
    parallel.multihost_utils,
    'reached_preemption_sync_point',
    lambda step: step == 3,
  )
  preemption = parallel.Preemption()
  assert [preemption.seen() for _ in range(5)] == [False, False, *[True] * 3]


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    ({'wrapper': 'pmapp'}, "must be 'jit' or 'pmap', got 'pmapp'"),
    ({'dtype': 'float16'}, "must be 'float32' or 'bfloat16'"),
    ({'devices': 99}, 'step.devices is 99, but there are'),
    ({'accumulate': 0}, 'cannot be cut into 1 .devices. x 0'),
    ({'accumulate': 5}, 'batch_size 32 cannot be cut into 1 .devices. x 5'),
  ],
)
def test_a_config_that_does_not_fit_the_devices(tmp_path, step, message):
  config = tiny.experiment_config(tmp_path)
  config = config_lib.change(config, step=step)
  with tiny.registered(), pytest.raises(ValueError, match=message):
    experiment.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('wrapper', ['jit', 'pmap'])
def test_an_experiment_on_four_devices(mesh, tmp_path, wrapper, monkeypatch):
  del mesh
  predict, devices = evaluation.predict, []

  def predict_on(model, images, mesh=None):
    devices.append(mesh.size)
    return predict(model, images, mesh)

  monkeypatch.setattr(evaluation, 'predict', predict_on)
  config = tiny.experiment_config(tmp_path)
  config = config_lib.change(
    config,
    step={'devices': 4, 'wrapper': wrapper},
    float={'epochs': 10},
    search={'epochs': 10},
    finetune={'epochs': 10},
    evaluate_every=5.0,
  )
  with tiny.registered():
    report = experiment.run(config, tmp_path / 'run')
  assert report['accuracy'] > 0.9
  assert report['relative_bops'] <= report['budget']
  # The last look is at what was hardened, but for its statistics.
  assert abs(report['history'][-1]['eval_accuracy'] - report['accuracy']) < 0.05
  assert devices == [4, 4, 4]  # of the float, saved and reloaded models
  monkeypatch.undo()
  assert report['accuracy'] == accuracy_on_one_device(tmp_path / 'run')


def accuracy_on_one_device(workdir):
  """Of the artifact of a run, as `djpq evaluate` measures it."""
  with tiny.registered():
    model = experiment.load_artifact(workdir / 'artifact')
  _, test = tiny.source()
  return evaluation.evaluate(integer.lower(model, 'simulated'), test)


PROGRAM = """
import os, sys
sys.path.insert(0, {tests!r})
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
import tiny
from djpq_jax import cli
from djpq_jax.experiment import setting
# The second calibrates as on a machine that rounds otherwise, and by far.
sample, factor = setting.Run.sample, 1 + 0.1 * int(sys.argv[-1])
setting.Run.sample = lambda run: factor * sample(run)
with tiny.registered():
  sys.exit(cli.main(['train', *sys.argv[1:]]))
"""


AGREE = """
import dataclasses, os, signal, sys, time
sys.path.insert(0, sys.argv[4])
import jax, jax.numpy as jnp, numpy as np
from djpq_jax import parallel
index = int(sys.argv[2])
parallel.start(f'localhost:{sys.argv[1]}', 2, index)
values = [np.float32([-0.0, 1 / 3, np.nan]), np.float32([0.0, 3.0, 4.0])]
tree = {
  'x': values[index],
  'keys': jax.random.key(index),
  'half': jnp.array([index + 0.5], jnp.bfloat16),
  'mask': np.array([[index == 0, True]]),
  'number': 7 + index,
}
found = parallel.agreed(tree)
np.testing.assert_array_equal(found['x'].view('u4'), values[0].view('u4'))
assert jax.random.key_data(found['keys']).tolist() == [0, 0]
assert found['half'].dtype == jnp.bfloat16 and found['half'][0] == 0.5
assert found['mask'].tolist() == [[True, True]] and found['number'] == 7
assert parallel.agreed([]) == []
whole = parallel.replicate(np.float32(index), parallel.mesh())
assert float(whole) == 0
try:
  parallel.agreed(np.zeros(2 + index))
except ValueError as error:
  print(error)

# One is told to stop right after a save, whose number is that of a step in its
# phase, where others were before it.
import optax, tiny
from djpq_jax import train
state = train.init(tiny.make(tiny.Mlp), train.Objective(), optax.sgd(0.1))
state = dataclasses.replace(state, step=jnp.int32(5))
preemption = parallel.Preemption()
assert not any(preemption.seen() for _ in range(30))
with train.Checkpoints(sys.argv[3]) as checkpoints:
  checkpoints.save(parallel.replicate(state, parallel.mesh()), [])
if index:
  os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)  # as long as it takes to compile the next phase, say
steps = 1
while not preemption.seen() and steps < 100:
  parallel.wait('step')
  steps += 1
print('stopped at', steps)
"""


def test_processes_agree_on_what_the_first_holds_and_when_to_stop(tmp_path):
  here = str(pathlib.Path(__file__).parent)
  arguments = [str(tmp_path / 'checkpoints'), here]
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', AGREE, str(port), str(index), *arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    )
    for index in range(2)
  ]
  found = []
  for process in processes:
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    assert 'the processes hold arrays of other shapes' in printed
    found.append(printed.splitlines()[-1])
  assert found[0] == found[1]
  assert found[0].startswith('stopped at')
  assert found[0] != 'stopped at 100'


class Cluster:
  """Two processes of two devices each, that run one experiment."""

  def __init__(self, folder, workdir):
    self.folder, self.workdir = folder, folder / workdir
    program = PROGRAM.format(tests=str(pathlib.Path(__file__).parent))
    (folder / 'tiny.py').write_text(tiny.CONFIG)
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    sets = 'step.devices=2 checkpoint_every=4 float.epochs=0 search.epochs=8 '
    sets += 'finetune.epochs=2 evaluate_every=2 validation=0.2 keep_best=True'
    command = [sys.executable, '-c', program, '--config', 'tiny.py']
    command += [f for s in sets.split() for f in ('--set', s)]
    command += ['--workdir', workdir, '--coordinator', f'localhost:{port}']
    environment = {
      'JAX_PLATFORMS': 'cpu',
      # What one run compiled the next ones need not.
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.processes = [
      subprocess.Popen(
        [*command, '--process-count', '2', '--process-index', str(i)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
      )
      for i in range(2)
    ]

  def wait_for(self, text):
    """Until the metrics say something."""
    deadline = time.monotonic() + 300
    metrics = self.workdir / 'metrics.jsonl'
    while not (metrics.exists() and text in metrics.read_text()):
      assert self.processes[0].poll() is None, self.ended()
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def ended(self):
    """The exit statuses and what was printed."""
    try:
      printed = [p.communicate(timeout=120)[0] for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()
        process.wait()
        process.stdout.close()
    return [p.returncode for p in self.processes], printed


def outcome(workdir):
  report = json.loads((workdir / 'report.json').read_text())
  del report['seconds'], report['artifact_bytes']
  with tiny.registered():
    model = experiment.load_artifact(workdir / 'artifact')
  return report, leaves(compress.eval_view(model))


def test_processes_that_are_killed_and_preempted(tmp_path):
  """Undisturbed, killed and preempted runs end with the same bits."""
  whole = Cluster(tmp_path, 'whole')
  statuses, printed = whole.ended()
  assert statuses == [0, 0], printed
  one_device = accuracy_on_one_device(tmp_path / 'whole')
  assert outcome(tmp_path / 'whole')[0]['accuracy'] == one_device
  assert 'report    whole/report.json' in printed[0]
  assert 'report' not in printed[1]  # one speaks for all

  cluster = Cluster(tmp_path, 'run')
  cluster.wait_for('"search"')
  cluster.processes[1].kill()  # one dies, and takes the other along
  cluster.processes[0].kill()
  assert cluster.ended()[0] == [-signal.SIGKILL] * 2

  # Comes again from the checkpoints, once all have found each other.
  (tmp_path / 'run' / 'metrics.jsonl').unlink()
  cluster = Cluster(tmp_path, 'run')
  cluster.wait_for('"search"')
  cluster.processes[1].terminate()  # one is told, both save and stop
  statuses, printed = cluster.ended()
  assert statuses == [143, 143], printed
  assert 'and saved; the same command goes on' in printed[0]

  statuses, printed = Cluster(tmp_path, 'run').ended()
  assert statuses == [0, 0], printed
  assert printed[0].startswith('going on with run')
  found, expected = outcome(tmp_path / 'run'), outcome(tmp_path / 'whole')
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
