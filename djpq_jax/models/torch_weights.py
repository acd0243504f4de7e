"""Puts the weights of torch checkpoints and safetensors files into a model.

Neither torch nor the code that a file may carry is ever run.
"""

from collections.abc import Container, Iterator, Mapping
import pathlib
from typing import Any, TypeAlias

from flax import nnx
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from djpq_jax.models import torch_files
from djpq_jax.models import torch_names

WeightsError = torch_files.WeightsError
_Placed: TypeAlias = tuple[str, torch_names.Source, Any]  # and the variable

# Variables of layers and norms, by torch's names.
_NAMES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


def read_state_dict(path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file of `torch.save` or safetensors.

  Args:
    path: of a state dict, or of a checkpoint with one under 'state_dict' or
      'model'.  A leading 'module.' of all names, which data parallelism
      leaves, goes.

  Returns:
    Name -> array, as in the file (convolutions OIHW).

  Raises:
    WeightsError: the file is damaged, or holds anything but tensors.
    FileNotFoundError: there is no such file.
  """
  path = pathlib.Path(path)
  raw = path.read_bytes()
  safe = path.suffix == '.safetensors'
  kind = 'safetensors file' if safe else 'torch state dict'
  try:
    arrays = safetensors.numpy.load(raw) if safe else torch_files.read(raw)
  except WeightsError as error:
    raise WeightsError(f'{path} cannot be read: {error}') from None
  except Exception as error:
    raise WeightsError(
      f'{path} is damaged or no {kind} ({type(error).__name__}: {error})'
    ) from error
  if not arrays:
    raise WeightsError(f'{path} holds no tensors')
  if all(k.startswith('module.') for k in arrays):
    arrays = {k.removeprefix('module.'): v for k, v in arrays.items()}
  return arrays


def shapes(model, given: Container[str] = ()) -> dict[str, tuple[int, ...]]:
  """Name -> shape of each tensor that the model takes, in torch's order.

  Args:
    model: an nnx model.
    given: names of a file; of several ways to name the tensors, that one is
      told which has the most of them.
  """
  return {
    name: (source.parts * first, *rest)
    for name, source, variable in _placed(model, given)
    for first, *rest in [_torch_order(variable.shape)]
  }


def assign(model, arrays: Mapping[str, np.ndarray]) -> None:
  """Puts torch tensors into a model.

  They are found under the names of `torch_names`, or else under the model's
  own attributes.  Convolutions are transposed from OIHW to HWIO, linear layers
  from [out, in].

  Args:
    model: an nnx model, changed in place.
    arrays: name -> array, from `read_state_dict`.

  Raises:
    WeightsError: a tensor is missing, of another shape, or left over; it is
      named, and the model is as before.
  """
  needed = shapes(model, arrays)
  for name, shape in needed.items():
    if name not in arrays:
      raise WeightsError(f'the weights lack {name}{_count(needed, arrays)}')
    if arrays[name].shape != shape:
      raise WeightsError(
        f'{name} has shape {arrays[name].shape}, the model needs {shape}'
      )
  # Torch counts batches for averages that a fixed momentum does not take.
  known = {k for k in arrays if k.endswith('num_batches_tracked')} | set(needed)
  for name in arrays:
    if name not in known:
      raise WeightsError(
        f'the model has no place for {name}{_count(arrays, known)}'
      )
  for name, source, variable in _placed(model, arrays):
    value = _here(source.part(arrays[name]))
    variable.set_value(jnp.asarray(value, variable.dtype))


def _count(wanted, known) -> str:
  """Says how many names more are not known, if there are any."""
  more = sum(name not in known for name in wanted) - 1
  return f' and {more} more' if more else ''


def _placed(model, given: Container[str]) -> list[_Placed]:
  """Each variable with its torch tensor's name, in the layout of `given`."""
  found = [list(_named(model, s)) for s in torch_names.layouts(model)]
  return max(found, key=lambda rows: sum(name in given for name, *_ in rows))


def _named(
  model, sources: Mapping[str, torch_names.Source]
) -> Iterator[_Placed]:
  """Each variable with its torch tensor's name."""
  kinds = (nnx.Param, nnx.BatchStat)
  for path, variable in nnx.to_flat_state(nnx.state(model, kinds)):
    *module, leaf = map(str, path)
    lone = sources.get('/'.join([*module, leaf]))
    if lone:
      yield lone.name, lone, variable
      continue
    own = torch_names.Source('.'.join(module))
    source = sources.get('/'.join(module), own)
    leaf = _NAMES.get(leaf, leaf)
    yield f'{source.name}.{leaf}' if source.name else leaf, source, variable


def _torch_order(shape) -> tuple[int, ...]:
  """HWIO -> OIHW, [in, out] -> [out, in]."""
  if len(shape) == 4:
    return tuple(shape[d] for d in (3, 2, 0, 1))
  return shape[::-1] if len(shape) == 2 else tuple(shape)


def _here(value: np.ndarray) -> np.ndarray:
  """OIHW -> HWIO, [out, in] -> [in, out]."""
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T if value.ndim == 2 else value
