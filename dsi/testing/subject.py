"""What a check is given: a policy, and models of its architecture that are built so that mistakes show.

Models, twins and stock outputs are made once and shared between checks; a check that changes a model takes a `fresh`
one.
"""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import nn

from dsi.api import init_inference
from dsi.containers.stand_in import StandIn
from dsi.engine import InferenceEngine
from dsi.errors import ConfigError, DsiError
from dsi.fit import class_name, submodule
from dsi.plans import Plan
from dsi.policy import Block, Norm, Policy
from dsi.registry import Registry, stands
from dsi.testing.compare import forward
from dsi.testing.configs import whole_class
from dsi.testing.hostile import make_hostile_
from dsi.testing.inputs import Padding, Reads, ReadsGiven, ReadsMaps
from dsi.testing.report import Failed
from dsi.testing.world import World


class Unfit(Exception):
    """The policy cannot be applied to the model at all, so that nothing else can be said of it."""


@attrs.frozen(kw_only=True)
class Tolerances:
    """What a policy is held to.

    Args:
        fp32: largest difference in fp32, as a share of the largest value.
        rounding: error in 16 bits, as a multiple of stock's own.
        memory: bytes alive after the injection, as a multiple of the weights' bytes.
    """

    fp32: float = 1e-5
    rounding: float = 1.2
    memory: float = 1.01

    @classmethod
    def of(cls, given: Mapping[str, float]) -> Tolerances:
        """The defaults, changed by name.

        Raises:
            ValueError: an unknown name.
        """
        known = [field.name for field in attrs.fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise ValueError(f"no tolerance {', '.join(unknown)}; there are: {', '.join(known)}")
        return cls(**given)


@attrs.frozen(eq=False)
class Twins:
    """Two models of the same weights.

    Args:
        stock: never met dsi.
        model: optimized.
        engine: the handle on `model`.
    """

    stock: Any
    model: Any
    engine: InferenceEngine

    @property
    def containers(self) -> list[StandIn]:
        """The containers of the optimized model, in order."""
        return containers(self.model)

    def calls(self) -> tuple[int, int]:
        """(fused, stock) calls of all containers so far."""
        found = self.containers
        return sum(one.fused_calls for one in found), sum(one.stock_calls for one in found)


def containers(model: nn.Module) -> list[StandIn]:
    """The containers in a model, in order."""
    return [module for module in model.modules() if isinstance(module, StandIn)]


class Subject:
    """One policy under test.

    Args:
        policy: a policy, or the full name of a registered one.
        tiny_config: gives a small config of the architecture, a new one each time.
        model_class: the class to build, or its name; where left out the policy's first `models` entry, else what
            transformers' auto classes give for the config, or of a config that is a dict, as models of diffusers take
            it, the first such class that the policy's blocks name in `inside`.
        module: the plugin's module, where it cannot be found by the policy.
        tolerances: see `Tolerances`.
        registry: the plugins; as installed, where left out.
        inputs: (model, rows, length, seed) -> keyword arguments of its forward, where the kit cannot tell from the
            model what it reads.

    Raises:
        UnknownPolicyError: `policy` is no registered name.
        ValueError: an unknown tolerance.
    """

    def __init__(
        self,
        policy: Policy | str,
        tiny_config: Callable[[], Any],
        *,
        model_class: type | str | None = None,
        module: str = "",
        tolerances: Mapping[str, float] | None = None,
        registry: Registry | None = None,
        inputs: Callable[[Any, int, int, int], Mapping[str, Any]] | None = None,
    ) -> None:
        self._given = inputs
        self.registry = Registry.load() if registry is None else registry
        resolved, self.name = self.registry.resolve(policy)
        assert resolved is not None
        self.policy: Policy = resolved
        self.tiny_config = tiny_config
        self.tolerances = Tolerances.of(tolerances or {})
        self._model_class, self._module = model_class, module
        self._built: dict[Any, Any] = {}
        self._stock: dict[Any, Any] = {}
        self._twins: dict[Any, Twins] = {}
        self._worlds: list[World] = []
        self._paths: set[str] = set()

    # --- what is under test -----------------------------------------------------------------------------------

    @cached_property
    def model_class(self) -> type:
        """The transformers class that is built."""
        given = self._model_class
        if given is None and self.policy.models:
            given = self.policy.models[0].model
        if isinstance(given, type):
            return given
        if given is None and isinstance(self.config, Mapping):
            return whole_class(self.policy)
        if given is None:
            return _auto_class(self.config, causal=self._says_causal)
        module, _, name = given.rpartition(":")
        found: type = getattr(importlib.import_module(module or "transformers"), name)
        return found

    @cached_property
    def _says_causal(self) -> bool:
        return any(getattr(block.facts.get("causal"), "value", False) for block in self.policy.blocks)

    @property
    def module(self) -> str:
        """The module of the plugin that holds the policy, or "" where no imported module does."""
        if self._module:
            return self._module
        return next(iter(_homes(self.policy)), "")

    @cached_property
    def config(self) -> Any:
        """The config that was given; do not change it."""
        return self.tiny_config()

    @cached_property
    def reads(self) -> Reads | ReadsMaps | ReadsGiven:
        """What the model reads."""
        stock = self.stock()
        if self._given is not None:
            return ReadsGiven(model=stock, make=self._given)
        return ReadsMaps.of(stock) or Reads.of(stock)

    @property
    def of_maps(self) -> bool:
        """It reads maps or the like, and has no outputs to record."""
        return not isinstance(self.reads, Reads)

    @cached_property
    def decodes(self) -> bool:
        """It is a decoder: it generates, and its layers keep a cache."""
        return _generates(self.stock())

    @property
    def plan(self) -> Plan:
        """What dsi does to the model."""
        return self.twins().engine.plan

    # --- models -----------------------------------------------------------------------------------------------

    def stock(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "") -> Any:
        """A stock model in eval mode, hostile weights, the same for the same arguments; do not change it.

        Args:
            seed: of the weights.
            dtype: of the parameters.
            attention: the attention implementation, where it is not to be transformers' choice.
        """
        key = seed, dtype, attention
        if key not in self._stock:
            self._stock[key] = copy.deepcopy(self._pristine(*key))
        return self._stock[key]

    def fresh(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "") -> Any:
        """An equal model that the caller may change, and that has never been called."""
        return copy.deepcopy(self._pristine(seed, dtype, attention))

    def widened(self, *, seed: int, dtype: torch.dtype) -> Any:
        """The stock model of `dtype` in fp32: the yardstick for what is computed in `dtype`; do not change it."""
        key = seed, dtype, "widened"
        if key not in self._stock:
            self._stock[key] = self.fresh(seed=seed, dtype=dtype).float()
        return self._stock[key]

    def twins(self, **options: Any) -> Twins:
        """A stock model and its optimized copy, shared between checks; do not change them. Options as for `stock`.

        Raises:
            Unfit: the policy cannot be applied at all.
        """
        key = tuple(sorted(options.items()))
        if key not in self._twins:
            self._twins[key] = self.fresh_twins(**options)
        return self._twins[key]

    def fresh_twins(self, **options: Any) -> Twins:
        """As `twins`, with an optimized model that the caller may change."""
        model = self.fresh(**options)
        return Twins(self.stock(**options), model, self.inject(model))

    def inject(self, model: nn.Module, **options: Any) -> InferenceEngine:
        """`dsi.init_inference` with this policy.

        Raises:
            Unfit: the policy cannot be applied at all.
            Failed: it can, and leaves layers of this model alone.
        """
        if self.fault:
            raise Unfit(self.fault)
        engine = self._inject(model, **options)
        found = {block.path for block in engine.plan.blocks}
        if found != self._paths:
            # else stock would be compared with itself
            raise Failed(
                f"not every layer of this variant ({next(model.parameters()).dtype}) is replaced",
                measured=f"{len(found)} layers",
                allowed=f"{len(self._paths)} layers",
                mend="a policy and its container take every dtype, and eager attention as well as SDPA",
            )
        return engine

    def _inject(self, model: nn.Module, **options: Any) -> InferenceEngine:
        # what dsi says of a policy is what the kit measures; it is no warning of the author's tests
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return init_inference(model, injection_policy=self.policy, **options)

    @cached_property
    def fault(self) -> str:
        """Why the policy cannot be applied to the tiny model, or ""."""
        try:
            model = self.fresh()
        # whatever a config or a constructor raises
        except Exception as error:  # noqa: BLE001
            return f"the stock model of this config cannot be built: {type(error).__name__}: {error}"
        self._worlds.append(World.of(self.stock()))
        if wrong := self._stock_error():
            return wrong
        try:
            engine = self._inject(model)
        except DsiError as error:
            return f"{type(error).__name__}: {error}"
        left = [
            f"{one.path}: {self._own_words(one.reason.text)}"
            for one in engine.plan.left
            if one.reason.code != "no_policy"
        ]
        if left or not engine.plan.blocks:
            return "; ".join(dict.fromkeys(left)) or engine.plan.why_nothing
        self._paths = {block.path for block in engine.plan.blocks}
        return ""

    def _own_words(self, text: str) -> str:
        """What this policy said, of all that claim the layer."""
        own = [part for part in text.split("; ") if part.startswith(f"{self.name}: ")]
        return "; ".join(own).removeprefix(f"{self.name}: ") if own else text

    def _stock_error(self) -> str:
        try:
            forward(self.stock(), self.inputs(1, 4))
        # whatever a model raises whose sizes do not fit together
        except Exception as error:  # noqa: BLE001
            return f"the stock model of this config does not run: {type(error).__name__}: {error}"
        return ""

    @property
    def world(self) -> World:
        """Classes and modules around the model as they were before the policy was first applied."""
        if self.fault:
            raise Unfit(self.fault)
        return self._worlds[0]

    def _pristine(self, seed: int, dtype: torch.dtype, attention: str) -> Any:
        # the first call of a model may leave something on it: transformers' recorders cannot be pickled
        key = seed, dtype, attention
        if key not in self._built:
            self._built[key] = self._build(seed, dtype, attention)
        return self._built[key]

    def _build(self, seed: int, dtype: torch.dtype, attention: str) -> Any:
        config: Any = self.tiny_config()
        if attention:
            config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = self.build(config)
        make_hostile_(model, seed=seed, norms=self._norms(model))
        # as from_pretrained(dtype=) does: buffers that no checkpoint holds, such as rotary frequencies, stay fp32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        if not isinstance(config, Mapping):
            model.config.dtype = dtype
        _never_stop_(model)
        return model

    def build(self, config: Any) -> Any:
        """A model of this config in eval mode, weights as its class initializes them."""
        return (self.model_class(**config) if isinstance(config, Mapping) else self.model_class(config)).eval()

    def _norms(self, model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """Every norm that the policy replaces, with its epsilon."""
        for _, layer, block in self.layers(model):
            for place, slot in block.slots.items():
                if isinstance(slot, Norm):
                    try:
                        yield submodule(layer, slot.path, place), slot.eps
                    except DsiError:
                        # the check of the paths tells
                        continue

    # --- layers -----------------------------------------------------------------------------------------------

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Block]]:
        """(path, layer, block) of every layer of a stock model that the policy claims."""
        holders: dict[str, str] = {}
        for path, module in model.named_modules():
            parent = path.rpartition(".")[0]
            holder = holders.get(parent, "")
            for block in self.policy.blocks:
                if stands(block, class_name(module), holder):
                    yield path, module, block
                    break
            lists = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
            holders[path] = holder if lists else class_name(module)

    # --- inputs and outputs -----------------------------------------------------------------------------------

    def inputs(self, batch: int, length: int, padding: Padding = "none", *, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of a forward; see `Reads.inputs` and `ReadsMaps.inputs`."""
        return dict(self.reads.inputs(batch, length, padding, seed=seed))

    def both(self, pair: Twins, inputs: Mapping[str, Any], **more: Any) -> tuple[Any, Any]:
        """(ours, stock's) for one forward of the same inputs."""
        return forward(pair.model, inputs, **more), forward(pair.stock, inputs, **more)


def _homes(policy: Policy) -> list[str]:
    """The imported modules in which the policy is a global: first those that register it, then other plugins."""
    found = [
        (name, module)
        for name, module in list(sys.modules.items())
        if name != "__main__" and any(value is policy for value in list(getattr(module, "__dict__", {}).values()))
    ]
    return [name for name, _ in sorted(found, key=lambda one: (_claim(one[1], policy), -one[0].count("."), one[0]))]


def _claim(module: Any, policy: Policy) -> int:
    """How little a module has to do with a policy that it holds: 0 it registers it, 1 it is a plugin, 2 neither."""
    if not hasattr(module, "DSI_API"):
        return 2
    registered = Registry.from_plugins({"plugin": module}).policies.values()
    return 0 if any(one is policy for one in registered) else 1


def _generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", bool)())


def _auto_class(config: Any, *, causal: bool) -> type:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if causal else (MODEL_MAPPING,)
    for mapping in mappings:
        if type(config) in mapping:
            found: type = mapping[type(config)]
            return found
    raise ConfigError([f"model_class: transformers has no model for {type(config).__name__}; name one"])


def _never_stop_(model: Any) -> None:
    # random weights emit the end token at random; lengths must not depend on it
    if _generates(model):
        model.generation_config.eos_token_id = None
        pad = model.config.get_text_config().pad_token_id
        model.generation_config.pad_token_id = 0 if pad is None else pad
