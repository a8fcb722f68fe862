"""A container that holds one rank's part of a layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from dsi.containers.base import Container, LayerCall
from dsi.errors import UnsupportedModelError
from dsi.parallel.rules import LayerShard


class ShardedContainer(Container):
    """What differs in a container whose layer is split: mixed in before the container's class.

    There is no stock layer to fall back to, since its weights are on several ranks: what only the stock layer can
    compute is refused. Biases and masks that the model makes for all heads are cut to the rank's own.
    """

    shard: LayerShard

    def finish(self) -> None:
        super().finish()
        self.one_sum = bool(self.facts.get("parallel")) and {"out", "down"} <= self.shard.sums

    @property
    def all_heads(self) -> int:
        """Query heads of the layer on all ranks."""
        heads: int = self.facts["heads"]
        return heads * self.shard.size if "heads" in self.shard.facts else heads

    def own_heads(self, x: Tensor | None) -> Tensor | None:
        """Of [B, heads of all ranks, ...] this rank's; what is the same for every head, or None, as it is."""
        heads = self.shard.facts.get("heads")
        if x is None or heads is None or x.shape[1] == 1:
            return x
        return x.narrow(1, self.shard.rank * heads, heads)

    def _own_biases(self, rows: int, bias: Tensor) -> Tensor:
        """Of [B * heads of all ranks, 1, T] this rank's."""
        own = self.own_heads(bias.unflatten(0, (rows, -1)))
        assert own is not None
        return own.flatten(0, 1)

    def _takes_bias(self, hidden: Tensor, bias: Any) -> bool:
        rows = hidden.shape[0]
        if not isinstance(bias, Tensor) or bias.dim() != 3 or bias.shape[0] % rows:
            return False
        if bias.shape[0] != rows * self.shard.size * self.shard.facts.get("heads", 0):
            return super()._takes_bias(hidden, bias)
        return super()._takes_bias(hidden, self._own_biases(rows, bias))

    def _understand(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
        call = super()._understand(args, kwargs)
        if call is None or not self._cuts(call.mask):
            return None
        bias = None if call.bias is None else self._own_biases(call.hidden.shape[0], call.bias)
        return call._replace(mask=self.own_heads(call.mask), bias=bias)

    def _cuts(self, mask: Tensor | None) -> bool:
        """Whether a mask is for one head, or for all of them."""
        return mask is None or "heads" not in self.shard.facts or mask.shape[1] in (1, self.all_heads)

    # --- what takes the whole layer -----------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        rank, size = self.shard.rank, self.shard.size
        raise UnsupportedModelError(
            f"{type(self).__name__}: {what} takes the whole layer, and rank {rank} of {size} holds a part of it",
            hint="run the model without tensor parallelism for that",
        )

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse("a call that only the stock layer knows (attentions, training, a keyword or mask of another kind)")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refuse("state_dict()")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        self._refuse("load_state_dict()")


class ShardedDecoder(ShardedContainer):
    """As `ShardedContainer`, of a container with a decode step."""

    def decode(self, hidden: Tensor, kv: Any, rope: Any, mask: Tensor | None) -> Tensor:
        """As the container's, with a mask of all heads or of one."""
        decoder: Any = super()
        result: Tensor = decoder.decode(hidden, kv, rope, self.own_heads(mask))
        return result


def sharded_class(container: type[Container]) -> type[ShardedContainer]:
    """The class of a container that holds a part of its layer."""
    return _sharded_class(container)  # type: ignore[arg-type]  # torch's modules hash, whatever mypy reads


@functools.cache
def _sharded_class(container: type[Container]) -> type[ShardedContainer]:
    bases = (ShardedDecoder if hasattr(container, "decode") else ShardedContainer, container)
    cls: type[ShardedContainer] = type(container.__name__, bases, {"__module__": container.__module__})
    return cls
