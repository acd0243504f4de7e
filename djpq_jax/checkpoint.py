"""The hardened model on disk: a manifest anybody can read, and packed arrays.

A folder::

    artifact/
      manifest.json   what it is: layers, bits, channels, totals, accuracy
      arrays/         orbax: one array of all integers, packed at their bit
                      width, and one of all floats

Nothing in it is executed on load: JSON and numbers only.
"""

from collections.abc import Mapping
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from djpq_jax import compress
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import layers

FORMAT = 'djpq_jax hardened model'
VERSION = 2
KEYS = {'model', 'input_shape', 'totals', 'layers', 'signed_inputs', 'reasons'}
KEYS |= {'plan', 'arrays', 'sha256', 'provenance'}
PACKED = 'packed'  # the array of all integers


class ArtifactError(ValueError):
  """An artifact cannot be read; the message says why in one sentence."""


def pack(values: np.ndarray, bits: int) -> np.ndarray:
  """Packs signed integers at `bits` bits each, lowest bit first.

  Args:
    values: integers in [-2**(bits-1), 2**(bits-1)), any shape.
    bits: 2 to 16.

  Returns:
    uint8 [ceil(values.size * bits / 8)].

  >>> pack(np.array([1, -1, 0, 1]), 2).tolist()
  [231]
  """
  shifted = np.ravel(values).astype(np.int64) + 2 ** (bits - 1)
  if shifted.size and not 0 <= shifted.min() <= shifted.max() < 2**bits:
    raise ValueError(f'values do not fit {bits} signed bits')
  digits = (shifted[:, None] >> np.arange(bits)) & 1
  return np.packbits(digits.astype(np.uint8).ravel(), bitorder='little')


def unpack(packed: np.ndarray, bits: int, shape) -> np.ndarray:
  """Undoes `pack`: int8 (int16 above 8 bits) of `shape`."""
  size = int(np.prod(shape))
  flat = np.unpackbits(packed, count=size * bits, bitorder='little')
  digits = flat.reshape(size, bits).astype(np.int64)
  values = (digits << np.arange(bits)).sum(axis=1) - 2 ** (bits - 1)
  return values.astype(np.int8 if bits <= 8 else np.int16).reshape(shape)


def save(
  folder,
  model: harden.HardenedModel,
  rows: list[harden.LayerReport],
  *,
  model_spec: Mapping[str, Any],
  input_shape,
  more: Mapping[str, Any] | None = None,
) -> None:
  """Writes an artifact; an existing one is replaced only once all is written.

  Args:
    folder: where to.
    model: what to write.
    rows: its count, from `harden.count`.
    model_spec: {'name', 'kwargs'} for `models.create` of the dense model.
    input_shape: of one example, as (8, 8, 1).
    more: further JSON-ready facts for the manifest, as accuracy.
  """
  folder = pathlib.Path(folder).absolute()
  # Few arrays, for each costs hundreds of bytes on disk.
  parts: dict[str, list[np.ndarray]] = {}
  entries: dict[str, dict[str, Any]] = {}
  bits = {row.name: row.weight_bits for row in rows}
  for key, variable in nnx.to_flat_state(nnx.state(model)):
    name = '/'.join(map(str, key))
    value = np.asarray(variable[...])
    if isinstance(variable, layers.IntegerParam):
      width = bits[name.removeprefix('model/').removesuffix('/kernel')]
      entries[name] = {'shape': list(value.shape), 'bits': width}
      parts.setdefault(PACKED, []).append(pack(value, width))
    else:
      entries[name] = {'shape': list(value.shape), 'dtype': str(value.dtype)}
      parts.setdefault(str(value.dtype), []).append(value.ravel())
  arrays = {name: np.concatenate(found) for name, found in parts.items()}
  manifest = {
    'format': FORMAT,
    'version': VERSION,
    'model': dict(model_spec),
    'input_shape': list(input_shape),
    **(more or {}),
    'provenance': {
      name: importlib.metadata.version(name)
      for name in ('djpq-jax', 'jax', 'flax')
    },
    'totals': harden.totals(model, rows),
    'layers': [vars(row) for row in rows],
    'signed_inputs': _signed(model),
    'reasons': {g.name: g.reason for g in model.structure.groups if g.reason},
    'plan': model.structure.plan.to_json(),
    'arrays': entries,
  }
  _write(folder, manifest, arrays)


def _signed(model) -> dict[str, bool]:
  return {
    hook.path: hook.operands.act.signed
    for hook in compress.hooks(model)
    if isinstance(hook.operands.act, harden.FixedQuantizer)
  }


def _hash(manifest: Mapping[str, Any], folder: pathlib.Path) -> str:
  """Of the manifest and of all array files; those of file managers aside."""
  said = {k: v for k, v in manifest.items() if k != 'sha256'}
  digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
  for path in sorted(folder.rglob('[!.]*')):
    if path.is_file():
      content = path.read_bytes()
      name = path.relative_to(folder).as_posix()
      digest.update(f'{name} {len(content)}\n'.encode())
      digest.update(content)
  return digest.hexdigest()


