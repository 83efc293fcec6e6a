"""Stage 4: the agent in the simulator."""

import os
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from types import SimpleNamespace

import ctranslate2
import pytest
import transformers
from conftest import Says, alive, command, descendants, kill_when, run, step_of, wait_until, whole_lines

import evaluate
from annotate import Game, Simulator, actions_of, in_threads, pair_of, read_episodes
from evaluate import LOOP, PATIENCE, TRIES, Agent, Live, Student, ending, move, play
from train_action import action_examples
from train_subgoal import subgoal_examples, trained_states, wording_of

FIND_PLANT = ("find-plant", 0)
FROG_EGG = ("find-animal", 226, ["teleport to outside"])  # a look shows it
BOXES = ("use-thermometer", 0, [  # the expert's path up to the choice of the box: green is right, red is final
    "go to kitchen", "pick up thermometer", "focus on thermometer in inventory", "go to hallway", "go to living room",
    "pick up unknown substance B", "focus on unknown substance B in inventory", "teleport to bathroom",
    "use thermometer in inventory on unknown substance B in inventory",
])
pair = attrgetter("task", "variation")  # of a Live episode, as pair_of is of its record


class Following:
    """An agent that takes given actions, {(task, variation): actions}, and has no sub-goals."""

    def __init__(self, paths: dict):
        self.paths = paths

    def choose(self, episodes):
        return [None] * len(episodes), [[self.paths[pair(episode)][len(episode.steps)]] for episode in episodes]


@pytest.fixture(scope="module")
def paths(data) -> dict:
    """The experts' actions, by task and variation."""
    return {pair_of(episode): actions_of(episode) for episode in read_episodes(data)}


def begun(simulator: Simulator, task: str, variation: int, actions=()) -> Live:
    """An episode after some actions."""
    episode = Live(task, variation)
    episode.begin(simulator.game())
    for action in actions:
        move(episode, None, [action])
    return episode


def act(agent: Agent, episode: Live):
    """One step, as `play` takes it."""
    (subgoal,), (candidates,) = agent.choose([episode])
    move(episode, subgoal, candidates)


def taken(episode: Live) -> list[str]:
    return [step["action"] for step in episode.steps]


# ---- One move --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start, candidates, action, repaired", [
    (FIND_PLANT, ["fly to the moon", "go to nowhere", "go to kitchen", "go to hallway"], "go to kitchen", False),
    (FIND_PLANT, ["fly", "focus on orange", "go to kitchen"], "go to kitchen", False),
    # what the look calls by the same words in another order is found
    (FROG_EGG, ["focus on egg frog", "focus on baby wolf"], "focus on frog egg", False),
    # and where it was said to be decides nothing, but where something is to go does
    (FROG_EGG, ["focus on frog egg in greenhouse", "focus on baby wolf"], "focus on frog egg", False),
    # a makeshift is the nearest valid action with a candidate's verb, and no focus
    (FIND_PLANT, ["fly", "go to kitchn"], "go to kitchen", True),
    (FIND_PLANT, ["focus on nothing here", "focus on orange"], "look around", True),
    (FROG_EGG, ["focus on egg giraffe", "focus on baby wolf"], "look around", True),
    # it keeps the box that something is moved to
    (BOXES, ["move unknown substance B to the crate", "fly"], "look around", True),
    (BOXES, ["move unknown substance B to rod box", "fly"], "look around", True),
    (BOXES, ["move unknown substance B to red box in kitchen", "fly"], "look around", True),
    (BOXES, ["move the unknown thing B to green box", "fly"], "move unknown substance to green box", True),
])
def test_the_first_candidate_that_the_simulator_accepts_is_taken_else_a_makeshift_that_decides_nothing(
        simulator, start, candidates, action, repaired):
    episode = begun(simulator, *start)
    place = len(episode.steps)
    move(episode, None, candidates)
    assert taken(episode)[place:] == [action] and episode.invalid[-1:] == [place]
    assert (episode.repaired[-1:] == [place]) == repaired


