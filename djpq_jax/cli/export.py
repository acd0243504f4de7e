"""`djpq export`: a hardened model as a file for other runtimes."""

import dataclasses
import json

import numpy as np

from djpq_jax import checkpoint
from djpq_jax import data
from djpq_jax import export
from djpq_jax.cli import artifacts


def add_command(commands) -> None:
  """Adds `export` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'export', help='write a hardened model as ONNX or StableHLO, and check it'
  )
  artifacts.add_options(command)
  command.add_argument('--format', required=True, choices=export.FORMATS)
  command.add_argument('--out', required=True, metavar='FILE')
  command.add_argument(
    '--batch',
    default='symbolic',
    metavar='N',
    help='images of a call, or "symbolic" for any number (default)',
  )
  command.add_argument(
    '--form',
    choices=export.FORMS,
    default=export.FORMS[0],
    help='of ONNX: QuantizeLinear and DequantizeLinear around each layer, with '
    'integer layers where these round as the model does (default), or wherever '
    'runtimes can fuse them; or integer operators',
  )
  command.add_argument(
    '--images', type=int, default=1000, help='test images to check it on'
  )
  command.add_argument(
    '--strict',
    action='store_true',
    help='accept no logit that is off by more than one step of its grid',
  )
  command.add_argument(
    '--allow-deviation',
    action='store_true',
    help='exit with status 0 even if predictions differ',
  )
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_run)


def _run(args) -> None:
  batch = None if args.batch == 'symbolic' else _positive(args.batch, 'batch')
  count = _positive(args.images, 'images')
  manifest = checkpoint.read_manifest(args.artifact)
  model = artifacts.load_model(args.artifact, manifest)
  split, name = artifacts.images(args, manifest)
  images = _first_images(split, count)
  facts = {'model': manifest['model']['name'], 'artifact': manifest['sha256']}
  result = export.export(
    model,
    args.out,
    images,
    format=args.format,
    batch=batch,
    form=args.form,
    facts=facts,
  )
  found = result.deviation
  if args.json:
    table = {
      **dataclasses.asdict(result),
      'path': str(result.path),
      'facts_path': result.facts_path and str(result.facts_path),
      'steps': found.steps,
      'bytes': result.path.stat().st_size,
    }
    print(json.dumps(table, indent=1))
  else:
    _print_export(result, name)
  fault = found.fault(strict=args.strict)
  if fault and not args.allow_deviation:
    more = '; --form exact rounds as the model does' * (
      args.format == 'onnx' and args.form == 'qdq'
    )
    raise ValueError(
      f'{args.out} was written, but {fault}{more}; --allow-deviation accepts it'
    )


def _positive(text, name: str) -> int:
  try:
    number = int(text)
  except ValueError:
    number = 0
  if number < 1:
    raise ValueError(f'--{name} takes a number of images from 1 on, not {text}')
  return number


def _first_images(split: data.Split, count: int) -> np.ndarray:
  batches = data.eval_batches(split, min(256, count))
  images: list[np.ndarray] = []
  for batch in batches:
    images.append(np.asarray(batch['image'], np.float32))
    if sum(map(len, images)) >= count:
      break
  return np.concatenate(images)[: min(count, len(split))]


def _print_export(result: export.Result, name: str) -> None:
  found = result.deviation
  size = result.path.stat().st_size
  same = found.images - found.predictions
  print(f'file         {result.path}, {size:,} bytes')
  if result.facts_path:
    print(f'its facts    {result.facts_path}')
  print(f'predictions  {same} of {found.images} images of {name} are equal')
  steps = ''
  if found.steps is not None:
    steps = f', {found.steps:.2g} steps of their grid'
  print(f'logits       off by up to {found.largest:.2g}{steps}')
  if found.beyond_step:
    print(f'             by more than one step on {found.beyond_step} images')
  if result.operators:
    ran = ', '.join(f'{k} x {v}' for k, v in result.operators.items())
    print(f'run as       {ran}')
  for layer, why in result.float_layers.items():
    print(f'in float     {layer}: {why}')