def _write(folder: pathlib.Path, manifest, arrays) -> None:
  partial = folder.with_name(folder.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  this = jax.process_index()  # of many processes, the one that writes
  alone = ocp.options.MultiprocessingOptions(
    primary_host=this,
    active_processes={this} if jax.process_count() > 1 else None,
    barrier_sync_key_prefix='artifact' if jax.process_count() > 1 else None,
  )
  with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
    checkpointer.save(partial / 'arrays', arrays)
  manifest = {**manifest, 'sha256': _hash(manifest, partial / 'arrays')}
  (partial / 'manifest.json').write_text(_to_text(manifest) + '\n')
  if folder.exists():
    shutil.rmtree(folder)
  os.replace(partial, folder)


def _to_text(value, depth: int = 2, indent: str = '') -> str:
  """JSON with one line for each layer, array and group."""
  if not depth or not isinstance(value, dict | list) or not value:
    return json.dumps(value, allow_nan=False)
  inner = indent + ' '
  if isinstance(value, dict):
    items = [
      f'{json.dumps(k)}: {_to_text(v, depth - 1, inner)}'
      for k, v in value.items()
    ]
    first, last = '{', '}'
  else:
    items = [_to_text(v, depth - 1, inner) for v in value]
    first, last = '[', ']'
  lines = f',\n{inner}'.join(items)
  return f'{first}\n{inner}{lines}\n{indent}{last}'


def read_manifest(folder) -> dict[str, Any]:
  """Reads and checks an artifact's manifest.

  Raises:
    ArtifactError: there is none, it is damaged, foreign or from a newer
      version.
  """
  path = pathlib.Path(folder) / 'manifest.json'
  try:
    manifest = json.loads(path.read_text())
  except FileNotFoundError:
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
  if version < VERSION:
    raise ArtifactError(
      f'{folder} has format version {version}, which this djpq_jax no longer '
      'reads; train it again, or take an older djpq_jax'
    )
  missing = sorted(KEYS - manifest.keys())
  if missing:
    raise ArtifactError(f'{path} is damaged: it lacks {", ".join(missing)}')
  return manifest


def load(folder, dense) -> harden.HardenedModel:
  """Reads an artifact.

  Args:
    folder: where `save` wrote it.
    dense: a function of no arguments that makes the dense model, for example
      `lambda: models.create('digits_cnn')`; only its shapes are used.

  Returns:
    The hardened model, bit for bit the one that was saved.

  Raises:
    ArtifactError: anything is missing, damaged or does not fit the model.
  """
  manifest = read_manifest(folder)
  arrays = pathlib.Path(folder).absolute() / 'arrays'
  if not arrays.is_dir():
    raise ArtifactError(f'{folder} is incomplete: it has no arrays')
  if _hash(manifest, arrays) != manifest['sha256']:
    raise ArtifactError(
      f'{folder} was altered or is incomplete: its files do not have the hash '
      'that the manifest states'
    )
  values = _read_arrays(arrays)
  try:
    return _filled(_skeleton(manifest, dense), manifest['arrays'], values)
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise ArtifactError(
      f'{folder} does not fit the model: {_first_line(error)}'
    ) from error


def _filled(model, entries, arrays) -> harden.HardenedModel:
  """The model with arrays in place of shapes."""
  values = {}
  done = dict.fromkeys(arrays, 0)
  for name, entry in entries.items():
    kind = PACKED if 'bits' in entry else entry['dtype']
    size = int(np.prod(entry['shape']))
    if 'bits' in entry:
      size = -(-size * entry['bits'] // 8)
    value = arrays[kind][done[kind] : done[kind] + size]
    done[kind] += size
    if 'bits' in entry:
      value = unpack(value, entry['bits'], entry['shape'])
    values[name] = jnp.asarray(value.reshape(entry['shape']))
  graphdef, state = nnx.split(model)
  flat = [('/'.join(map(str, k)), k, v) for k, v in nnx.to_flat_state(state)]
  different = {name for name, _, _ in flat} ^ values.keys()
  different |= {
    name
    for name, _, variable in flat
    # A step or a scale has no shape before it is read.
    if name in values and not isinstance(variable, harden.Constant)
    if variable.shape != values[name].shape
  }
  if different:
    raise ValueError(f'they differ in {", ".join(sorted(different)[:3])}')
  filled = [(key, values[name]) for name, key, _ in flat]
  return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      target = {k: np.empty(v.shape, v.dtype) for k, v in tree.items()}
      restored = checkpointer.restore(path, target)
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ArtifactError(f'{path} is damaged: {_first_line(error)}') from error
  return {k: np.asarray(v) for k, v in restored.items()}


def _skeleton(manifest, dense) -> harden.HardenedModel:
  """The hardened model with shapes in place of arrays."""
  plan = compress.Plan.from_json(manifest['plan'])
  model = compress.eval_view(nnx.eval_shape(dense))
  shape = (2, *manifest['input_shape'])
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  graph = graph_lib.trace(model, x)
  groups = tuple(
    compress.GroupSettings(
      name=g.name,
      size=g.size,
      align=1,
      min_channels=1,
      reason=manifest['reasons'].get(g.name, ''),
    )
    for g in graph.groups
  )
  quantized = set(manifest['signed_inputs'])
  settings = {
    p: compress.LayerSettings(quantize=p in quantized) for p in graph.layers
  }
  structure = compress.Structure(graph, settings, groups, plan)
  inner = graph_lib.slice_channels(model, graph, dict(plan.open))
  empty = jax.ShapeDtypeStruct((), jnp.float32)
  gates = [harden.Scales(empty) for _ in structure.gated]
  compress.attach_operands(
    inner,
    structure,
    weight=lambda path: (
      harden.Dequantizer(empty) if path in quantized else None
    ),
    act=lambda path: (
      harden.FixedQuantizer(
        empty, empty, signed=manifest['signed_inputs'][path]
      )
      if path in quantized
      else None
    ),
  )
  hardened = harden.HardenedModel(inner, gates, structure)
  for hook in compress.hooks(hardened):
    if hook.path in quantized:
      hook.layer.kernel = layers.IntegerParam(hook.layer.kernel.get_value())
  return hardened


def size_bytes(folder) -> int:
  """Bytes of all files of an artifact."""
  files = pathlib.Path(folder).rglob('*')
  return sum(f.stat().st_size for f in files if f.is_file())
