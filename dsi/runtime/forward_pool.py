"""The forward graphs of one model, by the structure of the arguments: the latest, and none of a model that changed."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsi.containers.launches import graph_kernels
from dsi.containers.shared_products import shared_products
from dsi.errors import UnsupportedModelError
from dsi.runtime.capture import end_failed_capture
from dsi.runtime.forward_graph import MASK, Flags, ForwardGraph, Inputs, flags_of, mask_of
from dsi.runtime.model_parts import Choices, ModelParts
from dsi.runtime.trees import tensors, without_numbers
from dsi.runtime.unpadded import Unpadded, bucket, packs, worth_packing

logger = logging.getLogger(__name__)

# graphs, and structures of arguments that are remembered, of one model
KEPT, REMEMBERED = 24, 512
# values of a plain number among the arguments that get graphs of their own; a number that is another with every call
# gets none beyond
NUMBERS = 8
# part of the device's memory that captures may take before all are dropped
PART = 1 / 8
# milliseconds from which a forward is no matter of the host any more, unless the host took as long itself: a prompt of
# 128 tokens through 7B's layers took 17.6 ms, of which the device worked 5 (H200 machine)
LONGEST = 12.0
# how much longer than the host a forward of up to so many milliseconds may take to be the host's matter; beyond, it was
# a compiler's
WAITING, COMPILING = 1.1, 100.0


class NoGraph(Exception):
    """A call runs without a graph; the message says why."""


class Later(NoGraph):
    """A later call of the same structure may be a graph; this one launches what that graph will hold."""


class Anew(Later):
    """All graphs were dropped; the next call makes new ones."""


class Unlaunched(NoGraph):
    """What a graph would hold cannot be launched, or the call is wrong."""


class BadIds(Exception):
    """An id is out of range."""


class ForwardPool:
    """Graphs of a model's forward.

    Args:
        model: the model.
        vocab: rows of its token embedding, or None.
        required: every structure gets a graph at once, or an error says why not.
    """

    def __init__(self, model: nn.Module, vocab: int | None, *, required: bool) -> None:
        self.required, self.vocab = required, vocab
        self.device = next(model.parameters()).device
        self.lock = threading.RLock()
        self._look_at(model)
        self.packing = False
        self._padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._call: Callable[..., Any] = type(model).forward
        self._model = model
        self._inputs: dict[Any, Inputs] = {}
        self._graphs: OrderedDict[Any, ForwardGraph] = OrderedDict()
        self._guess: dict[Any, Any] = {}
        self._seen: OrderedDict[Any, Any] = OrderedDict()
        # values of numbers, by the structure without them
        self._numbers: OrderedDict[Any, set[Any]] = OrderedDict()
        # kinds of structures whose kernels are compiled
        self._compiled: set[Any] = set()
        self._failed: dict[Any, str] = {}
        self._memory: Any = None
        self._reserved = 0

    def _look_at(self, model: nn.Module) -> None:
        """What a change of the model is seen by, and what its graphs have in common, as it is now."""
        self._products = shared_products(model)
        for product in self._products:
            product.gather()
        self.parts, self.choices = ModelParts(model), Choices(model)
        self.unpadded = Unpadded(self.parts)
        self._masks = packs(model)

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Any, given: Mapping[str, Any]) -> Any:
        """The forward's result, from a graph.

        Args:
            key: the structure of the arguments.
            given: arguments by name.

        Raises:
            Later: this call must run without, by `launch`.
            NoGraph: this call must run without.
            BadIds: an id is out of range.
        """
        try:
            return self._run(key, given)
        except Anew:
            if not self.required:
                raise
            return self._run(key, given)

    def _run(self, key: Any, given: Mapping[str, Any]) -> Any:
        if reason := self.parts.busy() or self._failed.get(key, ""):
            raise NoGraph(reason)
        inputs = self._inputs.get(key)
        if inputs is None:
            self._need_few_numbers(key)
            self._need_twice(key)
            inputs = self._made(key, given)
        inputs.fill(given)
        guess = self._graphs.get((key, self._guessed(key, given)))
        if guess is None:
            inputs.look()
        else:
            guess.replay()
        self._check_parts()
        flags = inputs.flags()
        if flags.bad:
            inputs.done()
            raise BadIds
        form = self._form(key, inputs.mask, inputs.arguments(), flags)
        graph = self._graphs.get((key, form))
        if graph is None:
            graph = self._captured(key, form, inputs)
        seen = mask_of(given)
        self._guess[key] = form, None if seen is None else weakref.ref(seen)
        self._graphs.move_to_end((key, form))
        if graph is not guess:
            graph.replay()
        self.packing = isinstance(form, int)
        result = graph.copied()
        inputs.done()
        return result

    def launch(self, key: Any, given: Mapping[str, Any]) -> Any:
        """As a graph's replay, launch by launch: the same kernels in the same form, so the same bits.

        Args:
            key: the structure of the arguments.
            given: arguments by name; ids are in range.

        Raises:
            Unlaunched: it failed; where torch's own launches do not, tell `remember`.
        """
        try:
            return self._launched(key, given)
        # whatever a compiler or a launcher raises, and the model itself: it will once more where it is at fault
        except Exception as error:
            raise Unlaunched(f"launching a forward's kernels failed: {error}") from error

    def remember(self, key: Any, error: NoGraph) -> None:
        """The structure's calls run without a graph from now on, where launching what it would hold failed."""
        if isinstance(error, Unlaunched):
            self._failed[key] = str(error)
            logger.warning("%s", error)

    def _launched(self, key: Any, given: Mapping[str, Any]) -> Any:
        self._outdated()
        names, mask = _structure(key), mask_of(given) if self._masks else None
        # nothing begins early: weights may change between two launches that no graph holds
        with torch.no_grad(), graph_kernels(dependent=False):
            self._compile(names, given)
            form = "plain" if mask is None else self._form(key, mask, given, flags_of(mask))
            run = self._forward_of(form, names, given)
            self.packing = isinstance(form, int)
            result = self._time(key, run)
        self.choices.settle()
        return result

    def _compile(self, names: Any, given: Mapping[str, Any]) -> None:
        """What a structure of another size may need compiled, all at once."""
        from dsi_kernels import compile_ahead

        # settings go by powers of two, and code by whether sizes are multiples of 16
        sizes = [(x.dtype, x.numel().bit_length(), [size % 16 == 0 for size in x.shape]) for x in tensors(given)]
        kind = names, str(sizes)
        if kind not in self._compiled:
            self._compiled.add(kind)
            compile_ahead(lambda: self._stock(given), self.device)

    # --- which graph ------------------------------------------------------------------------------------------

    def _guessed(self, key: Any, given: Mapping[str, Any]) -> Any:
        """The form of the structure's latest call; of a packed one, which another mask would have run twice, only where
        the mask is the very tensor of that call.
        """
        form, mask = self._guess.get(key, (None, None))
        same = isinstance(form, str) or (mask is not None and mask() is mask_of(given))
        return form if same else None

    def _form(self, key: Any, mask: Tensor | None, given: Mapping[str, Any], flags: Flags) -> Any:
        """ "full", a mask that hides nothing and is left out; rows of a packed forward; or "plain"."""
        if mask is None:
            return "plain"
        names = _structure(key)
        if flags.visible == mask.numel():
            with torch.no_grad(), graph_kernels(dependent=False):
                same = self.unpadded.maskless(self._stock, given, names, self._padding)
            return "full" if same else "plain"
        rows = bucket(flags.visible, mask.numel())
        if flags.hidden or not worth_packing(rows, mask.numel()):
            return "plain"
        if not self.unpadded.tried(names):
            with torch.no_grad(), graph_kernels(dependent=False):
                self.unpadded.try_packing(self._stock, given, rows, names)
        return rows if self.unpadded.stops(names) else "plain"

    def _stock(self, given: Mapping[str, Any]) -> Any:
        return self._call(self._model, **given)

    def _forward_of(self, form: Any, names: Any, given: Mapping[str, Any]) -> Callable[[], Any]:
        if form == "plain":
            return lambda: self._stock(given)
        if form == "full":
            return lambda: self._stock({**given, MASK: None})
        return lambda: self.unpadded.packed(self._stock, given, form, names)

    # --- making and dropping ----------------------------------------------------------------------------------

    def _need_few_numbers(self, key: Any) -> None:
        """Nothing, where a number among the arguments is not another with every call."""
        loose = without_numbers(key)
        if loose == key:
            return
        values = self._numbers.setdefault(loose, set())
        self._numbers.move_to_end(loose)
        if len(self._numbers) > REMEMBERED:
            self._numbers.popitem(last=False)
        if len(values) >= NUMBERS and key not in values:
            raise Later("a number among the arguments changes from call to call; pass it as a tensor")
        values.add(key)

    def _need_twice(self, key: Any) -> None:
        """Nothing, from the second call of a structure on, where the device does not take long for it."""
        if self.required:
            return
        times = self._seen.pop(key, None)
        if times is not None:
            start, end, host = times
            end.synchronize()
            took = start.elapsed_time(end)
            if took < max(LONGEST, min(WAITING * host, COMPILING)):
                return
        raise Later("the first call of this structure" if times is None else "the device is the limit")

    def _time(self, key: Any, call: Callable[[], Any]) -> Any:
        """A call without a graph, whose time says whether the next shall have one."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        result = call()
        host = 1e3 * (time.perf_counter() - began)
        end.record()
        self._seen[key] = start, end, host
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return result

    def _made(self, key: Any, given: Mapping[str, Any]) -> Inputs:
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
            self._reserved = torch.cuda.memory_reserved(self.device)
        inputs = self._attempt(key, lambda: self._filled(key, given))
        self._inputs[key] = inputs
        return inputs

    def _filled(self, key: Any, given: Mapping[str, Any]) -> Inputs:
        inputs = Inputs(given, self.vocab, self.device, self._memory, masks=self._masks)
        if self._products:
            with torch.no_grad(), graph_kernels(dependent=False):
                self._compile(_structure(key), given)
        inputs.hold(self._products, self._forward_of("plain", _structure(key), inputs.arguments()))
        return inputs

    def _captured(self, key: Any, form: Any, inputs: Inputs) -> ForwardGraph:
        run = self._forward_of(form, _structure(key), inputs.arguments())
        graph = self._attempt(key, lambda: ForwardGraph(run, inputs, self._memory))
        self.choices.settle()
        self._graphs[key, form] = graph
        if len(self._graphs) > KEPT:
            # it may be running
            torch.cuda.synchronize(self.device)
            (old, _), _ = self._graphs.popitem(last=False)
            if not any(one == old for one, _ in self._graphs):
                self._inputs.pop(old).let_go()
                self._guess.pop(old, None)
        return graph

    def _attempt(self, key: Any, make: Callable[[], Any]) -> Any:
        try:
            self._check_memory()
            return make()
        except NoGraph:
            raise
        # whatever a capture, a compiler or a launcher raises: a forward without a graph is right
        except Exception as error:
            end_failed_capture(self.device)
            memory = isinstance(error, torch.OutOfMemoryError)
            reason = f"no memory for a forward graph: {error}" if memory else f"capturing a forward failed: {error}"
            if memory:
                self.drop()
            else:
                self._failed[key] = reason
                self._forget(key)
            logger.warning("%s", reason)
            raise NoGraph(reason) from error

    def _check_memory(self) -> None:
        total = torch.cuda.mem_get_info(self.device)[1]
        if torch.cuda.memory_reserved(self.device) - self._reserved > PART * total:
            self.drop()
            raise Anew("graphs took too much memory, and are made anew")

    def _check_parts(self) -> None:
        if reason := self._outdated():
            raise Anew(f"graphs are made anew: {reason}")

    def _outdated(self) -> str:
        """What of the model is another than it was, or ""; graphs of what it was go."""
        reason = self.parts.changed() or self.choices.changed()
        if reason:
            self.drop()
            self._look_at(self._model)
        return reason

    def _forget(self, key: Any) -> None:
        if (inputs := self._inputs.pop(key, None)) is not None:
            inputs.let_go()
        for pair in [pair for pair in self._graphs if pair[0] == key]:
            del self._graphs[pair]

    def drop(self) -> None:
        """All graphs and their memory go."""
        if self._inputs:
            # they may be running
            torch.cuda.synchronize(self.device)
        for inputs in self._inputs.values():
            inputs.let_go()
        self._inputs.clear()
        self._graphs.clear()
        self._guess.clear()
        self._memory = None


def _structure(key: Any) -> Any:
    """Names of the arguments of a key, and what those are that are no tensors."""
    return tuple((name, one if isinstance(one[0], type) else one[1]) for name, one in key[-1])


def refuse(reason: str) -> UnsupportedModelError:
    """The error of a model whose graphs are required, and cannot be."""
    return UnsupportedModelError(
        f"enable_cuda_graph=True, and this call cannot be a graph: {reason}",
        hint="enable_cuda_graph=None lets such calls run without one",
    )
