"""dsi's own policies are held to the kit, as anyone's are."""

from __future__ import annotations

from typing import Any

from dsi.testing import PolicyConformance
from tests.kit.subjects import unet_settings, vae_settings
from tests.support.models import FAMILIES, tiny_config


class _BuiltIn(PolicyConformance):
    """A policy on a family of `tests.support`."""

    family: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        cls.policy = "{0}:{0}".format(cls.family.split("_")[0])
        cls.model_class = FAMILIES[cls.family].heads[0]
        super().__init_subclass__(**kwargs)

    def tiny_config(self):
        return tiny_config(self.family)


class TestLlama(PolicyConformance):
    policy = "llama:llama"

    def tiny_config(self):
        # four ranks share eight heads over four kv heads
        return tiny_config("llama", num_attention_heads=8, num_key_value_heads=4)


class TestLlamaWithBiases(PolicyConformance):
    policy = "llama:llama"

    def tiny_config(self):
        return tiny_config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


class TestGPT2(_BuiltIn):
    family = "gpt2"


class TestOPT(_BuiltIn):
    family = "opt"


class TestOPTPostNorm(_BuiltIn):
    family = "opt_post_norm"


class TestBERT(_BuiltIn):
    family = "bert"


class TestRoBERTa(_BuiltIn):
    family = "roberta"


class TestDistilBERT(_BuiltIn):
    family = "distilbert"


class TestCLIP(_BuiltIn):
    family = "clip"


class TestCLIPVision(_BuiltIn):
    family = "clip_vision"


class TestUNet(PolicyConformance):
    policy = "unet:unet"

    def tiny_config(self):
        return unet_settings()


class TestVAE(PolicyConformance):
    policy = "vae:vae"

    def tiny_config(self):
        return vae_settings()
