"""`djpq evaluate`: measures a hardened model from its files alone."""

import json

import jax
import jax.numpy as jnp

from djpq_jax import checkpoint
from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax import harden


def add_command(commands) -> None:
  """Adds `evaluate` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'evaluate', help='measure a hardened model from its files alone'
  )
  command.add_argument('--artifact', required=True, help='its folder')
  command.add_argument(
    '--data', help='data set; by default the one it was measured on'
  )
  command.add_argument('--data-dir', help='where the data set was prepared')
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_run)


def _run(args) -> None:
  manifest = checkpoint.read_manifest(args.artifact)
  model = experiment.load_artifact(args.artifact)
  measured_on = manifest.get('measured_on', {})
  name = args.data or measured_on.get('data')
  if not name:
    raise ValueError(
      f'{args.artifact} does not say what it was measured on; give --data'
    )
  kwargs = {} if args.data else measured_on.get('kwargs', {})
  _, split = data.load(name, data_dir=args.data_dir, **kwargs)
  shape = split.images.shape[1:]
  if list(shape) != manifest['input_shape']:
    raise ValueError(
      f'the artifact takes images of shape {tuple(manifest["input_shape"])}, '
      f'but {name} has {shape}'
    )
  accuracy = evaluation.evaluate(model, split)
  sample = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  totals = harden.totals(model, harden.count(model, sample))
  result = {'accuracy': accuracy, 'images': len(split), **totals}
  if args.json:
    print(json.dumps(result, indent=1))
    return
  ratio = 1 / totals['relative_bops']
  print(f'accuracy       {accuracy:.2%} of {len(split)} images of {name}')
  print(f'relative BOPs  {totals["relative_bops"]:.4%} ({ratio:.0f}x fewer)')
  print(f'BOPs           {totals["bops"]:,} of {totals["float_bops"]:,}')
  print(f'MACs           {totals["macs"]:,} of {totals["float_macs"]:,}')
