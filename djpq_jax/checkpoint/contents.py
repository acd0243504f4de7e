"""The arrays of a hardened model, as they are stored and as it holds them."""

from collections.abc import Mapping

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import graph as graph_lib
from djpq_jax import harden
from djpq_jax import layers
from djpq_jax.checkpoint import arguments
from djpq_jax.checkpoint import manifest as manifest_lib
from djpq_jax.checkpoint import packing
from djpq_jax.checkpoint import program as program_lib

PACKED = 'packed'  # the array of all integers
INTEGERS = f'{PACKED} int'  # what the index calls those of so many bits
ODD = f'{PACKED} odd'  # and those of which each is twice an integer, and 1
HOOK = '/promote_dtype/'  # in the names of what a layer's operands hold
LEVELS = 2**24  # above zero or below it; float32 has no more whole numbers


def packed(
  model: harden.HardenedModel, bits: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
  """What is written of a model.

  Args:
    model: hardened.
    bits: of the kernel of each quantized layer.

  Returns:
    (name -> form of each array of the model, the few that are written).
  """
  # Few arrays, for each costs hundreds of bytes on disk.
  parts: dict[str, list[np.ndarray]] = {}
  entries: dict[str, str] = {}
  stored = program_lib.names(model)
  odd = _odd_kernels(model)
  values = []
  for key, variable in nnx.to_flat_state(nnx.state(model)):
    name = '/'.join(map(str, key))
    if name not in stored:
      continue
    value, width = np.asarray(variable[...]), 0
    if isinstance(variable, layers.IntegerParam):
      width = bits[name.removeprefix('model/').removesuffix('/kernel')]
    values.append((width, name, value))
  # Of one width side by side: they share the codes of their bytes.
  for width, name, value in sorted(values, key=lambda v: v[:2]):
    if width:
      if name in odd and not (np.all(value & 1) and width < packing.BYTE):
        raise ValueError(f'{name} has integers that are no odd ones of int8')
      kind = ODD if name in odd else INTEGERS
      entries[name] = manifest_lib.spec(f'{kind}{width}', value.shape)
      half = value >> (name in odd)
      parts.setdefault(PACKED, []).append(packing.pack(half, width))
    else:
      entries[name] = manifest_lib.spec(str(value.dtype), value.shape)
      parts.setdefault(str(value.dtype), []).append(value.ravel())
  return entries, {n: np.concatenate(found) for n, found in parts.items()}


def _odd_kernels(model: harden.HardenedModel) -> set[str]:
  """Names of the kernels whose integers are all odd."""
  return {
    f'model/{hook.path}/kernel'
    for hook in compress.hooks(model)
    if isinstance(hook.operands.weight, harden.Dequantizer)
    if hook.operands.weight.odd
  }


def unpacked(specs, arrays) -> dict[str, np.ndarray]:
  """Each array of the model, by name."""
  values = {}
  done = dict.fromkeys(arrays, 0)
  for name, text in specs.items():
    dtype, shape = manifest_lib.read_spec(text)
    size = int(np.prod(shape))
    integers, odd = dtype.startswith(PACKED), dtype.startswith(ODD)
    prefix = ODD if odd else INTEGERS
    bits = int(dtype.removeprefix(prefix)) if integers else 0
    kind = PACKED if integers else dtype
    size = packing.packed_bytes(size, bits) if integers else size
    value = arrays[kind][done[kind] : done[kind] + size]
    done[kind] += size
    if integers:
      if odd and bits >= packing.BYTE:
        raise ValueError(f'{name} has odd integers beyond int8')
      whole = packing.unpack(value, bits, shape)
      values[name] = 2 * whole + 1 if odd else whole
    else:
      values[name] = value.reshape(shape)
  return values


def inputs(model: harden.HardenedModel) -> dict[str, tuple[int, int]]:
  """The lowest and the highest level of each quantized layer's input."""
  return {
    hook.path: (hook.operands.act.lowest, hook.operands.act.highest)
    for hook in compress.hooks(model)
    if isinstance(hook.operands.act, harden.FixedQuantizer)
  }


def _ends(lowest: int, highest: int) -> tuple[int, int]:
  """The outermost levels of an input, if they can be that."""
  whole = all(type(end) is int for end in (lowest, highest))
  if not whole or not -LEVELS < lowest <= 0 <= highest < LEVELS:
    raise ValueError(f'no input has the levels {lowest} to {highest}'[:99])
  return lowest, highest


def skeleton(manifest, dense) -> harden.HardenedModel:
  """The hardened model with shapes in place of arrays."""
  plan = compress.Plan.from_json(manifest['plan'])
  model = compress.eval_view(_abstract(dense, manifest['arrays']))
  args, kwargs = arguments.from_json(
    manifest['arguments'], manifest['input_shape']
  )
  graph = graph_lib.trace(model, *args, **kwargs)
  groups = tuple(
    compress.GroupSettings(
      name=g.name,
      size=g.size,
      align=1,
      min_channels=1,
      reason=manifest['reasons'].get(g.name, ''),
    )
    for g in graph.groups
  )
  levels = {path: _ends(*ends) for path, ends in manifest['inputs'].items()}
  unknown = levels.keys() - graph.layers.keys()
  if unknown:
    raise ValueError(f'it has no layer {min(unknown)}')
  settings = {
    p: compress.LayerSettings(quantize=p in levels) for p in graph.layers
  }
  structure = compress.Structure(graph, settings, groups, plan)
  inner = graph_lib.slice_channels(model, graph, dict(plan.open))
  odd = {n for n, text in manifest['arrays'].items() if text.startswith(ODD)}
  empty = jax.ShapeDtypeStruct((), jnp.float32)
  gates = [harden.Scales(empty) for _ in structure.gated]
  compress.attach_operands(
    inner,
    structure,
    weight=lambda path: (
      harden.Dequantizer(empty, odd=f'model/{path}/kernel' in odd)
      if path in levels
      else None
    ),
    act=lambda path: (
      harden.FixedQuantizer(empty, *levels[path]) if path in levels else None
    ),
  )
  hardened = harden.HardenedModel(inner, gates, structure)
  for hook in compress.hooks(hardened):
    if hook.path in levels:
      hook.layer.kernel = layers.IntegerParam(hook.layer.kernel.get_value())
  return hardened


def _abstract(dense, stored):
  """The dense model with shapes in place of the arrays of its Variables.

  An array that is no Variable, as a table of positions, is no part of a model
  that was made of shapes alone: such a model is made once with its numbers.
  """
  model = nnx.eval_shape(dense)
  held = {
    '/'.join(map(str, ('model', *key)))
    for key, _ in nnx.to_flat_state(nnx.state(model))
  }
  own = {n for n in stored if n.startswith('model/') and HOOK not in n}
  return model if own <= held else graph_lib.abstract(dense())


def filled(model, values) -> harden.HardenedModel:
  """The model with arrays in place of shapes."""
  graphdef, state = nnx.split(model)
  whole = nnx.to_flat_state(state)
  # Predictions draw nothing, so any states of generators will do.
  noise = [(k, _some(v)) for k, v in whole if isinstance(v, nnx.RngState)]
  flat = [
    ('/'.join(map(str, k)), k, v)
    for k, v in whole
    if not isinstance(v, nnx.RngState)
  ]
  different = {name for name, _, _ in flat} ^ values.keys()
  different |= {
    name
    for name, _, variable in flat
    # A step or a scale has no shape before it is read.
    if name in values and not isinstance(variable, harden.Constant)
    if variable.shape != values[name].shape
    # The kernel of a layer is float in the dense model.
    or (
      not isinstance(variable, layers.IntegerParam)
      and variable.dtype != values[name].dtype
    )
  }
  if different:
    raise ValueError(f'they differ in {", ".join(sorted(different)[:3])}')
  filled = [(key, jnp.asarray(values[name])) for name, key, _ in flat]
  return nnx.merge(graphdef, nnx.from_flat_state([*filled, *noise]))


def _some(variable):
  """A value for the count or the key of a random generator."""
  if jnp.issubdtype(variable.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  return jnp.zeros(variable.shape, variable.dtype)
