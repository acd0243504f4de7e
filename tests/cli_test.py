"""The commands: what they print, write, refuse, and say when they refuse."""

import argparse
import contextlib
import errno
import io
import json
import pathlib
import shutil
import sys
from typing import NamedTuple

import numpy as np
import pytest
import rich.console
import tiny

from djpq_jax import checkpoint
from djpq_jax import cli
from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import train
from djpq_jax import workdir
from djpq_jax.checkpoint import manifest as manifest_lib
from djpq_jax.cli import artifacts
from djpq_jax.cli import bars
from djpq_jax.experiment import previewing
from djpq_jax.export import stablehlo_file

# The requirements of every report, by name.
KEYS = 'float_accuracy accuracy relative_bops budget macs float_macs bops '
KEYS += 'float_bops artifact artifact_bytes layers seconds seed config'
LAYER_KEYS = 'name kept_in kept_out weight_bits act_bits macs bops'

# (output pixels, kernel pixels, inputs, outputs) of each layer, by hand.
LENET5 = [(28 * 28, 25, 1, 32), (14 * 14, 25, 32, 64)]
LENET5 += [(1, 1, 7 * 7 * 64, 512), (1, 1, 512, 10)]
VGG7 = [(1024, 9, 3, 128), (1024, 9, 128, 128), (256, 9, 128, 256)]
VGG7 += [(256, 9, 256, 256), (64, 9, 256, 512), (64, 9, 512, 512)]
VGG7 += [(1, 1, 4 * 4 * 512, 1024), (1, 1, 1024, 10)]
RESNET20 = [(1024, 9, 3, 16)] + 6 * [(1024, 9, 16, 16)]
RESNET20 += [(256, 9, 16, 32)] + 5 * [(256, 9, 32, 32)]
RESNET20 += [(64, 9, 32, 64)] + 5 * [(64, 9, 64, 64)] + [(1, 1, 64, 10)]


pytestmark = pytest.mark.usefixtures('registered')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """Path of the config file."""
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(tiny.CONFIG)
  return str(path)


class Finished(NamedTuple):
  workdir: pathlib.Path
  report: dict
  printed: str


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """A run to its end."""
  workdir = tmp_path_factory.mktemp('runs') / 'deep' / 'run'
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    args = ['--config', config, '--workdir', str(workdir), '--set', 'seed=1']
    assert cli.main(['train', *args]) == 0
  report = json.loads((workdir / 'report.json').read_text())
  return Finished(workdir, report, out.getvalue())


def contents(folder):
  return {
    f.relative_to(folder): f.read_bytes()
    for f in folder.rglob('*')
    if f.is_file()
  }


def refused(capsys, *args):
  """Runs a command that is wrong; returns the one sentence it says."""
  assert cli.main(args) == 2
  printed = capsys.readouterr()
  assert printed.out == ''
  assert printed.err.startswith('djpq: ')
  assert printed.err.endswith('\n')
  assert printed.err.count('\n') == 1
  return printed.err


def test_report_says_all_that_was_asked_for(finished):
  report = finished.report
  assert set(KEYS.split()) <= set(report)
  for row in report['layers']:
    assert set(LAYER_KEYS.split()) <= set(row)
  assert report['seed'] == report['config']['seed'] == 1
  assert report['budget'] == report['config']['budget'] == 0.02
  assert report['seconds'] > 0
  config = json.loads((finished.workdir / 'config.json').read_text())
  assert config == report['config']


def test_model_learned_on_budget(finished):
  report = finished.report
  assert report['float_accuracy'] > 0.9
  assert report['accuracy'] > 0.9
  # So few channels come in large steps, or it would be within 5 %.
  assert 0.95 * 0.02 <= report['relative_bops'] <= 0.02
  assert report['float_macs'] == 16 * 9 * 6 + 96 * 3
  assert report['float_bops'] == 1024 * report['float_macs']
  assert report['bops'] == sum(row['bops'] for row in report['layers'])
  assert report['macs'] == sum(row['macs'] for row in report['layers'])
  relative = report['bops'] / report['float_bops']
  assert report['relative_bops'] == pytest.approx(relative, rel=1e-8)
  conv, head = report['layers']
  assert (conv['name'], head['name']) == ('conv', 'head')
  assert conv['kept_out'] <= conv['out_size'] == 6
  assert head['kept_in'] == 16 * conv['kept_out']
  folder = finished.workdir / report['artifact']
  assert report['artifact_bytes'] == checkpoint.size_bytes(folder)
  # Parameters of the dense model: conv, two of batch norm, head with bias.
  assert report['float_bytes'] == 4 * (9 * 6 + 2 * 6 + 96 * 3 + 3)


