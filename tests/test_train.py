"""Stages 2 and 3: what the students are shown, and training that survives."""

import json

import pytest
from conftest import ROOT, kill_when, run

from annotate import EpisodeFile, read_episodes
from evaluate import Live, Move
from train_action import action_examples, executor_state
from train_subgoal import UNTRAINED, compact, new_model, new_tokenizer, render, subgoal_examples, trained_states

TEMPLATES = {path.stem: path.read_text() for path in sorted((ROOT / "prompts").glob("*[!e].jinja"))}


def acting(episode: dict):
    """(situation, step) as evaluate.py sees them when the agent plays an expert's trained steps."""
    steps = [step for step in episode["steps"] if not UNTRAINED.fullmatch(step["action"])]
    live = Live(episode["task"], 0, 0, 0, episode["description"], {}, 0.0)
    for step in steps:
        live.state = {"look": step["look"], "inventory": step["inventory"]}
        yield live.situation(), step
        live.take(step["subgoal"], Move([(step["action"], step["observation"], step["score"])], False, {}, 0))


@pytest.mark.parametrize("name", ["subgoal", "subgoal_compact", "action", "action_compact"])
def test_training_and_acting_show_the_same_text_for_the_same_state(experts, name):
    for episode in experts:
        examples = action_examples(episode) if name.startswith("action") else subgoal_examples(episode)
        for (trained, _), (situation, step) in zip(examples, acting(episode), strict=True):
            played = executor_state(situation, step["subgoal"]) if name.startswith("action") else situation
            assert render(TEMPLATES[name], trained) == render(TEMPLATES[name], played)


def test_the_planner_never_sees_the_subgoal_that_it_is_to_name(experts):
    for episode in experts:
        shown = [state["subgoal"] for state, _ in subgoal_examples(episode)]
        named = [subgoal for _, subgoal in subgoal_examples(episode)]
        assert shown == [None, *named[:-1]]


def test_the_flat_baseline_sees_no_subgoal(experts):
    for episode in experts:
        subgoals = {step["subgoal"] for step in episode["steps"]}
        for state, _ in action_examples(episode, flat=True):
            for name in ("action", "action_compact"):
                assert not any(subgoal in render(TEMPLATES[name], state) for subgoal in subgoals)


def test_looks_and_closed_doors_are_left_out_of_examples_and_history(experts):
    for episode in experts:
        for state, step in trained_states(episode):
            assert not UNTRAINED.fullmatch(step["action"])
            assert not any(UNTRAINED.fullmatch(past["action"]) for past in state["history"])


def test_the_compact_wording_keeps_every_door_and_thing():
    look = (
        "This room is called the kitchen. In it, you see: \n\tthe agent\n\ta substance called air\n"
        "\ta counter. On the counter is: a bowl (containing a red apple, a banana), a drawer.\n"
        "\ta sink, which is turned off. In the sink is: nothing.\n"
        "\ta thermometer, currently reading a temperature of 10 degrees celsius\n"
        "You also see:\n\tA door to the bathroom (that is open)\n\tA door to the hallway (that is open)\n"
    )
    words = compact(look)
    things = "counter, bowl, red apple, banana, drawer, sink, thermometer, 10, bathroom, hallway"
    assert all(thing in words for thing in things.split(", "))
    assert len(words) < len(look) / 2


def test_a_tokenizer_from_scratch_gives_back_every_subgoal_and_action(experts):
    answers = {text for e in experts for step in e["steps"] for text in (step["subgoal"], step["action"])}
    tokenizer = new_tokenizer(sorted(answers))
    for answer in answers:
        assert tokenizer.decode(tokenizer(answer).input_ids, skip_special_tokens=True) == answer
    kitchen = [tokenizer.tokenize(text)[i] for text, i in (("navigate_to(kitchen)", 2), ("go to kitchen", 2))]
    assert kitchen[0] == kitchen[1]


def test_a_model_from_scratch_starts_with_a_cross_attention_that_copies():
    import torch

    attention = new_model("tiny", 100).decoder.block[0].layer[1].EncDecAttention
    assert torch.allclose(attention.o.weight @ attention.v.weight, torch.eye(128), atol=1e-5)


def test_training_leaves_a_student_with_its_scores(students):
    about = json.loads((students["flat"] / "student.json").read_text())
    assert about["role"] == "action" and about["flat"] is True
    assert 0 <= about["dev_exact_match"] <= 1 and about["dev_loss"] > 0


@pytest.mark.parametrize("script", ["train_subgoal.py", "train_action.py"])
def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path, data, script):
    flags = ["--data", data, "--model", "tiny", "--max_steps", 60, "--output-dir", tmp_path / "student"]
    states = lambda: list((tmp_path / "student").glob("checkpoint-*/trainer_state.json"))  # noqa: E731
    kill_when(script, *flags, ready=states)
    assert "going on from step" in run(script, *flags).stdout
    assert (tmp_path / "student" / "student.json").exists()
    refused = run(script, *flags, "--learning_rate", "1e-5", code=2)
    assert "other settings" in refused.stderr


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--data", "nowhere.jsonl", "--model", "tiny"], "cannot be read"),
        (["--data", "{data}", "--model", "{folder}"], "not a model folder"),
        (["--data", "{data}", "--model", "no-such/model"], "nor can it be downloaded"),
        (["--data", "{data}", "--model", "tiny", "--template", "nowhere.jinja"], "is not a file"),
        (["--data", "{test}", "--model", "tiny"], "test episodes"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, data, flags, complaint):
    test = tmp_path / "test.jsonl"
    EpisodeFile(test).append({**read_episodes(data)[0], "split": "test"})
    names = {"data": data, "folder": tmp_path, "test": test}
    refused = run(
        "train_subgoal.py", *(flag.format(**names) for flag in flags), "--output-dir", tmp_path / "out", code=2
    )
    assert complaint in refused.stderr and "Traceback" not in refused.stderr
    assert refused.stderr.strip().count("\n") == 0