def test_what_was_refused_is_not_tried_again_until_something_visible_changes(simulator, monkeypatch):
    tried, listed = [], []
    step, valid_actions = Game.step, Game.valid_actions
    monkeypatch.setattr(Game, "step", lambda game, action: tried.append(action) or step(game, action))
    monkeypatch.setattr(Game, "valid_actions", lambda game: listed.append(1) or valid_actions(game))
    episode = begun(simulator, *FIND_PLANT)
    move(episode, None, ["fly", "look around"])
    assert tried == ["fly", "look around"] and not listed, "valid actions are listed for a makeshift alone: it is slow"
    for _ in range(2):
        move(episode, None, ["fly", "swim"])
    assert tried[2:] == ["swim", "look around", "look around"] and len(listed) == 1
    move(episode, None, ["go to kitchen"])
    move(episode, None, ["fly", "swim"])
    assert tried[-3:] == ["fly", "swim", "look around"] and len(listed) == 2


def test_what_was_done_in_the_very_same_state_goes_behind_the_other_beams_but_not_patience(simulator):
    episode = begun(simulator, *FIND_PLANT)
    for _ in range(2):
        move(episode, None, ["open door to kitchen", "go to kitchen"])
    assert taken(episode) == ["open door to kitchen", "go to kitchen"], "the door was open already"
    for _ in range(3):
        move(episode, None, ["wait", "go to hallway"])
    assert taken(episode)[2:] == ["wait"] * 3 and episode.invalid == []


@pytest.mark.parametrize("beams, often", [
    (["find(egg)", "navigate_to(kitchen)"], 5), (["wait()", "navigate_to(kitchen)"], PATIENCE),
    (["wait()", "focus_on(orange)"], PATIENCE)])  # from which there is no way back
def test_a_subgoal_that_leads_nowhere_gives_way_to_the_planners_next_but_to_no_focus(simulator, beams, often):
    planner = Says(lambda state: beams, unshown=["egg", "kitchen"])
    agent = Agent(Says(lambda state: ["look around"]), planner, "model", [], beams=2)
    episode = begun(simulator, *FIND_PLANT)
    for _ in range(often + 4):
        act(agent, episode)
    after = beams[0] if beams[1].startswith("focus") else beams[1]
    assert [step["subgoal"] for step in episode.steps] == [beams[0]] * often + [after] * 4


@pytest.mark.parametrize("first, later, then", [
    ("focus_on(ice)", ["wait()"], "focus_on(ice)"),  # what it was needed for
    ("find(ice)", ["find(ice)", "wait()", "focus_on(ice)"], "focus_on(ice)"),  # the likeliest that is about it
    ("find(ice)", ["wait()", "focus_on(stove)"], "wait()"),
])
def test_what_the_task_names_and_is_nowhere_to_be_seen_is_looked_for_in_other_rooms(simulator, first, later, then):
    told = []

    def executor(state):
        told.append(state["subgoal"])
        room = told[-1].removeprefix("navigate_to(").removesuffix(")")
        return ["open freezer", f"go to {room}", "go to hallway", "go to outside"]

    planner = Says(lambda state: later if "navigate_to(art studio)" in told else [first])
    agent, episode = Agent(Says(executor), planner, "model", [], beams=5), begun(simulator, "boil", 4)
    while not episode.steps or taken(episode)[-1] != "open freezer":  # there is the ice, in the kitchen's freezer
        assert len(episode.steps) < 30
        act(agent, episode)
    assert {step["subgoal"] for step in episode.steps} == {"find(ice)"}
    assert [*dict.fromkeys(told)][:2] == ["find(ice)", "navigate_to(art studio)"]
    assert "go to art studio" in taken(episode) and taken(episode)[-2:] == ["go to kitchen", "open freezer"]
    for _ in range(2):  # the executor is asked twice where its first answer is refused
        assert agent.choose([episode])[0] == [then] == told[-1:]
    move(episode, then, ["focus on ice"])
    assert agent.choose([episode])[0] == later[:1], "it has been found"


