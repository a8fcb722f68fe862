"""The policies that are possible for a layer: what its anatomy says, with every answer to what that leaves open."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from dsi.drafting import facts
from dsi.drafting.calls import Convention
from dsi.drafting.facts import Sample
from dsi.errors import UnsupportedModelError
from dsi.policy import Block, Call, Config, Const, Fact, Policy

_ORDINARY = Const(False)


@attrs.frozen(kw_only=True, eq=False)
class Answers:
    """One answer to each open question.

    Args:
        layout: of a fused projection; "" where there is none.
        scale: where the factor of q.k is read.
        softcap: where the cap of the scores is read, or None.
        rope_pairs, add_to_normed, repeat_kv: see `dsi.containers`.
    """

    layout: str = ""
    scale: Fact
    softcap: Fact | None = None
    rope_pairs: bool = False
    add_to_normed: bool = False
    repeat_kv: bool = False

    def __str__(self) -> str:
        said = [f"scale={_short(self.scale)}"]
        said += [f"layout={self.layout}"] if self.layout else []
        said += [f"softcap={_short(self.softcap)}"] if self.softcap else []
        names = ("rope_pairs", "add_to_normed", "repeat_kv")
        return ", ".join([*said, *(name for name in names if getattr(self, name))])


def _short(fact: Fact) -> str:
    return repr(fact).replace("'", "")


@attrs.frozen(kw_only=True, eq=False)
class Known:
    """What needs no trial.

    Args:
        name: of the policy.
        layer: the class.
        samples: measured layers; the first is that of `convention`.
        convention: how the layer is called.
        settled: facts that are read the same way in every candidate.
        requires: PEP 508.
    """

    name: str
    layer: str
    samples: Sequence[Sample]
    convention: Convention
    settled: dict[str, Fact]
    requires: str

    @property
    def decodes(self) -> bool:
        """The layer takes a cache."""
        return bool(self.convention.call.cache)

    def candidates(self) -> Iterator[Answers]:
        """Every combination of answers, the likeliest first.

        Raises:
            UnsupportedModelError: nothing on layer or config could be the scale.
        """
        anatomy = self.samples[0].anatomy
        scales = facts.scales(self.samples)
        if not scales:
            raise UnsupportedModelError("no attribute of layer or config could be what q.k is multiplied by")
        caps = [None, *facts.caps(self.samples)]
        turned = (False, True) if self.convention.rotary else (False,)
        chained = anatomy.pre_norm and not (anatomy.parallel or "norm_attn_out" in anatomy.norms)
        normed = (False, True) if chained and anatomy.form != "keep" else (False,)
        layouts = self._layouts()
        # the last changes fastest
        for cap, normed_sum, scale, pairs, layout in itertools.product(caps, normed, scales, turned, layouts):
            yield Answers(layout=layout, scale=scale, softcap=cap, rope_pairs=pairs, add_to_normed=normed_sum)

    def _layouts(self) -> tuple[str, ...]:
        found = [set(sample.anatomy.layouts) for sample in self.samples]
        return tuple(one for one in self.samples[0].anatomy.layouts if all(one in other for other in found)) or ("",)

    def policy(self, answers: Answers, **differences: Any) -> Policy:
        """The policy with these answers.

        Args:
            answers: to the open questions.
            differences: facts that are read elsewhere than `settled` says, and `attention`.
        """
        anatomy = self.samples[0].anatomy
        call = self.convention.call
        if "attention" in differences:
            call = attrs.evolve(call, attention=differences.pop("attention"))
        read: dict[str, Fact] = {**self.settled, "scale": answers.scale, **differences}
        if answers.softcap is not None:
            read["softcap"] = answers.softcap
        flags = ("rope_pairs", "add_to_normed", "repeat_kv")
        read |= {name: Const(True) for name in flags if getattr(answers, name)}
        block = Block(
            layer=self.layer,
            container=f"dsi.containers:{'DecoderLayer' if self.decodes else 'EncoderLayer'}",
            call=call,
            slots=anatomy.slots(answers.layout),
            facts={name: read[name] for name in _ORDER if name in read},
        )
        return Policy(name=self.name, requires=(self.requires,), blocks=(block,))


_ORDER = (
    *("heads", "kv_heads", "head_dim", "scale", "layer_idx", "activation", "pre_norm", "parallel", "causal", "window"),
    *("softcap", "rope_pairs", "biased", "repeat_kv", "add_to_normed"),
)

__all__ = ["Answers", "Call", "Config", "Known"]
