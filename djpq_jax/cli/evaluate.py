"""`djpq evaluate`: measures a hardened model from its files alone."""

import json
from typing import Any

import jax
import jax.numpy as jnp

from djpq_jax import checkpoint
from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax.cli import artifacts

PROGRAM = 'program'


def add_command(commands) -> None:
  """Adds `evaluate` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'evaluate', help='measure a hardened model from its files alone'
  )
  artifacts.add_options(command)
  command.add_argument(
    '--execution',
    choices=[*integer.EXECUTIONS, PROGRAM],
    help='what multiplies the integers; the predictions are the same. '
    f'{PROGRAM}: what the artifact itself holds, which needs no class of the '
    f'model. By default {integer.EXECUTIONS[0]} where there is a class',
  )
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_run)


def _run(args) -> None:
  manifest = checkpoint.read_manifest(args.artifact)
  split, name = artifacts.images(args, manifest)
  known = artifacts.has_class(manifest['model'])
  execution = args.execution or (integer.EXECUTIONS[0] if known else PROGRAM)
  if execution == PROGRAM:
    predict: Any = checkpoint.load_program(args.artifact)
    totals, float_layers = manifest['totals'], manifest['float_layers']
  else:
    model = artifacts.load_model(args.artifact, manifest)
    predict = integer.lower(model, execution)
    sample = jax.ShapeDtypeStruct((2, *split.images.shape[1:]), jnp.float32)
    totals = harden.totals(model, harden.count(model, sample))
    float_layers = integer.left_float(predict)
  accuracy = evaluation.evaluate(predict, split)
  result = {
    'accuracy': accuracy,
    'images': len(split),
    **totals,
    'execution': execution,
    'float_layers': float_layers,
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
