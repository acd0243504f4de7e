"""A written file computes what the model does, in integers where it can."""

import functools
import json
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from djpq_jax import compress
from djpq_jax import export
from djpq_jax import harden
from djpq_jax import stablehlo
from djpq_jax.export import biases
from djpq_jax.export import onnx_file
from djpq_jax.export import stablehlo_file
from djpq_jax.export import sums
from djpq_jax.export import verify

onnx = pytest.importorskip('onnx', reason="needs pip install 'djpq-jax[onnx]'")
pytest.importorskip('onnxruntime', reason="needs pip install 'djpq-jax[onnx]'")

# They run flax's batch norm.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parent.parent
IMAGES = tiny.split(70, seed=5).images


class Relu6(nnx.Module):
  """What MobileNets are made of: relu6, and a sum without relu."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
    self.bn = nnx.BatchNorm(8, rngs=rngs)
    self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
    self.pointwise = nnx.Conv(8, 8, (1, 1), rngs=rngs)
    self.head = nnx.Linear(8, tiny.CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu6(self.bn(self.conv(x)))
    y = x + self.pointwise(nnx.relu6(self.depthwise(x)))
    return self.head(y.mean((1, 2)))


class Squeeze(nnx.Module):
  """Squeeze and excitation, swish, average and max pooling, stride, pads."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), strides=2, padding=1, rngs=rngs)
    self.down = nnx.Conv(8, 4, (1, 1), rngs=rngs)
    self.up = nnx.Conv(4, 8, (1, 1), rngs=rngs)
    self.head = nnx.Linear(9, tiny.CLASSES, rngs=rngs)

  def __call__(self, x):
    y = nnx.swish(self.conv(x))
    gate = nnx.relu(self.down(y.mean((1, 2), keepdims=True)))
    y = y * nnx.sigmoid(self.up(gate))
    y = jnp.concatenate([y, nnx.max_pool(x, (2, 2), (2, 2))], axis=-1)
    y = jnp.pad(y, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, ::2]
    return self.head(nnx.avg_pool(y, (2, 2), (2, 2))[:, 0, 0])


class Attention(nnx.Module):
  """Tokens, layer norm, softmax, gelu."""

  def __init__(self, rngs):
    self.embed = nnx.Linear(4, 6, rngs=rngs)
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.mix = nnx.Linear(6, 6, rngs=rngs)
    self.head = nnx.Linear(6, tiny.CLASSES, rngs=rngs)

  def __call__(self, x):
    x = self.norm(self.embed(x[..., 0]))
    scores = nnx.softmax(jnp.einsum('btc,bsc->bts', x, x))
    x = x + jnp.einsum('bts,bsc->btc', scores, x)
    x = nnx.gelu(self.mix(x), approximate=False)
    return self.head(x[:, 0])


KINDS = {
  'flatten': tiny.Normed,
  'depthwise': tiny.Depthwise,
  'residual': tiny.Residual,
  'relu6': Relu6,
  'squeeze': Squeeze,
  'attention': Attention,
}


@functools.cache
def net_of(name, least=2):
  """A compressed model with gates that are not 1."""
  rule = compress.Rule(pattern='*', weight_bits=(least, 8))
  net = tiny.compressed(KINDS[name], [rule])
  rng = np.random.default_rng(3)
  for gate in net.gates:
    gate.mu.set_value(jnp.asarray(rng.uniform(0.5, 1.5, gate.size), 'float32'))
  return net


@functools.cache
def build(name, bits=None):
  """A hardened model with cut channels."""
  net = net_of(name, 1 if bits == 1 else 2)
  plan = tiny.some_plan(net)
  if bits is not None:
    weights = dict.fromkeys(plan.weight_bits, bits)
    inputs = dict.fromkeys(plan.act_bits, max(2, bits))  # some have a sign
    plan = compress.Plan(open=plan.open, weight_bits=weights, act_bits=inputs)
  return harden.harden(compress.freeze(net, plan, tiny.batch(64)['image']))


def written(model, folder, **kwargs):
  kwargs = {'format': 'onnx', **kwargs}
  return export.export(model, folder / 'model', IMAGES, **kwargs)


@pytest.mark.parametrize('form', export.FORMS)
@pytest.mark.parametrize('name', KINDS)
def test_onnx_computes_what_the_model_does(name, form, tmp_path):
  found = written(build(name), tmp_path, form=form)
  assert found.deviation.fault(strict=True) == ''
  assert found.deviation.images == len(IMAGES)
  assert found.float_layers == {}


def test_images_of_another_dtype_are_taken_as_float32(tmp_path):
  model = build('flatten')
  images = np.asarray(IMAGES, np.float64)
  for form in export.FORMATS:
    found = export.export(model, tmp_path / form, images, format=form)
    assert found.deviation.largest == 0


