"""Products of many layers at once: what is kept, and when it is not."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsi.containers.linear import Source
from dsi.containers.shared_products import SharedLinear, SharedProduct, shared_products

WIDTH, ROWS = 6, (3, 5, 4)


def made() -> tuple[nn.ModuleList, list[Tensor], list[Tensor | None]]:
    """Three layers of one product; the second has no bias."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, WIDTH, generator=generator) for rows in ROWS]
    biases = [torch.randn(rows, generator=generator) if rows != 5 else None for rows in ROWS]
    product = SharedProduct("time", sum(ROWS), WIDTH, weights[0], bias=True)
    layers = nn.ModuleList()
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        source = Source(path=f"p{index}", rows=weight.shape[0], transposed=False, bias=bias is not None)
        given = None if bias is None else bias.clone()
        layers.append(SharedLinear(weight.clone(), given, (source,), product))
    return layers, weights, biases


def check(layers, weights, biases, x: Tensor, kind: str = "") -> None:
    given = F.silu(x) if kind == "silu" else x
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        torch.testing.assert_close(layer(x, kind), F.linear(given, weight, bias))


@pytest.mark.parametrize("kind", ["", "silu"])
def test_the_first_computes_for_all_and_the_rest_read(kind):
    layers, weights, biases = made()
    x = torch.randn(2, WIDTH)
    for _ in range(3):
        check(layers, weights, biases, x, kind)
    assert layers[0].product.products == 1


def test_another_activation_is_another_product():
    layers, weights, biases = made()
    x = torch.randn(2, WIDTH)
    check(layers, weights, biases, x, "silu")
    check(layers, weights, biases, x, "")
    assert layers[0].product.products == 2


def test_an_input_that_was_written_to_is_new():
    layers, weights, biases = made()
    x = torch.randn(2, WIDTH)
    check(layers, weights, biases, x)
    x.add_(1.0)
    check(layers, weights, biases, x)
    assert layers[0].product.products == 2


def test_an_equal_input_at_the_same_address_is_new():
    layers, weights, biases = made()
    x = torch.randn(2, WIDTH)
    check(layers, weights, biases, x)
    check(layers, weights, biases, x.view(2, WIDTH))
    assert layers[0].product.products == 2


def test_what_is_kept_goes_with_its_input():
    layers, *_ = made()
    x = torch.randn(2, WIDTH)
    layers[0](x)
    assert layers[0].product.latest()[0] is x
    del x
    gc.collect()
    assert layers[0].product.latest() is None
    assert layers[0].product._kept is None


def test_inputs_that_are_not_shared_cost_a_product_each_at_most():
    layers, weights, biases = made()
    product = layers[0].product
    for _ in range(5):
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            x = torch.randn(2, WIDTH)
            torch.testing.assert_close(layer(x), F.linear(x, weight, bias))
    assert product.products == 1
    x = torch.randn(2, WIDTH)
    for _ in range(2):
        check(layers, weights, biases, x)
    # an input that goes round is found again
    assert product.products == 2


def test_in_inference_mode_nothing_is_kept():
    layers, weights, biases = made()
    with torch.inference_mode():
        x = torch.randn(2, WIDTH)
        check(layers, weights, biases, x)
        x.add_(1.0)
        check(layers, weights, biases, x)
    assert layers[0].product.products == 0


def test_there_is_one_matrix():
    layers, *_ = made()
    product = layers[0].product
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {
        product.weight.untyped_storage().data_ptr()
    }
    layers.to(torch.float64)
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    layers[0](x)
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {
        product.weight.untyped_storage().data_ptr()
    }


def test_loads_are_seen():
    layers, weights, biases = made()
    x = torch.randn(2, WIDTH)
    check(layers, weights, biases, x)
    stamp = layers[0].product.stamp
    layers[1].load({"p1.weight": 2.0 * weights[1]})
    weights[1] = 2.0 * weights[1]
    check(layers, weights, biases, x)
    assert layers[0].product.stamp != stamp
    assert torch.equal(layers[1].export()["p1.weight"], weights[1])


def test_copies_have_a_product_of_their_own():
    layers, weights, biases = made()
    x = torch.randn(2, WIDTH)
    check(layers, weights, biases, x)
    copies = [copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))]  # noqa: S301 - our own bytes
    for layer in layers:
        layer.weight.data.zero_()
    for one in copies:
        (product,) = shared_products(one)
        assert product is not layers[0].product
        check(one, weights, biases, x)
        assert product.products == 1
    alone = copy.deepcopy(copies[0][1])
    torch.testing.assert_close(alone(x), F.linear(x, weights[1], biases[1]))
    check(copies[0], weights, biases, x)


def test_pinned_inputs_have_memory_of_their_own():
    layers, weights, biases = made()
    product, x, other = layers[0].product, torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    product.pin(x)
    rows = layers[2](x)
    check(layers, weights, biases, other)
    before = product.products
    check(layers, weights, biases, x)
    assert product.products == before
    x.copy_(torch.randn(2, WIDTH))
    # whoever wrote to it says so
    product.refresh(x)
    check(layers, weights, biases, x)
    assert rows.data_ptr() == layers[2](x).data_ptr()
    torch.testing.assert_close(rows, F.linear(x, weights[2], biases[2]))
    product.unpin(x)
    x.add_(1.0)
    check(layers, weights, biases, x)
