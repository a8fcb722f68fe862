"""The fused linear layer, form by form: it computes what the stacked stock layers do, and gives their weights back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsi.containers import FusedLinear, linear
from dsi.containers.activations import ACTIVATIONS
from dsi.containers.layouts import row_permutation
from dsi.containers.linear import PACK_FROM, UPCAST_FROM, Source, choose_form, stack

CPU = torch.device("cpu")
FORMS = ("aten", "packed", "columns", "parts", "upcast")


def stock_parts(rows, width, *, transposed=False, biases=True, dtype=torch.float32, seed=0):
    """Stock parameters by path, as a layer holds them."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for index, count in enumerate(rows):
        weight = torch.randn(count, width, generator=generator) / width**0.5
        parts[f"p{index}.weight"] = (weight.t().contiguous() if transposed else weight).to(dtype)
        if biases is True or (biases == "first" and index == 0):
            parts[f"p{index}.bias"] = torch.randn(count, generator=generator).to(dtype)
    return parts


def sources_of(parts, *, transposed=False):
    paths = sorted({name.partition(".")[0] for name in parts})
    return tuple(
        Source(
            path=path,
            rows=parts[f"{path}.weight"].shape[1 if transposed else 0],
            transposed=transposed,
            bias=f"{path}.bias" in parts,
        )
        for path in paths
    )


def fused(parts, *, transposed=False, permutation=None, form="aten"):
    sources = sources_of(parts, transposed=transposed)
    weight, bias = stack(sources, permutation, parts)
    return FusedLinear(weight, bias, sources, permutation, form)


def stacked(parts, x, *, transposed=False):
    """What the stock layers give, side by side."""
    outputs = []
    for source in sources_of(parts, transposed=transposed):
        weight = parts[f"{source.path}.weight"]
        outputs.append(F.linear(x, weight.t() if transposed else weight, parts.get(f"{source.path}.bias")))
    return torch.cat(outputs, -1)


def make(form, rows=(24, 8, 8), width=16, **kwargs):
    dtype = torch.bfloat16 if form == "upcast" else torch.float32
    if form == "packed":
        # so large that its padding is accepted
        rows, width = (64, 64), 1024
    parts = stock_parts(rows, width, dtype=dtype, **kwargs)
    layer = fused(parts, transposed=kwargs.get("transposed", False), form=form)
    assert layer.form == form
    return layer, parts


def tolerance(dtype):
    # bf16: two roundings of values up to 8, whose unit in the last place is 2^-5
    return {"rtol": 1.6e-2, "atol": 2**-5} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}


# --- computing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False, "first"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_stock_layers_side_by_side(form, transposed, biases):
    layer, parts = make(form, transposed=transposed, biases=biases)
    for shape in ((1, 1), (2, 5), (7,), ()):
        x = torch.randn(*shape, layer.in_features).to(layer.weight.dtype)
        wanted = stacked(parts, x, transposed=transposed)
        torch.testing.assert_close(layer(x), wanted, **tolerance(x.dtype))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 17),
    batch=st.integers(0, 3),
    length=st.integers(0, 4),
    biases=st.sampled_from([True, False, "first"]),
    transposed=st.booleans(),
    form=st.sampled_from(["aten", "upcast"]),
)
def test_any_shape(rows, width, batch, length, biases, transposed, form):
    layer, parts = make(form, rows, width, biases=biases, transposed=transposed)
    x = torch.randn(batch, length, width).to(layer.weight.dtype)
    residual = torch.randn(batch, length, sum(rows)).to(x.dtype)
    wanted = stacked(parts, x, transposed=transposed)
    torch.testing.assert_close(layer(x), wanted, **tolerance(x.dtype))
    torch.testing.assert_close(layer.add(x, residual), wanted + residual, **tolerance(x.dtype))
    torch.testing.assert_close(layer.activate(x, "relu"), wanted.relu(), **tolerance(x.dtype))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (1, 7), (3, 5), (17, 33)])
