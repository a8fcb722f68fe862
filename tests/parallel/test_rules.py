"""Which part of each parameter a rank holds, and that the parts make the whole."""

from __future__ import annotations

import copy
import pickle

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi.containers import Container, DecoderLayer
from dsi.errors import PolicyError, SplitError
from dsi.parallel import assemble, piece_shape, same_bits, shard_layer, split
from dsi.policy import Block, Concat, Keep, Linear, Norm, Packed

FACTS = {"heads": 4, "kv_heads": 2, "head_dim": 3, "parallel": False}
QKV = Concat("q", "k", "v", split="column")
OUT, UP, DOWN = Linear("o", split="row"), Linear("up", split="column"), Linear("down", split="row")
REST = {"out": OUT, "up": UP, "down": DOWN}


def block(**slots):
    return Block(layer="a:B", container="dsi.containers:DecoderLayer", slots=slots)


def shapes_of(slots, *, heads, kv_heads, head_dim, units=8, hidden=5, bias=True):
    """Of a layer whose slots they are."""
    rows = {"q": heads, "k": kv_heads, "v": kv_heads, "qkv": heads + 2 * kv_heads}
    sizes = {name: (count * head_dim, hidden) for name, count in rows.items()}
    sizes |= {"o": (hidden, heads * head_dim), "down": (hidden, units), "gate_up": (2 * units, hidden)}
    sizes |= dict.fromkeys(("up", "gate"), (units, hidden))
    shapes = {}
    for slot in slots.values():
        for path in slot.sources():
            if isinstance(slot, Norm | Keep):
                shapes[f"{path}.weight"] = (hidden,)
                continue
            size = sizes[path]
            shapes[f"{path}.weight"] = size[::-1] if slot.transposed else size
            if bias:
                shapes[f"{path}.bias"] = size[:1]
    return shapes


def shards_of(size=2, facts=FACTS, *, bias=True, units=8, **slots):
    described = {**REST, "qkv": QKV, **slots}
    described = {place: slot for place, slot in described.items() if slot is not None}
    numbers = {name: facts[name] for name in ("heads", "kv_heads", "head_dim")}
    shapes = shapes_of(described, **numbers, units=units, bias=bias)
    return shard_layer(block(**described), DecoderLayer, facts, shapes, size, "layers.0")


def runs(shards, name):
    return [shard.pieces[name].runs for shard in shards]


# --- cuts -------------------------------------------------------------------------------------------------------------


def test_stacked_projections_are_cut_one_by_one():
    shards = shards_of()
    assert runs(shards, "q.weight") == [((0, 6),), ((6, 12),)]
    assert runs(shards, "k.weight") == runs(shards, "v.weight") == [((0, 3),), ((3, 6),)]
    assert runs(shards, "k.bias") == [((0, 3),), ((3, 6),)]
    assert [shard.facts for shard in shards] == [{"heads": 2, "kv_heads": 1}] * 2


def test_thirds_are_cut_in_each_third():
    shards = shards_of(qkv=Packed("qkv", layout="thirds", split="column"))
    # 12 rows of queries, 6 of keys, 6 of values
    assert runs(shards, "qkv.weight") == [((0, 6), (12, 15), (18, 21)), ((6, 12), (15, 18), (21, 24))]
    assert runs(shards, "qkv.bias") == runs(shards, "qkv.weight")


def test_interleaved_heads_stay_together():
    facts = {**FACTS, "kv_heads": 4}
    shards = shards_of(4, facts, qkv=Packed("qkv", layout="head_interleaved", split="column"))
    assert runs(shards, "qkv.weight") == [((0, 9),), ((9, 18),), ((18, 27),), ((27, 36),)]


def test_groups_of_a_kv_head_stay_together():
    shards = shards_of(qkv=Packed("qkv", layout="kv_grouped", split="column"))
    # two query heads, a key head and a value head of three rows each
    assert runs(shards, "qkv.weight") == [((0, 12),), ((12, 24),)]


