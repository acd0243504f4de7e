"""Runs that are stopped, killed or damaged, and go on to the same bits."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from djpq_jax import cli
from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import files
from djpq_jax import interruption
from djpq_jax import optim
from djpq_jax import report as report_lib
from djpq_jax import train
from djpq_jax import workdir as workdir_lib
from djpq_jax.experiment import layer_rules
from djpq_jax.train import checkpoints as checkpoints_lib

pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.usefixtures('registered'),
]

STEPS = 3 * (20 + 40 + 10)  # of the whole tiny experiment
SAVING = 'checkpoint_every=17'  # within phases, not at their ends


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  return tiny.experiment_config(folder, SAVING)


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  """The report of a run that nobody disturbed."""
  return run(config, tmp_path_factory.mktemp('whole'))


def outcome(workdir):
  """All of a report but the time it took, and all bits of the artifact."""
  report = json.loads((workdir / 'report.json').read_text())
  del report['seconds']
  del report['artifact_bytes']  # orbax writes dates and names of its own
  model = experiment.load_artifact(workdir / 'artifact')
  leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
  return report | {'bits': [np.asarray(leaf).tolist() for leaf in leaves]}


def run(config, workdir):
  report_lib.write(experiment.run(config, workdir), workdir)
  return outcome(workdir)


def bits(state):
  """All numbers of a training state."""
  return [
    np.asarray(
      jax.random.key_data(x)
      if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    )
    for x in jax.tree.leaves(state)
  ]


def test_the_best_of_a_run_that_was_stopped(config, tmp_path):
  """It is what the run would have had, seen before or after the stop."""
  config = config_lib.change(
    config, evaluate_every=4.0, validation=0.25, keep_best=True
  )
  expected = run(config, tmp_path / 'whole')
  looks = [row for row in expected['history'] if 'eval_accuracy' in row]
  assert {row['phase'] for row in looks} == {'float', 'search', 'finetune'}
  workdir = tmp_path / 'stopped'
  with pytest.raises(train.Interrupted):
    experiment.run(config, workdir, stop=after(STEPS // 2))
  assert run(config, workdir) == expected


def test_a_workdir_of_an_older_version_goes_on(config, tmp_path):
  work = workdir_lib.Workdir(tmp_path, config)
  work.claim()
  before = json.loads((tmp_path / 'config.json').read_text())
  del before['evaluate_every'], before['finetune']['rewind']
  (tmp_path / 'config.json').write_text(json.dumps(before))
  work.check()
  changed = config_lib.change(config, finetune={'rewind': True})
  with pytest.raises(ValueError, match=r'it differs in finetune\.rewind'):
    workdir_lib.Workdir(tmp_path, changed).check()


@pytest.mark.parametrize(
  ('field', 'was'),
  [
    ('search.bits', 8.0),
    ('narrow_range', True),
    ('asymmetric', False),
    ('mid_rise', False),
  ],
)
def test_a_workdir_from_before_there_was_a_field(field, was, config, tmp_path):
  """Where the default is another now, it has to be said."""
  workdir_lib.Workdir(tmp_path, config).claim()
  before = json.loads((tmp_path / 'config.json').read_text())
  *outer, name = field.split('.')
  del functools.reduce(dict.get, outer, before)[name]
  (tmp_path / 'config.json').write_text(json.dumps(before))
  how = re.escape(f'(--set {field}={was})')
  message = rf'it differs in {re.escape(field)}\); go on with .* {how}, choose'
  with pytest.raises(ValueError, match=message):
    workdir_lib.Workdir(tmp_path, config).check()
  # What differs otherwise would not go on so.
  other = config_lib.change(config, seed=config.seed + 1)
  with pytest.raises(ValueError, match=r'seed.*\); choose another workdir'):
    workdir_lib.Workdir(tmp_path, other).check()
  changes = {name: was}
  for key in reversed(outer):
    changes = {key: changes}
  said = config_lib.change(config, **changes)
  workdir_lib.Workdir(tmp_path, said).check()


def test_what_a_config_says_of_all_grids_is_a_rule(config):
  for field, value in (
    ('narrow_range', True),
    ('asymmetric', False),
    ('mid_rise', False),
  ):
    said = config_lib.change(config, **{field: value})
    assert getattr(layer_rules.rules_of(said)[0], field) is value
    assert all(getattr(r, field) is None for r in layer_rules.rules_of(config))


def test_saves_between_looks_say_nothing(tmp_path, capfd):
  for keep_best in (False, True):
    folder = tmp_path / str(keep_best)
    with train.Checkpoints(folder, keep_best=keep_best) as checkpoints:
      for step, accuracy in ((1, 0.5), (2, None)):
        state = dataclasses.replace(fresh(), step=jnp.int32(step))
        checkpoints.save(state, [], accuracy)
  assert 'metric' not in capfd.readouterr().err


def fresh(model=None):
  config = optim.OptimizerConfig()
  return train.init(
    model or tiny.compressed(tiny.Normed),
    train.Objective(noisy=True, strength=0.1),
    optim.make(config, 10),
    seed=3,
  )


def batch_at(step):
  return tiny.batch(16, seed=step)


def after(asked):
  """A question that is answered yes from the `asked`-th time on."""
  times = iter(range(1, 10**6))
  return lambda: next(times) >= asked


def test_a_state_comes_back_bit_for_bit(tmp_path):
  expected = train.fit(fresh(), batch_at, 9)
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    state, history = checkpoints.restore(fresh())
    assert int(state.step) == 0
    assert history == []
    train.fit(
      state,
      batch_at,
      5,
      save=lambda state, _: checkpoints.save(
        state, [{'step': int(state.step)}]
      ),
      save_every=2,
    )
  assert {p.name for p in (tmp_path / 'a').iterdir()} == {'4', '5'}
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    state, history = checkpoints.restore(fresh())
  assert history == [{'step': 5}]
  assert int(state.step) == 5
  found = train.fit(state, batch_at, 9)
  jax.tree.map(np.testing.assert_array_equal, bits(found), bits(expected))


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_keys_of_dropout_come_back_bit_for_bit(tmp_path, impl):
  """And the masks after that are those of a training that went on."""

  def dropped(seed=0):
    model = tiny.Dropped(nnx.Rngs(jax.random.key(seed, impl=impl)))
    return train.init(model, train.Objective(), optax.sgd(0.1))

  expected = train.fit(dropped(), batch_at, 4)
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    saved = train.fit(dropped(), batch_at, 2)
    checkpoints.save(saved, [])
    state, _ = checkpoints.restore(dropped(seed=1))
  jax.tree.map(np.testing.assert_array_equal, bits(state), bits(saved))
  kinds = lambda state: [x.dtype for x in jax.tree.leaves(state)]
  assert kinds(state) == kinds(saved)
  found = train.fit(state, batch_at, 4)
  jax.tree.map(np.testing.assert_array_equal, bits(found), bits(expected))


def test_the_best_state_stays_beside_the_last_ones(tmp_path):
  seen = {1: 0.5, 2: 0.75, 3: 0.75, 4: None, 5: 0.25, 6: 0.5, 7: None}
  with train.Checkpoints(tmp_path / 'a', keep_best=True) as checkpoints:
    for step, accuracy in seen.items():
      state = dataclasses.replace(fresh(), step=jnp.int32(step))
      checkpoints.save(state, [], accuracy)
    best, _ = checkpoints.restore(fresh(), best=True)
    last, _ = checkpoints.restore(fresh())
  assert [int(best.step), int(last.step)] == [3, 7]
  assert {p.name for p in (tmp_path / 'a').iterdir()} == {'3', '6', '7'}


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('it did not work', errno.EIO),
    (f'{300 * "x"} [OS error 28: No space left]', errno.ENOSPC),
    ('PERMISSION_DENIED: no', errno.EACCES),
  ],
)
def test_a_checkpoint_that_cannot_be_written(
  tmp_path, monkeypatch, text, number
):
  """Of whatever kind orbax makes it, it is an error of the disk."""

  def fail(*args, **kwargs):
    raise ValueError(f'{text}\nSource locations: ...')

  message = f'a checkpoint cannot be written .ValueError: {text[:9]}'
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'save', fail)
    with pytest.raises(OSError, match=message) as found:
      checkpoints.save(fresh(), [])
  assert found.value.errno == number
  assert found.value.filename == str(tmp_path / 'a')


def test_a_file_in_place_of_the_folder(tmp_path):
  (tmp_path / 'a').write_text('')
  with pytest.raises(train.CheckpointError, match='a is a file, not a folder'):
    train.Checkpoints(tmp_path / 'a')


def test_a_disk_that_fails_damages_no_checkpoint(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(errno.ESTALE, 'Stale file handle')

  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    checkpoints.save(fresh(), [])
    monkeypatch.setattr(checkpoints._manager, 'restore', fail)
    with pytest.raises(OSError, match='Stale file handle'):
      checkpoints.restore(fresh())


def test_a_checkpoint_that_is_half_written_is_not_picked(tmp_path):
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    checkpoints.save(fresh(), [])
  written = tmp_path / 'a' / '0'
  half = tmp_path / 'a' / '7.orbax-checkpoint-tmp'
  half.mkdir()
  (half / 'state').mkdir()
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    assert checkpoints.latest() == 0
    assert int(checkpoints.restore(fresh())[0].step) == 0
  assert written.exists()


@pytest.mark.parametrize('keep_best', [False, True])
def test_a_folder_that_orbax_did_not_finish_is_no_step(tmp_path, keep_best):
  folder = tmp_path / 'a'
  saved = lambda step: dataclasses.replace(fresh(), step=jnp.int32(step))
  open_folder = lambda: train.Checkpoints(folder, keep_best=keep_best)
  with open_folder() as checkpoints:
    for step in (4, 5):
      checkpoints.save(saved(step), [], 0.5)
  begun = json.loads((folder / '5' / '_CHECKPOINT_METADATA').read_text())
  del begun['commit_timestamp_nsecs']
  foreign = {
    '7': {},
    '9': {'state/of_others': 'x', 'commit_success.txt': ''},
    '11': {'_CHECKPOINT_METADATA': json.dumps(begun)},
    '9999': {'_CHECKPOINT_METADATA': '{"item_han'},
  }
  for name, contents in foreign.items():
    (folder / name).mkdir()
    for file, content in contents.items():
      (folder / name / file).parent.mkdir(exist_ok=True)
      (folder / name / file).write_text(content)
  with open_folder() as checkpoints:
    assert checkpoints.latest() == 5
    for best in (False, True):
      assert int(checkpoints.restore(fresh(), best=best)[0].step) == 5
    # They do not count among those to keep, and are nobody's to delete.
    checkpoints.save(saved(6), [], 0.25)
  assert {p.name for p in folder.iterdir()} == {'5', '6', *foreign}
  with open_folder() as checkpoints:  # the training gets to one's number
    checkpoints.save(saved(9), [{'step': 9}], 0.5)
  with open_folder() as checkpoints:
    state, history = checkpoints.restore(fresh())
  assert (int(state.step), history) == (9, [{'step': 9}])
  assert not (folder / '9' / 'state' / 'of_others').exists()


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    checkpoints.save(fresh(), [])
  for path in (tmp_path / 'a' / '0' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  expected = pytest.raises(train.CheckpointError, match='a/0 cannot be read')
  with train.Checkpoints(tmp_path / 'a') as checkpoints, expected:
    checkpoints.restore(fresh())


READING = """
import pathlib
import sys
sys.path.insert(0, {tests!r})
import resume_test
from djpq_jax import train
for folder in sorted(pathlib.Path.cwd().iterdir()):
  with train.Checkpoints(folder) as checkpoints:
    try:
      checkpoints.restore(resume_test.fresh())
    except train.CheckpointError as error:
      print(error)
