"""A decoder layer that counts, and an encoder layer of its own."""

from torch.nn import functional as F

from dsi.containers import Container, DecoderLayer
from dsi.policy import Refusal


class CountingLayer(DecoderLayer):
    """dsi's decoder layer with a fact more and a counter."""

    OPTIONAL_FACTS = {**DecoderLayer.OPTIONAL_FACTS, "gain": 1.0}

    @classmethod
    def check(cls, facts, slots):
        if facts["gain"] != 1.0:
            return Refusal(reason=f"a gain of {facts['gain']} is not computed")
        return super().check(facts, slots)

    def finish(self):
        super().finish()
        self.runs = 0

    def run(self, call):
        self.runs += 1
        return super().run(call)


class PlainLayer(Container):
    """A pre-norm encoder layer in torch's own operations."""

    SLOTS = {"norm1": True, "qkv": True, "out": True, "norm2": True, "up": True, "down": True}
    FACTS = frozenset({"heads", "scale", "activation", "causal"})
    OPTIONAL_FACTS = {"dropout": 0.0}

    @classmethod
    def check(cls, facts, slots):
        if facts["activation"] != "gelu_pytorch_tanh":
            return Refusal(reason=f"activation {facts['activation']!r} is not computed")
        return None

    def run(self, call):
        batch, length, width = call.hidden.shape
        heads = self.facts["heads"]
        x = _norm(self.norm1, call.hidden)
        q, k, v = self.qkv(x).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=call.mask, is_causal=call.causal and call.mask is None, scale=self.facts["scale"]
        )
        hidden = call.hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(_norm(self.norm2, hidden)), approximate="tanh"))


def _norm(place, x):
    return F.layer_norm(x, place.weight.shape, place.weight, place.bias, place.eps)