def test_halves_are_cut_in_each_half():
    shards = shards_of(up=None, gate_up=Packed("gate_up", layout="halves", split="column"))
    assert runs(shards, "gate_up.weight") == [((0, 4), (8, 12)), ((4, 8), (12, 16))]
    assert runs(shards, "down.weight") == [((0, 4),), ((4, 8),)]


def test_stacked_gate_and_up_are_cut_one_by_one():
    shards = shards_of(up=None, gate_up=Concat("gate", "up", split="column"))
    assert runs(shards, "gate.weight") == runs(shards, "up.weight") == [((0, 4),), ((4, 8),)]


def test_what_is_split_by_rows_is_cut_in_its_columns_and_has_its_bias_once():
    shards = shards_of()
    assert {shard.pieces["o.weight"].dim for shard in shards} == {1}
    assert runs(shards, "o.weight") == [((0, 6),), ((6, 12),)]
    assert ["o.bias" in shard.pieces for shard in shards] == [True, False]
    assert shards[0].pieces["o.bias"].dim is None
    assert [shard.sums for shard in shards] == [{"out", "down"}] * 2


def test_transposed_weights_are_cut_in_the_other_dimension():
    turned = {"split": "column", "transposed": True}
    shards = shards_of(
        qkv=Packed("qkv", layout="thirds", **turned),
        out=Linear("o", split="row", transposed=True),
        up=Linear("up", **turned),
        down=Linear("down", split="row", transposed=True),
    )
    dims = {name: piece.dim for name, piece in shards[0].pieces.items()}
    assert dims == {
        **{"qkv.weight": 1, "qkv.bias": 0, "o.weight": 0, "o.bias": None},
        **{"up.weight": 1, "up.bias": 0, "down.weight": 0, "down.bias": None},
    }
    assert piece_shape(shards[0].pieces["o.weight"]) == (6, 5)


def test_what_is_not_split_is_whole_everywhere():
    norms = {"norm_attn": Norm("norm"), "q_norm": Norm("q_norm"), "k_norm": Norm("k_norm")}
    shards = shards_of(up=None, down=None, mlp=Keep("mlp"), **norms)
    for shard in shards:
        assert all(shard.pieces[f"{name}.weight"].dim is None for name in ("norm", "q_norm", "k_norm", "mlp"))
        assert shard.sums == {"out"}
    whole = shards_of(qkv=Concat("q", "k", "v"), out=Linear("o"))
    for shard in whole:
        assert shard.pieces["q.weight"].dim is None
        assert "o.bias" in shard.pieces
        assert shard.facts == {}
        assert shard.sums == {"down"}


def test_one_rank_holds_everything():
    (shard,) = shards_of(1)
    assert all(piece_shape(piece) == piece.shape for piece in shard.pieces.values())


def test_a_shard_is_data():
    shard = shards_of(qkv=Packed("qkv", layout="thirds", split="column"))[1]
    # our own bytes
    assert pickle.loads(pickle.dumps(shard)) == copy.deepcopy(shard) == shard  # noqa: S301
    with pytest.raises(TypeError):
        shard.pieces["o.bias"] = None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "units", "size", "words"),
    [
        ({"heads": 6, "kv_heads": 6}, 12, 4, "6 heads do not split over tp_size=4; use 1, 2, 3 or 6"),
        ({"heads": 6, "kv_heads": 6}, 8, 4, "6 heads do not split over tp_size=4; use 1 or 2"),
        ({"heads": 8, "kv_heads": 2}, 8, 4, "8 heads over 2 kv heads do not split over tp_size=4; use 1 or 2"),
        ({"heads": 4, "kv_heads": 4}, 6, 4, "6 hidden units of 'down' do not split over tp_size=4; use 1 or 2"),
        ({"heads": 7, "kv_heads": 7}, 9, 2, "7 heads and 9 hidden units of 'down' do not split over tp_size=2; use 1"),
    ],
)
def test_sizes_that_do_not_divide(facts, units, size, words):
    with pytest.raises(SplitError) as caught:
        shards_of(size, {**FACTS, **facts}, units=units)
    assert str(caught.value) == f"layers.0: {words}"


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 16), st.integers(1, 12))
def test_the_sizes_that_it_names_are_those_that_do(kv_heads, group, units, size):
    facts = {**FACTS, "heads": kv_heads * group, "kv_heads": kv_heads}
    fits = [n for n in range(1, 13) if kv_heads % n == 0 and units % n == 0]
    if size in fits:
        assert len(shards_of(size, facts, units=units)) == size
        return
    with pytest.raises(SplitError) as caught:
        shards_of(size, facts, units=units)
    named = str(caught.value).partition("; use ")[2].replace(" or ", ", ").split(", ")
    assert [int(name) for name in named] == fits