"""


def test_a_truncated_file_takes_one_sentence(tmp_path):
  """Whichever it is, and wherever; not a word follows, at exit neither."""
  with train.Checkpoints(tmp_path / 'whole') as checkpoints:
    checkpoints.save(fresh(), [])
  state = pathlib.Path('0', 'state')
  cut = 0
  for path in sorted((tmp_path / 'whole' / state).rglob('*')):
    if path.is_file():
      for part in (2, 8):
        copy = tmp_path / 'cut' / str(cut)
        shutil.copytree(tmp_path / 'whole', copy)
        victim = copy / path.relative_to(tmp_path / 'whole')
        victim.write_bytes(path.read_bytes()[: path.stat().st_size // part])
        cut += 1
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      READING.format(tests=str(pathlib.Path(__file__).parent)),
    ],
    cwd=tmp_path / 'cut',
    capture_output=True,
    text=True,
    check=True,
  )
  assert not done.stderr
  said = done.stdout.splitlines()
  # Not all: without some files the state comes back, and its checksum fits.
  assert 4 < len(said) < cut
  assert all('cannot be read; if it is damaged, delete it' in s for s in said)


@pytest.mark.parametrize('field', ['params', 'opt_state', 'bad_steps', 'key'])
def test_a_changed_number_is_found(tmp_path, monkeypatch, field):
  """As if the disk had flipped a bit after the checksum was taken."""
  last_bit = lambda x: jax.lax.bitcast_convert_type(
    jax.lax.bitcast_convert_type(x, jnp.uint32) ^ jnp.uint32(1), x.dtype
  )
  whole = checkpoints_lib._with_checksum

  def changed(tree):
    tree = whole(tree)
    leaves, treedef = jax.tree.flatten(tree[field])
    at = (0,) * leaves[-1].ndim
    leaves[-1] = leaves[-1].at[at].set(last_bit(leaves[-1][at]))
    return tree | {field: jax.tree.unflatten(treedef, leaves)}

  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    checkpoints.save(fresh(), [])
    later = dataclasses.replace(fresh(), step=jnp.int32(3))
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints_lib, '_with_checksum', changed)
      checkpoints.save(later, [])
    with pytest.raises(
      train.CheckpointError, match=r'a/3 is damaged.*delete it to go on from 0'
    ):
      checkpoints.restore(fresh())


def test_a_damaged_checkpoint_takes_no_metrics_along(config, tmp_path):
  with pytest.raises(train.Interrupted):
    experiment.run(config, tmp_path, stop=after(70))
  seen = (tmp_path / 'metrics.jsonl').read_text()
  (last,) = (tmp_path / 'checkpoints').glob('1-*')
  for path in last.rglob('*'):
    if path.is_file() and 'state' in path.parts:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(train.CheckpointError, match='cannot be read'):
    experiment.run(config, tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_text() == seen


def test_a_checkpoint_of_another_model(tmp_path):
  with train.Checkpoints(tmp_path / 'a') as checkpoints:
    checkpoints.save(fresh(), [])
    with pytest.raises(train.CheckpointError, match='cannot be read'):
      checkpoints.restore(fresh(tiny.compressed(tiny.Mlp)))


def test_a_stopped_run_goes_on_to_the_same_bits(config, whole, tmp_path):
  """Stopped in each phase, and once more right after it went on.

  What looks like a checkpoint, but is a folder of somebody, is passed over.
  """
  for asked in (25, 1, 70, 100):
    with pytest.raises(train.Interrupted, match='and saved'):
      experiment.run(config, tmp_path, stop=after(asked))
    for phase in (tmp_path / 'checkpoints').iterdir():
      (phase / '9999').mkdir(exist_ok=True)
  assert run(config, tmp_path) == whole
  phases = sorted((tmp_path / 'checkpoints').iterdir())
  assert [(phase / '9999').exists() for phase in phases] == [True] * 3
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == [row['step'] for row in whole['history']]


def test_two_stages_go_on_too(config, tmp_path):
  config = config_lib.change(
    config,
    method='two_stage',
    two_stage_macs=0.6,
    float={'epochs': 2},
    search={'epochs': 4},
    finetune={'epochs': 2},
  )
  expected = run(config, tmp_path / 'whole')
  with pytest.raises(train.Interrupted):
    experiment.run(config, tmp_path / 'parts', stop=after(14))
  assert run(config, tmp_path / 'parts') == expected


def test_sigterm_saves_and_ends_with_its_status(
  config, tmp_path, capsys, monkeypatch
):
  steps = train.fit

  def fit(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return steps(*args, **kwargs)

  monkeypatch.setattr(train, 'fit', fit)
  path = tmp_path / 'tiny.py'
  path.write_text(tiny.CONFIG)
  before = signal.getsignal(signal.SIGTERM)
  args = ['train', '--config', str(path), '--workdir', str(tmp_path / 'run')]
  assert cli.main(args) == interruption.EXIT_STATUS == 143
  assert signal.getsignal(signal.SIGTERM) is before
  error = capsys.readouterr().err
  assert error == (
    'djpq: stopped after step 1 of 60 and saved; the same command goes on '
    'from there\n'
  )
  assert (tmp_path / 'run' / 'checkpoints' / '0-float' / '1').is_dir()
  assert not (tmp_path / 'run' / 'report.json').exists()


def test_a_second_interrupt_does_not_wait():
  with interruption.Signals() as signals:
    assert not signals.seen()
    signal.raise_signal(signal.SIGINT)
    assert signals.seen()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from djpq_jax import cli
with tiny.registered():
  sys.exit(cli.main(['train', *sys.argv[1:]]))
"""


