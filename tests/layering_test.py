"""Who may import what: the arrows of the design, held true.

    config -> data -> float model -> compress -> train -> harden -> artifact

A new module needs a row in `TABLE`. A row that has to grow is a decision, not
an accident: say in the commit why the arrow is right.
"""

import ast
from collections.abc import Iterator
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

import djpq_jax

ROOT = pathlib.Path(djpq_jax.__file__).parent

ALLOCATION = 'allocate budget losses optim'


class Row(NamedTuple):
  """Modules, what they import of this package, and of other packages."""

  modules: str
  inside: str
  outside: str


# In dependency order. numpy stands where shapes and masks are worked out; ops
# and cost do without, so that all they need is JAX.
TABLE = (
  # Small helpers: packages that may be missing, whole files, looks inside.
  Row('packages machine', '', ''),
  Row('taps places', '', 'jax numpy'),
  # etils reaches object stores as orbax does.
  Row('files', 'packages', 'etils'),
  Row('stablehlo calls', '', 'jax'),
  Row('ops', '', 'jax'),
  Row('cost', '', 'jax'),
  Row('config', '', 'ml_collections'),
  # With cv2, simplejpeg, PIL and array_record, which decode.require imports.
  Row(
    'data',
    'packages machine files',
    'jax numpy grain sklearn tensorflow_datasets',
  ),
  Row('models', 'places', 'jax numpy flax.nnx safetensors'),
  Row('parallel', '', 'jax numpy flax.nnx'),
  Row('graph', 'calls places', 'jax numpy flax.nnx'),
  Row('layers', 'ops cost taps', 'jax numpy flax.nnx'),
  Row('compress', 'ops cost graph layers taps places', 'jax numpy flax.nnx'),
  Row(ALLOCATION, 'ops cost layers compress', 'jax numpy optax flax.nnx'),
  Row('harden', 'ops cost graph layers compress', 'jax numpy flax.nnx'),
  Row(
    'integer',
    'ops cost graph layers compress harden taps calls',
    'jax numpy flax.nnx',
  ),
  # Rebuilds a hardened model from a file, with what harden built it from.
  Row(
    'checkpoint',
    'ops cost graph layers compress harden integer files stablehlo',
    'jax numpy flax.nnx orbax',
  ),
  Row(
    'report',
    'harden integer cost packages files',
    'numpy rich matplotlib jinja2',
  ),
  # A model at rest, on data, on one device or on many.
  Row('evaluation', 'compress data parallel', 'jax numpy flax.nnx'),
  Row('speed', 'compress harden integer', 'jax numpy flax.nnx'),
  # With onnx and onnxruntime, which it imports when it needs them.
  # It runs the model and the file, so it stands after evaluation.
  Row(
    'export',
    'ops graph compress harden integer evaluation packages files machine '
    'stablehlo calls',
    'jax numpy flax.nnx',
  ),
  Row('train', 'ABOVE', 'jax numpy optax flax.nnx chex orbax'),
  Row('metrics', 'packages files', ''),
  # One experiment, from a config to a report: composition and nothing else.
  Row('experiment', 'ABOVE', 'jax numpy optax flax.nnx ml_collections'),
  # The folder of an experiment, and the signals that stop one.
  Row('workdir interruption', 'config files report', ''),
  Row('cli', 'ABOVE', 'jax numpy flax.nnx ml_collections rich'),
)


def _rules() -> dict[str, tuple[set[str], set[str]]]:
  rules: dict[str, tuple[set[str], set[str]]] = {}
  for row in TABLE:
    above = set(rules)
    inside = above if row.inside == 'ABOVE' else set(row.inside.split())
    for module in row.modules.split():
      # The other files of a folder are the module itself.
      rules[module] = inside | {module}, set(row.outside.split())
  # The public names. Nothing imports cli.
  rules['__init__'] = set(rules) - {'cli'}, set()
  return rules


RULES = _rules()


def _imports(tree: ast.AST, package: list[str]) -> Iterator[str]:
  """Dotted names of all that is imported, also inside functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) + 1 - node.level] if node.level else []
      prefix = '.'.join([*base, *([node.module] if node.module else [])])
      yield from (f'{prefix}.{alias.name}' for alias in node.names)


def _faults(source: str, path: pathlib.PurePath) -> list[str]:
  """What the file at this path, relative to the package, may not import."""
  module = path.parts[0].removesuffix('.py')
  inside, outside = RULES[module]
  package = ['djpq_jax', *path.parts[:-1]]
  faults = []
  for name in _imports(ast.parse(source), package):
    top, *rest = name.split('.')
    if top == 'djpq_jax':
      allowed = bool(rest) and rest[0] in inside
    else:
      allowed = top in sys.stdlib_module_names or any(
        f'{name}.'.startswith(f'{prefix}.') for prefix in outside
      )
    if not allowed:
      faults.append(name)
  return faults


FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob('*.py'))
# An installed wheel carries the experiments in here.
FILES = [path for path in FILES if path.parts[0] != 'configs']


@pytest.mark.parametrize('path', FILES, ids=str)
def test_arrows(path):
  module = path.parts[0].removesuffix('.py')
  assert module in RULES, f'{module} has no row in the table of this file'
  assert not _faults((ROOT / path).read_text(encoding='utf-8'), path)


@pytest.mark.parametrize(
  ('path', 'source', 'faults'),
  [
    ('ops/gate.py', 'import jax.numpy as jnp', []),
    ('ops/gate.py', 'import numpy', ['numpy']),
    ('ops/gate.py', 'import jaxlib', ['jaxlib']),
    ('ops/gate.py', 'def f():\n  import flax', ['flax']),
    ('ops/gate.py', 'from djpq_jax.ops import quantize', []),
    ('ops/gate.py', 'from . import quantize', []),
    ('ops/gate.py', 'from .. import cost', ['djpq_jax.cost']),
    ('ops/gate.py', 'from ..cost import bops', ['djpq_jax.cost.bops']),
    ('layers.py', 'from djpq_jax import ops, cost', []),
    ('layers.py', 'from djpq_jax import train', ['djpq_jax.train']),
    ('layers.py', 'import djpq_jax', ['djpq_jax']),
    ('layers.py', 'from flax import nnx', []),
    ('layers.py', 'from flax import linen', ['flax.linen']),
    ('train.py', 'from djpq_jax import cli', ['djpq_jax.cli']),
    ('train.py', 'from djpq_jax import configs', ['djpq_jax.configs']),
    ('train.py', 'from configs import digits', ['configs.digits']),
    ('cli.py', 'from djpq_jax import experiment, train', []),
    ('__init__.py', 'from djpq_jax import cli', ['djpq_jax.cli']),
  ],
)
def test_the_test_sees(path, source, faults):
  assert _faults(source, pathlib.PurePosixPath(path)) == faults


def test_ops_and_cost_need_jax_alone():
  """Users of other frameworks import them, with no flax on the machine."""
  code = 'import sys; import djpq_jax.ops, djpq_jax.cost\n'
  code += 'heavy = {"flax", "optax", "orbax", "tensorflow_datasets"}\n'
  code += 'print(sorted(heavy & set(sys.modules)))'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_every_folder_is_a_package():
  """A folder without __init__.py would be missing in the wheel."""
  folders = {(ROOT / path).parent for path in FILES}
  assert [d for d in folders if not (d / '__init__.py').is_file()] == []
