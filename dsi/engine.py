"""The handle on an optimized model.

The model itself was changed in place, so code that holds it is faster without knowing. The engine adds what a bare
model has not: input checks before anything is launched, timers, a profile, and the way back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

from dsi.config import InferenceConfig
from dsi.containers import StandIn
from dsi.errors import InjectionError, RestoreError, UnsupportedModelError
from dsi.inject import Injection, inject, set_attribute
from dsi.parallel import Group
from dsi.planner import make_plan
from dsi.plans import Plan
from dsi.profiling import ModelTime, ModelTimer, Profile, profile_layers
from dsi.registry import Registry
from dsi.runtime import INSTANCE_OVERRIDES, DecodeRunner, Session, check_inputs
from dsi.runtime.forward import CHECKED, Forward, drop_forwards, moved, vocab_size
from dsi.runtime.session import ATTRIBUTE


def attach_session(model: nn.Module, injection: Injection, config: InferenceConfig) -> Session:
    """Give the model dsi's `generate` and what it needs, as undoable steps of the injection.

    Args:
        model: the model, its layers replaced.
        injection: whose journal takes the steps.
        config: the configuration.

    Returns:
        The session that now hangs on the model as `_dsi`.
    """
    decode = injection.plan.decode
    session = Session(
        config=config,
        runner=DecodeRunner.build(model, decode) if decode is not None else None,
        reason=injection.plan.decode_text,
        context=config.max_out_tokens or _context(model, injection.plan),
    )
    injection.journal.do(set_attribute(model, "_dsi", session))
    if injection.plan.blocks and injection.group is None:
        parts = {path: model.get_submodule(path) for path in injection.plan.entries or ("",)}
        for path, part in parts.items():
            if path:
                own = Session(config=config, reason=session.reason)
                injection.journal.do(set_attribute(part, "_dsi", own))
                session.parts[path] = own
            _attach_forward(part, injection)
    if callable(getattr(model, "generate", None)) and injection.plan.blocks:
        for name, function in INSTANCE_OVERRIDES.items():
            injection.journal.do(set_attribute(model, name, partial(function, model)))
    return session


def _attach_forward(model: nn.Module, injection: Injection) -> None:
    """Give a model, or the part of one that is run, a forward of dsi's; its session is there."""
    if "forward" in model.__dict__:
        return
    model.__dict__[ATTRIBUTE].on_cuda = _on_cuda(model)
    injection.journal.do(set_attribute(model, "forward", Forward(model)))
    injection.journal.do(set_attribute(model, "_apply", partial(moved, model)))


def _context(model: nn.Module, plan: Plan) -> int | None:
    """The most tokens a generation may reach, by the model's own word; None where nobody says."""
    if plan.decode is None or not plan.decode.context:
        return None
    return int(getattr(model.config, plan.decode.context))


def _on_cuda(model: nn.Module) -> bool:
    return all(parameter.is_cuda for parameter in model.parameters())


def optimize(model: nn.Module, settings: InferenceConfig, group: Group | None = None) -> InferenceEngine:
    """`init_inference` with the options read; as one rank of a group, where one is given.

    Args:
        model: see `init_inference`.
        settings: the options.
        group: the ranks over which the layers are split.

    Raises:
        DsiError: see `init_inference` and `dsi.inject.inject`.
    """
    if isinstance(model, nn.Module) and (where := already_optimized(model)) is not None:
        raise InjectionError(f"{where} is optimized already", hint="call restore() on its engine first")
    made = make_plan(model, settings, Registry.load())
    complain(made, settings)
    return carry_out(model, made, settings, group)


def carry_out(
    model: nn.Module,
    made: Plan,
    settings: InferenceConfig,
    group: Group | None = None,
    then: Callable[[], object] | None = None,
) -> InferenceEngine:
    """Make a plan true.

    Args:
        model, settings, group: see `optimize`.
        made: the plan.
        then: called while this can still be taken back, whatever a cast lost; an error of it takes it back.

    Raises:
        DsiError: see `dsi.inject.inject`.
    """
    session = None

    def attach(injection: Injection) -> None:
        nonlocal session
        session = attach_session(model, injection, settings)
        if then is not None:
            then()

    injection = inject(model, made, settings, attach, group)
    assert session is not None
    return InferenceEngine(model, injection, settings, session)


def already_optimized(model: nn.Module) -> str | None:
    """The model, or the first part of it, that another engine has changed."""
    for path, module in model.named_modules():
        if "_dsi" in module.__dict__ or isinstance(module, StandIn):
            return f"{path} of {type(model).__name__}" if path else type(model).__name__
    return None


