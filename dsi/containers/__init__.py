"""Replacement layers by role; they know slots and facts, and no architecture."""

from dsi.containers.base import Container, LayerCall
from dsi.containers.linear import FusedLinear
from dsi.containers.map_base import MapCall, MapContainer
from dsi.containers.pair_base import PairContainer
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
    "LayerCall",
    "MapCall",
    "MapContainer",
    "MapConv",
    "MapNorm",
    "PairContainer",
    "ResnetBlock",
    "SpatialTransformer",
    "StandIn",
    "TransformerLayer",
    "Upsample",
]
