"""What the HTML page says of runs: texts, numbers and charts for templates."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from djpq_jax import cost
from djpq_jax.report import curve_chart
from djpq_jax.report import pareto_chart
from djpq_jax.report import text
from djpq_jax.report import weight_chart

_FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A run on the page.

  Args:
    name: unique on the page.
    report: see `djpq_jax.report`.
    weights: of the layers whose kernels are integers, by layer; None if they
      are not known.
    why_no_weights: a sentence for the page, if they are not.
    speed: what `djpq report --time` measured, or None: 'images_per_second' of
      'float32' and of the executions of the integers, 'batch', 'device',
      'cores'.
  """

  name: str
  report: Mapping[str, Any]
  weights: Mapping[str, weight_chart.Weights] | None = None
  why_no_weights: str = ''
  speed: Mapping[str, Any] | None = None


def of_run(run: Run, key: str) -> dict[str, Any]:
  """All that the templates need of a run; `key` is its id on the page."""
  report = run.report
  config = report['config']
  return {
    'key': key,
    'name': run.name,
    'verdict': text.verdict(report),
    'cards': [*_cards(report), _speed_card(run)],
    'made': _made(report),
    'layers': [_layer(layer, report) for layer in report['layers']],
    'totals': {key: text.si(report[key]) for key in ('macs', 'bops')},
    'curves': curve_chart.charts(report, key),
    'weights': _weights(run, key),
    'weight_index': {n: i for i, n in enumerate(run.weights or ())},
    'why_no_weights': run.why_no_weights or 'The artifact was not read.',
    'not_on_grid': _not_on_grid(run),
    'groups': _groups(report),
    'config': json.dumps(config, indent=2, ensure_ascii=False),
  }


def _cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
  """The verdict in numbers: what, how much, against what."""
  accuracy, before = report['accuracy'], report['float_accuracy']
  cards = [
    {
      'title': 'Accuracy',
      'value': f'{100 * accuracy:.2f} %',
      'note': f'{_points(accuracy - before)} against float32 '
      f'({100 * before:.2f} %)',
      'detail': '',
    },
    {
      'title': 'Bit operations (BOPs)',
      'value': f'{text.times(report["float_bops"], report["bops"])} fewer',
      'note': f'{text.percent(report["relative_bops"])} of float32, '
      f'{_budget(report["budget"], report["relative_bops"])}',
      'detail': f'{report["bops"]:,} of {report["float_bops"]:,}',
    },
    {
      'title': 'MACs',
      'value': f'{text.times(report["float_macs"], report["macs"])} fewer',
      'note': f'{text.si(report["macs"]).strip()} of '
      f'{text.si(report["float_macs"]).strip()}'
      f'{_other_budget(report, "macs")}',
      'detail': f'{report["macs"]:,} of {report["float_macs"]:,}',
    },
  ]
  size = report['artifact_bytes']
  card = {
    'title': 'Size',
    'value': f'{text.si(size)}B',
    'note': 'of the artifact',
    'detail': f'{size:,} bytes',
  }
  if report.get('float_bytes'):
    old = report['float_bytes']
    card['note'] = f'{text.times(old, size)} smaller than {text.si(old)}B'
    card['detail'] = f'{size:,} of {old:,} bytes'
  card['note'] += _other_budget(report, 'weights')
  return [*cards, card]


def _speed_card(run: Run) -> dict[str, str]:
  """The fastest way to run the integers against the float model."""
  if run.speed is None:
    return {
      'title': 'Measured speed',
      'value': '–',
      'note': 'not measured; djpq report --time does it',
      'detail': 'BOPs count work, they are no speed.',
    }
  speeds = dict(run.speed['images_per_second'])
  before = speeds.pop('float32')
  name = max(speeds, key=speeds.__getitem__)
  where = f'{run.speed["device"]}, {run.speed["cores"]} cores'
  return {
    'title': 'Measured speed',
    'value': f'{speeds[name] / before:.2f}x',
    'note': f'of float32, {run.speed["batch"]} images at a time ({name} '
    f'execution, {where})',
    'detail': f'{speeds[name]:,.0f} images/s, float32 {before:,.0f}',
  }


def _points(difference: float) -> str:
  """A difference of two accuracies.

  >>> _points(-0.00756), _points(0.01)
  ('−0.76 points', '+1.00 points')
  """
  return f'{100 * difference:+.2f} points'.replace('-', '−')


def _budget(budget: float | None, relative: float) -> str:
  if budget is None:
    return 'no budget'
  if relative <= budget:
    return f'✓ within the budget of {text.percent(budget)}'
  return f'✗ over the budget of {text.percent(budget)}'


def _other_budget(report: Mapping[str, Any], name: str) -> str:
  """What became of a budget of MACs or weight bits, if there is one."""
  budget = report.get('budgets', {}).get(name)
  if budget is None:
    return ''
  relative = report[f'relative_{name}']
  said = f'{text.percent(relative)} of the {cost.COSTS[name]}'
  return f'; {said}, {_budget(budget, relative)}'


