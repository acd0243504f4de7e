"""The hardened model on disk: a manifest anybody can read, and packed arrays.

A folder::

    artifact/
      manifest.json   what it is: layers, bits, channels, totals, accuracy
      index.xz        names and shapes of all arrays, the plan, as JSON
      arrays/         orbax: one array of all integers, packed, and one of all
                      floats; both are entropy coded
      program.xz      what computes with them, as StableHLO

`load` gives the model, if its Python class is at hand; it takes JSON and
numbers alone.  `load_program` needs no class.  Nothing of the files runs before
a program is called, and then it is XLA's operations alone.  JAX promises to
read a program for six months; arrays and manifest do not age.
"""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.metadata
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from djpq_jax import compress
from djpq_jax import files
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import layers
from djpq_jax.checkpoint import index as index_lib
from djpq_jax.checkpoint import manifest as manifest_lib
from djpq_jax.checkpoint import packing
from djpq_jax.checkpoint import program as program_lib
from djpq_jax.checkpoint.manifest import ArtifactError
from djpq_jax.checkpoint.program import Program

__all__ = [
  'ArtifactError',
  'Program',
  'load',
  'load_program',
  'read_manifest',
  'save',
  'size_bytes',
]

PACKED = 'packed'  # the array of all integers


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
    model_spec: {'name', 'kwargs'} of the dense model: for `models.create`, or
      any other name, by which people know a class of their own.
    input_shape: of one example, as (8, 8, 1).
    more: further JSON-ready facts for the manifest, as accuracy.

  Raises:
    ValueError: one of them is not what its name says, as accuracy='high'.
  """
  # Few arrays, for each costs hundreds of bytes on disk.
  parts: dict[str, list[np.ndarray]] = {}
  entries: dict[str, str] = {}
  bits = {row.name: row.weight_bits for row in rows}
  stored = program_lib.names(model)
  values = []
  for key, variable in nnx.to_flat_state(nnx.state(model)):
    name = '/'.join(map(str, key))
    if name not in stored:
      continue
    value, width = np.asarray(variable[...]), 0
    if isinstance(variable, layers.IntegerParam):
      width = bits[name.removeprefix('model/').removesuffix('/kernel')]
    values.append((width, name, value))
  # Of one width side by side: they share the codes of their bytes.
  for width, name, value in sorted(values, key=lambda v: v[:2]):
    if width:
      entries[name] = manifest_lib.spec(f'{PACKED} int{width}', value.shape)
      parts.setdefault(PACKED, []).append(packing.pack(value, width))
    else:
      entries[name] = manifest_lib.spec(str(value.dtype), value.shape)
      parts.setdefault(str(value.dtype), []).append(value.ravel())
  arrays = {name: np.concatenate(found) for name, found in parts.items()}
  code, reason = program_lib.serialized(model, input_shape)
  manifest = {
    'format': manifest_lib.FORMAT,
    'version': manifest_lib.VERSION,
    'model': dict(model_spec),
    'input_shape': list(input_shape),
    **(more or {}),
    'provenance': {
      name: importlib.metadata.version(name)
      for name in ('djpq-jax', 'jax', 'flax')
    },
    'totals': harden.totals(model, rows),
    'layers': [vars(row) for row in rows],
    'float_layers': integer.left_float(model),
    'program': reason or program_lib.FILE_NAME,
  }
  fault = manifest_lib.problem(manifest | {'sha256': ''})
  if fault:
    raise ValueError(f'{folder} cannot be written: {fault}')
  index = {
    'signed_inputs': _signed(model),
    'reasons': {g.name: g.reason for g in model.structure.groups if g.reason},
    'plan': model.structure.plan.to_json(),
    'arrays': entries,
  }
  with files.to_write(
    files.absolute(files.path(folder)), manifest_lib.FILE_NAME
  ) as partial:
    _write(partial, manifest, index, arrays, code)


def _signed(model) -> dict[str, bool]:
  return {
    hook.path: hook.operands.act.signed
    for hook in compress.hooks(model)
    if isinstance(hook.operands.act, harden.FixedQuantizer)
  }


def _write(
  folder: pathlib.Path, manifest, index, arrays, code: bytes | None
) -> None:
  this = jax.process_index()  # of many processes, the one that writes
  alone = ocp.options.MultiprocessingOptions(
    primary_host=this,
    active_processes={this} if jax.process_count() > 1 else None,
    barrier_sync_key_prefix='artifact' if jax.process_count() > 1 else None,
  )
  with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
    checkpointer.save(folder / 'arrays', arrays)
  index_lib.write(folder, index)
  if code is not None:
    (folder / program_lib.FILE_NAME).write_bytes(code)
  sha256 = manifest_lib.content_hash(manifest, folder)
  text = manifest_lib.to_text({**manifest, 'sha256': sha256})
  (folder / manifest_lib.FILE_NAME).write_text(text + '\n')


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
  manifest, arrays = _read(folder)
  try:
    values = _unpacked(manifest['arrays'], arrays)
    return _filled(_skeleton(manifest, dense), values)
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise ArtifactError(
      f'{folder} does not fit the model: {_first_line(error)}'
    ) from error


def load_program(folder) -> program_lib.Program:
  """Reads an artifact without the class that its model was made of.

  Args:
    folder: where `save` wrote it.

  Returns:
    What computes the logits; it runs the integers as `integer.lower(model,
    'simulated')` does, on CPU, GPU or TPU.

  Raises:
    ArtifactError: anything is missing or damaged, or it holds no program.
  """
  manifest, arrays = _read(folder)
  if manifest['program'] != program_lib.FILE_NAME:
    raise ArtifactError(f'{folder} has no program: {manifest["program"]}')
  path = files.path(folder) / program_lib.FILE_NAME
  try:
    values = _unpacked(manifest['arrays'], arrays)
    return program_lib.Program(path.read_bytes(), values)
  except Exception as error:  # of many kinds, for what may be in such a file
    raise ArtifactError(
      f'the program of {folder}, written with jax '
      f'{manifest["provenance"].get("jax")}, cannot be read: '
      f'{_first_line(error)}'
    ) from error


def read_manifest(folder) -> dict[str, Any]:
  """Reads an artifact's manifest, and its other files for their hash alone.

  Args:
    folder: where `save` wrote it.

  Returns:
    What `manifest.json` says, which is what was written: neither it nor any
    other file of the artifact was altered since.

  Raises:
    ArtifactError: anything is missing or damaged, or foreign, or from another
      version.
  """
  with _whole(folder) as (manifest, _):
    return manifest


@contextlib.contextmanager
def _whole(folder) -> Iterator[tuple[dict[str, Any], pathlib.Path]]:
  """The manifest, and where the files are, once the hash of all is right."""
  manifest = manifest_lib.read(folder)
  with files.to_read(files.path(folder)) as here:
    if not (here / 'arrays').is_dir():
      raise ArtifactError(f'{folder} is incomplete: it has no arrays')
    try:
      found = manifest_lib.content_hash(manifest, here)
    except OSError as error:
      raise ArtifactError(f'{folder} cannot be read: {error}') from error
    if found != manifest['sha256']:
      raise ArtifactError(
        f'{folder} was altered or is incomplete: its files do not have the '
        'hash that the manifest states'
      )
    yield manifest, here


def _read(folder) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Manifest with index, and the arrays, once the hash of all is right."""
  with _whole(folder) as (manifest, here):
    try:
      manifest |= index_lib.read(here)
    except (OSError, ValueError) as error:
      raise ArtifactError(
        f'{folder}/{index_lib.FILE_NAME} is damaged: {_first_line(error)}'
      ) from error
    try:
      return manifest, _read_arrays(here / 'arrays')
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise ArtifactError(
        f'{folder}/arrays is damaged: {_first_line(error)}'
      ) from error


