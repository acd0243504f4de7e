"""The command line, `djpq COMMAND`: see the modules of this folder."""

import argparse
from collections.abc import Sequence
import sys

from djpq_jax import interruption
from djpq_jax import train
from djpq_jax.cli import data
from djpq_jax.cli import diff
from djpq_jax.cli import evaluate
from djpq_jax.cli import export
from djpq_jax.cli import inspection
from djpq_jax.cli import report
from djpq_jax.cli import sweep
from djpq_jax.cli import training


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status.

  A user's mistake and a training that cannot go on end in one sentence on
  standard error and status 2: no restart mends them.  A fault of a disk or the
  network amid a run ends in one and status 1, a run that was asked to stop in
  one and status 143, so that whoever restarts failed jobs restarts it.
  """
  args = _parser().parse_args(argv)
  try:
    args.run(args)
  except train.Interrupted as error:
    print(f'djpq: {error}', file=sys.stderr)
    return interruption.EXIT_STATUS
  except training.Fault as fault:
    if args.debug:
      raise
    sentence = _sentence(fault.error)
    print(f'djpq: {sentence}; the same command goes on', file=sys.stderr)
    return 1
  except (train.TrainingError, ValueError, OSError, ImportError) as error:
    if args.debug:
      raise
    print(f'djpq: {_sentence(error)}', file=sys.stderr)
    return 2
  return 0


def _sentence(error: Exception) -> str:
  """What an error says; of the system's own, without their numbers."""
  if isinstance(error, OSError) and error.strerror:
    where = [str(error.filename)] if error.filename else []
    return ': '.join([*where, error.strerror])
  return str(error) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='djpq',
    description='Joint pruning and quantization of Flax models.',
  )
  parser.add_argument(
    '--debug', action='store_true', help='show tracebacks of errors'
  )
  commands = parser.add_subparsers(required=True, metavar='command')
  modules = training, sweep, inspection, evaluate, export, diff, report, data
  for module in modules:
    module.add_command(commands)
  return parser
