"""Options that several commands have."""

import argparse

from djpq_jax import parallel


def add_config(
  command: argparse.ArgumentParser, *, required: bool = True
) -> None:
  """Adds what names a config and overrides its fields."""
  command.add_argument(
    '--config',
    required=required,
    help='a config file, or a packaged name; a variant after a colon',
  )
  command.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='override a field, as search.epochs=10; may be repeated',
  )


def add_workdir(command: argparse.ArgumentParser) -> None:
  """Adds where results go."""
  command.add_argument(
    '--workdir',
    required=True,
    help='where results go; what was interrupted there goes on',
  )
  command.add_argument(
    '--overwrite', action='store_true', help='discard what the workdir holds'
  )


def add_cluster(command: argparse.ArgumentParser) -> None:
  """Adds how the processes of one run find each other."""
  command.add_argument(
    '--distributed',
    action='store_true',
    help='join the other processes, which the cluster tells (TPU, SLURM, ...)',
  )
  command.add_argument(
    '--coordinator', metavar='HOST:PORT', help='of process 0, else'
  )
  command.add_argument('--process-count', type=int, metavar='N')
  command.add_argument('--process-index', type=int, metavar='I')


def join_cluster(args) -> None:
  """Joins the other processes, if there are any."""
  processes = args.coordinator, args.process_count, args.process_index
  if args.distributed or processes != (None, None, None):
    parallel.start(*processes)
