"""Metrics as JSON lines and event files."""

import json
import struct
import sys

import pytest

from djpq_jax import metrics

ROWS = [
  {'phase': 'float', 'step': 3, 'loss': 0.5},
  {'phase': 'search', 'step': 9, 'loss': 0.25, 'relative_bops': 0.125},
]


def lines(folder):
  text = (folder / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_rows_are_lines_as_they_come(tmp_path):
  log = metrics.Log(tmp_path)
  log.write([])
  assert lines(tmp_path) == []
  log.write(ROWS[:1])
  assert lines(tmp_path) == ROWS[:1]
  log.write(ROWS[1:])
  log.close()
  assert lines(tmp_path) == ROWS
  assert not (tmp_path / 'tensorboard').exists()


def test_a_run_that_goes_on_begins_anew(tmp_path):
  metrics.Log(tmp_path).write(ROWS)
  log = metrics.Log(tmp_path)
  log.write(ROWS[:1])
  assert lines(tmp_path) == ROWS[:1]


def test_what_a_run_had_stays_until_it_goes_on(tmp_path):
  metrics.Log(tmp_path).write(ROWS)
  log = metrics.Log(tmp_path)
  log.restore(ROWS[:1])
  assert lines(tmp_path) == ROWS  # it may yet find that it cannot go on
  new = {'phase': 'search', 'step': 6, 'loss': 0.125}
  log.write([new])
  assert lines(tmp_path) == [ROWS[0], new]


def test_a_run_that_is_done_has_what_its_checkpoints_hold(tmp_path):
  log = metrics.Log(tmp_path)
  log.restore(ROWS)
  log.close()
  assert lines(tmp_path) == ROWS


def events(path):
  """The records of an event file: length, checksum, data, checksum."""
  data, records = path.read_bytes(), []
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    records.append(data[12 : 12 + length])
    data = data[16 + length :]
  return records


def test_event_files(tmp_path):
  pytest.importorskip('tensorboardX')
  log = metrics.Log(tmp_path, tensorboard=True)
  log.write(ROWS)
  log.close()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  written = b''.join(events(path))
  for tag, value in (('float/loss', 0.5), ('search/relative_bops', 0.125)):
    assert tag.encode() in written
    assert struct.pack('<f', value) in written
  assert b'phase' not in written
  metrics.Log(tmp_path, tensorboard=True).close()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  assert b'float/loss' not in b''.join(events(path))


def test_a_missing_package_is_named_before_anything_is_written(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  metrics.check(tensorboard=False)
  for ask in (
    lambda: metrics.check(tensorboard=True),
    lambda: metrics.Log(tmp_path, tensorboard=True),
  ):
    with pytest.raises(ImportError, match=r"install 'djpq-jax\[tensorboard\]'"):
      ask()
