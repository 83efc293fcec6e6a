"""Stage 1: collecting expert trajectories and naming their sub-goals."""

import json
import re
from itertools import groupby
from statistics import mean

import pytest
from conftest import kill_when, run

from annotate import (
    EPISODE_FIELDS,
    STEP_FIELDS,
    EpisodeFile,
    annotate_by_rules,
    read_episodes,
    resolve_tasks,
)

SUBGOAL = re.compile(r"[a-z_]+\(([^();]+)?\)")


def labelled(*actions: str, room: str = "hallway") -> list[tuple[str, int]]:
    """(sub-goal, number of steps) that the rules give some actions. A look shows the room that the walks led to."""
    steps = []
    for action in actions:
        steps.append({"action": action, "look": f"This room is called the {room}. In it, you see:"})
        room = action.removeprefix("go to ") if action.startswith("go to ") else room
    names = [step["subgoal"] for step in annotate_by_rules({"steps": steps})["steps"]]
    return [(name, len(list(group))) for name, group in groupby(names)]


def test_all_30_tasks_give_a_trajectory_in_the_one_record(experts):
    assert len({episode["task"] for episode in experts}) == 30
    for episode in experts:
        assert episode.keys() >= EPISODE_FIELDS and episode["annotator"] == "rules"
        assert episode["score"] == episode["steps"][-1]["score"] == 100
        assert (episode["split"], episode["simplifications"]) == ("train", "easy")
        for step in episode["steps"]:
            assert step.keys() == STEP_FIELDS
            assert step["look"] and step["inventory"] and step["observation"]


def test_every_step_of_every_task_has_a_well_formed_subgoal(experts):
    for episode in experts:
        for step in episode["steps"]:
            assert SUBGOAL.fullmatch(step["subgoal"]), (episode["task"], step["action"], step["subgoal"])


def test_subgoals_are_coarser_than_actions_as_in_the_papers_examples(experts):
    lengths = [len(e["steps"]) / len(list(groupby(step["subgoal"] for step in e["steps"]))) for e in experts]
    # on an inclined plane the expert looks dozens of times while the block slides: one sub-goal
    ordinary = [length for e, length in zip(experts, lengths, strict=True) if "inclined" not in e["task"]]
    assert 2 <= mean(lengths) <= 6
    assert min(lengths) >= 1.5 and max(ordinary) <= 8


def test_opening_a_cupboard_and_taking_the_pot_out_is_one_subgoal():
    assert labelled("open cupboard", "pick up metal pot", "look around") == [("find(metal pot)", 3)]


def test_the_thermometer_loop_is_one_subgoal():
    loop = ["examine ice", "use thermometer in inventory on ice", "wait"] * 3
    assert labelled(*loop, "focus on red box") == [("monitor_temperature(ice)", 9), ("focus_on(red box)", 1)]


def test_a_walk_is_named_by_its_last_room_and_ends_where_it_turns_back():
    walk = ["open door to bedroom", "go to bedroom", "open door to hallway", "go to hallway", "go to kitchen"]
    assert labelled(*walk) == [("navigate_to(bedroom)", 2), ("navigate_to(kitchen)", 3)]


def test_tasks_are_named_by_name_id_and_topic_in_the_benchmarks_order():
    assert resolve_tasks("7-1, 4-2,boil") == ["boil", "find-non-living-thing", "lifespan-longest-lived"]
    assert len(resolve_tasks("4")) == 4 and len(resolve_tasks("1")) == 4 and len(resolve_tasks("all")) == 30


def test_an_unknown_task_is_refused_with_the_nearest_names(tmp_path):
    refused = run("annotate.py", "--tasks", "boyl", "--output", tmp_path / "x.jsonl", code=2)
    assert "'boyl'" in refused.stderr and "boil" in refused.stderr.replace("boyl", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, complaint",
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ('{"task": "boil"}\n', "line 1: not an episode"),
        ('{"task": "boil", "ste', "line 1: not a whole JSON record"),
    ],
)
def test_missing_empty_foreign_and_torn_files_are_refused_by_line(tmp_path, capsys, text, complaint):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        read_episodes(path)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path, data):
    path = tmp_path / "torn.jsonl"
    lines = data.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:500])
    file = EpisodeFile(path, annotator="rules")
    assert len(file.done) == 3 and path.read_bytes() == b"".join(lines[:3])
    file.append(json.loads(lines[3]))
    assert path.read_bytes() == b"".join(lines[:4])


def test_a_file_of_another_annotator_is_not_mixed(tmp_path, data, capsys):
    with pytest.raises(SystemExit):
        EpisodeFile(data, annotator="gpt-4o-mini")
    assert "'rules'" in capsys.readouterr().err


def test_after_kill_9_the_same_command_finishes_without_a_line_twice(tmp_path):
    path = tmp_path / "train.jsonl"
    flags = ["--tasks", "7-1", "--variations", 12, "--annotator", "rules", "--output", path]
    family = kill_when("annotate.py", *flags, ready=lambda: path.exists() and path.read_bytes().count(b"\n") >= 3)
    assert len(family) >= 2  # a worker and its JVM were there to be left behind
    kept = path.read_bytes()
    run("annotate.py", *flags)
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert sorted(episode["variation"] for episode in read_episodes(path)) == list(range(12))
