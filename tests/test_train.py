"""Stages 2 and 3: what the students are shown, and training that survives."""

import json
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT, command, kill_when, run

import train_subgoal
from annotate import EpisodeFile, read_episodes
from evaluate import Live, Move
from train_action import action_examples, executor_state
from train_subgoal import (
    UNTRAINED,
    Batches,
    Options,
    compact,
    new_model,
    new_tokenizer,
    prepared,
    render,
    subgoal_examples,
    trained_states,
)

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


def losses(student) -> dict[tuple[int, str], float]:
    """What the last checkpoint's log holds: (step, name) to value."""
    state = max(student.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    log = json.loads(state.read_text())["log_history"]
    return {(entry["step"], name): entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry}


def same_weights(one, other) -> bool:
    import torch
    from safetensors.torch import load_file

    one, other = (load_file(student / "model.safetensors") for student in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("script", ["train_subgoal.py", "train_action.py"])
def test_a_killed_training_goes_on_and_ends_with_the_weights_of_one_that_was_not(tmp_path, data, script):
    flags = ["--data", data, "--model", "tiny", "--max_steps", 40, "--learning_rate", 1e-3, "--output-dir"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(script, *flags, killed, ready=lambda: list(killed.glob("checkpoint-*/trainer_state.json")))
    assert "going on from step" in run(script, *flags, killed).stdout
    run(script, *flags, whole)
    assert same_weights(killed, whole)
    assert (killed / "student.json").read_text() == (whole / "student.json").read_text()
    refused = run(script, *flags, killed, "--learning_rate", "1e-5", code=2)
    assert "other settings" in refused.stderr


def test_sigterm_leaves_a_checkpoint_to_go_on_from(tmp_path, data):
    flags = ["--data", data, "--model", "tiny", "--max_steps", 40, "--save_steps", 40, "--eval_steps", 40]
    flags += ["--output-dir", tmp_path / "student"]
    stopped = subprocess.Popen(command("train_subgoal.py", *flags), stdout=subprocess.PIPE)
    assert b"40 steps" in stopped.stdout.readline()
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143
    assert "going on from step" in run("train_subgoal.py", *flags).stdout


def test_a_run_killed_after_its_last_step_is_not_trained_on(tmp_path, data):
    flags = ["--data", data, "--model", "tiny", "--max_steps", 10, "--output-dir", tmp_path / "student"]
    run("train_subgoal.py", *flags)
    before = losses(tmp_path / "student")
    (tmp_path / "student" / "student.json").unlink()
    assert "going on from step 10" in run("train_subgoal.py", *flags).stdout
    assert losses(tmp_path / "student") == before
    assert (tmp_path / "student" / "student.json").exists()


def test_two_processes_give_the_loss_curve_of_one_with_whole_or_shared_out_weights(tmp_path, data):
    flags = ["--data", data, "--model", "tiny", "--max_steps", 16, "--logging_steps", 1, "--use_cpu", "--eval_steps", 4]
    flags += ["--save_steps", 4, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
    flags += ["--learning_rate", 1e-3, "--warmup_steps", 2, "--output-dir"]
    run("train_action.py", *flags, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    for name, sharing in (("two", []), ("shared", ["--fsdp"])):
        done = subprocess.run(
            [*map(str, torchrun), *command("train_action.py", *flags, tmp_path / name, *sharing)[1:]],
            capture_output=True, text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("16 steps") == 1, "one process speaks for all"
        one, two = losses(tmp_path / "one"), losses(tmp_path / name)
        assert one.keys() == two.keys() and len(one) == 20
        assert all(abs(one[key] - two[key]) < 1e-3 for key in one)
        about = [json.loads((tmp_path / folder / "student.json").read_text()) for folder in ("one", name)]
        assert about[0]["dev_examples"] % 32, "the dev set must not come out even: counting one twice would not show"
        assert about[0].keys() == about[1].keys()


def test_accumulated_batches_count_as_one_large_batch(tmp_path, data):
    flags = ["--data", data, "--model", "tiny", "--max_steps", 6, "--logging_steps", 1, "--warmup_steps", 2]
    for size, steps in ((8, 1), (2, 4)):
        batch = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps]
        run("train_action.py", *flags, *batch, "--output-dir", tmp_path / str(size))
    large, small = losses(tmp_path / "8"), losses(tmp_path / "2")
    assert large.keys() == small.keys() and all(abs(large[key] - small[key]) < 1e-3 for key in large)


def test_processes_that_cannot_share_an_update_evenly_are_refused(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot share" in run("train_subgoal.py", "--data", data, "--model", "tiny", code=2).stderr


def test_a_dry_run_says_what_training_takes_and_leaves_nothing(tmp_path, data):
    flags = ["--data", data, "--model", "tiny", "--output-dir", tmp_path / "student"]
    said = run("train_subgoal.py", *flags, "--dry-run").stdout
    words = ["examples", "tokens an epoch", "with padding", "cut", "steps", "M parameters", "GB", "hours"]
    assert all(word in said for word in words), said
    assert not (tmp_path / "student").exists()


def test_updates_are_the_same_however_many_processes_share_them():
    lengths = np.random.default_rng(0).integers(20, 900, 1003)
    for tokens in (None, 4096):
        alone = Batches(lengths, 32, tokens, shares=4)
        for epoch in range(3):
            shared = [Batches(lengths, 32, tokens, shares=4, rank=rank, processes=2) for rank in (0, 1)]
            for batches in (alone, *shared):
                batches.epoch = epoch
            first, second = map(list, shared)
            assert len(first) == len(second) == len(shared[0]) == len(alone) / 2
            assert list(alone) == [batch for pair in zip(first, second, strict=True) for batch in pair]
            assert {i for batch in alone for i in batch} == set(range(len(lengths)))
            for update in alone.updates():
                assert len(update) == 32 if tokens is None else max(lengths[update]) * len(update) <= tokens


def test_the_next_epoch_brings_other_batches():
    batches = Batches(np.full(64, 100), 8)
    first = list(batches)
    assert first == list(batches)
    batches.epoch = 1
    assert sorted(map(sorted, first)) != sorted(map(sorted, batches))


def test_data_are_tokenised_once_until_data_or_template_change(tmp_path, data, monkeypatch):
    options = Options([str(data)], model="tiny")
    about = dict(role="subgoal", template=TEMPLATES["subgoal_compact"])
    tokens, notes = prepared(about, options, subgoal_examples, None)
    monkeypatch.setattr(train_subgoal, "read_data", None)  # what is called now fails
    again, same = prepared(about, options, subgoal_examples, None)
    assert same == notes and all((again[name] == tokens[name]).all() for name in tokens)
    with pytest.raises(TypeError):
        prepared({**about, "template": "{{ look }}"}, options, subgoal_examples, None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model hub that holds nothing: asking the real one would take as long as the network likes."""
    empty = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


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
def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, data, hub, flags, complaint):
    test = tmp_path / "test.jsonl"
    EpisodeFile(test).append({**read_episodes(data)[0], "split": "test"})
    names = {"data": data, "folder": tmp_path, "test": test}
    refused = run(
        "train_subgoal.py", *(flag.format(**names) for flag in flags), "--output-dir", tmp_path / "out", code=2
    )
    assert complaint in refused.stderr and "Traceback" not in refused.stderr
    assert refused.stderr.strip().count("\n") == 0