@pytest.mark.parametrize('form', ['exact', 'integer'])
@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_all_bits_of_the_logits_are_the_models(bits, name, form, tmp_path):
  found = written(build(name, bits), tmp_path, form=form)
  assert found.deviation.largest == 0


@pytest.mark.parametrize('name', ['flatten', 'depthwise', 'residual'])
@pytest.mark.parametrize('bits', [1, 2, 4])
def test_few_bits_are_exact_in_integers(bits, name, tmp_path):
  found = written(build(name, bits), tmp_path)
  assert found.deviation.largest == 0
  assert found.operators['QLinearConv'] == 1 + (name == 'depthwise')
  assert found.operators['MatMulIntegerToFloat'] == 1


def test_a_layer_without_a_whole_bias_runs_in_float(tmp_path):
  found = written(build('flatten', 8), tmp_path)
  assert found.deviation.largest == 0
  assert found.operators['Conv'] == 1
  assert 'QLinearConv' not in found.operators


def test_eight_bits_run_as_integers(tmp_path):
  found = written(build('flatten', 8), tmp_path, form='qdq')
  assert found.deviation.fault() == ''
  assert found.operators['QLinearConv'] == 1
  assert found.operators['QGemm'] == 1
  assert not {'Conv', 'FusedConv', 'MatMul', 'Gemm'} & set(found.operators)


def test_factors_of_both_signs(tmp_path):
  """Where a batch norm's scale is negative, levels rise as sums fall."""
  model = build('residual', 4)
  model = nnx.clone(model)
  scale = model.model.bn1.scale
  signs = jnp.where(jnp.arange(scale.size) % 2, 1, -1)
  scale.set_value(scale[...] * signs)
  found = written(model, tmp_path)
  assert found.deviation.largest == 0
  assert found.operators['QLinearConv'] == 1


def test_sums_that_float32_cannot_hold(tmp_path, monkeypatch):
  monkeypatch.setattr(sums, 'EXACT_IN_FLOAT', 100)
  found = written(build('residual', 8), tmp_path)
  assert found.deviation.largest == 0
  assert found.operators['ConvInteger'] == 3
  assert found.operators['MatMulInteger'] == 1


def test_integer_form_has_integer_sums(tmp_path):
  found = written(build('residual', 8), tmp_path, form='integer')
  assert found.deviation.fault(strict=True) == ''
  assert found.operators['ConvInteger'] == 3
  assert found.operators['MatMulInteger'] == 1


def test_a_transposition_at_the_ends_alone():
  graph, _ = onnx_file.translated(build('residual'), tiny.SHAPE)
  assert [n.op for n in graph.nodes].count('Transpose') == 1


@pytest.mark.parametrize('format', export.FORMATS)
@pytest.mark.parametrize('batch', [1, 5])
def test_fixed_batches(format, batch, tmp_path):
  found = written(build('flatten'), tmp_path, format=format, batch=batch)
  assert found.deviation.fault(strict=True) == ''


@pytest.mark.parametrize('name', ['flatten', 'residual'])
def test_stablehlo_computes_what_the_model_does(name, tmp_path):
  facts = {'artifact': 'abc'}
  found = written(build(name), tmp_path, format='stablehlo', facts=facts)
  assert found.deviation.fault(strict=True) == ''
  assert found.deviation.largest == 0
  loaded = stablehlo_file.Loaded(found.path)
  assert loaded.program.platforms == stablehlo.PLATFORMS
  assert '8x' not in str(loaded.program.in_avals[0].shape[0])
  assert found.facts_path == tmp_path / 'model.json'
  assert {f.name for f in tmp_path.iterdir()} == {'model', 'model.json'}
  stated = json.loads(found.facts_path.read_text())
  assert stated == {
    'input': 'images, float32 [batch, 4, 4, 1]',
    'output': f'logits, float32 [batch, {tiny.CLASSES}]',
    'artifact': 'abc',
  }


def test_wide_layers_stay_float_and_say_so(tmp_path):
  net = tiny.compressed(tiny.Mlp)
  plan = compress.Plan(
    open={},
    weight_bits={'hidden': 12, 'head': 8},
    act_bits={'hidden': 8, 'head': 11},
  )
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  found = written(harden.harden(frozen), tmp_path)
  assert found.deviation.fault() == ''
  assert found.float_layers == {
    'hidden': 'its kernel has more than 8 bits',
    'head': 'its inputs have 11 bits',
  }


def test_layers_that_are_float(tmp_path):
  rules = [compress.Rule(pattern='*', quantize=False)]
  net = tiny.compressed(tiny.Normed, rules)
  plan = compress.Plan(open={}, weight_bits={}, act_bits={})
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  found = written(harden.harden(frozen), tmp_path)
  assert found.deviation.step is None
  assert found.deviation.fault(strict=True) == ''


