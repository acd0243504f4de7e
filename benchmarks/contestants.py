"""What is compared: DJPQ, its controls, and what of it is changed alone."""

from typing import Any

import ablations

CONTROLS: dict[str, dict[str, Any]] = {
  'W8A8': {'method': 'uniform', 'uniform_bits': (8, 8)},
  'W4A4': {'method': 'uniform', 'uniform_bits': (4, 4)},
  'W3A3': {'method': 'uniform', 'uniform_bits': (3, 3)},
  'W2A2': {'method': 'uniform', 'uniform_bits': (2, 2)},
  'W1A2': {'method': 'uniform', 'uniform_bits': (1, 2)},
}
# What is done otherwise, each alone: a contestant 'DJPQ NAME @BUDGET'.
FROM_8_BITS = {'search': {'bits': 8.0, 'ramp': 0.7}}
ABLATIONS: dict[str, dict[str, Any]] = {
  'from 3 bits': {'search': {'bits': 3.0}},
  'from 8 bits': FROM_8_BITS,
  'from 8 bits, rewound': FROM_8_BITS | {'finetune': {'rewind': True}},
  'rewound': {'finetune': {'rewind': True}},
  'without teacher': {'search': {'distill': 0.0}, 'finetune': {'distill': 0.0}},
  # The rate of the weights falls once, not in the search and then again.
  'one schedule': {
    'search': {'optimizer': {'anneal': False}},
    'finetune': {'optimizer': {'warmup': 0.0}},
  },
  'a fast ramp': {'search': {'ramp': 0.1}},
  'a slow ramp': {'search': {'ramp': 0.7}},
  'KL 1e-4': {'search': {'kl_weight': 1e-4}},
  'KL 1e-3': {'search': {'kl_weight': 1e-3}},
  'statistics of the training': {'statistics_batches': 0},
  'without rules': {'rules': ()},
  # Bits between whole ones everywhere, and of kernels two at least.
  'real-valued bits': {'search': {'whole_bits_to': 0}},
  'whole bits': {'search': {'whole_bits_to': 16}},
  'whole bits to 2': {'search': {'whole_bits_to': 2}},
  'MACs to 80%': {'budget_macs': 0.8},
}
# Likewise, by a rule for all layers after those of the experiment.
RULES = {
  'per channel': {'per_channel': True},
  'exponents': {'exponent': True},
  'narrow range': {'narrow_range': True},
  'signed inputs': {'asymmetric': False},
  'with a zero': {'mid_rise': False},
  'bits only': {'prune': False},
  'channels only': {'weight_bits': (8, 8), 'act_bits': (8, 8)},
  'align 4': {'align': 4},
  'align 8': {'align': 8},
  'align 16': {'align': 16},
}


def named(base, budgets, shares=()):
  """Name -> what changes in the config `base`.

  Args:
    base: of all contestants.
    budgets: relative BOPs.
    shares: MACs that two-stage may leave after its first stage, in place of
      what `base` says; how much to prune is that method's to guess.

  Raises:
    ValueError: two budgets or two shares would have one name.
  """
  names = [f'{budget:.3%}' for budget in budgets]
  names += [f'{share:.0%} of the MACs' for share in shares]
  twice = [name for name in names if names.count(name) > 1]
  if twice:
    raise ValueError(f'two budgets or shares would have one name, {twice[0]}')

  rules = [dict(rule) for rule in base.rules]

  def ruled(fields):
    return {'rules': [*rules, {'pattern': '*', **fields}]}

  # What the experiment says of single layers still holds.
  two_bits = {'rules': [{'pattern': '*', 'weight_bits': (2, 8)}, *rules]}

  # Trained on for as long, to tell what longer training alone brings.
  rows: dict[str, dict[str, Any]] = {'float': {'method': 'float'}, **CONTROLS}
  for name, control in CONTROLS.items():
    for variant in ('per channel', 'signed inputs', 'with a zero'):
      rows[f'{name} {variant}'] = control | ruled(RULES[variant])
  del rows['W1A2 with a zero']  # of one bit there is none
  gate_rate = 2 * base.search.optimizer.gate_rate
  fast_gates = {'optimizer': {'gate_rate': gate_rate}}
  methods = {
    'DJPQ': {},
    'DJPQ two bits or more': two_bits,
    'DJPQ gates twice as fast': {'search': fast_gates},
    'DJPQ a slow ramp, gates twice as fast': {
      'search': ABLATIONS['a slow ramp']['search'] | fast_gates
    },
    'DJPQ rates x 10': _rates(base, 10.0),
    'DJPQ rates / 10': _rates(base, 0.1),
    'DJPQ half the search': _half_the_search(base),
    **{f'DJPQ {name}': fields for name, fields in ABLATIONS.items()},
    **{f'DJPQ {name}': {} for name in ablations.PATCHES},
    **{f'DJPQ {name}': ruled(fields) for name, fields in RULES.items()},
    'DJPQ-restrict': {'bit_choices': (2, 4, 8, 16, 32)},
    'two-stage': {'method': 'two_stage'},
  }
  for share in shares:
    two_stage = {'method': 'two_stage', 'two_stage_macs': share}
    methods[f'two-stage {share:.0%} MACs'] = two_stage
  for budget in budgets:
    for name, fields in methods.items():
      rows[f'{name} @{budget:.3%}'] = fields | {'budget': budget}
  return rows


def _rates(base, factor: float) -> dict:
  """Every learning rate of the compression, times a factor."""
  found = {}
  for phase in ('search', 'finetune'):
    optimizer = base[phase].optimizer
    names = [n for n in optimizer if n.endswith('_rate')]
    found[phase] = {'optimizer': {n: factor * optimizer[n] for n in names}}
  return found


def _half_the_search(base) -> dict:
  """Half of it goes to finetuning; bits and gates move twice as fast."""
  epochs = base.search.epochs / 2
  optimizer = base.search.optimizer
  rates = {n: 2 * optimizer[n] for n in ('quantizer_rate', 'gate_rate')}
  return {
    'search': {'epochs': epochs, 'optimizer': rates},
    'finetune': {'epochs': base.finetune.epochs + epochs},
  }
