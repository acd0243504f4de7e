"""An artifact and the images that it is measured on."""

from djpq_jax import data
from djpq_jax import experiment
from djpq_jax import models


def add_options(command) -> None:
  """Adds what names an artifact and its data."""
  command.add_argument('--artifact', required=True, help='its folder')
  command.add_argument(
    '--data', help='data set; by default the one it was measured on'
  )
  command.add_argument('--data-dir', help='where the data set was prepared')


def load_model(folder, manifest):
  """The hardened model of an artifact, if it is one of this package."""
  spec = manifest['model']
  if not has_class(spec):
    raise ValueError(
      f'the class of {folder} ({spec["name"]}) is not one of this package; '
      'what needs none is djpq evaluate --execution program'
    )
  return experiment.load_artifact(folder, spec)


def has_class(spec) -> bool:
  """Whether a model is one of this package."""
  return spec['name'] in models.MODELS


def images(args, manifest):
  """The test images of an artifact, and the name of their set."""
  measured_on = manifest.get('measured_on', {})
  name = args.data or measured_on.get('data')
  if not name:
    raise ValueError(
      f'{args.artifact} does not say what it was measured on; give --data'
    )
  kwargs = measured_on.get('kwargs', {})
  if name != measured_on.get('data'):
    kwargs = _as_large(name, kwargs, manifest['input_shape'])
  _, split = data.load(name, data_dir=args.data_dir, **kwargs)
  shape = split.images.shape[1:]
  if list(shape) != manifest['input_shape']:
    raise ValueError(
      f'the artifact takes images of shape {tuple(manifest["input_shape"])}, '
      f'but {name} has {shape}'
    )
  return split, name


def _as_large(name, kwargs, shape):
  """What another set is told, so that its images are those of an artifact.

  Args:
    name: of the set.
    kwargs: what the set was told that the artifact was measured on.
    shape: of the artifact's images.
  """
  told = {key: kwargs[key] for key in ('size', 'resize') if key in kwargs}
  if len(shape) == 3 and shape[0] == shape[1]:
    told.setdefault('size', shape[0])
  known = data.arguments(name)
  return {key: value for key, value in told.items() if key in known}
