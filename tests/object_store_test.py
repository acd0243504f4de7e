"""Google Cloud Storage: files on a server of it on this host, runs in a bucket.

The server has no preconditions, without which TensorStore cannot rewrite what
it has just written.  So whole runs need a real bucket, or luck:

    DJPQ_TESTS_BUCKET=gs://bucket/folder pytest tests/object_store_test.py
"""

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import tiny

from djpq_jax import cli
from djpq_jax import files
from djpq_jax import interruption

SERVER = """
import sys, threading
from gcp_storage_emulator import server
server.create_server(
  'localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket'
).start()
threading.Event().wait()
"""

BUCKET = os.environ.get('DJPQ_TESTS_BUCKET', '')

pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.usefixtures('registered'),
]


@pytest.fixture(scope='module', autouse=True)
def server():
  """Starts the server, and tells its address, if no bucket is given."""
  if BUCKET:
    pytest.importorskip('gcsfs')
    yield
    return
  for name in ('gcsfs', 'gcp_storage_emulator'):
    pytest.importorskip(name)
  # It asks for the kind of the bucket, in vain: nobody is logged in.
  logging.getLogger('gcsfs').setLevel(logging.ERROR)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  address = f'http://localhost:{port}'
  with (
    subprocess.Popen(
      [sys.executable, '-c', SERVER, str(port)],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ) as server,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setenv('STORAGE_EMULATOR_HOST', address)
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


@pytest.mark.skipif(not BUCKET, reason='DJPQ_TESTS_BUCKET names no bucket')
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
    assert cli.main(there) == interruption.EXIT_STATUS
  assert 'and saved' in capsys.readouterr().err
  assert not files.path(f'{run}/report.json').exists()
  assert cli.main(there) == 0
  assert capsys.readouterr().out.startswith(f'going on with {run}')
  assert cli.main([*train, '--workdir', 'here']) == 0
  expected = result('here')
  assert result(run) == expected
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


def test_a_folder_is_replaced_and_removed():
  folder = files.path(f'{BUCKET or "gs://bucket"}/folder')
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
