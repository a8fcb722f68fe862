"""Does the model split over ranks into parts that compute what the whole computes?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dsi import ranks
from dsi.errors import DsiError, RankError, SplitError
from dsi.parallel import LayerShard, assemble, split, thread_groups
from dsi.policy import Concat, Linear, Packed
from dsi.ranks import Answer, Ask
from dsi.testing.compare import distance, same_bits
from dsi.testing.report import Failed, Outcome, absent, failed, not_run, passed
from dsi.testing.subject import Subject, containers

SIZES = (2, 4)
NEW_TOKENS = 4
_WHOLE = "the policy splits no slot"
_SPLITS = "split qkv and up (or gate_up) by 'column', out and down by 'row', and name the layout of what is packed"


def _splits(subject: Subject) -> bool:
    slots = [slot for block in subject.policy.blocks for slot in block.slots.values()]
    return any(isinstance(slot, Linear | Concat | Packed) and slot.split != "none" for slot in slots)


def _shards(subject: Subject, size: int) -> Mapping[str, tuple[LayerShard, ...]]:
    return ranks.layer_shards(subject.stock(), subject.plan, size)


def _sizes(subject: Subject) -> tuple[list[int], str]:
    """The numbers of ranks that the config's sizes allow, and why not the others."""
    fitting, reason = [], ""
    for size in SIZES:
        try:
            _shards(subject, size)
        except SplitError as error:
            reason = f"; {error}"
        else:
            fitting.append(size)
    return fitting, reason


def tp_shards_reassemble(subject: Subject) -> Outcome:
    """The ranks' parts, by the rules and as the ranks hold them, make the whole layer, bit for bit."""
    if not _splits(subject):
        return absent(_WHOLE)
    sizes, reason = _sizes(subject)
    if not sizes:
        return not_run(f"the config's sizes split over neither 2 nor 4 ranks{reason}")
    for size in sizes:
        every = _shards(subject, size)
        held = list(_held(subject, size))
        for path, shards in every.items():
            stock = subject.stock().get_submodule(path).state_dict()
            _check_whole(f"{path} over {size} ranks", [split(stock, shard) for shard in shards], shards, stock)
            _check_whole(f"{path} as {size} ranks hold it", [one[path] for one in held], shards, stock)
    return passed(f"the parts of {', '.join(map(str, sizes))} ranks make the whole{reason}")


def _held(subject: Subject, size: int) -> Iterator[dict[str, dict[str, Tensor]]]:
    """By rank: layer path -> what the rank's container exports."""
    for group in thread_groups(size):
        engine = ranks.init_rank(subject.fresh(), group, strict=True, injection_policy=subject.policy)
        paths = [block.path for block in engine.plan.blocks]
        yield dict(zip(paths, (one.export() for one in containers(engine.module)), strict=True))


def _check_whole(
    what: str, parts: list[dict[str, Tensor]], shards: tuple[LayerShard, ...], stock: Mapping[str, Tensor]
) -> None:
    try:
        names = sorted({name for part in parts for name in part})
        # a container exports what it has fused; the rest is the stock layer's own
        pieces = [_only(shard, names) for shard in shards]
        whole = assemble(parts, pieces)
    except SplitError as error:
        raise Failed(f"{what}: {error}", measured="no partition", allowed="each row once", mend=_SPLITS) from error
    wrong = [name for name, tensor in whole.items() if not same_bits(tensor, stock[name])]
    if wrong:
        raise Failed(what, measured=f"{', '.join(wrong[:3])} differ", allowed="equal bits", mend=_SPLITS)


def _only(shard: LayerShard, names: list[str]) -> LayerShard:
    pieces = {name: piece for name, piece in shard.pieces.items() if name in names}
    return LayerShard(rank=shard.rank, size=shard.size, pieces=pieces, facts=shard.facts, sums=shard.sums)


def _ask(subject: Subject) -> Ask:
    padding: Any = "left" if subject.decodes else "ragged"
    return Ask(subject.inputs(2, 7, padding, seed=7), NEW_TOKENS if subject.decodes else 0)