def test_no_ranks():
    with pytest.raises(SplitError, match=r"layers.0: tp_size=0; one rank is the least"):
        shards_of(0)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"qkv": Concat("q", "k", "v", split="row")}, "slot 'qkv' says split='row'; DecoderLayer splits it by column"),
        ({"out": Linear("o", split="column")}, "slot 'out' says split='column'; DecoderLayer splits it by row"),
        ({"up": Linear("up", split="row")}, "slot 'up' says split='row'"),
        ({"out": Linear("o")}, "qkv is split and out is not; they are the ends of one cut"),
        ({"qkv": Concat("q", "k", "v")}, "out is split and qkv is not"),
        ({"down": Linear("down")}, "up is split and down is not"),
        ({"down": Packed("gate_up", layout="halves", split="row")}, "'down' is split by rows, which only a Linear"),
        (
            {"up": None, "gate_up": Packed("gate_up", layout="thirds", split="column")},
            "'thirds' is none of gate and up",
        ),
        ({"qkv": Packed("qkv", layout="halves", split="column")}, "'halves' is none of queries, keys and values"),
        (
            {"qkv": Packed("qkv", layout="head_interleaved", split="column")},
            "has 24 indices to split, and its parts are",
        ),
        ({"qkv": Concat("q", "k", split="column")}, "has 18 indices to split, and its parts are 24"),
    ],
)
def test_policies_that_split_wrong(slots, words):
    with pytest.raises(PolicyError, match=words):
        shards_of(**slots)


def test_a_container_that_says_nothing_splits_nothing():
    described = block(qkv=QKV)
    with pytest.raises(PolicyError, match="Container does not say how slot 'qkv' splits; write split='none'"):
        shard_layer(described, Container, FACTS, {"q.weight": (4, 4)}, 2, "layers.0")


# --- there and back ---------------------------------------------------------------------------------------------------

_TURNED = st.booleans()


@st.composite
def layers(draw):
    """(slots, facts, units, size) of any layer that splits."""
    size, head_dim = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    kv_heads, group = size * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    layout = draw(st.sampled_from(["concat", "thirds", "kv_grouped", "head_interleaved"]))
    group = 1 if layout == "head_interleaved" else group
    turned = [draw(_TURNED) for _ in range(4)]
    column = [{"split": "column", "transposed": one} for one in turned[:2]]
    qkv = Concat("q", "k", "v", **column[0]) if layout == "concat" else Packed("qkv", layout=layout, **column[0])
    slots = {"qkv": qkv, "out": Linear("o", split="row", transposed=turned[2]), "norm_attn": Norm("norm")}
    match draw(st.sampled_from(["up", "concat", "halves", "keep", "whole"])):
        case "up":
            slots["up"] = Linear("up", **column[1])
        case "concat":
            slots["gate_up"] = Concat("gate", "up", **column[1])
        case "halves":
            slots["gate_up"] = Packed("gate_up", layout="halves", **column[1])
        case "keep":
            slots["mlp"] = Keep("mlp")
        case "whole":
            slots |= {"up": Linear("up"), "down": Linear("down")}
    if "mlp" not in slots and "down" not in slots:
        slots["down"] = Linear("down", split="row", transposed=turned[3])
    facts = {**FACTS, "heads": kv_heads * group, "kv_heads": kv_heads, "head_dim": head_dim}
    return slots, facts, size * draw(st.integers(1, 3)), size