def test_history_goes_through_the_phases(finished):
  history = finished.report['history']
  steps = [row['step'] for row in history]
  assert steps == sorted(set(steps))
  assert steps[-1] == 3 * (20 + 40 + 10)
  phases = [row['phase'] for row in history]
  order = ['float', 'search', 'finetune']
  assert phases == sorted(phases, key=order.index)
  assert set(phases) == set(order)
  last = max(i for i, phase in enumerate(phases) if phase == 'search')
  assert history[last]['relative_bops'] == pytest.approx(0.02, rel=0.5)


def test_groups_keep_their_reasons_through_the_file(finished):
  groups = {group['name']: group for group in finished.report['groups']}
  assert groups['conv']['reason'] == ''
  assert groups['conv']['kept'] == finished.report['layers'][0]['kept_out']
  assert groups['head']['reason'] == 'is an output of the model'
  assert groups['head']['kept'] == groups['head']['size'] == 3


def test_train_prints_and_draws(finished):
  printed, workdir = finished.printed, finished.workdir
  for name in ('report.json', 'artifact', 'layers.png', 'curves.png'):
    assert str(workdir / name) in printed
    assert (workdir / name).exists()
  assert 'bit operations (BOPs)' in printed
  assert f'{100 * finished.report["accuracy"]:.2f} %' in printed
  assert 'Not pruned: head (is an output of the model)' in printed
  # In a log file every phase shows that it moves.
  for phase in bars.PHASES.values():
    assert f'{phase}: step' in printed
  assert '\x1b' not in printed


def test_evaluate_reproduces_the_report(finished, tmp_path, capsys):
  """From the artifact alone, wherever it was moved to."""
  artifact = shutil.copytree(finished.workdir / 'artifact', tmp_path / 'moved')
  assert cli.main(['evaluate', '--artifact', str(artifact), '--json']) == 0
  measured = json.loads(capsys.readouterr().out)
  report = finished.report
  assert measured['images'] == 50
  for key in ('macs', 'float_macs', 'bops', 'float_bops'):
    assert measured[key] == report[key]
  for key in ('accuracy', 'relative_bops'):
    assert measured[key] == pytest.approx(report[key], rel=1e-8)
  assert cli.main(['evaluate', '--artifact', str(artifact)]) == 0
  printed = capsys.readouterr().out
  assert f'{report["accuracy"]:.2%} of 50 images of tiny' in printed
  assert f'{report["bops"]:,} of {report["float_bops"]:,}' in printed


@pytest.mark.parametrize('name', [None, 'synthetic'])
def test_a_set_is_opened_as_it_was_measured_on(name):
  """Whether its name is given again or not."""
  args = argparse.Namespace(artifact='artifact', data=name, data_dir=None)
  kwargs = {'shape': (8, 8, 1), 'test_size': 7}
  manifest = {
    'measured_on': {'data': 'synthetic', 'kwargs': kwargs},
    'input_shape': [8, 8, 1],
  }
  split, _ = artifacts.images(args, manifest)
  assert split.images.shape == (7, 8, 8, 1)


def test_all_executions_predict_alike(finished, capsys):
  measured = []
  for execution in ('simulated', 'float', 'int8', 'program'):
    artifact = str(finished.workdir / 'artifact')
    args = ['evaluate', '--artifact', artifact, '--execution', execution]
    assert cli.main([*args, '--json']) == 0
    measured.append(json.loads(capsys.readouterr().out))
    assert measured[-1].pop('execution') == execution
  assert all(m == measured[0] for m in measured)
  assert measured[0]['accuracy'] == finished.report['accuracy']
  assert measured[0]['float_layers'] == {}


def test_evaluate_refuses(finished, tmp_path, capsys):
  artifact = str(finished.workdir / 'artifact')
  evaluate = ['evaluate', '--artifact']
  said = refused(capsys, *evaluate, artifact, '--data', 'digits')
  assert 'takes images of shape (4, 4, 1), but digits has (8, 8, 1)' in said
  said = refused(capsys, *evaluate, artifact, '--data', 'tini')
  assert "no data source 'tini'; did you mean 'tiny'" in said
  said = refused(capsys, *evaluate, str(finished.workdir))
  assert 'is no artifact: it has no manifest.json' in said
  broken = shutil.copytree(artifact, tmp_path / 'broken')
  path = broken / 'manifest.json'
  manifest = json.loads(path.read_text())

  def sign(changed):
    changed['sha256'] = manifest_lib.content_hash(changed, broken)
    path.write_text(json.dumps(changed))

  sign(manifest | {'measured_on': {}})
  said = refused(capsys, *evaluate, str(broken))
  assert 'does not say what it was measured on; give --data' in said
  manifest['model']['name'] = 'tinny'
  sign(manifest)
  said = refused(capsys, *evaluate, str(broken), '--execution', 'int8')
  assert '(tinny) is not one of this package' in said
  capsys.readouterr()
  assert cli.main([*evaluate, str(broken), '--json']) == 0  # the program
  measured = json.loads(capsys.readouterr().out)
  assert measured['accuracy'] == finished.report['accuracy']
  assert measured['bops'] == finished.report['bops']
  path.write_text(path.read_text()[:-30])
  assert 'is damaged' in refused(capsys, *evaluate, str(broken))


