"""What each module of a layer is for, found by what reads what it writes; no name is looked at.

out         the first linear layer that reads what positions have mixed
q, k, v     the linear layers on which that depends: see `dsi.drafting.heads`
norms       by what they read and who reads them
up, down    the linear layers left; with three, the gate is the one that is not simply multiplied
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from dsi.containers.activations import ACTIVATIONS
from dsi.drafting.heads import Attention, HeadCount, count_separate, read_fused, tell_apart
from dsi.drafting.linears import LinearKind, read_linear
from dsi.drafting.norms import NormKind, read_norm
from dsi.drafting.replay import LayerCalled, Replay, Run, noise, same
from dsi.errors import UnsupportedModelError
from dsi.policy import Concat, Keep, Linear, Packed, Slot


@attrs.frozen(kw_only=True, eq=False)
class Anatomy:
    """What a layer is made of.

    Args:
        norms: place -> (path, kind).
        qkv: paths of q, k and v, or of the one fused projection.
        layouts: of the fused projection, those that fit; () where there are three.
        out: path of the output projection.
        mlp: paths of (up, down), (gate, up, down), (fused gate and up, down), or of the one module that is kept.
        form: "up", "gate", "fused" or "keep".
        linears: path -> kind.
        count: the attention's sizes.
        pre_norm, parallel: see `dsi.containers`.
        activation: canonical kinds that the MLP may use.
        attention_module: path of the module around the attention.
    """

    norms: dict[str, tuple[str, NormKind]]
    qkv: tuple[str, ...]
    layouts: tuple[str, ...]
    out: str
    mlp: tuple[str, ...]
    form: str
    linears: dict[str, LinearKind]
    count: HeadCount
    pre_norm: bool
    parallel: bool
    activation: tuple[str, ...]

    def slots(self, layout: str = "") -> dict[str, Slot]:
        """Place -> slot, in the order of the computation."""
        norm = {place: kind.slot(path) for place, (path, kind) in self.norms.items()}
        kind = self.linears[self.qkv[0]].options
        qkv: Slot
        if len(self.qkv) == 1:
            qkv = Packed(self.qkv[0], layout=layout or self.layouts[0], split="column", **kind)  # type: ignore[arg-type]
        else:
            qkv = Concat(*self.qkv, split="column", **kind)
        out = Linear(self.out, split="row", **self.linears[self.out].options)
        found: dict[str, Slot | None]
        found = {"norm_attn": norm.get("norm_attn"), "qkv": qkv, "q_norm": norm.get("q_norm")}
        found |= {"k_norm": norm.get("k_norm"), "out": out, "norm_attn_out": norm.get("norm_attn_out")}
        found |= {"norm_mlp": norm.get("norm_mlp"), **self._mlp_slots(), "norm_mlp_out": norm.get("norm_mlp_out")}
        return {place: slot for place, slot in found.items() if slot is not None}

    def _mlp_slots(self) -> dict[str, Slot]:
        if self.form == "keep":
            return {"mlp": Keep(self.mlp[0])}
        *into, last = self.mlp
        kind = self.linears[into[0]].options
        down = Linear(last, split="row", **self.linears[last].options)
        if self.form == "gate":
            return {"gate_up": Concat(*into, split="column", **kind), "down": down}
        if self.form == "fused":
            return {"gate_up": Packed(into[0], layout="halves", split="column", **kind), "down": down}
        return {"up": Linear(into[0], split="column", **kind), "down": down}


def read_anatomy(call: LayerCalled) -> Anatomy:
    """The anatomy of a layer, by a call of it without padding and without a cache.

    Raises:
        UnsupportedModelError: it is built in a way that no container is; the message says what was found.
    """
    return _Reader(call).read()


class _Reader:
    def __init__(self, call: LayerCalled) -> None:
        layer = call.layer
        self.replay = Replay(call)
        self.run: Run = self.replay.base
        self.hidden = call.hidden
        self.modules = {p: m for p, m in layer.named_modules() if any(x is not None for x in m._parameters.values())}
        kinds = {path: read_norm(module) for path, module in self.modules.items()}
        self.norms: dict[str, NormKind] = {path: kind for path, kind in kinds.items() if kind is not None}
        linears = {p: read_linear(m, self.run, p) for p, m in self.modules.items() if p not in self.norms}
        self.linears: dict[str, LinearKind] = {path: kind for path, kind in linears.items() if kind is not None}

    def read(self) -> Anatomy:
        self._check_all_ran()
        out, qkv = self._attention()
        attention = Attention(self.replay, out)
        layouts: tuple[str, ...] = ()
        if len(qkv) == 1:
            count, layouts = read_fused(attention, qkv[0])
        else:
            qkv = tell_apart(attention, qkv)
            count = count_separate(attention, qkv[1], qkv[2])
            self._check_kinds(qkv)
        mlp, form = self._mlp({*qkv, out})
        places, pre_norm, parallel = self._place_norms(qkv, out, mlp)
        return Anatomy(
            norms=places,
            qkv=qkv,
            layouts=layouts,
            out=out,
            mlp=mlp,
            form=form,
            linears=self.linears,
            count=count,
            pre_norm=pre_norm,
            parallel=parallel,
            activation=self._activation(mlp, form),
        )

    def _check_all_ran(self) -> None:
        idle = [path for path in (*self.norms, *self.linears) if path not in self.run.inputs]
        if idle:
            raise UnsupportedModelError(f"{', '.join(idle)} took no part in a plain call of the layer")
        if not self.linears:
            raise UnsupportedModelError("the layer has no linear layers")

    def _check_kinds(self, paths: tuple[str, ...]) -> None:
        kinds = {(self.linears[p].transposed, self.linears[p].cls) for p in paths}
        if len(kinds) > 1:
            raise UnsupportedModelError(f"{', '.join(paths)} hold their weights in different ways")

    # --- attention ------------------------------------------------------------------------------------------------

    def _attention(self) -> tuple[str, tuple[str, ...]]:
        """(the output projection, the projections into the attention)."""
        other = self.hidden.clone()
        other[:, 0] += noise(other[:, 0])
        moved = self.replay.run(hidden=other)
        order = [path for path in self.run.order if path in self.linears]
        mixing = [p for p in order if not same(moved.inputs[p][:, 1:], self.run.inputs[p][:, 1:])]
        if not mixing:
            raise UnsupportedModelError("no linear layer reads what positions have mixed: this is no attention layer")
        out = mixing[0]
        before = [path for path in order if path not in mixing]
        qkv = tuple(p for p in before if self._feeds(p, out))
        if len(qkv) not in (1, 3):
            raise UnsupportedModelError(
                f"{out} reads what depends on {len(qkv)} linear layers ({', '.join(qkv)}); known are three (q, k, v) "
                "and one fused"
            )
        return out, qkv

    def _feeds(self, path: str, reader: str) -> bool:
        run = self.replay.run({path: lambda x: x + noise(x)})
        return not same(run.inputs[reader], self.run.inputs[reader])

    # --- MLP ------------------------------------------------------------------------------------------------------

    def _mlp(self, taken: set[str]) -> tuple[tuple[str, ...], str]:
        rest = [path for path in self.modules if path not in self.norms and path not in taken]
        if not all(path in self.linears for path in rest) or len(rest) > 3:
            return self._kept(rest), "keep"
        reads = {p: [q for q in rest if q != p and self._feeds(q, p)] for p in rest}
        last = [path for path in rest if len(reads[path]) == len(rest) - 1]
        if len(rest) not in (2, 3) or len(last) != 1:
            raise UnsupportedModelError(f"the linear layers left, {', '.join(rest) or 'none'}, make no MLP")
        down, into = last[0], [path for path in rest if path not in last]
        if len(into) == 2:
            return (*self._gate_first(into, down), down), "gate"
        fused = self.linears[into[0]].rows == 2 * self.linears[down].columns
        return (into[0], down), "fused" if fused else "up"

    def _gate_first(self, into: list[str], down: str) -> list[str]:
        """The gate, then what is multiplied by it: the one whose sign is that of the product."""
        before = self.run.inputs[down]
        signed = [p for p in into if same(self.replay.run({p: torch.neg}).inputs[down], -before)]
        if len(signed) != 1:
            raise UnsupportedModelError(f"{' and '.join(into)} are no gate and what it is multiplied with")
        self._check_kinds(tuple(into))
        return [*(path for path in into if path not in signed), *signed]

    def _kept(self, rest: list[str]) -> tuple[str, ...]:
        """The one child of the layer that holds all that is left."""
        tops = {path.partition(".")[0] for path in rest}
        if tops != {"mlp"}:
            raise UnsupportedModelError(
                f"{', '.join(sorted(rest))[:200]}: no plain MLP, and a module is kept as it is only under the name mlp"
            )
        return ("mlp",)

    def _activation(self, mlp: tuple[str, ...], form: str) -> tuple[str, ...]:
        if form == "keep":
            return ()
        first, wanted = self.run.outputs[mlp[0]], self.run.inputs[mlp[-1]]
        times: Tensor | float = 1.0
        if form == "gate":
            times = self.run.outputs[mlp[1]]
        elif form == "fused":
            first, times = first.chunk(2, dim=-1)
        found = tuple(name for name, act in ACTIVATIONS.items() if same(act(first) * times, wanted))
        if not found:
            raise UnsupportedModelError(
                f"what {mlp[-1]} reads is none of {', '.join(ACTIVATIONS)} of {mlp[0]}'s output"
                + (" (gate first, then up)" if form == "fused" else "")
            )
        return found

    # --- norms ----------------------------------------------------------------------------------------------------

    def _place_norms(
        self, qkv: tuple[str, ...], out: str, mlp: tuple[str, ...]
    ) -> tuple[dict[str, tuple[str, NormKind]], bool, bool]:
        """(place -> norm, pre_norm, parallel)."""
        run, places = self.run, self._head_norms(qkv)
        read, mlp_read, mlp_wrote = run.inputs[qkv[0]], run.inputs[mlp[0]], run.outputs[mlp[-1]]
        pre_norm = not same(read, self.hidden)
        if pre_norm:
            places["norm_attn"] = self._norm("before the attention", outputs=read)
            alone = same(mlp_read, read)
            if not alone:
                places["norm_mlp"] = self._norm("before the MLP", outputs=mlp_read)
            parallel = alone or same(run.inputs[places["norm_mlp"]], self.hidden)
            places |= self._found("norm_attn_out", inputs=run.outputs[out])
            places |= self._found("norm_mlp_out", inputs=mlp_wrote)
        else:
            parallel = same(mlp_read, self.hidden)
            places["norm_attn"] = self._norm("after the attention", outputs=mlp_read)
            places["norm_mlp"] = self._norm("after the MLP", outputs=run.result)
        left = [path for path in self.norms if path not in places.values()]
        if left:
            raise UnsupportedModelError(f"the norms {', '.join(left)} stand where no container has one")
        return {place: (path, self.norms[path]) for place, path in places.items()}, pre_norm, parallel

    def _norm(self, where: str, **ends: Tensor) -> str:
        found = self._found("it", **ends)
        if not found:
            raise UnsupportedModelError(f"no norm that dsi knows stands {where}")
        return found["it"]

    def _found(self, place: str, **ends: Tensor) -> dict[str, str]:
        """The norm that reads or writes these numbers, under the name of a place."""
        ((side, wanted),) = ends.items()
        run = self.run.inputs if side == "inputs" else self.run.outputs
        found = next((path for path in self.norms if same(run.get(path), wanted)), "")
        return {place: found} if found else {}

    def _head_norms(self, qkv: tuple[str, ...]) -> dict[str, str]:
        """The norms that read single heads of q and k."""
        if len(qkv) != 3:
            return {}
        found = {}
        for place, path in zip(("q_norm", "k_norm"), qkv, strict=False):
            wrote = self.run.outputs[path].flatten().sort().values
            for norm in self.norms:
                read = self.run.inputs.get(norm)
                if read is not None and read.dim() == 4 and same(read.flatten().sort().values, wrote):
                    found[place] = norm
        return found


def same_shape(one: Any, other: Any) -> bool:
    """Whether two anatomies differ in sizes alone."""
    parts = ("norms", "qkv", "out", "mlp", "form", "pre_norm", "parallel")
    return all(getattr(one, part) == getattr(other, part) for part in parts)