def test_packed_at_any_number_of_rows(shape):
    layer, parts = make("packed")
    x = torch.randn(*shape, layer.in_features)
    residual = torch.randn(*shape, layer.out_features)
    wanted = stacked(parts, x)
    torch.testing.assert_close(layer(x), wanted, **tolerance(x.dtype))
    torch.testing.assert_close(layer.add(x, residual), wanted + residual, **tolerance(x.dtype))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_are_not_contiguous(form):
    layer, parts = make(form)
    dtype = layer.weight.dtype
    x = torch.randn(layer.in_features, 5, 2).to(dtype).permute(2, 1, 0)
    residual = torch.randn(5, 2, layer.out_features).to(dtype).transpose(0, 1)
    assert not x.is_contiguous()
    assert not residual.is_contiguous()
    torch.testing.assert_close(layer(x), stacked(parts, x), **tolerance(dtype))
    torch.testing.assert_close(layer.add(x, residual), stacked(parts, x) + residual, **tolerance(dtype))
    one_row = torch.randn(1, layer.in_features).to(dtype).expand(3, 4, -1)
    torch.testing.assert_close(layer(one_row), stacked(parts, one_row), **tolerance(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_add_and_activate_leave_their_inputs_alone(form):
    layer, _ = make(form)
    x = torch.randn(2, 5, layer.in_features).to(layer.weight.dtype)
    residual = torch.randn(2, 5, layer.out_features).to(x.dtype)
    kept = x.clone(), residual.clone()
    layer.add(x, residual)
    layer.activate(x, "gelu")
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("wide", [False, True], ids=["after the product", "inside the product"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_activate(form, kind, wide):
    layer, parts = make(form)
    layer.wide = wide
    # both tails of the activation
    x = 4 * torch.randn(3, 5, layer.in_features).to(layer.weight.dtype)
    wanted = ACTIVATIONS[kind](stacked(parts, x))
    torch.testing.assert_close(layer.activate(x, kind), wanted, **tolerance(x.dtype))


@pytest.mark.parametrize("rows", [UPCAST_FROM - 1, UPCAST_FROM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_upcast_rounds_once(dtype, rows):
    parts = stock_parts((32,), 64, dtype=dtype)
    layer = fused(parts, form="upcast")
    x = torch.randn(rows, 64).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    # within half a unit in the last place and the fp32 sum's own error; the narrow product sums in 16 bits
    ulp = torch.finfo(dtype).eps
    assert (
        (layer(x).double() - exact).abs() <= exact.abs() * ulp * (0.51 if rows >= UPCAST_FROM else 2) + 1e-2 * ulp
    ).all()


# --- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True], ids=["avx2", "avx512"])
def test_small_fp32_weights_are_not_packed_and_large_ones_are(wide, monkeypatch):
    monkeypatch.setattr(linear, "has_avx512", lambda: wide)
    assert choose_form(CPU, torch.float32, 64, PACK_FROM // 64 - 16) == ("columns" if wide else "aten")
    assert choose_form(CPU, torch.float32, 64, PACK_FROM // 64) == "packed"
    assert choose_form(CPU, torch.float32, 512, 256) == "columns"
    assert choose_form(CPU, torch.float32, 511, 256) == ("columns" if wide else "aten")
    assert choose_form(CPU, torch.float64, 1024, 1024) == "aten"
    assert choose_form(torch.device("cuda"), torch.float32, 1024, 1024) == "aten"
    assert choose_form(CPU, torch.float16, 1024, 1024) == "upcast"


@pytest.mark.parametrize("native", [False, True])
def test_bf16_weights_are_packed_where_the_processor_has_bf16(native, monkeypatch):
    monkeypatch.setattr(linear, "has_bf16", lambda: native)
    assert choose_form(CPU, torch.bfloat16, 256, 384) == ("packed" if native else "upcast")
    # padding would cost too much
    assert choose_form(CPU, torch.bfloat16, 2, 384) == ("aten" if native else "upcast")


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(640, 1300), width=st.integers(900, 1300), round_rows=st.booleans())
def test_the_form_that_is_chosen_is_the_form_that_comes(rows, width, round_rows):
    # the plan says it beforehand; only packing itself could tell how much oneDNN pads
    rows = rows // 64 * 64 if round_rows else rows
    form = choose_form(CPU, torch.float32, rows, width)
    layer = FusedLinear(torch.zeros(rows, width), None, (), None, "packed")
    assert (layer.form == "packed") == (form == "packed")


def test_without_onednn_everything_is_plain(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert choose_form(CPU, dtype, 1024, 1024) == "aten"


def test_a_weight_that_padding_would_blow_up_stays_plain():
    # two rows in a block of 64
    layer = fused(stock_parts((2,), PACK_FROM), form="packed")
    assert layer.form == "aten"
    assert layer.weight.nbytes == 2 * PACK_FROM * 4


def test_a_packed_weight_takes_no_more_than_it_says():
    layer, parts = make("packed")
    dense = sum(t.nbytes for name, t in parts.items() if name.endswith("weight"))
    assert torch.ops.mkldnn._nbytes(layer.weight) <= 1.01 * dense
    assert layer.weight.is_mkldnn


def test_nothing_of_it_wants_gradients():
    for form in FORMS:
        assert not any(p.requires_grad for p in make(form)[0].parameters())


# --- weights in and out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False, "first"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_export_gives_the_stock_parameters_back(form, transposed, biases):
    layer, parts = make(form, transposed=transposed, biases=biases)
    exported = layer.export()
    assert exported.keys() == parts.keys()
    assert all(torch.equal(exported[name], parts[name]) for name in parts)
    assert not any(tensor.requires_grad or tensor.is_mkldnn for tensor in exported.values())


def test_export_copies_nothing_where_the_layout_allows():
    layer, _ = make("aten")
    memory = layer.weight.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for name, t in layer.export().items() if "weight" in name} == {memory}


@pytest.mark.parametrize("layout", ["head_interleaved", "kv_grouped"])
def test_permuted_rows(layout):
    heads, kv_heads, head_dim = (4, 4, 6) if layout == "head_interleaved" else (6, 2, 6)
    rows = (heads + 2 * kv_heads) * head_dim
    order = row_permutation(layout, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    parts = stock_parts((rows,), 16)
    layer = fused(parts, permutation=order)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), stacked(parts, x)[:, order])
    assert all(torch.equal(layer.export()[name], parts[name]) for name in parts)
    others = stock_parts((rows,), 16, seed=1)
    layer.load(others)
    torch.testing.assert_close(layer(x), stacked(others, x)[:, order])
    assert all(torch.equal(layer.export()[name], others[name]) for name in others)


@pytest.mark.parametrize("biases", [True, False, "first"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_load_takes_new_parameters_in_the_same_form(form, transposed, biases):
    layer, parts = make(form, transposed=transposed, biases=biases)
    dtype = layer.weight.dtype
    others = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in parts.items()}
    layer.load(others)
    assert layer.form == form
    assert layer.weight.dtype is dtype
    exported = layer.export()
    assert all(torch.equal(exported[name], others[name]) for name in others)


def test_load_casts_to_the_dtype_that_is_there():
    layer, parts = make("aten")
    layer.load({name: tensor.to(torch.bfloat16) for name, tensor in parts.items()})
    assert layer.weight.dtype is layer.bias.dtype is torch.float32


def test_load_of_its_own_export_changes_nothing():
    for form in FORMS:
        layer, parts = make(form)
        layer.load(layer.export())
        assert all(torch.equal(layer.export()[name], parts[name]) for name in parts)


def test_state_dict_is_left_to_the_layer_around_it():
    layer, _ = make("packed")
    assert layer.state_dict() == {}


# --- torch's own machinery ----------------------------------------------------------------------------------------


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own bytes
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_copies_are_equal_and_their_own(form, transposed):
    layer, parts = make(form, transposed=transposed)
    x = torch.randn(2, 5, layer.in_features).to(layer.weight.dtype)
    wanted = layer(x)
    for other in copies(layer):
        assert other.form == form
        assert torch.equal(other(x), wanted)
        others = {name: torch.zeros_like(tensor) for name, tensor in parts.items()}
        other.load(others)
        assert not other(x).any()
        assert torch.equal(layer(x), wanted)
    assert layer.form == form
    assert torch.equal(layer(x), wanted)


def test_deepcopy_keeps_a_packed_weight_packed():
    layer, _ = make("packed")
    assert copy.deepcopy(layer).weight.is_mkldnn
    assert layer.weight.is_mkldnn


def test_casts_choose_the_form_anew():
    parts = stock_parts((512, 512), 1024)
    layer = fused(parts, form="packed")
    x = torch.randn(6, 1024)
    for dtype, form in ((torch.bfloat16, "upcast"), (torch.float64, "aten"), (torch.float32, "packed")):
        if form == "upcast" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            form = "packed"
        layer.to(dtype)
        assert layer.form == form
        assert layer.bias.dtype is dtype
        now = {name: tensor.to(torch.bfloat16).to(dtype) for name, tensor in parts.items()}
        assert all(torch.equal(layer.export()[name], now[name]) for name in now)
        torch.testing.assert_close(layer(x.to(dtype)), stacked(now, x.to(dtype)), **tolerance(dtype))


@pytest.mark.parametrize("move", ["half", "float", "cpu", "share_memory", "requires_grad_"])
def test_moves_that_every_module_has(move):
    layer, _ = make("packed")
    x = torch.randn(2, layer.in_features)
    wanted = layer(x)
    assert getattr(layer, move)() is layer
    if move == "half":
        torch.testing.assert_close(layer(x.half()).float(), wanted, rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(layer(x), wanted)


def test_repr_says_the_form():
    assert repr(make("packed")[0]) == "FusedLinear(1024 -> 128, form=packed, bias=True)"
