"""`djpq data`: what it prints, and what it says when it cannot."""

import pictures
import pytest

from djpq_jax import cli
from djpq_jax import data
from djpq_jax.data.prepare import folder
from djpq_jax.data.prepare import imagenet


@pytest.fixture
def source(tmp_path):
  pictures.class_folders(tmp_path / 'in', train=6)
  return tmp_path / 'in'


def run(*args):
  return cli.main(['data', *map(str, args)])


def refused(capsys, *args):
  """Runs a command that is wrong; returns the one sentence it says."""
  assert run(*args) == 2
  error = capsys.readouterr().err
  assert error.startswith('djpq: ')
  assert error.count('\n') == 1
  return error


def test_folder_prepares_what_a_config_reads(source, tmp_path, capsys):
  out = tmp_path / 'out'
  assert run('folder', '--from', source, '--out', out) == 0
  lines = capsys.readouterr().out.splitlines()
  assert 'train: 6 of 12' in lines
  assert lines[-2:] == [
    'train: 12 images, validation: 6 images',
    f'use it with --set data.name=folder --set data.dir={out}',
  ]
  assert len(data.load('folder', data_dir=str(out))[0]) == 12
  assert run('folder', '--from', source, '--out', out) == 0
  printed = capsys.readouterr().out
  assert 'was prepared before, from the same images' in printed
  assert 'train: 12 images' in printed


def test_repairs_and_gaps_are_told(source, tmp_path, capsys):
  cmyk = pictures.encoded(pictures.smooth(20, 20), mode='CMYK')
  for i in range(25):
    pictures.write(source / f'train/ant/cmyk{i}.jpg', cmyk)
  pictures.write(source / 'val/bee/cut.jpg', cmyk[:99])
  args = 'folder', '--from', source, '--out', tmp_path / 'out'
  assert 'validation/bee/cut.jpg' in refused(capsys, *args)
  assert run(*args, '--skip-corrupt', '--threads', 1) == 0
  lines = capsys.readouterr().out.splitlines()
  assert 'repaired train/ant/cmyk0.jpg: CMYK made RGB' in lines
  assert any(line.startswith('repaired 5 more: ') for line in lines)
  assert any(
    line.startswith('left out validation/bee/cut.jpg') for line in lines
  )


def test_a_stop_says_how_to_go_on(source, tmp_path, capsys, monkeypatch):
  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(folder, 'prepare', stop)
  with pytest.raises(SystemExit) as stopped:
    run('folder', '--from', source, '--out', tmp_path / 'out')
  assert stopped.value.code == 130
  assert 'the same command goes on' in capsys.readouterr().err


def test_mistakes_end_in_one_sentence(source, tmp_path, capsys):
  out = tmp_path / 'out'
  args = '--from', tmp_path / 'no', '--out', out
  assert 'there is no folder' in refused(capsys, 'folder', *args)
  assert imagenet.TRAIN in refused(
    capsys, 'imagenet', '--from', tmp_path, '--out', out
  )
  assert 'no archive' in refused(capsys, 'cifar10', *args)
  args = '--from', source, '--out', out, '--threads', -1
  assert '--threads must be >= 0' in refused(capsys, 'folder', *args)
  (tmp_path / 'file').write_text('')


@pytest.mark.parametrize('kind', ['cifar10', 'folder', 'imagenet'])
def test_what_cannot_be_a_folder(kind, source, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('mine')
  for out, message in (
    ('file', '--out file takes a folder, but file is a file'),
    ('file/deep/er', '--out file/deep/er takes a folder, but file is a file'),
    ('gs://bucket/sets', '--out gs://bucket/sets is not on this machine'),
    ('', '--out is empty'),
  ):
    args = '--from', source, '--out', out
    assert message in refused(capsys, kind, *args)
  assert {f.name for f in tmp_path.iterdir()} == {'file', 'in'}
  assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('args', [(), ('folder',), ('photos', '--out', 'x')])
def test_what_is_missing_is_asked_for(args, capsys):
  with pytest.raises(SystemExit) as error:
    run(*args)
  assert error.value.code == 2
  assert 'usage: djpq data' in capsys.readouterr().err