def test_report_is_one_page_of_the_run(finished, tmp_path, capsys):
  run = pathlib.Path(shutil.copytree(finished.workdir, tmp_path / 'run'))
  assert cli.main(['report', str(run)]) == 0
  assert str(run / 'report.html') in capsys.readouterr().out
  content = (run / 'report.html').read_text(encoding='utf-8')
  assert f'{100 * finished.report["accuracy"]:.2f} %' in content
  # Each layer has its weights, and all of them.
  for row in finished.report['layers']:
    assert f'{row["name"]}: bits {row["weight_bits"]}' in content
    assert f'weights {row["weights"]:,}' in content
  assert 'is an output of the model' in content


def test_report_measures_speed(finished, tmp_path, capsys):
  run = pathlib.Path(shutil.copytree(finished.workdir, tmp_path / 'run'))
  assert cli.main(['report', str(run), '--time']) == 0
  measured = json.loads((run / 'speed.json').read_text())
  names = ['float32', 'simulated', 'float', 'int8']
  assert list(measured['images_per_second']) == names
  assert all(speed > 0 for speed in measured['images_per_second'].values())
  assert cli.main(['report', str(run)]) == 0  # it was kept
  assert '64 images at a time' in (run / 'report.html').read_text()
  (run / 'speed.json').write_text('{')
  assert cli.main(['report', str(run)]) == 0
  assert 'not measured' in (run / 'report.html').read_text()
  assert 'speed.json is damaged: --time measures' in capsys.readouterr().out
  (run / 'speed.json').write_text(json.dumps(measured | {'artifact': 'x'}))
  assert cli.main(['report', str(run)]) == 0
  assert 'speed.json is of another artifact' in capsys.readouterr().out


def test_report_compares_runs(finished, tmp_path, capsys, monkeypatch):
  """One of them has lost its artifact, which is no reason to refuse."""
  monkeypatch.chdir(tmp_path)
  first = shutil.copytree(finished.workdir, tmp_path / 'x' / 'run')
  second = shutil.copytree(finished.workdir, tmp_path / 'y' / 'run')
  shutil.rmtree(second / 'artifact')
  # A run that is named twice is there once.
  assert cli.main(['report', str(first), 'y/run', 'x/run']) == 0
  printed = capsys.readouterr().out
  assert 'y/run: without what needs the artifact: ' in printed
  content = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert '2 runs compared' in content
  assert 'x/run' in content
  assert 'The artifact could not be read' in content
  out = tmp_path / 'new' / 'page.html'
  assert cli.main(['report', str(second), '--out', str(out)]) == 0
  assert out.is_file()


def test_report_refuses(finished, tmp_path, capsys):
  def said(*args):
    return refused(capsys, 'report', *map(str, args))

  assert 'there is no run' in said(tmp_path / 'none')
  (tmp_path / 'file').write_text('mine')
  assert 'is a file, not a folder' in said(tmp_path / 'file')
  run = tmp_path / 'run'
  run.mkdir()
  assert 'is no finished run: it has no report.json' in said(run)
  shutil.copy(finished.workdir / 'config.json', run)
  assert 'is not finished' in said(finished.workdir, run)
  (run / 'report.json').write_text('{')
  assert 'is truncated or not JSON' in said(run)
  changed = finished.report | {'float_accuracy': '0.9'}
  (run / 'report.json').write_text(json.dumps(changed))
  text = said(run)
  assert (
    f'{run / "report.json"} is not a report: it has "0.9" for float_' in text
  )
  (run / 'sweep.json').write_text('[]')
  assert 'is truncated or is not a sweep' in said(run)
  assert 'is a folder' in said(finished.workdir, '--out', tmp_path)
  assert not list(tmp_path.rglob('*.html'))


def exported(finished, path, *args):
  artifact = str(finished.workdir / 'artifact')
  args = ['--artifact', artifact, '--out', str(path), *args]
  return cli.main(['export', *args])


