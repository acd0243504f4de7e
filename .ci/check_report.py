"""Checks the numbers of a finished demo: python .ci/check_report.py WORKDIR.

The bounds are a smoke test of one seed; the README states the mean of three.
Only the standard library, so that it reads the file as a stranger would.
"""

import json
import math
import pathlib
import sys

MIN_FLOAT_ACCURACY = 0.98
MIN_ACCURACY = 0.975
MIN_BUDGET_USE = 0.95
MAX_SECONDS = 240

KEYS = """float_accuracy accuracy relative_bops budget macs float_macs bops
  float_bops artifact artifact_bytes layers seconds seed config""".split()
LAYER_KEYS = 'name kept_in kept_out weight_bits act_bits macs bops'.split()


def _same(a, b):
  return math.isclose(a, b, rel_tol=1e-6)


def _forbid(constant):
  raise ValueError(f'{constant} is not JSON')


def missing_keys(report):
  """Yields what the report lacks."""
  for key in KEYS:
    if key not in report:
      yield f'report.json lacks {key!r}'
  for i, layer in enumerate(report.get('layers', [])):
    for key in LAYER_KEYS:
      if key not in layer:
        yield f'layer {layer.get("name", i)!r} lacks {key!r}'


def wrong_numbers(report):
  """Yields the sentences that should be true of a good demo and are not."""
  r = report
  layers = r['layers']
  relative = f'relative_bops {r["relative_bops"]:.6g}'
  checks = [
    (r['float_accuracy'] >= MIN_FLOAT_ACCURACY,
     f'float_accuracy {r["float_accuracy"]:.4f} < {MIN_FLOAT_ACCURACY}'),
    (r['accuracy'] >= MIN_ACCURACY,
     f'accuracy {r["accuracy"]:.4f} < {MIN_ACCURACY}'),
    (r['relative_bops'] <= r['budget'],
     f'{relative} is above the budget {r["budget"]:.6g}'),
    (r['relative_bops'] >= MIN_BUDGET_USE * r['budget'],
     f'{relative} uses less than {MIN_BUDGET_USE:.0%} of the budget'),
    (_same(r['relative_bops'], r['bops'] / r['float_bops']),
     f'{relative} != bops / float_bops'),
    (bool(layers), 'there are no layers'),
    (_same(r['bops'], sum(l['bops'] for l in layers)),
     f'bops {r["bops"]} != sum over the layers'),
    (_same(r['macs'], sum(l['macs'] for l in layers)),
     f'macs {r["macs"]} != sum over the layers'),
    (r['artifact_bytes'] > 0, 'artifact_bytes is not positive'),
    (r['seconds'] <= MAX_SECONDS,
     f'it took {r["seconds"]:.0f} s, more than {MAX_SECONDS}'),
  ]  # fmt: skip
  return [sentence for true, sentence in checks if not true]


def has_artifact(report, workdir):
  """True if the artifact's folder exists, as seen from here or workdir."""
  path = pathlib.Path(report['artifact'])
  return any(p.is_dir() and any(p.iterdir()) for p in (path, workdir / path))


def main(workdir):
  """Returns the process's exit status."""
  workdir = pathlib.Path(workdir)
  text = (workdir / 'report.json').read_text(encoding='utf-8')
  report = json.loads(text, parse_constant=_forbid)
  faults = list(missing_keys(report))
  if not faults:
    faults = wrong_numbers(report)
    if not has_artifact(report, workdir):
      faults.append(f'no artifact in {report["artifact"]}')
  for fault in faults:
    print(f'FAIL {fault}', file=sys.stderr)
  if not faults:
    print(
      f'ok: accuracy {report["accuracy"]:.4f} (float '
      f'{report["float_accuracy"]:.4f}) at {report["relative_bops"]:.4%} of '
      f'the float BOPs in {report["seconds"]:.0f} s'
    )
  return 1 if faults else 0


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
