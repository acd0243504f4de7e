"""Google Cloud Storage: whole runs, files and artifacts in a bucket.

The bucket is one of a server on this host, `tests/object_store`, or a real one:

    DJPQ_TESTS_BUCKET=gs://bucket/folder pytest tests/object_store_test.py
"""

import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import pytest
import tensorstore
import tiny

from djpq_jax import checkpoint
from djpq_jax import cli
from djpq_jax import compress
from djpq_jax import experiment
from djpq_jax import files
from djpq_jax import harden
from djpq_jax import interruption
from djpq_jax import optim
from djpq_jax import train
from djpq_jax import workdir

SERVER = pathlib.Path(__file__).with_name('object_store')
GIVEN = os.environ.get('DJPQ_TESTS_BUCKET', '')
BUCKET = GIVEN or 'gs://bucket'

pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.usefixtures('registered'),
]


@pytest.fixture(scope='module', autouse=True)
def server():
  """Starts the server, and tells its address, if no bucket is given."""
  if GIVEN:
    pytest.importorskip('gcsfs')
    yield
    return
  for name in ('gcsfs', 'gcp_storage_emulator'):
    pytest.importorskip(name)
  # They ask for the kind of the bucket, in vain: nobody is logged in.
  for name in ('gcsfs', 'google.auth'):
    logging.getLogger(name).setLevel(logging.ERROR)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  address = f'http://localhost:{port}'
  with (
    subprocess.Popen(
      [sys.executable, SERVER, str(port)],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ) as server,
    pytest.MonkeyPatch.context() as patch,
    tempfile.TemporaryDirectory() as nowhere,
  ):
    # Files go by gcsfs, arrays of checkpoints by TensorStore.
    patch.setenv('STORAGE_EMULATOR_HOST', address)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', address)
    # Who is logged in is not asked for, nor is a machine of Google's.
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
    patch.setenv('CLOUDSDK_CONFIG', nowhere)
    patch.delenv('GOOGLE_APPLICATION_CREDENTIALS', raising=False)
    patch.setenv('NO_GCE_CHECK', 'true')
    _wait_for(address)
    yield
    server.kill()


def _wait_for(address):
  deadline = time.monotonic() + 60
  while True:
    try:
      with urllib.request.urlopen(address):
        return
    except urllib.error.HTTPError:
      return  # it answers
    except OSError:
      assert time.monotonic() < deadline, 'the server does not answer'
      time.sleep(0.1)


def result(folder) -> dict:
  """What a report says, but for times and sizes on disk."""
  report = json.loads((files.path(folder) / 'report.json').read_text())
  return {
    k: v for k, v in report.items() if k not in ('seconds', 'artifact_bytes')
  }


