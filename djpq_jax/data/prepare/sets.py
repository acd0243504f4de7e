"""A whole set: its shards, then what is known of it, then its name.

    data_dir/NAME/incomplete.VERSION/    while it is being made
    data_dir/NAME/VERSION/               once it is complete and verified

The second is the first, renamed, so that a set is either complete or absent.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import fcntl
import itertools
import json
import pathlib

import numpy as np

from djpq_jax import machine
from djpq_jax.data import decode
from djpq_jax.data import folders
from djpq_jax.data.prepare import listing
from djpq_jax.data.prepare import shards

SHARD_BYTES = 1 << 30  # Few files stay open, and little is lost on a stop.
SUMMARY = 'preparation.json'
CORRUPT = 'corrupt.txt'

# Called with (split, images done, images in all).
Progress = Callable[[str, int, int], None]
Splits = dict[str, list[listing.Item]]


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a set is called and what it holds."""

  name: str
  version: str
  classes: tuple[str, ...]
  lossless: bool  # Images that are no JPEGs become PNGs, or else JPEGs.
  image_shape: tuple[int | None, ...] = (None, None, 3)
  name_feature: str = 'file_name'  # where the name of an image is stored
  shuffled: bool = False  # The order is not that of the sources.


@dataclasses.dataclass
class Summary:
  """What came of a preparation; kept in the set as preparation.json."""

  folder: str
  images: dict[str, int]  # per split
  repaired: dict[str, str]  # SPLIT/NAME: what was done
  left_out: dict[str, str]  # SPLIT/NAME: why it cannot be read
  listings: dict[str, str]  # per split: fingerprint of the images asked for
  was_there: bool = False  # An earlier call had made the same set.


def write(
  data_dir: str | pathlib.Path,
  layout: Layout,
  splits: Splits,
  *,
  skip_corrupt: bool = False,
  threads: int = 0,
  shard_bytes: int = SHARD_BYTES,
  progress: Progress = lambda *_: None,
) -> Summary:
  """Stores a set, or goes on where an earlier call with it was stopped.

  Args:
    data_dir: where sets lie.
    layout: see there.
    splits: images per split, in the order to store them in.
    skip_corrupt: leave out images that cannot be read, instead of refusing.
    threads: that check images; 0: one per core that this process may use.
    shard_bytes: about so much of the sources goes into one file.
    progress: told about every image.

  Returns:
    The summary. If the same set is there already, it is left as it is.

  Raises:
    ValueError: images cannot be read; another set is there; two images have
      one name; or another process prepares the same set.
  """
  _check_names(splits)
  home = pathlib.Path(data_dir).expanduser() / layout.name
  final = home / layout.version
  listings = {k: listing.fingerprint(items) for k, items in splits.items()}
  if final.exists():
    return _already(final, listings)
  work = home / f'incomplete.{layout.version}'
  work.mkdir(parents=True, exist_ok=True)
  with _alone(home):
    paths = _paths(work, layout, splits, shard_bytes)
    _remove_others(work, paths)
    records = _write_all(layout, paths, threads, progress)
    summary = _summary(final, records, listings)
    if summary.left_out and not skip_corrupt:
      _refuse(paths, records, summary, work)
    _verify(paths, records)
    _write_info(work, layout, records)
    text = json.dumps(dataclasses.asdict(summary), indent=1)
    (work / SUMMARY).write_text(f'{text}\n')
    work.replace(final)
    (home / CORRUPT).unlink(missing_ok=True)
    for path in final.glob('*.array_record-*.json'):
      path.unlink()
  return summary


# Of each split, each shard's path and images.
Paths = dict[str, dict[pathlib.Path, list[listing.Item]]]
Records = dict[str, dict[pathlib.Path, shards.Record]]


def _check_names(splits: Splits) -> None:
  for split, items in splits.items():
    seen = set()
    for item in items:
      if item.name in seen:
        raise ValueError(f'two {split} images are called {item.name}')
      seen.add(item.name)


def _already(final, listings) -> Summary:
  with contextlib.suppress(OSError, ValueError, TypeError):
    summary = Summary(**json.loads((final / SUMMARY).read_text()))
    if summary.listings == listings:
      return dataclasses.replace(summary, folder=str(final), was_there=True)
  raise ValueError(
    f'{final} exists already, made from other images or by another program; '
    'remove it first, or give another --out'
  )


