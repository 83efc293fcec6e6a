"""Stage 1: collecting expert trajectories, naming their sub-goals by rules and examples, and files that survive."""

import json
import os
import re
import signal
from itertools import repeat

import pytest
from conftest import alive, descendants, kill_when, run, start, wait_until, whole_lines, written

import annotate
from annotate import (
    EPISODE_FIELDS, EXAMPLES, STEP_FIELDS, EpisodeFile, JsonLines, Simulator, agreement, annotate_by_examples,
    annotate_by_rules, collect_all, labels_of, read_episodes, resolve_tasks, split_variations
)

SUBGOAL = re.compile(r"[a-z_]+\(([^();]+)?\)")


def episode_of(actions: str, labels: list | None = None, description: str = "") -> dict:
    """An episode of some actions, divided by commas. A look shows the room that the walks led to."""
    steps, room = [], "hallway"
    for action, label in zip(actions.split(", "), labels or repeat(None), strict=False):
        steps.append({"action": action, "subgoal": label, "look": f"This room is called the {room}. In it, you see:"})
        room = action.removeprefix("go to ") if action.startswith("go to ") else room
    return {"description": description, "steps": steps}


# ---- The record and the sub-goals


def test_all_30_tasks_give_a_trajectory_in_the_one_record(tmp_path):
    path = tmp_path / "all.jsonl"
    run("annotate.py", "--tasks", "all", "--variations", 1, "--annotator", "rules", "--output", path)
    experts = read_episodes(path)
    assert len({episode["task"] for episode in experts}) == 30
    for episode in experts:
        assert episode.keys() >= EPISODE_FIELDS and episode["annotator"] == "rules"
        assert episode["score"] == episode["steps"][-1]["score"] == 100
        assert (episode["split"], episode["simplifications"]) == ("train", "easy")
        for step in episode["steps"]:
            assert step.keys() == STEP_FIELDS
            assert step["look"] and step["inventory"] and step["observation"]
            assert SUBGOAL.fullmatch(step["subgoal"]), (episode["task"], step["action"], step["subgoal"])


@pytest.mark.parametrize("actions, subgoals", [
    ("open cupboard, pick up metal pot, look around", ["find(metal pot)"] * 3),
    ("move gallium to metal pot containing gallium, look around", ["move(gallium, metal pot)"] * 2),
    ("open fridge, open freezer, focus on ice", ["find(ice)"] * 2 + ["focus_on(ice)"]),
    ("examine ice, use thermometer in inventory on ice, wait, examine ice, focus on red box",
     ["monitor_temperature(ice)"] * 4 + ["focus_on(red box)"]),
    # a walk is named by its last room, and ends where it turns back
    ("open door to bedroom, go to bedroom, open door to hallway, go to hallway, go to kitchen",
     ["navigate_to(bedroom)"] * 2 + ["navigate_to(kitchen)"] * 3),
])
def test_rules_name_what_some_actions_are_for(actions, subgoals):
    assert labels_of(annotate_by_rules(episode_of(actions))) == subgoals


def test_carrying_over_renames_objects_and_follows_longer_walks_and_waits():
    source = episode_of(
        "open door to kitchen, go to kitchen, open cupboard, pick up metal pot, wait1, move metal pot to stove, "
        "activate stove", ["navigate_to(kitchen)"] * 2 + ["find(metal pot)"] * 2 + ["wait()"] +
        ["heat(water, metal pot)"] * 2, "boil water")
    other = episode_of(
        "open door to hallway, go to hallway, open door to foundry, go to foundry, open drawer, pick up tin cup, "
        "wait1, wait1, wait1, move tin cup to blast furnace, activate blast furnace", description="boil lead")
    assert labels_of(annotate_by_examples([source], other)) == (
        ["navigate_to(foundry)"] * 4 + ["find(tin cup)"] * 2 + ["wait()"] * 3 + ["heat(lead, tin cup)"] * 2)
    stranger = annotate_by_examples([source], episode_of("read book, eat apple, dunk cup into bath"))
    assert stranger["answer"] == "rules" and labels_of(stranger)[0] == "read(book)"


def test_the_embedded_annotators_agree_with_the_hand_as_the_readme_says(tmp_path):
    run("annotate.py", "--input", EXAMPLES, "--annotator", "rules", "--output", tmp_path / "mine.jsonl")
    report = run("annotate.py", "--report", tmp_path / "mine.jsonl").stdout
    mine, rules, rules_of_two, held_out = re.findall(r"F1 (\S+) .*same sub-goal (\S+)", report)
    assert mine == rules == ("0.97", "0.67")
    assert (rules_of_two, held_out) == (("0.96", "0.70"), ("0.97", "0.88"))


def test_a_path_that_falls_short_is_played_in_another_load(monkeypatch):
    scores = iter([87, 100])
    monkeypatch.setattr(annotate, "collect", lambda *_: {"score": next(scores)})
    monkeypatch.setattr(Simulator, "game", lambda _: object())
    assert list(collect_all([("freeze", 11)], "train", workers=1)) == [("freeze", 11, {"score": 100})]


def test_agreement_counts_boundaries_and_names():
    figures = agreement([(["a(x)", "a(x)", "b(y)", "c(z)"], ["a(x)", "a(x)", "b(x)", "b(x)"])])
    assert figures == pytest.approx(
        {"precision": 0.5, "recall": 1, "F1": 2 / 3, "same function": 0.75, "same sub-goal": 0.5})


# ---- What is annotated


