"""The file survives a round trip, bad files are named, pictures are drawn."""

import copy
import io
import json
import math
import pathlib
import struct
import subprocess
import sys

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import rich.console
import sample_report

from djpq_jax import report as report_lib


@pytest.fixture
def report():
  return sample_report.make()


def _printed(report, width=80):
  out = io.StringIO()
  console = rich.console.Console(file=out, width=width)
  report_lib.print_report(report, console)
  return out.getvalue()


def test_round_trip(report, tmp_path):
  path = report_lib.write(report, tmp_path / 'new' / 'folder')
  assert path == tmp_path / 'new' / 'folder' / 'report.json'
  expected = json.loads(json.dumps(report))
  read = report_lib.read(path.parent)
  assert read.pop('relative_bops') == pytest.approx(
    expected.pop('relative_bops'), rel=1e-8
  )
  assert read == expected
  assert report_lib.read(path) == report_lib.read(path.parent)


def test_accepts_what_training_hands_over(report, tmp_path):
  report |= dict(
    accuracy=np.float32(0.75),
    float_accuracy=jnp.asarray(0.875),
    bops=np.int64(2**60 + 1),
    artifact=pathlib.Path('runs', 'a'),
    config=ml_collections.ConfigDict({'lr': 0.1, 'betas': (0.9, 0.99)}),
  )
  read = report_lib.read(report_lib.write(report, tmp_path))
  assert read['accuracy'] == 0.75
  assert read['float_accuracy'] == 0.875
  assert read['bops'] == 2**60 + 1
  assert read['artifact'] == 'runs/a'
  assert read['config'] == {'lr': 0.1, 'betas': [0.9, 0.99]}


def test_file_is_readable(report, tmp_path):
  report['history'][0]['loss'] = float(np.float32(0.1))
  lines = report_lib.write(report, tmp_path).read_text().splitlines()
  assert lines[1] == '  "config": {'
  assert any(line.startswith('    {"name": "conv2"') for line in lines)
  keys = list(report_lib.read(tmp_path))
  assert keys[-3:] == ['layers', 'groups', 'history']
  # One line per record, and nine digits tell every float32 apart.
  assert '"loss": 0.100000001, ' in next(l for l in lines if '"step": 0' in l)
  assert len(lines) < 50


@pytest.mark.parametrize('bad', [math.nan, math.inf, np.float32('nan')])
def test_a_number_that_is_none_is_named(report, tmp_path, bad):
  report_lib.write(report, tmp_path)
  before = (tmp_path / 'report.json').read_bytes()
  broken = copy.deepcopy(report)
  broken['history'][3]['loss'] = bad
  with pytest.raises(ValueError, match=r'report\.history\[3\]\.loss is'):
    report_lib.write(broken, tmp_path)
  # The older report stands, and no half-written file lies beside it.
  assert (tmp_path / 'report.json').read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 1


def test_write_names_missing_keys(report, tmp_path):
  del report['budget'], report['seed']
  with pytest.raises(ValueError, match='lacks seed, budget'):
    report_lib.write(report, tmp_path)
  with pytest.raises(TypeError, match=r'report\.config is a object'):
    report_lib.write(report | {'config': object()}, tmp_path)


def test_read_without_report(tmp_path):
  with pytest.raises(FileNotFoundError, match='no report in'):
    report_lib.read(tmp_path)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'truncated or not JSON'),
    (b'\xff\xfe\x00', 'truncated or not JSON'),
    (b'{"accuracy": NaN}', 'truncated or not JSON: NaN'),
    (b'[1, 2]', 'is not a report: it holds a list'),
    (b'{"name": "something", "version": 3}', 'is not a report: it lacks'),
  ],
)
def test_read_foreign_file(tmp_path, content, message):
  (tmp_path / 'report.json').write_bytes(content)
  with pytest.raises(ValueError, match=message) as info:
    report_lib.read(tmp_path)
  assert str(tmp_path) in str(info.value)


