"""Several budgets from one float model: shared, resumed, and drawn."""

import json
import os
import shutil
import signal

import pytest
import tiny

from djpq_jax import cli
from djpq_jax import experiment
from djpq_jax import train

pytestmark = [
  pytest.mark.standard_promotion,
  pytest.mark.usefixtures('registered'),
]


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  (folder / 'tiny.py').write_text(tiny.CONFIG)
  epochs = ['float.epochs=4', 'search.epochs=10', 'finetune.epochs=2']
  sets = [part for field in epochs for part in ('--set', field)]
  return ['sweep', '--config', str(folder / 'tiny.py'), *sets]


@pytest.fixture(scope='module')
def swept(command, tmp_path_factory):
  """A finished sweep."""
  folder = tmp_path_factory.mktemp('runs') / 'sweep'
  args = ['--workdir', str(folder), '--budgets', '0.02,0.05']
  assert cli.main([*command, *args]) == 0
  return folder


def test_points_are_reports_of_one_float_model(swept):
  points = json.loads((swept / 'sweep.json').read_text())['points']
  assert [p['budget'] for p in points] == [0.05, 0.02]
  for point in points:
    report = json.loads((swept / point['folder'] / 'report.json').read_text())
    assert {k: report[k] for k in point if k != 'folder'} == {
      k: v for k, v in point.items() if k != 'folder'
    }
    assert 0.95 * point['budget'] < point['relative_bops'] <= point['budget']
    assert not (swept / point['folder'] / 'checkpoints' / '0-float').exists()
    model = experiment.load_artifact(swept / point['folder'] / 'artifact')
    assert model is not None
  assert (swept / 'checkpoints' / '0-float').is_dir()
  assert (swept / 'pareto.png').stat().st_size > 10_000


def test_a_budget_that_fails_hides_no_other(
  swept, command, tmp_path, monkeypatch, capsys
):
  home = shutil.copytree(swept, tmp_path / 'sweep')
  (home / 'sweep.json').unlink()

  def broken(*args, **kwargs):
    raise train.TrainingError('all of it is gone')

  monkeypatch.setattr(experiment, 'run', broken)
  args = ['--workdir', str(home), '--budgets', '0.05,0.02,0.01']
  assert cli.main([*command, *args]) == 2
  printed = capsys.readouterr()
  assert 'djpq: all of it is gone\n' in printed.err
  assert 'float accuracy' in printed.out
  points = json.loads((home / 'sweep.json').read_text())['points']
  assert [p['budget'] for p in points] == [0.05, 0.02]


def test_a_point_is_what_train_gives(swept, command, tmp_path):
  """Sharing the float training changes no bit."""
  args = ['--workdir', str(tmp_path / 'run'), '--set', 'budget=0.02']
  assert cli.main(['train', *command[1:], *args]) == 0
  alone, shared = (
    json.loads((folder / 'report.json').read_text())
    for folder in (tmp_path / 'run', swept / 'budget-0.02')
  )
  for report in (alone, shared):
    del report['seconds'], report['artifact_bytes']
  assert alone == shared


def test_more_budgets_train_only_what_is_new(
  swept, command, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / 'sweep'
  shutil.copytree(swept, folder)
  trained = []
  fit = train.fit

  def counted(state, batch_at, steps, **kwargs):
    trained.append(steps - int(state.step))
    return fit(state, batch_at, steps, **kwargs)

  monkeypatch.setattr(train, 'fit', counted)
  args = ['--workdir', str(folder), '--budgets', '0.1,0.02,0.05']
  assert cli.main([*command, *args]) == 0
  assert trained == [0, 3 * 10, 3 * 2]  # the float model was there
  points = json.loads((folder / 'sweep.json').read_text())['points']
  assert [p['budget'] for p in points] == [0.1, 0.05, 0.02]
  assert '5.000%' in capsys.readouterr().out


def test_budgets_that_are_not_listed_again_stay_in_the_table(
  swept, command, tmp_path
):
  folder = tmp_path / 'sweep'
  shutil.copytree(swept, folder)
  args = ['--workdir', str(folder), '--budgets', '0.02']
  assert cli.main([*command, *args]) == 0
  assert (folder / 'sweep.json').read_text() == (
    swept / 'sweep.json'
  ).read_text()


def test_a_signal_after_the_last_step_of_a_budget_is_not_lost(
  swept, command, tmp_path, monkeypatch, capsys
):
  ran = []

  def run(config, *_, ready, **__):
    ready()
    ran.append(config.budget)
    os.kill(os.getpid(), signal.SIGTERM)
    return json.loads((swept / 'budget-0.05/report.json').read_text())

  monkeypatch.setattr(experiment, 'run', run)
  args = ['--workdir', str(tmp_path / 'sweep'), '--budgets', '0.05,0.02']
  assert cli.main([*command, *args]) == 143
  assert ran == [0.05]
  assert 'stopped after 1 of 2 budgets; the same' in capsys.readouterr().err


def test_report_of_a_sweep_is_that_of_its_budgets(swept, tmp_path):
  out = tmp_path / 'page.html'
  assert cli.main(['report', str(swept), '--out', str(out)]) == 0
  content = out.read_text(encoding='utf-8')
  assert '2 runs compared' in content
  assert content.index('>budget-0.05<') < content.index('>budget-0.02<')


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--budgets', '0.02', '--set', 'seed=4'], 'differs in seed'),
    (['--budgets', '0.02,1e-7'], 'cannot be reached'),
    (['--budgets', '0.02', '--set', 'method=float'], 'has no budget to sweep'),
  ],
)
def test_sweeps_that_are_refused(swept, command, args, message, capsys):
  before = sorted(swept.rglob('*'))
  assert cli.main([*command, '--workdir', str(swept), *args]) == 2
  assert message in capsys.readouterr().err
  assert sorted(swept.rglob('*')) == before


@pytest.mark.parametrize('budgets', ['', '0.1,x', '2', '0,0.1', 'nan'])
def test_budgets_that_are_none(command, budgets, capsys):
  with pytest.raises(SystemExit):
    cli.main([*command, '--workdir', 'none', '--budgets', budgets])
  assert (
    'is no list of fractions of the float32 BOPs' in capsys.readouterr().err
  )
