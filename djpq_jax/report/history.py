"""The records of a run's `history` as series over steps that go on.

A history counts its steps over all phases, or anew in each of them; both are
drawn as one line of time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]


def series(
  steps: Sequence[float], history: Records, key: str, scale: float = 1
) -> tuple[list[float], list[float]]:
  """The steps at which something was measured, and what."""
  points = [
    (step, scale * record[key])
    for step, record in zip(steps, history, strict=True)
    if record.get(key) is not None
  ]
  return [x for x, _ in points], [y for _, y in points]


def watched(report: Mapping[str, Any]) -> str:
  """Which images a report's `eval_accuracy` speaks of, in a word or two."""
  config = report['config']
  held = isinstance(config, Mapping) and config.get('validation')
  return 'held out' if held else 'test'


def running_steps(history: Records) -> list[float]:
  """Steps that go on where a phase starts to count from zero again.

  >>> running_steps([{'step': s} for s in (0, 10, 20, 0, 10)])
  [0, 10, 20, 20, 30]
  """
  steps: list[float] = []
  offset = 0
  for record in history:
    if steps and record['step'] + offset < steps[-1]:
      offset = steps[-1] - record['step']
    steps.append(record['step'] + offset)
  return steps


def phase_spans(
  steps: Sequence[float], history: Records
) -> list[tuple[str, float, float]]:
  """Name, start and end of each phase; a phase lasts until the next starts.

  >>> rows = [{'phase': p} for p in ('float', 'float', 'joint', 'joint')]
  >>> phase_spans([0, 10, 20, 30], rows)
  [('float', 0, 20), ('joint', 20, 30)]
  """
  names = [str(record.get('phase') or '') for record in history]
  starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
  ends = [steps[i] for i in starts[1:]] + [steps[-1]]
  return [
    (names[i], steps[i], end) for i, end in zip(starts, ends, strict=True)
  ]


def settled_from(steps: Sequence[float]) -> float:
  """The end of the first twentieth of a run.

  What came before are guesses; on an axis they would squeeze all the rest.
  """
  return steps[0] + (steps[-1] - steps[0]) / 20
