"""Causal attention inside each segment of a packed row of tokens, for CPUs."""

from __future__ import annotations

from luthier.kernels.reference import segment_attention

__all__ = ["segment_attention"]
