"""Puts the weights of torch checkpoints and safetensors files into a model.

Neither torch nor the code that a file may carry is ever run.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from djpq_jax.models import torch_files
from djpq_jax.models import torch_names

WeightsError = torch_files.WeightsError

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
  sources = torch_names.sources(model)
  left = {k for k in arrays if not k.endswith('num_batches_tracked')}
  values: list[tuple[Any, np.ndarray]] = []
  kinds = (nnx.Param, nnx.BatchStat)
  for path, variable in nnx.to_flat_state(nnx.state(model, kinds)):
    name, part = _source(sources, path)
    if name not in arrays:
      raise WeightsError(f'the weights lack {name}')
    value = _fitted(name, arrays[name], part, variable.shape)
    left.discard(name)
    values.append((variable, value))
  if left:
    raise WeightsError(f'the model has no place for {sorted(left)[0]}')
  for variable, value in values:
    variable.set_value(jnp.asarray(value, variable.dtype))


def _source(sources, path):
  """Torch's name of a variable, and what to take of it."""
  *module, leaf = map(str, path)
  whole = '/'.join([*module, leaf])
  if whole in sources:  # a lone parameter
    return sources[whole]
  found = sources.get('/'.join(module), torch_names.Source('.'.join(module)))
  names = [found.name] if found.name else []
  return '.'.join([*names, _NAMES.get(leaf, leaf)]), found.part


def _fitted(name, array, part, shape) -> np.ndarray:
  """Torch's tensor in the model's order of axes, if it fits."""
  try:
    value = _transposed(part(array))
  except ValueError:  # from a part: it does not even divide
    value = None
  if value is None or value.shape != shape:
    moved = '' if value is None else f', {value.shape} in the order used here'
    raise WeightsError(
      f'{name} has shape {array.shape}{moved}; the model needs {shape}'
    )
  return value


def _transposed(value: np.ndarray) -> np.ndarray:
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T if value.ndim == 2 else value
