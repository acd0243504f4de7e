"""Files and folders, of this machine or of an object store.

A path with a scheme, as 'gs://bucket/run', is one of an object store.  It has
the methods of `pathlib.Path` that are used here, by way of `etils.epath`,
which is also how orbax gets to its checkpoints.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import secrets
import shutil
import tempfile
from typing import Any

from etils import epath

from djpq_jax import packages

PARTIAL = '.partial'  # ends the name of what is not complete yet


def path(name: str | os.PathLike[str]) -> pathlib.Path:
  """The path of a file or folder, wherever it is.

  Args:
    name: of this machine, or of an object store, as 'gs://bucket/run'.

  Raises:
    ImportError: the package for that store is not installed.
    ValueError: there is no such kind of store.
  """
  text = os.fspath(name)
  scheme, separator, rest = text.partition('://')
  if not separator:
    return pathlib.Path(text)
  if scheme != 'gs' or not rest.strip('/'):
    raise ValueError(
      f'{text} is neither a path of this machine nor of the form gs://bucket/...'
    )
  packages.require('gcsfs', extra='gcs', use='paths of Google Cloud Storage')
  there: Any = epath.Path(text)
  return there


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is one of an object store."""
  return '://' in os.fspath(path)


def obstacle(path: pathlib.Path) -> pathlib.Path | None:
  """The file that stands where a folder, or one above it, should be."""
  for part in (path,) if is_remote(path) else (path, *path.parents):
    if part.exists():
      return None if part.is_dir() else part
  return None


def check_place(name: str | os.PathLike[str]) -> None:
  """Refuses a place of this machine where no file can be put.

  Raises:
    ValueError: it is a folder, a device, or below a file.
  """
  if is_remote(name):
    return
  where, text = pathlib.Path(name), os.fspath(name)
  file = obstacle(where.absolute().parent)
  if file is not None:
    raise ValueError(f'{text} cannot be written: {file} is a file')
  if where.is_dir():
    raise ValueError(f'{text} is a folder; give the name of a file in it')
  if where.exists() and not where.is_file():  # as /dev/null
    raise ValueError(f'{text} is no regular file; give the name of one')


def absolute(path: pathlib.Path) -> pathlib.Path:
  """The path from the root; one of an object store is."""
  return path if is_remote(path) else path.absolute()


def replace(name: str | os.PathLike[str], content: str | bytes) -> pathlib.Path:
  """Writes a file; one that is there stays until the new one is complete.

  Args:
    name: of the file, or of a link to it; its folder is created if missing.
    content: text, written as UTF-8, or bytes.

  Returns:
    The path.

  Raises:
    ValueError: no file can be there, see `check_place`.
  """
  where = path(name)
  if isinstance(content, str):
    content = content.encode()
  if is_remote(where):  # a store has an object whole or not at all
    where.write_bytes(content)
    return where
  check_place(where)
  target = where.resolve()  # a link stays one
  target.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, since a rename is atomic within a file system only.
  # And of its own, since others may write the same file.
  token = f'{os.getpid()}-{secrets.token_hex(4)}'
  partial = target.with_name(f'{target.name}.{token}{PARTIAL}')
  try:
    partial.write_bytes(content)
    os.replace(partial, target)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  return where


# What does not pass by itself: what is there, and who may do what with it.
_LASTING = {
  *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY),
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
  *(errno.ENOSPC, errno.EDQUOT),
}


def may_pass(error: OSError) -> bool:
  """Whether an error of the system may be gone when the same is tried again.

  >>> may_pass(TimeoutError()), may_pass(OSError(errno.EIO, 'I/O error'))
  (True, True)
  >>> may_pass(OSError(errno.ENOSPC, 'No space left on device'))
  False
  """
  return error.errno not in _LASTING


def raise_if_it_may_pass(error: Exception) -> None:
  """Raises an error again that says nothing of the file it came from."""
  if isinstance(error, OSError) and may_pass(error):
    raise error


def first_line(error: Exception) -> str:
  """What an error of whatever reads a file says, for a sentence about it."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def remove(path: pathlib.Path) -> None:
  """Removes a file, a link, or a folder with all that is in it."""
  if is_remote(path):
    there: Any = path
    if path.is_dir():
      there.rmtree()
    else:
      there.unlink()
  elif path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()


@contextlib.contextmanager
def to_write(folder: pathlib.Path, last: str) -> Iterator[pathlib.Path]:
  """A folder to fill, which then takes the place of `folder`.

  What is there stays until all is written.  In an object store, which renames
  no folder, it then goes, and the file `last` comes after all others: without
  it the folder is not complete.

  Args:
    folder: what to make or to replace.
    last: name of the file in it that comes last.
  """
  if not is_remote(folder):
    folder = folder.resolve()  # a link stays one
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
      shutil.rmtree(folder)
    os.replace(partial, folder)
    return
  with tempfile.TemporaryDirectory() as name:
    here = pathlib.Path(name)
    yield here
    if folder.exists():
      remove(folder)
    found = [f.relative_to(here) for f in here.rglob('*') if f.is_file()]
    for file in sorted(found, key=lambda f: (f == pathlib.Path(last), f)):
      (folder / file).write_bytes((here / file).read_bytes())


@contextlib.contextmanager
def to_read(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The folder itself, or a copy of one that is in an object store."""
  if not is_remote(folder):
    yield folder.absolute()
    return
  with tempfile.TemporaryDirectory() as name:
    here = pathlib.Path(name) / folder.name
    _fetch(folder, here)
    yield here


def _fetch(folder: pathlib.Path, here: pathlib.Path) -> None:
  here.mkdir()
  for file in folder.iterdir():
    if file.is_dir():
      _fetch(file, here / file.name)
    else:
      (here / file.name).write_bytes(file.read_bytes())
