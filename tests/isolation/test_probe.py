"""`dsi plugins --probe` outlives every plugin and says what loading it does; `dsi plugins` is quick with thirty."""

from __future__ import annotations

import json
import resource
import sys

import pytest

from tests.support.hostile import DEADLY, GOOD, install_deadly
from tests.support.site import put_distribution, run_dsi


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """(exit code, name -> what `dsi plugins --probe --json` says)"""
    site = tmp_path_factory.mktemp("deadly")
    install_deadly(site)
    only = ",".join(["neighbour", *DEADLY])
    done = run_dsi("plugins", "--probe", "--timeout", "4", "--json", site=site, DSI_PLUGINS=only)
    assert done.stdout, done.stderr
    return done.returncode, {one["name"]: one for one in json.loads(done.stdout)["plugins"] if one["name"] in only}


PROBED = {
    "neighbour": ("ok", "", ""),
    "leaves": ("crash", "it ended the process while it was loaded: exit code 3", "DSI_DISABLE_PLUGINS=leaves"),
    "leaves_clean": ("crash", "exit code 0", "uninstall deadly-leaves_clean"),
    "segfault": ("crash", "killed by SIGSEGV", "DSI_DISABLE_PLUGINS=segfault"),
    "loops": ("timeout", "it had not loaded after 4 s", "DSI_DISABLE_PLUGINS=loops"),
    "interrupts": ("crash", "exit code 1 (KeyboardInterrupt", "DSI_DISABLE_PLUGINS=interrupts"),
    "loud": ("warned", "prints to stdout while it is loaded ('from below", "use logging"),
    "heavy": ("warned", "it imports numpy while it is loaded", "inside the functions"),
    "sly": ("broken", "it replaced torch.nn.Dropout.forward", "change nothing"),
    "stdlib": ("broken", "it replaced json.dumps", "change nothing"),
    "environ": ("broken", "it replaced os.environ['OMP_NUM_THREADS']", "change nothing"),
    "orphan": ("warned", "it leaves a process running", "when they are first needed"),
}


@pytest.mark.parametrize("name", PROBED)
def test_the_probe_says_what_loading_does_to_a_process(probed, name):
    _, found = probed
    verdict, reason, mend = PROBED[name]
    assert found[name]["verdict"] == verdict, found[name]
    assert reason in found[name]["reason"]
    assert mend in found[name]["mend"]
    if verdict == "ok":
        assert 0 < found[name]["seconds"] < 1
        assert 0 < found[name]["modules"] < 10


def test_the_probe_fails_where_one_harms_its_host(probed):
    assert PROBED.keys() == {"neighbour", *DEADLY}
    assert probed[0] == 1


def test_thirty_plugins_are_listed_in_three_tenths_of_a_second(tmp_path, capsys):
    """By the processor time of the whole process, best of three: a busy machine does not count."""
    for number in range(30):
        source = GOOD.replace("some.models", f"some.models{number}")
        put_distribution(tmp_path, f"acme-{number}", {f"acme_{number}": source})

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_dsi("plugins", site=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.count("acme-") == 30, done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = min(seconds() for _ in range(3))
    with capsys.disabled():
        sys.stdout.write(f"\ndsi plugins, 30 plugins beside the installed ones: {best:.3f} s of processor time\n")
    assert best <= 0.3