@given(layers(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_parts_make_the_whole_bit_for_bit(layer, bias, seed):
    slots, facts, units, size = layer
    numbers = {name: facts[name] for name in ("heads", "kv_heads", "head_dim")}
    shapes = shapes_of(slots, **numbers, units=units, bias=bias)
    shards = shard_layer(block(**slots), DecoderLayer, facts, shapes, size, "layers.0")
    generator = torch.Generator().manual_seed(seed)
    # any bits at all: NaNs with their payloads, infinities, zeros of both signs
    whole = {
        name: torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
        for name, shape in shapes.items()
    }
    parts = [split(whole, shard) for shard in shards]
    back = assemble(parts, shards)
    assert back.keys() == whole.keys()
    assert all(same_bits(back[name], whole[name]) for name in whole)
    for part, shard in zip(parts, shards, strict=True):
        assert all(tuple(tensor.shape) == piece_shape(shard.pieces[name]) for name, tensor in part.items())
        cut = [name for name in part if shard.pieces[name].dim is not None]
        assert all(part[name].numel() * size == whole[name].numel() for name in cut)


def parts_and_shards():
    shards = shards_of()
    shapes = {name: piece.shape for name, piece in shards[0].pieces.items()}
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    return [split(whole, shard) for shard in shards], list(shards)


def test_a_part_is_memory_of_its_own():
    (shard,) = shards_of(1)
    whole = {name: torch.zeros(piece.shape) for name, piece in shard.pieces.items()}
    for tensor in split(whole, shard).values():
        tensor.fill_(1.0)
    assert all(not tensor.any() for tensor in whole.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_that_are_missing_or_too_many(rank):
    parts, shards = parts_and_shards()
    del parts[rank]["q.weight"]
    with pytest.raises(SplitError, match=rf"q.weight: rank {rank} lacks it, and by the rules it holds some"):
        assemble(parts, shards)
    parts, shards = parts_and_shards()
    parts[1]["o.bias"] = parts[0]["o.bias"]
    with pytest.raises(SplitError, match=r"o.bias: rank 1 holds it, and by the rules it holds none"):
        assemble(parts, shards)
    with pytest.raises(SplitError, match="1 parts are given, and the layer is split over 2 ranks"):
        assemble(parts[:1], shards)


def test_parts_of_another_shape():
    parts, shards = parts_and_shards()
    parts[1]["q.weight"] = parts[1]["q.weight"][:-1]
    with pytest.raises(SplitError, match=r"q.weight: rank 1 has \(5, 5\), its piece is \(6, 5\)"):
        assemble(parts, shards)


def test_rows_that_are_lost_or_doubled():
    parts, shards = parts_and_shards()
    shifted = attrs.evolve(shards[1].pieces["q.weight"], runs=((5, 11),))
    shards[1] = attrs.evolve(shards[1], pieces={**shards[1].pieces, "q.weight": shifted})
    with pytest.raises(SplitError, match=r"q.weight: rank 0 and rank 1 both hold index 5 of dimension 0"):
        assemble(parts, shards)
    short = attrs.evolve(shifted, runs=((6, 11),))
    shards[1] = attrs.evolve(shards[1], pieces={**shards[1].pieces, "q.weight": short})
    parts[1]["q.weight"] = parts[1]["q.weight"][:5]
    with pytest.raises(SplitError, match=r"q.weight: no rank holds index 11 of dimension 0"):
        assemble(parts, shards)


def test_ranks_that_hold_different_copies():
    shards = shards_of(norm_attn=Norm("norm"))
    parts = [{"norm.weight": torch.tensor([1.0, 0.0])}, {"norm.weight": torch.tensor([1.0, -0.0])}]
    shards = [
        attrs.evolve(s, pieces={"norm.weight": attrs.evolve(s.pieces["norm.weight"], shape=(2,))}) for s in shards
    ]
    with pytest.raises(SplitError, match="every rank holds all of it, and those of rank 0 and rank 1 differ"):
        assemble(parts, shards)
