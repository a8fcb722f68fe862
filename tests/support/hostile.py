"""A zoo of hostile plugins, each a distribution of its own, and a neighbour that means well.

`ZOO` is loaded all at once in one process. `DEADLY` ends or stops the process that loads it. `POLICIES` load without
a fault and strike when a model is planned, injected or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import attrs

from dsi.policy import API_VERSION
from tests.support.site import put_distribution

LLAMA = "transformers.models.llama.modeling_llama:LlamaDecoderLayer"
OLMO = "transformers.models.olmo.modeling_olmo:OlmoDecoderLayer"

GOOD = """
from dsi.policy import Block, Linear, Policy, hookimpl
DSI_API = (1, 0)

@hookimpl
def dsi_register_policies(register):
    register(Policy(name="main", blocks=[Block(layer="some.models:Layer", container="c:C", slots={})]))
"""
MINOR, MAJOR = f"({API_VERSION[0]}, {API_VERSION[1] + 1})", f"({API_VERSION[0] + 1}, 0)"


def _replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@attrs.frozen
class Hostile:
    """One plugin and what `dsi plugins` must say of it.

    Args:
        source: of its module.
        state: of its record.
        reason, mend: words that stand in them.
        points: its entry points, where there is more than one.
        modules: further modules of its distribution.
    """

    source: str
    state: str
    reason: str
    mend: str
    points: tuple[tuple[str, str], ...] | None = None
    modules: Mapping[str, str] = MappingProxyType({})


_CHATTY = "print('hello'); import sys; sys.stdout.write('{'); sys.stdout.close()\n"
_THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, name='miner', daemon=True).start()\n"
_MUTE = "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E\n"
_PATCH = "import torch\ntorch.nn.functional.linear = lambda *a: 'mine'\ntorch.nn.Linear.forward = lambda *a: 'mine'\n"
_STATE = "import torch\ntorch.set_default_dtype(torch.float16)\ntorch.set_grad_enabled(False)\n"
_SWALLOW = "\n    try:\n        register(3)\n    except Exception:\n        pass\n"
_AUTHOR = "mend it there or upgrade"

ZOO: Mapping[str, Hostile] = MappingProxyType(
    {
        "import_error": Hostile("import not_there", "broken", "No module named 'not_there'", "install what provides"),
        "import_name": Hostile("from json import nope", "broken", "cannot import name 'nope'", _AUTHOR),
        "dependency": Hostile(
            "import its_helper", "broken", "No module named 'its_dependency'", "reinstall hostile-dependency with",
            modules={"its_helper": "import its_dependency"},
        ),
        "gone": Hostile(
            "", "broken", "No module named 'never_written'", "reinstall", points=(("gone", "never_written"),)
        ),
        "syntax": Hostile("def broken(:", "broken", "SyntaxError", _AUTHOR),
        "null_byte": Hostile("x = '\0'", "broken", "null bytes", _AUTHOR),
        "exits": Hostile("import sys; sys.exit(3)", "broken", "SystemExit: 3", "a plugin must not end its host"),
        "cancelled": Hostile(
            "import asyncio; raise asyncio.CancelledError", "broken", "CancelledError", _AUTHOR
        ),
        "mute": Hostile(_MUTE, "broken", "its message cannot be read", _AUTHOR),
        "recursion": Hostile("def f(): f()\nf()", "broken", "RecursionError", _AUTHOR),
        "no_api": Hostile(_replaced("DSI_API = (1, 0)", ""), "broken", "does not say which plugin API", "add the line"),
        "newer_minor": Hostile(_replaced("(1, 0)", MINOR), "incompatible", f"needs plugin API {MINOR}", "upgrade dsi"),
        "newer_major": Hostile(_replaced("(1, 0)", MAJOR), "incompatible", f"needs plugin API {MAJOR}", "upgrade dsi"),
        "odd_api": Hostile(_replaced("(1, 0)", "'1.0'"), "broken", "DSI_API is '1.0'", "write DSI_API"),
        "no_hook": Hostile("DSI_API = (1, 0)", "broken", "implements no hook", "@hookimpl"),
        "misspelt": Hostile(
            _replaced("_policies(", "_polices("), "broken", "did you mean dsi_register_policies?", "the hooks are"
        ),
        "unmarked": Hostile(_replaced("@hookimpl", ""), "broken", "would never be called", "mark it with @hookimpl"),
        "default": Hostile(
            _replaced("(register):", "(register, api=None):"), "broken", "api has a default", "remove the default"
        ),
        "argument": Hostile(_replaced("(register):", "(register, model):"), "broken", "model", _AUTHOR),
        "wrapper": Hostile(
            _replaced("@hookimpl", "@hookimpl(wrapper=True)") + "    return (yield)\n", "broken", "is a wrapper",
            "register what is yours",
        ),
        "raising": Hostile(GOOD + "    raise RuntimeError('no')\n", "broken", "RuntimeError: no", _AUTHOR),
        "exiting_hook": Hostile(GOOD + "    raise SystemExit\n", "broken", "SystemExit", "must not end its host"),
        "wrong_type": Hostile(GOOD + "    register({'name': 'x'})\n", "broken", "registered a dict", "build a"),
        "swallowed": Hostile(GOOD + _SWALLOW, "broken", "registered a int", "build a dsi.policy.Policy"),
        "wrong_slot": Hostile(
            _replaced("slots={}", "slots={'qkv': 'q_proj'}"), "broken", "slot 'qkv' is 'q_proj'", "use a slot"
        ),
        "wrong_fact": Hostile(
            _replaced("slots={}", "slots={}, facts={'heads': 4}"), "broken", "fact 'heads' is 4", "use Config, Attr"
        ),
        "wrong_layer": Hostile(
            _replaced("some.models:Layer", "LlamaLayer"), "broken", "layer is 'LlamaLayer'", "module:Class"
        ),
        "twice": Hostile(
            GOOD + "    register(Policy(name='main', blocks=[Block(layer='m:L', container='c:C', slots={})]))\n",
            "broken", "two Policy of the name 'main'", "rename one",
        ),
        "same_name": Hostile(
            GOOD, "duplicate", "the name belongs to", "rename one entry point",
            points=(("neighbour", "same_name"),),
        ),
        "chatty": Hostile(_CHATTY + GOOD, "loaded", "prints to stdout", "use logging"),
        "threads": Hostile(_THREAD + GOOD, "loaded", "starts threads while it is loaded (miner)", "first needed"),
        "patches": Hostile(_PATCH + GOOD, "broken", "torch.nn.functional.linear", "change nothing"),
        "settings": Hostile(_STATE + GOOD, "broken", "torch's default dtype, torch's grad mode", "change nothing"),
        "many_modules": Hostile(
            "import importlib\nfor i in range(320): importlib.import_module(f'crowd.m{i}')\n" + GOOD,
            "loaded", "modules while it is loaded", "inside the functions",
        ),
        "tie_a": Hostile(
            _replaced("some.models:Layer", OLMO), "loaded", "tie_a:main claims", "injection_policy="
        ),
        "tie_b": Hostile(
            _replaced("some.models:Layer", OLMO), "loaded", "tie_b:main claims", "injection_policy="
        ),
    }
)  # fmt: skip

DEADLY: Mapping[str, str] = MappingProxyType(
    {
        "leaves": "import os; os._exit(3)",
        "leaves_clean": "import os; os._exit(0)",
        "segfault": "import ctypes; ctypes.string_at(0)",
        "loops": "while True: pass",
        "interrupts": "raise KeyboardInterrupt",
        "loud": "import os; os.write(1, b'from below')\n" + GOOD,
        "heavy": "import numpy" + GOOD,
        "sly": "import sys\nif 'torch' in sys.modules:\n    sys.modules['torch'].nn.Dropout.forward = 3\n" + GOOD,
        "stdlib": "import json\njson.dumps = lambda *a: 'mine'\n" + GOOD,
        "environ": "import os; os.environ['OMP_NUM_THREADS'] = '1000'" + GOOD,
        "orphan": "import os, time\nif os.fork() == 0:\n    time.sleep(600)\n" + GOOD,
    }
)

_POLICY = """
import sys
from dsi.policy import Attr, Block, Call, Concat, Config, Const, Linear, Norm, Policy, hookimpl
DSI_API = (1, 0)
FAMILY = "transformers.models.llama.modeling_llama:"
RMS = {"kind": "rms", "eps": "variance_epsilon", "cls": FAMILY + "LlamaRMSNorm"}

