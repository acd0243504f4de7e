"""Memory of large batches, used again when nobody holds it any more.

A batch of 256 images of 224 x 224 is 38 MB of bytes or 150 MB of float32, which
the C library asks of the system anew each time; to be given so many fresh pages
takes longer than to fill them.
"""

import collections
import math
import weakref

import numpy as np

# Free memory that is kept, per size; a prefetched stream has some in flight.
KEPT = 4

_free: dict[int, collections.deque] = {}


def empty(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
  """Like np.empty, in memory that batches have had before.

  The memory is used again when the array and all views of it are gone. Those
  who read it without Python knowing, as JAX may, hold the array meanwhile.
  """
  size = np.dtype(dtype).itemsize * math.prod(shape)
  if not size:
    return np.empty(shape, dtype)
  free = _free.setdefault(size, collections.deque(maxlen=KEPT))
  try:
    memory = free.pop()
  except IndexError:  # also if another thread was faster
    memory = np.empty(size, np.uint8)
  # Views refer to the outermost array that is not a view of an array: made
  # from a memoryview, that is this one and not `memory`.
  array = np.frombuffer(memoryview(memory), dtype)
  weakref.finalize(array, free.append, memory).atexit = False
  return array.reshape(shape)