@pytest.mark.parametrize('format', ['onnx', 'stablehlo'])
def test_export_checks_the_file(format, finished, tmp_path, capsys):
  pytest.importorskip('onnxruntime', reason="pip install 'djpq-jax[onnx]'")
  args = ['--format', format, '--strict']
  assert exported(finished, tmp_path / 'model', *args, '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert found['bytes'] == (tmp_path / 'model').stat().st_size
  assert found['deviation']['images'] == 50
  assert found['deviation']['predictions'] == 0
  assert found['steps'] <= 1
  beside = str(tmp_path / 'model.json') if format == 'stablehlo' else None
  assert found['facts_path'] == beside
  args = ['--format', format, '--images', '7', '--batch', '3']
  assert exported(finished, tmp_path / 'model', *args) == 0
  printed = capsys.readouterr().out
  for path in tmp_path.iterdir():  # nothing is written without a word
    assert str(path) in printed
  assert (str(beside) in printed) == (format == 'stablehlo')
  assert '7 of 7 images of tiny are equal' in printed


def test_export_says_when_predictions_differ(
  finished, tmp_path, capsys, monkeypatch
):
  call = stablehlo_file.Loaded.__call__
  turned = lambda self, images: call(self, images)[:, ::-1]
  monkeypatch.setattr(stablehlo_file.Loaded, '__call__', turned)
  args = ['--format', 'stablehlo']
  assert exported(finished, tmp_path / 'model', *args) == 2
  said = capsys.readouterr().err
  assert said.count('\n') == 1
  assert 'was written, but' in said
  assert 'predictions differ; --allow-deviation accepts it' in said
  assert exported(finished, tmp_path / 'model', *args, '--allow-deviation') == 0


@pytest.mark.parametrize('option', ['--batch', '--images'])
def test_export_refuses(option, finished, tmp_path, capsys):
  args = ['--artifact', str(finished.workdir / 'artifact'), option, '0']
  out = str(tmp_path / 'model')
  said = refused(capsys, 'export', *args, '--format', 'onnx', '--out', out)
  assert f'{option} takes a number of images from 1 on, not 0' in said
  assert not list(tmp_path.iterdir())


def test_a_workdir_in_use_is_never_overwritten_silently(
  finished, config, capsys
):
  workdir = finished.workdir
  before = contents(workdir)
  again = ['train', '--config', config, '--workdir', str(workdir)]
  said = refused(capsys, *again, '--set', 'search.epochs=3', '--set', 'seed=1')
  assert 'another experiment (it differs in search.epochs)' in said
  said = refused(capsys, *again, '--set', 'seed=2', '--set', 'budget=0.1')
  assert 'another experiment (it differs in budget, seed)' in said
  # Not even on request, before it is known that the new one can run.
  said = refused(capsys, *again, '--overwrite', '--set', 'budget=1e-6')
  assert 'cannot be reached' in said
  assert contents(workdir) == before


def test_a_finished_run_is_shown_again(finished, config, capsys, monkeypatch):
  monkeypatch.setattr(experiment, 'run', None)
  before = contents(finished.workdir)
  args = ['--config', config, '--workdir', str(finished.workdir)]
  assert cli.main(['train', *args, '--set', 'seed=1']) == 0
  printed = capsys.readouterr().out
  assert 'holds this experiment, finished' in ' '.join(printed.split())
  assert 'seed 1' in printed
  assert contents(finished.workdir) == before


@pytest.mark.parametrize('content', ['{}', '[]', '{"layers": [1]}', '{'])
def test_a_report_that_is_none_does_not_finish_a_run(
  content, finished, config, tmp_path
):
  work = workdir.Workdir(tmp_path / 'run', config_lib.load(config))
  shutil.copytree(finished.workdir, work.path)
  assert work.report() is not None
  (work.path / 'report.json').write_text(content)
  assert work.report() is None


def test_a_run_without_its_artifact_is_not_finished(finished, config, tmp_path):
  work = workdir.Workdir(tmp_path / 'run', config_lib.load(config))
  shutil.copytree(finished.workdir, work.path)
  shutil.rmtree(work.path / 'artifact')
  assert work.report() is None


def test_files_of_others_are_not_overwritten_on_request(
  config, tmp_path, capsys
):
  (tmp_path / 'thesis.tex').write_text('years of work')
  train_here = ['train', '--config', config, '--workdir', str(tmp_path)]
  for more in ([], ['--overwrite']):
    said = refused(capsys, *train_here, *more)
    assert 'already holds files that are no experiment' in said
    assert '--overwrite' not in said
  assert [f.name for f in tmp_path.iterdir()] == ['thesis.tex']


def test_overwrite_with_few_choices_of_bits(finished, config, tmp_path, capsys):
  """Untrained, which is quick; nothing of the older run is left."""
  workdir = pathlib.Path(shutil.copytree(finished.workdir, tmp_path / 'run'))
  (workdir / 'notes.txt').write_text('old')
  args = ['train', '--config', config, '--workdir', str(workdir), '--overwrite']
  for phase in ('float', 'search', 'finetune'):
    args += ['--set', f'{phase}.epochs=0']
  choices = (2, 4, 8, 16, 32)
  assert cli.main([*args, '--set', f'bit_choices={choices}']) == 0
  report = json.loads((workdir / 'report.json').read_text())
  assert report['seed'] == 0
  assert report['history'] == []
  assert report['relative_bops'] <= 0.02
  for row in report['layers']:
    assert row['weight_bits'] in choices
    assert row['act_bits'] in choices
  names = {f.name for f in workdir.iterdir()}
  assert names == {
    'artifact',
    'config.json',
    'layers.png',
    'metrics.jsonl',
    'report.json',
  }
  assert 'curves.png' not in capsys.readouterr().out


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (['search.epohcs=3'], 'field search.epohcs; did you mean search.epochs?'),
    (['model.name=lenet6'], "no model 'lenet6'; did you mean 'lenet5'"),
    (['data.name=digit'], "no data source 'digit'; did you mean 'digits'"),
    (['method=djqp'], "unknown method 'djqp'; there are djpq, two_stage, uni"),
    (['budget=1e-5'], 'cannot be reached'),
    (['budget=1.5'], 'budget is a fraction'),
    (['budget=-1.0'], 'budget takes a number from 0 on'),
    (['data.name=digits'], 'but digits has (8, 8, 1); set model.kwargs.input'),
    (
      [
        'data.name=digits',
        'model.name=digits_cnn',
        'model.kwargs.num_classes=5',
      ],
      'has logits of 5 classes, but digits has 10; set model.kwargs.num_classe',
    ),
    (['rules=[{"pattern": "conv9"}]'], 'rules match no layer: conv9'),
    (['rules=[{"pattern": "*", "weight_bits": 8}]'], 'must be (min, max) with'),
    (['bit_choices=("a",)'], 'bit_choices takes whole numbers in a list'),
    (['seed=100000000000000000000000'], 'seed takes a number below 2**32'),
    (
      ['method=two_stage', 'two_stage_macs=0.001'],
      'two_stage_macs=0.001 cannot be reached',
    ),
    (
      ['method=uniform', 'uniform_bits=(16,16)'],
      'uniform bits of 16 for weights are what no layer can have',
    ),
    (
      ['model.weights=nowhere.pt'],
      "model.weights is 'nowhere.pt', which canno",
    ),
    (
      ['model.weights=/'],
      "model.weights is '/', which cannot be read: Is a di",
    ),
  ],
)
def test_train_refuses_before_it_trains(
  config, tmp_path, capsys, monkeypatch, overrides, message
):
  monkeypatch.setattr(train, 'fit', None)
  workdir = tmp_path / 'run'
  args = ['train', '--config', config, '--workdir', str(workdir)]
  for override in overrides:
    args += ['--set', override]
  for more in ([], ['--dry-run']):
    assert message in refused(capsys, *args, *more)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('package', 'message'),
  [
    ('matplotlib', "pictures need the package 'matplotlib': pip install"),
    ('sklearn.datasets', "the digits need the package 'sklearn': pip install"),
  ],
)
def test_a_package_that_lacks_is_told_before_it_trains(
  config, tmp_path, capsys, monkeypatch, package, message
):
  monkeypatch.setattr(train, 'fit', None)
  monkeypatch.setitem(sys.modules, package, None)
  workdir = tmp_path / 'run'
  digits = ['--config', 'digits', '--workdir', str(workdir)]
  ours = ['--config', config, '--workdir', str(workdir)]
  args = digits if package == 'sklearn.datasets' else ours
  assert message in refused(capsys, 'train', *args)
  assert not workdir.exists()