class Sorted(tiny.Mlp):
  def __call__(self, x):
    x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
    return self.head(jnp.sort(x, axis=-1))


def test_what_has_no_form_is_refused_by_name(tmp_path):
  net = tiny.compressed(Sorted)
  frozen = compress.freeze(net, tiny.some_plan(net), tiny.batch(64)['image'])
  model = harden.harden(frozen)
  match = "after layer hidden: the primitive 'sort' is not among the known"
  with pytest.raises(export.ExportError, match=match):
    written(model, tmp_path)
  assert list(tmp_path.iterdir()) == []
  found = written(model, tmp_path, format='stablehlo')
  assert found.deviation.fault(strict=True) == ''


class Two(tiny.Mlp):
  def __call__(self, x, scale):
    return super().__call__(x * scale)


class Recurrent(nnx.Module):
  def __init__(self):
    self.rnn = nnx.RNN(nnx.SimpleCell(4, 4, rngs=nnx.Rngs(0)))
    self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.head(self.rnn(x)[:, -1])


@pytest.mark.parametrize('batch', [None, 2])
def test_what_is_no_model_of_images_is_refused(batch, tmp_path):
  images = tiny.batch(8)['image']
  scale = np.ones((8, 1, 1, 1), np.float32)
  for model, x, match in (
    (
      Two(nnx.Rngs(0)),
      (images, scale),
      'the model takes 2 arrays, and a file of onnx',
    ),
    (Recurrent(), (images[..., 0],), 'hands keys of random numbers on, as nnx'),
  ):
    net = compress.compress(model, x=x)
    frozen = compress.freeze(net, tiny.some_plan(net), *x)
    hardened = harden.harden(frozen)
    path = tmp_path / 'model'
    with pytest.raises(ValueError, match=match):
      export.export(hardened, path, x[0], format='onnx', batch=batch)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    (dict(format='tflite'), "no format 'tflite'; known: onnx, stablehlo"),
    (dict(form='int4'), "no form 'int4'; known: exact, qdq, integer"),
    (dict(batch=0), 'at least one example, not 0'),
  ],
)
def test_arguments(kwargs, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    written(build('flatten'), tmp_path, **kwargs)


def test_facts_of_any_kind(tmp_path):
  facts = {'license': 'MIT', 'accuracy': 0.9, 'measured_on': {'images': 4}}
  path = written(build('flatten'), tmp_path, facts=facts).path
  said = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
  assert said.pop('license') == 'MIT'
  assert json.loads(said['accuracy']) == 0.9
  assert json.loads(said['measured_on']) == {'images': 4}
  path = written(
    build('flatten'), tmp_path, facts=facts, format='stablehlo'
  ).facts_path
  assert json.loads(path.read_text()).items() >= facts.items()


def test_the_facts_of_stablehlo_need_a_place_too(tmp_path):
  (tmp_path / 'model.json').mkdir()
  with pytest.raises(ValueError, match=r'model\.json is a folder'):
    written(build('flatten'), tmp_path, format='stablehlo')
  assert [f.name for f in tmp_path.iterdir()] == ['model.json']
  assert written(build('flatten'), tmp_path).facts_path is None


@pytest.mark.parametrize('format', export.FORMATS)
@pytest.mark.parametrize(
  ('out', 'match'),
  [
    ('', r'^the name of the file to write is empty'),
    ('gs://bucket/model', '^gs://bucket/model is not on this machine'),
    ('.', r'^\. is a folder; give the name of a file in it$'),
    ('folder/', r'^folder/ is a folder'),
    (
      'none/model',
      r'^none/model cannot be written: there is no folder .*none;',
    ),
    ('file/model', r'^file/model cannot be written: .*/file is a file$'),
  ],
)
def test_what_is_no_place_for_a_file(out, match, format, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(ValueError, match=match):
    export.export(build('flatten'), out, IMAGES, format=format)
  assert {f.name for f in tmp_path.rglob('*')} == {'folder', 'file'}


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_missing_packages(package, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  match = rf"need the package '{package}': pip install 'djpq-jax\[onnx\]'"
  with pytest.raises(ImportError, match=match):
    written(build('flatten'), tmp_path, format='onnx')


def test_the_example_serves_the_file(tmp_path):
  found = written(build('flatten'), tmp_path)
  np.save(tmp_path / 'images.npy', IMAGES)
  command = [sys.executable, 'examples/serve_onnx.py', str(found.path)]
  done = subprocess.run(
    [*command, str(tmp_path / 'images.npy')],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  session = onnx_file.Session(found.path)
  wanted = session(IMAGES).argmax(-1)
  assert done.stdout.split() == [str(label) for label in wanted]


def test_what_runs_in_float_has_exact_sums():
  graph, _ = onnx_file.translated(build('residual', 4), tiny.SHAPE)
  (last,) = (n for n in graph.nodes if n.op == 'Conv' and n.layer == 'conv2')
  for name in last.inputs:
    source = graph.producer(name)
    assert source.op == 'DequantizeLinear'
    assert graph.constants[source.inputs[1]] == 1
  below = graph.only_consumer(last.output)
  assert below.op == 'Mul'
  assert graph.only_consumer(below.output).op == 'Add'


@pytest.mark.parametrize(('levels', 'most'), [(3, 127), (15, 18)])
def test_a_whole_bias_keeps_each_sum_at_its_level(levels, most):
  """Each reachable sum is rounded in both ways, in float64."""
  rng = np.random.default_rng(0)
  channels, step, reach = 40, 0.3, 60
  unit = rng.uniform(0.01, 0.1, channels)
  bias = rng.normal(0, 0.5, channels)
  begins = biases.level_begins(
    bias, unit, np.full(channels, reach), step, 0, levels
  )
  bias_steps = bias / unit
  found = biases.whole_steps(
    bias_steps,
    begins + bias_steps[:, None],
    np.ceil(begins),
    np.full(channels, most),
  )
  finer, wider, whole = found.finer, found.wider, found.whole
  assert found.elsewhere == 0
  assert np.all(whole == np.round(whole))
  totals = np.arange(-reach, reach + 1)
  exact = totals * unit[:, None] + bias[:, None]
  finer_unit = (unit * wider / finer)[:, None]
  moved = finer_unit * (totals * finer[:, None] + whole[:, None])
  wanted, got = (np.clip(np.round(y / step), 0, levels) for y in (exact, moved))
  np.testing.assert_array_equal(got, wanted)


def test_deviations_are_told():
  logits = np.array([[0.0, 1.0], [3.0, 2.0]], np.float32)
  same = verify.compare(logits, logits, np.float32(0.1))
  assert (same.predictions, same.largest, same.beyond_step) == (0, 0.0, 0)
  assert same.fault(strict=True) == ''
  near = verify.compare(logits, logits + 0.11, np.array([0.1, 0.2]))
  assert near.fault() == ''
  assert near.beyond_step == 2
  assert near.step == 0.2
  assert '2 of 2 images have logits' in near.fault(strict=True)
  other = verify.compare(logits, logits[:, ::-1], None)
  assert other.fault() == '2 of 2 predictions differ'
  assert other.steps is None
  far = verify.compare(logits, 2 * logits, np.float32(0.1))
  assert far.fault() == 'logits differ by up to 3, of a range of 3'
  broken = verify.compare(logits, np.full_like(logits, np.nan), None)
  assert broken.fault()
  with pytest.raises(
    ValueError, match=r'of shape \(2, 1\), the model \(2, 2\)'
  ):
    verify.compare(logits, logits[:, :1], None)


def test_deviations_are_of_images_whatever_a_model_gives():
  rng = np.random.default_rng(0)
  maps = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
  found = verify.compare(maps, maps[..., ::-1], None)
  assert (found.images, found.predictions, found.beyond_step) == (2, 2, 2)
  numbers = np.array([1.0, 2.0, 2.001])
  found = verify.compare(numbers, numbers + [0, 2e-3, 0], np.array(1.0))
  assert (found.predictions, found.beyond_step) == (0, 0)


def test_a_call_may_have_any_number_of_images():
  sizes = []

  def call(images):
    sizes.append(len(images))
    return images[:, 0, 0]

  images = np.arange(7.0).reshape(7, 1, 1, 1)
  np.testing.assert_array_equal(verify.run(call, images, None), images[:, 0, 0])
  assert sizes == [1, 6]
  np.testing.assert_array_equal(verify.run(call, images, 3), images[:, 0, 0])
  assert sizes[2:] == [3, 3, 3]


def test_integers_of_the_model_are_those_of_the_file():
  """The bits of a kernel are in the file, not floats of it."""
  model = build('flatten', 2)
  graph, _ = onnx_file.translated(model, tiny.SHAPE, form='integer')
  kernel = np.asarray(model.model.conv.kernel[...])
  (stored,) = (v for k, v in graph.constants.items() if 'conv/kernel' in k)
  assert stored.dtype == np.int8
  np.testing.assert_array_equal(stored, kernel.transpose(3, 2, 0, 1))
  sizes = [v.size for v in graph.constants.values() if v.dtype == np.float32]
  assert max(sizes) <= 10
  assert jax.tree.leaves(graph.dims)  # the shape of each tensor is known