def test_all_beams_are_asked_for_where_the_greedy_answer_was_refused_or_the_state_is_known(simulator):
    student = Says(lambda state: ["go to nowhere", "open door to kitchen", "go to kitchen"], unshown=["nowhere"])
    agent, episode, moves = Agent(student, None, "none", [], beams=3), begun(simulator, *FIND_PLANT), []
    for _ in range(4):
        act(agent, episode)
        moves.append(len(episode.steps))
    assert student.best == [1, 3, 3, 1] and moves == [0, 1, 2, 2], "the kitchen is a new state"
    assert taken(episode) == ["open door to kitchen", "go to kitchen"] and episode.invalid == [0, 1]


@pytest.mark.parametrize("habits, asked, best", [
    ({"focus": True, "told": []}, [1, 3], ["focus on plant", "pick up water", "focus on egg"]),
    ({"focus": False, "told": ["egg", "plant", "water"]}, [1, 3], ["focus on plant", "focus on egg", "pick up water"]),
    ({"focus": False, "told": ["plant"]}, [1], ["focus on egg"])])
def test_what_no_expert_of_the_task_would_say_stands_behind_the_other_beams(simulator, habits, asked, best):
    student = Says(lambda state: ["focus on egg", "focus on plant", "pick up water"], {FIND_PLANT[0]: habits},
                   unshown=["egg", "plant", "water"])
    agent = Agent(student, None, "none", [], beams=3)
    assert agent.choose([begun(simulator, *FIND_PLANT)])[1] == [best] and student.best == asked


def test_what_has_a_topic_of_the_task_in_its_name_is_no_stranger(simulator):
    task = "identify-life-stages-1"
    student = Says(lambda state: ["focus on baby wolf", "focus on egg frog"], {task: {"focus": True, "told": []}},
                   unshown=["wolf", "egg"])
    student.wordings = ("earliest focus from is latest life of on stages starting task the to your",)
    agent, episode = Agent(student, None, "none", [], beams=2), begun(simulator, task, 7)
    assert "of the frog" in episode.description
    assert agent.choose([episode])[1] == [["focus on egg frog", "focus on baby wolf"]]


@pytest.mark.parametrize("likely, score, subgoals, held", [
    (0.4, 0, "model", True), (0.6, 0, "model", False), (0.6, 70, "model", True), (0.8, 70, "model", False),
    (0.4, 0, "none", True), (0.4, 0, "random", False)])
def test_a_focus_waits_that_is_less_likely_than_not_or_than_the_points_so_far_are_worth(
        simulator, likely, score, subgoals, held):
    planner, executor = (Says(lambda state, says=says: says) for says in (
        ["focus_on(orange)", "wait()"], ["focus on orange", "wait"]))
    planner.likely = executor.likely = likely
    agent = Agent(executor, planner if subgoals == "model" else None, subgoals, [], beams=2)
    agent.pool, episode = ["wait()"], begun(simulator, *FIND_PLANT, ["wait"])
    episode.steps[-1]["score"] = score
    (subgoal,), (actions,) = agent.choose([episode])
    said = subgoal if subgoals == "model" else actions[0]
    assert said.startswith("wait" if held else "focus")


@pytest.mark.parametrize("likely, planned, then", [
    (0.6, "move(unknown substance b, red box)", "wait()"), (0.95, "move(unknown substance b, red box)", None),
    (0.6, "pick_up(red light bulb)", None)])
def test_a_box_is_chosen_by_who_is_sure_of_it_alone(simulator, likely, planned, then):
    planner, episode = Says(lambda state: [planned, "wait()"], unshown=["light", "bulb"]), begun(simulator, *BOXES)
    planner.likely, episode.steps[-1]["score"] = likely, 92
    other = episode.description.replace("red box", "blue box").replace("green box", "orange box")
    planner.wordings = (wording_of([episode.description, other]),)
    agent = Agent(Says(lambda state: ["wait"]), planner, "model", [], beams=2)
    assert agent.choose([episode])[0] == [then or planned]


@pytest.mark.parametrize("subgoals, steps, then", [
    ("model", [], "focus_on(orange)"), ("none", [], "focus on orange"),
    ("model", [("focus_on(orange)", "focus on orange")], "wait()"), ("none", [(None, "focus on orange")], "wait"),
    ("model", [("focus_on(orange)", "wait")], "focus_on(orange)")])
