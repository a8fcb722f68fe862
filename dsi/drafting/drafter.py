"""`draft`: a policy for a model that none knows, written down with what is sure and what is not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import logging
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import attrs

from dsi.drafting import facts
from dsi.drafting.anatomy import Anatomy, read_anatomy, same_shape
from dsi.drafting.calls import Recorded, read_convention, record_calls
from dsi.drafting.candidates import Answers, Known
from dsi.drafting.facts import Sample, one_source
from dsi.drafting.heads import Attention, moved
from dsi.drafting.norms import epsilons
from dsi.drafting.policy_file import load_source
from dsi.drafting.replay import LayerCalled, Replay
from dsi.drafting.source import Guard, render
from dsi.drafting.specimen import FIRST, SECOND, Species, Specimen
from dsi.drafting.stack import Stack, find_stacks
from dsi.drafting.surroundings import ROPE_PARAMETERS, find_causal_lm, find_context, is_static, rope_types
from dsi.drafting.trial import Verdict, try_policy
from dsi.drafting.variants import Variant, variants
from dsi.errors import DsiError, UnsupportedModelError
from dsi.policy import Alibi, CausalLM, Config, Const, Fact, Policy, RotaryTable

logger = logging.getLogger(__name__)

_IMPLEMENTATIONS = ("sdpa", "eager")
_MEASURED: Mapping[str, Callable[[Sample], bool]] = MappingProxyType(
    {"pre_norm": lambda one: one.anatomy.pre_norm, "parallel": lambda one: one.anatomy.parallel}
)
# of the containers, those that a config may set and no measurement tells
_FLAGS = ("add_to_normed", "repeat_kv", "rope_pairs")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")


@attrs.frozen(kw_only=True)
class Draft:
    """A policy that was found, and how.

    Args:
        policy: it.
        source: the file, which gives the same policy.
        sure: what was settled by running it, in sentences.
        unsure: what was not.
        trials: how many candidates were run.
    """

    policy: Policy
    source: str
    sure: tuple[str, ...]
    unsure: tuple[str, ...]
    trials: int


def draft(model: Any, name: str = "") -> Draft:
    """The policy of a transformers model, whatever policies are installed: none of them is asked.

    Args:
        model: an instance of the model's class, of any size; only its class and config are used, so that it may stand
            on the meta device.
        name: of the policy; made of the module of the layer class where left out.

    Raises:
        UnsupportedModelError: no container computes what the layers do; the message says what stopped it.
    """
    return _Drafter(model, name).draft()


class _Drafter:
    def __init__(self, model: Any, name: str) -> None:
        self.species = Species.of(model, epsilons)
        self.first = self.species.specimen(FIRST)
        self.stacks = find_stacks(self.first.model)
        self.name = name or _name(self.stack.layer)
        self.sure: list[str] = []
        self.unsure: list[str] = []
        self.trials = 0
        # small models that a candidate must equal
        self.proof: list[Specimen] = [self.first]
        self.recorded = record_calls(self.first, self.stacks)
        self.differences: dict[str, Any] = {}
        self.guards: list[Guard] = []

    @property
    def stack(self) -> Stack:
        return self.stacks[0]

    def draft(self) -> Draft:
        anatomy = self._anatomy(self.first, self.recorded)
        samples = self._samples(anatomy)
        self.known = self._known(self._with_more_kv_heads(samples))
        self.answers = self._settle(self.proof)
        self._attention()
        # small models in which the policy is equal
        self.held = list(self.proof)
        self._variants(anatomy)
        policy = self._surround(self.known.policy(self.answers, **self.differences))
        self.unsure.append("settings of the config were changed one at a time: of several at once nothing is known")
        source = render(policy, self.guards, self.sure, self.unsure)
        policy = load_source(source)
        generate = bool(policy.models)
        for specimen in self.proof[:2]:
            verdict = try_policy(policy, specimen, generate=generate)
            if not verdict.equal:
                raise UnsupportedModelError(f"the policy as written does not hold: {verdict}")
        return Draft(policy=policy, source=source, sure=tuple(self.sure), unsure=tuple(self.unsure), trials=self.trials)

    # --- what is measured -------------------------------------------------------------------------------------

    def _anatomy(self, specimen: Specimen, recorded: Recorded) -> Anatomy:
        return read_anatomy(recorded.plain_of(self.stack.layers(specimen.model)[0]))

    def _samples(self, anatomy: Anatomy) -> list[Sample]:
        samples = self._of(self.first, anatomy)
        try:
            second = self.species.specimen(SECOND)
            other = self._anatomy(second, record_calls(second, self.stacks))
        except UnsupportedModelError as error:
            self.unsure.append(f"sizes: the layer was measured with one set of sizes alone ({error.message})")
            return samples
        if not same_shape(anatomy, other):
            raise UnsupportedModelError("with other sizes the layer is built differently")
        self.proof.append(second)
        return [*samples, *self._of(second, other)]

    def _with_more_kv_heads(self, samples: list[Sample]) -> list[Sample]:
        """The samples, with one of as many kv heads as heads where one kv head leaves the layout open."""
        first = samples[0]
        if len(first.anatomy.layouts) < 2 or first.anatomy.count.kv_heads > 1:
            return samples
        flags = [name for name, value in vars(first.config).items() if isinstance(value, bool)]
        for name in flags:
            changes = {name: not getattr(first.config, name), **dict.fromkeys(_KV_HEADS, first.anatomy.count.heads)}
            known = {key: value for key, value in changes.items() if hasattr(first.config, key)}
            try:
                other = self.species.specimen(changes=known, inside=self._inside())
                anatomy = self._anatomy(other, record_calls(other, self.stacks))
            except UnsupportedModelError:
                continue
            if anatomy.count.kv_heads > 1 and same_shape(first.anatomy, anatomy):
                layouts = ", ".join(anatomy.layouts)
                self._say(f"with {name}={known[name]} there are {anatomy.count.kv_heads} kv heads: layout {layouts}")
                self.proof.append(other)
                return [*samples, *self._of(other, anatomy)[:1]]
        raise UnsupportedModelError(
            f"with one kv head the layouts {', '.join(first.anatomy.layouts)} are the same, and no small model has more"
        )

    def _of(self, specimen: Specimen, anatomy: Anatomy) -> list[Sample]:
        config = self.stack.config(specimen.model)
        layers = self.stack.layers(specimen.model)
        return [Sample(layer=one, index=i, config=config, anatomy=anatomy) for i, one in enumerate(layers)]

    def _known(self, samples: list[Sample]) -> Known:
        convention = read_convention(samples[0].layer, self.recorded)
        anatomy = samples[0].anatomy
        settled: dict[str, Fact] = {
            "heads": one_source(samples, "heads", lambda one: one.anatomy.count.heads, "head"),
            "kv_heads": one_source(samples, "kv_heads", _kv_heads, "head"),
            "head_dim": one_source(samples, "head_dim", lambda one: one.anatomy.count.head_dim, "head"),
            "activation": self._activation(samples),
            "pre_norm": Const(anatomy.pre_norm),
            "causal": Const(convention.causal and not convention.call.bias),
        }
        if convention.call.cache:
            settled["layer_idx"] = one_source(samples, "layer_idx", lambda one: one.index)
        if anatomy.parallel:
            settled["parallel"] = Const(True)
        if convention.call.bias:
            settled["biased"] = Const(True)
        settled |= self._window(samples)
        count = anatomy.count
        self._say(
            f"roles by what depends on what: {_roles(anatomy)}",
            f"{count.heads} heads, {count.kv_heads} kv heads of {count.head_dim}, measured row by row",
            f"called with mask={convention.call.mask or '-'}, cache={convention.call.cache or '-'}, "
            f"rope={convention.call.rope or '-'}; returns a {convention.call.returns}",
        )
        return Known(
            name=self.name,
            layer=self.stack.layer,
            samples=samples,
            convention=convention,
            settled=settled,
            requires=_requires(),
        )

    def _say(self, *sentences: str) -> None:
        self.sure.extend(sentences)

    def _activation(self, samples: list[Sample]) -> Fact:
        named = facts.activations(samples[0])
        wanted = samples[0].anatomy.activation
        if not wanted:
            return named[0] if named else Const("silu")
        for one in named:
            other = "relu" if "relu" not in wanted else "silu"
            if self._follows(one, other):
                self._say(f"the activation is read from config.{one.name}: another value there gives another MLP")
                return one
        self._say(f"the activation is {wanted[0]}, whatever the config says")
        return Const(facts.CANONICAL[wanted[0]])

    def _follows(self, source: Config, kind: str) -> bool:
        """Whether the layer's activation is another once the config names another."""
        try:
            other = self.species.specimen(changes={source.name: kind}, inside=self._inside())
            return kind in self._anatomy(other, record_calls(other, self.stacks)).activation
        except UnsupportedModelError:
            return False

    def _inside(self) -> str:
        """The name of the inner config that the layers stand under, or ""."""
        config = self.first.model.config
        own = self.stack.config(self.first.model)
        inner = getattr(type(config), "sub_configs", {})
        return next((name for name in inner if getattr(config, name, None) is own), "")

    def _window(self, samples: list[Sample]) -> dict[str, Fact]:
        calls = {call.layer: call for call in self._calls()}
        samples = [one for one in samples if one.layer in calls]
        seen = {one.layer: _reach(one, calls[one.layer]) for one in samples}
        if not any(seen.values()):
            return {}
        found = one_source(samples, "window", lambda one: seen[one.layer], "window")
        self._say(
            f"sliding windows of {', '.join(str(one or 'all') for one in seen.values())} positions, layer by layer"
        )
        return {"window": found}

    def _calls(self) -> Iterator[LayerCalled]:
        """Every plain call of the first two small models."""
        yield from self.recorded.plain
        for specimen in self.proof[1:2]:
            yield from record_calls(specimen, self.stacks).plain

    # --- what is tried ----------------------------------------------------------------------------------------

    def _try(self, policy: Policy, specimen: Specimen, *, generate: bool = False) -> Verdict:
        self.trials += 1
        return try_policy(policy, specimen, generate=generate)

    def _settle(self, proof: list[Specimen]) -> Answers:
        """The first candidate that equals stock in every small model.

        Raises:
            UnsupportedModelError: none does; the message names the one that came closest.
        """
        closest: tuple[float, str] | None = None
        for number, answers in enumerate(self.known.candidates(), 1):
            worst = self._worst(self.known.policy(answers, **self.differences), proof)
            if worst.equal:
                self._say(f"{answers}: equal to {worst.distance:.0e}; candidate {number}")
                return answers
            if closest is None or worst.distance < closest[0]:
                closest = worst.distance, f"{answers}: {worst}"
        raise UnsupportedModelError(
            f"no form of {'DecoderLayer' if self.known.decodes else 'EncoderLayer'} computes what {self.stack.layer} "
            f"does; of {self.trials} candidates the closest was {closest[1] if closest else 'none'}",
            hint="a container of your own can stand in for it: see dsi.containers",
        )

    def _worst(self, policy: Policy, proof: list[Specimen]) -> Verdict:
        worst = Verdict(distance=0.0)
        for specimen in proof:
            found = self._try(policy, specimen)
            if found.distance >= worst.distance:
                worst = found
            if not found.equal:
                break
        return worst

    def _attention(self) -> None:
        """The attention implementations under which the container is equal."""
        usual = set(_IMPLEMENTATIONS)
        found = set()
        for one in _IMPLEMENTATIONS:
            try:
                specimen = self.species.specimen(attention=one)
            except UnsupportedModelError:
                continue
            if self._try(self.known.policy(self.answers, attention=frozenset(usual)), specimen).equal:
                found.add(one)
        self._say(f"equal under the attention implementations {', '.join(sorted(found))}")
        if found != usual:
            self.differences["attention"] = frozenset(found)

    # --- variants ---------------------------------------------------------------------------------------------

    def _variants(self, anatomy: Anatomy) -> None:
        """Other values of the config: held by the policy, read as a fact, or refused."""
        held = []
        for variant in variants(self.species, self.first, inside=self._inside(), owner=self.stack.config):
            policy = self.known.policy(self.answers, **self.differences)
            verdict = self._try(policy, variant.specimen)
            if verdict.equal or verdict.refused or self._mended(anatomy, variant, verdict):
                held.append(variant.name)
                self.held += [] if verdict.refused else [variant.specimen]
            else:
                self._guard(variant, verdict)
        if held:
            self._say(f"still equal with other values of {', '.join(held)}")
        if self.guards:
            names = ", ".join(guard.name for guard in self.guards)
            self._say(f"refused with other values of {names}: run, the container was not equal or not called")

    def _guard(self, variant: Variant, verdict: Verdict) -> None:
        why = textwrap.shorten(f"{variant.name}={variant.value!r} was run: {verdict}", 100)
        self.guards.append(Guard(variant.name, variant.before, why))

    def _mended(self, anatomy: Anatomy, variant: Variant, verdict: Verdict) -> bool:
        """Whether reading a fact elsewhere, or another candidate, holds for the variant too."""
        before, proof = dict(self.differences), [*self.proof, variant.specimen]
        for read in self._readings(anatomy, variant):
            self.differences = {**before, **read}
            if self._worst(self._policy(), proof[::-1]).equal:
                self.proof.append(variant.specimen)
                for name, fact in read.items():
                    self._say(f"{name} follows {fact!r}, tried with {variant.name}={variant.value!r}")
                return True
        self.differences = before
        if verdict.fault:
            # it is no number that is wrong
            return False
        for answers in itertools.islice(self.known.candidates(), 64):
            if self._worst(self.known.policy(answers, **self.differences), proof[::-1]).equal:
                self._say(f"with {variant.name}={variant.value!r} too: {answers}")
                self.answers = answers
                self.proof.append(variant.specimen)
                return True
        return False

    def _policy(self) -> Policy:
        return self.known.policy(self.answers, **self.differences)

    def _readings(self, anatomy: Anatomy, variant: Variant) -> Iterator[dict[str, Fact]]:
        """Sources of the layer's flags that follow the variant: as measured, then any flag that it may stand for."""
        changed = self._of(variant.specimen, anatomy)[:1]
        with contextlib.suppress(UnsupportedModelError):
            other = self._anatomy(variant.specimen, record_calls(variant.specimen, self.stacks))
            samples = [self.known.samples[0], *self._of(variant.specimen, other)[:1]]
            moved = [name for name, flag in _MEASURED.items() if flag(samples[0]) != flag(samples[1])]
            if moved:
                yield {name: one_source(samples, name, _MEASURED[name]) for name in moved}
        if isinstance(variant.value, bool):
            samples = [self.known.samples[0], *changed]
            values = {samples[0].layer: variant.before, samples[1].layer: variant.value}
            source = one_source(samples, variant.name, lambda one: values[one.layer])
            yield from ({name: source} for name in _FLAGS)

    # --- around the layers ------------------------------------------------------------------------------------

    def _surround(self, policy: Policy) -> Policy:
        table = policy.blocks[0].call.rope
        rows = None
        if isinstance(table, RotaryTable):
            rows = facts_rows(self.known.samples[0].layer, table.path)
        policy = attrs.evolve(policy, context=self._context(rows))
        if not self.first.decodes or not self.known.decodes:
            return policy
        reason = ""
        for parts in self._parts(policy):
            if isinstance(parts, str):
                reason = reason or parts
                continue
            verdict = self._generating(attrs.evolve(policy, models=(parts,)))
            if verdict.equal:
                return self._with_loop(policy, parts)
            reason = str(verdict)
        return self._without_loop(policy, reason)

    def _parts(self, policy: Policy) -> Iterator[CausalLM | str]:
        """What may stand around the layers, found in each small model, each once; or why nothing was found."""
        seen: list[CausalLM] = []
        for specimen in self.held:
            try:
                parts = find_causal_lm(specimen, self.stack)
            except DsiError as error:
                yield error.message
                continue
            for one in _biased(parts) if policy.blocks[0].call.bias else (parts,):
                if one not in seen:
                    seen.append(one)
                    yield one

    def _generating(self, policy: Policy) -> Verdict:
        """The first small model whose greedy search is another; by transformers' loop where a variant asks for it."""
        for specimen in self.held:
            verdict = self._try(policy, specimen, generate=True)
            if not verdict.equal and (specimen in self.proof or not verdict.right):
                return verdict
        return Verdict(distance=0.0, right=True)

    def _with_loop(self, policy: Policy, parts: CausalLM) -> Policy:
        count = len(self.held)
        self._say(f"generate takes dsi's loop: greedy search gives the same tokens and logits in {count} small models")
        if parts.rotary is not None:
            parts = attrs.evolve(parts, rotary=attrs.evolve(parts.rotary, static_when=self._static(parts.rotary.path)))
        return attrs.evolve(policy, models=(parts,))

    def _static(self, path: str) -> frozenset[str]:
        """The rope types whose terms may be read from a table."""
        found = set()
        for name in rope_types():
            given = getattr(self.first.model.config.get_text_config(), "rope_parameters", None) or {}
            kept = {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if key in given}
            changes = {"rope_parameters": {**kept, "rope_type": name, **ROPE_PARAMETERS}}
            try:
                specimen = self.species.specimen(changes=changes)
                static = specimen.model.get_submodule(path).rope_type == name and is_static(specimen, path)
            # a type that this architecture does not have
            except (DsiError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):
                continue
            found |= {name} if static else set()
        self._say(
            f"rotary terms depend on the position alone for the rope types {', '.join(sorted(found)) or '(none)'}"
        )
        return frozenset(found)

    def _without_loop(self, policy: Policy, reason: str) -> Policy:
        self.unsure.append(f"the parts around the layers: generate runs transformers' loop, because {reason}")
        return policy

    def _context(self, rows: int | None) -> Any:
        if len(self.stacks) > 1:
            return None
        try:
            pad = getattr(self.first.model.config.get_text_config(), "pad_token_id", None)
            other = self.species.specimen(changes={"pad_token_id": (pad or 0) + 2})
            return find_context(self.first, other, self.stack, table_rows=rows)
        except DsiError:
            return None


