"""A decoding step of few rows in about seven launches a layer: `ops.decode_product`, `ops.attention_step` and
`ops.recurrence_step` over an engine's states, with the weights of the network."""

from trihybrid.infer.kernels.refuse import refusal
from trihybrid.infer.kernels.step import KernelStep

__all__ = ["KernelStep", "refusal"]
