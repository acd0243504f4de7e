"""Reads torch state dicts without torch, and puts them into a model.

The reader knows ordered dicts, tensors and their storages and refuses all else,
so a file cannot execute anything.  Both formats of `torch.save` are read: the
zip archive and the one before it.
"""

import collections
from collections.abc import Callable, Mapping
import io
import pathlib
import pickle
from typing import Any, NamedTuple
import zipfile

from flax import nnx
import jax.numpy as jnp
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format
_DTYPES = {
  'FloatStorage': np.float32,
  'DoubleStorage': np.float64,
  'HalfStorage': np.float16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
}
_NAMES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


class WeightsError(ValueError):
  """A weights file cannot be used; the message says why."""


class _Storage(NamedTuple):
  kind: str
  key: str


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
  """Builds descriptions of tensors; any other object is an error."""

  def find_class(self, module, name):
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if module == 'torch._utils' and name in (
      '_rebuild_tensor',
      '_rebuild_tensor_v2',
    ):
      return lambda storage, offset, size, stride, *_: _Tensor(
        storage, offset, tuple(size), tuple(stride)
      )
    if (module, name) == ('torch._utils', '_rebuild_parameter'):
      return lambda tensor, *_: tensor
    if module == 'torch' and name in _DTYPES:
      return name
    raise WeightsError(f'it holds {module}.{name}, which is no weight')

  def persistent_load(self, pid):
    if pid[0] != 'storage':
      raise WeightsError(f'it holds {pid[0]!r}, which is no weight')
    return _Storage(pid[1], str(pid[2]))


def read_state_dict(path) -> dict[str, np.ndarray]:
  """Reads the tensors of a file that `torch.save` wrote.

  Args:
    path: of a state dict, or of a checkpoint with one under 'state_dict'.
      A leading 'module.' of all names, which data parallelism leaves, goes.

  Returns:
    Name -> array, as in the file (convolutions OIHW).

  Raises:
    WeightsError: the file is damaged, or holds anything but tensors.
    FileNotFoundError: there is no such file.
  """
  path = pathlib.Path(path)
  raw = path.read_bytes()
  try:
    read = _read_zip if zipfile.is_zipfile(io.BytesIO(raw)) else _read_old
    found, storages = read(raw)
    found = found.get('state_dict', found)
    tensors = {k: v for k, v in found.items() if isinstance(v, _Tensor)}
    arrays = {k: _array(v, storages) for k, v in tensors.items()}
  except WeightsError as error:
    raise WeightsError(f'{path} cannot be read: {error}') from None
  except Exception as error:
    raise WeightsError(
      f'{path} is damaged or no torch state dict ({type(error).__name__}: '
      f'{error})'
    ) from error
  if arrays and all(k.startswith('module.') for k in arrays):
    arrays = {k.removeprefix('module.'): v for k, v in arrays.items()}
  return arrays


def _read_zip(raw: bytes):
  archive = zipfile.ZipFile(io.BytesIO(raw))
  (index,) = (n for n in archive.namelist() if n.endswith('/data.pkl'))
  folder = index.removesuffix('data.pkl')
  found = _Unpickler(io.BytesIO(archive.read(index))).load()
  return found, lambda storage: archive.read(f'{folder}data/{storage.key}')


def _read_old(raw: bytes):
  file = io.BytesIO(raw)
  if _Unpickler(file).load() != _MAGIC:
    raise WeightsError('it does not begin like a torch file')
  for _ in range(2):  # protocol version, system information
    _Unpickler(file).load()
  found = _Unpickler(file).load()
  keys = _Unpickler(file).load()
  tensors = found.get('state_dict', found).values()
  kinds = {t.storage.key: t.storage.kind for t in tensors if _is_tensor(t)}
  storages = {}
  for key in map(str, keys):
    count = int.from_bytes(file.read(8), 'little')
    storages[key] = file.read(count * np.dtype(_DTYPES[kinds[key]]).itemsize)
  return found, lambda storage: storages[storage.key]


def _is_tensor(value) -> bool:
  return isinstance(value, _Tensor)


def _array(tensor: _Tensor, storages: Callable[[_Storage], bytes]):
  dtype = np.dtype(_DTYPES[tensor.storage.kind])
  flat = np.frombuffer(storages(tensor.storage), dtype)
  # Strides come from the file: they must not reach outside of the storage.
  last = tensor.offset + sum(
    (n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True)
  )
  inside = tensor.offset >= 0 and min(tensor.stride, default=0) >= 0
  if 0 in tensor.size or not inside or last >= len(flat):
    raise WeightsError('a tensor reaches outside of its data')
  strides = [s * dtype.itemsize for s in tensor.stride]
  view = np.lib.stride_tricks.as_strided(
    flat[tensor.offset :], tensor.size, strides
  )
  return view.copy()


def assign(model, arrays: Mapping[str, np.ndarray]) -> None:
  """Puts torch tensors into a model whose attributes have torch's names.

  Convolutions are transposed from OIHW to HWIO, linear layers from [out, in].

  Args:
    model: an nnx model, changed in place.
    arrays: name -> array, from `read_state_dict`.

  Raises:
    WeightsError: a tensor is missing, of another shape, or left over; it is
      named, and the model is as before.
  """
  left = {k for k in arrays if not k.endswith('num_batches_tracked')}
  values: list[tuple[Any, np.ndarray]] = []
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    if path[-1] not in _NAMES:
      continue
    name = '.'.join([*map(str, path[:-1]), _NAMES[path[-1]]])
    if name not in arrays:
      raise WeightsError(f'the weights lack {name}')
    value = _transposed(arrays[name])
    if value.shape != variable.shape:
      raise WeightsError(
        f'{name} has shape {arrays[name].shape}, the model needs '
        f'{variable.shape} (transposed)'
      )
    left.discard(name)
    values.append((variable, value))
  if left:
    raise WeightsError(f'the model has no place for {sorted(left)[0]}')
  for variable, value in values:
    variable.set_value(jnp.asarray(value, variable.dtype))


def _transposed(value: np.ndarray) -> np.ndarray:
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0)
  return value.T if value.ndim == 2 else value
