"""The whole method as a user runs it: make, from nothing to the table."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT


def make(*arguments) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished `make all PRESET=smoke`."""
    run = tmp_path_factory.mktemp("runs") / "smoke"
    assert "| hierarchical |" in make("all", "PRESET=smoke", f"RUN={run}")
    return run


def test_make_all_ends_with_the_table_of_all_three_agents(finished):
    table = (finished / "report.md").read_text()
    for row in (
        "| hierarchical |",
        "| flat (no sub-goals) |",
        "| random sub-goals |",
        "| 7-1 lifespan-longest-lived |",
    ):
        assert row in table
    assert not list(finished.glob("*.part"))


def test_a_second_make_all_has_nothing_to_do(finished):
    started = time.time()
    assert "python" not in make("all", "PRESET=smoke", f"RUN={finished}")
    assert time.time() - started < 5


@pytest.mark.parametrize(
    "script, stages",
    [
        ("evaluate.py", {"evaluate"}),
        ("train_action.py", {"train_action", "evaluate"}),
        ("train_subgoal.py", {"train_subgoal", "train_action", "evaluate"}),
        ("annotate.py", {"annotate", "train_subgoal", "train_action", "evaluate"}),
    ],
)
def test_a_changed_script_reruns_its_stage_and_what_follows(finished, script, stages):
    plan = make("--dry-run", "--what-if", script, "evaluate", "PRESET=smoke", f"RUN={finished}")
    assert {
        stage for stage in ("annotate", "train_subgoal", "train_action", "evaluate") if f"python {stage}.py" in plan
    } == stages


@pytest.mark.parametrize("script", ["annotate.py", "train_subgoal.py", "train_action.py", "evaluate.py"])
def test_help_explains_each_stage(script):
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
    assert "reads" in text and "writes" in text and f"python {script}" in text
