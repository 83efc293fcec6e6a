"""What the tests share: the four commands run as a user runs them, and small real data."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # files run side by side, one a core; other threads would add up in another order

from annotate import read_episodes  # noqa: E402


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script: str, *flags, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script to its end; its exit code must be `code`."""
    done = subprocess.run(
        command(script, *flags),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def kill_when(script: str, *flags, ready, seconds: float = 120):
    """Start a script, kill it with -9 as soon as `ready()` holds, and check that its processes are gone soon after."""
    process = subprocess.Popen(command(script, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + seconds
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.time() < deadline, "it never got so far"
        time.sleep(0.02)
    family = descendants(process.pid)
    process.kill()
    process.wait()
    while any(alive(pid) for pid in family):
        assert time.time() < deadline, "a process was left behind"
        time.sleep(0.1)
    return family


def descendants(pid: int) -> list[int]:
    """Process ids of all children, theirs included: simulator workers and their JVMs."""
    children = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            children += map(int, listed.read_text().split())
    return children + [grandchild for child in children for grandchild in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def experts(tmp_path_factory) -> list[dict]:
    """One annotated expert trajectory of each of the 30 tasks, collected from the simulator."""
    path = tmp_path_factory.mktemp("experts") / "all.jsonl"
    run("annotate.py", "--tasks", "all", "--variations", 1, "--annotator", "rules", "--output", path)
    return read_episodes(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small training file: short trajectories of two tasks."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    run("annotate.py", "--tasks", "4-2,7-1", "--variations", 4, "--annotator", "rules", "--output", path)
    return path


@pytest.fixture(scope="session")
def students(tmp_path_factory, data) -> dict[str, Path]:
    """Folders of the three students, each after a few steps of training."""
    folder = tmp_path_factory.mktemp("students")
    common = ["--data", data, "--model", "tiny", "--max_steps", 6, "--output-dir"]
    run("train_subgoal.py", *common, folder / "subgoal")
    run("train_action.py", *common, folder / "action")
    run("train_action.py", *common, folder / "flat", "--flat")
    return {path.name: path for path in folder.iterdir()}
