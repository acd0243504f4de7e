"""Files are there whole or not at all, whoever writes them."""

from concurrent import futures
import os
import sys

import pytest
import tiny

from djpq_jax import cli
from djpq_jax import files


def test_text_and_bytes(tmp_path):
  path = files.replace(tmp_path / 'deep' / 'a', 'ä')
  assert path.read_bytes() == 'ä'.encode()
  files.replace(path, b'b')
  assert [f.name for f in path.parent.iterdir()] == ['a']
  assert path.read_bytes() == b'b'


def test_what_stands_in_the_way_of_a_folder(tmp_path):
  (tmp_path / 'file').write_text('')
  assert files.obstacle(tmp_path) is None
  assert files.obstacle(tmp_path / 'none' / 'deep') is None
  for path in (tmp_path / 'file', tmp_path / 'file' / 'deep' / 'er'):
    assert files.obstacle(path) == tmp_path / 'file'


def test_a_link_stays_one(tmp_path):
  target, link = tmp_path / 'deep' / 'target', tmp_path / 'link'
  link.symlink_to(target)
  for content in ('old', 'new'):
    assert files.replace(link, content) == link
    assert link.is_symlink()
    assert target.read_text() == content
  assert [f.name for f in target.parent.iterdir()] == ['target']


def test_what_is_no_place_for_a_file(tmp_path):
  with pytest.raises(ValueError, match='is a folder; give the name of a file'):
    files.replace(tmp_path, 'a')
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(ValueError, match='pipe is no regular file'):
    files.replace(tmp_path / 'pipe', 'a')
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'cannot be written: .*file is a file'):
    files.replace(tmp_path / 'file' / 'page', 'a')


def test_many_writers(tmp_path):
  contents = [bytes([n]) * 100_000 for n in range(8)]
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda c: files.replace(tmp_path / 'a', c), contents * 8))
  assert (tmp_path / 'a').read_bytes() in contents
  assert [f.name for f in tmp_path.iterdir()] == ['a']


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
  path = files.replace(tmp_path / 'a', 'old')

  def full(*_):
    raise OSError('no space left')

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError, match='no space left'):
    files.replace(path, 'new')
  assert [f.name for f in tmp_path.iterdir()] == ['a']
  assert path.read_text() == 'old'


@pytest.mark.parametrize(
  'command',
  [
    'train --config tiny.py --workdir gs://bucket/run',
    'sweep --config tiny.py --budgets 0.02 --workdir gs://bucket/run',
    'evaluate --artifact gs://bucket/run/artifact',
    'inspect --artifact gs://bucket/run/artifact',
    'diff gs://bucket/run/artifact here',
    'export --artifact gs://bucket/run/artifact --format onnx --out a.onnx',
    'report gs://bucket/run',
  ],
)
def test_a_bucket_without_its_package(command, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tiny.py').write_text(tiny.CONFIG)
  with tiny.registered():
    assert cli.main(command.split()) == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert sentence.startswith(
    'djpq: paths of Google Cloud Storage need the package '
    "'gcsfs': pip install 'djpq-jax[gcs]'"
  )
  assert [f.name for f in tmp_path.iterdir()] == ['tiny.py']
