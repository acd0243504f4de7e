"""Compressed parts of an artifact, read with a limit."""

import lzma

LARGEST = 2**28  # bytes, to stop at what was made to fill memory


def compress(content: bytes) -> bytes:
  """One xz stream."""
  return lzma.compress(content)


def decompress(content: bytes) -> bytes:
  """Undoes `compress`.

  Raises:
    ValueError: it is damaged, or longer than `LARGEST`.
  """
  unpacking = lzma.LZMADecompressor(memlimit=LARGEST)
  try:
    plain = unpacking.decompress(content, LARGEST)
  except lzma.LZMAError as error:
    raise ValueError(str(error)) from error
  if not unpacking.eof:
    raise ValueError('it is truncated, or too long')
  return plain
