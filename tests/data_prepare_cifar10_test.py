"""CIFAR-10 from each of its archives: the same pixels, labels and order."""

import io
import json
import pickle
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pictures
import pytest

from djpq_jax import data
from djpq_jax.data import stored
from djpq_jax.data.prepare import cifar10

PARTS = [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']
ROWS = 10  # per part, one of each class


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(cifar10, 'COUNTS', (5 * ROWS, ROWS))


@pytest.fixture(scope='module')
def arrays():
  """Images [60, 32, 32, 3] and labels [60], the last tenth to test."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6 * ROWS, 32, 32, 3), np.uint8)
  labels = np.concatenate([rng.permutation(10) for _ in PARTS])
  return images, labels.astype(np.uint8)


def parts(arrays):
  for i, name in enumerate(PARTS):
    rows = slice(ROWS * i, ROWS * (i + 1))
    yield name, arrays[0][rows], arrays[1][rows]


def flat(images):
  """Red, green and blue planes, as the official files have them."""
  return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def binary(arrays):
  return {
    f'cifar-10-batches-bin/{name}.bin': np.concatenate(
      [labels[:, None], flat(images)], 1
    ).tobytes()
    for name, images, labels in parts(arrays)
  }


def pickled(arrays, module=b'numpy.core.multiarray'):
  """With the module's name of the NumPy that wrote the official files."""
  files = {}
  for name, images, labels in parts(arrays):
    part = {b'data': flat(images), b'labels': labels.tolist()}
    content = pickle.dumps(part, protocol=2)
    content = content.replace(b'numpy._core.multiarray', module)
    files[f'cifar-10-batches-py/{name}'] = content
  return files


def sheets(arrays):
  files = {
    f'package/{name}.png': pictures.encoded(
      images.reshape(len(images), 1024, 3), 'PNG'
    )
    for name, images, _ in parts(arrays)
  }
  labels = arrays[1].tolist()
  for name, some in (('train', labels[:-ROWS]), ('test', labels[-ROWS:])):
    files[f'package/{name}_lables.json'] = json.dumps(some).encode()
  return files


ARCHIVES = {'binary': binary, 'pickled': pickled, 'sheets': sheets}


def write(path, files):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return path


@pytest.mark.parametrize('kind', ARCHIVES)
def test_all_archives_hold_the_same(tmp_path, arrays, kind):
  path = write(tmp_path / 'a.tar.gz', ARCHIVES[kind](arrays))
  (images, labels), (test_images, test_labels) = cifar10.read(path)
  np.testing.assert_array_equal(images, arrays[0][:-ROWS])
  np.testing.assert_array_equal(labels, arrays[1][:-ROWS])
  np.testing.assert_array_equal(test_images, arrays[0][-ROWS:])
  np.testing.assert_array_equal(test_labels, arrays[1][-ROWS:])


def test_the_set_is_what_the_source_reads(tmp_path, arrays):
  path = write(tmp_path / 'a.tar.gz', binary(arrays))
  summary = cifar10.prepare(path, tmp_path / 'out')
  assert summary.images == {'train': 50, 'test': 10}
  train, test = data.load('cifar10', data_dir=str(tmp_path / 'out'))
  assert train.images.shape == (50, 32, 32, 3)
  rows = {x.tobytes(): y for x, y in zip(*arrays)}
  for split in (train, test):
    for image, label in zip(split.images, split.labels):
      assert rows.pop(image.tobytes()) == label
  assert not rows


def test_the_order_is_that_of_tfds(tmp_path, arrays):
  """Pinned: batches of a seed depend on it. tfds sorts by a hash of the id."""
  path = write(tmp_path / 'a.tar.gz', binary(arrays))
  cifar10.prepare(path, tmp_path / 'out')
  images = stored.StoredImages(
    tmp_path / 'out/cifar10/3.0.2', 'test', 32, 32, 0.08, 1
  )
  proto = stored._proto()
  ids = [
    proto.FromString(r).features.feature['id'].bytes_list.value[0].decode()
    for r in images.source
  ]
  assert [int(i.removeprefix('test_')) for i in ids] == ORDER


ORDER = [9, 2, 6, 1, 5, 8, 3, 7, 4, 0]


def test_a_pickle_cannot_run_code(tmp_path, arrays):
  class Evil:
    def __reduce__(self):
      return print, ('run',)

  files = pickled(arrays)
  files['cifar-10-batches-py/data_batch_3'] = pickle.dumps(Evil(), protocol=2)
  path = write(tmp_path / 'a.tar.gz', files)
  with pytest.raises(ValueError, match=r'a\.tar\.gz is no .*it wants .*print'):
    cifar10.read(path)


def test_bad_archives_are_named(tmp_path, arrays):
  with pytest.raises(FileNotFoundError, match=r'no archive .*a\.tar\.gz'):
    cifar10.read(tmp_path / 'a.tar.gz')
  path = write(tmp_path / 'a.tar.gz', {'readme.txt': b'empty'})
  with pytest.raises(ValueError, match=r'no archive of CIFAR-10.*test_batch'):
    cifar10.read(path)
  files = binary(arrays)
  files.pop('cifar-10-batches-bin/data_batch_2.bin')
  with pytest.raises(ValueError, match=r'no archive of CIFAR-10.*data_batch_2'):
    cifar10.read(write(path, files))
  content = write(path, binary(arrays)).read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match='is no archive, or damaged'):
    cifar10.read(path)
  path.write_bytes(b'not an archive')
  with pytest.raises(ValueError, match='is no archive, or damaged'):
    cifar10.read(path)


def test_missing_images_are_counted(tmp_path, arrays):
  files = binary(arrays)
  name = 'cifar-10-batches-bin/test_batch.bin'
  files[name] = files[name][:-3073]
  path = write(tmp_path / 'a.tar.gz', files)
  with pytest.raises(ValueError, match='holds 9 images; expected 10'):
    cifar10.read(path)


class Web(io.BytesIO):
  """What urlopen gives."""

  def __init__(self, content):
    super().__init__(content)
    self.headers = {'Content-Length': str(len(content))}


class TestDownload:
  @pytest.fixture
  def content(self, tmp_path, arrays):
    return write(tmp_path / 'a.tar.gz', binary(arrays)).read_bytes()

  def serve(self, monkeypatch, content):
    asked = []

    def urlopen(url, timeout):
      asked.append(url)
      return Web(content)

    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    return asked

  def test_what_comes_is_checked_and_kept(self, tmp_path, monkeypatch, content):
    digest = cifar10.hashlib.md5(content).hexdigest()
    monkeypatch.setattr(cifar10, 'MD5', digest)
    asked, calls = self.serve(monkeypatch, content), []
    for _ in range(2):
      cifar10.prepare(
        None, tmp_path / 'out', progress=lambda *c: calls.append(c)
      )
    assert asked == [cifar10.URL]
    assert calls[0] == ('download', len(content), len(content))
    assert len(data.load('cifar10', data_dir=str(tmp_path / 'out'))[0]) == 50

  def test_damage_is_seen(self, tmp_path, monkeypatch, content):
    self.serve(monkeypatch, content)
    with pytest.raises(ValueError, match='came damaged; run the same again'):
      cifar10.prepare(None, tmp_path / 'out')
    assert not (tmp_path / 'out/cifar10').exists()

  def test_no_network_is_said(self, tmp_path, monkeypatch):
    def urlopen(url, timeout):
      raise urllib.error.URLError('no route')

    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    with pytest.raises(FileNotFoundError, match=r'no route.*--from'):
      cifar10.prepare(None, tmp_path / 'out')
