"""The folder of an experiment: whose it is, and whether it is finished.

Its `config.json` says which experiment it belongs to.  `metrics.jsonl`,
`checkpoints` and `artifact` come as the run goes, `report.json` last of all:
with it the experiment is finished.
"""

import json
import pathlib
from typing import Any

from djpq_jax import config as config_lib
from djpq_jax import files
from djpq_jax.report import record

CONFIG = 'config.json'
# What versions did that had no field for it, where the default is another.
BEFORE = {
  'search': {'bits': 8.0, 'whole_bits_to': 0},
  'narrow_range': True,
  'asymmetric': False,
  'mid_rise': False,
}


class Workdir:
  """A folder that belongs to one experiment.

  Args:
    path: the folder; it need not exist.
    config: of the experiment, complete.
  """

  def __init__(self, path: pathlib.Path, config):
    self.path = path
    self.config = json.loads(json.dumps(config.to_dict()))

  @property
  def claimed(self) -> bool:
    """Whether the folder belongs to an experiment."""
    return (self.path / CONFIG).exists()

  def check(self, *, overwrite: bool = False) -> None:
    """Refuses a folder of others, and one of another experiment.

    Args:
      overwrite: whether another experiment may be discarded; files that are
        no experiment may not.

    Raises:
      ValueError: says what the folder holds, or in what the configs differ.
    """
    file = files.obstacle(self.path)
    if file is not None:
      raise ValueError(f'{file} is a file, not a folder')
    if not self.path.is_dir() or not self._found():
      return
    if not self.claimed:
      raise ValueError(
        f'{self.path} already holds files that are no experiment; choose '
        'another workdir'
      )
    if overwrite:
      return
    # What a config of an older version does not say was as it is by default,
    # or as it was before there was a field for it.
    default, there = config_lib.default().to_dict(), self._config_there()
    before = _over(_over(default, BEFORE), there)
    changed = sorted(_differences(before, self.config))
    if not changed:
      return
    ways = 'choose another workdir, or --overwrite'
    if not any(_differences(_over(default, there), self.config)):
      # It lacks these fields, and nothing else is different.
      said = ' '.join(f'--set {f}={_at(before, f)}' for f in changed)
      ways = f'go on with what the version before did ({said}), {ways}'
    raise ValueError(
      f'{self.path} already holds another experiment (it differs in '
      f'{", ".join(changed[:3])}); {ways}'
    )

  def _found(self) -> list[pathlib.Path]:
    """What is there, but for a claim that was cut off."""
    claims = self._claims()
    return [f for f in self.path.iterdir() if f not in claims]

  def _claims(self) -> list[pathlib.Path]:
    """Claims that were cut off."""
    return list(self.path.glob(f'{CONFIG}.*{files.PARTIAL}'))

  def _config_there(self) -> dict[str, Any]:
    try:
      found = json.loads((self.path / CONFIG).read_text())
    except (OSError, ValueError) as error:
      files.raise_if_it_may_pass(error)
      found = None
    if not isinstance(found, dict):
      raise ValueError(
        f'{self.path / CONFIG} is damaged, so nobody knows whose folder it is; '
        'choose another workdir, or --overwrite, which deletes its checkpoints'
      )
    return found

  def claim(self, *, overwrite: bool = False) -> None:
    """Makes the folder this experiment's; keeps what it has of it.

    Args:
      overwrite: whether to discard what is there instead.

    Raises:
      ValueError: another experiment has claimed it since `check`.
    """
    if overwrite and self.claimed:
      for path in self._found():
        if path.name == CONFIG:
          continue  # stays till the end: it says that all this may go
        files.remove(path)
    if self.claimed and not overwrite:
      self.check()
      return
    for path in self._claims():
      path.unlink()
    content = json.dumps(self.config, indent=1) + '\n'
    files.replace(self.path / CONFIG, content)

  def report(self) -> dict[str, Any] | None:
    """The report of a finished experiment; None while there is none.

    One without its artifact is not finished, nor one whose report is no more:
    both can be made again from the checkpoints.
    """
    if not (self.path / 'artifact' / 'manifest.json').exists():
      return None
    try:
      return record.read(self.path)
    except (OSError, ValueError):
      return None


def _over(default: dict, given: dict) -> dict:
  """`given`, with what it lacks from `default`."""
  both = {
    key: _over(default[key], value)
    for key, value in given.items()
    if isinstance(value, dict) and isinstance(default.get(key), dict)
  }
  return json.loads(json.dumps(default)) | given | both


def _at(tree: dict, field: str) -> Any:
  """The value of a field, as 'search.bits'."""
  for key in field.split('.'):
    tree = tree[key]
  return tree


def _differences(a: dict, b: dict, prefix: str = ''):
  for key in a.keys() | b.keys():
    left, right = a.get(key), b.get(key)
    if isinstance(left, dict) and isinstance(right, dict):
      yield from _differences(left, right, f'{prefix}{key}.')
    elif left != right:
      yield f'{prefix}{key}'
