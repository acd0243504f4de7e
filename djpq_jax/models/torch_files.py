"""Reads the files of `torch.save` without torch and without executing them.

The reader knows ordered dicts, tensors and their storages and refuses all else.
Both formats are read: the zip archive, and the sequence of pickles before it.
"""

import collections
from collections.abc import Callable
import io
import math
import pickle
from typing import Any, NamedTuple
import zipfile

import jax.numpy as jnp
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # of the older format
_DTYPES: dict[str, Any] = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': jnp.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}
_WRAPPERS = ('state_dict', 'model')  # where checkpoints keep the weights


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

  def __init__(self, file):
    super().__init__(file)
    self.kinds: dict[str, str] = {}  # of every storage, by key

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
    if any(view is not None for view in pid[5:]):
      raise WeightsError('it holds views of storages, as of torch before 0.4')
    storage = _Storage(pid[1], str(pid[2]))
    self.kinds[storage.key] = storage.kind
    return storage


def read(raw: bytes) -> dict[str, np.ndarray]:
  """The tensors in the bytes of a file that `torch.save` wrote.

  Args:
    raw: a state dict, or a checkpoint with one under 'state_dict' or 'model'.

  Returns:
    Name -> array, as in the file.

  Raises:
    WeightsError: the file holds anything but tensors, or tensors that reach
      outside of it.
    Exception: of any kind, where the file is damaged.
  """
  is_zip = zipfile.is_zipfile(io.BytesIO(raw))
  found, storages = (_read_zip if is_zip else _read_old)(raw)
  for key in _WRAPPERS:
    if isinstance(found.get(key), dict):
      found = found[key]
  tensors = {k: v for k, v in found.items() if isinstance(v, _Tensor)}
  return {k: _array(k, v, storages) for k, v in tensors.items()}


def _read_zip(raw: bytes):
  archive = zipfile.ZipFile(io.BytesIO(raw))
  (index,) = (n for n in archive.namelist() if n.endswith('/data.pkl'))
  folder = index.removesuffix('data.pkl')
  order = folder + 'byteorder'
  if order in archive.namelist():
    _check_order(archive.read(order) == b'little')
  found = _Unpickler(io.BytesIO(archive.read(index))).load()
  return found, lambda storage: archive.read(f'{folder}data/{storage.key}')


def _read_old(raw: bytes):
  file = io.BytesIO(raw)
  if _Unpickler(file).load() != _MAGIC:
    raise WeightsError('it does not begin like a torch file')
  _Unpickler(file).load()  # protocol version
  _check_order(_Unpickler(file).load().get('little_endian', True))
  unpickler = _Unpickler(file)
  found = unpickler.load()
  storages = {}
  for key in map(str, _Unpickler(file).load()):
    count = int.from_bytes(file.read(8), 'little')
    itemsize = np.dtype(_DTYPES[unpickler.kinds[key]]).itemsize
    storages[key] = file.read(count * itemsize)
  return found, lambda storage: storages[storage.key]


def _check_order(little: bool):
  if not little:
    raise WeightsError('its numbers are big-endian')


def _array(name: str, tensor: _Tensor, storages: Callable[[_Storage], bytes]):
  dtype = np.dtype(_DTYPES[tensor.storage.kind])
  raw = storages(tensor.storage)
  flat = np.frombuffer(raw, dtype, len(raw) // dtype.itemsize)
  # Strides come from the file: they must not reach outside of the storage,
  # nor blow it up.
  last = tensor.offset + sum(
    (n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True)
  )
  lowest = min(tensor.offset, *tensor.stride, *tensor.size, 0)
  elements = math.prod(tensor.size)
  if lowest < 0 or (elements and not last < len(flat) >= elements):
    raise WeightsError(f'tensor {name} reaches outside of its data')
  strides = [s * dtype.itemsize for s in tensor.stride]
  view = np.lib.stride_tricks.as_strided(
    flat[tensor.offset :], tensor.size, strides
  )
  return view.copy()
