"""Replacement layers by role; they know slots and facts, and no architecture."""

from dsi.containers.base import Container
from dsi.containers.linear import FusedLinear
from dsi.containers.map_base import MapContainer
from dsi.containers.resnet import Downsample, MapConv, MapNorm, ResnetBlock, Upsample
from dsi.containers.spatial_transformer import CrossTransformerBlock, ImageAttention, SpatialTransformer
from dsi.containers.stand_in import StandIn
from dsi.containers.transformer import DecoderLayer, EncoderLayer, TransformerLayer

__all__ = [
    "Container",
    "CrossTransformerBlock",
    "DecoderLayer",
    "Downsample",
    "EncoderLayer",
    "FusedLinear",
    "ImageAttention",
    "MapContainer",
    "MapConv",
    "MapNorm",
    "ResnetBlock",
    "SpatialTransformer",
    "StandIn",
    "TransformerLayer",
    "Upsample",
]