def test_an_unreachable_budget_says_how_far_it_can_go(config, tmp_path, capsys):
  args = ['train', '--config', config, '--workdir', str(tmp_path / 'run')]
  said = refused(capsys, *args, '--set', 'budget=1e-5')
  assert 'a budget of 0.001 %' in said
  percent = float(said.partition('rules allow, ')[2].partition('%')[0])
  # One of six channels; kernels of 1 bit, inputs of 2, but 8 for the image.
  conv, head = 16 * 9 * 1 * 1 * 8, 16 * 3 * 1 * 2
  expected = (conv + head) / (1024 * (16 * 9 * 6 + 96 * 3))
  assert percent == pytest.approx(100 * expected, abs=1e-4)


def test_a_workdir_that_is_a_file(config, tmp_path, capsys):
  path = tmp_path / 'file'
  path.write_text('mine')
  said = refused(capsys, 'train', '--config', config, '--workdir', str(path))
  assert 'is a file, not a folder' in said
  below = str(path / 'run')
  said = refused(capsys, 'train', '--config', config, '--workdir', below)
  assert 'file is a file, not a folder' in said
  assert path.read_text() == 'mine'


def test_an_error_of_the_system_is_a_sentence(finished, tmp_path, capsys):
  page = str(tmp_path / ('x' * 300))
  said = refused(capsys, 'report', str(finished.workdir), '--out', page)
  assert 'xxx: File name too long' in said
  assert 'Errno' not in said


