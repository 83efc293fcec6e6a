"""What the tests share: the four commands run as a user runs them, and small real data."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # files run side by side, one a core; other threads would add up in another order
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore Ctrl-C

from annotate import EXAMPLES, annotate_by_rules, read_episodes  # noqa: E402


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


def start(script: str, *flags) -> subprocess.Popen:
    return subprocess.Popen(command(script, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(ready, process: subprocess.Popen, seconds: float = 120):
    """Wait for `ready()` to hold while a process runs."""
    deadline = time.time() + seconds
    while not ready():
        assert process.poll() is None, "it ended too early"
        assert time.time() < deadline, "it never got so far"
        time.sleep(0.02)


def kill_when(script: str, *flags, ready, seconds: float = 120):
    """Start a script, kill it with -9 as soon as `ready()` holds, and check that its processes are gone soon after."""
    process = start(script, *flags)
    wait_until(ready, process, seconds)
    family = descendants(process.pid)
    process.kill()
    process.wait()
    gone_by = time.time() + 30
    while any(alive(pid) for pid in family):
        assert time.time() < gone_by, "a process was left behind"
        time.sleep(0.1)
    return family


def processes() -> dict[int, tuple[int, str]]:
    """Parent and state of every process of the machine, zombies left out."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = map(str.split, listed.splitlines())
    return {int(pid): (int(parent), state) for pid, parent, state in rows if not state.startswith("Z")}


def descendants(pid: int) -> list[int]:
    """Process ids of all children, theirs included: the JVMs of the simulators."""
    listed = processes()

    def below(parent: int) -> list[int]:
        children = [child for child, (of, _) in listed.items() if of == parent]
        return children + [one for child in children for one in below(child)]

    return below(pid)


def alive(pid: int) -> bool:
    return pid in processes()


@pytest.fixture(scope="session")
def experts() -> list[dict]:
    """One expert trajectory of each of the 30 tasks, from the examples, with the rules' sub-goals."""
    return list({episode["task"]: annotate_by_rules(episode) for episode in read_episodes(EXAMPLES)}.values())


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
    common = ["--data", data, "--model", "tiny", "--max_steps", 40, "--eval_steps", 40, "--save_steps", 40,
              "--warmup_steps", 0, "--learning_rate", 2e-3, "--output_dir"]
    run("train_subgoal.py", *common, folder / "subgoal")
    run("train_action.py", *common, folder / "action")
    run("train_action.py", *common, folder / "flat", "--flat")
    return {path.name: path for path in folder.iterdir()}
