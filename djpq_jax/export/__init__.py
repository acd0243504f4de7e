"""Writes a hardened model for others to run: as StableHLO, or as ONNX.

Each file is read back and run on real images once it is written; what it
computes is compared with the model, and the deviation is part of the result.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from djpq_jax import evaluation
from djpq_jax import files
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax.export import onnx_file
from djpq_jax.export import stablehlo_file
from djpq_jax.export import verify
from djpq_jax.export.nodes import ExportError
from djpq_jax.export.onnx_file import FORMS
from djpq_jax.export.verify import Deviation

__all__ = ['FORMATS', 'FORMS', 'Deviation', 'ExportError', 'Result', 'export']

FORMATS = ('onnx', 'stablehlo')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What was written, and what it computes.

  Attributes:
    path: of the file.
    deviation: of the file as it is run from the model.
    float_layers: quantized layers whose product the file has in float, with
      the reason; their numbers are the same.
    operators: how often ONNX Runtime runs which operator, once it has fused
      what it can; empty for StableHLO.
    facts_path: of the JSON file that was written beside it, with its shapes
      and `facts`; None for ONNX, which has them in the file.
  """

  path: pathlib.Path
  deviation: verify.Deviation
  float_layers: Mapping[str, str]
  operators: Mapping[str, int]
  facts_path: pathlib.Path | None = None


def export(
  model: harden.HardenedModel,
  path,
  images: np.ndarray,
  *,
  format: str,
  batch: int | None = None,
  form: str = 'exact',
  facts: Mapping[str, Any] | None = None,
) -> Result:
  """Writes a hardened model, reads the file back and compares.

  It is compared with the integers that reports speak of,
  `integer.lower(model, 'simulated')`, and StableHLO holds just these.

  Args:
    model: what to write.
    path: where to, on this machine; a file that is there is replaced, and for
      StableHLO also one of this name and '.json'.
    images: to compare on, float32 [N, H, W, C], prepared as for the model.
    format: 'onnx' or 'stablehlo'.
    batch: examples of a call, or None for any number.
    form: of ONNX: 'exact' has pairs of QuantizeLinear and DequantizeLinear,
      which runtimes fuse into integer layers where that rounds all alike, and
      else sums of whole numbers in float; 'qdq' has integer layers wherever
      they can be, and deviates; 'integer' has ConvInteger and MatMulInteger.
    facts: JSON-ready, written into the file or beside it; ONNX has what is
      no text as JSON text.

  Returns:
    The result.  A file that deviates is not an error here: see
    `Deviation.fault`.

  Raises:
    ValueError: the model has no such form, or an argument is wrong.
    ImportError: a package is missing; the message says which.
  """
  if format not in FORMATS:
    raise ValueError(f'no format {format!r}; known: {", ".join(FORMATS)}')
  arrays = _arrays(model)
  if arrays > 1:
    raise ValueError(
      f'the model takes {arrays} arrays, and a file of {format} one batch of '
      'images; what takes all is the program of its artifact, if that has one'
    )
  path = _place(path)
  if format == 'stablehlo':
    _place(stablehlo_file.manifest_path(path))
  shape = images.shape[1:]
  exact = integer.lower(model, 'simulated')
  wanted = evaluation.predict(
    exact, [images[i : i + 256] for i in range(0, len(images), 256)]
  )
  step = verify.output_step(model)
  stated = {
    'input': f'images, float32 [{batch or "batch"}, '
    f'{", ".join(map(str, shape))}]',
    'output': f'logits, float32 [{batch or "batch"}, {wanted.shape[-1]}]',
    **(facts or {}),
  }
  float_layers: dict[str, str] = {}
  operators: dict[str, int] = {}
  if format == 'onnx':
    graph, float_layers = onnx_file.translated(model, shape, batch, form)
    onnx_file.write(path, onnx_file.to_proto(graph, stated))
    call: Any = onnx_file.Session(path)
    operators = onnx_file.operators(path)
    facts_path = None
  else:
    facts_path = stablehlo_file.write(
      path, stablehlo_file.exported(exact, shape, batch), stated
    )
    call = stablehlo_file.Loaded(path)
  found = verify.run(call, images, batch)
  deviation = verify.compare(wanted, found, step)
  return Result(
    path=path,
    deviation=deviation,
    float_layers=float_layers,
    operators=operators,
    facts_path=facts_path,
  )


def _arrays(model: harden.HardenedModel) -> int:
  """How many arrays a model takes, as far as it says."""
  arguments = model.structure.graph.arguments
  return len(graph_lib.split_arrays(arguments)[0]) if arguments else 1


def _place(path) -> pathlib.Path:
  """The path, if a file can be written there and read back."""
  text = os.fspath(path)
  if not text:
    raise ValueError('the name of the file to write is empty; give one')
  if files.is_remote(text):  # which pathlib would take for folders
    raise ValueError(
      f'{text} is not on this machine, where alone a model is exported to; '
      'give a file here, and copy it there'
    )
  place = pathlib.Path(text)
  files.check_place(text)
  folder = place.absolute().parent
  if not folder.exists():
    raise ValueError(
      f'{text} cannot be written: there is no folder {folder}; make it first'
    )
  return place