@contextlib.contextmanager
def _alone(home: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out of a set while it is written."""
  with open(home / '.lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f'another process is preparing {home}; wait for it, or stop it'
      ) from None
    yield


def _paths(work, layout, splits, shard_bytes) -> Paths:
  """Cuts each split into shards of about equally many images, in order."""
  paths: Paths = {}
  for split, items in splits.items():
    total = sum(item.size for item in items)
    count = max(1, min(len(items), -(-total // shard_bytes)))
    bounds = [len(items) * i // count for i in range(count + 1)]
    stem = f'{layout.name}-{split}.array_record'
    paths[split] = {
      work / f'{stem}-{i:05d}-of-{count:05d}': items[low:high]
      for i, (low, high) in enumerate(itertools.pairwise(bounds))
    }
  return paths


def _remove_others(work, paths) -> None:
  """Removes what another attempt, on other images, has left behind."""
  wanted = {path.name for split in paths.values() for path in split}
  for path in work.iterdir():
    if path.name.removesuffix('.json') not in wanted:
      path.unlink()


def _write_all(layout, paths, threads, progress) -> Records:
  serialize = _serializer(layout)
  records: Records = {split: {} for split in paths}
  pool = futures.ThreadPoolExecutor(threads or machine.cores(), 'djpq-check')
  try:
    for split, files in paths.items():
      total = sum(map(len, files.values()))
      done = iter(range(1, total + 1))
      for path, items in files.items():
        records[split][path] = shards.write(
          path,
          items,
          serialize,
          pool,
          lossless=layout.lossless,
          step=lambda: progress(split, next(done), total),  # noqa: B023
        )
  finally:
    pool.shutdown(cancel_futures=True)
  return records


def _summary(final, records: Records, listings) -> Summary:
  def named(field):
    return {
      f'{split}/{name}': note
      for split, files in records.items()
      for record in files.values()
      for name, note in getattr(record, field).items()
    }

  images = {
    split: sum(len(record.labels) for record in files.values())
    for split, files in records.items()
  }
  return Summary(
    str(final), images, named('repaired'), named('corrupt'), listings
  )


def _refuse(paths, records: Records, summary, work):
  """Names the corrupt images; their shards will be made anew."""
  for files in records.values():
    for path, record in files.items():
      if record.corrupt:
        shards.forget(path)
  path = work.parent / CORRUPT
  lines = [f'{name}\t{why}\n' for name, why in summary.left_out.items()]
  path.write_text(''.join(lines))
  some = ', '.join(list(summary.left_out)[:3])
  more = ', ...' if len(lines) > 3 else ''
  raise ValueError(
    f'{len(lines)} of {sum(summary.images.values()) + len(lines)} images '
    f'cannot be read: {some}{more} (all are in {path}); repair them and run '
    'the same again, or leave them out with --skip-corrupt'
  )


def _verify(paths: Paths, records: Records) -> None:
  """Reads the shards' own counts back."""
  for split, files in records.items():
    for path, record in files.items():
      found = shards.count(path) if record.labels else 0
      if found != len(record.labels) or not found:
        shards.forget(path)
        raise ValueError(
          f'{path.name} holds {found} images of {len(paths[split][path])}; '
          'it is removed: run the same again'
        )


def _features(layout: Layout):
  tfds = decode.require('tensorflow_datasets')
  form = None if layout.lossless else 'jpeg'
  return tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(
        shape=layout.image_shape, encoding_format=form
      ),
      'label': tfds.features.ClassLabel(names=layout.classes),
      layout.name_feature: tfds.features.Text(),
    }
  )


def _serializer(layout: Layout):
  """Gives the function that makes the record of one image."""
  decode.require('tensorflow_datasets')
  from tensorflow_datasets.core import example_serializer

  serializer = example_serializer.ExampleSerializer(
    _features(layout).get_serialized_info()
  )

  def serialize(item: listing.Item, encoded: bytes) -> bytes:
    return serializer.serialize_example(
      {
        'image': encoded,
        'label': item.label,
        layout.name_feature: item.name.encode(),
      }
    )

  return serialize


def _write_info(work, layout: Layout, records: Records) -> None:
  """What makes the folder a tfds set; and the labels, for quick reading."""
  tfds = decode.require('tensorflow_datasets')
  infos = []
  for split, files in records.items():
    labels = [label for record in files.values() for label in record.labels]
    np.save(folders.labels_path(work, split), np.array(labels, np.int32))
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(record.labels) for record in files.values()],
        num_bytes=sum(record.bytes for record in files.values()),
        filename_template=tfds.core.ShardedFileTemplate(
          data_dir=work,
          dataset_name=layout.name,
          split=split,
          filetype_suffix='array_record',
        ),
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=work,
    features=_features(layout),
    split_infos=infos,
    version=layout.version,
    check_data=False,  # It would need TensorFlow.
    supervised_keys=('image', 'label'),
    disable_shuffling=not layout.shuffled,
  )
