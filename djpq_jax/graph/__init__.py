"""Finds the MAC layers of a model and the channels that are cut together."""

from djpq_jax.graph.records import ChannelGraph
from djpq_jax.graph.records import ChannelGroup
from djpq_jax.graph.records import MacLayer
from djpq_jax.graph.records import ParamSlice
from djpq_jax.graph.surgery import slice_channels
from djpq_jax.graph.tracing import trace

__all__ = [
  'ChannelGraph',
  'ChannelGroup',
  'MacLayer',
  'ParamSlice',
  'slice_channels',
  'trace',
]
