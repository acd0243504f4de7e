"""The examples run as they stand, without a warning."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'
RESULTS = {
  'own_model.py': (
    r'conv2: \d+ of 48 channels, \d+ x \d+ bits',
    r'-> (\d+\.\d)% at 0\.9\d\d% of the BOPs',
  ),
  'linen_primitives.py': (
    r'Dense_1: \d+% of the inputs, \d+\.\d x \d+\.\d bits',
    r'(\d+\.\d)% at \d\.\d\d% of the BOPs',
  ),
}


@pytest.mark.parametrize('name', RESULTS)
def test_example(name):
  command = [sys.executable, '-W', 'error', str(EXAMPLES / name)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  layer, result = RESULTS[name]
  assert re.search(layer, done.stdout), done.stdout
  found = re.search(result, done.stdout)
  assert found, done.stdout
  assert float(found[1]) > 90
  assert not done.stderr


@pytest.mark.slow
def test_notebook(tmp_path):
  """Its cells run one after the other, as a script.

  A kernel would need packages that nothing else here does, and would not make
  a warning an error.
  """
  cells = _cells()
  script = tmp_path / 'one_layer.py'
  script.write_text('\n'.join(_source(c) for c in cells if _is_code(c)))
  command = [sys.executable, '-W', 'error', str(script)]
  environment = os.environ | {'MPLBACKEND': 'agg'}
  done = subprocess.run(
    command, capture_output=True, text=True, check=False, env=environment
  )
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  found = re.search(r'-> (\d+\.\d)% at 0\.(\d+)% of the BOPs', done.stdout)
  assert found, done.stdout
  assert float(found[1]) > 80
  assert int(found[2]) <= 300


def test_notebook_shows_its_results():
  cells = [cell for cell in _cells() if _is_code(cell)]
  assert [c['execution_count'] for c in cells] == [
    number + 1 for number in range(len(cells))
  ]
  outputs = [output for cell in cells for output in cell['outputs']]
  pictures = [o['data'] for o in outputs if 'image/png' in o.get('data', {})]
  assert len(pictures) > 6
  assert sum(len(p['image/png']) for p in pictures) * 3 / 4 < 200_000
  assert not [o for o in outputs if o['output_type'] == 'error']
  assert not [o for o in outputs if o.get('name') == 'stderr']


def _cells():
  return json.loads((EXAMPLES / 'one_layer.ipynb').read_text())['cells']


def _is_code(cell):
  return cell['cell_type'] == 'code'


def _source(cell):
  return ''.join(cell['source']) + '\n'


def test_all_examples_are_run():
  elsewhere = {'serve_onnx.py'}  # in export_test
  found = {path.name for path in EXAMPLES.glob('*.py')}
  assert found == RESULTS.keys() | elsewhere
