"""dsi's decode loop: greedy search and sampling, token for token what transformers' `_sample` does.

The prompt goes through the model's own forward, which fills a preallocated cache; each token after it takes one `Step`.
The order of what happens to a token is stock's: float32 scores, processors, choice, padding of finished rows, criteria,
streamer.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from dsi.runtime.alibi import places_of
from dsi.runtime.graph_run import GraphRun, Text, graph_obstacle
from dsi.runtime.kv_cache import RESERVE, PreallocatedLayer, preallocate_
from dsi.runtime.prompt_start import PromptStart
from dsi.runtime.route import cache_reason, window_reason
from dsi.runtime.sampling import Sampling, known_sampling
from dsi.runtime.session import Route, Session, session_of
from dsi.runtime.sliding_window import windows


def fast_sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Takes the place of `_sample`, with its arguments and results.

    Where the prepared inputs turn out to be of a kind that it does not know, stock's loop runs, and `last_route` says
    why.
    """
    session = session_of(model)
    if reason := _obstacle(session, input_ids, generation_config, model_kwargs):
        session.last_route = Route(False, reason)
        given = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        return type(model)._sample(model, *given, **model_kwargs)
    # only the criteria needed it, and the model's layers would take it for an argument of theirs
    model_kwargs.pop("tokenizer", None)
    loop = _Loop(model, session, input_ids, generation_config, model_kwargs)
    ending = _Ending(stopping_criteria, generation_config, input_ids)
    # events and captures belong to the current device
    with torch.cuda.device(input_ids.device) if input_ids.is_cuda else nullcontext():
        logits = loop.prefill(input_ids)
        with model._optimize_model_for_decode():
            return loop.run(input_ids, logits, logits_processor, ending, streamer)


