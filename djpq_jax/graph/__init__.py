"""Finds the MAC layers of a model and the channels that are cut together.

`trace` runs the model on shapes, with the operands of its MAC layers marked,
and follows the identity of every channel through the resulting jaxpr (`labels`,
`layout` and `products` hold the rules). Channels that meet (in an add, a norm's
scale, a kernel) are one class; classes that live in the same places form a
`ChannelGroup`. What the rules do not understand makes a group unprunable, with
the reason in words. `slice_channels` then builds the smaller model.

>>> from flax import nnx
>>> import jax
>>> from djpq_jax import graph
>>> def build():
...   rngs = nnx.Rngs(0)
...   return nnx.Sequential(
...     nnx.Linear(3, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs)
...   )
>>> model = nnx.eval_shape(build)
>>> found = graph.trace(model, jax.ShapeDtypeStruct((1, 3), 'float32'))
>>> for group in found.groups:
...   print(f'{group.name}: {group.reason or "can be pruned"}')
input: is the model's input
layers/0: can be pruned
layers/2: is an output of the model
>>> keep = {'layers/0': [True] * 5 + [False] * 3}
>>> graph.slice_channels(model, found, keep).layers[2].in_features
5
"""

from djpq_jax.graph.marking import abstract
from djpq_jax.graph.marking import split_arrays
from djpq_jax.graph.marking import value_of
from djpq_jax.graph.records import ChannelGraph
from djpq_jax.graph.records import ChannelGroup
from djpq_jax.graph.records import MacLayer
from djpq_jax.graph.records import ParamSlice
from djpq_jax.graph.records import Product
from djpq_jax.graph.surgery import slice_channels
from djpq_jax.graph.tracing import batch_size
from djpq_jax.graph.tracing import failure_of_slices
from djpq_jax.graph.tracing import trace

__all__ = [
  'ChannelGraph',
  'ChannelGroup',
  'MacLayer',
  'ParamSlice',
  'Product',
  'abstract',
  'batch_size',
  'failure_of_slices',
  'slice_channels',
  'split_arrays',
  'trace',
  'value_of',
]
