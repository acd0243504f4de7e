"""ONNX files: written from a graph, and run by ONNX Runtime."""

import collections
from collections.abc import Mapping
import functools
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from djpq_jax import files
from djpq_jax import harden
from djpq_jax import machine
from djpq_jax import packages
from djpq_jax.export import folding
from djpq_jax.export import nodes
from djpq_jax.export import program as program_lib
from djpq_jax.export import rules
from djpq_jax.export import translate

OPSET = 13  # the first one with scales per channel
IR_VERSION = 8  # what ONNX Runtime 1.10 and later read
INPUT, OUTPUT = 'images', 'logits'
FORMS = ('exact', 'qdq', 'integer')


_require = functools.partial(packages.require, extra='onnx', use='ONNX files')


def translated(
  model: harden.HardenedModel,
  input_shape,
  batch: int | None = None,
  form: str = 'exact',
) -> tuple[nodes.Graph, dict[str, str]]:
  """A hardened model as a graph of ONNX nodes.

  Returns:
    The graph; and for each layer whose product runs in float, why.
  """
  if form not in FORMS:
    raise ValueError(f'no form {form!r}; known: {", ".join(FORMS)}')
  program = program_lib.trace(model, input_shape, batch)
  translator = translate.Translator(program, rules.RULES, form)
  graph = translator.run(INPUT, OUTPUT)
  folding.simplify(graph, form)
  return graph, translator.float_layers


def to_proto(graph: nodes.Graph, facts: Mapping[str, Any]):
  """An `onnx.ModelProto`, checked.

  Args:
    graph: what to write.
    facts: metadata of the model, JSON-ready.
  """
  onnx = _require('onnx')
  helper = _require('onnx.helper')
  numpy_helper = _require('onnx.numpy_helper')
  made = [
    helper.make_node(n.op, n.inputs, [n.output], name=n.output, **n.attributes)
    for n in graph.nodes
  ]
  tensors = [
    numpy_helper.from_array(np.asarray(v), k)
    for k, v in graph.constants.items()
  ]

  def info(name):
    dims = [d if isinstance(d, int) else str(d) for d in graph.dims[name]]
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)

  model = helper.make_model(
    helper.make_graph(
      made, 'djpq', [info(INPUT)], [info(graph.output)], tensors
    ),
    opset_imports=[helper.make_opsetid('', OPSET)],
    ir_version=IR_VERSION,
    producer_name='djpq_jax',
  )
  texts = {  # it holds no others
    name: fact if isinstance(fact, str) else json.dumps(fact)
    for name, fact in facts.items()
  }
  helper.set_model_props(model, texts)
  onnx.checker.check_model(model, full_check=True)
  return model


def write(path, model) -> None:
  """Writes a model; a file of this name is replaced once all is written."""
  files.replace(path, model.SerializeToString())


class Session:
  """A file as ONNX Runtime runs it on a CPU.

  Args:
    path: of the file.
    optimize: whether ONNX Runtime may fuse what it finds; else each node
      runs as it is written.
    optimized_path: where it writes what it made of the graph, or None.
  """

  def __init__(self, path, *, optimize: bool = True, optimized_path=None):
    runtime = _require('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Unless told, it binds its threads to cores of others too.
    options.intra_op_num_threads = machine.cores()
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = (
      levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    )
    if optimized_path is not None:
      options.optimized_model_filepath = str(optimized_path)
    self._session = runtime.InferenceSession(
      str(path), options, providers=['CPUExecutionProvider']
    )
    self.batch = self._session.get_inputs()[0].shape[0]
    if not isinstance(self.batch, int):
      self.batch = None

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C], as float32 -> logits [B, classes], float32."""
    name = self._session.get_inputs()[0].name
    return self._session.run(None, {name: np.asarray(images, np.float32)})[0]


def operators(path) -> dict[str, int]:
  """How often ONNX Runtime runs which operator, most frequent first."""
  onnx = _require('onnx')
  with tempfile.TemporaryDirectory() as folder:
    optimized = pathlib.Path(folder) / 'optimized.onnx'
    Session(path, optimized_path=optimized)
    model = onnx.load(str(optimized))
  names = [node.op_type for node in model.graph.node]
  return dict(collections.Counter(names).most_common())
