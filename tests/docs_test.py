"""Examples in the documents run, and their tables are those of the results."""

import doctest
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


DOCUMENTS = ['README.md', 'docs/method.md', 'docs/report.md']


@pytest.mark.parametrize('name', DOCUMENTS)
def test_examples_run(name):
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  failed, _ = doctest.testfile(
    str(ROOT / name), module_relative=False, optionflags=flags
  )
  assert failed == 0


def test_readme_has_examples():
  parser = doctest.DocTestParser()
  assert len(parser.get_examples((ROOT / 'README.md').read_text())) > 10


def test_examples_of_benchmarks_run(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  found = doctest.testmod(importlib.import_module('devices'))
  assert found.attempted
  assert not found.failed


@pytest.mark.parametrize('what', ['tables', 'pictures'])
def test_documents_are_those_of_the_results(what):
  command = [sys.executable, f'benchmarks/{what}.py', '--check']
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere():
  for path in [ROOT / 'README.md', *ROOT.glob('docs/**/*.md')]:
    for target in _links(path.read_text()):
      name, _, anchor = target.partition('#')
      found = path.parent / name if name else path
      assert found.exists(), f'{path.name}: {target}'
      if anchor:
        assert anchor in _anchors(found.read_text()), f'{path.name}: {target}'


def _links(text):
  for part in text.split('](')[1:]:
    target = part.split(')')[0]
    if '://' not in target:
      yield target


def _anchors(text):
  """Those of its headings."""
  for title in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
    yield re.sub(r'[^\w -]', '', title.lower()).strip().replace(' ', '-')