def test_nothing_is_focused_on_twice_but_what_was_refused_may_be_tried_again(simulator, subgoals, steps, then):
    planner, executor = (Says(lambda state, says=says: says) for says in (
        ["focus_on(orange)", "wait()"], ["focus on orange", "wait"]))
    agent = Agent(executor, planner if subgoals == "model" else None, subgoals, [], beams=2)
    episode = begun(simulator, *FIND_PLANT)
    for subgoal, action in steps:
        episode.note(subgoal, action, "You focus on the orange." if "focus" in action else "", 0)
    (subgoal,), (actions,) = agent.choose([episode])
    assert (subgoal or actions[0]) == then


def test_rather_than_focus_on_what_no_expert_would_the_agent_waits(simulator):
    strange = {FIND_PLANT[0]: {"focus": True, "told": []}}
    planner, executor = Says(lambda state: ["focus_on(egg)"], strange), Says(lambda state: ["focus on egg"], strange)
    for agent in (Agent(executor, planner, "model", [], beams=2), Agent(executor, None, "none", [], beams=2)):
        episode = begun(simulator, *FIND_PLANT)
        (subgoal,), (actions,) = agent.choose([episode])
        assert subgoal in ("wait()", None) and actions == ["wait1", "focus on egg"]
        move(episode, subgoal, actions)
        assert taken(episode) == ["wait1"]


@pytest.mark.parametrize("planned, then", [
    ("find(egg)", "wait()"), ("find(plant)", "find(plant)"), ("find(orange)", "wait()"),
    ("heat(orange, orange)", "wait()"), ("move(orange, orange box)", "move(orange, orange box)"),
    ("pour(orange, orange)", "pour(orange, orange)"),
    ("focus_on(orange)", "focus_on(orange)"), ("focus_on(unicorn)", "wait()"), ("pick_up(orange, unicorn)", "wait()"),
    ("navigate_to(unicorn)", "wait()"), ("navigate_to(foundry)", "navigate_to(foundry)")])
def test_nothing_is_moved_into_itself_what_one_has_is_not_looked_for_what_is_unheard_of_not_said(
        simulator, planned, then):
    planner = Says(lambda state: [planned, "wait()"], unshown=["foundry"])
    agent = Agent(Says(lambda state: ["wait"]), planner, "model", [], beams=2)
    episode = begun(simulator, *FIND_PLANT)
    assert "an orange" in episode.state["inventory"] and agent.choose([episode])[0] == [then]


def test_of_several_things_that_an_action_may_mean_the_first_is_taken(simulator):
    episode = begun(simulator, "find-non-living-thing", 73, ["go to living room"])
    move(episode, "focus_on(book)", ["focus on book (moby dick) called moby dick"])
    asked, answered = episode.steps[-2:]
    assert asked["observation"].startswith("Ambiguous request") and answered["action"] == "0"
    assert answered["observation"] == "You focus on the book (Moby Dick)." and answered["score"] > asked["score"]
    assert answered["subgoal"] == "focus_on(book)" and episode.invalid == []


def test_students_are_not_told_of_what_did_nothing(simulator):
    student = Says(lambda state: ["wait"])
    episode = begun(simulator, *FIND_PLANT, ["open door to kitchen", "wait1"])
    Agent(student, None, "none", [], beams=2).choose([episode])
    assert taken(episode)[0] == "open door to kitchen" and "already open" in episode.steps[0]["observation"]
    assert [told["action"] for told in student.states[-1]["history"]] == ["wait1"] and student.states[-1]["step"] == 2


# ---- How episodes end ------------------------------------------------------------------------------------------------


ROOMS = ["kitchen", "bedroom", "workshop", "foundry", "greenhouse", "outside"]


