"""A model's forward as CUDA graphs: those of one structure of arguments share the inputs, each has its own results.

A graph holds addresses, so arguments are copied in and results copied out: what a call returned stays what it is.
Beside the forward stands a graph of one kernel, which moves the ids into range and tells the host in one word whether
they were in it, and how much of the mask is padding (`dsi_kernels.input_flags`). The host launches the forward before
it reads the word wherever it can guess what the word will say.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from dsi.containers.launches import graph_kernels
from dsi.containers.shared_products import SharedProduct
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


def _dense(x: Tensor, device: torch.device) -> Tensor:
    """Memory for values of this kind on a device, with those of x; maps keep their channels side by side."""
    maps = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if maps else torch.contiguous_format
    return torch.empty_like(x, device=device, memory_format=form).copy_(x)


class _Held:
    """An argument of which products are computed outside of the graphs, once for as long as it comes back.

    Args:
        static: the memory that graphs know it by.
        products: what is computed of it, each with the activation that it goes through first.
    """

    def __init__(self, static: Tensor, products: list[tuple[SharedProduct, str]]) -> None:
        self.static, self.products = static, products
        # the argument that was filled in last, and what it and the weights were then
        self._source: Any = None
        self._known: Any = None

    def pin(self) -> None:
        """Compute the products, into memory of their own."""
        for product, kind in self.products:
            product.pin(self.static, kind)

    def unpin(self) -> None:
        """Give that memory back."""
        for product, _ in self.products:
            product.unpin(self.static)

    def fill(self, x: Tensor) -> None:
        """Copy the argument in, and compute its products anew, unless it is what it was."""
        stamps = [product.stamp for product, _ in self.products]
        at = None if x.is_inference() else (x._version, x.data_ptr())
        if at is not None and self._source is not None and self._source() is x and (at, stamps) == self._known:
            return
        self._source, self._known = weakref.ref(x), (at, stamps)
        with torch.inference_mode(False), torch.no_grad():
            self.static.copy_(x)
            for product, _ in self.products:
                product.refresh(self.static)


def _home(x: Tensor, device: torch.device) -> torch.device:
    """Where a graph has an argument: a single number on the model's device, wherever it comes from."""
    return device if x.dim() == 0 else x.device


class Inputs:
    """The static arguments of one structure, and the word that tells of them.

    Args:
        given: arguments by name, as `dsi.runtime.trees` knows them.
        vocab: rows of the token embedding; None leaves the ids unchecked.
        device: of the model.
        pool: of the allocator.
        masks: a mask of positions is looked at.
    """

    def __init__(
        self, given: Mapping[str, Any], vocab: int | None, device: torch.device, pool: Any, *, masks: bool = True
    ) -> None:
        self.device, self.vocab = device, vocab
        self._held: dict[int, _Held] = {}
        with torch.inference_mode(False), torch.no_grad():
            self.static: dict[str, Any] = rebuilt(dict(given), lambda x: _dense(x, _home(x, device)))
            self.flat = tensors(self.static)
            # those that are copied in with every call; single numbers that the host has
            here = [x.device == one.device for x, one in zip(tensors(given), self.flat, strict=True)]
            self._plain = [place for place, same in enumerate(here) if same]
            self._numbers = [place for place, same in enumerate(here) if not same]
            ids = self.static.get(IDS)
            self.ids = ids if vocab is not None and isinstance(ids, Tensor) else None
            self.mask = mask_of(self.static) if masks else None
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

    def hold(self, products: Iterable[SharedProduct], run: Callable[[], Any]) -> None:
        """Have products of the arguments computed outside of the graphs that are captured from now on.

        Args:
            products: of the model.
            run: the forward over the static arguments; it shows which are of one of them.
        """
        products = list(products)
        if not products:
            return
        with torch.inference_mode(False), torch.no_grad(), graph_kernels(dependent=False):
            for product in products:
                product.forget()
            run()
            places = {id(x): place for place, x in enumerate(self.flat)}
            for product in products:
                found = product.latest()
                if found is not None and (place := places.get(id(found[0]))) is not None:
                    held = self._held.setdefault(place, _Held(found[0], []))
                    held.products.append((product, found[1]))
                product.forget()
            for held in self._held.values():
                held.pin()
        self._plain = [place for place in self._plain if place not in self._held]

    def let_go(self) -> None:
        """The graphs are gone, and so is what they read beside the arguments."""
        for held in self._held.values():
            held.unpin()
        self._held.clear()

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
        values = tensors(given)
        for place, held in self._held.items():
            held.fill(values[place])
        for place in self._numbers:
            # a copy would wait for the device
            self.flat[place].fill_(values[place].item())
        if len(self._plain) == 1:
            self.flat[self._plain[0]].copy_(values[self._plain[0]])
        elif self._plain:
            torch._foreach_copy_([self.flat[place] for place in self._plain], [values[place] for place in self._plain])

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
