"""Stages 2 and 3: what the students are shown, and training that learns and survives."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, Says, command, run, step_of, written
from transformers import AutoTokenizer

import train_action
import train_subgoal
from annotate import read_episodes
from evaluate import IN_VAIN, Agent, Live, Student
from train_action import action_examples, executor_state
from train_subgoal import (
    KINDS, REPEATED, UNTRAINED, Examples, Options, Order, case_of, cased, cases_of, compact, compared, habits_of,
    kind_of, named_in, new_model, prepare, read_data, render, renamed, simulator_words, state_of, subgoal_examples,
    topics_of, trained_states, uncased, unshown, wording_of
)

PLANNER, EXECUTOR = "train_subgoal.py", "train_action.py"


def template(name: str) -> str:
    return (ROOT / "prompts" / f"{name}.jinja").read_text()


# ---- What the students are shown -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(30))
def test_training_and_acting_show_the_same_of_a_state_and_the_flat_baseline_no_subgoal(experts, number):
    # but of what did nothing: 59 of 80,549 trained steps, which an agent is not told of when they are its own
    episode = {**experts[number], "steps": [
        step for step in experts[number]["steps"] if not IN_VAIN.fullmatch(step["observation"])]}
    steps = [step for _, step in trained_states(episode)]
    live = Live(episode["task"], episode["variation"])
    live.description = episode["description"]
    said = {word for step in steps for kind in ("subgoal", "action") for word in unshown(step[kind])}
    planner, executor, flat = (Says(lambda state, kind=kind: [steps[len(live.steps)][kind]], unshown=said)
                               for kind in ("subgoal", "action", "action"))
    agent, baseline = Agent(executor, planner, "model", [], beams=1), Agent(flat, None, "none", [], beams=1)
    for step in steps:
        live.state = {"look": step["look"], "inventory": step["inventory"]}
        assert agent.choose([live]) == ([step["subgoal"]], [[step["action"]]])
        assert baseline.choose([live]) == ([None], [[step["action"]]])
        live.note(step["subgoal"], step["action"], step["observation"], step["score"])
    assert planner.states == [state for state, _ in subgoal_examples(episode)]
    assert executor.states == [state for state, _ in action_examples(episode)]
    assert flat.states == [state for state, _ in action_examples(episode, flat=True)]
    for wording in ("action", "action_compact"):
        texts = [render(template(wording), state) for state in flat.states]
        assert not any(step["subgoal"] in text for step in steps for text in texts)


def test_a_small_planner_is_shown_all_that_it_has_done_and_whether_the_last_step_changed_anything():
    names = ["find(pot)", "heat(pot, stove)", "find(pot)", "wait()", "wait()"]
    steps = [step_of(name, look=f"It is {hour}.") for hour, name in enumerate(names)]
    text = render(template("subgoal_compact"), state_of("Boil.", steps, steps[-1]["look"], ""))
    assert "done: heat(pot, stove) ; find(pot) 2 times ; | now: wait() for 2 steps |" in text
    assert "nothing changed" in text
    assert "nothing changed" not in render(template("subgoal_compact"), state_of("Boil.", steps, "It is 5.", ""))


def test_a_small_planner_remembers_what_it_has_measured_and_read():
    steps = [
        step_of("time(plane a)", "look at plane a", observation="a block at the bottom"),
        step_of("time(plane a)", "examine stopwatch", observation="The time reads 24 ticks."),
        step_of("read(recipe)", "read recipe", observation="To make salt water, you need to mix sodium chloride."),
        step_of("drop(recipe)", "drop recipe", observation="You drop it."),
        step_of("time(plane b)", "examine stopwatch", observation="9 ticks")]
    state = state_of("Which?", steps, "", "")
    assert list(state["results"]) == ["time(plane a)", "read(recipe)"], "of what is finished, and was done to know it"
    shown = render(template("subgoal_compact"), state)
    assert "done: time(plane a) with The time reads equal ticks ; read(recipe) with To make" in shown
    assert "did: drop recipe ; examine stopwatch ; less ticks" in shown


def test_students_say_everything_in_small_letters_and_once_which_the_simulator_takes(experts, simulator):
    step = {**experts[0]["steps"][0], "subgoal": "focus_on(baby baby B)", "action": "Focus on baby baby B",
            "observation": ""}
    episode = {**experts[0], "steps": [step]}
    assert [answer for _, answer in subgoal_examples(episode)] == ["focus_on(baby b)"]
    assert [(state["subgoal"], answer) for state, answer in action_examples(episode)] == [
        ("focus_on(baby b)", "focus on baby b")]
    with simulator.watched():
        game = simulator.game()
        game.load("test-conductivity-of-unknown-substances", 0)
        [name] = set(re.findall("unknown substance [A-Z]", game.server.getTaskDescription()))
        game.step("teleport to " + re.search("around the ([a-z ]+)", game.server.getTaskDescription())[1])
        assert game.step(f"pick up {name.lower()}")[0] == f"You move the {name} to the inventory."
        game.load("lifespan-longest-lived", 0)
        game.step("teleport to outside")
        assert "a baby brown bear" in game.state()["look"]
        assert game.step("focus on baby brown bear")[0] == "You focus on the baby brown bear."


def test_what_has_no_subgoals_is_neither_learned_from_nor_played_by(tmp_path, experts, students):
    episode, nameless = experts[0], [{**step, "subgoal": None} for step in experts[0]["steps"]]
    path = written(tmp_path / "unnamed.jsonl", [{**episode, "steps": nameless}])
    for flags in (["train_subgoal.py", "--data", path, "--model", "nano", "--output_dir", tmp_path / "out"],
                  ["evaluate.py", "--subgoals", "oracle", "--data", path, "--action-model", students["action"],
                   "--output", tmp_path / "out.jsonl"],
                  ["annotate.py", "--annotator", "keep", "--input", path, "--output", tmp_path / "kept.jsonl"]):
        assert f"{episode['variation']} has no sub-goals. Annotate it" in run(*flags, code=2).stderr


def test_looks_closed_doors_and_what_was_done_in_vain_are_left_out_of_examples_and_history(experts):
    assert any(step["observation"] == "The door is already open." for episode in experts for step in episode["steps"])
    for episode in experts:
        for state, step in trained_states(episode):
            for shown in [step, *state["history"]]:
                assert not UNTRAINED.fullmatch(shown["action"]) and "is already open" not in shown["observation"]


WORDINGS = [wording_of(texts) for texts in (
    ["Your task is to boil apple juice. Focus on it.", "Your task is to boil tin. Focus on it."],
    ["Your task is to grow a 5 m pea plant in the red box.", "Your task is to grow a 9 m fig tree in the blue box."])]


def test_what_a_task_is_about_are_the_phrases_in_which_its_descriptions_differ():
    assert WORDINGS[0] == "boil focus is it on task to your"
    assert topics_of("Your task is to grow a 7 m oak, in the green (dark green) box.", tuple(WORDINGS)) == (
        "oak", "green", "dark green")
    assert topics_of("Your task is to boil it.", tuple(WORDINGS)) == topics_of("Boil it.", ()) == ()
    assert topics_of("Your task is to boil red-orange.", tuple(WORDINGS)) == ("red", "orange")


BOXES = ("Measure tin in the hall, and then lead. If tin is above 5 degrees, use the red box. If tin is below 5 "
         "degrees, use the blue box. The boxes are around the kitchen.")
TOPICS = ("tin", "lead", "red", "blue", "kitchen", "gold")
BOX_WORDING = wording_of([BOXES, BOXES.replace("red", "pink").replace("blue", "green")])


def test_the_case_of_what_a_task_is_about_is_the_word_that_its_sentence_has_and_the_likest_other_has_not():
    assert [case_of(topic, BOXES, TOPICS) for topic in TOPICS] == ["", "", "above", "below", "", ""]
    shown = render("{{ about }}", state_of(BOXES, [], "a red box", ""), [BOX_WORDING])
    assert shown == "about above red here ; about below blue ;"


@pytest.mark.parametrize("meant, said", [
    ("move(tin, red box)", "move(tin, above red box)"), ("focus on blue box", "focus on below blue box"),
    ("connect(red wire)", "connect(red wire)"), ("find(tin)", "find(tin)")])
def test_who_chooses_a_box_learns_to_say_its_case_and_means_the_box(students, meant, said, monkeypatch):
    assert cased(meant, state_of(BOXES, [], "", ""), TOPICS) == said
    student = Student(students["subgoal"], "subgoal")
    monkeypatch.setitem(student.about, "wordings", [BOX_WORDING])
    monkeypatch.setattr(student, "generate", lambda texts, *_: [[said]])
    assert student.answers([state_of(BOXES, [], "", "")], beams=1) == [[meant]]


@pytest.mark.parametrize("boiled, look, about", [
    ("ice cream", "a cup of ice.", "ice cream"), ("ice cream", "a cup of ice cream.", "ice cream here"),
    ("ice", "a cup of ice cream.", "ice"), ("ice", "a cup of ice.", "ice here")])
def test_small_students_that_decide_are_shown_what_the_task_is_about_and_whether_it_is_in_view(boiled, look, about):
    state = state_of(f"Your task is to boil {boiled}. Focus on it.", [step_of()], look, "")
    for name, who_decides in (("subgoal_compact", state), ("action_compact", executor_state(state, None))):
        assert render(template(name), who_decides, WORDINGS).startswith(f"about {about} ; task: Your task")
        assert "about" not in render(template(name), who_decides)
    assert "about" not in render(template("action_compact"), state, WORDINGS)


@pytest.mark.parametrize("name, role, examples", [
    ("subgoal", "subgoal", subgoal_examples), ("action", "action", action_examples),
    ("flat", "action", partial(action_examples, flat=True))])
def test_a_student_is_asked_in_play_what_it_was_asked_in_training(students, data, name, role, examples, monkeypatch):
    options = Options(data=[str(data)], template=str(ROOT / f"prompts/{role}_compact.jinja"))
    trained = {question for texts in prepare(role, options, examples, flat=name == "flat")[1].values()
               for question, *_ in texts}
    student, asked = Student(students[name], role), []
    monkeypatch.setattr(student, "generate", lambda texts, *_: asked.extend(texts) or [[""]] * len(texts))
    student.answers([state for episode in read_data([str(data)]) for state, _ in examples(episode)], beams=1)
    assert set(asked) == trained and any(" here " in text for text in asked) == (name != "action")


def test_the_compact_wording_keeps_every_door_and_thing():
    look = (
        "This room is called the kitchen. In it, you see: \n\tthe agent\n\ta substance called air\n"
        "\ta counter. On the counter is: a bowl (containing a red apple, a banana), a drawer.\n"
        "\ta sink, which is turned off. In the sink is: nothing.\n"
        "\ta thermometer, currently reading a temperature of 10 degrees celsius\n"
        "You also see:\n\tA door to the bathroom (that is open)\n\tA door to the hallway (that is open)\n")
    words = compact(look)
    things = "counter, bowl, red apple, banana, drawer, sink, thermometer, 10, bathroom, hallway"
    assert all(thing in words for thing in things.split(", "))
    assert len(words) < len(look) / 2


def test_the_compact_wording_says_whether_a_measurement_is_more_or_less_than_the_tasks_limit():
    text = "above 50.0 degrees, if below 50.0 degrees | 9 ticks | -3 degrees | flower pot 60 | 12 ticks | 116 degrees"
    assert compared(text) == (
        "above equal degrees, if below equal degrees | equal ticks | less degrees | flower pot 60 | more ticks | "
        "more degrees")


def test_a_reading_is_shown_to_a_small_planner_right_behind_what_was_measured():
    """So planners of the demo chose the right of two boxes in 100, 100 and 72 of 100 dev episodes; else in 61 to 80."""
    steps = [step_of(action="use thermometer in inventory on cup in inventory",
                     observation="the thermometer measures a temperature of 5 degrees celsius")]
    state = state_of("Is the cup above 9 degrees?", steps, "A room.", "")
    assert "did: use thermometer on cup ; less degrees celsius" in render(template("subgoal_compact"), state)


def test_a_tokenizer_from_scratch_gives_back_all_that_is_said_and_keeps_whole_what_is_to_be_copied(experts, students):
    """Of tasks that it has not seen, too; the same word is one token wherever it stands."""
    tokenizer = AutoTokenizer.from_pretrained(students["subgoal"])
    said = {step[field] for episode in experts for _, step in trained_states(episode)
            for field in ("subgoal", "action")}
    for text in {"focus on book (on the origin of species)", "focus_on(book (on the origin of species))", *said}:
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert all("▁kitchen" in tokenizer.tokenize(text) for text in (
        "navigate_to(kitchen)", "go to kitchen", "found in the kitchen.", "Kitchen, hall", "the 'kitchen'",
        "kitchen-red"))
    words = simulator_words()
    assert {"metal", "fork", "thermometer"} <= words and len(words) > 150
    assert [word for word in words if len(tokenizer.tokenize(word)) > 1] == []


def test_a_model_from_scratch_starts_with_heads_that_look_for_what_follows_the_word_just_written():
    """Untrained, it says of a text that it is to copy what follows with less surprise than without those heads.

    For that, what they attend to has to reach the output as it is.
    """
    torch.manual_seed(0)
    text = torch.randperm(900)[:120].reshape(2, 60) + 10
    losses = []
    for kept in (True, False):
        model = new_model("tiny", 1000).eval()
        if not kept:
            for block in model.decoder.block:
                torch.nn.init.normal_(block.layer[1].EncDecAttention.q.weight, std=0.02)
        with torch.no_grad():
            losses.append(model(input_ids=text, labels=text).loss.item())
    assert losses[0] < losses[1] - 0.5, losses


def test_a_model_from_scratch_starts_with_heads_that_see_what_stands_around_each_word_and_its_other_mentions():
    torch.manual_seed(0)
    text = torch.randperm(900)[None, :120] + 10
    text[0, 20] = text[0, 100] = text[0, 60].item()
    around, elsewhere = new_model("tiny", 1000).encoder(text, output_attentions=True).attentions
    for head, places in enumerate((slice(29, 30), slice(31, 36), slice(15, 29))):
        assert around[0, head, 30, places].sum() > 0.8, "before, the next five, from the second to the fifteenth before"
    mentions, alone = elsewhere[0, 3, 60, [20, 100]], elsewhere[0, 3, 30, 30]
    assert mentions.sum() > 0.5 and alone > 0.5, "a word that stands alone looks at itself"


def test_attention_without_a_scale_trains_to_the_same_bits_as_transformers_own():
    trained = []
    for attention in (None, "eager"):
        torch.manual_seed(0)
        model = new_model("nano", 100)
        if attention:
            model.set_attn_implementation(attention)
        assert model.config._attn_implementation == (attention or "unscaled")
        text, labels = torch.randint(3, 100, (4, 40)), torch.randint(3, 100, (4, 9))
        shown = (torch.arange(40) < torch.tensor([[40], [31], [40], [8]])).long()  # two texts are padded
        model(input_ids=text, attention_mask=shown, labels=labels).loss.backward()
        trained.append([weight.grad for weight in model.parameters()])
    assert all(map(torch.equal, *trained))


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_renamed_objects_have_new_names_wherever_they_stand():
    text, answer = "subgoal: move(red box, table) | sees: red box , red boxes , table , table", "move red box to table"
    named = {"red box": 2, "table": 2}
    seen = {renamed(text, answer, named, ["wire", "wood"], random.Random(seed), 0.5) for seed in range(40)}
    assert len(seen) > 10
    for question, wanted in seen:
        box, table = wanted.removeprefix("move ").split(" to ")
        assert question == f"subgoal: move({box}, {table}) | sees: {box} , red boxes , {table} , {table}"
    assert any("woodwire" in wanted for _, wanted in seen), "some words are two in one"
    assert {wanted.startswith("move red box") + 2 * wanted.endswith("to table") for _, wanted in seen} == {0, 1, 2, 3}


@pytest.mark.parametrize("text, answer, new_text, new_answer", [
    # in small letters and capitals
    ("task: focus | sees: unknown substance b , unknown substance B", "focus on unknown substance b",
     "task: focus | sees: wire , wire", "focus on wire"),
    # what stands once in the text keeps its name, unless the task names it
    ("task: boil it | sees: egg", "find(egg)", "task: boil it | sees: egg", "find(egg)"),
    ("task: boil egg | sees: stone", "find(egg)", "task: boil wire | sees: stone", "find(wire)"),
    # the word that the task shares with an object
    ("task: focus on the life stages of the turtle | sees: turtle egg", "focus on egg turtle",
     "task: focus on the life stages of the wire | sees: wire egg", "focus on egg wire"),
    # a sub-goal's function keeps its name, where an object has the same
    ("task: grow a plant | now: plant(pea plant)", "plant(plant)",
     "task: grow a wire | now: plant(pea wire)", "plant(wire)"),
])
def test_objects_are_renamed_in_task_look_and_answer_alike(text, answer, new_text, new_answer):
    named = named_in(text.partition(" | ")[0], [answer])
    assert renamed(text, answer, named, ["wire"], random.Random(1), 1) == (new_text, new_answer)


def test_of_two_that_were_measured_the_case_is_more_or_less():
    def measured(*readings: tuple[str, int], task: str = "Which is longer, b or f?") -> dict:
        steps = [step_of(f"measure(plane {name})", "examine stopwatch", observation=f"It reads {ticks} ticks.")
                 for name, ticks in readings]
        return state_of(task, steps, "", "")

    both = measured(("f", 12), ("b", 3))
    assert cased("focus_on(plane f)", both, ("b", "f")) == "focus_on(plane more f)"
    assert uncased("focus_on(plane less b)", both, ("b", "f")) == "focus_on(plane b)"
    wording = wording_of(["Which is longer, b or f?", "Which is longer, c or d?"])
    assert render(template("subgoal_compact"), both, [wording]).startswith("about less b ; about more f ; task:")
    assert cases_of(measured(("f", 12)), ("b", "f")) == {"f": "known"}
    assert cases_of(measured(("f", 12)), ("f",)) == {}, "what is measured on and on"
    assert cases_of(measured(("f", 12), ("b", 12)), ("b", "f")) == {"f": "known", "b": "known"}
    assert cases_of(measured(("f", 12), ("b", 3), task="Is b or f over 9 ticks?"), ("b", "f")) == {}


@pytest.mark.parametrize("name, cases", [("subgoal_compact", {"above", "below"}), ("subgoal", set())])
def test_small_students_learn_to_say_the_case_those_with_the_papers_template_what_the_paper_says(name, cases):
    options = Options(data=[str(ROOT / "prompts/examples.jsonl")], template=str(ROOT / f"prompts/{name}.jinja"))
    texts = prepare("subgoal", options, subgoal_examples)[1]
    assert {word for _, answer, *_ in sum(texts.values(), []) for word in re.findall("above|below", answer)} == cases


def test_what_a_task_is_about_is_renamed_where_it_stands_in_another_objects_name():
    named = named_in("The stages of the common toad.", ["focus_on(egg common toad, outside)"], ("common toad",))
    assert named["common toad"] == 1 and named["egg common toad"] == 2


def test_where_a_box_is_to_be_chosen_all_have_other_names_alike():
    """Were the chosen box alone renamed, students would learn to choose what has a strange name."""
    named = named_in(BOXES, ["find(tin)", "find(red wire)", "move(tin, red box)"], TOPICS)
    assert named == {"blue": 1, "red": 1, "red wire": 2, "tin": 1}
    text = "about above red ; about below blue ; use the red box"
    assert renamed(text, "move(tin, above red box)", {"red": 1}, ["wood"], random.Random(1), 1) == (
        "about above wood ; about below blue ; use the wood box", "move(tin, above wood box)")


def test_names_change_from_showing_to_showing_and_follow_from_the_seed_alone():
    texts = [("do: egg | sees: egg", "pick up egg", {"egg": 2}, "eggs")] * 50

    def shown(showing: int, seed: int = 0) -> list[str]:
        examples = Examples(texts, lambda pairs: [dict(input_ids=pair) for pair in pairs], ["wire", "wood"], 0.5, seed)
        return [examples[showing, i]["input_ids"][1] for i in range(50)]

    assert shown(0) == shown(0) and shown(0) != shown(1) and shown(0) != shown(0, seed=1)
    assert 10 < shown(0).count("pick up egg") < 40


# ---- The order of examples -------------------------------------------------------------------------------------------


def epoch_of(lengths, number: int, update: int = 32, seed: int = 0) -> list[int]:
    order = Order(lengths, update, seed)
    order.epoch = number
    return [example for _, example in order]


def test_an_epoch_is_whole_updates_of_one_length_with_every_example_in_an_order_by_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(20, 900, 1003)
    for examples in (5, 20, 32, 1003):  # fewer than an update has fill one
        updates = np.reshape(epoch_of(lengths[:examples], 0), (-1, 32))
        assert len(updates) == -(-examples // 32) and set(updates.flatten()) == set(range(examples))
    spread = np.sort(np.ptp(lengths[updates], axis=1))
    assert np.median(spread) < 60 and spread[-2] < 100, "the last update is filled up, with any length"
    assert max(lengths) in lengths[updates[0]], "too little memory must show at once"
    assert epoch_of(lengths, 3) == epoch_of(lengths, 3)
    assert epoch_of(lengths, 3) != epoch_of(lengths, 4) and epoch_of(lengths, 3) != epoch_of(lengths, 3, seed=1)


def test_an_epoch_takes_its_share_of_a_long_task_and_shows_a_short_one_again_and_again():
    kinds = [("long", "new")] * 900 + [("short", "new")] * 60 + [("one", "new")]

    def epoch(number: int) -> list[tuple[int, int]]:
        order = Order(np.full(961, 9), 8, 0, kinds, per_task=100)
        order.epoch = number
        assert len(order) == 240, "100 of each, but of the last REPEATED, and whole updates"
        return list(order)

    first, second = epoch(0), epoch(1)
    shown = Counter(example for _, example in first)
    assert sum(shown[i] for i in range(900, 960)) == 100 and {shown[i] for i in range(900, 960)} == {1, 2}
    assert shown[960] == REPEATED and len(set(first)) == 240, "each time in another showing, and so with other names"
    long = [{example for _, example in some if example < 900} for some in (first, second)]
    assert len(long[0]) == 100 and len(long[0] & long[1]) < 50, "each epoch takes other ones of the long task"
    assert not set(first) & set(second)


@pytest.mark.parametrize("there_are, shown", [
    ((100, 10, 300, 100, 50, 440), (200, 100, 300, 200, 200, 0)),
    ((2, 0, 500, 5, 5, 488), (2 * REPEATED, 0, 500, 200, 200, 20)),
    ((20, 1, 969, 5, 5, 0), (200, REPEATED, 760, 0, 0, 0))])
def test_each_kind_of_answer_has_its_least_share_of_what_is_shown_of_a_task(there_are, shown):
    """As far as there are as many, REPEATED times those that there are; where there are more, as many as there are."""
    kinds = [kind for kind, count in zip(KINDS, there_are, strict=True) for _ in range(count)]
    order = Order(np.full(1000, 9), 4, 0, [("measure", kind) for kind in kinds], per_task=1000)
    counts = Counter(kinds[example] for _, example in order)
    assert tuple(counts[kind] for kind in KINDS) == shown


def test_what_an_episode_ends_with_is_told_from_what_is_new_and_from_what_was_just_said():
    said = ["find(egg)"] + ["measure(egg)"] * 6 + ["find(egg)", "find(egg)", "move(egg, box)", "move(egg, box)"]
    kinds = " ".join(kind_of(said, i) for i in range(len(said)))
    assert kinds == "new new next again again again before new next last next"


def test_the_first_answers_to_name_what_the_task_is_about_are_a_kind_of_their_own():
    said = ["find(pot)", "find(ice)", "find(ice)", "focus_on(ice)", "wait()", "move(ice, red box)", "look()"]
    kinds = " ".join(kind_of(said, i, topics=["ice", "red"]) for i in range(len(said)))
    assert kinds == "new named next new new named last"


def test_a_planners_examples_are_of_all_kinds_and_an_episode_may_have_none(tmp_path, experts):
    idle = {**experts[0], "variation": 99, "steps": [step_of("wait()", "look around")]}
    options = Options(data=[str(written(tmp_path / "train.jsonl", [*experts, idle]))],
                      template=str(ROOT / "prompts/subgoal_compact.jinja"))
    kinds = Counter(kind for *_, (_, kind) in prepare("subgoal", options, subgoal_examples)[1]["train"])
    assert kinds["again"] > kinds["before"] > 0 and {"last", "new", "next"} < kinds.keys()


def test_an_executor_decides_neither_ends_nor_names_as_its_subgoal_says_them(data):
    def kinds(role: str, make_examples, **more) -> set[str]:
        options = Options(data=[str(data)], template=str(ROOT / f"prompts/{role}_compact.jinja"))
        return {kind for *_, (_, kind) in prepare(role, options, make_examples, **more)[1]["train"]}

    assert {"last", "named"} <= kinds("subgoal", subgoal_examples)
    assert {"last", "named"} <= kinds("action", partial(action_examples, flat=True), flat=True)
    assert not {"last", "named"} & kinds("action", action_examples, flat=False)


def test_a_student_knows_what_the_experts_of_a_task_all_do():
    experts = [("boil water", ["find(pot)", "fill(pot, water)", "focus_on(water, pot)"]),
               ("boil ice", ["find(pot)", "focus_on(ice)"]), ("boil water", ["heat(water)", "heat(ice)"])]
    assert habits_of(experts, ()) == {"focus": True, "told": ["water"]}, "ice was said unasked, and pots are always"
    stranger, topical = [("boil tin", ["focus_on(apple)"])], [("boil tin", ["focus_on(tin cup)"])]
    wordings = (wording_of(["boil tin", "boil ice"]),)
    assert not habits_of(experts + stranger, wordings)["focus"] and not habits_of(experts + topical, ())["focus"]
    assert habits_of(experts + topical, wordings)["focus"], "the tin cup has the tin of the task in its name"
    options = Options(data=[str(ROOT / "prompts/examples.jsonl")], template=str(ROOT / "prompts/subgoal_compact.jinja"))
    about = prepare("subgoal", options, subgoal_examples)[0]
    assert about["habits"]["melt"]["focus"] and not about["habits"]["find-plant"]["focus"]
    assert "kitchen" in about["unshown"] and not {"thermometer", "with", "find"} & set(about["unshown"])


# ---- Training --------------------------------------------------------------------------------------------------------


def about(folder) -> dict:
    return json.loads((folder / "student.json").read_text())


def losses(folder, kind: str = "loss") -> dict[int, float]:
    """A loss on train (`loss`) or dev (`eval_loss`) by step, as the last checkpoint has noted it."""
    state = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return {entry["step"]: entry[kind] for entry in json.loads(state.read_text())["log_history"] if kind in entry}


def assert_close(one: dict, other: dict, by: float):
    assert one.keys() == other.keys() and one
    assert all(abs(one[step] - other[step]) < by for step in one), (one, other)


@pytest.mark.parametrize("script, tested", [
    (PLANNER, ["--eval_steps", 40]), (EXECUTOR, ["--eval_strategy", "no"])])
def test_training_learns_twenty_examples_by_heart(tmp_path, experts, script, tested):
    episode = next(episode for episode in experts if len(list(trained_states(episode))) >= 20)
    taken = [step for _, step in trained_states(episode)][:20]
    twenty = [{**episode, "steps": taken, "split": split} for split in ("train", "dev")]
    run(script, "--data", written(tmp_path / "twenty.jsonl", twenty), "--model", "tiny", "--max_steps", 80,
        "--learning_rate", 3e-3, "--warmup_steps", 10, "--rename", 0, "--save_steps", 40, *tested,
        "--output_dir", tmp_path / "out")
    said = about(tmp_path / "out")
    assert said["dev_exact_match"] > 0.9 and 0 < said["dev_loss"] < 1
    assert said["dev_examples"] == 20 and said["dev_new_answers"] == 0


def test_a_student_says_its_scores_and_apart_from_them_those_on_answers_that_it_never_saw(students, data):
    dev, *train = sorted(read_episodes(data), key=lambda episode: (episode["task"], episode["variation"]))
    answers, known = ([action for episode in episodes for _, action in action_examples(episode)]
                      for episodes in ([dev], train))
    said = about(students["flat"])
    assert said["role"] == "action" and said["flat"] is True and said["dev_loss"] > 0
    assert said["train_examples"] == len(known) and said["dev_examples"] == len(answers)
    assert said["dev_new_answers"] == len([answer for answer in answers if answer not in known]) > 0
    assert 0 <= said["dev_exact_match"] <= 1 and 0 <= said["dev_new_exact_match"] <= 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """What one process makes of updates of two batches of four, and the flags of that."""
    flags = ["--data", data, "--model", "nano", "--max_steps", 10, "--logging_steps", 1, "--use_cpu", "--eval_steps", 5,
             "--save_steps", 5, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
             "--learning_rate", 1e-3, "--warmup_steps", 2, "--output_dir"]
    folder = tmp_path_factory.mktemp("alone")
    run(EXECUTOR, *flags, folder)
    return folder, flags


def by_two_processes(script: str, *flags) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*torchrun, *command(script, *flags)[1:]], capture_output=True, text=True)


@pytest.mark.parametrize("sharing", [[], ["--fsdp"]], ids=["whole", "shared out"])
def test_two_processes_give_the_loss_curve_of_one(tmp_path, alone, sharing):
    folder, flags = alone
    done = by_two_processes(EXECUTOR, *flags, tmp_path / "two", *sharing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("10 steps") == 1, "one process speaks for all"
    assert_close(losses(folder), losses(tmp_path / "two"), by=1e-2)
    assert_close(losses(folder, "eval_loss"), losses(tmp_path / "two", "eval_loss"), by=0.2)
    assert about(folder).keys() == about(tmp_path / "two").keys()


def test_accumulated_batches_count_as_one_large_batch(tmp_path, alone):
    folder, flags = alone
    large = ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1]
    run(EXECUTOR, *flags, tmp_path / "large", *large)
    assert_close(losses(folder), losses(tmp_path / "large"), by=1e-2)


def test_a_run_killed_after_its_last_step_is_not_trained_on(tmp_path, alone):
    folder, flags = alone  # in the middle of an epoch: at its end, the Trainer itself would stop
    again = shutil.copytree(folder, tmp_path / "again")
    (again / "student.json").unlink()
    assert "going on from step 10" in run(EXECUTOR, *flags, again).stdout
    assert losses(again) == losses(folder) and about(again) == about(folder)


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_other_settings_on_the_same_folder_are_refused_by_name(alone, refusal):
    folder, flags = alone
    assert "learning_rate 0.001, this run has 1e-05" in refusal(train_action, *flags, folder, "--learning_rate", "1e-5")


@pytest.mark.parametrize("flags, complaint, times", [
    pytest.param([], "On CPUs add --use_cpu", (1, 2),
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs they do train together")),
    (["--use_cpu", "--per_device_train_batch_size", 3], "2 processes cannot share batches of 3 evenly", (1,)),
])
def test_processes_that_cannot_share_the_work_are_refused(tmp_path, data, flags, complaint, times):
    refused = by_two_processes(PLANNER, "--data", data, "--model", "nano", *flags, "--output_dir", tmp_path / "two")
    assert refused.returncode and refused.stderr.count(complaint) in times and not (tmp_path / "two").exists()


@pytest.mark.parametrize("flags, complaint", [
    ("--data nowhere.jsonl --model tiny", "cannot be read"),
    ("--data {data} --model {tmp}", "not a model folder"),
    ("--data {data} --model no-such/model", "nor can it be downloaded"),
    ("--data {data} --model tiny --template nowhere.jinja", "is not a file"),
    ("--data {test} --model tiny", "test episodes"),
])
def test_what_cannot_be_trained_is_refused_in_one_sentence(tmp_path, data, refusal, monkeypatch, flags, complaint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # asking a hub takes as long as the net likes
    test = written(tmp_path / "test.jsonl", [{**read_episodes(data)[0], "split": "test"}])
    flags = flags.format(data=data, tmp=tmp_path, test=test).split()
    assert complaint in refusal(train_subgoal, *flags, "--output_dir", tmp_path / "out")
