"""Weights files made by hand, byte by byte: torch is not needed to read them.

The bytes are those of `torch.save`: a pickle whose tensors are calls of
`torch._utils._rebuild_tensor_v2` on persistent ids, in a zip archive or
followed by the storages.
"""

import contextlib
import io
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax.models import torch_weights

KINDS = {
  'float64': 'Double',
  'float32': 'Float',
  'float16': 'Half',
  'bfloat16': 'BFloat16',
  'int64': 'Long',
  'int32': 'Int',
  'int16': 'Short',
  'int8': 'Char',
  'uint8': 'Byte',
  'bool': 'Bool',
}


def op(value) -> bytes:
  """Pickle code that pushes a plain value."""
  return pickle.dumps(value, protocol=2)[2:-1]


def name_of(module, name) -> bytes:
  return b'c' + f'{module}\n{name}\n'.encode()


def tuple_of(*parts: bytes) -> bytes:
  return b'(' + b''.join(parts) + b't'


def call(module, name, *args: bytes) -> bytes:
  return name_of(module, name) + tuple_of(*args) + b'R'


def storage(key, kind='Float', count=0, *view: bytes) -> bytes:
  parts = (op('storage'), name_of('torch', f'{kind}Storage'), op(key))
  return tuple_of(*parts, op('cpu'), op(count), *view) + b'Q'


def tensor(stored, size, stride, offset=0) -> bytes:
  rest = (op(offset), op(tuple(size)), op(tuple(stride)), op(False))
  hooks = call('collections', 'OrderedDict')
  return call('torch._utils', '_rebuild_tensor_v2', stored, *rest, hooks)


