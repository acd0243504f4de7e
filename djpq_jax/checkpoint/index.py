"""What `load` needs beside the numbers, and people do not.

Names and shapes of all arrays, the plan and the reasons are a long text; in
the manifest they would be larger than a small network's integers.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from djpq_jax.checkpoint import xz

FILE_NAME = 'index.xz'
KEYS = {'arrays', 'plan', 'reasons'}


def write(folder: pathlib.Path, index: Mapping[str, Any]) -> None:
  """Writes it into the folder of an artifact."""
  text = json.dumps(index, allow_nan=False)
  (folder / FILE_NAME).write_bytes(xz.compress(text.encode()))


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Undoes `write`.

  Raises:
    OSError: it cannot be read.
    ValueError: it is damaged; the message says how.
  """
  found = json.loads(xz.decompress((folder / FILE_NAME).read_bytes()))
  if not isinstance(found, dict) or KEYS - found.keys():
    raise ValueError(f'it does not hold {", ".join(sorted(KEYS))}')
  return found