def _check_answers(subject: Subject, answers: list[Answer], what: str) -> float:
    single, worst = _ask(subject)(subject.twins().engine), 0.0
    mend = "cut fused projections in each of their parts, add biases of row splits once; " + _SPLITS
    for rank, answer in enumerate(answers):
        share, place = distance(answer.outputs, single.outputs)
        same = (answer.tokens is None) == (single.tokens is None)
        if same and answer.tokens is not None and single.tokens is not None:
            same = answer.tokens.tolist() == single.tokens.tolist()
        if not share <= subject.tolerances.fp32 or not same:
            measured = f"{share:.3g} at {place}" if same else "other tokens"
            raise Failed(f"{what}, rank {rank}", measured=measured, allowed=subject.tolerances.fp32, mend=mend)
        worst = max(worst, share)
    return worst


def tp_equals_single(subject: Subject) -> Outcome:
    """Two and four ranks in lock step give what one gives, on every rank; greedy search too."""
    if not _splits(subject):
        return absent(_WHOLE)
    sizes, reason = _sizes(subject)
    if not sizes:
        return not_run(f"the config's sizes split over neither 2 nor 4 ranks{reason}")
    worst = 0.0
    for size in sizes:
        answers = ranks.lockstep(subject.fresh(), _ask(subject), size, injection_policy=subject.policy)
        worst = max(worst, _check_answers(subject, answers, f"{size} ranks in lock step"))
    what = f"{', '.join(map(str, sizes))} ranks in lock step equal one{reason}"
    return passed(what, measured=worst, allowed=subject.tolerances.fp32)


def tp_processes(subject: Subject) -> Outcome:
    """Two real processes that talk through gloo give what one gives."""
    if not _splits(subject):
        return absent(_WHOLE)
    size = SIZES[0]
    if size not in _sizes(subject)[0]:
        return not_run(f"the config's sizes do not split over {size} ranks{_sizes(subject)[1]}")
    registered = subject.name in subject.registry.policies
    policy: Any = subject.name if registered else subject.policy
    try:
        answers = ranks.gloo(subject.fresh(), _ask(subject), size, injection_policy=policy)
    except RankError as error:
        if "cannot be given" in str(error):
            return not_run(f"the policy cannot be given to another process: {error}")
        raise
    worst = _check_answers(subject, answers, f"{size} gloo processes")
    return passed(f"{size} gloo processes equal one", measured=worst, allowed=subject.tolerances.fp32)


def tp_indivisible_refused(subject: Subject) -> Outcome:
    """Numbers of ranks that do not divide the heads or the hidden units are refused by name; the model stays whole."""
    if not _splits(subject):
        return absent(_WHOLE)
    uneven = [size for size in (3, 5, 7, 64) if not _divides(subject, size)]
    for size in uneven:
        found = _refusal(subject, size)
        if found:
            return failed(
                f"{size} ranks",
                measured=found,
                allowed="SplitError with the sizes that do",
                mend="let a split that does not come out even be a SplitError: no rounding, no padding",
            )
    return passed(f"{', '.join(map(str, uneven))} ranks are refused")


def _refusal(subject: Subject, size: int) -> str:
    """What came of a number of ranks that does not divide, or "" where it was refused as it should be."""
    model = subject.fresh()
    try:
        ranks.init_rank(model, thread_groups(size)[0], strict=True, injection_policy=subject.policy)
    except SplitError as error:
        if "use" not in str(error):
            return f"no sizes that would do: {error}"
    except DsiError as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "accepted"
    return "half injected" if containers(model) else ""


def _divides(subject: Subject, size: int) -> bool:
    """Whether every unit that could be cut comes out even."""
    counts: set[int] = set()
    for block in subject.plan.blocks:
        counts |= {int(block.fit.facts[name]) for name in ("heads", "kv_heads") if name in block.fit.facts}
        for slot in block.slots:
            split_by = getattr(block.block.slots[slot.place], "split", "none")
            counts |= {slot.shape[0]} if split_by == "column" else {slot.shape[1]} if split_by == "row" else set()
    return all(count % size == 0 for count in counts)
