"""The HTML page without a browser: whole, safe, and with all numbers."""

import configparser
import dataclasses
import fnmatch
import html.parser
import json
import pathlib
import re
from typing import NamedTuple

import numpy as np
import pytest
import sample_report

from djpq_jax import report as report_lib
from djpq_jax.report import chart
from djpq_jax.report import curve_chart
from djpq_jax.report import history
from djpq_jax.report import page
from djpq_jax.report import pareto_chart
from djpq_jax.report import text
from djpq_jax.report import weight_chart

ROOT = pathlib.Path(__file__).parent.parent
VOID = {'meta', 'link', 'br', 'img', 'wbr'}
EVIL = '</script><img src=x onerror=alert(1)> & \'"'


class Seen(NamedTuple):
  """What a parser finds in a page."""

  tags: list[tuple[str, dict[str, str | None]]]
  text: str  # without scripts and style
  faults: list[str]


class _Parser(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.open: list[str] = []
    self.seen = Seen([], '', [])
    self.parts: list[str] = []

  def handle_starttag(self, tag, attrs):
    self.seen.tags.append((tag, dict(attrs)))
    if len({name for name, _ in attrs}) < len(attrs):
      self.seen.faults.append(f'{tag} has an attribute twice')
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.seen.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.seen.faults.append(f'</{tag}> at {self.getpos()}')

  def handle_data(self, data):
    if not {'script', 'style'} & set(self.open):
      self.parts.append(data)


def parsed(content: str) -> Seen:
  parser = _Parser()
  parser.feed(content)
  parser.close()
  faults = parser.seen.faults + [f'{tag} stays open' for tag in parser.open]
  words = ' '.join(''.join(parser.parts).split())
  return Seen(parser.seen.tags, words, faults)


def attributes(seen, name):
  return [a[name] for _, a in seen.tags if a.get(name) is not None]


def test_page_is_well_formed_and_needs_no_network(tmp_path):
  path = report_lib.write_page(
    [sample_report.run()], tmp_path / 'new' / 'page.html'
  )
  assert [f.name for f in path.parent.iterdir()] == ['page.html']
  content = path.read_text(encoding='utf-8')
  seen = parsed(content)
  assert seen.faults == []
  assert 'http' not in content.replace('http-equiv', '')
  assert '@import' not in content
  assert all(url.startswith(('#', 'data:')) for url in attributes(seen, 'href'))
  assert attributes(seen, 'src') == []
  policy = next(a['content'] for _, a in seen.tags if 'http-equiv' in a)
  assert policy.startswith("default-src 'none'")


def test_the_same_runs_give_the_same_bytes():
  assert page.render([sample_report.run()]) == page.render(
    [sample_report.run()]
  )


def test_every_number_of_the_report_is_there():
  report = sample_report.make()
  content = page.render([sample_report.run()])
  seen = parsed(content)
  tips = '\n'.join(attributes(seen, 'data-tip'))
  for layer in report['layers']:
    assert layer['name'] in seen.text
    assert f'{layer["macs"]:,} MACs of {layer["float_macs"]:,}' in tips
    assert f'{layer["bops"]:,} BOPs' in tips
    bits = layer['weight_bits'], layer['act_bits']
    assert '{} bits of weights, {} of inputs'.format(*bits) in tips
    for side in ('in', 'out'):
      kept = f'{layer[f"kept_{side}"]} of {layer[f"{side}_size"]}'
      assert kept in seen.text
    share = layer['bops'] / report['bops']
    assert f'{100 * share:.1f} %' in seen.text
  for number in (
    text.verdict(report),
    '−0.50 points against float32 (98.99 %)',
    '1210x fewer',
    '✓ within the budget of 0.2 %',
    f'{report["bops"]:,} of {report["float_bops"]:,}',
    '98,080 of 1,198,720',
    '12,345 of 78,000 bytes',
    'seed 0, 102 seconds',
    '1 of 3 groups could be pruned; of their 32 channels 10 were kept',
    'output of the model',
    'input of the model',
  ):
    assert number in seen.text.replace('\xa0', ' '), number
  config = content.partition('<pre>')[2].partition('</pre>')[0]
  assert json.loads(html.unescape(config)) == json.loads(
    json.dumps(report['config'])
  )


def test_names_are_text_and_nothing_else():
  report = sample_report.make()
  report['layers'][0]['name'] = EVIL
  report['groups'][1] |= dict(name=EVIL, reason=EVIL)
  report['history'][0]['phase'] = EVIL
  report['config']['note'] = EVIL
  run = report_lib.Run(
    name=EVIL, report=report, weights=sample_report.weights(report)
  )
  plain = page.render([sample_report.run(), sample_report.run('other')])
  content = page.render([run, sample_report.run('other')])
  seen = parsed(content)
  assert seen.faults == []
  assert 'img' not in {tag for tag, _ in seen.tags}
  count = lambda found: sum(tag == 'script' for tag, _ in found.tags)
  assert count(seen) == count(parsed(plain))
  assert EVIL in seen.text
  assert EVIL in attributes(seen, 'data-tip')[0]
  drawn = [json.loads(tips) for tips in attributes(seen, 'data-tips')]
  assert any(EVIL in tip for tips in drawn for _, _, tip in tips)


def test_budgets_of_other_costs():
  run = sample_report.run(
    budget=None,
    budgets={'macs': 0.5, 'weights': 0.03},
    relative_macs=0.49,
    relative_weights=0.04,
  )
  seen = parsed(page.render([run, sample_report.run('other')])).text
  assert '49 % of the MACs, ✓ within the budget of 50 %' in seen
  assert '4 % of the weight bits, ✗ over the budget of 3 %' in seen
  assert 'MACs 50 % ✓, weight bits 3 % ✗ over' in seen
  assert 'Weight bits, % of float32' not in seen  # no record of it


def test_curves_of_other_costs():
  rows = [
    {'step': step, 'phase': 'search', 'loss': 1.0, 'relative_weights': 0.1}
    for step in range(3)
  ]
  run = sample_report.run(
    budgets={'weights': 0.03}, relative_weights=0.02, history=rows
  )
  seen = parsed(page.render([run])).text
  assert 'Weight bits, % of float32' in seen


@pytest.mark.parametrize(
  ('config', 'label'),
  [({'validation': 0.1}, 'held out'), ({}, 'test'), ('configs/a.py', 'test')],
)
def test_whose_accuracy_the_curve_is(config, label):
  assert history.watched({'config': config}) == label


def test_an_over_run_budget_is_said():
  seen = parsed(page.render([sample_report.run(budget=1e-5)]))
  assert '✗ over the budget of 0.001' in seen.text
  assert (
    'no budget' in parsed(page.render([sample_report.run(budget=None)])).text
  )


def test_optional_parts_may_lack():
  report = sample_report.make()
  for key in ('float_bytes', 'groups', 'history'):
    del report[key]
  for layer in report['layers']:
    for key in ('in_size', 'out_size', 'float_macs'):
      del layer[key]
  run = report_lib.Run(name='run', report=report, why_no_weights='It is gone.')
  seen = parsed(page.render([run]))
  assert seen.faults == []
  for words in (
    'there are no curves',
    'There are no weights to show. It is gone.',
    'does not say which channel groups there are',
  ):
    assert words in seen.text


def test_layers_without_weights_and_channels():
  """Products, as in attention, and layers that were left in float32."""
  report = sample_report.make()
  report['layers'][1] |= dict(weight_bits=32, act_bits=32)
  product = dict(report['layers'][1], name='scores', kind='product', weights=0)
  product |= dict(in_size=0, out_size=0, kept_in=0, kept_out=0)
  report['layers'].append(product)
  known = {'conv1': report_lib.count_weights([1, -1], 2, [0.5, 0.25])}
  run = report_lib.Run(name='run', report=report, weights=known)
  seen = parsed(page.render([run]))
  assert 'Left in float32, without a grid: conv2.' in seen.text
  assert '0.25 to 0.5, one per output channel' in seen.text


def test_several_runs_are_compared():
  runs = [
    sample_report.run('small', accuracy=0.9, relative_bops=0.001),
    sample_report.run('good', accuracy=0.98, relative_bops=0.002),
    sample_report.run(
      'beaten', accuracy=0.95, relative_bops=0.004, budget=0.003
    ),
  ]
  seen = parsed(page.render(runs))
  assert seen.faults == []
  assert 'with as few BOPs as small or good. In the table they are' in seen.text
  assert '0.3 % ✗ over' in seen.text
  assert len([a for _, a in seen.tags if a.get('role') == 'tab']) == 3
  ids = attributes(seen, 'id')
  assert len(ids) == len(set(ids))
  controls = attributes(seen, 'aria-controls') + attributes(seen, 'for')
  assert set(controls) <= set(ids)
  assert 'do not compare' not in seen.text.partition('Each phase')[0]
  other = sample_report.run('other', config={'model': {'name': 'vgg'}})
  assert 'not of one model and data set (cnn; vgg)' in (
    parsed(page.render([runs[0], other])).text
  )


def test_refuses():
  with pytest.raises(ValueError, match='no run to report'):
    page.render([])
  with pytest.raises(ValueError, match='several runs have the name a'):
    page.render([sample_report.run('a'), sample_report.run('a')])


def test_a_failed_page_leaves_the_old_one(tmp_path):
  path = report_lib.write_page([sample_report.run()], tmp_path / 'page.html')
  before = path.read_bytes()
  broken = dataclasses.replace(sample_report.run(), report={})
  with pytest.raises(KeyError):
    report_lib.write_page([broken], path)
  assert path.read_bytes() == before
  assert len(list(tmp_path.iterdir())) == 1


def test_charts_say_what_they_show():
  seen = parsed(page.render([sample_report.run()]))
  labels = [a['aria-label'] for t, a in seen.tags if a.get('role') == 'img']
  assert len(labels) == 5 + 3  # curves, and weights of three layers
  bops = next(label for label in labels if label.startswith('BOPs'))
  assert 'from 25 % at step 20 to 3.12 % at step 50' in bops
  assert 'budget 0.2 %: 0.2 %' in bops
  # Whoever cannot see colours has other words for them.
  assert all(a.get('tabindex') == '0' for _, a in seen.tags if 'data-tips' in a)


def test_a_level_has_its_bar():
  """0.7 of the weights are zero, the others are on one level."""
  counted = report_lib.count_weights(np.array([0] * 7 + [-3] * 3), 3, 0.5)
  assert counted.counts == (0, 3, 0, 0, 7, 0, 0, 0)
  drawn = weight_chart.draw(counted, 'conv', 'key')
  tips = [tip.text for tip in drawn.tips]
  assert tips[0] == 'level −4 = −2\n0 weights, 0.00 %'
  assert tips[1] == 'level −3 = −1.5\n3 weights, 30.00 %'
  assert tips[4] == 'level 0 = 0\n7 weights, 70.00 %'
  assert len(tips) == 8
  not_zero, zero = drawn.bars
  heights = [
    chart.BOTTOM - float(re.search(r'V([\d.]+)H', bar.path)[1])
    for bar in (not_zero, zero)
  ]
  assert heights[0] / heights[1] == pytest.approx(3 / 7, abs=0.01)
  facts = dict(weight_chart.facts(counted))
  assert facts['levels'] == '2 of 8 in use'
  assert facts['zeros'] == '7 (70.0 %)'


@pytest.mark.parametrize('step', [0.5, 0.0312744])
def test_the_ends_and_zero_are_noted(step):
  """Also where there is no place for all values."""
  for bits in (2, 3, 4, 8):
    counted = report_lib.count_weights([0], bits, step)
    drawn = weight_chart.draw(counted, 'conv', 'key')
    ticks = [x for x, _ in drawn.x_ticks]
    notes = [x for x, _ in drawn.x_notes]
    assert {ticks[0], ticks[-1]} <= set(notes)
    assert '0' in [value for _, value in drawn.x_notes]
    edge = float(re.search(r'^M(-?[\d.]+)', drawn.bars[1].path)[1])
    assert ticks[0] < edge < ticks[-1]


def test_many_levels_share_bars_and_lose_no_weight():
  rng = np.random.default_rng(0)
  levels = rng.integers(-32768, 32768, 1000)
  counted = report_lib.count_weights(levels, 16, 0.1)
  tips = weight_chart.draw(counted, 'conv', 'key').tips
  assert len(tips) <= weight_chart.MOST_BARS + 2
  shown = [int(re.search(r'\n([\d,]+) ', t.text)[1]) for t in tips]
  assert sum(shown) == 1000
  assert tips[len(tips) // 2].text.startswith('level 0 = 0\n')


def test_counts_that_cannot_be():
  with pytest.raises(
    ValueError, match='2 bits go from -2 to 1, a weight is beyond'
  ):
    report_lib.count_weights([2], 2, 1.0)
  with pytest.raises(ValueError, match='3 bits have 8 levels'):
    report_lib.Weights(bits=3, counts=[1, 2], steps=[1.0])
  with pytest.raises(ValueError, match='need its step'):
    report_lib.Weights(bits=2, counts=[0, 1, 2, 3], steps=[])


def test_a_long_history_is_thinned_but_keeps_its_ends():
  report = sample_report.make()
  report['history'] = [
    dict(step=s % 5000, phase=('a', 'b')[s // 5000], loss=1 / (s + 1))
    for s in range(10_000)
  ]
  (loss,) = curve_chart.charts(report, 'key')
  assert len(loss.tips) < 2 * curve_chart.MOST_POINTS
  assert loss.tips[0].text.startswith('step 0, a')
  assert loss.tips[-1].text.startswith('step 9,998, b')
  assert any(tip.text.startswith('step 4,999, a') for tip in loss.tips)
  # A line for each phase: losses of two phases are of two kinds.
  assert loss.lines[-1].path.count('M') == 2


@pytest.mark.parametrize('length', [1, 2])
def test_short_histories(length):
  report = sample_report.make()
  report['history'] = report['history'][-length:]
  for drawn in curve_chart.charts(report, 'key'):
    assert drawn.tips


def test_one_run_is_its_own_front():
  drawn = pareto_chart.draw([('only', sample_report.make())])
  assert [mark.name for mark in drawn.marks] == ['only']
  assert not drawn.marks[0].hollow


def test_names_on_a_crowded_plot_do_not_overlap():
  report = sample_report.make()
  reports = [
    (f'seed-{i}', report | dict(accuracy=0.9 + i / 1e4)) for i in range(9)
  ]
  drawn = pareto_chart.draw(reports)
  placed = [mark for mark in drawn.marks if mark.place]
  assert 1 <= len(placed) < 9
  assert len({mark.place for mark in placed}) == len(placed)
  assert len(drawn.tips) == 9


def test_the_wheel_holds_the_templates():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  pattern = config['options.package_data']['djpq_jax.report']
  files = (ROOT / 'djpq_jax' / 'report' / 'templates').iterdir()
  names = [f'templates/{f.name}' for f in files]
  assert len(names) >= 5
  assert all(fnmatch.fnmatch(name, pattern) for name in names)


def test_measured_speed():
  report = sample_report.make()
  run = report_lib.Run(name='a', report=report)
  assert 'not measured; djpq report --time does it' in page.render([run])
  measured = {
    'images_per_second': {'float32': 2000.0, 'int8': 500.0, 'float': 2500.0},
    'batch': 64,
    'device': 'cpu',
    'cores': 2,
  }
  found = page.render([dataclasses.replace(run, speed=measured)])
  assert '1.25x' in found
  assert (
    'of float32, 64 images at a time (float execution, cpu, 2 cores)' in found
  )
  assert '2,500 images/s, float32 2,000' in found


def test_weights_without_a_level_at_zero_have_the_odd_ones():
  weights = report_lib.count_weights(
    [[-3, -1], [1, 3], [1, 1]], 2, 0.25, odd=True
  )
  assert weights.counts == (0, 1, 0, 1, 0, 3, 0, 1)
  drawn = weight_chart.draw(weights, 'conv', 'key')
  assert [text for _, text in drawn.x_ticks] == ['−3', '−1', '1', '3']
  assert [text for _, text in drawn.x_notes] == [
    *('−0.75', '−0.25'),
    *('0.25', '0.75'),
  ]
  facts = dict(weight_chart.facts(weights))
  assert facts['levels'] == '4 of 4 in use'
  assert facts['step'] == '0.25'
  with pytest.raises(ValueError, match='2 bits have 8 levels'):
    report_lib.Weights(bits=2, counts=(0,) * 4, steps=(0.25,), odd=True)


def test_weights_of_one_bit():
  weights = report_lib.count_weights([[-1, 1], [1, 1]], 1, 0.25, odd=True)
  assert weights.counts == (0, 1, 0, 3)
  drawn = weight_chart.draw(weights, 'conv', 'key')
  assert [text for _, text in drawn.x_ticks] == ['−1', '1']
  assert [text for _, text in drawn.x_notes] == ['−0.25', '0.25']
  assert dict(weight_chart.facts(weights))['levels'] == '2 of 2 in use'
