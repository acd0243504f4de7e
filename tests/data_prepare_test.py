"""Preparation: whole or not at all, goes on after a stop, names what is bad."""

import fcntl
import io
import json
import pathlib
import resource
import shutil

import numpy as np
import pictures
from PIL import Image
from PIL import ImageFile
import pytest

from djpq_jax import data
from djpq_jax.data import stored
from djpq_jax.data.prepare import folder
from djpq_jax.data.prepare import images
from djpq_jax.data.prepare import listing
from djpq_jax.data.prepare import sets

SMOOTH = pictures.smooth(30, 40)
JPEG = pictures.encoded(SMOOTH)
LONG = pictures.encoded(pictures.smooth(200, 300))
SMALL_SHARDS = dict(shard_bytes=2000)


@pytest.fixture
def source(tmp_path):
  pictures.class_folders(tmp_path / 'in')
  return tmp_path / 'in'


def final(tmp_path):
  return tmp_path / 'out/folder/1.0.0'


def prepare(source, **kwargs):
  return folder.prepare(source, source.parent / 'out', **kwargs)


def records(tmp_path):
  """Every (image, label, name) of both splits."""
  found = []
  for split in data.load('folder', data_dir=str(tmp_path / 'out')):
    found += map(stored.parse, split.images.source)
  return found


def files(folder):
  return {p.name: p.stat().st_ino for p in folder.iterdir()}


