"""One shard of a prepared set: written whole, or not at all."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

from djpq_jax.data import decode
from djpq_jax.data.prepare import images
from djpq_jax.data.prepare import listing

# Images read ahead of the one that is written, per thread.
AHEAD = 4
# One image at a time can be read. They are compressed already: to do it again
# would save nothing and make reading several times as slow.
OPTIONS = 'group_size:1,uncompressed'


@dataclasses.dataclass
class Record:
  """What is known of a shard; kept beside it until the set is complete."""

  listing: str  # fingerprint of the images that it was made from
  labels: list[int]
  bytes: int
  repaired: dict[str, str]  # name of an image: what was done
  corrupt: dict[str, str]  # name of an image, which is left out: why


def write(
  path: pathlib.Path,
  items: list[listing.Item],
  serialize: Callable[[listing.Item, bytes], bytes],
  pool: futures.ThreadPoolExecutor,
  *,
  lossless: bool,
  step: Callable[[], None],
) -> Record:
  """Writes one shard, unless it is there already, made from the same images.

  The shard gets its name when it is complete and on the disk; before that it
  is called `*.part`, which no reader takes and the next attempt overwrites.

  Args:
    path: of the shard.
    items: its images.
    serialize: gives the record to store for an image's checked bytes.
    pool: threads to read and check on.
    lossless: see `images.checked`.
    step: called after each image.

  Raises:
    OSError: the disk is full, or a source file cannot be read.
  """
  side = path.with_name(f'{path.name}.json')
  record = finished(path, items)
  if record is not None:
    for _ in items:
      step()
    return record
  path.unlink(missing_ok=True)
  record = Record(listing.fingerprint(items), [], 0, {}, {})
  part = path.with_name(f'{path.name}.part')

  def load(item):
    try:
      encoded, note = images.checked(item.read(), lossless=lossless)
    except images.CorruptImageError as error:
      return item, None, str(error)
    return item, serialize(item, encoded), note

  with _writer(part) as writer:
    for item, data, note in _in_order(load, items, pool):
      if data is None:
        record.corrupt[item.name] = note
      else:
        writer.write(data)
        record.labels.append(item.label)
        record.bytes += len(data)
        if note:
          record.repaired[item.name] = note
      step()
  _to_disk(part)
  _replace(side, json.dumps(vars(record)))
  part.replace(path)
  return record


@contextlib.contextmanager
def _writer(path: pathlib.Path) -> Iterator[Any]:
  """A writer of records, whose errors are those of files."""
  module = decode.require('array_record.python.array_record_module')
  writer = module.ArrayRecordWriter(str(path), OPTIONS)
  try:
    yield writer
    writer.close()
  except RuntimeError as error:
    raise OSError(str(error).partition('; at byte')[0]) from error
  except BaseException:
    with contextlib.suppress(RuntimeError):
      writer.close()
    raise


def finished(path: pathlib.Path, items: list[listing.Item]) -> Record | None:
  """The record of a shard that is complete and made from these images."""
  side = path.with_name(f'{path.name}.json')
  if not (path.is_file() and side.is_file()):
    return None
  record = Record(**json.loads(side.read_text()))
  return record if record.listing == listing.fingerprint(items) else None


def forget(path: pathlib.Path) -> None:
  """Removes a shard, so that the next attempt makes it anew."""
  path.unlink(missing_ok=True)
  path.with_name(f'{path.name}.json').unlink(missing_ok=True)


def count(path: pathlib.Path) -> int:
  """Images in a finished shard, from its own index."""
  module = decode.require('array_record.python.array_record_module')
  reader = module.ArrayRecordReader(str(path))
  try:
    return reader.num_records()
  finally:
    reader.close()


def _in_order(
  function, items, pool: futures.ThreadPoolExecutor
) -> Iterator[Any]:
  """Like pool.map, but no more than a few items ahead of the consumer."""
  rest = iter(items)
  window = [
    pool.submit(function, item)
    for item in itertools.islice(rest, AHEAD * pool._max_workers)
  ]
  try:
    while window:
      yield window.pop(0).result()
      window += [
        pool.submit(function, item) for item in itertools.islice(rest, 1)
      ]
  finally:
    for future in window:
      future.cancel()


def _replace(path: pathlib.Path, text: str) -> None:
  part = path.with_name(f'{path.name}.part')
  part.write_text(text)
  _to_disk(part)
  part.replace(path)


def _to_disk(path: pathlib.Path) -> None:
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