def _obstacle(session: Session, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> str:
    """Why these prepared inputs need stock's loop, or ""."""
    cache, mask, positions = (model_kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
    assert session.runner is not None
    if generation_config.num_beams not in (None, 1):
        return f"num_beams={generation_config.num_beams}"
    if cache is None or (reason := cache_reason(cache)):
        return "there is no cache" if cache is None else reason
    if len(cache.layers) not in (0, session.runner.layers):
        return f"the cache has {len(cache.layers)} layers"
    if mask is not None and mask.dim() != 2:
        return f"a mask of {mask.dim()} dimensions"
    if session.runner.placed and (positions is None or positions.dim() != 2):
        return "position_ids are not [batch, length]"
    prompt = model_kwargs.get("inputs_embeds", input_ids)
    past, length = cache.get_seq_length(), prompt.shape[1]
    seen = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", length)
    # the prompt is the whole text or, beside a longer mask, what is new of it
    if not (past < length == seen or seen == past + length):
        return f"{past} positions in the cache, {length} given, and a mask of {seen}"
    return window_reason(session.runner.windows, windows(cache)) or _own_method_obstacle(session, generation_config)


def _own_method_obstacle(session: Session, generation_config: Any) -> str:
    """Why the text may grow past what the model's own methods share with transformers', or ""."""
    assert session.runner is not None
    for name, limit in session.runner.own_methods().items():
        # the last token is not fed
        if limit is not None and generation_config.max_length - 1 > limit:
            return f"the model's own {name} does more from {limit + 1} positions on"
    return ""


@attrs.define(slots=True)
class _Record:
    """What `return_dict_in_generate` asks for."""

    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None

    def add(self, scores: Tensor, logits: Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)


class _Loop:
    """One call: the prompt's forward, then a step a token."""

    def __init__(
        self, model: Any, session: Session, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> None:
        assert session.runner is not None
        self.model, self.session, self.settings, self.inputs = model, session, generation_config, model_kwargs
        self.new = generation_config.max_length - input_ids.shape[1]
        self.cache = model_kwargs["past_key_values"]
        self.own_cache = session.own_cache is self.cache
        self.graph: GraphRun | None = None
        self.sampling: Sampling | None = None
        # a dynamic cache of the user's becomes preallocated in place: its owner sees what is generated
        preallocate_(self.cache, input_ids.shape[1] + min(self.new, RESERVE), session.runner.layers)
        self.positions = self._first_position(model_kwargs.get("position_ids"), input_ids.shape[0])

    def _first_position(self, given: Tensor | None, rows: int) -> Tensor | int:
        """The position after the prompt: an int where it is the same for all rows, else int64 [B, 1]."""
        assert self.session.runner is not None
        if given is None:
            self.reach = 0
            self.step = self.session.runner.bind(0)
            return 0
        last = given[:, -1].tolist()
        self.reach = max(last) + 1 + self.new
        self.step = self.session.runner.bind(self.reach)
        return last[0] + 1 if len(set(last)) == 1 else (given[:, -1:] + 1).expand(rows, 1).clone()

    def run(self, input_ids: Tensor, logits: Tensor, logits_processor: Any, ending: _Ending, streamer: Any) -> Any:
        """Tokens until the end, from the logits after the prompt on."""
        settings, wanted = self.settings, self.settings.return_dict_in_generate
        record = _Record(
            () if wanted and settings.output_scores else None, () if wanted and settings.output_logits else None
        )
        self.choose = _sampled if settings.do_sample else _greediest
        quiet = record.scores is None and record.logits is None and self.session.timer is None
        first = None
        if quiet and ending.plain and self._chains(logits_processor, logits):
            first = self.choose(logits_processor(input_ids, logits))
            self.graph = self._chain_of(input_ids, first, ending)
            if self.graph is not None:
                return self._finished(self._chained(input_ids, first, ending, streamer), record)
        elif self.new > 1:
            self.graph = self._graph_run(ending, _greediest(logits))
        input_ids = self._stepwise(input_ids, logits, logits_processor, ending, streamer, record, first)
        return self._finished(input_ids, record)

    def _stepwise(
        self, input_ids: Tensor, logits: Tensor, logits_processor: Any, ending: _Ending, streamer: Any,
        record: _Record, first: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """A token after the other, each chosen here; `first` where the first was chosen before."""
        try:
            return self._one_by_one(input_ids, logits, logits_processor, ending, streamer, record, first)
        finally:
            # whoever breaks off may have brought the cache
            if self.graph is not None:
                self.graph.settle()

    def _one_by_one(
        self, input_ids: Tensor, logits: Tensor, logits_processor: Any, ending: _Ending, streamer: Any,
        record: _Record, first: Tensor | None,
    ) -> Tensor:  # fmt: skip
        timed = nullcontext if self.session.timer is None else self.session.timer.decode
        while True:
            scores = logits_processor(input_ids, logits)
            record.add(scores, logits)
            tokens, first = ending.pad(self.choose(scores) if first is None else first), None
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            finished = ending.reached(input_ids, tokens, record.scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if finished:
                break
            with timed():
                logits = self._decode(tokens)
        if streamer is not None:
            streamer.end()
        return input_ids

    # --- on CUDA, in graphs -----------------------------------------------------------------------------------

    def _chains(self, logits_processor: Any, logits: Tensor) -> bool:
        """Whether a graph may choose the tokens itself; `sampling` says how."""
        if self.session.graphs is None or self.new < 2:
            return False
        self.sampling = known_sampling(logits_processor, logits, sampled=bool(self.settings.do_sample))
        return self.sampling is not None

    def _chain_of(self, input_ids: Tensor, first: Tensor, ending: _Ending) -> GraphRun | None:
        assert self.sampling is not None
        seen = self.sampling.seen(torch.cat([input_ids, first[:, None]], dim=-1))
        return self._graph_run(ending, first, self.sampling, seen)

    def _graph_run(
        self, ending: _Ending, tokens: Tensor, sampling: Sampling | None = None, seen: Tensor | None = None
    ) -> GraphRun | None:
        """The steps to come as graphs; None where they cannot be. The session's route says which, and why not."""
        pool, runner = self.session.graphs, self.session.runner
        assert runner is not None
        if pool is None:
            return None
        reason = graph_obstacle(runner, self.cache, self.new)
        if not reason:
            end_ids = sorted(ending.end_ids) if ending.plain else []
            text = Text(
                positions=self.positions,
                reach=self.reach,
                slots=self.length + self.new,
                mask=self.mask,
                end_ids=end_ids,
                pad=ending.pad_id,
                sampling=sampling,
                seen=seen,
            )
            run = GraphRun(pool, self.model, runner, self.cache, text)
            if run.ready(tokens):
                self.session.last_route = Route(True, graph=True)
                return run
            reason = pool.reason
        self.session.last_route = Route(True, f"steps without a graph: {reason}")
        return None

    def _chained(self, input_ids: Tensor, tokens: Tensor, ending: _Ending, streamer: Any) -> Tensor:
        """Tokens, each step behind the last on the device; the host looks at what came one step later."""
        assert self.graph is not None
        last = self.new if ending.max_length is None else min(self.new, ending.max_length - input_ids.shape[1])
        watched = bool(ending.end_ids) or streamer is not None
        fed, waiting = 0, _Arrival(tokens) if watched else None
        for fed, chosen in enumerate(self.graph.chain(last - 1), start=1):
            if waiting is None:
                continue
            under_way = _Arrival(chosen)
            if self._ends(waiting, ending, streamer, fed - 1):
                # the step that was just launched is beyond the end
                fed, waiting = fed - 1, None
                self.graph.take_back_noise()
                break
            waiting = under_way
        if waiting is not None:
            self._ends(waiting, ending, streamer, fed)
        self.graph.settle(fed)
        self.graph.check_choices()
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, self.graph.tokens()[:, : 1 + fed]], dim=-1)

    def _ends(self, arrival: _Arrival, ending: _Ending, streamer: Any, fed: int) -> bool:
        """Whether the text ends with these tokens, before which so many were fed."""
        assert self.graph is not None
        try:
            return arrival.ends(ending, streamer)
        except BaseException:
            # a streamer breaks off: cache and random numbers are as stock's, which has not taken the next step
            if fed < self.graph.taken:
                self.graph.take_back_noise()
            self.graph.settle(fed)
            raise

    def _finished(self, input_ids: Tensor, record: _Record) -> Any:
        """What the caller gets."""
        return self._result(input_ids, record) if self._returned else input_ids

    def prefill(self, input_ids: Tensor) -> Tensor:
        """float32 logits [B, vocab] after the prompt, which fills the cache."""
        timed = nullcontext if self.session.timer is None else self.session.timer.prefill
        with timed():
            mask = self.inputs.get("attention_mask")
            ones = mask is None or bool((mask == 1).all())
            padded = mask is not None and not ones and not bool(mask.all())
            start = PromptStart(self.session, self.step, self.inputs, kept=self.own_cache, ones=ones)
            logits = start.logits(input_ids, padded=padded)
            if logits is None:
                logits = self._models_own(input_ids)
        self.layers: list[PreallocatedLayer] = self.cache.layers
        self.length = self.cache.get_seq_length()
        assert self.session.runner is not None
        self.mask = _future_mask(mask, self.length + self.new) if mask is not None and padded else None
        self.biases = self.session.runner.biases()
        if self.biases is not None and self.mask is not None:
            self.biases = self.biases._replace(mask=self.mask, places=places_of(self.mask))
        return logits

    def _models_own(self, input_ids: Tensor) -> Tensor:
        """float32 logits [B, vocab] of the model's own forward."""
        first = not self.settings.is_assistant
        outputs = self.model._prefill(input_ids, self.settings, self.inputs, is_first_iteration=first)
        assert outputs.past_key_values is self.cache, "the model gave back another cache"
        # a copy, not a view that keeps the logits of the whole prompt alive
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)

    @property
    def _returned(self) -> bool:
        """The caller gets the cache."""
        return bool(self.settings.return_dict_in_generate)

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.graph is not None:
            return self.graph.take(tokens)
        self.length += 1
        if self.biases is not None:
            mask: Tensor | None = self.biases.additive(self.layers[0].keys.dtype, self.length)
        else:
            mask = None if self.mask is None else self.mask.narrow(3, 0, self.length)
        logits = self.step(tokens[:, None], self.positions, self.layers, mask)
        # in place for a tensor, whose memory is this loop's own
        self.positions += 1
        return logits

    def _result(self, input_ids: Tensor, record: _Record) -> GenerateDecoderOnlyOutput:
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=record.scores, logits=record.logits, past_key_values=self.cache
        )


class _Arrival:
    """Tokens [B] or [B, 1] on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.host = torch.empty(tokens.numel(), dtype=tokens.dtype, pin_memory=True)
        self.host.copy_(tokens.reshape(-1), non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def ends(self, ending: _Ending, streamer: Any) -> bool:
        """Wait for them, and stream them; whether the text ends with them."""
        self.event.synchronize()
        if streamer is not None:
            # memory of their own, for a streamer that keeps them
            streamer.put(self.host.clone())
        return ending.all_ended(self.host)


def _greediest(scores: Tensor) -> Tensor:
    return torch.argmax(scores, dim=-1)


def _sampled(scores: Tensor) -> Tensor:
    probabilities = torch.nn.functional.softmax(scores, dim=-1)
    return torch.multinomial(probabilities, num_samples=1).squeeze(1)


def _future_mask(mask: Tensor, capacity: int) -> Tensor:
    """bool [B, 1, 1, capacity], True = attend: the prompt's mask, then only True."""
    future = torch.ones(mask.shape[0], 1, 1, capacity, dtype=torch.bool, device=mask.device)
    future[:, 0, 0, : mask.shape[1]] = mask
    return future


class _Ending:
    """Which rows are finished, and whether all are.

    Length and end tokens, which is all that most calls have, are decided on the host from the tokens themselves; any
    other criterion is asked, the way stock asks it.
    """

    def __init__(self, criteria: Any, generation_config: Any, input_ids: Tensor) -> None:
        self.criteria = criteria
        self.pad_id = generation_config._pad_token_tensor
        self.has_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
        self.plain = all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)
        self.running = [True] * input_ids.shape[0]
        if self.plain:
            self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
            ends = [c.eos_token_id.tolist() for c in criteria if type(c) is EosTokenCriteria]
            self.end_ids = frozenset(token for ids in ends for token in ids)

    def pad(self, tokens: Tensor) -> Tensor:
        """`tokens`, with padding in the rows that were finished before."""
        if not self.has_end or (self.plain and all(self.running)):
            return tokens
        return tokens * self.unfinished + self.pad_id * (1 - self.unfinished)

    def reached(self, input_ids: Tensor, tokens: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
        """Whether the text ends with these tokens."""
        if not self.plain:
            self.unfinished = self.unfinished & ~self.criteria(input_ids, scores)
            return bool(self.unfinished.max() == 0)
        too_long = self.max_length is not None and input_ids.shape[1] >= self.max_length
        return self.all_ended(tokens) or too_long

    def all_ended(self, tokens: Tensor) -> bool:
        """Whether every row has ended, with these tokens or before."""
        if not self.end_ids:
            return False
        running = [on and token not in self.end_ids for on, token in zip(self.running, tokens.tolist(), strict=True)]
        if running != self.running:
            self.running = running
            self.unfinished = torch.tensor(running, dtype=torch.long, device=self.unfinished.device)
        return not any(running)