def numbers(folder):
  """All that the artifact of a run computes with."""
  model = experiment.load_artifact(f'{folder}/artifact')
  return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(tmp_path, monkeypatch, capsys):
  """The same as on a disk; and what it leaves is read from there."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny.py').write_text(tiny.CONFIG)
  train = ['train', '--config', 'tiny.py', '--set', 'checkpoint_every=30']
  run = f'{BUCKET}/run'
  there = [*train, '--workdir', run]
  steps = iter(range(1000))
  with monkeypatch.context() as stopped:
    stopped.setattr(interruption.Signals, 'seen', lambda _: next(steps) == 100)
    assert cli.main([*there, '--overwrite']) == interruption.EXIT_STATUS
  assert 'and saved' in capsys.readouterr().err
  assert not files.path(f'{run}/report.json').exists()
  assert cli.main(there) == 0
  assert capsys.readouterr().out.startswith(f'going on with {run}')
  assert cli.main([*train, '--workdir', 'here']) == 0
  expected = result('here')
  assert result(run) == expected
  chex.assert_trees_all_equal(*map(numbers, (run, 'here')))
  metrics = files.path(f'{run}/metrics.jsonl').read_text()
  found = [json.loads(line)['step'] for line in metrics.splitlines()]
  assert found == [row['step'] for row in expected['history']]

  assert cli.main([*there, '--set', 'seed=5']) != 0
  assert 'it differs in seed' in capsys.readouterr().err
  evaluate = ['evaluate', '--json', '--artifact', f'{run}/artifact']
  assert cli.main(evaluate) == 0
  measured = json.loads(capsys.readouterr().out)
  assert measured['accuracy'] == expected['accuracy']
  assert cli.main(['report', run]) == 0
  assert '<html' in files.path(f'{run}/report.html').read_text()


@pytest.mark.slow
def test_a_sweep_is_reported_and_compared(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny.py').write_text(tiny.CONFIG)
  home = f'{BUCKET}/sweep'
  sweep = ['sweep', '--config', 'tiny.py', '--budgets', '0.05,0.02']
  for field in ('float.epochs=4', 'search.epochs=10', 'finetune.epochs=2'):
    sweep += ['--set', field]
  assert cli.main([*sweep, '--workdir', home, '--overwrite']) == 0
  content = json.loads(files.path(f'{home}/sweep.json').read_text())
  folders = [f'{home}/{point["folder"]}' for point in content['points']]
  assert files.path(f'{home}/pareto.png').read_bytes().startswith(b'\x89PNG')
  assert [result(folder)['budget'] for folder in folders] == [0.05, 0.02]

  assert cli.main(['report', home, '--out', f'{home}/both.html']) == 0
  assert '<html' in files.path(f'{home}/both.html').read_text()
  capsys.readouterr()
  artifacts = [f'{folder}/artifact' for folder in folders]
  assert cli.main(['diff', '--json', *artifacts]) == 0
  found = json.loads(capsys.readouterr().out)
  for key in ('bops', 'accuracy'):
    assert found[key] == [result(folder)[key] for folder in folders]
  assert found['bytes'] == [
    point['artifact_bytes'] for point in content['points']
  ]


def test_an_altered_artifact(capsys):
  """One sentence says what is wrong with it."""
  folder = files.path(f'{BUCKET}/artifact')
  model = harden.harden(
    compress.freeze(
      net := tiny.compressed(tiny.Normed),
      tiny.some_plan(net),
      tiny.batch(64)['image'],
    )
  )
  shape = jax.ShapeDtypeStruct((2, *tiny.SHAPE), jnp.float32)
  checkpoint.save(
    folder,
    model,
    harden.count(model, shape),
    model_spec={'name': 'tiny', 'kwargs': {}},
    input_shape=tiny.SHAPE,
  )
  evaluate = ['evaluate', '--data', 'tiny', '--artifact', str(folder)]
  assert cli.main(evaluate) == 0
  capsys.readouterr()
  program = folder / 'program.xz'
  program.write_bytes(program.read_bytes()[:-1] + b'?')
  assert cli.main(evaluate) == 2
  assert capsys.readouterr().err == (
    f'djpq: {folder} was altered or is incomplete: its files do not have the '
    'hash that the manifest states\n'
  )
  (folder / 'manifest.json').unlink()
  assert cli.main(evaluate) == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert sentence.startswith(f'djpq: {folder} is')


def test_a_folder_that_is_no_checkpoint():
  """With the file that ends one in a bucket, but not what it ends."""
  folder = files.path(f'{BUCKET}/checkpoints')
  if folder.exists():
    files.remove(folder)
  state = train.init(
    tiny.make(tiny.Mlp),
    train.Objective(),
    optim.make(optim.OptimizerConfig(), 10),
  )
  with train.Checkpoints(folder) as checkpoints:
    checkpoints.save(state, [])
  files.replace(folder / '9999' / 'commit_success.txt', '')
  with train.Checkpoints(folder) as checkpoints:
    assert checkpoints.latest() == 0
    assert int(checkpoints.restore(state)[0].step) == 0


def test_of_two_writers_one_learns_that_it_was_late():
  """What TensorStore needs of a store, and the emulator alone has not."""
  bucket, _, prefix = f'{BUCKET}/writers/'.removeprefix('gs://').partition('/')
  spec = {'driver': 'gcs', 'bucket': bucket, 'path': prefix}
  store = tensorstore.KvStore.open(spec).result()
  write = lambda value, after: (
    store.write('a', value, if_equal=after).result().generation
  )
  store.write('a', None).result()
  absent = store.read('a').result().stamp.generation
  first = write(b'first', absent)
  read = store.read('a').result()
  assert (read.value, read.stamp.generation) == (b'first', first)
  late = [write(b'late', absent), write(None, absent)]
  second = write(b'second', first)
  late += [write(b'late', first), write(None, first)]
  assert len({absent, first, second, *late}) == 4  # those of `late` are equal
  assert store['a'] == b'second'


def test_a_workdir_is_discarded(tmp_path):
  folder = files.path(f'{BUCKET}/discarded')
  old, new = (
    workdir.Workdir(folder, tiny.experiment_config(tmp_path, f'seed={seed}'))
    for seed in (1, 2)
  )
  old.claim(overwrite=True)
  files.replace(folder / 'checkpoints/0-float/30/state', b'old')
  old.check()
  with pytest.raises(ValueError, match='it differs in seed'):
    new.check()
  new.check(overwrite=True)
  new.claim(overwrite=True)
  new.check()
  assert [f.name for f in folder.iterdir()] == ['config.json']


def test_a_folder_is_replaced_and_removed():
  folder = files.path(f'{BUCKET}/folder')
  for content in ('old', 'new'):
    with files.to_write(folder, 'last') as here:
      (here / 'deep').mkdir()
      (here / 'deep' / content).write_text(content)
      (here / 'last').touch()
  with files.to_read(folder) as here:
    found = [f.relative_to(here) for f in here.rglob('*') if f.is_file()]
    assert sorted(map(str, found)) == ['deep/new', 'last']
  files.remove(folder)
  assert not folder.exists()


def test_what_is_no_path():
  for name in ('s3://bucket/run', 'gs://', 'gs:///'):
    with pytest.raises(ValueError, match='nor of the form gs://bucket/'):
      files.path(name)
  assert os.fspath(files.path('a/b')) == 'a/b'
