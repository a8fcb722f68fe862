"""`forward` on an injected model: as a CUDA graph where that can be, and without padding where that was found equal.

`Forward` stands in the `__dict__` of one model and calls the class's own method; nothing of transformers is patched.
`model._dsi.last_forward` tells what the latest call did.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dsi.runtime.forward_pool import BadIds, ForwardPool, Later, NoGraph, refuse
from dsi.runtime.limits import check_ids
from dsi.runtime.model_parts import ModelParts
from dsi.runtime.session import ATTRIBUTE, Session
from dsi.runtime.trees import NoTree, named, signature, tensors
from dsi.runtime.unpadded import MASK, Unpadded, packs, worth_packing

# rows of the token embedding where the caller wants the ids checked
CHECKED: ContextVar[int | None] = ContextVar("dsi_checked", default=None)
# padded positions on a CPU from which packing is tried
CPU_POSITIONS = 256


@attrs.frozen
class ForwardRoute:
    """How a forward ran.

    Args:
        graph: as a CUDA graph.
        packed: without its padding.
        reason: why not as a graph.
    """

    graph: bool = False
    packed: bool = False
    reason: str = ""


class Forward:
    """The instance's `forward`, with the signature of the class's.

    Args:
        model: whose it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return _signature(type(self.model).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's forward returns.

        Raises:
            InputError: an id is out of range.
            UnsupportedModelError: `enable_cuda_graph=True`, and this call cannot be a graph.
        """
        model = self.model
        session: Session | None = model.__dict__.get(ATTRIBUTE)
        if session is None or torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return type(model).forward(model, *args, **kwargs)
        given: dict[str, Any] = {}
        try:
            given = named(_names(type(model).forward), args, kwargs)
            key = self._key(session, given)
        except (NoTree, NoGraph) as error:
            return self._without(session, args, kwargs, str(error), given)
        if not session.on_cuda:
            return self._unpadded(session, given, key)
        return self._graphed(session, given, key)

    def _key(self, session: Session, given: Mapping[str, Any]) -> Any:
        """The structure of the arguments.

        Raises:
            NoGraph, NoTree: the call must run as it is.
        """
        if reason := _mode(self.model, session):
            raise NoGraph(reason)
        if given.get("output_attentions"):
            raise NoGraph("attentions are wanted")
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            tuple([(name, _argument(name, value)) for name, value in given.items()]),
        )

    # --- on CUDA ----------------------------------------------------------------------------------------------

    def _graphed(self, session: Session, given: dict[str, Any], key: Any) -> Any:
        pool = session.forwards
        if pool is None:
            required = session.config.enable_cuda_graph is True
            pool = session.forwards = ForwardPool(self.model, vocab_size(self.model), required=required)
        if (wrong := _elsewhere(given, pool.device)) is not None:
            return self._without(session, (), given, wrong, given)
        with pool.lock:
            try:
                return self._pooled(session, pool, given, key)
            except BadIds:
                check_ids("forward", given["input_ids"].reshape(-1, given["input_ids"].shape[-1]), pool.vocab)
                raise
            except NoGraph as error:
                result = self._without(session, (), given, str(error), given)
                pool.remember(key, error)
                return result

    def _pooled(self, session: Session, pool: ForwardPool, given: dict[str, Any], key: Any) -> Any:
        """As a graph; or, where a later call may be one, by the launches that it will hold."""
        try:
            result, reason = pool.run(key, given), ""
        except Later as error:
            reason = str(error)
            self._admit(session, reason, given)
            result = pool.launch(key, given)
        session.last_forward = ForwardRoute(not reason, pool.packing, reason)
        return result

    def _admit(self, session: Session, reason: str, given: Mapping[str, Any]) -> None:
        """Nothing where a call may run without a graph: none is required, and ids that are to be checked are right."""
        if session.config.enable_cuda_graph is True and not session.running:
            raise refuse(reason)
        ids, vocab = given.get("input_ids"), CHECKED.get()
        if vocab is not None and isinstance(ids, Tensor) and ids.dim() > 1:
            check_ids("forward", ids.flatten(0, -2), vocab)

    def _without(
        self, session: Session, args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: str, given: Mapping[str, Any]
    ) -> Any:
        """The class's forward, and why it is no graph."""
        self._admit(session, reason, given)
        session.last_forward = ForwardRoute(reason=reason)
        return type(self.model).forward(self.model, *args, **kwargs)

    # --- elsewhere --------------------------------------------------------------------------------------------

    def _unpadded(self, session: Session, given: dict[str, Any], key: Any) -> Any:
        """Without its padding, where the mask has some and that is known to be equal."""
        visible = _tokens(given)
        if not visible or not packs(self.model):
            return self._without(session, (), given, "", given)
        unpadded, names = _known(self.model, session), key[-1]
        names = tuple((name, one if isinstance(one[0], type) else one[1]) for name, one in names)
        if unpadded is None or (unpadded.tried(names) and unpadded.stops(names) is None):
            return self._without(session, (), given, "" if unpadded is None else unpadded.reasons[names], given)
        if (vocab := CHECKED.get()) is not None and isinstance(given.get("input_ids"), Tensor):
            check_ids("forward", given["input_ids"], vocab)
        call = functools.partial(_stock, self.model)
        if unpadded.tried(names):
            session.last_forward = ForwardRoute(packed=True)
            return unpadded.packed(call, given, visible, names)
        result = unpadded.try_packing(call, given, visible, names)
        session.last_forward = ForwardRoute(reason=unpadded.reasons.get(names, ""))
        return result


def _stock(model: nn.Module, given: Mapping[str, Any]) -> Any:
    return type(model).forward(model, **given)


def _tokens(given: Mapping[str, Any]) -> int:
    """Positions that are no padding, where leaving the padding out is worth a try; else 0."""
    mask = given.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() < CPU_POSITIONS:
        return 0
    shown = mask != 0
    visible = int(shown.sum())
    return visible if worth_packing(visible, mask.numel()) and bool(shown[:, 0].all()) else 0


def _known(model: nn.Module, session: Session) -> Unpadded | None:
    """What is known of the model's forwards as it is now; None while a hook or training needs all of it."""
    if session.unpadded is not None and session.unpadded.parts.changed():
        session.unpadded = None
    if session.unpadded is None:
        session.unpadded = Unpadded(ModelParts(model))
    return None if session.unpadded.parts.busy() else session.unpadded


def moved(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands for `_apply`: weights are about to move, so graphs of the old ones go first."""
    session: Session | None = model.__dict__.get(ATTRIBUTE)
    if session is not None:
        drop_forwards(session)
    result = type(model)._apply(model, *args, **kwargs)
    if session is not None:
        session.on_cuda = all(parameter.is_cuda for parameter in model.parameters())
    return result


def drop_forwards(session: Session) -> None:
    """What is kept of forwards goes, with its memory."""
    if session.forwards is not None:
        with session.forwards.lock:
            session.forwards.drop()
    session.forwards = session.unpadded = None


def vocab_size(model: nn.Module) -> int | None:
    """Rows of the token embedding; None for a model that has none, or several towers each with its own."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def _mode(model: nn.Module, session: Session) -> str:
    """Why no call can be a graph now, or ""."""
    if model.training:
        return "the model is in training mode"
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.inference_mode()"
    if session.on_cuda and session.config.enable_cuda_graph is False:
        return "enable_cuda_graph=False"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch mode watches the call"
    if session.on_cuda and torch.cuda.is_current_stream_capturing():
        return "a capture is under way"
    return ""


def _argument(name: str, value: Any) -> Any:
    try:
        return signature(value)
    except NoTree as error:
        raise NoTree(f"argument {name} is {error}") from None


def _elsewhere(given: Mapping[str, Any], device: torch.device) -> str | None:
    if device.index is not None and device.index != torch.cuda.current_device():
        return f"the model is on {device}, which is not the current device"
    for name, value in given.items():
        for one in (value,) if isinstance(value, Tensor) else tensors(value):
            # a single number goes along
            if one.device != device and not (one.dim() == 0 and one.device.type == "cpu"):
                return f"argument {name} is on {one.device}"
    return None


@functools.cache
def _signature(forward: Any) -> inspect.Signature:
    """Of a class's forward, bound to an instance; transformers asks for it five times a text."""
    found = inspect.signature(forward)
    return found.replace(parameters=list(found.parameters.values())[1:])


@functools.cache
def _names(forward: Any) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(name for name, one in inspect.signature(forward).parameters.items() if one.kind in kinds)[1:]


__all__ = ["CHECKED", "Forward", "ForwardRoute", "drop_forwards", "moved", "vocab_size"]
