"""The whole method as a user runs it: make, from nothing to the table."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from conftest import ROOT

from annotate import actions_of, pair_of, read_episodes

STAGES = ("annotate", "train_subgoal", "train_action", "evaluate")


def make(*arguments, code: int = 0) -> str:
    """Run make; its exit code must be `code`. Returns what it printed."""
    command = ["make", "--no-print-directory", *map(str, arguments), "PRESET=smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished `make all PRESET=smoke`."""
    run = tmp_path_factory.mktemp("runs") / "smoke"
    said = make("all", f"RUN={run}")
    assert all(f"== Stage {number}" in said for number in (1, 2, 3, 4)), "a heading for each stage"
    assert re.search(r"\| hierarchical +\|", said) and ".venv/bin/python" not in said
    assert said.count("## Scores") == 1, "one table, of all agents"
    return run


def test_make_all_ends_with_the_table_of_all_three_agents(finished):
    table = (finished / "report.md").read_text()
    for row in ("hierarchical", r"flat \(no sub-goals\)", "random sub-goals", "7-1 lifespan-longest-lived"):
        assert re.search(rf"\| {row} +\|", table)
    assert not list(finished.glob("*.part"))


def test_an_episode_knows_how_many_moves_its_tasks_experts_took(finished):
    experts = {}
    for episode in read_episodes(finished / "train.jsonl"):
        experts.setdefault(episode["task"], []).append(len(episode["steps"]))
    for episode in read_episodes(finished / "hierarchical.jsonl"):
        assert episode["expert_moves"] == pytest.approx(mean(experts[episode["task"]]))


def test_a_second_make_all_makes_nothing_but_the_report(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json*")}
    assert "== " not in make("all", f"RUN={finished}")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("number, script", list(enumerate(STAGES)))
def test_a_changed_script_reruns_its_stage_and_what_follows(finished, number, script):
    path = ROOT / f"{script}.py"
    before = path.stat()
    os.utime(path)
    try:
        plan = make("--dry-run", "evaluate", f"RUN={finished}")
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    rerun = [stage for stage in STAGES if re.search(rf"{stage}\.py (?!--report-only)", plan)]
    assert rerun == list(STAGES[number:])


@pytest.mark.parametrize("experiment, trained", [
    ("ablations", set()),
    ("sizes", {"sizes/planner/nano/subgoal", "sizes/executor/nano/action"}),
    ("heldout", {"heldout/subgoal", "heldout/action", "heldout/flat"}),
    ("seeds", {f"seeds/{seed}/{role}" for seed in (43, 44) for role in ("subgoal", "action", "flat")}),
    ("teachers", {"teachers/rules/subgoal", "teachers/rules/action"}),
    ("selftrain", {"selftrain/subgoal", "selftrain/action"}),
])
def test_an_experiment_trains_what_its_run_has_not_and_ends_in_a_report(finished, experiment, trained):
    if experiment == "selftrain":  # whose variant is planned once the agent has played
        (finished / experiment).mkdir()
        shutil.copy(finished / "train.jsonl", finished / experiment / "solved.jsonl")
    plan = make("--dry-run", experiment, f"RUN={finished}")
    assert set(re.findall(rf"--output_dir {finished}/(\S+)\.part", plan)) == trained
    reported = rf"--report-only .*{finished}/hierarchical\.jsonl.* --report {finished}/{experiment}/report"
    assert re.search(reported, plan), "all files in one line: make takes the next one for another command"
    again = [line for line in plan.splitlines() if "annotate.py --" in line and "--split test" not in line]
    assert all("--input" in line or "--input" in plan[plan.index(line):][:600] for line in again)


def test_an_llm_teaches_only_when_it_is_named(finished):
    plan = ["--dry-run", "teachers", f"RUN={finished}"]
    assert "--annotator llm" not in make(*plan)
    assert "--annotator llm --llm some-model --propagate --max-cost 5" in make(
        *plan, "TEACHERS=propagated", "LLM=some-model", "ANNOTATE_FLAGS=--max-cost 5")


def test_all_teachers_name_the_sub_goals_of_the_same_trajectories(finished, tmp_path):
    run = tmp_path / "rules"
    make(run / "train.jsonl", f"RUN={run}", "ANNOTATOR=rules", f"TRAJECTORIES={finished}")
    mine, others = ({pair_of(e): e for e in read_episodes(folder / "train.jsonl")} for folder in (run, finished))
    assert mine.keys() == others.keys()
    for pair, episode in mine.items():
        assert actions_of(episode) == actions_of(others[pair])
        assert (episode["annotator"], others[pair]["annotator"]) == ("rules", "examples")


def test_held_out_tasks_are_in_no_training_data(finished):
    held_out = finished / "heldout"
    make(held_out / "train.jsonl", f"RUN={held_out}", "WITHOUT=-7-1", "ANNOTATOR=keep", f"TRAJECTORIES={finished}")
    assert {episode["task"] for episode in read_episodes(held_out / "train.jsonl")} == {"find-non-living-thing"}


def test_a_variant_is_another_copy_of_its_runs_agent_and_made_once(finished):
    variant = finished / "seeds" / "43"
    flags = [f"RUN={variant}", "SEED=43", f"DATA={finished}/train.jsonl {finished}/dev.jsonl", "PLAYED=flat"]
    make("agents", *flags)
    mine, main = read_episodes(variant / "flat.jsonl"), read_episodes(finished / "flat.jsonl")
    assert {e["agent"] for e in mine} == {e["agent"] for e in main}
    assert {e["models"] for e in mine}.isdisjoint(e["models"] for e in main)
    assert "== " not in make("agents", *flags)


@pytest.mark.parametrize("script", STAGES)
def test_help_explains_each_stage(script):
    text = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True).stdout
    assert "reads" in text and "writes" in text and f"python {script}.py" in text