@pytest.mark.parametrize("task, script, ended, moves", [
    (("lifespan-longest-lived", 3), lambda n: "focus on ground", "failed", [1]),
    (FIND_PLANT, lambda n: f"teleport to {random.Random(n).choice(ROOMS)}", "moves", [100]),
    (FIND_PLANT, lambda n: ["go to kitchen", "look around", "go to hallway"][n % 3], "loop", range(LOOP, LOOP + 4)),
])
def test_an_agent_that_fails_or_gets_nowhere_or_moves_in_circles_is_stopped(simulator, task, script, ended, moves):
    (episode,) = play(Following({task: [script(n) for n in range(100)]}), iter([task]), 1, simulator)
    assert episode.ended == ended and len(episode.steps) in moves and (episode.score < 0) == (ended == "failed")


def test_no_expert_of_any_task_moves_in_circles(experts):
    for episode in experts:
        live = Live(episode["task"], episode["variation"])
        for step, after in zip(episode["steps"], episode["steps"][1:], strict=False):
            live.effects.append((step["action"], step["observation"], after["look"], after["inventory"]))
            assert ending(live, False) is None, episode["task"]


# ---- Simulators ------------------------------------------------------------------------------------------------------


def test_two_workers_with_many_live_episodes_play_what_one_episode_at_a_time_would(data, paths):
    """Games of a simulator, each moved on in its turn, and two simulators in threads, do not disturb each other."""
    played = {pair(one): one for one in in_threads(2, partial(play, Following(paths), iter(paths), 3))}
    assert played.keys() == paths.keys()
    for episode in read_episodes(data):
        live = played[pair_of(episode)]
        assert live.ended == "done" and live.invalid == []
        assert [step["score"] for step in live.steps] == [step["score"] for step in episode["steps"]]


@pytest.mark.parametrize("sign, timeout", [(signal.SIGKILL, 60), (signal.SIGSTOP, 5)], ids=["killed", "hanging"])
def test_episodes_of_a_simulator_that_dies_or_hangs_begin_again_and_all_end(paths, sign, timeout):
    simulator, moves = Simulator(timeout), []

    def strike(episode: Live):
        moves.append(simulator.gateway.java_process.pid)
        if len(moves) == 10:
            os.kill(moves[-1], sign)

    played = list(play(Following(paths), iter(paths), 4, simulator, strike))
    assert sorted(map(pair, played)) == sorted(paths)
    for episode in played:
        assert (episode.ended, episode.score, taken(episode)) == ("done", 100, paths[pair(episode)])
    assert sum(episode.deaths for episode in played) == 1 and len(set(moves)) == 2
    assert not alive(moves[0])
    simulator.close()


def test_an_episode_of_which_every_simulator_dies_is_given_up_and_the_next_is_played(paths):
    deadly, harmless, *_ = paths
    simulator = Simulator()

    def strike(episode: Live):
        if pair(episode) == deadly and len(episode.steps) == 2:
            simulator.kill()

    died, done = play(Following(paths), iter([deadly, harmless]), 1, simulator, strike)
    assert (died.ended, died.deaths, len(died.steps)) == ("died", TRIES, 3)
    assert f"died, in each of {TRIES} tries" in died.steps[-1]["observation"]
    assert (done.ended, done.deaths, done.score) == ("done", 0, 100)
    simulator.close()


# ---- Sub-goals -------------------------------------------------------------------------------------------------------


def test_semi_random_keeps_the_function_and_replaces_the_rest(experts):
    agent, live = Agent(None, None, "semi-random", experts, beams=1), Live("boil", 1)
    given = agent.subgoal(live, "navigate_to(kitchen)")
    assert given.startswith("navigate_to(") and given != "navigate_to(kitchen)" and given in agent.pool
    assert agent.subgoal(live, "navigate_to(kitchen)") == given, "it is not the same from one step to the next"
    assert agent.subgoal(live, "no_such_function(kitchen)") == "no_such_function(kitchen)"


def test_random_subgoals_are_drawn_anew_every_ten_steps(experts):
    agent, live = Agent(None, None, "random", experts, beams=1), Live("boil", 1)
    for _ in range(40):
        live.note(agent.subgoal(live, None), "wait", "", 0)
    drawn = [{step["subgoal"] for step in live.steps[i : i + 10]} for i in (0, 10, 20, 30)]
    assert all(len(ten) == 1 for ten in drawn) and len(set.union(*drawn)) > 2 and set.union(*drawn) <= set(agent.pool)