def test_kill(config, whole, tmp_path):
  """A process that is killed outright, wherever it happens to be."""
  del config
  (tmp_path / 'tiny.py').write_text(tiny.CONFIG)
  program = PROGRAM.format(tests=str(pathlib.Path(__file__).parent))
  command = [sys.executable, '-c', program, '--config', 'tiny.py']
  command += ['--workdir', 'run', '--set', SAVING]
  metrics = tmp_path / 'run' / 'metrics.jsonl'
  with open(tmp_path / 'log', 'w', encoding='utf-8') as log:
    process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"search"' in metrics.read_text()):
      assert process.poll() is None, (tmp_path / 'log').read_text()
      assert time.monotonic() < deadline
      time.sleep(0.02)
    process.kill()
    process.wait()
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('going on with run')
  assert outcome(tmp_path / 'run') == whole


def test_claiming_a_workdir(config, tmp_path):
  work = workdir_lib.Workdir(tmp_path / 'run', config)
  work.check()
  assert not work.claimed
  work.claim()
  work.check()  # it goes on
  (work.path / 'mine').touch()
  work.claim()
  assert (work.path / 'mine').exists()
  work.claim(overwrite=True)
  assert not (work.path / 'mine').exists()
  assert work.report() is None
  other = workdir_lib.Workdir(work.path, config_lib.change(config, seed=5))
  with pytest.raises(ValueError, match='it differs in seed'):
    other.check()
  with pytest.raises(ValueError, match='it differs in seed'):
    other.claim()  # that came first after both had looked
  other.check(overwrite=True)
  (work.path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='is damaged, so nobody knows whose'):
    work.check()
  work.check(overwrite=True)
  work.claim(overwrite=True)
  work.check()