def facts_rows(layer: Any, path: str) -> int:
    """Rows of a layer's table."""
    found = layer
    for name in path.split("."):
        found = getattr(found, name)
    return int(found.shape[0])


def _biased(parts: CausalLM) -> Iterator[CausalLM]:
    for rounded, scaled in itertools.product(("", "bfloat16"), (False, True)):
        yield attrs.evolve(parts, alibi=Alibi(rounded=rounded, scaled=scaled), context="")


def _kv_heads(sample: Sample) -> int:
    return sample.anatomy.count.kv_heads


def _reach(sample: Sample, call: LayerCalled) -> int | None:
    """How many positions the first one is felt in; None where in all."""
    attention = Attention(Replay(call), sample.anatomy.out)
    key = sample.anatomy.qkv[-1]
    felt = attention.felt(key, moved(position=0)).any(1).nonzero()
    length = call.hidden.shape[1]
    last = int(felt.max()) + 1 if felt.numel() else length
    return None if last >= length else last


def _name(layer: str) -> str:
    """Of the package that holds the layer class."""
    package = layer.partition(":")[0].split(".")
    return re.sub(r"\W", "_", package[-2] if len(package) > 1 else package[-1])


def _roles(anatomy: Anatomy) -> str:
    said = [f"{place} {path}" for place, (path, _) in anatomy.norms.items()]
    said += [f"qkv {', '.join(anatomy.qkv)}", f"out {anatomy.out}", f"MLP {', '.join(anatomy.mlp)} ({anatomy.form})"]
    return "; ".join(said)


def _requires() -> str:
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return f"transformers>={major}.{minor}"