def supports(config):
    return None

def policy(container="dsi.containers:DecoderLayer", slots=None, facts=None, **more):
    block = Block(
        layer=FAMILY + "LlamaDecoderLayer",
        container=container,
        call=Call(rope="position_embeddings"),
        slots={
            "norm_attn": Norm("input_layernorm", **RMS),
            "qkv": Concat("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", split="column"),
            "out": Linear("self_attn.o_proj", split="row"),
            "norm_mlp": Norm("post_attention_layernorm", **RMS),
            "gate_up": Concat("mlp.gate_proj", "mlp.up_proj", split="column"),
            "down": Linear("mlp.down_proj", split="row"),
            **(slots or {}),
        },
        facts={
            "heads": Config("num_attention_heads"),
            "kv_heads": Config("num_key_value_heads"),
            "head_dim": Attr("self_attn.head_dim"),
            "scale": Attr("self_attn.scaling"),
            "layer_idx": Attr("self_attn.layer_idx"),
            "activation": Config("hidden_act"),
            "pre_norm": Const(True),
            "causal": Const(True),
            **(facts or {}),
        },
    )
    return Policy(name="main", priority=-1, blocks=[block], **more)
"""

_REGISTER = """
@hookimpl
def dsi_register_policies(register):
    register(policy(%s))