def test_read_truncated(report, tmp_path):
  path = report_lib.write(report, tmp_path)
  path.write_text(path.read_text()[:-40])
  with pytest.raises(ValueError, match=r'truncated or not JSON: .* line'):
    report_lib.read(tmp_path)


def test_read_names_the_bad_layer(report, tmp_path):
  path = report_lib.write(report, tmp_path)
  content = json.loads(path.read_text())
  del content['layers'][1]['bops']
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="lacks bops in layer 'conv2'"):
    report_lib.read(tmp_path)
  path.write_text(json.dumps(content | {'layers': 'conv1'}))
  with pytest.raises(ValueError, match='layers that are not a list'):
    report_lib.read(tmp_path)


@pytest.mark.parametrize(
  ('where', 'key', 'value', 'message'),
  [
    (
      (),
      'float_accuracy',
      '0.9',
      'has "0.9" for float_accuracy, which is no n',
    ),
    ((), 'accuracy', None, 'has null for accuracy, which is no number'),
    ((), 'bops', [1], r'has \[1\] for bops, which is no number'),
    ((), 'artifact', 3, 'has 3 for artifact, which is no text'),
    ((), 'budget', 'small', 'has "small" for budget, which is no number'),
    ((), 'float_bytes', {}, r'has \{\} for float_bytes, which is no number'),
    ((), 'budgets', None, 'has budgets that are not a record'),
    ((), 'budgets', {'macs': '1'}, 'has "1" for the budget of macs'),
    ((), 'budgets', {'joules': 1.0}, 'has 1.0 for the budget of joules'),
    ((), 'budgets', {'macs': 0.5}, 'lacks relative_macs, which has a budget'),
    ((), 'groups', 'conv', 'has groups that are not a list of records'),
    (('layers', 1), 'weight_bits', '3', "which is no number in layer 'conv2'"),
    (
      ('layers', 1),
      'name',
      None,
      'has null for name, which is no text in layer',
    ),
    (('layers', 0), 'in_size', 'x', "in_size, which is no number in layer 'co"),
    (('groups', 2), 'kept', None, "kept, which is no number in group 'image'"),
    (('groups', 2), 'reason', 3, "reason, which is no text in group 'image'"),
    (('history', 3), 'loss', 'x', 'loss, which is no number in history 3'),
    (('history', 3), 'step', None, 'step, which is no number in history 3'),
  ],
)
def test_values_of_another_kind(report, tmp_path, where, key, value, message):
  path = report_lib.write(report, tmp_path)
  part = report
  for name in where:
    part = part[name]
  part[key] = value
  with pytest.raises(ValueError, match=message):
    report_lib.write(report, tmp_path)
  path.write_text(json.dumps(report))
  with pytest.raises(ValueError, match=message) as info:
    report_lib.read(tmp_path)
  assert str(info.value).startswith(f'{path} is not a report: it ')


@pytest.mark.parametrize(
  ('where', 'key'), [('groups', 'size'), ('history', 'step')]
)
def test_read_names_the_bad_record(report, tmp_path, where, key):
  path = report_lib.write(report, tmp_path)
  del report[where][1][key]
  path.write_text(json.dumps(report))
  with pytest.raises(ValueError, match=f'lacks {key} in {where[:-1]}'):
    report_lib.read(tmp_path)


PRINTED = """\
                             Wgt   Act                    BOPs
Layer     Inputs   Outputs  bits  bits    MACs    BOPs   share
──────────────────────────────────────────────────────────────
conv1     1 of 1  10 of 32     4     8  5.76 k   184 k  18.1 %
conv2   10 of 32  16 of 64     3     3  92.2 k   829 k  81.6 %
fc      16 of 64  10 of 10     4     4     160  2.56 k   0.3 %

total                                   98.1 k  1.02 M   100 %

Not pruned: fc (output of the model)
Not pruned: image (input of the model)

                       float32  hardened
──────────────────────────────────────────────────────
accuracy               98.99 %   98.49 %  -0.50 points
MACs                    1.20 M    98.1 k   12.2x fewer
bit operations (BOPs)   1.23 G    1.02 M   1210x fewer
size                   78.0 kB   12.3 kB  6.3x smaller

BOPs: 0.0828 % of float32 (1210x fewer), budget 0.2 %
seed 0, 102 seconds; accuracy and BOPs are those of the reloaded file
"""


