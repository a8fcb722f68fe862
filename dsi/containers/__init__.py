"""Replacement layers by role; they know slots and facts, and no architecture."""

from dsi.containers.base import Container
from dsi.containers.linear import FusedLinear
from dsi.containers.transformer import DecoderLayer, EncoderLayer, TransformerLayer

__all__ = ["Container", "DecoderLayer", "EncoderLayer", "FusedLinear", "TransformerLayer"]
