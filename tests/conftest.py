"""What the tests share: the four commands run as a user runs them, and small real data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # files run side by side, one a core; other threads would add up in another order
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore Ctrl-C

from annotate import EXAMPLES, Simulator, annotate_by_rules, read_episodes  # noqa: E402
from train_subgoal import topics_of  # noqa: E402


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script: str, *flags, code: int = 0) -> subprocess.CompletedProcess:
    """Run a script to its end; its exit code must be `code`."""
    done = subprocess.run(command(script, *flags), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def start(script: str, *flags) -> subprocess.Popen:
    return subprocess.Popen(command(script, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(ready, process: subprocess.Popen | None = None):
    """Wait for `ready()` to hold, while a process runs."""
    deadline = time.time() + 120
    while not ready():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.time() < deadline, "it never got so far"
        time.sleep(0.02)


def kill_when(script: str, *flags, ready) -> list[int]:
    """Start a script, kill it with -9 as soon as `ready()` holds, and check that its processes are gone soon after."""
    process = start(script, *flags)
    wait_until(ready, process)
    family = descendants(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, family)))
    return family


def descendants(pid: int) -> list[int]:
    """Process ids of all children, theirs included: the JVMs of the simulators."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    children = [child for child in map(int, listed.split()) if alive(child)]
    return children + [one for child in children for one in descendants(child)]


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state != "" and not state.startswith("Z")


def written(path: Path, episodes: list[dict]) -> Path:
    """A file of some episodes."""
    path.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return path


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def step_of(subgoal: str | None = "wait()", action: str = "wait", score: int = 0, **more) -> dict:
    return dict(look="A room.", inventory="", subgoal=subgoal, action=action, observation="", score=score) | more


class Says:
    """In a student's place: it answers `say(state)`, likeliest first, and keeps what it was asked."""

    def __init__(self, say, habits: dict | None = None, unshown: Iterable[str] = ()):
        self.say, self.states, self.best = say, [], []
        self.about = {"habits": habits or {}, "unshown": unshown}
        self.wordings, self.likely = (), 1.0

    def answers(self, states: list[dict], beams: int, best: int = 1) -> list[list[str]]:
        self.states += states
        self.best += [best] * len(states)
        return [self.say(state)[:best] for state in states]

    def topics(self, state: dict) -> tuple[str, ...]:
        return topics_of(state["description"], self.wordings)

    def likelihood(self, state: dict, answer: str) -> float:
        return self.likely


@pytest.fixture
def call(monkeypatch):
    """Calls a script's main in this process."""
    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        script.main()

    return call


@pytest.fixture
def refusal(call, capsys):
    """What a script, called in this process, says to flags that it does not take: one sentence."""
    def refusal(script, *flags) -> str:
        capsys.readouterr()  # what was said before
        with pytest.raises(SystemExit, match="2"):
            call(script, *flags)
        said = capsys.readouterr().err
        assert said.startswith(f"{script.__name__}.py: ") and said.count("\n") == 1
        return said

    return refusal


@pytest.fixture(scope="module")
def simulator():
    with closing(Simulator()) as simulator:
        yield simulator


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