"""


@attrs.frozen
class Striking:
    """One plugin whose policy strikes later.

    Args:
        code: stands before the policy is made.
        arguments: of the policy.
        container: source of a module of containers.
    """

    code: str = ""
    arguments: str = ""
    container: str = ""

    def source(self) -> str:
        return f"{_POLICY}\n{self.code}\n{_REGISTER % self.arguments}"


# walks up to whoever plans, and takes the model from there
_REACH = """
def reach():
    frame = sys._getframe()
    while frame is not None:
        for value in frame.f_locals.values():
            model = getattr(value, "model", None)
            if hasattr(model, "lm_head"):
                return model
        frame = frame.f_back
"""

_WITH = 'container="%s_layers:Layer"'
_LAYER = "from dsi.containers import DecoderLayer\nclass Layer(DecoderLayer):\n"

POLICIES: Mapping[str, Striking] = MappingProxyType(
    {
        "edits_config": Striking(
            "def edit(config):\n    config.hidden_act = 'relu'\n    config.rope_parameters['x'] = 1", "supports=edit"
        ),
        "edits_model": Striking(
            _REACH + "def edit(config):\n    reach().lm_head = None\n    reach().train()", "supports=edit"
        ),
        "zeroes_model": Striking(
            _REACH + "def edit(config):\n    reach().lm_head.weight.detach().mul_(1)", "supports=edit"
        ),
        "exits_when_asked": Striking("def leave(config):\n    sys.exit(1)", "supports=leave"),
        "raises_when_asked": Striking("def fail(config):\n    raise KeyError('x')", "supports=fail"),
        "answers_nonsense": Striking("def answer(config):\n    return 'no'", "supports=answer"),
        "no_container": Striking("", 'container="not_there_at_all:Layer"'),
        "container_fails_to_import": Striking(
            "", _WITH % "container_fails_to_import", "raise RuntimeError('at import')"
        ),
        "container_exits": Striking("", _WITH % "container_exits", "raise SystemExit(2)"),
        "no_layer": Striking("", _WITH % "no_layer", "class Layer: pass"),
        "check_raises": Striking(
            "", _WITH % "check_raises",
            _LAYER + "    @classmethod\n    def check(cls, facts, slots): raise ValueError('in check')",
        ),
        "check_answers_nonsense": Striking(
            "", _WITH % "check_answers_nonsense",
            _LAYER + "    @classmethod\n    def check(cls, facts, slots): return 3",
        ),
        "wrong_path": Striking("", 'slots={"out": Linear("self_attn.proj_out")}'),
        "wrong_place": Striking("", 'slots={"nowhere": Linear("mlp.down_proj")}'),
        "lost_parameter": Striking("", 'slots={"qkv": Concat("self_attn.q_proj", "self_attn.k_proj")}'),
        "wrong_constructor": Striking(
            "", _WITH % "wrong_constructor", _LAYER + "    def __init__(self): pass"
        ),
        "raises_at_layer_1": Striking(
            "", _WITH % "raises_at_layer_1",
            _LAYER + "    def finish(self):\n        super().finish()\n"
            "        if self.facts['layer_idx'] == 1: raise RuntimeError('at layer 1')",
        ),
        "wrecks_the_original": Striking(
            "", _WITH % "wrecks_the_original",
            _LAYER + "    def __init__(self, original, *rest):\n        super().__init__(original, *rest)\n"
            "        original.train()\n        original.spoiled = True\n"
            "        if self.facts['layer_idx'] == 1:\n"
            "            del original.mlp\n            raise RuntimeError('after the wreck')",
        ),
        "exits_at_layer_1": Striking(
            "", _WITH % "exits_at_layer_1",
            _LAYER + "    def finish(self):\n        super().finish()\n"
            "        if self.facts['layer_idx'] == 1: raise SystemExit(3)",
        ),
        "slots_do_not_fit": Striking("", 'slots={"gate_up": Concat("mlp.gate_proj", "mlp.down_proj"), '
                                         '"down": Linear("mlp.up_proj")}'),
    }
)  # fmt: skip

RUNNING: Mapping[str, Striking] = MappingProxyType(
    {
        "wrong_width": Striking(
            "", _WITH % "wrong_width", f"{_LAYER}    def run(self, call): return call.hidden[..., 1:]"
        ),
        "no_tensor": Striking("", _WITH % "no_tensor", f"{_LAYER}    def run(self, call): return 3"),
        "raises_in_run": Striking(
            "", _WITH % "raises_in_run", f"{_LAYER}    def run(self, call): raise RuntimeError('in run')"
        ),
    }
)  # fmt: skip


def install_zoo(site: Path) -> None:
    """The neighbour, and everything of `ZOO`, into a folder."""
    put_distribution(site, "a-neighbour", {"neighbour": GOOD})
    put_distribution(site, "crowd", {}, [])
    (site / "crowd").mkdir()
    for number in range(320):
        (site / "crowd" / f"m{number}.py").write_text("")
    for name, one in ZOO.items():
        # a class of its own each, so that none ties with another by accident
        source = one.source.replace("some.models", f"some.{name}")
        put_distribution(site, f"hostile-{name}", {name: source, **one.modules}, one.points or [(name, name)])


def install_deadly(site: Path) -> None:
    """The neighbour, and everything of `DEADLY`, into a folder."""
    put_distribution(site, "a-neighbour", {"neighbour": GOOD})
    for name, source in DEADLY.items():
        put_distribution(site, f"deadly-{name}", {name: source.replace("some.models", f"some.{name}")})


def install_policies(site: Path) -> None:
    """Everything of `POLICIES` and `RUNNING`, into a folder."""
    for name, one in {**POLICIES, **RUNNING}.items():
        layers = {f"{name}_layers": one.container} if one.container else {}
        put_distribution(site, f"striking-{name}", {name: one.source(), **layers}, [(name, name)])