def test_an_agent_that_acts_as_the_expert_is_given_the_experts_subgoals(experts):
    agent = Agent(None, None, "oracle", experts, beams=1)
    for episode in experts:
        live = Live(episode["task"], episode["variation"])
        for _, step in trained_states(episode):
            assert agent.subgoal(live, None) == step["subgoal"], (episode["task"], len(live.steps))
            live.note(None, step["action"], step["observation"], step["score"])


def test_an_oracle_waits_for_an_agent_that_strays():
    """It goes on when the agent does what serves the next sub-goal, or has the points that the present one gave."""
    path = [("go to kitchen", "navigate_to(kitchen)", 10), ("pick up pot", "pick_up(pot)", 10),
            ("move pot to sink", "fill(pot, water)", 10), ("activate sink", "fill(pot, water)", 40),
            ("move pot to stove", "heat(pot)", 40), ("activate stove", "heat(pot)", 40)]
    steps = [step_of(subgoal, action, score) for action, subgoal, score in path]
    expert = dict(task="boil", variation=0, description="", steps=steps)
    agent, live = Agent(None, None, "oracle", [expert], beams=1), Live("boil", 0)
    for action, score, subgoal in [
        ("go to bedroom", 0, "navigate_to(kitchen)"),
        ("look around", 0, "navigate_to(kitchen)"),
        ("activate stove", 0, "navigate_to(kitchen)"),  # the expert's, but two sub-goals on
        ("pick up pot", 0, "fill(pot, water)"),  # of the next sub-goal: the kitchen has been reached some way
        ("move pot to floor", 10, "fill(pot, water)"),
        ("pour jug into pot", 40, "heat(pot)"),  # another way to the points
        ("move pot to stove", 40, "heat(pot)"),
        ("activate stove", 40, "heat(pot)"),
        ("wait", 40, "heat(pot)"),
    ]:
        live.note(None, action, "", score)
        assert agent.subgoal(live, None) == subgoal, action


# ---- Students --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role, examples", [("subgoal", subgoal_examples), ("action", action_examples)])
def test_a_student_answers_the_same_alone_and_in_a_batch_by_either_engine(students, data, role, examples, monkeypatch):
    states = [state for episode in read_episodes(data) for state, _ in examples(episode)][:12]
    best = []
    for engine in ("ctranslate2", "transformers"):
        student = Student(students[role], role, engine)
        together = student.answers(states, beams=5, best=3)
        likely = [student.likelihood(states[0], answer) for answer in together[0]]
        assert likely == sorted(likely, reverse=True) and 0 < sum(likely) <= 1
        student.known.clear()
        assert [student.answers([state], beams=5, best=3)[0] for state in states] == together
        best.append(student.answers(states, beams=1))
        monkeypatch.setattr(student, "generate", None)  # it has answered all of these, and remembers
        assert student.answers(states, beams=5, best=3) == together
    assert best[0] == best[1]


def test_an_engine_that_answers_differently_gives_way_to_transformers(students, data, tmp_path, monkeypatch, capsys):
    class Wrong(ctranslate2.Translator):
        def translate_batch(self, tokens, **settings):
            return [SimpleNamespace(hypotheses=[row[:2]] * settings["num_hypotheses"]) for row in tokens]

    folder = shutil.copytree(students["action"], tmp_path / "action", ignore=shutil.ignore_patterns("ctranslate2"))
    monkeypatch.setattr(ctranslate2, "Translator", Wrong)
    states = [state for episode in read_episodes(data) for state, _ in action_examples(episode)][:4]
    given = Student(folder, "action", "ctranslate2").answers(states, beams=2)
    assert given == Student(folder, "action", "transformers").answers(states, beams=2)
    assert "played by transformers, not by CTranslate2" in capsys.readouterr().err
    assert not (folder / "ctranslate2").exists()


