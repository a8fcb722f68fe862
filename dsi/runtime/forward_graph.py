"""A model's forward as CUDA graphs: those of one structure of arguments share the inputs, each has its own results.

A graph holds addresses, so arguments are copied in and results copied out: what a call returned stays what it is.
Beside the forward stands a graph of one kernel, which moves the ids into range and tells the host in one word whether
they were in it, and how much of the mask is padding (`dsi_kernels.input_flags`). The host launches the forward before
it reads the word wherever it can guess what the word will say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from dsi.containers.launches import graph_kernels
from dsi.runtime.capture import captured, nothing_waits
from dsi.runtime.trees import rebuilt, tensors

# times that the host looks for the word before it sleeps between two looks, and for how long then
LOOKS = 3000
PAUSE = 50e-6
IDS, MASK = "input_ids", "attention_mask"


@attrs.frozen
class Flags:
    """What the device found in a call's ids and mask.

    Args:
        bad: an id is out of range.
        hidden: the first position of some row is padding.
        visible: positions that are not padding.
    """

    bad: bool
    hidden: bool
    visible: int


def mask_of(given: Mapping[str, Any]) -> Tensor | None:
    """The mask of positions, [B, S], among a call's arguments; None where there is none of this form."""
    mask = given.get(MASK)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def flags_of(mask: Tensor) -> Flags:
    """What a mask says, by torch; waits for the device."""
    shown = mask != 0
    visible, starts = torch.stack([shown.sum(), shown[:, :1].sum()]).tolist()
    return Flags(False, starts < shown[:, :1].numel(), visible)


class ForwardGraph:
    """One captured forward.

    Args:
        run: the forward over static inputs.
        inputs: the static inputs.
        pool: of the allocator, shared by the graphs of one model.

    It looks at the inputs first, as `Inputs.look` does, and so spares a launch.
    """

    def __init__(self, run: Callable[[], Any], inputs: Inputs, pool: Any) -> None:
        self._inputs, self._tells = inputs, inputs.told
        self.graph, self.result = capture(partial(self._told, run), inputs.device, pool)
        if self._tells:
            inputs.count_anew()
        found = tensors(self.result)
        if any(tensor.device != inputs.device for tensor in found):
            raise RuntimeError("a result is not on the model's device")

    def _told(self, run: Callable[[], Any]) -> Any:
        if self._tells:
            self._inputs.tell()
        return run()

    def replay(self) -> None:
        """Compute the results anew."""
        self.graph.replay()
        self._inputs.count += self._tells

    def copied(self) -> Any:
        """The results, in memory of the caller's own."""
        return rebuilt(self.result, Tensor.clone)


def capture(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any]:
    """A graph of `run`, and what it returned: memory that each replay fills."""
    from dsi_kernels import compile_ahead

    # tensors made in inference mode could not be written to outside
    with torch.inference_mode(False), torch.no_grad():
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), graph_kernels():
            # all at once; what ran meanwhile ran on what the others would have written
            compile_ahead(run, device)
            # sets up what the libraries set up at their first call
            with nothing_waits():
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with captured(graph, pool, stream), graph_kernels():
            result = run()
    return graph, result


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


class Inputs:
    """The static arguments of one structure, and the word that tells of them.

    Args:
        given: arguments by name, as `dsi.runtime.trees` knows them.
        vocab: rows of the token embedding; None leaves the ids unchecked.
        device: of the model.
        pool: of the allocator.
    """

    def __init__(self, given: Mapping[str, Any], vocab: int | None, device: torch.device, pool: Any) -> None:
        self.device, self.vocab = device, vocab
        with torch.inference_mode(False), torch.no_grad():
            self.static: dict[str, Any] = rebuilt(
                dict(given), lambda x: torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
            )
            self.flat = tensors(self.static)
            ids = self.static.get(IDS)
            self.ids = ids if vocab is not None and isinstance(ids, Tensor) else None
            self.mask = mask_of(self.static)
            self.safe = None if self.ids is None else torch.zeros_like(self.ids)
            self._number = torch.zeros(1, dtype=torch.int64, device=device)
            self._word = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.told = self.ids is not None or self.mask is not None
        self._view = self._word.numpy()
        # looks at the inputs, as the device's number has it
        self.count = 0
        # the latest call's results are copied: the next may come on another stream
        self._done = torch.cuda.Event()
        self._stream: Any = None
        self._probe = capture(self.tell, device, pool)[0] if self.told else None
        self.count_anew()

    def count_anew(self) -> None:
        """Ask the device how often it has looked."""
        torch.cuda.synchronize(self.device)
        self.count = int(self._number)

    def tell(self) -> None:
        """Launch the kernel that looks at the inputs."""
        import dsi_kernels

        dsi_kernels.input_flags(self.ids, self.safe, self.mask, self._number, self._word, self.vocab or 1)

    def arguments(self, **changed: Any) -> dict[str, Any]:
        """The static arguments, with ids that are safe to look up."""
        safe = {} if self.safe is None else {IDS: self.safe}
        return {**self.static, **safe, **changed}

    def fill(self, given: Mapping[str, Any]) -> None:
        """Copy a call's arguments in."""
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            stream.wait_event(self._done)
        if len(self.flat) == 1:
            self.flat[0].copy_(tensors(given)[0])
        elif self.flat:
            torch._foreach_copy_(self.flat, tensors(given))

    def look(self) -> None:
        """Have the device look at the arguments."""
        if self._probe is not None:
            self._probe.replay()
            self.count += 1

    def done(self) -> None:
        """The call's results are copied out."""
        self._stream = torch.cuda.current_stream(self.device)
        self._done.record(self._stream)

    def flags(self) -> Flags:
        """What the device found in the arguments that were filled in last; waits for it."""
        from dsi_kernels.input_flags import COUNT_AT, NUMBER_AT, NUMBER_BITS

        if not self.told:
            return Flags(False, False, 0)
        number, looks = self.count % 2**NUMBER_BITS, 0
        while (word := int(self._view[0])) >> NUMBER_AT != number:
            looks += 1
            if looks > LOOKS:
                # raises where the device has failed
                torch.cuda.current_stream(self.device).query()
                time.sleep(PAUSE)
        return Flags(bool(word & 1), bool(word >> 1 & 1), word >> COUNT_AT & 2 ** (NUMBER_AT - COUNT_AT) - 1)
