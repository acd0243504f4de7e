"""What is saved comes back bit for bit; anything else says what is wrong."""

import dataclasses
import enum
import functools
import json
import lzma
import pathlib
import pickle
import shutil
from typing import NamedTuple

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

import djpq_jax
from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import evaluation
from djpq_jax import graph
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import stablehlo
from djpq_jax.checkpoint import index
from djpq_jax.checkpoint import manifest as manifest_lib
from djpq_jax.checkpoint import packing
from djpq_jax.checkpoint import program
from djpq_jax.checkpoint import xz

# They run flax's batch norm.
pytestmark = pytest.mark.standard_promotion

X = jax.ShapeDtypeStruct((2, *tiny.SHAPE), jnp.float32)


class Wider(tiny.Normed):
  """The layers of Normed, with other shapes."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.conv = nnx.Conv(1, 7, (3, 3), use_bias=False, rngs=rngs)
    self.bn = nnx.BatchNorm(7, rngs=rngs)
    self.head = nnx.Linear(4 * 4 * 7, tiny.CLASSES, rngs=rngs)


class MoreClasses(tiny.Normed):
  """Normed with a longer output, which no plan speaks of."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.head = nnx.Linear(4 * 4 * 6, tiny.CLASSES + 2, rngs=rngs)


@functools.cache
def hardened():
  """Integers of 3 and of 12 bits, an input of 5, batch norm and gates."""
  net = tiny.compressed(tiny.Normed)
  plan = tiny.some_plan(net)
  plan.weight_bits['head'] = 12
  plan.act_bits['conv'] = 5
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  return harden.harden(frozen)


def save(folder, model=None, **more):
  model = model or hardened()
  checkpoint.save(
    folder,
    model,
    harden.count(model, X),
    model_spec={'name': 'normed', 'kwargs': {'size': (1, 2)}},
    input_shape=tiny.SHAPE,
    more=more,
  )


def load(folder, kind=tiny.Normed):
  return checkpoint.load(folder, lambda: kind(nnx.Rngs(0)))


@functools.cache
def logits():
  return evaluation.predictions(hardened(), tiny.split(40))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """An artifact to read from."""
  folder = tmp_path_factory.mktemp('saved') / 'artifact'
  save(folder, accuracy=0.5)
  return folder