def test_printed_report(report):
  lines = [line.rstrip() for line in _printed(report).splitlines()]
  assert lines == PRINTED.splitlines()


def test_long_names_fold_at_80_columns(report):
  name = 'encoder.stages.3.blocks.11.shortcut.projection.conv'
  report['layers'][0]['name'] = name
  lines = _printed(report).splitlines()
  assert max(map(len, lines)) <= 80
  column = ''.join(line.split('  ')[0].strip() for line in lines[2:8])
  assert name in column


def test_names_are_no_markup(report):
  report['layers'][0]['name'] = '[red]x[/]'
  report['groups'][1]['name'] = '[bold]y[/]'
  printed = _printed(report)
  assert '[red]x[/]' in printed
  assert '[bold]y[/]' in printed


def test_optional_parts_may_lack(report):
  for key in ('float_bytes', 'groups', 'history'):
    del report[key]
  for layer in report['layers']:
    for key in ('in_size', 'out_size', 'float_macs'):
      del layer[key]
  printed = _printed(report | {'budget': None})
  assert 'budget' not in printed
  assert 'Not pruned' not in printed
  assert ' of 32' not in printed


def _png_size(path):
  head = path.read_bytes()[:24]
  assert head[:8] == b'\x89PNG\r\n\x1a\n'
  return struct.unpack('>II', head[16:])


def test_plot_layers(report, tmp_path):
  path = report_lib.plot_layers(report, tmp_path / 'new' / 'layers.png')
  width, height = _png_size(path)
  assert width == 1600
  report['layers'] *= 10
  _, taller = _png_size(report_lib.plot_layers(report, path))
  assert taller > 2 * height


def test_plot_layers_without_optional_keys(report, tmp_path):
  for layer in report['layers']:
    for key in ('in_size', 'out_size', 'float_macs'):
      del layer[key]
  _png_size(report_lib.plot_layers(report, tmp_path / 'layers.png'))


@pytest.mark.parametrize('length', [1, 2, 6])
def test_plot_curves(report, tmp_path, length):
  report['history'] = report['history'][:length]
  path = report_lib.plot_curves(report, tmp_path / 'curves.png')
  assert _png_size(path)[0] == 1600


def test_plot_curves_of_one_phase_without_names(report, tmp_path):
  report['history'] = [dict(step=s, accuracy=0.1 * s) for s in range(5)]
  report['budget'] = None
  _png_size(report_lib.plot_curves(report, tmp_path / 'curves.png'))


def test_plot_curves_without_history(report, tmp_path):
  with pytest.raises(ValueError, match='no history'):
    report_lib.plot_curves(report | {'history': []}, tmp_path / 'curves.png')


def test_without_matplotlib(report, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  for plot in (report_lib.plot_layers, report_lib.plot_curves):
    with pytest.raises(ImportError, match=r"pip install 'djpq-jax\[demo\]'"):
      plot(report, tmp_path / 'x.png')


def test_no_global_state(report, tmp_path):
  """Neither pyplot nor, before the first picture, matplotlib is imported."""
  code = """if True:
    import sys
    from djpq_jax import report
    assert 'matplotlib' not in sys.modules
    report.plot_curves(report.read(sys.argv[1]), sys.argv[1] + '/x.png')
    assert 'matplotlib.pyplot' not in sys.modules
  """
  report_lib.write(report, tmp_path)
  subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True)
