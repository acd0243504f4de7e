"""The report of one or several runs as one HTML page that needs no network.

The page is a file: its style, its script and its charts are inside, and a
content security policy in it forbids to load anything else.
"""

from collections.abc import Sequence
import functools
import os
import pathlib
from typing import Any

import jinja2

from djpq_jax import files
from djpq_jax.report import chart
from djpq_jax.report import page_facts

FILE_NAME = 'report.html'
_TEMPLATES = pathlib.Path(__file__).parent / 'templates'


def write_page(
  runs: Sequence[page_facts.Run], path: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes the page of one or several runs, whole or not at all.

  Args:
    runs: at least one; the order of the page.
    path: of the page; its folder is created if missing.

  Returns:
    The path.

  Raises:
    ValueError: there is no run, or two have the same name.
  """
  return files.replace(path, render(runs))


def render(runs: Sequence[page_facts.Run]) -> str:
  """The page as text, see `write_page`."""
  names = [run.name for run in runs]
  if not runs:
    raise ValueError('there is no run to report')
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(f'several runs have the name {", ".join(twice)}')
  source = lambda name: (_TEMPLATES / name).read_text(encoding='utf-8')
  return (
    _environment()
    .get_template('page.html')
    .render(
      runs=[page_facts.of_run(run, f'run{i}') for i, run in enumerate(runs)],
      comparison=page_facts.of_runs(runs) if len(runs) > 1 else None,
      size=chart,
      # Both are files of this package, and part of the page as they are.
      style=source('page.css'),
      script=source('page.js'),
    )
  )


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['tips'] = _tips
  environment.filters['units'] = _units
  return environment


def _tips(drawn: chart.Chart) -> list[list[Any]]:
  """What the script needs of a chart's tips, as JSON."""
  return [[tip.x, tip.y, tip.text] for tip in drawn.tips]


def _units(sentence: str) -> str:
  """Keeps numbers and their signs in one line."""
  return sentence.replace(' %', '\u00a0%')
