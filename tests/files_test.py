"""Files are there whole or not at all, whoever writes them."""

from concurrent import futures
import os

import pytest

from djpq_jax import files


def test_text_and_bytes(tmp_path):
  path = files.replace(tmp_path / 'deep' / 'a', 'ä')
  assert path.read_bytes() == 'ä'.encode()
  files.replace(path, b'b')
  assert [f.name for f in path.parent.iterdir()] == ['a']
  assert path.read_bytes() == b'b'


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
