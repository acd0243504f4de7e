"""Files that are there whole or not at all."""

import os
import pathlib
import secrets

PARTIAL = '.partial'  # ends the name of what is not complete yet


def replace(path: str | os.PathLike[str], content: str | bytes) -> pathlib.Path:
  """Writes a file; one that is there stays until the new one is complete.

  Args:
    path: of the file; its folder is created if missing.
    content: text, written as UTF-8, or bytes.

  Returns:
    The path.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, str):
    content = content.encode()
  # In the same folder, since a rename is atomic within a file system only.
  # And of its own, since others may write the same file.
  token = f'{os.getpid()}-{secrets.token_hex(4)}'
  partial = path.with_name(f'{path.name}.{token}{PARTIAL}')
  try:
    partial.write_bytes(content)
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  return path
