"""ImageNet from its tars and from folders: one result, and what is missing."""

import io
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pictures
import pytest

from djpq_jax import data
from djpq_jax.data import stored
from djpq_jax.data.prepare import imagenet

CLASSES = ['n01440764', 'n01443537', 'n01484850']
# Of the validation images, in the order of their names.
LABELS = ['n01443537', 'n01440764', 'n01443537', 'n01484850']
TRAIN, VAL = 4, len(LABELS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Three classes with four images each."""
  lines = {'labels.txt': CLASSES, 'validation_labels.txt': LABELS}
  monkeypatch.setattr(imagenet, '_lines', lambda name: list(lines[name]))
  counts = {'train': TRAIN * len(CLASSES), 'validation': VAL}
  monkeypatch.setattr(imagenet, 'COUNTS', counts)


def image(i):
  """JPEGs; one is in CMYK and one is a PNG, as in the official files."""
  pixels = pictures.smooth(20 + i, 30, i)
  if i == 5:
    return pictures.encoded(pixels, mode='CMYK')
  return pictures.encoded(pixels, 'PNG' if i == 6 else 'JPEG')


def train_files():
  return {
    f'{wnid}/{wnid}_{10 - i}.JPEG': image(TRAIN * c + i)
    for c, wnid in enumerate(CLASSES)
    for i in range(TRAIN)
  }


def val_files():
  names = [f'ILSVRC2012_val_{i + 1:08d}.JPEG' for i in range(VAL)]
  return {name: image(20 + i) for i, name in enumerate(names)}


def tar(files):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w') as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return out.getvalue()


def write_tars(folder, val=None):
  classes = {}
  for path, content in train_files().items():
    wnid, name = path.split('/')
    classes.setdefault(wnid, {})[name] = content
  inner = {f'{wnid}.tar': tar(files) for wnid, files in classes.items()}
  pictures.write(folder / imagenet.TRAIN, tar(inner))
  # Not in the order of their names, as in the official file.
  files = dict(reversed((val or val_files()).items()))
  pictures.write(folder / imagenet.VALIDATION, tar(files))


def write_folders(folder, flat):
  for path, content in train_files().items():
    pictures.write(folder / 'train' / path, content)
  for (name, content), wnid in zip(val_files().items(), LABELS):
    path = name if flat else f'{wnid}/{name}'
    pictures.write(folder / 'val' / path, content)


@pytest.fixture(params=['tars', 'folders', 'flat'])
def source(request, tmp_path):
  if request.param == 'tars':
    write_tars(tmp_path / 'in')
  else:
    write_folders(tmp_path / 'in', request.param == 'flat')
  return tmp_path / 'in'


def stored_records(home):
  splits = data.load('imagenet', data_dir=str(home))
  return [
    {r.name: r for r in map(stored.parse, split.images.source)}
    for split in splits
  ]


def test_every_image_is_stored_with_its_label(source, tmp_path):
  summary = imagenet.prepare(source, tmp_path / 'out', shard_bytes=3000)
  assert summary.images == {'train': 12, 'validation': 4}
  assert sorted(summary.repaired.values()) == ['CMYK made RGB', 'PNG made JPEG']
  train, val = stored_records(tmp_path / 'out')
  expected = {path.split('/')[1]: x for path, x in train_files().items()}
  repaired = {name.split('/')[-1] for name in summary.repaired}
  assert train.keys() == expected.keys()
  for name, record in train.items():
    assert record.label == CLASSES.index(name.split('_')[0])
    if name in repaired:
      assert record.image[:2] == b'\xff\xd8'
    else:
      assert record.image == expected[name]
  assert {name: r.image for name, r in val.items()} == val_files()
  labels = [CLASSES.index(wnid) for wnid in LABELS]
  assert [val[name].label for name in sorted(val)] == labels


def test_splits_are_ready_for_training(source, tmp_path):
  imagenet.prepare(source, tmp_path / 'out')
  train, val = data.load('imagenet', data_dir=str(tmp_path / 'out'))
  assert train.images.shape == (12, 224, 224, 3)
  assert (train.images.resize, train.images.min_area) == (256, 0.08)
  assert (train.name, val.name) == (
    'imagenet2012/train',
    'imagenet2012/validation',
  )
  batch = data.train_batch(
    train, 0, batch_size=2, seed=0, augment=data.Augment(flip=True)
  )
  assert batch['image'].shape == (2, 224, 224, 3)
  assert np.isfinite(batch['image']).all()


def test_the_stock_builder_of_tfds_reads_it(tmp_path):
  write_tars(tmp_path / 'in')
  imagenet.prepare(tmp_path / 'in', tmp_path / 'out')
  code = f"""
import sys, tensorflow_datasets as tfds
source = tfds.data_source(
  'imagenet2012', split='validation', data_dir={str(tmp_path / 'out')!r},
  download=False)
print([x['label'] for x in source], source[0]['image'].shape)
assert 'tensorflow' not in sys.modules
"""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[1, 0, 1, 2] (40, 30, 3)'


def test_labels_and_classes_ship_with_tfds(monkeypatch):
  monkeypatch.undo()
  classes = imagenet._lines('labels.txt')
  labels = imagenet._lines('validation_labels.txt')
  assert classes == sorted(set(classes))
  assert len(classes) == 1000
  assert len(labels) == imagenet.COUNTS['validation']
  assert {labels.count(wnid) for wnid in classes} == {50}


def refused(source, match):
  with pytest.raises(ValueError, match=match) as error:
    imagenet.prepare(source, source.parent / 'out')
  assert '\n' not in str(error.value)
  assert not (source.parent / 'out/imagenet2012/5.1.0').exists()


def test_missing_training_images_are_counted(tmp_path):
  write_folders(tmp_path / 'in', flat=True)
  (tmp_path / f'in/train/{CLASSES[0]}/{CLASSES[0]}_10.JPEG').unlink()
  refused(tmp_path / 'in', 'has 12 train images, but 11 .* djpq data folder')


@pytest.mark.parametrize('form', ['tars', 'flat'])
def test_missing_validation_images_are_counted(tmp_path, form):
  if form == 'tars':
    write_tars(tmp_path / 'in', dict(list(val_files().items())[1:]))
  else:
    write_folders(tmp_path / 'in', flat=True)
    next((tmp_path / 'in/val').iterdir()).unlink()
  refused(tmp_path / 'in', 'holds 3 images; ImageNet has 4 for validation')


@pytest.mark.parametrize('name', [imagenet.TRAIN, imagenet.VALIDATION])
@pytest.mark.parametrize('part', [0.3, 0.9])
def test_a_tar_that_is_cut_off_is_named(tmp_path, name, part):
  write_tars(tmp_path / 'in')
  path = tmp_path / 'in' / name
  content = path.read_bytes().rstrip(b'\0')
  path.write_bytes(content[: int(part * len(content))])
  refused(tmp_path / 'in', f'{name} .*cut off|{name} holds|but .* are there')


def test_what_is_no_tar_is_named(tmp_path):
  write_tars(tmp_path / 'in')
  pictures.write(tmp_path / 'in' / imagenet.TRAIN, b'not a tar file' * 100)
  refused(tmp_path / 'in', f'{imagenet.TRAIN} is no tar of tars')


def test_a_strange_class_is_named(tmp_path):
  write_tars(tmp_path / 'in')
  inner = tar({'n1_1.JPEG': image(0)})
  pictures.write(tmp_path / 'in' / imagenet.TRAIN, tar({'n1.tar': inner}))
  refused(tmp_path / 'in', r'holds n1\.tar, which is no class')


@pytest.mark.parametrize(
  ('lost', 'match'),
  [
    (imagenet.TRAIN, f'no folder train .*, nor the file {imagenet.TRAIN}'),
    (imagenet.VALIDATION, f'or val .*, nor the file {imagenet.VALIDATION}'),
  ],
)
def test_missing_tars_are_named(tmp_path, lost, match):
  write_tars(tmp_path / 'in')
  (tmp_path / 'in' / lost).unlink()
  refused(tmp_path / 'in', match)


def test_no_source_at_all(tmp_path):
  refused(tmp_path / 'in', 'there is no folder')


def test_a_corrupt_image_in_a_tar_is_named(tmp_path):
  files = val_files()
  name = sorted(files)[1]
  files[name] = files[name][:200]
  write_tars(tmp_path / 'in', files)
  refused(tmp_path / 'in', f'1 of 16 images cannot be read: validation/{name}')
  shutil.rmtree(tmp_path / 'out')
  summary = imagenet.prepare(
    tmp_path / 'in', tmp_path / 'out', skip_corrupt=True
  )
  assert summary.images == {'train': 12, 'validation': 3}
