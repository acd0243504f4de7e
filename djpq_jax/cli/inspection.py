"""`djpq inspect`: what a model, or an artifact, consists of."""

import json
from typing import Any

import numpy as np
import rich.console
import rich.table

from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import report as report_lib
from djpq_jax.cli import options


def add_command(commands) -> None:
  """Adds `inspect` to the subparsers of `djpq`."""
  command = commands.add_parser(
    'inspect',
    help='show layers, MACs and channel groups of a model, or an artifact',
  )
  options.add_config(command, required=False)
  command.add_argument('--artifact', help='the folder of a hardened model')
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_run)


def _run(args) -> None:
  if bool(args.config) == bool(args.artifact):
    raise ValueError('inspect takes a --config or an --artifact, one of them')
  if args.artifact:
    if args.set:
      raise ValueError('--set changes a config; an artifact stays as it is')
    _inspect_artifact(args.artifact, as_json=args.json)
    return
  config = config_lib.load(args.config, args.set)
  table = _inspection(experiment.dense_structure(config))
  if args.json:
    print(json.dumps(table, indent=1))
  else:
    _print_inspection(table, rich.console.Console())


def _inspection(structure: compress.Structure) -> dict[str, Any]:
  graph = structure.graph
  names = [g.name for g in structure.groups]

  def of(groups):
    return [names[g] for g in np.unique(groups) if g >= 0]

  return {
    'float_macs': graph.float_macs,
    'float_bops': compress.FLOAT_BITS**2 * graph.float_macs,
    'layers': [
      {
        'name': layer.path,
        'kind': layer.kind,
        'macs': layer.macs,
        'weights': layer.weights,
        'in': len(layer.in_group),
        'out': len(layer.out_group),
        'reads': of(layer.in_group),
        'writes': of(layer.out_group),
        'weight_bits': structure.layers[layer.path].weight_bits,
        'act_bits': structure.layers[layer.path].act_bits,
        'quantize': structure.layers[layer.path].quantize,
      }
      for layer in graph.layers.values()
    ],
    'other': [{'name': p.name, 'macs': p.macs} for p in graph.products],
    'groups': [
      {
        'name': s.name,
        'channels': g.size,
        'consumers': list(g.consumers),
        'prunable': not s.reason,
        'reason': s.reason,
      }
      for g, s in zip(graph.groups, structure.groups)
    ],
  }


def _print_inspection(found: dict[str, Any], console) -> None:
  table = rich.table.Table(title='Layers', title_justify='left')
  for name in ('layer', 'kind'):
    table.add_column(name)
  for name in ('in', 'out', 'MACs', 'share'):
    table.add_column(name, justify='right')
  for row in found['layers']:
    table.add_row(
      row['name'],
      row['kind'],
      str(row['in']),
      str(row['out']),
      f'{row["macs"]:,}',
      f'{row["macs"] / found["float_macs"]:.1%}',
    )
  for row in found['other']:
    share = f'{row["macs"] / found["float_macs"]:.1%}'
    table.add_row(row['name'], '', '', '', f'{row["macs"]:,}', share)
  console.print(table)
  table = rich.table.Table(title='Channel groups', title_justify='left')
  for name in ('group', 'channels', 'pruned?'):
    table.add_column(name, justify='right' if name == 'channels' else 'left')
  for group in found['groups']:
    verdict = 'yes' if group['prunable'] else f'no: {group["reason"]}'
    table.add_row(group['name'], str(group['channels']), verdict)
  console.print(table)
  console.print(
    f'float_macs  {found["float_macs"]:,}\n'
    f'float_bops  {found["float_bops"]:,} (32 x 32 bits)'
  )


def _inspect_artifact(folder: str, *, as_json: bool) -> None:
  manifest = checkpoint.read_manifest(folder)
  size = checkpoint.size_bytes(folder)
  if as_json:
    print(json.dumps(manifest | {'bytes': size}, indent=1))
    return
  console = rich.console.Console()
  rows = {'layers': manifest['layers'], **manifest['totals']}
  console.print(report_lib.table(rows))
  relative = manifest['totals']['relative_bops']
  facts = {
    'model': manifest['model']['name'],
    'BOPs': f'{relative:.4%} of float32',
    'size': f'{size:,} bytes',
    'made with': ', '.join(
      f'{name} {version}' for name, version in manifest['provenance'].items()
    ),
  }
  if 'accuracy' in manifest:
    facts['accuracy'] = f'{manifest["accuracy"]:.2%}'
  measured = manifest.get('measured_on', {})
  if {'data', 'images'} <= measured.keys():
    facts['measured on'] = f'{measured["images"]} images of {measured["data"]}'
  if manifest.get('license'):
    facts['license'] = manifest['license']
  for name, value in facts.items():
    console.print(f'{name:<12} {value}', highlight=False, soft_wrap=True)