@pytest.fixture
def artifact(saved, tmp_path):
  """An artifact to break."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'artifact'))


def edit(folder, *, sign=True, **changes):
  path = folder / 'manifest.json'
  manifest = json.loads(path.read_text())
  of_index = {k: v for k, v in changes.items() if k in index.read(folder)}
  if of_index:
    index.write(folder, index.read(folder) | of_index)
  manifest |= {k: v for k, v in changes.items() if k not in of_index}
  if sign:  # as one who means to deceive would
    manifest['sha256'] = manifest_lib.content_hash(manifest, folder)
  path.write_text(json.dumps(manifest))


def refused(folder, message, kind=tiny.Normed):
  """Loading says in one sentence what is wrong."""
  with pytest.raises(checkpoint.ArtifactError, match=message) as info:
    load(folder, kind)
  text = str(info.value)
  assert '\n' not in text
  assert str(folder) in text


def test_facts_may_be_numbers_of_arrays(tmp_path):
  save(tmp_path / 'a', accuracy=np.float32(0.5), per_class=jnp.arange(3))
  manifest = checkpoint.read_manifest(tmp_path / 'a')
  assert (manifest['accuracy'], manifest['per_class']) == (0.5, [0, 1, 2])
  with pytest.raises(ValueError, match='its made_by is nothing that JSON can'):
    save(tmp_path / 'b', made_by=object())
  assert not (tmp_path / 'b').exists()


def test_round_trip_is_exact(saved):
  model = load(saved)
  assert isinstance(model, harden.HardenedModel)
  before = nnx.to_flat_state(nnx.state(hardened()))
  after = dict(nnx.to_flat_state(nnx.state(model)))
  assert len(before) == len(after)
  for path, variable in before:
    assert type(after[path]) is type(variable), path
    assert after[path][...].dtype == variable[...].dtype, path
    np.testing.assert_array_equal(after[path][...], variable[...], str(path))
  split = tiny.split(40)
  np.testing.assert_array_equal(evaluation.predictions(model, split), logits())


def test_counts_of_the_reloaded_model(saved):
  model = load(saved)
  rows = harden.count(model, X)
  assert rows == harden.count(hardened(), X)
  totals = harden.totals(model, rows)
  assert totals == harden.totals(hardened(), rows)
  assert totals == checkpoint.read_manifest(saved)['totals']


def test_manifest_is_readable(saved):
  manifest = checkpoint.read_manifest(saved)
  assert manifest['model'] == {'name': 'normed', 'kwargs': {'size': [1, 2]}}
  assert manifest['input_shape'] == [4, 4, 1]
  assert manifest['accuracy'] == 0.5
  conv, head = manifest['layers']
  assert (conv['name'], conv['kept_out'], conv['out_size']) == ('conv', 3, 6)
  assert (conv['weight_bits'], head['weight_bits']) == (3, 12)
  assert conv['bops'] + head['bops'] == manifest['totals']['bops']
  stored = index.read(saved)
  assert stored['arrays']['model/head/kernel'].startswith('packed int12[')
  (mask,) = bytes.fromhex(stored['plan']['open']['conv'])
  opened = hardened().structure.plan.open['conv']
  assert f'{mask:08b}'[: len(opened)] == ''.join(str(int(o)) for o in opened)
  assert manifest['provenance']['djpq-jax'] == djpq_jax.__version__


def test_size_is_that_of_the_files(saved):
  sizes = [f.stat().st_size for f in saved.rglob('*') if f.is_file()]
  assert checkpoint.size_bytes(saved) == sum(sizes)
  assert max(sizes) < 20_000


@pytest.mark.parametrize('bits', [1, 2, 3, 5, 8])
def test_integers_take_no_more_than_their_bits(bits, tmp_path):
  """Where all levels are equally frequent, which no code can shorten."""

  class Large(tiny.Mlp):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.hidden = nnx.Linear(16, 6000, rngs=rngs)
      self.head = nnx.Linear(6000, tiny.CLASSES, rngs=rngs)

  rule = compress.Rule(pattern='*', weight_bits=(min(bits, 2), 8))
  net = tiny.compressed(Large, [rule])
  plan = compress.Plan(
    open={},
    weight_bits=dict.fromkeys(('hidden', 'head'), bits),
    act_bits=dict.fromkeys(('hidden', 'head'), 8),
  )
  model = harden.harden(compress.freeze(net, plan, tiny.batch(64)['image']))
  top = 2 ** (bits - 1) - 1
  rng = np.random.default_rng(bits)

  def arrays():
    save(tmp_path / 'artifact', model)
    files = (tmp_path / 'artifact' / 'arrays').rglob('*')
    return sum(f.stat().st_size for f in files if f.is_file())

  kernels = [hook.layer.kernel for hook in compress.hooks(model)]
  for kernel in kernels:  # of which next to nothing is left
    kernel.set_value(jnp.ones_like(kernel[...]))
  others = arrays()
  size = 0
  for hook, kernel in zip(compress.hooks(model), kernels):
    integers = rng.integers(-top, top + 1, kernel.shape)
    if hook.operands.weight.odd:
      half = 2 ** (bits - 1)
      integers = 2 * rng.integers(-half, half, kernel.shape) + 1
    kernel.set_value(jnp.asarray(integers, kernel.dtype))
    size += integers.size * bits / 8
  taken = arrays() - others
  assert 0.9 * size < taken < 1.02 * size
  again = load(tmp_path / 'artifact', Large)
  for ours, theirs in zip(compress.hooks(again), compress.hooks(model)):
    np.testing.assert_array_equal(ours.layer.kernel, theirs.layer.kernel)


def test_loading_executes_nothing(saved, monkeypatch):
  def forbidden(*args, **kwargs):
    raise AssertionError('something was unpickled')

  for name in ('load', 'loads', 'Unpickler'):
    monkeypatch.setattr(pickle, name, forbidden)
  load(saved)
  for path in saved.rglob('*'):
    if path.is_file():
      assert path.suffix not in ('.pkl', '.pickle', '.py', '.npy')
      assert not path.read_bytes().startswith((b'\x80\x03', b'\x80\x04'))


def test_saving_again_replaces(tmp_path):
  folder = tmp_path / 'deep' / 'artifact'
  save(folder)
  (folder / 'left.over').write_text('old')
  changed = nnx.clone(hardened())
  kernel = changed.model.conv.kernel
  kernel.set_value(-kernel[...])
  save(folder, changed)
  np.testing.assert_array_equal(
    load(folder).model.conv.kernel[...], kernel[...]
  )
  assert sorted(f.name for f in folder.parent.iterdir()) == ['artifact']
  assert sorted(f.name for f in folder.iterdir()) == [
    'arrays',
    'index.xz',
    'manifest.json',
    'program.xz',
  ]


def test_a_failed_save_leaves_the_older_artifact(artifact, monkeypatch):
  before = (artifact / 'manifest.json').read_bytes()
  with pytest.raises(ValueError):
    save(artifact, accuracy=float('nan'))

  def full(*args, **kwargs):
    raise OSError('no space left')

  monkeypatch.setattr(ocp.StandardCheckpointer, 'save', full)
  with pytest.raises(OSError, match='no space left'):
    save(artifact)
  monkeypatch.undo()
  assert (artifact / 'manifest.json').read_bytes() == before
  load(artifact)
  save(artifact)  # what a failure left behind is no obstacle
  load(artifact)


def test_files_of_others_are_not_deleted(tmp_path):
  (tmp_path / 'src').mkdir()
  (tmp_path / 'src' / 'thesis.py').write_text('a = 1')
  with pytest.raises(ValueError, match='holds files that are no artifact'):
    save(tmp_path)
  file = tmp_path / 'src' / 'thesis.py'
  with pytest.raises(ValueError, match='is a file; save into a folder'):
    save(file)
  assert [*tmp_path.rglob('*')] == [tmp_path / 'src', file]
  assert file.read_text() == 'a = 1'


def test_a_link_to_a_folder_stays_one(artifact, tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(artifact)
  (artifact / 'manifest.json').write_text('damaged')
  save(link)
  assert link.is_symlink()
  load(artifact)


def test_what_is_not_hardened_is_not_saved(artifact):
  net = tiny.compressed(tiny.Normed)
  frozen = compress.freeze(net, tiny.some_plan(net), tiny.batch(64)['image'])
  with pytest.raises(TypeError, match='save takes a hardened model'):
    checkpoint.save(
      artifact,
      frozen,
      [],
      model_spec={'name': 'normed', 'kwargs': {}},
      input_shape=tiny.SHAPE,
    )
  load(artifact)  # the older one is still there


def test_rows_of_another_model_are_not_saved(artifact):
  rows = harden.count(hardened(), X)
  rows[0] = dataclasses.replace(rows[0], weight_bits=32)
  said = f'rows are no count of this model, whose layer {rows[0].name} has'
  with pytest.raises(ValueError, match=said):
    checkpoint.save(
      artifact,
      hardened(),
      rows,
      model_spec={'name': 'normed', 'kwargs': {}},
      input_shape=tiny.SHAPE,
    )
  load(artifact)


def test_a_shape_with_the_batch_is_not_saved(tmp_path):
  with pytest.raises(ValueError, match=r'has the shape .*, without the batch'):
    checkpoint.save(
      tmp_path / 'artifact',
      hardened(),
      harden.count(hardened(), X),
      model_spec={'name': 'normed', 'kwargs': {}},
      input_shape=X.shape,
    )
  assert not (tmp_path / 'artifact').exists()


def test_no_artifact(tmp_path):
  refused(tmp_path / 'nowhere', 'is no artifact: it has no manifest.json')
  (tmp_path / 'file').write_text('x')
  refused(tmp_path / 'file', 'is a file, not the folder of an artifact$')
  refused(tmp_path / 'file' / 'deeper', 'is no artifact: it has no manifest')


@pytest.mark.parametrize('length', [0, 1, 700, -10])
def test_truncated_manifest(artifact, length):
  path = artifact / 'manifest.json'
  path.write_bytes(path.read_bytes()[:length])
  refused(artifact, 'is damaged')


@pytest.mark.parametrize('text', ['[]', '3', '{}', '{"format": "x"}', 'null'])
def test_foreign_json(artifact, text):
  (artifact / 'manifest.json').write_text(text)
  refused(artifact, 'was not written by djpq_jax')


def test_binary_manifest(artifact):
  (artifact / 'manifest.json').write_bytes(b'\x89PNG\xff\xfe')
  refused(artifact, 'is damaged')


def test_an_altered_manifest(artifact):
  edit(artifact, sign=False, accuracy=1.0)
  refused(artifact, 'was altered or is incomplete')
  with pytest.raises(checkpoint.ArtifactError, match='was altered'):
    checkpoint.read_manifest(artifact)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'totals': []}, r'its totals cannot be \[\]'),
    ({'layers': {}}, r'its layers cannot be \{\}'),
    ({'provenance': []}, r'its provenance cannot be \[\]'),
    ({'accuracy': 'x'}, 'its accuracy cannot be "x"'),
    ({'measured_on': 'x'}, 'its measured_on cannot be "x"'),
    ({'measured_on': {'kwargs': 3}}, 'its kwargs cannot be 3'),
    ({'totals': {}}, 'was altered or is incomplete'),
    ({'layers': [1]}, 'was altered or is incomplete'),
  ],
  ids=str,
)
def test_a_manifest_with_a_damaged_part(artifact, changes, message):
  """Whoever reads a manifest learns of it, not `load` alone."""
  edit(artifact, sign=False, **changes)
  with pytest.raises(checkpoint.ArtifactError, match=message) as info:
    checkpoint.read_manifest(artifact)
  assert str(artifact) in str(info.value)
  refused(artifact, message)


def test_facts_that_no_manifest_can_hold(tmp_path):
  with pytest.raises(ValueError, match='its accuracy cannot be "high"'):
    save(tmp_path / 'artifact', accuracy='high')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('version', [1, 3])
def test_older_version(artifact, version):
  edit(artifact, version=version)
  message = f'has format version {version}, which this djpq_jax no longer reads'
  refused(artifact, message)


def test_newer_version(artifact):
  edit(artifact, version=manifest_lib.VERSION + 1)
  refused(artifact, 'has format version 9, .* reads up to 8; update djpq_jax')


def test_levels_below_zero_are_kept(saved):
  acts = {h.path: h.operands.act for h in compress.hooks(load(saved))}
  assert acts['conv'].lowest == -1 - acts['conv'].highest
  assert acts['head'].lowest == 0


class Gelu(tiny.Normed):
  """Inputs of the linear layer are mostly positive."""

  def __call__(self, x):
    x = nnx.gelu(self.bn(self.conv(x)))
    return self.head(x.reshape(x.shape[0], -1))


def test_few_levels_below_zero_are_kept(tmp_path):
  net = tiny.compressed(Gelu)
  # The channels that `some_plan` keeps reach as far on both sides.
  plan = dataclasses.replace(tiny.some_plan(net), open={})
  frozen = compress.freeze(net, plan, tiny.batch(64)['image'])
  model = harden.harden(frozen)
  save(tmp_path / 'artifact', model)
  found = load(tmp_path / 'artifact', Gelu)
  acts = {h.path: h.operands.act for h in compress.hooks(found)}
  lowest, highest = acts['head'].lowest, acts['head'].highest
  assert 0 < -lowest < highest
  assert highest - lowest == 2**4 - 1
  split = tiny.split(40)
  np.testing.assert_array_equal(
    evaluation.predictions(found, split), evaluation.predictions(model, split)
  )


@pytest.fixture
def of_version_6(tmp_path):
  """A file of that version: `Gelu`, with inputs of five and of four bits."""
  file = pathlib.Path(__file__).parent / 'artifact_version_6.zip'
  shutil.unpack_archive(file, tmp_path)
  return tmp_path / 'artifact'


@pytest.mark.parametrize(
  ('version', 'conv', 'head'),
  [
    (6, (-16, 15), (-7, 8)),
    (5, (-16, 15), (-9, 8)),
    (4, (-15, 15), (-8, 8)),
  ],
)
def test_versions_that_told_levels_otherwise(of_version_6, version, conv, head):
  said = index.read(of_version_6)
  for since, name in ((5, 'uneven_inputs'), (6, 'asymmetric_inputs')):
    if version < since:
      del said[name]
  index.write(of_version_6, said)
  edit(of_version_6, version=version)
  found = load(of_version_6, Gelu)
  acts = {h.path: h.operands.act for h in compress.hooks(found)}
  assert (acts['conv'].lowest, acts['conv'].highest) == conv
  assert (acts['head'].lowest, acts['head'].highest) == head


def test_version_6_predicts_what_it_did(of_version_6):
  logits = evaluation.predictions(load(of_version_6, Gelu), tiny.split(40))
  expected = [
    [0.6974531, 0.7706721, 0.285373],
    [0.5899172, 0.6608483, 0.3563009],
  ]
  np.testing.assert_allclose(logits[:2], expected, atol=1e-6)


@pytest.mark.parametrize('below', [10**400, 1e9, -1, 'much'])
def test_version_6_with_levels_that_cannot_be(of_version_6, below):
  edit(of_version_6, asymmetric_inputs={'head': below})
  with pytest.raises(checkpoint.ArtifactError, match='does not fit the model'):
    load(of_version_6, Gelu)


@pytest.mark.parametrize(
  'name', ['signed_inputs', 'uneven_inputs', 'asymmetric_inputs']
)
def test_version_6_says_what_is_below_zero(of_version_6, name):
  said = index.read(of_version_6)
  del said[name]
  index.write(of_version_6, said)
  edit(of_version_6)
  with pytest.raises(checkpoint.ArtifactError, match=name):
    load(of_version_6, Gelu)


@pytest.mark.parametrize(
  'key',
  'model layers totals sha256 program provenance'.split(),
)
def test_manifest_without_a_key(artifact, key):
  path = artifact / 'manifest.json'
  manifest = json.loads(path.read_text())
  del manifest[key]
  path.write_text(json.dumps(manifest))
  refused(artifact, f'is damaged: it lacks .*{key}')


@pytest.mark.parametrize('key', sorted(index.KEYS))
def test_index_without_a_key(artifact, key):
  stored = index.read(artifact)
  del stored[key]
  index.write(artifact, stored)
  edit(artifact)
  refused(artifact, 'index.xz is damaged: it does not hold arrays, plan')


@pytest.mark.parametrize(
  'content', [b'', b'no xz', lzma.compress(b'no JSON'), lzma.compress(b'3')]
)
def test_an_index_that_is_none(artifact, content):
  (artifact / 'index.xz').write_bytes(content)
  edit(artifact)
  refused(artifact, 'index.xz is damaged')


def test_what_would_fill_memory_is_refused(artifact, monkeypatch):
  monkeypatch.setattr(xz, 'LARGEST', 1000)
  content = lzma.compress(b' ' * 2000)
  with pytest.raises(ValueError, match=r'Memory usage limit|too long'):
    xz.decompress(content)


@pytest.mark.parametrize(
  'changes',
  [
    {'version': 'one'},
    {'plan': {}},
    {'plan': None},
    {'arrays': {}},
    {'arrays': {'no/such': 'packed int3[1]'}},
    {'arrays': {'no/such': 'int3'}},
    {'arrays': ['no/such']},
    {'input_shape': [4]},
    {'input_shape': 'wide'},
    {'inputs': {}},
    {'inputs': 3},
    {'inputs': {'conv': [0], 'head': [0, 1]}},
    {'inputs': {'conv': ['0', '1'], 'head': [0, 1]}},
    {'inputs': {'conv': [0, 10**400], 'head': [0, 1]}},
    {'inputs': {'conv': [0, 2**24], 'head': [0, 1]}},
    {'inputs': {'conv': [3, -3], 'head': [0, 1]}},
    {'inputs': {'conv': [False, True], 'head': [0, 1]}},
    {'inputs': {'conv': [-1, 0.5], 'head': [0, 1]}},
    {'inputs': {'conv': [-1, 1], 'head': [0, 1], 'else': [0, 1]}},
    {'reasons': {}},
  ],
  ids=lambda changes: '-'.join(f'{k}={v}' for k, v in changes.items())[:30],
)
def test_manifest_that_makes_no_sense(artifact, changes):
  edit(artifact, **changes)
  refused(artifact, 'does not fit the model|version|input_shape cannot be')


def test_no_arrays(artifact):
  shutil.rmtree(artifact / 'arrays')
  refused(artifact, 'is incomplete: it has no arrays')


def test_any_missing_file_is_noticed(artifact):
  files = [f for f in artifact.rglob('*') if f.is_file()]
  files.remove(artifact / 'manifest.json')
  assert len(files) > 4
  for file in files:
    content = file.read_bytes()
    file.unlink()
    refused(artifact, 'was altered or is incomplete')
    file.write_bytes(content)
  load(artifact)


def test_a_manifest_is_read_without_decoding_arrays(saved, monkeypatch):
  monkeypatch.setattr(ocp, 'StandardCheckpointer', None)
  monkeypatch.setattr(xz, 'decompress', None)
  assert checkpoint.read_manifest(saved)['accuracy'] == 0.5


def test_any_altered_byte_is_noticed(artifact):
  for file in artifact.rglob('*'):
    if not file.is_file() or file.name == 'manifest.json':
      continue
    good = file.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 5)):
      bad = bytearray(good)
      bad[position] ^= 4
      file.write_bytes(bad)
      refused(artifact, 'was altered or is incomplete')
      with pytest.raises(checkpoint.ArtifactError, match='was altered'):
        checkpoint.read_manifest(artifact)
    file.write_bytes(good[:-1])
    refused(artifact, 'was altered or is incomplete')
    file.write_bytes(good)
  load(artifact)


def test_what_a_file_manager_leaves_behind_does_no_harm(artifact):
  (artifact / 'arrays' / '.DS_Store').write_bytes(b'icons')
  load(artifact)


def test_arrays_that_are_no_checkpoint(artifact):
  """As if the hash were right: what orbax says comes as one sentence."""
  shutil.rmtree(artifact / 'arrays')
  (artifact / 'arrays').mkdir()
  edit(artifact)
  refused(artifact, 'is damaged')


def test_arrays_of_another_artifact(artifact, tmp_path):
  changed = nnx.clone(hardened())
  kernel = changed.model.conv.kernel
  kernel.set_value(jnp.zeros_like(kernel[...]))
  save(tmp_path / 'other', changed)
  shutil.rmtree(artifact / 'arrays')
  shutil.copytree(tmp_path / 'other' / 'arrays', artifact / 'arrays')
  refused(artifact, 'was altered or is incomplete')


@pytest.mark.parametrize('kind', [tiny.Mlp, tiny.Depthwise, Wider, MoreClasses])
def test_artifact_of_another_model(saved, kind):
  refused(saved, 'does not fit the model', kind)


def test_the_program_needs_no_class(saved):
  images = tiny.split(40).images
  exact = integer.lower(hardened(), 'simulated')
  wanted = evaluation.predict(exact, [images])
  run = checkpoint.load_program(saved)
  np.testing.assert_array_equal(run(images), wanted)
  assert run(images[:3]).shape == (3, tiny.CLASSES)


def hardened_of(kind, sample):
  """A hardened model of another class."""
  net = compress.compress(kind(nnx.Rngs(0)), (), sample)
  return harden.harden(compress.freeze(net, tiny.some_plan(net), sample))


class WithState(tiny.Normed):
  """Normed with dropout, and with whole numbers of its own."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.table = nnx.Variable(jnp.array([70000, -5], jnp.int32))
    self.flags = nnx.Variable(jnp.array([True, False]))

  def __call__(self, x):
    y = self.drop(super().__call__(x))
    return y + self.table[0].astype(jnp.float32) * self.flags[0]