def test_inspecting_an_artifact(finished, capsys):
  artifact = str(finished.workdir / 'artifact')
  assert cli.main(['inspect', '--artifact', artifact]) == 0
  printed = capsys.readouterr().out
  for text in ('conv', 'head', 'of float32', '50 images of tiny', 'made with'):
    assert text in printed
  assert f'{finished.report["accuracy"]:.2%}' in printed
  assert cli.main(['inspect', '--artifact', artifact, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['bytes'] == finished.report['artifact_bytes']
  assert found['totals']['bops'] == finished.report['bops']


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([], 'one of them'),
    (['--config', 'digits', '--artifact', 'x'], 'one of them'),
    (['--artifact', 'x', '--set', 'seed=1'], 'stays as it is'),
    (['--artifact', 'x'], 'x is no artifact'),
  ],
)
def test_inspecting_what_is_wrong(args, message, capsys):
  assert message in refused(capsys, 'inspect', *args)


def spoil(folder, **changes):
  """Edits a manifest by hand, and leaves its hash as it was."""
  path = folder / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'accuracy': 0.999}, 'was altered or is incomplete'),
    ({'totals': {}}, 'was altered or is incomplete'),
    ({'layers': [{}]}, 'was altered or is incomplete'),
    ({'measured_on': 'x'}, 'is damaged: its measured_on cannot be "x"'),
    ({}, 'was altered or is incomplete'),
  ],
)
def test_nothing_is_printed_of_a_damaged_artifact(
  finished, tmp_path, capsys, changes, message
):
  whole = finished.workdir / 'artifact'
  broken = pathlib.Path(shutil.copytree(whole, tmp_path / 'broken'))
  if changes:
    spoil(broken, **changes)
  else:
    (broken / 'index.xz').write_bytes(b'')
  out = ['--format', 'stablehlo', '--out', str(tmp_path / 'model')]
  for command in (
    ['inspect', '--artifact', str(broken)],
    ['inspect', '--json', '--artifact', str(broken)],
    ['evaluate', '--artifact', str(broken)],
    ['export', '--artifact', str(broken), *out],
    ['diff', str(whole), str(broken)],
  ):
    said = refused(capsys, *command)
    assert message in said
    assert str(broken) in said


def test_diff(finished, tmp_path, capsys):
  one = finished.workdir / 'artifact'
  assert cli.main(['diff', str(one), str(one)]) == 0
  assert 'all layers have the same channels' in capsys.readouterr().out
  two = shutil.copytree(one, tmp_path / 'two')
  manifest = json.loads((two / 'manifest.json').read_text())
  bits = manifest['layers'][0]['weight_bits']
  manifest['layers'][0]['weight_bits'] = 16
  del manifest['layers'][1], manifest['accuracy']
  manifest['sha256'] = manifest_lib.content_hash(manifest, two)
  (two / 'manifest.json').write_text(json.dumps(manifest))
  assert cli.main(['diff', str(one), str(two)]) == 0
  printed = capsys.readouterr().out
  assert f'{finished.report["accuracy"]:.2%} -> -' in printed
  assert f'{bits} -> 16' in printed
  assert cli.main(['diff', str(one), str(two), '--json']) == 0
  layers = json.loads(capsys.readouterr().out)['layers']
  assert layers['conv'] == {'weight_bits': [bits, 16]}
  assert layers['head']['kept_in'][1] is None
  assert 'is no artifact' in refused(capsys, 'diff', str(one), str(tmp_path))


