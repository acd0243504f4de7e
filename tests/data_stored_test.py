"""Batches from disk: functions of (seed, step), whatever the threads."""

import errno
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

from flax import nnx
import numpy as np
import pictures
import pytest

from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax.data import decode
from djpq_jax.data import folders
from djpq_jax.data import pipeline
from djpq_jax.data import stored
from djpq_jax.data.prepare import folder

AUGMENT = data.Augment(flip=True)
TRAIN, VAL = 10, 7


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A set of photographs of two classes, of many sizes."""
  home = tmp_path_factory.mktemp('sets')
  for split, count in (('train', TRAIN), ('val', VAL)):
    for i in range(count):
      seed = i + 100 * (split == 'val')
      image = pictures.smooth(40 + 3 * i, 90 - 5 * i, seed)
      name = f'{split}/{"ab"[i % 2]}/{i}'
      form = 'PNG' if i == 3 else 'JPEG'
      pictures.write(home / f'in/{name}.{form}', pictures.encoded(image, form))
  folder.prepare(home / 'in', home, shard_bytes=10_000)
  return home


@pytest.fixture
def split(home):
  return data.load('folder', data_dir=str(home), size=24, threads=3)[0]


@pytest.fixture
def val(home):
  return data.load('folder', data_dir=str(home), size=24, threads=3)[1]


def batch(split, step=0, **kwargs):
  kwargs = dict(batch_size=4, seed=0, augment=AUGMENT) | kwargs
  return data.train_batch(split, step, **kwargs)


def test_a_part_that_is_held_out_is_read_as_itself(split):
  rest, held = data.hold_out(split, 0.3)
  whole = next(iter(data.eval_batches(split, TRAIN)))['image']
  seen = []
  for part in (rest, held):
    found = next(iter(data.eval_batches(part, len(part))))['image']
    assert found.shape == (len(part), *part.images.shape[1:])
    np.testing.assert_array_equal(part.images[:].shape, part.images.shape)
    for image in found:
      same = [np.array_equal(image, other) for other in whole]
      seen.append(same.index(True))
    # Every training batch shows images of its own part alone.
    labels = {int(i): int(n) for i, n in zip(seen[-len(part) :], part.labels)}
    assert all(split.labels[i] == n for i, n in labels.items())
  assert sorted(seen) == list(range(TRAIN))
  one = data.train_batch(held, 0, batch_size=3, seed=0, augment=AUGMENT)
  assert sorted(one['label']) == sorted(held.labels)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_a_split_says_what_it_holds(split, val):
  assert split.images.shape == (TRAIN, 24, 24, 3)
  assert val.images.shape == (VAL, 24, 24, 3)
  assert (len(split), len(val)) == (TRAIN, VAL)
  assert split.num_classes == 2
  assert (split.name, val.name) == ('folder/train', 'folder/validation')
  # Sorted by class, then by name.
  assert split.labels.tolist() == [0] * 5 + [1] * 5
  assert split.labels.dtype == np.int32
  assert split.images.resize == 27
  assert data.steps_per_epoch(split, 4) == 2


def test_images_are_the_files_in_their_order(home, val):
  files = sorted((home / 'in/val').glob('*/*'))
  expected = [decode.center_view(f.read_bytes(), 24, 27) for f in files]
  np.testing.assert_array_equal(val.images[:], expected)
  np.testing.assert_array_equal(val.images[2:5], expected[2:5])
  np.testing.assert_array_equal(val.images[np.array([6, 0])], val.images[::-6])
  np.testing.assert_array_equal(val.images[3], expected[3])


def test_a_batch_without_augmentation_is_the_evaluation_view(split):
  found = batch(split, batch_size=TRAIN, augment=None)
  order = pipeline._epoch_order(TRAIN, 0, 0)
  np.testing.assert_array_equal(found['label'], split.labels[order])
  expected = pipeline.normalize(split.images[order], split)
  np.testing.assert_array_equal(found['image'], expected)
  assert found['image'].dtype == np.float32


def test_a_training_batch_is_the_random_views(home, split):
  """By hand, from the files: order, crops and mirroring of one step."""
  files = sorted((home / 'in/train').glob('*/*'))
  found = batch(split, 3, batch_size=5, seed=7)
  order = pipeline._epoch_order(TRAIN, 7, 1)[5:]
  words = pipeline._random_bits(7, pipeline._AUGMENT, 3).random_raw((41, 5))
  assert {int(w) & 1 for w in words[40]} == {0, 1}
  for i, row in enumerate(order):
    view = decode.random_view(
      files[row].read_bytes(), 24, words[:40, i], min_area=0.08
    )
    view = view[:, ::-1] if words[40, i] & 1 else view
    expected = pipeline.normalize(view, split)
    np.testing.assert_array_equal(found['image'][i], expected)
    assert found['label'][i] == split.labels[row]


def test_bytes_are_the_same_images_before_they_are_normalized(split):
  images = batch(split)['image']
  levels = batch(split, as_bytes=True)['image']
  assert levels.dtype == np.uint8
  np.testing.assert_array_equal(pipeline.normalize(levels, split), images)


def test_the_same_bits_for_any_number_of_threads_and_any_order(home):
  streams = []
  for threads, steps in ((1, range(4)), (4, (3, 1, 0, 2)), (0, range(4))):
    split = data.load('folder', data_dir=str(home), size=24, threads=threads)[0]
    stream = {step: batch(split, step) for step in steps}
    streams.append([stream[step] for step in range(4)])
  for other in streams[1:]:
    for a, b in zip(streams[0], other):
      assert_same(a, b)


def test_steps_and_seeds_differ(split):
  first = batch(split)
  for other in (batch(split, 2), batch(split, seed=1)):
    assert not np.array_equal(first['image'], other['image'])


def test_an_epoch_takes_each_image_once(home, split):
  """In evaluation's view, each image can be told from the others."""
  known = {image.tobytes() for image in split.images[:]}
  assert len(known) == TRAIN
  for epoch in range(2):
    seen = [
      batch(split, 2 * epoch + i, batch_size=5, augment=None) for i in (0, 1)
    ]
    images = np.concatenate([b['image'] for b in seen])
    whole = pipeline.normalize(split.images[:], split)
    assert {x.tobytes() for x in images} == {x.tobytes() for x in whole}


