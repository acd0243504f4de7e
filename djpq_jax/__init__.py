"""Joint structured pruning and mixed-precision quantization of Flax models."""

__version__ = '0.1.0'
