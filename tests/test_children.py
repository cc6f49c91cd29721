"""What tests start has the signals of a foreground job, and does not outlive them."""

import re
import signal
import sys
from contextlib import suppress

import psutil
import pytest

from tests.children import ROOT, left_running, run, started, wait_until
from tests.commands import warm_python

pytestmark = pytest.mark.slow

AS_WORKERS_DO = "from tests.children import run, take_charge; take_charge();"
SAYS = "import signal; print(signal.getsignal(signal.SIGINT) == signal.default_int_handler)"
STARTS_ANOTHER = "import subprocess, time; subprocess.Popen(['sleep', '1000'], start_new_session={}); time.sleep(1000)"


def test_ctrl_c_is_heard_where_the_shell_ignores_it():
    """As in any background job."""
    code = f"{AS_WORKERS_DO} import sys; print(run([sys.executable, '-c', {SAYS!r}]).stdout)"
    done = run(["bash", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code])
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize("own_session", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_what_a_process_has_started_ends_with_it(own_session, warm, tmp_path):
    python = warm_python() if warm else [sys.executable]
    (tmp_path / "starts.py").write_text(STARTS_ANOTHER.format(own_session))
    with suppress(RuntimeError), started([*python, tmp_path / "starts.py"], cwd=tmp_path):
        wait_until(lambda: sleeping(tmp_path))
        raise RuntimeError("a test fails")
    wait_until(lambda: not sleeping(tmp_path))


def sleeping(folder) -> list[psutil.Process]:
    """The processes that `STARTS_ANOTHER` has started there."""
    processes = psutil.process_iter(["name", "cwd"])
    return [each for each in processes if each.info["name"] == "sleep" and each.info["cwd"] == str(folder)]


def test_a_process_that_has_left_all_others_is_found_and_ended(tmp_path):
    leaves = "import os, subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True); os._exit(0)"
    run([sys.executable, "-c", leaves], stdout=None, stderr=None, cwd=tmp_path)
    wait_until(lambda: sleeping(tmp_path))
    [left] = left_running(grace=0.5)
    assert left.endswith(": sleep 1000")
    assert sleeping(tmp_path) == []
    assert left_running() == []


def test_all_processes_are_started_here():
    """`subprocess.run` will do for what ends by itself in a moment."""
    texts = {path.relative_to(ROOT / "tests"): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    found = {str(path) for path, text in texts.items() if re.search(r"subprocess\.Popen\(", text)}
    assert found == {"children.py", "commands.py", "test_children.py"}


def test_a_session_that_is_terminated_ends_what_it_has_started(tmp_path):
    (tmp_path / "test_waits.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.children import run, take_charge\n"
        "take_charge()\n"
        f"def test_waits(): run(['sleep', '1000'], cwd={str(tmp_path)!r})\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", tmp_path / "test_waits.py"]
    with started(command, cwd=tmp_path) as session:
        wait_until(lambda: sleeping(tmp_path), session)
        session.send_signal(signal.SIGTERM)
        assert session.wait() == 128 + signal.SIGTERM
        assert sleeping(tmp_path) == []
