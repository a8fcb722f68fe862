"""Guards over the tree itself: what may stand where, and what source code may not do."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# every folder of plugins/ is a distribution: its name with an underscore is its package's
PLUGINS = {file.parent.name.replace("-", "_"): file.parent for file in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
SOURCES = {
    "dsi": ROOT / "dsi",
    "dsi_kernels": ROOT / "kernels" / "dsi_kernels",
    "dsi_policies": ROOT / "policies" / "dsi_policies",
    **{package: folder / package for package, folder in PLUGINS.items()},
}


def _modules(*packages: str) -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module in the packages."""
    for package in packages or SOURCES:
        folder = SOURCES[package]
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), file


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def _is_in(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


# --- packages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["kernels", "policies", "plugins"])
def test_folders_of_distributions_are_no_packages(folder):
    # a root `kernels/__init__.py` would shadow Hugging Face's `kernels`, which transformers and diffusers import
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_is_in_reach_of_tests_and_linters(package):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folder = PLUGINS[package].relative_to(ROOT).as_posix()
    contracts = {one["name"]: one for one in settings["importlinter"]["contracts"]}
    assert folder in settings["pytest"]["ini_options"]["pythonpath"]
    assert f"$MYPY_CONFIG_FILE_DIR/{folder}" in settings["mypy"]["mypy_path"]
    assert package in settings["importlinter"]["root_packages"]
    assert package in contracts["plugins see the public API alone"]["source_modules"]


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_is_a_distribution_of_its_own(package):
    project = tomllib.loads((PLUGINS[package] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == PLUGINS[package].name
    assert project["dependencies"] == ["dsi"]
    assert project["entry-points"].keys() == {"dsi"}
    assert (PLUGINS[package] / project["readme"]).exists()
    assert list((PLUGINS[package] / "tests").glob("test_*.py"))


def test_plugins_import_the_public_api_alone():
    # import-linter does not look at their tests
    found = {
        str(file.relative_to(ROOT)): strange
        for package, folder in {**PLUGINS, "dsi_seed_oss": ROOT / "examples" / "dsi-seed-oss"}.items()
        for file in sorted(folder.rglob("*.py"))
        if (strange := _strange_imports(_tree(file), package, _may_besides(file)))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["import torch", "import dsi", "from dsi import containers", "from dsi.containers import DecoderLayer"],
)
def test_the_search_for_imports_finds(source):
    assert _strange_imports(ast.parse(source), "dsi_acme")


@pytest.mark.parametrize(
    "source", ["import dsi_kernels", "from dsi.containers.ops import AtenOps", "import dsi.inject"]
)
@pytest.mark.parametrize("file", ["dsi_acme/containers.py", "tests/test_acme.py"])
def test_the_search_for_imports_finds_private_modules_everywhere(source, file):
    assert _strange_imports(ast.parse(source), "dsi_acme", _may_besides(Path(file)))


@pytest.mark.parametrize(
    "source",
    ["import re", "from dsi import policy", "from dsi.policy import Policy", "from dsi_acme.a import b"],
)
def test_the_search_for_imports_passes(source):
    assert not _strange_imports(ast.parse(source), "dsi_acme")


_PUBLIC = {"attrs", "dsi.policy", "dsi.testing", "pytest", "transformers"}
# file or folder of a plugin -> what it may import besides: containers compute, and tests run models
_BESIDES = {"containers.py": {"dsi.containers", "torch"}, "tests": {"diffusers", "dsi", "torch"}}


def _may_besides(file: Path) -> set[str]:
    return _BESIDES.get(file.name, set()) | _BESIDES.get(file.parent.name, set())


def _strange_imports(tree: ast.Module, package: str, besides: Set[str] = frozenset()) -> list[str]:
    """What a module of a plugin's package imports beside the public API, the package and the standard library."""
    return sorted(set(_imported_tops(tree)) - _PUBLIC - besides - {package} - set(sys.stdlib_module_names))


def _imported_tops(tree: ast.Module) -> Iterator[str]:
    """Of each imported name the first part, of dsi's all."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."] if node.module != "dsi" else [f"dsi.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name if name.startswith("dsi.") else name.split(".")[0] for name in names)


def test_transformers_imports_with_the_repository_on_the_path(fresh_python):
    done = fresh_python(
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(is_kernels_available() and (spec is None or spec.origin is None))"
    )
    assert done.returncode == 0, done.stderr
    # our folder alone must not pass for the library
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("package", SOURCES)
def test_packages_are_typed(package):
    assert (SOURCES[package] / "py.typed").exists()


INITS = {name: file for name, file in _modules() if file.name == "__init__.py"}


@pytest.mark.parametrize("name", INITS)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    imported = [alias.asname or alias.name for alias in _imported_names(INITS[name])]
    if not hasattr(module, "__all__"):
        assert not imported, f"{name} re-exports {imported} without an __all__"
        return
    assert list(module.__all__) == sorted(set(module.__all__), key=_isort_key)
    assert [entry for entry in module.__all__ if not hasattr(module, entry)] == []
    public = {alias for alias in imported if not alias.startswith("_")}
    assert public <= set(module.__all__), "imported by the package, absent from its __all__"


def _imported_names(file: Path) -> Iterator[ast.alias]:
    # from our own packages; what stands under `if TYPE_CHECKING` is not at the top level
    for node in _tree(file).body:
        if isinstance(node, ast.ImportFrom) and (node.level or _is_in(node.module or "", *SOURCES)):
            yield from node.names


def _isort_key(name: str) -> tuple[int, str]:
    # constants, classes, functions: the order that ruff keeps
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


# --- what source code may not do ----------------------------------------------------------------------------------

_FAMILIES = frozenset(
    {
        *("bert", "bloom", "chatglm", "deepseek", "distilbert", "falcon", "flux", "gemma", "gpt", "gptj", "llama"),
        *("mistral", "mixtral", "qwen", "roberta"),
    }
)
# ordinary words, unless they are written as a class or a module of transformers
_CLASS_OR_MODULE = re.compile(
    r"\b(?:CLIP[A-Z]|OPT[A-Z][a-z]|Phi\d?[A-Z]|T5[A-Z]|modeling_(?!(?:auto|rope_utils|utils)\b)[a-z]|models\.(?!auto\b)[a-z])"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def _names_a_family(text: str) -> bool:
    words = {word.lower() for word in _WORD.findall(text)}
    return bool(words & _FAMILIES or _CLASS_OR_MODULE.search(text))


def _words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and string of the module that is not a docstring."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def _families_named_in(source: str) -> list[str]:
    return [f"{line}: {text}" for line, text in _words(ast.parse(source)) if _names_a_family(text)]


def test_the_core_names_no_architecture():
    found = {
        module: named
        for module, file in _modules("dsi")
        if not _is_in(module, "dsi.testing") and (named := _families_named_in(file.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "x = 'transformers.models.foo'",
        "if 'llama' in name: pass",
        "from transformers import BertLayer",
        "isinstance(m, CLIPEncoderLayer)",
        "gpt2 = 1",
        "f'{x} is a LlamaForCausalLM'",
        "def split_qwen2(): pass",
        "OPTDecoderLayer",
    ],
)
def test_the_search_for_architectures_finds(source):
    assert _families_named_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "'''For OPT and LlamaModel.'''",
        "x.clip(0)",
        "opt = optimize(OPTIONS)",
        "adopt(1)",
        # transformers' registries, which name all of them and none
        "from transformers.models.auto.modeling_auto import HEADS",
    ],
)
def test_the_search_for_architectures_passes(source):
    assert _families_named_in(source) == []


_FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
# the kit pickles a model to see whether that works, and reads back nothing else; so do a process and the ranks that it
# has started for a test, in a folder of their own
_PICKLES = {"dsi.testing.checks.lifecycle": "pickle", "dsi.parallel.parcel": "torch.load"}
_FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "all_gather_object", "broadcast_object_list", "gather_object"}


def _faults(tree: ast.Module) -> Iterator[str]:
    """What of pickle, eval and remote code the module uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in _FORBIDDEN_IMPORTS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _FORBIDDEN_IMPORTS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from _call_faults(node)


def _call_faults(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    # the objects' collectives pickle what they send
    if called in _FORBIDDEN_CALLS or called.rpartition(".")[2] in _FORBIDDEN_CALLS - {"eval", "exec", "torch.load"}:
        yield called
    for keyword in node.keywords:
        if keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is True:
            yield "trust_remote_code=True"


def test_no_pickle_no_eval_no_remote_code():
    found = {module: faults for module, file in _modules() if (faults := list(_faults(_tree(file))))}
    assert found == {module: [fault] for module, fault in _PICKLES.items()}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "eval('1')",
        "dist.all_gather_object(a, b)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_for_unsafe_code_finds(source):
    assert list(_faults(ast.parse(source)))


def test_only_the_command_line_prints():
    found = [
        f"{module}:{node.lineno}"
        for module, file in _modules()
        if not _is_in(module, "dsi.cli")
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert found == []


# --- imports ------------------------------------------------------------------------------------------------------


def test_importing_dsi_and_its_policies_is_light(fresh_python):
    # containers come with the first layer that one of them stands in for
    policies = [module for module, file in _modules("dsi_policies", *PLUGINS) if file.name != "containers.py"]
    done = fresh_python(
        f"import sys, importlib, dsi\n"
        f"[importlib.import_module(name) for name in {policies}]\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'triton', 'numpy'} & sys.modules.keys()))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_everything_opens_no_connection(fresh_python):
    modules = [module for module, _ in _modules() if not module.endswith("__main__")]
    done = fresh_python(
        "import socket, importlib\n"
        "def refuse(*args, **kwargs): raise AssertionError(f'network at import: {args}')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        f"[importlib.import_module(name) for name in {modules}]\n"
    )
    assert done.returncode == 0, done.stderr