def test_workers_never_load_two_models_at_once(students, data, tmp_path, monkeypatch):
    """The loading of transformers is not safe in threads: one of two models may be left without weights."""
    load, loading, most = transformers.PreTrainedModel.from_pretrained.__func__, [], []

    def slowly(*arguments, **settings):
        loading.append(1)
        most.append(len(loading))
        time.sleep(0.2)
        try:
            return load(*arguments, **settings)
        finally:
            loading.pop()

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(slowly))
    plain = shutil.ignore_patterns("ctranslate2")
    planner, executor = (Student(shutil.copytree(students[role], tmp_path / role, ignore=plain), role, "ctranslate2")
                         for role in ("subgoal", "action"))
    states = [state for episode in read_episodes(data) for state, _ in subgoal_examples(episode)][:2]
    with ThreadPoolExecutor() as pool:
        works = [pool.submit(planner.likelihood, states[0], "wait()"), pool.submit(executor.answers, states, beams=1)]
        assert all(work.result() for work in works)
    assert len(most) == 3 and max(most) == 1, "one for the likelihood; the converter's, and its reference"


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def six(tmp_path, students) -> SimpleNamespace:
    """An evaluation of six episodes, two at a time: its flags, its output, and what must come of them in the end."""
    path = tmp_path / "episodes.jsonl"

    def finish():
        kept = path.read_bytes()
        assert "flat (no sub-goals)" in run("evaluate.py", *flags).stdout
        assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]), "what was kept is played again"
        assert sorted(episode["variation"] for episode in read_episodes(path)) == list(range(93, 99))

    flags = ["--tasks", "7-1", "--variations", 6, "--subgoals", "none", "--action-model", students["flat"], "--output",
             path, "--workers", 1, "--live", 2, "--beams", 1, "--engine", "transformers"]
    return SimpleNamespace(path=path, flags=flags, finish=finish)


def test_after_kill_9_no_simulator_is_left_and_only_what_is_missing_is_played(six):
    assert kill_when("evaluate.py", *six.flags, ready=lambda: whole_lines(six.path) >= 2), "there was no simulator"
    six.finish()


def test_ctrl_c_ends_with_a_sentence_and_the_same_command_goes_on(six):
    process = subprocess.Popen(
        command("evaluate.py", *six.flags), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: whole_lines(six.path), process)
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
    assert family and not any(alive(pid) for pid in family)
    six.finish()


def test_other_beams_are_other_episodes_of_the_same_models(tmp_path, six, call, refusal):
    narrow = tmp_path / "narrow.jsonl"
    call(evaluate, *six.flags, "--variations", 1, "--beams", 2)
    call(evaluate, *six.flags, "--variations", 1, "--output", narrow)
    assert read_episodes(six.path)[0]["models"] == read_episodes(narrow)[0]["models"]
    before = six.path.read_bytes()
    assert "was made with beams 2, this run has 1" in refusal(evaluate, *six.flags)
    assert six.path.read_bytes() == before


def test_watch_shows_the_game_move_by_move_and_writes_nothing(tmp_path, students, call, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(evaluate, "--tasks", "7-1", "--variations", 1, "--subgoal-model", students["subgoal"], "--action-model",
         students["action"], "--watch", 0)
    shown = capsys.readouterr().out
    assert "lifespan-longest-lived, variation 93" in shown and "\n  1  " in shown and " moves: " in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, complaint", [
    ("", "--output is needed"),
    ("--output o.jsonl --action-model {tmp} --subgoal-model {subgoal}", "not a finished model folder"),
    ("--output o.jsonl --action-model {subgoal} --subgoal-model {subgoal}", "one of train_action.py"),
    ("--output o.jsonl --action-model {flat} --subgoal-model {subgoal}", "trained with --flat"),
    ("--output o.jsonl --action-model {action} --subgoals none", "trained without --flat"),
    ("--output o.jsonl --action-model {action} --subgoals oracle --data {data}", "lacks 10 of the 10 variations"),
])
def test_what_cannot_be_played_is_refused_in_one_sentence(
        tmp_path, students, data, monkeypatch, refusal, flags, complaint):
    monkeypatch.chdir(tmp_path)
    flags = flags.format(tmp=tmp_path, data=data, **students).split()
    assert complaint in refusal(evaluate, "--tasks", "7-1", *flags)