def test_tasks_are_named_by_name_id_and_topic_in_the_benchmarks_order_and_can_be_left_out(tmp_path, refusal):
    assert resolve_tasks("7-1, 4-2,boil") == ["boil", "find-non-living-thing", "lifespan-longest-lived"]
    assert len(resolve_tasks("4")) == 4 and len(resolve_tasks("1")) == 4 and len(resolve_tasks("all")) == 30
    assert resolve_tasks("1,-melt,-1-1") == ["freeze", "change-the-state-of-matter-of"]
    said = refusal(annotate, "--tasks", "boyl", "--output", tmp_path / "x.jsonl")
    assert "no task 'boyl'; the nearest are boil," in said and not list(tmp_path.iterdir())


def test_some_train_variations_are_spread_over_all_and_those_of_test_are_the_first(simulator):
    taken = {(split, limit): [variation for _, variation in split_variations(simulator, ["boil"], split, limit)]
             for split in ("train", "test") for limit in (4, 99, None)}
    assert taken["train", 4] == [0, 3, 7, 10] and taken["train", 99] == taken["train", None] == list(range(14))
    assert taken["test", 4] == taken["test", None][:4] and taken["test", 99] == taken["test", None]


def test_of_what_an_agent_has_played_the_lowest_solved_variations_can_be_kept_for_training(data, tmp_path):
    ordered = sorted(read_episodes(data), key=lambda episode: episode["variation"])
    episodes = [{**episode, "score": 100 - episode["variation"] % 3} for episode in ordered]
    del episodes[0]["annotator"], episodes[1]["annotator"]
    played, output = written(tmp_path / "played.jsonl", episodes[::-1]), tmp_path / "solved.jsonl"
    said = run("annotate.py", "--input", played, "--annotator", "keep", "--tasks", "all,-7-1", "--output", output,
               "--variations", 3)
    mine = [episode for episode in episodes if episode["task"] == "find-non-living-thing"][:3]
    kept = [episode for episode in mine if episode["score"] == 100]
    assert read_episodes(output) == [{**e, "annotator": e.get("annotator", "agent")} for e in kept]
    assert f"{3 - len(kept)} dropped, as they end below 100" in said.stdout and 0 < len(kept) < 3


# ---- Files


@pytest.mark.parametrize("text, complaint", [
    (None, "cannot be read"),
    ("", "is empty"),
    ('{"task": "boil"}\n', "line 1: not an episode"),
    ('{"task": "boil", "ste', "line 1: not a whole JSON record"),
])
def test_missing_empty_foreign_and_torn_files_are_refused_by_line(tmp_path, refusal, text, complaint):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    assert complaint in refusal(annotate, "--input", path, "--output", tmp_path / "out.jsonl")


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path, data):
    path, command = tmp_path / "torn.jsonl", {"annotator": "rules"}
    lines = data.read_bytes().splitlines(keepends=True)
    EpisodeFile(path, command).file.close()
    path.write_bytes(b"".join(lines[:3]) + lines[3][:500])
    file = EpisodeFile(path, command)
    assert len(file.done) == 3 and path.read_bytes() == b"".join(lines[:3])
    file.append(json.loads(lines[3]))
    assert path.read_bytes() == b"".join(lines[:4])


@pytest.mark.parametrize(
    "text", ['{"my": "notes"}', '{"my": "notes"}\n{"more', "Dear diary,\ntoday", '{\n "task": "x"\n}'])
def test_a_foreign_file_named_as_output_is_refused_and_keeps_every_byte(tmp_path, refusal, text):
    path = tmp_path / "mine.json"
    path.write_text(text)
    assert "name another" in refusal(annotate, "--input", EXAMPLES, "--annotator", "rules", "--output", path)
    with pytest.raises(SystemExit, match="2"):
        JsonLines(path)
    assert path.read_text() == text


def test_an_output_of_another_annotator_or_of_rules_since_edited_is_refused_and_can_be_made_anew(
        tmp_path, call, refusal, monkeypatch):
    output = tmp_path / "out.jsonl"
    flags = ["--input", EXAMPLES, "--tasks", "boil", "--output", output, "--annotator"]
    call(annotate, *flags, "rules")
    kept = output.read_bytes()
    assert "was made with annotator rules, this run has examples" in refusal(annotate, *flags, "examples")
    monkeypatch.setattr(annotate, "RULES", annotate.RULES[1:])
    assert "was made with another version of rules" in refusal(annotate, *flags, "rules")
    assert output.read_bytes() == kept
    output.unlink()
    call(annotate, *flags, "examples")
    assert output.stat().st_size


# ---- Deaths


def test_after_kill_9_the_same_command_finishes_without_a_line_twice(tmp_path):
    path = tmp_path / "train.jsonl"
    flags = ["--tasks", "7-1", "--variations", 12, "--annotator", "rules", "--output", path]
    family = kill_when("annotate.py", *flags, ready=lambda: whole_lines(path) >= 3)
    assert family  # a JVM was there to be left behind
    kept = path.read_bytes()
    run("annotate.py", *flags)
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert sorted(episode["variation"] for episode in read_episodes(path)) == [i * 62 // 12 for i in range(12)]


def test_a_jvm_that_is_killed_while_collecting_costs_nothing_and_ctrl_c_leaves_none_behind(tmp_path):
    path = tmp_path / "train.jsonl"
    process = start("annotate.py", "--tasks", "7-1", "--workers", 1, "--annotator", "rules", "--output", path)
    wait_until(lambda: whole_lines(path) >= 2, process)
    before = descendants(process.pid)
    os.kill(before[0], signal.SIGKILL)
    there = whole_lines(path)
    wait_until(lambda: whole_lines(path) >= there + 3, process)
    after = descendants(process.pid)
    assert set(before).isdisjoint(after)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and not any(map(alive, after))
    variations = sorted(episode["variation"] for episode in read_episodes(path))
    assert variations == list(range(len(variations)))