def test_a_config_that_a_disk_does_not_give_is_not_damaged(
  config, tmp_path, monkeypatch
):
  workdir_lib.Workdir(tmp_path, config).claim()

  def fails(*args, **kwargs):
    raise OSError(errno.ESTALE, 'Stale file handle')

  monkeypatch.setattr(pathlib.Path, 'read_text', fails)
  with pytest.raises(OSError, match='Stale file handle'):
    workdir_lib.Workdir(tmp_path, config).check()


def test_a_claim_that_was_cut_off(config, tmp_path):
  work = workdir_lib.Workdir(tmp_path, config)
  (tmp_path / 'config.json.7-0a.partial').write_text('{"seed"')
  work.check()
  work.claim()
  assert [f.name for f in tmp_path.iterdir()] == ['config.json']


def test_overwriting_that_is_cut_off_can_be_repeated(
  config, tmp_path, monkeypatch
):
  work = workdir_lib.Workdir(tmp_path / 'run', config)
  work.claim()
  (work.path / 'artifact').mkdir()
  (work.path / 'artifact' / 'kernel').touch()
  (work.path / 'notes').touch()

  def killed(path):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(files, 'remove', killed)
    with pytest.raises(KeyboardInterrupt):
      work.claim(overwrite=True)
  assert work.claimed  # so it may still be overwritten
  work.claim(overwrite=True)
  assert [f.name for f in work.path.iterdir()] == ['config.json']