def _unpacked(specs, arrays) -> dict[str, np.ndarray]:
  """Each array of the model, by name."""
  values = {}
  done = dict.fromkeys(arrays, 0)
  for name, text in specs.items():
    dtype, shape = manifest_lib.read_spec(text)
    size = int(np.prod(shape))
    packed = dtype.startswith(PACKED)
    bits = int(dtype.removeprefix(f'{PACKED} int')) if packed else 0
    kind = PACKED if packed else dtype
    size = packing.packed_bytes(size, bits) if packed else size
    value = arrays[kind][done[kind] : done[kind] + size]
    done[kind] += size
    if packed:
      values[name] = packing.unpack(value, bits, shape)
    else:
      values[name] = value.reshape(shape)
  return values


def _filled(model, values) -> harden.HardenedModel:
  """The model with arrays in place of shapes."""
  graphdef, state = nnx.split(model)
  whole = nnx.to_flat_state(state)
  # Predictions draw nothing, so any states of generators will do.
  noise = [(k, _some(v)) for k, v in whole if isinstance(v, nnx.RngState)]
  flat = [
    ('/'.join(map(str, k)), k, v)
    for k, v in whole
    if not isinstance(v, nnx.RngState)
  ]
  different = {name for name, _, _ in flat} ^ values.keys()
  different |= {
    name
    for name, _, variable in flat
    # A step or a scale has no shape before it is read.
    if name in values and not isinstance(variable, harden.Constant)
    if variable.shape != values[name].shape
    # The kernel of a layer is float in the dense model.
    or (
      not isinstance(variable, layers.IntegerParam)
      and variable.dtype != values[name].dtype
    )
  }
  if different:
    raise ValueError(f'they differ in {", ".join(sorted(different)[:3])}')
  filled = [(key, jnp.asarray(values[name])) for name, key, _ in flat]
  return nnx.merge(graphdef, nnx.from_flat_state([*filled, *noise]))


def _some(variable):
  """A value for the count or the key of a random generator."""
  if jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  return jnp.zeros(variable.shape, variable.dtype)


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    target = {k: np.empty(v.shape, v.dtype) for k, v in tree.items()}
    restored = checkpointer.restore(path, target)
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
  with files.to_read(files.path(folder)) as here:
    return sum(f.stat().st_size for f in here.rglob('*') if f.is_file())
