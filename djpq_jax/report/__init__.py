"""What a run reports: `report.json`, terminal, pictures, HTML page.

A report is a dict. It always holds the keys in `KEYS`, and per layer those in
`LAYER_KEYS`. It may also hold

* `float_bytes`: the size of the float32 parameters, in bytes;
* per layer `in_size`, `out_size` (channels before pruning) and `float_macs`;
* `budgets`: the largest of `relative_bops`, `relative_macs` and
  `relative_weights` (bits of all kernels), by name without 'relative'; with it
  these are in the report, too;
* `best_steps`: phase -> the step that it ended with, where the best was kept;
* `history`, one record per logged step: `step`, `phase`, and any of `loss`,
  `accuracy`, `eval_accuracy`, `relative_bops`, `relative_macs`,
  `relative_weights`, `mean_weight_bits`, `mean_act_bits`, `kept_fraction`;
* `groups`, one record per channel group: `name`, `size`, `kept`, `reason`
  (why it could not be pruned; None or empty if it could).

Accuracies, relative BOPs, the budget and kept fractions are fractions of one.
"""

from djpq_jax.report.curve_picture import plot_curves
from djpq_jax.report.layer_picture import plot_layers
from djpq_jax.report.page import FILE_NAME as PAGE_NAME
from djpq_jax.report.page import write_page
from djpq_jax.report.page_facts import Run
from djpq_jax.report.pareto_picture import plot_pareto
from djpq_jax.report.record import FILE_NAME
from djpq_jax.report.record import KEYS
from djpq_jax.report.record import LAYER_KEYS
from djpq_jax.report.record import read
from djpq_jax.report.record import write
from djpq_jax.report.style import check_pictures
from djpq_jax.report.text import headline
from djpq_jax.report.text import print_report
from djpq_jax.report.text import summary
from djpq_jax.report.text import table
from djpq_jax.report.weight_chart import Weights
from djpq_jax.report.weight_chart import count as count_weights

__all__ = [
  'FILE_NAME',
  'KEYS',
  'LAYER_KEYS',
  'PAGE_NAME',
  'Run',
  'Weights',
  'check_pictures',
  'count_weights',
  'headline',
  'plot_curves',
  'plot_layers',
  'plot_pareto',
  'print_report',
  'read',
  'summary',
  'table',
  'write',
  'write_page',
]