def complain(made: Plan, settings: InferenceConfig) -> None:
    """What cannot be had, or was not: an error where it was asked for, a warning where it is everything.

    Raises:
        UnsupportedModelError: graphs were asked for where there are none; or `strict=True`.
    """
    if settings.enable_cuda_graph is True and not made.device.startswith("cuda"):
        raise UnsupportedModelError(
            f"enable_cuda_graph=True, and the model is on {made.device}",
            hint="move the model to CUDA first, or leave the option out",
        )
    if not settings.replace_with_kernel_inject:
        return
    if settings.strict:
        passed_over = [f"{x.path}: {x.reason.code}: {x.reason.text}" for x in made.left if x.reason.code != "no_policy"]
        if not made.blocks or passed_over:
            raise UnsupportedModelError(
                "strict=True, and these would be left alone:\n  " + "\n  ".join(passed_over or [made.why_nothing])
            )
    if not made.blocks:
        warnings.warn(f"dsi replaced nothing: {made.why_nothing}", UserWarning, stacklevel=4)


class Handle:
    """What an engine is to its user: whatever it has not is its module's, and the end of its block gives that back."""

    module: Any

    def restore(self) -> Any:
        """Give the module back as it was."""
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.module, name)


class InferenceEngine(Handle):
    """An optimized model. Attributes that the engine has not are the model's own.

    Made by `dsi.init_inference`. As a context manager it gives the original model back at the end.
    """

    def __init__(self, model: nn.Module, injection: Injection, config: InferenceConfig, session: Session) -> None:
        self.module = model
        self.inference_config = config
        self._injection = injection
        self._session = session
        self._timer: ModelTimer | None = None

    @property
    def plan(self) -> Plan:
        """What was done to the model."""
        return self._injection.plan

    @property
    def active(self) -> bool:
        """Whether the fused layers are in the model; False after `restore()`."""
        return self._injection.active

    # --- running ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, behind checks of its inputs.

        Raises:
            InputError: ids out of range, a mask of the wrong shape, an input longer than the model's positions.
        """
        if self.active:
            return self._checked(*args, **kwargs)
        return self.module(*args, **kwargs)

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        vocab = vocab_size(self.module)
        # a forward that is dsi's checks the ids' range itself, in a graph without waiting for the device
        own = isinstance(self.module.__dict__.get("forward"), Forward)
        check_inputs(self.module, args, kwargs, None if own else vocab, self.plan.input_limit)
        before = CHECKED.set(vocab)
        try:
            return self.module(*args, **kwargs)
        finally:
            CHECKED.reset(before)

    __call__ = forward

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate: every mode of transformers, in dsi's decode loop where that is provably equal.

        Raises:
            InputError: empty prompt, ids out of range, or prompt and new tokens beyond the context.
        """
        return self.module.generate(*args, **kwargs)

    # --- time -------------------------------------------------------------------------------------------------

    def profile_model_time(self, use_cuda_events: bool = True) -> None:
        """Start timing every forward, prefill and decode step; `model_times()` reads them.

        Args:
            use_cuda_events: on CUDA, time on the device without a synchronisation a step; else by the host's clock
                with one. On CPU there is no difference.
        """
        if self._timer is None:
            self._timer = ModelTimer(self.module, self._session, use_cuda_events=use_cuda_events)

    def stop_profile(self) -> None:
        """Stop timing and remove its hooks."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def model_times(self) -> list[ModelTime]:
        """Milliseconds of each call since the last reading, in order; clears them.

        Returns:
            Floats with a `phase`: "forward", "prefill" or "decode".

        Raises:
            ProfilingError: `profile_model_time()` was not called.
        """
        return ModelTimer.read(self._timer)

    def profile(self, *args: Any, **kwargs: Any) -> Profile:
        """One forward, measured layer by layer; `print()` it for the table.

        Args:
            *args, **kwargs: of the model's forward. A single dict counts as keyword arguments.
        """
        if len(args) == 1 and isinstance(args[0], dict) and not kwargs:
            return profile_layers(self.module, (), args[0])
        return profile_layers(self.module, args, kwargs)

    # --- the way back -----------------------------------------------------------------------------------------

    def restore(self) -> nn.Module:
        """Give the original model back, bit for bit, and return it. A second call does nothing.

        Raises:
            RestoreError: a cast lost bits that were not kept; nothing is changed then.
        """
        with self._session.lock:
            if self._session.running:
                # only the thread that holds the lock comes this far: a criterion, processor or streamer of the call
                raise RestoreError("a generate call of this engine is running; restore after it")
            if self.plan.restorable:
                self.stop_profile()
            self._injection.undo()
            # they hold the fused weights' addresses, and memory of their own
            self._session.graphs = None
            for session in (self._session, *self._session.parts.values()):
                drop_forwards(session)
        return self.module

    def __enter__(self) -> InferenceEngine:
        if self._injection.group is not None:
            raise RestoreError("the end of this block could not give back what other ranks hold")
        if not self.plan.restorable:
            raise RestoreError(
                f"the end of this block could not undo the cast {self.plan.dtype_before} -> {self.plan.dtype_after}",
                hint='pass keep_original="host", or do without the with statement',
            )
        return self

    def __repr__(self) -> str:
        state = f"{len(self.plan.blocks)} layers replaced" if self.active else "restored"
        return f"InferenceEngine({type(self.module).__name__}, {state})"
