"""The examples run as they stand, without a warning."""

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


def test_all_examples_are_run():
  elsewhere = {'serve_onnx.py'}  # in export_test
  found = {path.name for path in EXAMPLES.glob('*.py')}
  assert found == RESULTS.keys() | elsewhere