def test_states_that_are_no_parameters(tmp_path):
  sample = tiny.batch(64)['image']
  model = hardened_of(WithState, sample)
  save(tmp_path / 'artifact', model)
  images = tiny.split(40).images
  exact = integer.lower(model, 'simulated')
  wanted = evaluation.predict(exact, [images])
  again = load(tmp_path / 'artifact', WithState)
  assert again.model.table[...].tolist() == [70000, -5]
  assert again.model.flags[...].tolist() == [True, False]
  found = evaluation.predict(integer.lower(again, 'simulated'), [images])
  np.testing.assert_array_equal(found, wanted)
  run = checkpoint.load_program(tmp_path / 'artifact')
  np.testing.assert_array_equal(run(images), wanted)


class Positions(tiny.Normed):
  """Normed with a table that is no Variable, and two outputs."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.shift = jnp.arange(float(tiny.CLASSES))

  def __call__(self, x):
    y = super().__call__(x)
    return {'logits': y + self.shift[None], 'best': y.argmax(-1), 'one': 1.0}


def test_a_table_and_several_outputs(tmp_path):
  sample = tiny.batch(64)['image']
  model = hardened_of(Positions, sample)
  save(tmp_path / 'artifact', model)
  wanted = integer.lower(model, 'simulated')(sample)
  again = load(tmp_path / 'artifact', Positions)
  run = checkpoint.load_program(tmp_path / 'artifact')
  for found in (integer.lower(again, 'simulated')(sample), run(sample)):
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(found['best'], wanted['best'])
    np.testing.assert_allclose(found['logits'], wanted['logits'], rtol=1e-5)
  with pytest.raises(ValueError, match='gives dict, where one array of logits'):
    evaluation.predict(model, [sample])


class Pair(NamedTuple):
  """A class of outputs that no file can hold."""

  logits: jax.Array
  best: jax.Array


class Pairs(tiny.Normed):
  """Normed with outputs of a class of its own."""

  def __call__(self, x):
    y = super().__call__(x)
    return Pair(y, y.argmax(-1))


def test_outputs_of_a_class_have_no_program(tmp_path):
  sample = tiny.batch(64)['image']
  model = hardened_of(Pairs, sample)
  save(tmp_path / 'artifact', model)
  wanted = integer.lower(model, 'simulated')(sample)
  again = load(tmp_path / 'artifact', Pairs)
  found = integer.lower(again, 'simulated')(sample)
  np.testing.assert_array_equal(found.best, wanted.best)
  with pytest.raises(checkpoint.ArtifactError, match='it cannot be stored: '):
    checkpoint.load_program(tmp_path / 'artifact')


class Tokens(nnx.Module):
  """Takes whole numbers."""

  def __init__(self, rngs):
    self.table = nnx.Embed(20, 6, rngs=rngs)
    self.hidden = nnx.Linear(6, 12, rngs=rngs)
    self.head = nnx.Linear(12, tiny.CLASSES, rngs=rngs)

  def __call__(self, ids):
    return self.head(nnx.relu(self.hidden(self.table(ids))).mean(1))


class Two(nnx.Module):
  """Takes two arrays."""

  def __init__(self, rngs):
    self.one = nnx.Linear(5, 12, rngs=rngs)
    self.two = nnx.Linear(3, 8, rngs=rngs)
    self.head = nnx.Linear(20, tiny.CLASSES, rngs=rngs)

  def __call__(self, x, y):
    x, y = nnx.relu(self.one(x)), nnx.relu(self.two(y))
    return self.head(jnp.concatenate([x, y], -1))


class Batch(Tokens):
  """Takes a dict, and what is no array."""

  def __call__(self, batch, train, pool):
    assert not train
    assert pool == ('mean', 1)
    x = nnx.relu(self.hidden(self.table(batch['ids'])))
    return self.head((x * batch['mask'][..., None]).mean(1))


RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 20, (8, 7)).astype(np.int32)
MASK = RNG.random((8, 7)).astype(np.float32)
ONE = RNG.normal(size=(8, 5)).astype(np.float32)
OTHER = RNG.normal(size=(8, 3)).astype(np.float32)


def hardened_with(model, args, kwargs=None):
  """A hardened model that was traced with such arguments."""
  traced = graph.trace(model, *args, **(kwargs or {}))
  net = compress.assemble(model, compress.resolve(traced, ()))
  args = (*args, *(kwargs or {}).values())
  compress.calibrate(net, *args)
  return harden.harden(compress.freeze(net, tiny.some_plan(net), *args))


@pytest.mark.parametrize(
  ('kind', 'args', 'kwargs', 'shape'),
  [
    (Tokens, (IDS,), {}, (7,)),
    (Two, (ONE, OTHER), {}, (5,)),
    (Two, (), {'x': ONE, 'y': OTHER}, (5,)),
    (Two, (ONE,), {'y': OTHER}, (5,)),
    (Batch, ({'ids': IDS, 'mask': MASK}, False, ('mean', 1)), {}, (7,)),
  ],
)
def test_a_model_of_other_arguments_comes_back(
  kind, args, kwargs, shape, tmp_path
):
  folder = tmp_path / 'artifact'
  model = hardened_with(kind(nnx.Rngs(0)), args, kwargs)
  rows = harden.count(model, *args, *kwargs.values())
  for saved in (model, None):  # and what was read is written again
    checkpoint.save(
      folder,
      saved or load(folder, kind),
      rows,
      model_spec={'name': 'other', 'kwargs': {}},
      input_shape=shape,
    )
  again = load(folder, kind)
  want = model(*args, **kwargs)
  np.testing.assert_array_equal(again(*args, **kwargs), want)
  assert harden.count(again, *args, *kwargs.values()) == rows
  arrays, _ = graph.split_arrays((args, kwargs))
  run = checkpoint.load_program(folder)
  np.testing.assert_allclose(run(*arrays), want, atol=1e-6)
  assert run(*[a[:3] for a in arrays]).shape == (3, tiny.CLASSES)
  with pytest.raises(TypeError, match=f'takes {len(arrays)} arrays, not 0'):
    run()


def test_arguments_are_stated_where_they_are_no_images(saved):
  assert 'arguments' not in index.read(saved)


def test_a_fact_of_that_name_is_no_argument(tmp_path):
  save(tmp_path / 'artifact', arguments={'args': []})
  load(tmp_path / 'artifact')


class Mode(enum.Enum):
  MEAN = 1


class Moded(Tokens):
  def __call__(self, ids, mode):
    return super().__call__(ids)


@pytest.mark.parametrize(
  ('kind', 'args', 'shape', 'message'),
  [
    (Moded, (IDS, Mode.MEAN), (7,), 'an argument of type Mode, of which'),
    (Moded, (IDS, float('nan')), (7,), 'an argument of type float, of which'),
    (Moded, (IDS, jax.random.key(0)), (7,), 'an argument of dtype key<'),
    (Tokens, (IDS,), (8, 7), r'input_shape is \(8, 7\), but .* shape \(7,\)'),
    (Two, (ONE, OTHER), (3,), r'input_shape is \(3,\), but .* shape \(5,\)'),
    (tiny.Mlp, (tiny.batch(8)['image'],), (4, 3, 1), 'cannot be called with f'),
  ],
)
def test_what_could_not_be_read_again_is_not_written(
  kind, args, shape, message, tmp_path
):
  model = hardened_with(kind(nnx.Rngs(0)), args)
  with pytest.raises(
    ValueError, match=f'cannot be written: .*{message}'
  ) as info:
    checkpoint.save(
      tmp_path / 'artifact',
      model,
      harden.count(model, *args),
      model_spec={'name': 'other', 'kwargs': {}},
      input_shape=shape,
    )
  assert '\n' not in str(info.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'arguments',
  [
    3,
    [],
    {'args': []},
    {'args': [], 'kwargs': {}},
    {'args': [{}], 'kwargs': {}},
    {'args': [{'value': 3}], 'kwargs': {}},
    {'args': [{'model': 3}], 'kwargs': {}},
    {'args': [{'array': {'shape': [2]}}], 'kwargs': {}},
    {'args': [{'array': {'dtype': 'no', 'shape': [2, 3]}}], 'kwargs': {}},
    {'args': [{'array': {'dtype': 'int32', 'shape': [-2]}}], 'kwargs': {}},
    {'args': [{'array': {'dtype': 'int32', 'shape': 'ab'}}], 'kwargs': {}},
    {'args': [{'array': {'dtype': 'int32', 'shape': [2, 3]}}], 'kwargs': {}},
  ],
  ids=str,
)
def test_arguments_that_make_no_sense(artifact, arguments):
  index.write(artifact, index.read(artifact) | {'arguments': arguments})
  edit(artifact)
  refused(artifact, 'does not fit the model')


def test_an_artifact_does_not_say_where_it_was_made(saved):
  content = lzma.decompress((saved / 'program.xz').read_bytes())
  assert b'.py' not in content
  content += lzma.decompress((saved / 'index.xz').read_bytes())
  for file in filter(pathlib.Path.is_file, saved.rglob('*')):
    content += file.read_bytes()
  assert b'arrays' in content
  assert str(saved.parent).encode() not in content


def test_a_program_that_calls_what_it_should_not():
  def calls_lapack(arrays, images):
    return jnp.linalg.cholesky(images)

  shape = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  with pytest.raises(stablehlo.NotExportable, match='lapack_spotrf'):
    stablehlo.export(calls_lapack, {}, shape)
  exported = jax.export.export(jax.jit(calls_lapack))({}, shape)
  content = lzma.compress(bytes(exported.serialize()))
  with pytest.raises(ValueError, match='it calls lapack_spotrf_ffi'):
    program.Program(content, {})


@pytest.mark.parametrize('content', [b'', b'no program', lzma.compress(b'no')])
def test_a_program_that_is_none(artifact, content):
  (artifact / 'program.xz').write_bytes(content)
  edit(artifact)
  with pytest.raises(checkpoint.ArtifactError, match='cannot be read'):
    checkpoint.load_program(artifact)
  load(artifact)  # which does not need it


def test_a_model_without_a_program(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise ValueError('only whole numbers\nhere')

  monkeypatch.setattr(jax.export, 'export', fail)
  save(tmp_path / 'artifact')
  load(tmp_path / 'artifact')
  message = 'has no program: it cannot be traced: .*: only whole numbers$'
  with pytest.raises(checkpoint.ArtifactError, match=message):
    checkpoint.load_program(tmp_path / 'artifact')


@pytest.mark.parametrize('bits', range(2, 17))
def test_pack_round_trip(bits):
  rng = np.random.default_rng(bits)
  low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  dtype = np.int8 if bits <= 8 else np.int16
  values = rng.integers(low, high, (3, 5, 7), endpoint=True).astype(dtype)
  values[0, 0, :2] = low, high
  packed = packing.pack(values, bits)
  assert packed.dtype == np.uint8
  # Of 105; up to 8 bits no integer crosses the border of a byte.
  wanted = {2: 27, 3: 53, 4: 53}.get(bits, 105 if bits <= 8 else None)
  wanted = wanted or -(-values.size * bits // 8)
  assert packed.shape == (wanted,) == (packing.packed_bytes(105, bits),)
  back = packing.unpack(packed, bits, values.shape)
  assert back.dtype == dtype
  np.testing.assert_array_equal(back, values)


def test_pack_of_nothing():
  packed = packing.pack(np.zeros((0, 3), np.int8), 5)
  assert packed.shape == (0,)
  assert packing.unpack(packed, 5, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
  ('value', 'bits'), [(2, 2), (-3, 2), (128, 8), (-129, 8), (32768, 16)]
)
def test_pack_refuses_what_does_not_fit(value, bits):
  with pytest.raises(ValueError, match=f'values do not fit {bits} signed bits'):
    packing.pack(np.array([0, value]), bits)