def test_dry_run(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(train, 'fit', None)
  workdir = tmp_path / 'run'
  args = ['train', '--config', config, '--workdir', str(workdir), '--dry-run']
  assert cli.main(args) == 0
  printed = capsys.readouterr().out
  for text in (
    f'{9 * 6 + 2 * 6 + 96 * 3 + 3} parameters',
    f'{1024 * (16 * 9 * 6 + 96 * 3):,} (32 x 32 bits)',
    '2.000% of the BOPs, ',
    'tiny: 96 images to train, 50 to test, 4 x 4 x 1',
    '60 float, 120 search, 30 finetune, of 32 images',
    '1 x cpu',
    'MiB on each for a step of the search',
  ):
    assert text in printed
  assert not workdir.exists()
  assert 'cannot be reached' in refused(capsys, *args, '--set', 'budget=1e-6')


def test_dry_runs_of_variants_differ(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(train, 'fit', None)
  monkeypatch.setattr(previewing, '_step_bytes', lambda *_: 3 * 2**20)
  args = ['--workdir', str(tmp_path / 'run'), '--dry-run']
  expected = {
    'djpq': 'djpq: channels and bits together; bits of any whole number',
    'djpq_restrict': (
      'djpq: channels and bits together; bits of 2, 4, 8, 16, 32'
    ),
    'two_stage': (
      'two_stage: channels to 30.000% of the MACs, then bits of any whole '
      'number'
    ),
    'w8a8': 'uniform: 8 bits for weights, 8 for activations',
    # An image keeps its eight.
    'w4a4': (
      'uniform: 4 bits for weights, 4 for activations; others in 1 of 2 '
      'layers, by the rules'
    ),
    'float': 'float: nothing is pruned or quantized',
  }
  for variant, method in expected.items():
    assert cli.main(['train', '--config', f'{config}:{variant}', *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:10].strip(): line[10:] for line in lines}
    assert rows['method'] == method
    searches = rows['method'].startswith(('djpq', 'two'))
    assert rows['channels'].startswith(
      '1 of 3 groups can be pruned' if searches else 'all are kept'
    )
    assert rows['budget'].startswith('2.000% of' if searches else 'none')
    phase = 'search' if searches else 'finetuning'
    assert rows['memory'] == f'3 MiB on each for a step of the {phase}'
  args += ['--config', config]
  for field in ('float', 'search', 'finetune'):
    args += ['--set', f'{field}.epochs=0']
  assert cli.main(['train', *args]) == 0
  assert 'memory    no step is run' in capsys.readouterr().out


def test_progress_tells_what_is_worth_knowing():
  row = {'task_loss': 0.5, 'images_per_second': 1234.5}
  assert bars.note_of('float', row) == 'loss 0.500  1,234 images/s'
  row |= {'relative_bops': 0.02, 'kept_fraction': 0.5}
  row |= {'mean_weight_bits': 3.25, 'mean_act_bits': 4.0}
  note = bars.note_of('search', row)
  assert note.startswith('loss 0.500  BOPs 2.000%  bits 3.2/4.0  channels 50%')


def test_progress_knows_the_time_left_when_looks_are_far_apart():
  now = 0.0
  console = rich.console.Console(
    file=io.StringIO(), force_terminal=True, get_time=lambda: now
  )
  shown = bars.Bars(console)  # not entered: nothing is drawn
  row = {'task_loss': 0.5, 'images_per_second': 2.0}
  for step in (50, 100, 150):
    shown.show('float', step, 200, row)
    now += 100
  (task,) = shown._progress.tasks
  assert task.time_remaining == 100


def test_a_config_that_is_missing(tmp_path, capsys):
  args = ['--config', str(tmp_path / 'none.py'), '--workdir', str(tmp_path)]
  said = refused(capsys, 'train', *args)
  assert 'none.py is neither a file nor a packaged config' in said


def test_training_that_cannot_go_on_is_not_to_be_restarted(
  config, tmp_path, capsys, monkeypatch
):
  def broken(*args, **kwargs):
    raise train.TrainingError('training stopped at step 3: the batch is gone')

  monkeypatch.setattr(experiment, 'run', broken)
  args = ['train', '--config', config, '--workdir', str(tmp_path / 'run')]
  assert cli.main(args) == 2
  printed = capsys.readouterr()
  assert 'djpq: training stopped at step 3: the batch is gone\n' in printed.err


@pytest.mark.parametrize(
  ('error', 'amid', 'status', 'said'),
  [
    (OSError(errno.EIO, 'I/O error', 'x'), True, 1, 'x: I/O error; the same'),
    (TimeoutError(), True, 1, 'TimeoutError; the same command goes on'),
    (OSError(errno.ESTALE, 'Stale handle'), True, 1, 'Stale handle; the same'),
    (OSError(errno.ENOSPC, 'Disk is full'), True, 2, 'Disk is full\n'),
    (PermissionError(errno.EACCES, 'Denied', 'y'), True, 2, 'y: Denied\n'),
    (OSError(errno.EIO, 'I/O error'), False, 2, 'I/O error\n'),
  ],
)
def test_faults_that_a_restart_may_mend(
  config, tmp_path, capsys, monkeypatch, error, amid, status, said
):
  def broken(*args, ready, **kwargs):
    if amid:
      ready()
    raise error

  monkeypatch.setattr(experiment, 'run', broken)
  args = ['train', '--config', config, '--workdir', str(tmp_path / 'run')]
  assert cli.main(args) == status
  printed = capsys.readouterr().err
  assert f'djpq: {said}' in printed
  assert printed.count('\n') == 1


def test_a_fault_before_a_run_goes_on_may_be_mended(
  config, tmp_path, capsys, monkeypatch
):
  """Such a run was claimed when it began, however early this comes."""

  def broken(*args, ready, **kwargs):
    if not (tmp_path / 'run').exists():
      ready()
    raise OSError(errno.EIO, 'I/O error')

  monkeypatch.setattr(experiment, 'run', broken)
  args = ['train', '--config', config, '--workdir', str(tmp_path / 'run')]
  assert [cli.main(args) for _ in range(2)] == [1, 1]
  said = capsys.readouterr().err.splitlines()
  assert said == ['djpq: I/O error; the same command goes on'] * 2


def test_debug_shows_the_traceback(tmp_path):
  with pytest.raises(ValueError, match='neither a file nor'):
    cli.main(['--debug', 'inspect', '--config', str(tmp_path / 'none.py')])


@pytest.mark.parametrize('args', [[], ['trian'], ['train'], ['evaluate']])
def test_usage(args, capsys):
  with pytest.raises(SystemExit) as info:
    cli.main(args)
  assert info.value.code == 2
  assert 'usage: djpq' in capsys.readouterr().err


def inspected(capsys, *args):
  assert cli.main(['inspect', '--config', 'digits', '--json', *args]) == 0
  return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
  ('name', 'table'),
  [('lenet5', LENET5), ('vgg7', VGG7), ('resnet20', RESNET20)],
)
def test_inspect_counts_as_by_hand(name, table, capsys):
  """Without data of the model's shape, and without its weights."""
  # The rules of the config are for its own model.
  found = inspected(capsys, '--set', f'model.name={name}', '--set', 'rules=()')
  macs = [int(np.prod(row)) for row in table]
  assert [layer['macs'] for layer in found['layers']] == macs
  assert found['float_macs'] == sum(macs)
  assert found['float_bops'] == 32 * 32 * sum(macs)
  assert [layer['weights'] for layer in found['layers']] == [
    kernel * inputs * outputs for _, kernel, inputs, outputs in table
  ]
  sizes = [(inputs, outputs) for _, _, inputs, outputs in table]
  assert [(layer['in'], layer['out']) for layer in found['layers']] == sizes
  published = {
    'lenet5': (12_273_152, '12.6'),
    'vgg7': (615_917_568, '630.7'),
    'resnet20': (40_550_400 + 640, '41.5'),
  }
  assert found['float_macs'] == published[name][0]
  assert f'{found["float_bops"] / 1e9:.1f}' == published[name][1]


def test_inspect_tells_what_is_quantized_and_pruned(capsys):
  rules = '[{"pattern": "linear", "quantize": False}]'
  rules = rules[:-1] + ', {"pattern": "block2/*", "prune": False}]'
  found = inspected(capsys, '--set', f'rules={rules}')
  layers = {layer['name']: layer for layer in found['layers']}
  assert layers['block1/conv']['act_bits'] == [8, 8]
  assert layers['block2/conv']['reads'] == ['block1/conv']
  assert layers['block2/conv']['quantize']
  assert not layers['linear']['quantize']
  groups = {group['name']: group for group in found['groups']}
  assert groups['block1/conv']['prunable']
  assert groups['block2/conv']['reason'] == 'a rule keeps its channels'
  assert not groups['block2/conv']['prunable']
  assert groups['block4/conv']['consumers'] == ['linear']


def test_inspect_for_people(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  args = ['--config', 'digits', '--set', 'model.name=resnet20']
  args += ['--set', 'rules=()']
  assert cli.main(['inspect', *args]) == 0
  printed = capsys.readouterr().out
  assert "no: is the model's input" in printed
  assert 'no: is an output of the model' in printed
  assert 'no: padded with a fixed number of zero channels' in printed
  assert 'float_macs  40,551,040' in printed
  assert f'float_bops  {1024 * 40_551_040:,} (32 x 32 bits)' in printed
  assert 'layer3/2/conv2' in printed


def test_inspect_refuses(capsys):
  inspect = ['inspect', '--config', 'digits', '--set']
  said = refused(capsys, *inspect, 'model.kwargs.input_shape=(7, 8, 1)')
  assert 'multiples of 2' in said
  said = refused(capsys, *inspect, 'model.kwargs.widths=3')
  assert "digits_cnn takes no argument 'widths'" in said
  said = refused(capsys, *inspect, 'rules=[{"pattern": "conv"}]')
  assert 'the layers are block1/conv, block2/conv' in said
