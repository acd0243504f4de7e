"""Packages that some uses need and a plain install lacks."""

import importlib
from typing import Any


def require(name: str, *, extra: str, use: str) -> Any:
  """Imports a module of such a package.

  Args:
    name: of the module.
    extra: of djpq-jax that installs it.
    use: what needs it, as a plural: 'image files'.

  Raises:
    ImportError: it is not installed; the message says how to get it.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
      f'{use} need the package {name.partition(".")[0]!r}: '
      f"pip install 'djpq-jax[{extra}]' ({error})"
    ) from error
