from transformers import SeedOssConfig

from dsi.testing import PolicyConformance
from dsi_seed_oss import SEED_OSS


class TestSeedOss(PolicyConformance):
    policy = SEED_OSS

    def tiny_config(self):
        sizes = {"hidden_size": 64, "intermediate_size": 40, "head_dim": 12, "num_hidden_layers": 2, "vocab_size": 67}
        return SeedOssConfig(num_attention_heads=8, num_key_value_heads=4, attention_out_bias=True, **sizes)
