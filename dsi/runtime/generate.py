"""`generate` on an injected model: transformers' own, with dsi's decode loop and dsi's cache where they apply.

Nothing of transformers is patched. The functions in `INSTANCE_OVERRIDES` stand in the `__dict__` of one model, each
with the model as its first argument, and call the class's own method.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
from torch import Tensor
from transformers import DynamicCache

from dsi.runtime.fast_loop import fast_sample
from dsi.runtime.graph_pool import GraphPool
from dsi.runtime.kv_cache import RESERVE, PreallocatedCache
from dsi.runtime.limits import Prompt, check_generation, check_positions, check_room
from dsi.runtime.prompt_graph import bucket, too_large
from dsi.runtime.route import choose_route
from dsi.runtime.session import ATTRIBUTE, Route, Session, session_of
from dsi.runtime.step_forward import StepForward, step_forward


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What `type(model).generate` returns.

    Calls on one model run one after the other. `model._dsi.last_route` tells which loop the latest took.

    Args:
        model: an injected model.
        *args, **kwargs: of transformers' `generate`.

    Raises:
        InputError: ids out of range, no prompt, a mask of another shape, or too many positions; before anything runs.
    """
    stock = type(model).generate
    if ATTRIBUTE not in model.__dict__:
        # this function was bound before the model was restored
        return stock(model, *args, **kwargs)
    session = session_of(model)
    given = _by_name(stock, model, args, kwargs)
    with session.lock:
        outer, result = (session.prompt, session.own_cache), None
        session.own_cache = None
        session.running += 1
        try:
            session.prompt = _check(model, session, given)
            session.last_route = choose_route(model, session, given)
            if session.graphs is None and _wants_graphs(model, session):
                session.graphs = GraphPool()
            if session.last_route.fast:
                given["custom_generate"] = fast_sample
                result = stock(model, **given)
            else:
                result = _in_graphs(model, session, stock, given)
            return result
        finally:
            _part_from_cache(session, result)
            session.prompt, session.own_cache = outer
            session.running -= 1


def _part_from_cache(session: Session, result: Any) -> None:
    """The call is over: the cache that was made for it is the next call's, or its caller's who may have it."""
    pool, cache = session.graphs, session.own_cache
    if pool is None or cache is None:
        return
    # none where the call failed
    if result is None or isinstance(result, Tensor):
        pool.give_back(cache)
    else:
        pool.hand_over(cache)


def _in_graphs(model: Any, session: Session, stock: Callable[..., Any], given: dict[str, Any]) -> Any:
    """transformers' loop, its steps as graphs where they can be."""
    steps, outer = step_forward(model, session, given), model.__dict__.get("forward")
    if steps is None:
        return stock(model, **given)
    # past nn.Module.__setattr__, and with the signature that transformers looks at
    stand_in = functools.wraps(steps.forward)(lambda *args, **kwargs: steps(*args, **kwargs))
    # a decode step knows whose it is by this
    stand_in.__module__ = __name__
    model.__dict__["forward"] = stand_in
    session.steps, before = steps, session.steps
    try:
        result = stock(model, **given)
        session.last_route = _told(session.last_route, steps)
        return result
    finally:
        session.steps = before
        if outer is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = outer


def _told(route: Route | None, steps: StepForward) -> Route:
    """The route with what became of its steps."""
    assert route is not None
    if steps.taken or not steps.reason:
        return attrs.evolve(route, graph=steps.taken > 0)
    return attrs.evolve(route, reason=f"{route.reason}; steps without a graph: {steps.reason}")


def prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Stands for `_prepare_cache_for_generation`: checks the length, and preallocates what stock leaves to grow.

    Raises:
        InputError: prompt and new tokens are more than the context.
    """
    session = session_of(model)
    bound = _signature(type(model)._prepare_cache_for_generation).bind(
        model, generation_config, model_kwargs, *args, **kwargs
    )
    total = int(bound.arguments["max_cache_length"]) + 1
    prompt = session.prompt or Prompt(rows=1, length=0)
    if not model.config.is_encoder_decoder:
        new = total + prompt.cached - prompt.length
        check_room(prompt, new, session.context)
        if prompt.placed and session.runner is not None and (table := session.runner.learned_positions) is not None:
            # the last new token is not fed
            check_positions(model_kwargs["position_ids"], new - 1, table)
    brought = model_kwargs.get("past_key_values")
    type(model)._prepare_cache_for_generation(*bound.args, **bound.kwargs)
    made = model_kwargs.get("past_key_values")
    if brought is None and made is not None and type(made) is DynamicCache and not made.offloading:
        needed = min(total, prompt.length + RESERVE)
        if session.graphs is not None and (session.steps or (session.last_route and session.last_route.fast)):
            times = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            rows = int(bound.arguments["batch_size"]) * times
            if session.steps:
                session.steps.slots = total
            returned = bool(generation_config.return_dict_in_generate)
            if not too_large(rows, prompt.length):
                # a graph of the prompt is as long as its bucket
                needed = max(needed, bucket(prompt.length))
            session.own_cache = session.graphs.cache_in_place_of(made, rows, needed, returned=returned)
        else:
            session.own_cache = PreallocatedCache.of(made, needed)
        model_kwargs["past_key_values"] = session.own_cache


def extract_mode_kwargs(model: Any, custom_generate: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Stands for `_extract_generation_mode_kwargs`: dsi's loop is given what transformers' own would be.

    For any other callable transformers drops the streamer and the tokenizer here.
    """
    if custom_generate is fast_sample:
        custom_generate = None
    result: dict[str, Any] = type(model)._extract_generation_mode_kwargs(model, custom_generate, *args, **kwargs)
    return result


INSTANCE_OVERRIDES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "generate": generate,
        "_prepare_cache_for_generation": prepare_cache,
        "_extract_generation_mode_kwargs": extract_mode_kwargs,
    }
)


def _wants_graphs(model: Any, session: Session) -> bool:
    return session.config.enable_cuda_graph is not False and model.device.type == "cuda"


def _check(model: Any, session: Session, given: Mapping[str, Any]) -> Prompt | None:
    if model.main_input_name != "input_ids":
        return None
    if model.config.is_encoder_decoder:
        check_generation(given, _vocab_size(model), None)
        return None
    return check_generation(given, _vocab_size(model), session.context, session.config.min_out_tokens)


def _vocab_size(model: Any) -> int | None:
    embedding = model.get_input_embeddings()
    # a packed weight is no longer one once the attribute was read
    own = getattr(embedding, "_parameters", {})
    weight = own["weight"] if "weight" in own else getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _by_name(stock: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `stock(model, *args, **kwargs)` by name, `model` left out."""
    names = _positional(stock)
    if len(args) >= len(names):
        # one too many: stock words the error
        stock(model, *args, **kwargs)
    given = dict(zip(names[1:], args, strict=False))
    if twice := given.keys() & kwargs.keys():
        raise TypeError(f"generate() got multiple values for argument {min(twice)!r}")
    return {**given, **kwargs}


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


@functools.cache
def _positional(stock: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(name for name, parameter in inspect.signature(stock).parameters.items() if parameter.kind in kinds)
