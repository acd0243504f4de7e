"""A small report with all that a report can hold, and a run of it."""

import numpy as np

from djpq_jax import report as report_lib


def _layer(name, channels, bits, macs, float_macs):
  (kept_in, in_size), (kept_out, out_size) = channels
  weight_bits, act_bits = bits
  return dict(
    name=name,
    kept_in=kept_in,
    kept_out=kept_out,
    weight_bits=weight_bits,
    act_bits=act_bits,
    macs=macs,
    bops=macs * weight_bits * act_bits,
    in_size=in_size,
    out_size=out_size,
    float_macs=float_macs,
  )


def _history():
  rows = []
  for step in range(0, 60, 10):
    phase = ('float', 'search', 'finetune')[step // 20]
    row = dict(step=step, phase=phase, loss=1.0, accuracy=0.5 + step / 160)
    if phase != 'float':
      row |= dict(relative_bops=2.0 ** -(step // 10), kept_fraction=0.5)
      row |= dict(mean_weight_bits=4.5, mean_act_bits=5.0)
    rows.append(row | {'eval_accuracy': 0.9 if step % 20 else None})
  return rows


def make():
  """Three layers, three phases, two groups that could not be pruned."""
  layers = [
    _layer('conv1', ((1, 1), (10, 32)), (4, 8), 5760, 18432),
    _layer('conv2', ((10, 32), (16, 64)), (3, 3), 92160, 1179648),
    _layer('fc', ((16, 64), (10, 10)), (4, 4), 160, 640),
  ]
  bops = sum(l['bops'] for l in layers)
  float_macs = sum(l['float_macs'] for l in layers)
  return dict(
    float_accuracy=0.9899244,
    accuracy=0.98488665,
    budget=0.002,
    relative_bops=bops / (1024 * float_macs),
    bops=bops,
    float_bops=1024 * float_macs,
    macs=sum(l['macs'] for l in layers),
    float_macs=float_macs,
    artifact='artifact',
    artifact_bytes=12345,
    float_bytes=78000,
    seconds=101.7,
    seed=0,
    config={'model': {'name': 'cnn'}, 'kernel': (3, 3)},
    layers=layers,
    groups=[
      dict(name='conv1', size=32, kept=10, reason=None),
      dict(name='fc', size=10, kept=10, reason='output of the model'),
      dict(name='image', size=1, kept=1, reason='input of the model'),
    ],
    history=_history(),
  )


def weights(report):
  """Some for each layer, on its grid."""
  rng = np.random.default_rng(0)
  out = {}
  for layer in report['layers']:
    top = 2 ** (layer['weight_bits'] - 1) - 1
    out[layer['name']] = report_lib.count_weights(
      rng.integers(-top, top + 1, 200), layer['weight_bits'], 0.125
    )
  return out


def run(name='run', **changes):
  """For the page; the changes are those of its report."""
  report = make() | changes
  return report_lib.Run(name=name, report=report, weights=weights(report))
