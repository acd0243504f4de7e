"""The manifest of an artifact: what it is, for people and for `load`."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np

from djpq_jax import files
from djpq_jax.checkpoint import index
from djpq_jax.checkpoint import program

FORMAT = 'djpq_jax hardened model'
VERSION = 8
OLDEST = 4  # that is read, see `older`
# What is always there, and of which kind.
PARTS: dict[str, Any] = {
  'model': dict,
  'input_shape': list,
  'totals': dict,
  'layers': list,
  'float_layers': dict,
  'provenance': dict,
  'program': str,
  'sha256': str,
}
# Facts that need not be there; of others, any JSON will do.
FACTS: dict[str, Any] = {
  'accuracy': int | float,
  'measured_on': dict,
  'license': str,
}
MEASURED_ON: dict[str, Any] = {'data': str, 'kwargs': dict, 'images': int}
FILE_NAME = 'manifest.json'


class ArtifactError(ValueError):
  """An artifact cannot be read; the message says why in one sentence."""


def read(folder) -> dict[str, Any]:
  """Reads an artifact's manifest; the hash that it states is not checked.

  Raises:
    ArtifactError: there is none, it is damaged, foreign or from a newer
      version.
  """
  path = files.path(folder) / FILE_NAME
  try:
    manifest = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    if files.path(folder).is_file():
      raise ArtifactError(
        f'{folder} is a file, not the folder of an artifact'
      ) from None
    raise ArtifactError(
      f'{folder} is no artifact: it has no manifest.json'
    ) from None
  except (OSError, ValueError) as error:
    raise ArtifactError(f'{path} is damaged: {error}') from None
  if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
    raise ArtifactError(f'{path} was not written by djpq_jax')
  version = manifest.get('version')
  if not isinstance(version, int) or version > VERSION:
    raise ArtifactError(
      f'{folder} has format version {version}, this djpq_jax '
      f'reads up to {VERSION}; update djpq_jax'
    )
  if version < OLDEST:
    raise ArtifactError(
      f'{folder} has format version {version}, which this djpq_jax no longer '
      'reads; train it again, or take an older djpq_jax'
    )
  fault = problem(manifest)
  if fault:
    raise ArtifactError(f'{path} is damaged: {fault}')
  return manifest


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
  """Facts as JSON holds them; arrays become lists, or numbers.

  Raises:
    ValueError: says what JSON cannot hold.
  """
  held = {}
  for name, value in facts.items():
    try:
      text = json.dumps(value, allow_nan=False, default=_listed)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f'its {name} is nothing that JSON can hold: {str(value)[:80]}'
      ) from error
    held[name] = json.loads(text)
  return held


def _listed(value: Any) -> Any:
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    return np.asarray(value).tolist()
  raise TypeError


def problem(manifest: Mapping[str, Any]) -> str:
  """What keeps this from being a manifest, as the end of a sentence; or ''."""
  missing = sorted(PARTS.keys() - manifest.keys())
  if missing:
    return f'it lacks {", ".join(missing)}'
  wrong = _wrong(manifest, PARTS | FACTS)
  wrong = wrong or _wrong(manifest.get('measured_on', {}), MEASURED_ON)
  if not wrong and not isinstance(manifest['model'].get('name'), str):
    return 'its model has no name'
  return wrong


def _wrong(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
  for name, kind in kinds.items():
    if name in values and not isinstance(values[name], kind):
      return f'its {name} cannot be {json.dumps(values[name])[:40]}'
  return ''


def to_text(value, depth: int = 2, indent: str = '') -> str:
  """JSON with one line for each layer."""
  if not depth or not isinstance(value, dict | list) or not value:
    return json.dumps(value, allow_nan=False)
  inner = indent + ' '
  if isinstance(value, dict):
    items = [
      f'{json.dumps(k)}: {to_text(v, depth - 1, inner)}'
      for k, v in value.items()
    ]
    first, last = '{', '}'
  else:
    items = [to_text(v, depth - 1, inner) for v in value]
    first, last = '[', ']'
  lines = f',\n{inner}'.join(items)
  return f'{first}\n{inner}{lines}\n{indent}{last}'


def content_hash(manifest: Mapping[str, Any], folder: pathlib.Path) -> str:
  """Of the manifest, index, arrays and program; nothing else belongs to it."""
  said = {k: v for k, v in manifest.items() if k != 'sha256'}
  digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
  arrays = (folder / 'arrays').rglob('[!.]*')  # not what file managers leave
  others = [folder / index.FILE_NAME, folder / program.FILE_NAME]
  for path in [*sorted(arrays), *others]:
    if path.is_file():
      content = path.read_bytes()
      name = path.relative_to(folder).as_posix()
      digest.update(f'{name} {len(content)}\n'.encode())
      digest.update(content)
  return digest.hexdigest()


def spec(dtype: str, shape) -> str:
  """An array as the manifest says it.

  >>> spec('packed int3', (3, 3, 16, 32))
  'packed int3[3,3,16,32]'
  """
  return f'{dtype}[{",".join(map(str, shape))}]'


def read_spec(text: str) -> tuple[str, tuple[int, ...]]:
  """Undoes `spec`.

  >>> read_spec('float32[]')
  ('float32', ())
  """
  dtype, _, sizes = text.removesuffix(']').partition('[')
  return dtype, tuple(int(size) for size in sizes.split(',') if size)