class TestImages:
  @pytest.mark.parametrize('lossless', [True, False])
  @pytest.mark.parametrize(
    'encoded',
    [
      JPEG,
      pictures.encoded(SMOOTH, mode='L'),
      pictures.encoded(SMOOTH, progressive=True, subsampling=2),
      JPEG + b'more after the end',
    ],
    ids=['rgb', 'grey', 'progressive', 'longer'],
  )
  def test_sound_jpegs_stay_as_they_are(self, encoded, lossless):
    assert images.checked(encoded, lossless=lossless) == (encoded, '')

  def test_cmyk_becomes_rgb(self):
    cmyk = pictures.encoded(SMOOTH, mode='CMYK')
    found, note = images.checked(cmyk, lossless=False)
    assert note == 'CMYK made RGB'
    image = Image.open(io.BytesIO(found))
    assert (image.format, image.mode) == ('JPEG', 'RGB')
    assert np.abs(np.asarray(image, int) - SMOOTH).mean() < 2

  def test_a_png_called_jpeg_becomes_what_it_should_be(self):
    png = pictures.encoded(SMOOTH, 'PNG')
    assert images.checked(png, lossless=True) == (png, '')
    found, note = images.checked(png, lossless=False)
    assert note == 'PNG made JPEG'
    image = Image.open(io.BytesIO(found))
    assert (image.format, image.mode) == ('JPEG', 'RGB')
    assert np.abs(np.asarray(image, int) - SMOOTH).mean() < 1

  @pytest.mark.parametrize(
    ('form', 'mode', 'kind'),
    [
      ('PNG', 'RGBA', 'PNG RGBA'),
      ('PNG', 'P', 'PNG P'),
      ('BMP', 'RGB', 'BMP RGB'),
      ('TIFF', 'RGB', 'TIFF RGB'),
      ('GIF', 'P', 'GIF P'),
    ],
  )
  def test_other_forms_become_png_without_loss(self, form, mode, kind):
    encoded = pictures.encoded(SMOOTH, form, mode)
    found, note = images.checked(encoded, lossless=True)
    assert note == f'{kind} made PNG RGB'
    whole = Image.open(io.BytesIO(encoded)).convert('RGB')
    image = Image.open(io.BytesIO(found))
    assert (image.format, image.mode) == ('PNG', 'RGB')
    np.testing.assert_array_equal(np.asarray(image), np.asarray(whole))

  @pytest.mark.parametrize('form', ['PNG', 'TIFF'])
  def test_sixteen_bits_keep_the_upper_eight(self, form):
    grey = SMOOTH[..., 0]
    encoded = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(encoded, form)
    found, note = images.checked(encoded.getvalue(), lossless=True)
    assert note == f'{form} I;16 made PNG RGB'
    image = np.asarray(Image.open(io.BytesIO(found)))
    np.testing.assert_array_equal(image, np.stack([grey] * 3, -1))

  @pytest.mark.parametrize('dtype', [np.float32, np.int32])
  def test_values_without_a_range_are_refused(self, dtype):
    encoded = io.BytesIO()
    Image.fromarray(SMOOTH[..., 0].astype(dtype)).save(encoded, 'TIFF')
    with pytest.raises(images.CorruptImageError, match='no known range'):
      images.checked(encoded.getvalue(), lossless=True)

  def test_an_image_that_is_too_large_is_named_and_not_decoded(
    self, monkeypatch
  ):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(images.CorruptImageError, match='pixels'):
      images.checked(pictures.encoded(SMOOTH, 'PNG'), lossless=True)

  def test_what_is_no_image_is_said_in_the_same_words_each_time(self):
    with pytest.raises(images.CorruptImageError, match='it is no image file'):
      images.checked(b'no image at all', lossless=True)

  @pytest.mark.parametrize(
    'encoded',
    [
      b'',
      b'no image at all',
      JPEG[:2],
      JPEG[:100],
      LONG[: len(LONG) // 2],
      LONG[:-2],
      pictures.encoded(SMOOTH, mode='CMYK')[:-400],
      pictures.encoded(SMOOTH, 'PNG')[:-40],
      pictures.encoded(SMOOTH, 'PNG')[:20],
    ],
    ids='empty text marker header half end cmyk png pngheader'.split(),
  )
  @pytest.mark.parametrize('lenient', [False, True])
  def test_what_is_cut_off_is_corrupt(self, encoded, lenient, monkeypatch):
    """Also when another library has told Pillow to be lenient."""
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', lenient)
    with pytest.raises(images.CorruptImageError) as error:
      images.checked(encoded, lossless=True)
    assert '\n' not in str(error.value)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES

  def test_damage_that_decoders_pass_over_is_noted(self):
    middle = len(LONG) // 2
    damaged = LONG[:middle] + bytes(40) + LONG[middle + 40 :]
    found, note = images.checked(damaged, lossless=True)
    assert found == damaged
    assert note.startswith('readable, though: ')


class TestWhole:
  def test_every_image_is_stored_with_its_label(self, source, tmp_path):
    summary = prepare(source)
    assert summary.images == {'train': 10, 'validation': 6}
    assert summary.folder == str(final(tmp_path))
    assert summary.repaired == summary.left_out == {}
    assert not summary.was_there
    found = records(tmp_path)
    paths = sorted(source.glob('train/*/*')) + sorted(source.glob('val/*/*'))
    assert [r.image for r in found] == [p.read_bytes() for p in paths]
    names = [p.relative_to(p.parents[1]).as_posix() for p in paths]
    assert [r.name for r in found] == names
    assert [r.label for r in found] == 5 * [0] + 5 * [1] + 3 * [0] + 3 * [1]

  def test_only_the_set_is_left(self, source, tmp_path):
    prepare(source, **SMALL_SHARDS)
    assert files(tmp_path / 'out/folder').keys() == {'.lock', '1.0.0'}
    shards = [n for n in files(final(tmp_path)) if '.array_record-' in n]
    assert len(shards) > 4
    assert files(final(tmp_path)).keys() - set(shards) == {
      'dataset_info.json',
      'features.json',
      'label.labels.txt',
      'labels-train.npy',
      'labels-validation.npy',
      'preparation.json',
    }

  def test_shards_change_nothing(self, source, tmp_path):
    prepare(source)
    whole = records(tmp_path)
    shutil.rmtree(tmp_path / 'out')
    prepare(source, threads=1, **SMALL_SHARDS)
    assert records(tmp_path) == whole

  def test_progress_reaches_the_end_once(self, source):
    calls = []
    prepare(source, progress=lambda *call: calls.append(call))
    assert calls == [('train', i, 10) for i in range(1, 11)] + [
      ('validation', i, 6) for i in range(1, 7)
    ]

  def test_again_is_no_work(self, source, tmp_path):
    first = prepare(source)
    before = files(final(tmp_path))
    again = prepare(source)
    assert again.was_there
    assert again.images == first.images
    assert files(final(tmp_path)) == before

  def test_another_set_is_not_overwritten(self, source):
    prepare(source)
    (source / 'train/ant/0.jpg').unlink()
    with pytest.raises(
      ValueError, match='exists already, made from other images'
    ):
      prepare(source)

  def test_a_set_of_others_is_not_overwritten(self, source, tmp_path):
    final(tmp_path).mkdir(parents=True)
    with pytest.raises(
      ValueError, match='exists already, made from other images'
    ):
      prepare(source)

  def test_a_class_of_its_own_for_validation_is_refused(self, source):
    pictures.write(source / 'val/cow/0.jpg', JPEG)
    with pytest.raises(ValueError, match=r'val/cow is not one of the 2 .*ant'):
      prepare(source)

  def test_an_empty_class_is_refused(self, source):
    pictures.write(source / 'train/cow/readme.txt', b'no image')
    with pytest.raises(ValueError, match=r'train/cow has no images'):
      prepare(source)

  @pytest.mark.parametrize(
    ('remove', 'message'),
    [
      ('', r'there is no folder .*in$'),
      ('train', r'in has no folder train \(there: val\)'),
      ('val', r'no folder validation or val or test \(there: train\)'),
    ],
  )
  def test_missing_folders_are_named(self, source, remove, message):
    shutil.rmtree(source / remove)
    with pytest.raises(ValueError, match=message):
      prepare(source)

  def test_a_folder_without_classes_is_refused(self, tmp_path):
    pictures.write(tmp_path / 'in/train/0.jpg', JPEG)
    pictures.write(tmp_path / 'in/val/0.jpg', JPEG)
    with pytest.raises(ValueError, match=r'in/train has no class folders'):
      prepare(tmp_path / 'in')

  def test_two_images_of_one_name_are_refused(self, tmp_path):
    item = listing.Item('a.jpg', 0, '', 0, len(JPEG), JPEG)
    layout = sets.Layout('toy', '1.0.0', ('a',), lossless=True)
    with pytest.raises(ValueError, match=r'two train images are called a\.jpg'):
      sets.write(tmp_path, layout, {'train': [item, item]})

  def test_one_process_at_a_time(self, source, tmp_path):
    home = tmp_path / 'out/folder'
    home.mkdir(parents=True)
    with open(home / '.lock', 'w') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      with pytest.raises(ValueError, match='another process is preparing'):
        prepare(source)
    assert prepare(source).images['train'] == 10


class Stop:
  """A progress that ends the preparation at a call."""

  def __init__(self, at):
    self.left = at

  def __call__(self, *_):
    self.left -= 1
    if not self.left:
      raise KeyboardInterrupt


class TestResume:
  @pytest.fixture
  def whole(self, source, tmp_path):
    prepare(source, **SMALL_SHARDS)
    found = records(tmp_path)
    shutil.rmtree(tmp_path / 'out')
    return found

  def stop(self, source, at):
    with pytest.raises(KeyboardInterrupt):
      prepare(source, progress=Stop(at), **SMALL_SHARDS)
    work = source.parent / 'out/folder/incomplete.1.0.0'
    return work, {
      name: inode
      for name, inode in files(work).items()
      if '.array_record' in name and not name.endswith(('.part', '.json'))
    }

  @pytest.mark.parametrize('at', [1, 4, 10, 11, 16])
  def test_goes_on_where_it_stopped(self, source, tmp_path, whole, at):
    work, done = self.stop(source, at)
    assert not final(tmp_path).exists()
    assert list(work.glob('*.part'))  # half-written
    with pytest.raises(FileNotFoundError, match='not prepared to its end'):
      records(tmp_path)
    assert (at > 1) == bool(done)
    calls = []
    prepare(source, progress=lambda *c: calls.append(c), **SMALL_SHARDS)
    assert len(calls) == 16
    assert records(tmp_path) == whole
    after = files(final(tmp_path))
    assert not [name for name in after if name.endswith('.part')]
    assert {name: after[name] for name in done} == done  # not written again

  def test_goes_on_when_there_is_room_again(self, source, tmp_path, whole):
    """A limit of the process stands for a disk that is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
      with pytest.raises(OSError, match=r'File too large; writing .*\.part$'):
        prepare(source, **SMALL_SHARDS)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not final(tmp_path).exists()
    prepare(source, **SMALL_SHARDS)
    assert records(tmp_path) == whole

  def test_half_written_files_are_never_taken(self, source, tmp_path, whole):
    """As a power cut leaves them, at every stage of a shard."""
    work, done = self.stop(source, 10)
    first, second, *_ = sorted(done)
    (work / f'{first}.json').unlink()  # its record was lost
    half = (work / second).read_bytes()[:100]
    (work / second).rename(work / f'{second}.part')
    (work / f'{second}.part').write_bytes(half)
    (work / 'strange').write_bytes(b'')
    prepare(source, **SMALL_SHARDS)
    assert records(tmp_path) == whole
    assert 'strange' not in files(final(tmp_path))

  def test_a_shard_that_lost_images_is_made_again(
    self, source, tmp_path, whole
  ):
    work, done = self.stop(source, 10)
    first, second, *_ = sorted(done)
    shutil.copy(work / first, work / second)
    record = work / f'{second}.json'
    found = json.loads(record.read_text())
    found['labels'] += found['labels']
    record.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f'{second} holds .*run the same'):
      prepare(source, **SMALL_SHARDS)
    prepare(source, **SMALL_SHARDS)
    assert records(tmp_path) == whole

  def test_what_changed_in_between_is_made_again(self, source, tmp_path):
    self.stop(source, 9)
    changed = pictures.encoded(pictures.smooth(21, 30))
    pictures.write(source / 'train/ant/1.jpg', changed)
    pictures.write(source / 'train/bee/9.jpg', JPEG)
    prepare(source, **SMALL_SHARDS)
    found = {r.name: r for r in records(tmp_path)[:11]}
    assert found['ant/1.jpg'].image == changed
    assert found['bee/9.jpg'].label == 1
    assert len(found) == 11

  def test_other_shards_of_another_attempt_are_removed(self, source, tmp_path):
    self.stop(source, 9)
    prepare(source)
    shards = [n for n in files(final(tmp_path)) if '.array_record-' in n]
    assert sorted(shards) == [
      'folder-train.array_record-00000-of-00001',
      'folder-validation.array_record-00000-of-00001',
    ]


class TestCorrupt:
  @pytest.fixture
  def bad(self, source):
    pictures.write(source / 'train/ant/2.jpg', JPEG[:100])
    pictures.write(source / 'val/bee/0.jpg', b'')
    return source

  def test_all_are_named_and_nothing_is_made(self, bad, tmp_path):
    message = (
      r'^2 of 16 images cannot be read: train/ant/2.jpg, '
      r'validation/bee/0.jpg \(all are in .*corrupt.txt\).*--skip-corrupt$'
    )
    with pytest.raises(ValueError, match=message):
      prepare(bad)
    assert not final(tmp_path).exists()
    lines = (tmp_path / 'out/folder/corrupt.txt').read_text().splitlines()
    assert [line.split('\t')[0] for line in lines] == [
      'train/ant/2.jpg',
      'validation/bee/0.jpg',
    ]

  def test_repaired_files_alone_are_made_again(self, source, tmp_path):
    path = source / 'train/ant/2.jpg'
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match='1 of 16 images cannot be read'):
      prepare(source, **SMALL_SHARDS)
    before = files(tmp_path / 'out/folder/incomplete.1.0.0')
    path.write_bytes(content)
    summary = prepare(source, **SMALL_SHARDS)
    assert summary.images == {'train': 10, 'validation': 6}
    after = files(final(tmp_path))
    shards = [name for name in after if '.array_record-' in name]
    kept = [name for name in shards if after[name] == before.get(name)]
    assert len(kept) == len(shards) - 1

  def test_they_can_be_left_out(self, bad, tmp_path):
    summary = prepare(bad, skip_corrupt=True)
    assert not (tmp_path / 'out/folder/corrupt.txt').exists()
    assert summary.images == {'train': 9, 'validation': 5}
    assert summary.left_out.keys() == {
      'train/ant/2.jpg',
      'validation/bee/0.jpg',
    }
    assert [r.label for r in records(tmp_path)].count(0) == 4 + 3
    text = (final(tmp_path) / 'preparation.json').read_text()
    assert json.loads(text)['left_out'] == summary.left_out

  def test_repairs_are_told(self, source):
    cmyk = pictures.encoded(SMOOTH, mode='CMYK')
    pictures.write(source / 'train/bee/7.JPEG', cmyk)
    assert prepare(source).repaired == {'train/bee/7.JPEG': 'CMYK made RGB'}


def test_paths_may_be_strings_with_a_home(source, monkeypatch):
  monkeypatch.setenv('HOME', str(source.parent))
  summary = folder.prepare(str(source), '~/sets')
  assert pathlib.Path(summary.folder).parts[-3:] == ('sets', 'folder', '1.0.0')
