"""Stage 4: the agent in the simulator, and the table."""

import pytest
from conftest import kill_when, run

import evaluate
from annotate import Game, read_episodes
from evaluate import LOOP, Agent, is_loop, play, play_move


class Scripted(Agent):
    """An agent that plays given actions, whatever it sees."""

    def __init__(self, actions: dict):
        self.actions = actions

    def choose(self, episodes):
        return [None] * len(episodes), [[self.actions[live.task, live.variation][len(live.steps)]] for live in episodes]


def test_many_games_in_two_processes_do_not_disturb_each_other(data):
    """Six gold paths at a time, each move in its turn, all reach the score that they reached alone."""
    experts = {(e["task"], e["variation"]): [step["action"] for step in e["steps"]] for e in read_episodes(data)}
    played = list(play(Scripted(experts), list(experts), workers=2, live=3))
    assert {(live.task, live.variation) for live, _ in played} == set(experts)
    assert [(live.steps[-1]["score"], reason) for live, reason in played] == [(100, "done")] * len(experts)
    assert all(not live.invalid for live, _ in played)


def test_a_wrong_focus_ends_the_episode_as_failed_and_counts_0():
    wrong = {("lifespan-longest-lived", 3): ["focus on ground", "wait"]}
    ((live, reason),) = play(Scripted(wrong), list(wrong), workers=1, live=1)
    assert reason == "failed" and live.steps[-1]["score"] < 0 and len(live.steps) == 1


def test_an_agent_that_moves_in_circles_is_stopped():
    circles = {
        ("find-plant", 0): ["open door to kitchen", "go to kitchen", "open door to hallway", "go to hallway"] * 30
    }
    ((live, reason),) = play(Scripted(circles), list(circles), workers=1, live=1)
    assert reason == "loop" and LOOP <= len(live.steps) < 40


def test_no_expert_of_any_task_moves_in_circles(experts):
    for episode in experts:
        after = [*episode["steps"][1:], {"look": "", "inventory": ""}]
        marks = [
            (step["action"], step["observation"], then["look"], then["inventory"])
            for step, then in zip(episode["steps"], after, strict=True)
        ]
        assert not any(is_loop(marks[:end]) for end in range(len(marks))), episode["task"]


@pytest.fixture(scope="module")
def game():
    yield Game()
    Game.gateway.shutdown()
    Game.gateway.java_process.kill()
    Game.gateway = None


def test_a_refused_action_gives_way_to_the_next_beam_that_is_valid(game):
    game.load("find-plant", 0)
    move = play_move(game, ["fly to the moon", "go to nowhere", "open door to kitchen"])
    assert [action for action, *_ in move.taken] == ["open door to kitchen"] and move.choice == 2


def test_an_action_that_no_beam_can_save_becomes_the_nearest_valid_one(game):
    game.load("find-plant", 0)
    move = play_move(game, ["goo to kitchn", "fly"])
    assert [action for action, *_ in move.taken] == ["go to kitchen"] and move.choice is None


def test_a_focus_is_taken_as_the_likeliest_action_alone(game):
    game.load("find-plant", 0)
    move = play_move(game, ["focus on nothing here", "focus on orange", "open door to kitchen"])
    assert [action for action, *_ in move.taken] == ["open door to kitchen"] and move.choice == 2


def test_valid_actions_are_not_asked_for_when_an_action_is_accepted(game, monkeypatch):
    game.load("find-plant", 0)
    monkeypatch.setattr(evaluate, "valid_actions", lambda game: pytest.fail("asked"))
    assert play_move(game, ["open door to kitchen"]).choice == 0


def test_after_kill_9_only_what_is_missing_is_played(tmp_path, students):
    path = tmp_path / "episodes.jsonl"
    flags = [
        "--tasks",
        "7-1",
        "--variations",
        6,
        "--subgoals",
        "none",
        "--action-model",
        students["flat"],
        "--output",
        path,
        "--workers",
        1,
        "--live",
        2,
    ]
    family = kill_when("evaluate.py", *flags, ready=lambda: path.exists() and path.read_bytes().count(b"\n") >= 2)
    assert len(family) >= 2
    kept = path.read_bytes()
    done = run("evaluate.py", *flags)
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert sorted(episode["variation"] for episode in read_episodes(path)) == list(range(93, 99))
    assert "| flat (no sub-goals) |" in done.stdout
    refused = run("evaluate.py", *flags, "--beams", 2, code=2)  # other episodes than those in the file
    assert "models" in refused.stderr


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "--output is needed"),
        (
            ["--output", "o.jsonl", "--action-model", "{tmp}", "--subgoal-model", "{subgoal}"],
            "not a finished model folder",
        ),
        (
            ["--output", "o.jsonl", "--action-model", "{subgoal}", "--subgoal-model", "{subgoal}"],
            "one of train_action.py",
        ),
        (["--output", "o.jsonl", "--action-model", "{flat}", "--subgoal-model", "{subgoal}"], "trained with --flat"),
        (["--output", "o.jsonl", "--action-model", "{action}", "--subgoals", "none"], "trained without --flat"),
        (["--report-only", "{data}"], "did not play"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_sentence(tmp_path, students, data, flags, complaint):
    names = {"tmp": tmp_path, "data": data, **students}
    refused = run("evaluate.py", "--tasks", "7-1", *(flag.format(**names) for flag in flags), code=2)
    assert complaint in refused.stderr and "Traceback" not in refused.stderr
