"""What one injected model keeps for generation: an object on the model itself, so that its copies have their own."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from dsi.config import InferenceConfig
from dsi.policy import Policy

if TYPE_CHECKING:
    from dsi.runtime.decode import DecodeRunner
    from dsi.runtime.forward import ForwardRoute
    from dsi.runtime.forward_pool import ForwardPool
    from dsi.runtime.graph_pool import GraphPool
    from dsi.runtime.kv_cache import PreallocatedCache
    from dsi.runtime.limits import Prompt
    from dsi.runtime.prompt_pass import PromptRoute
    from dsi.runtime.step_forward import StepForward
    from dsi.runtime.unpadded import Unpadded

# where the session hangs: in the model's __dict__, past nn.Module.__setattr__
ATTRIBUTE = "_dsi"
# what a copy of the model does not take along
_OF_ONE_MODEL = ("lock", "prompt", "graphs", "own_cache", "running", "steps", "forwards", "unpadded")


class Timer(Protocol):
    """Who wants to know how long things take."""

    def prefill(self) -> AbstractContextManager[Any]:
        """Entered around the forward over the prompt."""

    def decode(self) -> AbstractContextManager[Any]:
        """Entered around each step after it."""


@attrs.frozen
class Route:
    """Which loop a `generate` call took.

    Args:
        fast: dsi's own, otherwise transformers'.
        reason: why not dsi's; where it is, on CUDA, why its steps were no graphs.
        graph: its steps were CUDA graphs.
    """

    fast: bool
    reason: str = ""
    graph: bool = False


@attrs.define(kw_only=True, slots=False, eq=False)
class Session:
    """Copied and pickled with the model; the lock is the one thing that is made anew.

    Args:
        runner: takes decode steps; None where the model has none.
        reason: why there is no runner.
        config: of the injection.
        context: largest number of positions, or None.
        timer: None, or who measures.
        lock: held for the length of a `generate` call.
        last_route: what the latest `generate` call did.
        last_prompt: how the latest prompt ran in dsi's loop.
        prompt: of the call that runs now.
        graphs: captured decode steps, on CUDA.
        running: `generate` calls under way, one inside the other.
        own_cache: made for the call that runs now; its caller never had it.
        steps: what stands for the model's forward while transformers' loop runs.
        on_cuda: the model's device is one.
        last_forward: what the latest forward did.
        forwards: captured forwards, on CUDA.
        unpadded: what is known of forwards without padding, elsewhere.
        parts: by path, the sessions of parts that are run in the place of the model's forward.
    """

    runner: DecodeRunner | None = None
    reason: str = ""
    config: InferenceConfig = attrs.field(factory=InferenceConfig)
    context: int | None = None
    timer: Timer | None = None
    # an RLock has no public type to name
    lock: Any = attrs.field(factory=threading.RLock, repr=False)
    last_route: Route | None = None
    last_prompt: PromptRoute | None = None
    prompt: Prompt | None = attrs.field(default=None, repr=False)
    # None until the first call that could use it
    graphs: GraphPool | None = attrs.field(default=None, repr=False)
    running: int = 0
    own_cache: PreallocatedCache | None = attrs.field(default=None, repr=False)
    steps: StepForward | None = attrs.field(default=None, repr=False)
    on_cuda: bool = False
    last_forward: ForwardRoute | None = None
    forwards: ForwardPool | None = attrs.field(default=None, repr=False)
    unpadded: Unpadded | None = attrs.field(default=None, repr=False)
    parts: dict[str, Session] = attrs.field(factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_ONE_MODEL}
        if isinstance(self.config.injection_policy, Policy):
            # a policy holds functions and read-only mappings, which cannot be copied, and was for the injection alone
            state["config"] = attrs.evolve(self.config, injection_policy=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = {name: None for name in _OF_ONE_MODEL if name not in ("lock", "running")} | {"running": 0}
        self.__dict__.update(state, lock=threading.RLock(), **fresh)


def session_of(model: Any) -> Session:
    """The session of an injected model."""
    session: Session = model.__dict__[ATTRIBUTE]
    return session