def _budget_cell(report: Mapping[str, Any]) -> str:
  budgets = dict(report.get('budgets') or {})
  if report['budget'] is not None:
    budgets['bops'] = report['budget']
  cells = []
  for name, budget in budgets.items():
    met = '✓' if report[f'relative_{name}'] <= budget else '✗ over'
    what = '' if name == 'bops' else f'{cost.COSTS[name]} '
    cells.append(f'{what}{text.percent(budget)} {met}')
  return ', '.join(cells) or 'none'


def _made(report: Mapping[str, Any]) -> str:
  return (
    f'Method {pareto_chart.method_of(report)}, seed {report["seed"]}, '
    f'{report["seconds"]:,.0f} seconds. Accuracy and BOPs are those of the '
    'reloaded file.'
  )


def _layer(layer: Mapping[str, Any], report: Mapping[str, Any]):
  """A row of the table: numbers, and shares of one for the bars."""
  share = layer['bops'] / (report['bops'] or 1)
  bits = [l[k] for l in report['layers'] for k in ('weight_bits', 'act_bits')]
  # Layers left in float32 would make all other bars alike.
  longest = max([8, *(b for b in bits if b < _FLOAT_BITS)])
  row = {
    'name': layer['name'],
    'kind': layer.get('kind', ''),
    'weight_bits': layer['weight_bits'],
    'act_bits': layer['act_bits'],
    'weight_bar': min(1, layer['weight_bits'] / longest),
    'act_bar': min(1, layer['act_bits'] / longest),
    'macs': layer['macs'],
    'macs_text': text.si(layer['macs']),
    'bops': layer['bops'],
    'bops_text': text.si(layer['bops']),
    'share': share,
  }
  for side in ('in', 'out'):
    kept, size = layer[f'kept_{side}'], layer.get(f'{side}_size')
    row[f'{side}puts'] = {
      'kept': kept,
      'size': size,
      'share': kept / size if size else None,
    }
  row['tip'] = _layer_tip(row, layer.get('float_macs'))
  return row


def _layer_tip(row: Mapping[str, Any], float_macs: int | None) -> str:
  lines = [
    row['name'],
    f'{row["weight_bits"]:g} bits of weights, {row["act_bits"]:g} of inputs',
    f'{row["macs"]:,} MACs'
    + (f' of {float_macs:,} in float32' if float_macs else ''),
    f'{row["bops"]:,} BOPs, {100 * row["share"]:.2f} % of the model',
  ]
  return '\n'.join(lines)


def _weights(run: Run, key: str) -> list[dict[str, Any]]:
  return [
    {
      'name': name,
      'chart': weight_chart.draw(weights, name, f'{key}-weights{i}'),
      'facts': weight_chart.facts(weights),
    }
    for i, (name, weights) in enumerate((run.weights or {}).items())
  ]


def _not_on_grid(run: Run) -> list[str]:
  """Layers with weights that are float32."""
  return [
    layer['name']
    for layer in run.report['layers']
    if layer['weight_bits'] == _FLOAT_BITS and layer.get('weights') != 0
  ]


def _groups(report: Mapping[str, Any]) -> dict[str, Any] | None:
  groups = report.get('groups')
  if not groups:
    return None
  free = [group for group in groups if not group.get('reason')]
  return {
    'count': len(groups),
    'prunable': len(free),
    'channels': sum(group['size'] for group in free),
    'kept': sum(group['kept'] for group in free),
    'stuck': [group for group in groups if group.get('reason')],
  }


def of_runs(runs: Sequence[Run]) -> dict[str, Any]:
  """What there is to say of several runs side by side."""
  reports = [(run.name, run.report) for run in runs]
  best = pareto_chart.front(reports)
  return {
    'rows': [_compared(name, report, name in best) for name, report in reports],
    'chart': pareto_chart.draw(reports),
    'best': best,
    'sets': _kinds(reports),
  }


def _compared(name: str, report: Mapping[str, Any], best: bool):
  return {
    'name': name,
    'method': pareto_chart.method_of(report),
    'seed': report['seed'],
    'accuracy': report['accuracy'],
    'lost': _points(report['accuracy'] - report['float_accuracy']),
    'difference': report['accuracy'] - report['float_accuracy'],
    'relative_bops': report['relative_bops'],
    'bops': text.percent(report['relative_bops']),
    'fewer': text.times(report['float_bops'], report['bops']),
    'budget': report['budget'],
    'budget_text': _budget_cell(report),
    'size': report['artifact_bytes'],
    'size_text': f'{text.si(report["artifact_bytes"])}B',
    'best': best,
  }


def _kinds(reports: pareto_chart.Named) -> list[str]:
  """The models and data sets, which should be one for all runs."""
  found = []
  for _, report in reports:
    config = report['config']
    parts = [
      config[part]['name']
      for part in ('model', 'data')
      if isinstance(config, Mapping)
      and isinstance(config.get(part), Mapping)
      and config[part].get('name')
    ]
    found.append(' on '.join(map(str, parts)))
  return sorted(set(found) - {''})
