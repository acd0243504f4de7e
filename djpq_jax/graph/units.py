"""Channel identity: a union-find over elements of axes, solved once at the end.

A *unit* is the identity of one position on one axis. Axes of Variables start
with fresh units; the rules tie units that must be cut together. A *frozen* unit
must stay, and so must all that is tied to it.
"""

import numpy as np


class Units:
  """Hands out units, and records which are tied and which are frozen."""

  def __init__(self):
    self._size = 0
    self._opaque = np.zeros(1024, bool)
    self._ties: list[tuple[np.ndarray, np.ndarray]] = []
    self._frozen: list[tuple[np.ndarray, str]] = []

  def fresh(self, n: int) -> np.ndarray:
    """`n` new units."""
    ids = np.arange(self._size, self._size + n)
    self._size += n
    if self._size > len(self._opaque):
      grown = np.zeros(2 * self._size, bool)
      grown[: len(self._opaque)] = self._opaque
      self._opaque = grown
    return ids

  def opaque(self, n: int, reason: str) -> np.ndarray:
    """`n` new units that are frozen from birth: an extent nobody can cut."""
    ids = self.fresh(n)
    self._opaque[ids] = True
    self._frozen.append((ids, reason))
    return ids

  def is_opaque(self, ids: np.ndarray) -> bool:
    """Whether all of them were frozen from birth."""
    return bool(self._opaque[ids].all())

  def tie(self, a: np.ndarray, b: np.ndarray):
    """Position i of `a` and position i of `b` are cut together."""
    if a is not b:
      self._ties.append((a, b))

  def freeze(self, ids: np.ndarray | None, reason: str):
    """None of these can be cut. The first reason given is the one shown."""
    if ids is not None and not self.is_opaque(ids):
      self._frozen.append((ids, reason))

  def join(self, labels, sizes, size: int) -> np.ndarray | None:
    """As `meet`, where axes of extent 1 are broadcast to `size`."""
    for label, extent in zip(labels, sizes, strict=True):
      if extent != size:
        self.freeze(label, 'one channel is broadcast over an axis')
    same = zip(labels, sizes, strict=True)
    return self.meet(*(label for label, extent in same if extent == size))

  def meet(self, *labels: np.ndarray | None) -> np.ndarray | None:
    """Ties the labels that meet on an axis; returns the result's label."""
    result = None
    for label in labels:
      if label is None:
        continue
      if result is not None:
        self.tie(result, label)
      # Positions stay positions when a parameter per position is added.
      if result is None or self.is_opaque(label):
        result = label
    return result

  def solve(self) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the class of each unit, and the reason of each frozen class."""
    roots = np.arange(self._size)
    if self._ties:
      a = np.concatenate([a for a, _ in self._ties])
      b = np.concatenate([b for _, b in self._ties])
      roots = _components(roots, a, b)
    reasons: dict[int, str] = {}
    for ids, reason in self._frozen:
      for root in np.unique(roots[ids]):
        reasons.setdefault(int(root), reason)
    return roots, reasons


def _components(roots, a, b):
  """Connected components: hook to the smaller root, jump, repeat."""
  while True:
    low = np.minimum(roots[a], roots[b])
    high = np.maximum(roots[a], roots[b])
    if (low == high).all():
      return roots
    np.minimum.at(roots, high, low)
    while not np.array_equal(roots, roots[roots]):
      roots = roots[roots]
