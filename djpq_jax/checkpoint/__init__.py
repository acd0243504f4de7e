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

import jax
import numpy as np
import orbax.checkpoint as ocp

from djpq_jax import compress
from djpq_jax import files
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax.checkpoint import arguments as arguments_lib
from djpq_jax.checkpoint import contents
from djpq_jax.checkpoint import index as index_lib
from djpq_jax.checkpoint import manifest as manifest_lib
from djpq_jax.checkpoint import older
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

# What an index raises that does not fit the model, or says what cannot be.
_MISFITS = (
  ArithmeticError,
  AttributeError,
  LookupError,
  RecursionError,
  TypeError,
  ValueError,
)


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
    input_shape: of one example, as (8, 8, 1); where the model takes several
      arrays, that of the first.  Dtypes and the other arguments are those
      that it was compressed with.
    more: further facts for the manifest, as accuracy: what JSON can hold, and
      arrays and their numbers.

  Raises:
    TypeError: the model is not hardened.
    ValueError: one of them is not what its name says, as accuracy='high', or
      the model could not be read again, for what it takes, or the folder
      holds files that are no artifact.  Nothing is written then, and nothing
      lost.
  """
  compress.check(model, 'save', hardened=True)
  harden.check_rows(model, rows)
  here = files.absolute(files.path(folder))
  _check_place(here)
  entries, arrays = contents.packed(
    model, {row.name: row.weight_bits for row in rows}
  )
  arguments, stated = _arguments(folder, model, input_shape)
  code, reason = program_lib.serialized(model, arguments)
  if code is None:  # else it was called with them
    _refuse(folder, arguments_lib.problem(model, arguments))
  facts = {
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
  with _writing(folder):
    manifest = manifest_lib.plain(facts)
  _refuse(folder, manifest_lib.problem(manifest | {'sha256': ''}))
  index = {
    'inputs': contents.inputs(model),
    'reasons': {g.name: g.reason for g in model.structure.groups if g.reason},
    'plan': model.structure.plan.to_json(),
    'arrays': entries,
    **({} if stated is None else {'arguments': stated}),
  }
  with files.to_write(here, manifest_lib.FILE_NAME) as partial:
    _write(partial, manifest, index, arrays, code)


def _check_place(folder: pathlib.Path) -> None:
  """Refuses a file, and a folder with files that are no artifact."""
  if folder.is_file():
    raise ValueError(f'{folder} is a file; save into a folder of its own')
  if not folder.is_dir():
    return
  ours = {'arrays', index_lib.FILE_NAME, program_lib.FILE_NAME}
  found = {file.name for file in folder.iterdir()}
  # A damaged artifact, or one whose last file is missing, may be replaced.
  if found <= ours or {'arrays', manifest_lib.FILE_NAME} <= found:
    return
  raise ValueError(
    f'{folder} holds files that are no artifact, which saving there would '
    'delete; choose another folder'
  )


def _arguments(folder, model, input_shape):
  """What the model will be traced with, and what the index says of it."""
  with _writing(folder):
    arguments = arguments_lib.of(model, input_shape)
    return arguments, arguments_lib.to_json(arguments)


@contextlib.contextmanager
def _writing(folder) -> Iterator[None]:
  """Says of what goes wrong where it keeps from writing."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{folder} cannot be written: {error}') from error


def _refuse(folder, fault: str) -> None:
  if fault:
    raise ValueError(f'{folder} cannot be written: {fault}')


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
  # Orbax says in it where the user has saved, which is no reader's business.
  done = folder / 'arrays' / 'commit_success.txt'
  if done.exists():
    done.write_text('Checkpoint commit was successful')
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
    values = contents.unpacked(manifest['arrays'], arrays)
    if manifest['version'] < older.LEVELS_SINCE:
      manifest['inputs'] = older.inputs(manifest, values)
    return contents.filled(contents.skeleton(manifest, dense), values)
  except _MISFITS as error:
    raise ArtifactError(
      f'{folder} does not fit the model: {files.first_line(error)}'
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
    values = contents.unpacked(manifest['arrays'], arrays)
    return program_lib.Program(path.read_bytes(), values)
  except Exception as error:  # of many kinds, for what may be in such a file
    raise ArtifactError(
      f'the program of {folder}, written with jax '
      f'{manifest["provenance"].get("jax")}, cannot be read: '
      f'{files.first_line(error)}'
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
      if files.may_pass(error):
        raise
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
      manifest |= {'arguments': None} | index_lib.read(here)
    except (OSError, ValueError) as error:
      raise ArtifactError(
        f'{folder}/{index_lib.FILE_NAME} is damaged: {files.first_line(error)}'
      ) from error
    try:
      return manifest, _read_arrays(here / 'arrays')
    except Exception as error:  # orbax and tensorstore raise many kinds
      files.raise_if_it_may_pass(error)
      raise ArtifactError(
        f'{folder}/arrays is damaged: {files.first_line(error)}'
      ) from error


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.metadata(path).item_metadata.tree
    target = {k: np.empty(v.shape, v.dtype) for k, v in tree.items()}
    restored = checkpointer.restore(path, target)
  return {k: np.asarray(v) for k, v in restored.items()}


def size_bytes(folder) -> int:
  """Bytes of all files of an artifact."""
  with files.to_read(files.path(folder)) as here:
    return sum(f.stat().st_size for f in here.rglob('*') if f.is_file())
