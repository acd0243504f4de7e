"""`djpq diff`: what two hardened models have not in common."""

import json
from typing import Any

import rich.console
import rich.table

from djpq_jax import checkpoint

LAYER_KEYS = ('kept_in', 'kept_out', 'weight_bits', 'act_bits', 'bops')


def add_command(commands) -> None:
  """Adds `diff` to the subparsers of `djpq`."""
  command = commands.add_parser('diff', help='compare two hardened models')
  command.add_argument('old', metavar='A', help='the folder of an artifact')
  command.add_argument('new', metavar='B', help='the folder of another one')
  command.add_argument('--json', action='store_true', help='print JSON')
  command.set_defaults(run=_run)


def _run(args) -> None:
  manifests = [checkpoint.read_manifest(f) for f in (args.old, args.new)]
  sizes = [checkpoint.size_bytes(f) for f in (args.old, args.new)]
  found = difference(*manifests) | {'bytes': sizes}
  if args.json:
    print(json.dumps(found, indent=1))
  else:
    _print(found, rich.console.Console())


def difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
  """Pairs (old, new) of what two manifests say.

  Args:
    old: from `checkpoint.read_manifest`.
    new: the other one.

  Returns:
    'accuracy' (None where it is not known), 'relative_bops', 'macs', 'bops',
    and 'layers': those that differ, name -> key -> pair; a layer that only one
    of them has is a pair with None.
  """
  found: dict[str, Any] = {
    'accuracy': [old.get('accuracy'), new.get('accuracy')]
  }
  for key in ('relative_bops', 'macs', 'bops'):
    found[key] = [old['totals'][key], new['totals'][key]]
  rows = [{row['name']: row for row in m['layers']} for m in (old, new)]
  found['layers'] = {}
  for name in {**rows[0], **rows[1]}:
    pair = [layers.get(name) for layers in rows]
    changed = {
      key: [row and row[key] for row in pair]
      for key in LAYER_KEYS
      if pair[0] is None or pair[1] is None or pair[0][key] != pair[1][key]
    }
    if changed:
      found['layers'][name] = changed
  return found


def _print(found: dict[str, Any], console) -> None:
  rows = [('accuracy', '{:.2%}', found['accuracy'])]
  rows.append(('relative BOPs', '{:.4%}', found['relative_bops']))
  rows += [(key.upper(), '{:,}', found[key]) for key in ('macs', 'bops')]
  rows.append(('bytes', '{:,}', found['bytes']))
  for name, form, pair in rows:
    console.print(f'{name:<14} {_pair(pair, form)}', highlight=False)
  if not found['layers']:
    console.print('all layers have the same channels and bits')
    return
  table = rich.table.Table()
  table.add_column('layer', overflow='fold')
  for name in ('inputs', 'outputs', 'weight bits', 'act bits', 'BOPs'):
    table.add_column(name, justify='right')
  for name, changed in found['layers'].items():
    cells = [_pair(changed.get(key), '{:,}') for key in LAYER_KEYS]
    table.add_row(name, *cells)
  console.print(table)


def _pair(pair, form: str) -> str:
  if pair is None:
    return ''
  old, new = ('-' if v is None else form.format(v) for v in pair)
  return old if old == new else f'{old} -> {new}'
