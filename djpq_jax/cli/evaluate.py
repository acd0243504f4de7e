"""`djpq evaluate`: measures a hardened model from its files alone."""

import json

import jax
import jax.numpy as jnp

from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax.cli import artifacts


def add_command(commands) -> None:
  """Adds `evaluate` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'evaluate', help='measure a hardened model from its files alone'
  )
  artifacts.add_options(command)
  command.add_argument(
    '--execution',
    choices=integer.EXECUTIONS,
    default='simulated',
    help='what multiplies the integers; the predictions are the same',
  )
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_run)


def _run(args) -> None:
  _, model, split, name = artifacts.load(args)
  shape = split.images.shape[1:]
  executed = integer.lower(model, args.execution)
  accuracy = evaluation.evaluate(executed, split)
  sample = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  totals = harden.totals(model, harden.count(model, sample))
  result = {
    'accuracy': accuracy,
    'images': len(split),
    **totals,
    'execution': args.execution,
    'float_layers': integer.left_float(executed),
  }
  if args.json:
    print(json.dumps(result, indent=1))
    return
  ratio = 1 / totals['relative_bops']
  print(f'accuracy       {accuracy:.2%} of {len(split)} images of {name}')
  print(f'relative BOPs  {totals["relative_bops"]:.4%} ({ratio:.0f}x fewer)')
  print(f'BOPs           {totals["bops"]:,} of {totals["float_bops"]:,}')
  print(f'MACs           {totals["macs"]:,} of {totals["float_macs"]:,}')
  for path, reason in result['float_layers'].items():
    print(f'stays float    {path}: {reason}')
