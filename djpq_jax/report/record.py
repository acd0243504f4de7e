"""`report.json`: strict JSON, written whole or not at all, and checked."""

from collections.abc import Collection, Iterator, Mapping
import json
import math
import os
import pathlib
from typing import Any

from djpq_jax import cost
from djpq_jax import files

FILE_NAME = 'report.json'
# In the order of the file; keys that are not listed follow, sorted.
KEYS = (
  'config',
  'seed',
  'seconds',
  'float_accuracy',
  'accuracy',
  'budget',
  'relative_bops',
  'float_bops',
  'bops',
  'float_macs',
  'macs',
  'artifact',
  'artifact_bytes',
  'layers',
)
LAYER_KEYS = (
  'name',
  'kept_in',
  'kept_out',
  'weight_bits',
  'act_bits',
  'macs',
  'bops',
)
# What others compute or draw with, if it is there, in any part of the file.
_NUMBERS = {
  *('seed', 'seconds', 'float_accuracy', 'accuracy', 'eval_accuracy'),
  *('cross_entropy', 'budget'),
  *('relative_bops', 'relative_macs', 'relative_weights'),
  *('float_bops', 'bops', 'float_macs', 'macs', 'weights'),
  *('artifact_bytes', 'float_bytes', 'weight_bits', 'act_bits'),
  *('kept_in', 'kept_out', 'in_size', 'out_size', 'size', 'kept'),
  *('step', 'loss', 'task_loss', 'kept_fraction'),
  *('mean_weight_bits', 'mean_act_bits'),
}
_TEXTS = {'artifact', 'name', 'kind', 'phase', 'reason'}
# What has to be there, and not null, in each record of a list.
_RECORD_KEYS = {
  'layers': LAYER_KEYS,
  'groups': ('name', 'size', 'kept'),
  'history': ('step',),
}
# Lists of small records: last in the file, one line per record.
_LISTS = ('layers', 'groups', 'history')


def write(
  report: Mapping[str, Any], folder: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes `report.json` into the folder, whole or not at all.

  Args:
    report: see `djpq_jax.report`; numpy and JAX scalars, tuples, paths and
      `ml_collections` configs are welcome inside.
    folder: created if missing; an older report in it is replaced.

  Returns:
    The path of the file.

  Raises:
    ValueError: a key is missing, or a number is not finite.
    TypeError: something in it has no place in JSON.
  """
  plain = _plain(report, 'report')
  problem = _problem(plain)
  if problem:
    raise ValueError(f'the report {problem}')
  return files.replace(files.path(folder) / FILE_NAME, _dumps(plain))


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the `report.json` of a folder, which is usually a workdir.

  Args:
    folder: the folder, or the file itself.

  Returns:
    The report.

  Raises:
    FileNotFoundError: there is no report.
    ValueError: the file is truncated, or is not a report.
  """
  path = files.path(folder)
  path = path if path.suffix == '.json' else path / FILE_NAME
  if not path.is_file():
    raise FileNotFoundError(
      f'no report in {path.parent}: a run writes its {FILE_NAME} when it ends'
    )
  try:
    text = path.read_text(encoding='utf-8')
    report = json.loads(text, parse_constant=_no_constant)
  except ValueError as error:
    raise ValueError(f'{path} is truncated or not JSON: {error}') from error
  problem = _problem(report)
  if problem:
    raise ValueError(f'{path} is not a report: it {problem}')
  return report


def _problem(report: Any) -> str:
  """What keeps this from being a report, as the end of a sentence; or ''."""
  if not isinstance(report, dict):
    return f'holds a {type(report).__name__} instead of keys and values'
  missing = [key for key in KEYS if key not in report]
  if missing:
    return f'lacks {", ".join(missing)}'
  for name in _LISTS:
    rows = report.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
      return f'has {name} that are not a list of records'
    for index, row in enumerate(rows):
      which = f' in {name.removesuffix("s")} {row.get("name", index)!r}'
      missing = [key for key in _RECORD_KEYS[name] if key not in row]
      if missing:
        return f'lacks {", ".join(missing)}{which}'
      wrong = _wrong(row, _RECORD_KEYS[name])
      if wrong:
        return wrong + which
  return _wrong(report, set(KEYS) - {'budget'}) or _wrong_budgets(report)


def _wrong(record: Mapping[str, Any], needed: Collection[str]) -> str:
  """Which value of a record is not of its kind; '' if all are."""
  for key, value in record.items():
    if value is None and key not in needed:
      continue
    if key in _TEXTS and not isinstance(value, str):
      return f'has {json.dumps(value)[:40]} for {key}, which is no text'
    if key in _NUMBERS and not isinstance(value, int | float):
      return f'has {json.dumps(value)[:40]} for {key}, which is no number'
  return ''


def _wrong_budgets(report: Mapping[str, Any]) -> str:
  budgets = report.get('budgets', {})
  if not isinstance(budgets, dict):
    return 'has budgets that are not a record'
  for name, budget in budgets.items():
    if name not in cost.COSTS or not isinstance(budget, int | float):
      return f'has {json.dumps(budget)[:40]} for the budget of {name}'
    if report.get(f'relative_{name}') is None:
      return f'lacks relative_{name}, which has a budget'
  return ''


def _no_constant(constant: str) -> None:
  raise ValueError(f'{constant} is not a number')


def _plain(value: Any, where: str) -> Any:
  """What JSON can hold, with numbers a person can read."""
  if hasattr(value, 'to_dict'):  # ml_collections
    value = value.to_dict()
  elif hasattr(value, 'tolist'):  # numpy and JAX, scalars too
    value = value.tolist()
  if value is None or isinstance(value, bool | int | str):
    return value
  if isinstance(value, float):
    return _readable(value, where)
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, Mapping):
    return {str(k): _plain(v, f'{where}.{k}') for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v, f'{where}[{i}]') for i, v in enumerate(value)]
  raise TypeError(f'{where} is a {type(value).__name__}, which is not JSON')


def _readable(value: float, where: str) -> float:
  """Nine digits tell all float32 apart; whole numbers stay exact.

  >>> _readable(0.1 + 0.2, 'report.budget')
  0.3
  """
  if not math.isfinite(value):
    raise ValueError(f'{where} is {value}, which a report cannot hold')
  return value if value.is_integer() else float(f'{value:.9g}')


def _dumps(report: Mapping[str, Any]) -> str:
  """JSON text with the totals first, and one line per layer or step."""
  heads = [key for key in KEYS if key not in _LISTS]
  rest = sorted(set(report) - set(heads) - set(_LISTS))
  tails = [key for key in _LISTS if key in report]
  keys = (*heads, *rest, *tails)
  return '{\n' + ',\n'.join(_entries(report, keys)) + '\n}\n'


def _entries(report: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
  for key in keys:
    if key in _LISTS:
      rows = ',\n'.join(f'    {_json(row)}' for row in report[key])
      text = f'[\n{rows}\n  ]'
    else:
      text = _json(report[key], indent=2).replace('\n', '\n  ')
    yield f'  {_json(key)}: {text}'


def _json(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