@pytest.mark.parametrize('count', [2, 4])
def test_shares_make_up_the_global_batch(split, count):
  shares = [
    batch(split, 1, batch_size=8, process_index=i, process_count=count)
    for i in range(count)
  ]
  union = {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
  assert_same(union, batch(split, 1, batch_size=8))


@pytest.mark.parametrize('batch_size', [1, 3, 7, 8])
def test_evaluation_counts_every_image_once(val, batch_size):
  batches = list(data.eval_batches(val, batch_size))
  assert {b['image'].shape for b in batches} == {(batch_size, 24, 24, 3)}
  mask = np.concatenate([b['mask'] for b in batches])
  assert mask.sum() == VAL
  images = np.concatenate([b['image'] for b in batches])
  np.testing.assert_array_equal(
    images[mask > 0], pipeline.normalize(val.images[:], val)
  )
  assert not images[mask == 0].any()
  labels = np.concatenate([b['label'] for b in batches])[mask > 0]
  np.testing.assert_array_equal(labels, val.labels)


def test_evaluation_shares_make_up_the_global_batches(val):
  shares = [
    list(data.eval_batches(val, 4, process_index=i, process_count=2))
    for i in range(2)
  ]
  for *parts, expected in zip(*shares, data.eval_batches(val, 4), strict=True):
    union = {k: np.concatenate([p[k] for p in parts]) for k in expected}
    assert_same(union, expected)


def test_accuracy_of_a_model_is_exact_to_the_image(val):
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  whole = pipeline.normalize(val.images[:], val).mean((1, 2))

  class Mean(nnx.Module):
    def __init__(self):
      self.head = model

    def __call__(self, x):
      return self.head(x.mean((1, 2)))

  right = np.asarray(model(whole)).argmax(-1) == val.labels
  for batch_size in (3, 4, 7, 16):
    assert evaluation.evaluate(Mean(), val, batch_size) == right.mean()


def test_workers_get_a_copy_that_opens_the_files_anew(split):
  split.images[0]
  copy = pickle.loads(pickle.dumps(split))
  assert 'source' not in copy.images.__dict__
  assert_same(batch(copy, 5), batch(split, 5))


def test_labels_are_found_without_their_file(home, tmp_path, split):
  """As in a folder that tfds itself has made."""
  shutil.copytree(home / 'folder', tmp_path / 'folder')
  path = tmp_path / 'folder/1.0.0/labels-train.npy'
  path.unlink()
  found, _ = data.load('folder', data_dir=str(tmp_path))
  np.testing.assert_array_equal(found.labels, split.labels)
  np.testing.assert_array_equal(np.load(path), split.labels)


def test_tfds_reads_it_too(home, split):
  """By its public function, in a process that has no TensorFlow."""
  code = f"""
import json, sys, tensorflow_datasets as tfds
source = tfds.data_source(
  'folder', split='train', data_dir={str(home)!r}, download=False)
print(json.dumps([
  [x['label'], x['image'].shape, x['file_name'].decode()] for x in source]))
assert 'tensorflow' not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  found = json.loads(done.stdout)
  assert [row[0] for row in found] == split.labels.tolist()
  assert found[0][2] == 'a/0.JPEG'
  assert found[1][1] == [46, 80, 3]


def test_data_stays_light_to_import():
  code = 'import sys; import djpq_jax.data, djpq_jax.data.prepare.folder\n'
  code += 'heavy = {"cv2", "simplejpeg", "PIL", "tensorflow_datasets"}\n'
  code += 'print(sorted((heavy | {"grain", "jax"}) & set(sys.modules)))'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_an_unreadable_image_is_named(split):
  class Source(list):
    """Records, one of them damaged after it was written."""

  records = Source(split.images.source)
  image = stored.parse(records[2]).image
  records[2] = records[2].replace(image[:60], bytes(60))
  split.images.__dict__['source'] = records
  message = r'folder/1.0.0 train: image 2 a/4\.JPEG cannot be decoded'
  with pytest.raises(ValueError, match=message):
    batch(split, batch_size=TRAIN)
  with pytest.raises(ValueError, match=message):
    split.images[:]


def test_a_disk_that_fails_damages_nothing(split):
  """What may pass is no reason to throw the set away."""

  class Source(list):
    dataset_info = split.images.source.dataset_info

    def __getitem__(self, row):
      raise OSError(errno.EIO, 'Input/output error')

  split.images.__dict__['source'] = Source()
  with pytest.raises(OSError, match='Input/output error'):
    split.images.example(0)


def test_a_disk_that_fails_while_a_set_is_opened(split, monkeypatch, tmp_path):
  def fails(*args, **kwargs):
    raise OSError(errno.EIO, 'Input/output error')

  path = folders.labels_path(tmp_path, 'train')
  np.save(path, np.zeros(3, int))
  monkeypatch.setattr(pathlib.Path, 'read_text', fails)
  monkeypatch.setattr(np, 'load', fails)
  with pytest.raises(OSError, match='Input/output error'):
    folders.facts(split.images.folder)
  with pytest.raises(OSError, match='Input/output error'):
    folders.read_labels(tmp_path, 'train', 3)


def damage(home, tmp_path, name, keep):
  """A copy of the set, of which one file has lost its end; that file."""
  shutil.copytree(home / 'folder', tmp_path / 'folder')
  path = tmp_path / 'folder/1.0.0' / name
  content = path.read_bytes()
  path.write_bytes(content[: int(keep * len(content))])
  return path


def said(tmp_path):
  """What loading and reading a damaged set says, in one sentence."""

  def read():
    splits = data.load('folder', data_dir=str(tmp_path), size=24)
    return [split.images[:] for split in splits]

  with pytest.raises(ValueError, match='cannot be read') as info:
    read()
  text = str(info.value)
  assert '\n' not in text
  return text


@pytest.mark.parametrize('keep', [0, 0.5])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_damaged_labels(home, tmp_path, split, keep):
  path = damage(home, tmp_path, f'labels-{split}.npy', keep)
  text = said(tmp_path)
  assert text.startswith(f'{path} cannot be read (')
  assert 'delete it: it is made anew' in text
  path.unlink()
  data.load('folder', data_dir=str(tmp_path))
  assert path.is_file()
  assert not list(path.parent.glob('*.part'))


@pytest.mark.parametrize(
  'labels', [np.zeros(TRAIN - 1, np.int32), np.zeros(TRAIN), np.int32(3)]
)
def test_labels_of_another_set(home, tmp_path, labels):
  path = damage(home, tmp_path, 'labels-train.npy', 0)
  np.save(path, labels)
  assert f'{path} cannot be read (it does not hold 10 whole' in said(tmp_path)


@pytest.mark.parametrize('keep', [0, 0.5])
@pytest.mark.parametrize('labels', [True, False])
@pytest.mark.parametrize(
  'pattern',
  [
    folders.INFO,
    folders.FEATURES,
    'folder-train.array_record-00000-*',
    'folder-train.array_record-00001-*',
    'folder-validation.array_record-00000-*',
  ],
)
def test_a_damaged_file_is_named(home, tmp_path, pattern, keep, labels):
  (name,) = (p.name for p in (home / 'folder/1.0.0').glob(pattern))
  path = damage(home, tmp_path, name, keep)
  if not labels:  # then they are read from the images
    for other in path.parent.glob('labels-*'):
      other.unlink()
  text = said(tmp_path)
  assert text.startswith(f'{path} cannot be read (')
  assert f'remove {path.parent} and prepare the set again' in text
  assert text.endswith('with: djpq data folder --from DIR --out DIR')


@pytest.mark.parametrize('content', ['[]', '{"splits": 3}', '{}', 'null'])
def test_an_info_that_makes_no_sense(home, tmp_path, content):
  path = damage(home, tmp_path, folders.INFO, 0)
  path.write_text(content)
  assert said(tmp_path).startswith(f'{path} cannot be read (')


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(size=0), r'size must be >= 1 .* got 0 and'),
    (dict(size=32, resize=31), r'got 32 and 31 pixels'),
    (dict(min_area=0.0), r'min_area must be in \(0, 1\]; got 0.0'),
    (dict(min_area=1.5), r'got 1.5'),
    (dict(threads=-1), r'threads must be >= 1; got -1'),
    (dict(sise=3), r"folder takes no argument 'sise'; did you mean 'size'"),
  ],
)
def test_refuses(home, kwargs, message):
  with pytest.raises(ValueError, match=message):
    data.load('folder', data_dir=str(home), **kwargs)


def test_refuses_a_shift(split):
  with pytest.raises(ValueError, match='take no shift; got 1 pixels'):
    data.check_augment(split, data.Augment(shift=1))
  data.check_augment(split, data.Augment(flip=True))
  with pytest.raises(ValueError, match=r'folder/train.*no shift; got 2 pixels'):
    batch(split, augment=data.Augment(shift=2))


@pytest.mark.parametrize('name', ['imagenet', 'folder'])
def test_an_absent_set_says_how_to_get_it(tmp_path, name):
  message = rf'is not in .*{tmp_path.name}.*djpq data {name} --from DIR --out'
  with pytest.raises(FileNotFoundError, match=message):
    data.load(name, data_dir=str(tmp_path))


def test_an_unfinished_set_is_not_taken(tmp_path):
  (tmp_path / 'folder/incomplete.1.0.0').mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match='not prepared to its end'):
    data.load('folder', data_dir=str(tmp_path))


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('array_record', 'tfrecord', r'in tfrecord form, which only TensorFlow'),
    ('"validation"', '"valid"', r"has no split 'validation'"),
  ],
)
def test_a_set_of_another_form_is_refused(home, tmp_path, old, new, message):
  text = (home / 'folder/1.0.0' / folders.INFO).read_text()
  path = tmp_path / 'folder/1.0.0' / folders.INFO
  pictures.write(path, text.replace(old, new).encode())
  with pytest.raises(ValueError, match=message):
    data.load('folder', data_dir=str(tmp_path))


def test_the_newest_version_is_taken(home, tmp_path):
  for version in ('1.0.0', '1.9.0', '1.10.0'):
    shutil.copytree(home / 'folder/1.0.0', tmp_path / 'folder' / version)
  (tmp_path / 'folder/2.0.0').mkdir()  # nothing in there
  assert folders.find('folder', str(tmp_path)).name == '1.10.0'