def dense(key, array) -> bytes:
  """A contiguous tensor with a storage of its own."""
  strides = [s // array.itemsize for s in array.strides]
  stored = storage(key, KINDS[array.dtype.name], array.size)
  return tensor(stored, array.shape, strides)


def ordered(items: dict[str, bytes]) -> bytes:
  pairs = b''.join(op(k) + v for k, v in items.items())
  return call('collections', 'OrderedDict') + b'(' + pairs + b'u'


def program(code: bytes) -> bytes:
  return b'\x80\x02' + code + b'.'


def zipped(code: bytes, storages=None, **records) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('archive/data.pkl', program(code))
    for name, raw in records.items():
      archive.writestr(f'archive/{name}', raw)
    for key, array in (storages or {}).items():
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return file.getvalue()


def old(code: bytes, storages=None, little=True) -> bytes:
  storages = storages or {}
  head = (0x1950A86A20F9469CFC6C, 1001, {'little_endian': little})
  file = b''.join(program(op(x)) for x in head)
  file += program(code) + program(op(list(storages)))
  for array in storages.values():
    file += struct.pack('<q', array.size) + array.tobytes()
  return file


FORMATS = {'zip': zipped, 'old': old}


def state_file(arrays, make=zipped) -> bytes:
  storages = {str(i): a for i, a in enumerate(arrays.values())}
  items = zip(arrays, storages.items())
  return make(ordered({k: dense(*item) for k, item in items}), storages)


def small_state():
  rng = np.random.default_rng(0)
  return {
    'conv.weight': rng.normal(size=(3, 2, 1, 1)).astype(np.float32),
    'conv.bias': rng.normal(size=3).astype(np.float32),
  }


@pytest.fixture
def read(tmp_path):
  def read(raw: bytes, name='some.pth'):
    path = tmp_path / name
    path.write_bytes(raw)
    return torch_weights.read_state_dict(path)

  return read


def refused(read, raw, name='some.pth') -> str:
  """The message: one sentence that names the file."""
  with pytest.raises(torch_weights.WeightsError) as caught:
    read(raw, name)
  message = str(caught.value)
  assert name in message
  assert '\n' not in message
  return message


def assert_same(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize('make', FORMATS.values(), ids=FORMATS)
class TestRead:
  def test_tensors(self, read, make):
    state = small_state()
    assert_same(read(state_file(state, make)), state)

  @pytest.mark.parametrize('dtype', KINDS)
  def test_dtypes(self, read, make, dtype):
    state = {'x': np.array([[0, 1, 3]]).astype(jnp.dtype(dtype))}
    assert_same(read(state_file(state, make)), state)

  def test_scalar_and_empty(self, read, make):
    state = {'n': np.array(7), 'none': np.zeros((0, 3), np.float32)}
    assert_same(read(state_file(state, make)), state)

  def test_views_of_one_storage(self, read, make):
    numbers = np.arange(12, dtype=np.float32)
    stored = storage('0', count=12)
    code = ordered(
      {
        'transposed': tensor(stored, (3, 2), (1, 3)),
        'late': tensor(stored, (2,), (4,), offset=7),
      }
    )
    found = read(make(code, {'0': numbers}))
    expected = {
      'transposed': numbers[:6].reshape(2, 3).T,
      'late': numbers[[7, 11]],
    }
    assert_same(found, expected)

  @pytest.mark.parametrize('key', ['state_dict', 'model'])
  def test_checkpoint(self, read, make, key):
    """What else it holds is no weight, but its storages are there."""
    arrays = {'0': np.ones(2, np.float32), '1': np.zeros(3, np.int64)}
    code = ordered(
      {
        'epoch': op(3),
        'momentum': dense('1', arrays['1']),
        key: ordered({'x': dense('0', arrays['0']), 'note': op('hello')}),
      }
    )
    assert_same(read(make(code, arrays)), {'x': arrays['0']})

  def test_prefix_of_data_parallelism_goes(self, read, make):
    state = {f'module.{k}': v for k, v in small_state().items()}
    assert_same(read(state_file(state, make)), small_state())
    state['other'] = np.zeros(1)
    assert_same(read(state_file(state, make)), state)

  def test_parameters(self, read, make):
    x = np.ones(2, np.float32)
    code = call(
      'torch._utils',
      '_rebuild_parameter',
      dense('0', x),
      op(True),
      call('collections', 'OrderedDict'),
    )
    assert_same(read(make(ordered({'x': code}), {'0': x})), {'x': x})

  def test_nothing_is_executed(self, read, make, tmp_path):
    """Not even where the file would be read before the refusal."""
    mark = tmp_path / 'mark'
    good = dense('0', np.ones(2, np.float32))
    bad = call(os.mkdir.__module__, 'mkdir', op(str(mark)))
    code = ordered({'x': good, 'y': bad})
    message = refused(read, make(code, {'0': np.ones(2, np.float32)}))
    assert 'mkdir, which is no weight' in message
    assert not mark.exists()
    pickle.loads(program(bad))  # the pickle itself would have done it
    assert mark.exists()

  @pytest.mark.parametrize(
    ('module', 'name'),
    [
      ('builtins', 'eval'),
      ('builtins', 'getattr'),
      ('collections', 'OrderedDict.fromkeys'),
      ('torch._utils', '_rebuild_device_tensor_from_numpy'),
      ('torch', 'load'),
      ('argparse', 'Namespace'),
    ],
  )
  def test_other_names_are_refused(self, read, make, module, name):
    code = ordered({'x': name_of(module, name)})
    message = refused(read, make(code))
    assert f'it holds {module}.{name}, which is no weight' in message

  def test_foreign_objects_are_refused(self, read, make):
    code = ordered({'x': tuple_of(op('module'), op('a')) + b'Q'})
    assert "'module', which is no weight" in refused(read, make(code))

  def test_big_endian_is_refused(self, read, make):
    code = ordered({})
    raw = (
      old(code, little=False) if make is old else zipped(code, byteorder=b'big')
    )
    assert 'big-endian' in refused(read, raw)

  def test_views_of_storages_are_refused(self, read, make):
    view = tuple_of(op('1'), op(0), op(2))
    code = ordered({'x': tensor(storage('0', 'Float', 2, view), (2,), (1,))})
    raw = make(code, {'0': np.ones(4, np.float32)})
    assert 'views of storages' in refused(read, raw)

  @pytest.mark.parametrize(
    ('size', 'stride', 'offset'),
    [
      ((5,), (1,), 0),
      ((4,), (1,), 1),
      ((2, 2), (3, 1), 0),
      ((2,), (-1,), 3),
      ((2,), (1,), -1),
      ((-1,), (1,), 0),
      ((10**12,), (0,), 0),  # would fill the memory
    ],
  )
  def test_no_tensor_reaches_outside(self, read, make, size, stride, offset):
    code = ordered({'x': tensor(storage('0', count=4), size, stride, offset)})
    raw = make(code, {'0': np.ones(4, np.float32)})
    assert 'tensor x reaches outside of its data' in refused(read, raw)

  def test_no_tensors(self, read, make):
    assert 'holds no tensors' in refused(read, make(ordered({'a': op(1)})))

  def test_truncated_anywhere(self, read, make):
    raw = state_file(small_state(), make)
    for end in range(0, len(raw), 5):
      refused(read, raw[:end])

  def test_damage_gives_a_refusal_or_other_numbers(self, read, make):
    raw = state_file(small_state(), make)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(raw), 300):
      damaged = bytearray(raw)
      damaged[position] ^= int(rng.integers(1, 256))
      with contextlib.suppress(torch_weights.WeightsError):
        read(bytes(damaged))


@pytest.mark.parametrize('raw', [b'', b'hello', b'\x80\x02K\x01.', b'PK\3\4'])
def test_no_weights_file(read, raw):
  refused(read, raw)


def test_no_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
    torch_weights.read_state_dict(tmp_path / 'nowhere.pth')
