"""Where the images of a set lie: in class folders, or within tar files."""

from collections.abc import Iterator
import dataclasses
import hashlib
import os
import pathlib
import tarfile

SUFFIXES = '.jpg .jpeg .png .bmp .webp .gif .tif .tiff'.split()


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """One image file: alone on disk, within a tar file, or in memory."""

  name: str  # unique in its split
  label: int
  path: str
  offset: int  # bytes from the start of `path`
  size: int  # bytes
  data: bytes | None = None  # the file, if it is in memory

  def read(self) -> bytes:
    """The image file."""
    if self.data is not None:
      return self.data
    with open(self.path, 'rb') as file:
      file.seek(self.offset)
      return file.read(self.size)


def fingerprint(items: list[Item]) -> str:
  """A hash of names, labels and sizes, in their order."""
  digest = hashlib.sha256()
  for item in items:
    digest.update(f'{item.name}\0{item.label}\0{item.size}\n'.encode())
  return digest.hexdigest()


def class_names(folder: pathlib.Path) -> list[str]:
  """Names of the class folders, sorted.

  Raises:
    ValueError: there are none.
  """
  names = sorted(
    entry.name
    for entry in os.scandir(folder)
    if entry.is_dir() and not entry.name.startswith('.')
  )
  if not names:
    raise ValueError(f'{folder} has no class folders')
  return names


def class_folders(
  folder: pathlib.Path, classes: list[str], *, short_names: bool
) -> list[Item]:
  """The images of `folder/CLASS/**`, sorted.

  Args:
    folder: holds one folder per class.
    classes: the allowed names; their positions are the labels.
    short_names: an image is named by its file alone, not by its path.

  Raises:
    ValueError: a folder is no class, or a class has no image.
  """
  labels = {name: label for label, name in enumerate(classes)}
  items = []
  for name in class_names(folder):
    if name not in labels:
      raise ValueError(
        f'{folder / name} is not one of the {len(classes)} classes, which are '
        f'{classes[0]}, ..., {classes[-1]}'
      )
    found = [
      Item(
        path.name if short_names else path.relative_to(folder).as_posix(),
        labels[name],
        str(path),
        0,
        path.stat().st_size,
      )
      for path in _images(folder / name)
    ]
    if not found:
      raise ValueError(f'{folder / name} has no images')
    items += found
  return items


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    path
    for path in folder.rglob('*')
    if path.suffix.lower() in SUFFIXES and path.is_file()
  )


def members(path: pathlib.Path) -> Iterator[tuple[str, int, int]]:
  """(name, offset, size) of every file in an uncompressed tar file.

  Raises:
    ValueError: the file is no such tar, or it is cut off.
  """
  try:
    with tarfile.open(path, 'r:') as tar:
      for member in tar:
        if member.isfile():
          yield member.name, member.offset_data, member.size
  except tarfile.TarError as error:
    raise ValueError(f'{path} is no tar file, or cut off: {error}') from error


def nested_members(
  path: pathlib.Path,
) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
  """The same for a tar of tars: (name, members) of each, offsets in `path`.

  Raises:
    ValueError: see `members`.
  """
  inner = ''
  try:
    with tarfile.open(path, 'r:') as outer:
      for member in outer:
        if not member.isfile():
          continue
        inner = f' (in {member.name})'
        with tarfile.open(fileobj=outer.extractfile(member), mode='r:') as tar:
          found = [
            (m.name, member.offset_data + m.offset_data, m.size)
            for m in tar
            if m.isfile()
          ]
        yield member.name, found
        inner = ''
  except tarfile.TarError as error:
    raise ValueError(
      f'{path} is no tar of tars, or cut off{inner}: {error}'
    ) from error
