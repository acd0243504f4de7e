"""Pure operations on arrays: the quantizer and the gate.  They import jax only.

The names live in their modules, `ops.quantize.quantize` and
`ops.gate.sample_gate`, so that a reader sees where each comes from.
"""
