"""Stage 4: the agent in the simulator."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import alive, command, descendants, kill_when, run

import evaluate
from annotate import Game, read_episodes
from evaluate import LOOP, TRIES, Agent, Live, Student, is_loop, play, play_move
from train_action import action_examples
from train_subgoal import subgoal_examples, trained_states


class Scripted(Agent):
    """An agent that plays given actions, whatever it sees."""

    def __init__(self, actions: dict):
        super().__init__(None, None, "none", [], 1)
        self.actions = actions

    def choose(self, episodes):
        return [None] * len(episodes), [[self.actions[live.task, live.variation][len(live.steps)]] for live in episodes]


def actions_by_variation(data) -> dict:
    return {(e["task"], e["variation"]): [step["action"] for step in e["steps"]] for e in read_episodes(data)}


def test_many_games_in_two_processes_do_not_disturb_each_other(data):
    """Six gold paths at a time, each move in its turn, all reach the score that they reached alone."""
    experts = actions_by_variation(data)
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


def javas() -> list[int]:
    """The JVMs below this process."""
    return [pid for pid in descendants(os.getpid()) if Path(f"/proc/{pid}/comm").read_text().strip() == "java"]


class Killer:
    """A `watch` for play: counts every episode's moves, and strikes when there have been so many in all."""

    def __init__(self, strike, after: int):
        self.strike, self.after, self.moves = strike, after, {}

    def __call__(self, episode: Live):
        key = episode.task, episode.variation
        self.moves[key] = self.moves.get(key, 0) + 1
        if sum(self.moves.values()) == self.after:
            self.strike()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_simulator_that_dies_or_hangs_costs_one_episode_its_progress_and_no_episode_its_result(data, sign):
    experts = actions_by_variation(data)
    struck = []

    def strike():
        struck.extend(javas())
        os.kill(struck[-1], sign)

    killer = Killer(strike, after=2 * len(experts))
    played = list(play(Scripted(experts), list(experts), workers=2, live=4, timeout=10, watch=killer))
    assert sorted((live.task, live.variation) for live, _ in played) == sorted(experts)
    assert [(live.score, reason) for live, reason in played] == [(100, "done")] * len(experts)
    assert [live.deaths for live, _ in played].count(1) == 1
    for live, _ in played:
        assert [step["action"] for step in live.steps] == experts[live.task, live.variation]
        assert live.deaths or killer.moves[live.task, live.variation] == len(live.steps), "it was played again"
    assert len(struck) == 2 and not alive(struck[-1])


def test_a_simulator_process_that_is_killed_is_replaced(data):
    experts = actions_by_variation(data)
    killer = Killer(lambda: os.kill(descendants(os.getpid())[-2], signal.SIGKILL), after=2 * len(experts))
    played = list(play(Scripted(experts), list(experts), workers=2, live=4, watch=killer))
    assert sorted((live.task, live.variation) for live, _ in played) == sorted(experts)
    assert [(live.score, reason) for live, reason in played] == [(100, "done")] * len(experts)
    assert any(live.deaths for live, _ in played)


def test_an_episode_of_which_every_simulator_dies_is_given_up_with_the_reason(data):
    experts = actions_by_variation(data)
    deadly, harmless = list(experts)[:2]

    def strike(episode: Live):
        if (episode.task, episode.variation) == deadly and len(episode.steps) == 2:
            os.kill(javas()[-1], signal.SIGKILL)

    (first, died), (second, done) = play(Scripted(experts), [deadly, harmless], workers=1, live=1, watch=strike)
    assert (died, first.deaths, len(first.steps)) == ("died", TRIES, 3)
    assert "died" in first.steps[-1]["observation"]
    assert (done, second.deaths, second.score) == ("done", 0, 100)


@pytest.fixture(scope="module")
def game():
    logging.getLogger("py4j").setLevel(logging.CRITICAL)  # games that are forgotten after their JVM
    evaluate.GAMES[0] = Game()
    yield evaluate.GAMES[0]
    evaluate.bury(0, 0)


def test_a_refused_action_gives_way_to_the_next_beam_that_is_valid(game):
    game.load("find-plant", 0)
    move = play_move(0, ["fly to the moon", "go to nowhere", "open door to kitchen"])
    assert [action for action, *_ in move.taken] == ["open door to kitchen"] and move.choice == 2


def test_an_action_that_no_beam_can_save_becomes_the_nearest_valid_one(game):
    game.load("find-plant", 0)
    move = play_move(0, ["goo to kitchn", "fly"])
    assert [action for action, *_ in move.taken] == ["go to kitchen"] and move.choice is None


def test_a_focus_is_taken_as_the_likeliest_action_alone(game):
    game.load("find-plant", 0)
    move = play_move(0, ["focus on nothing here", "focus on orange", "open door to kitchen"])
    assert [action for action, *_ in move.taken] == ["open door to kitchen"] and move.choice == 2


def test_valid_actions_are_listed_once_for_a_state_and_only_when_an_action_was_refused(game, monkeypatch):
    listed, tried = [], []
    evaluate.REFUSALS.clear()
    monkeypatch.setattr(Game, "valid_actions", lambda self, whole=Game.valid_actions: listed.append(1) or whole(self))
    monkeypatch.setattr(Game, "step", lambda self, action, whole=Game.step: tried.append(action) or whole(self, action))
    game.load("find-plant", 0)
    assert play_move(0, ["open door to kitchen"]).choice == 0 and not listed
    tried.clear()
    for _ in range(3):
        assert play_move(0, ["look aroundd", "fly"]).choice is None  # nothing visible changes
    assert len(listed) == 1 and tried == ["look aroundd", "fly", "look around", "look around", "look around"]
    assert play_move(0, ["go to kitchen"]).choice == 0
    assert play_move(0, ["look aroundd", "fly"]).choice is None
    assert len(listed) == 2


def short_run(students, path, *more) -> list:
    """Flags of an evaluation of six episodes, one or two at a time."""
    return ["--tasks", "7-1", "--variations", 6, "--subgoals", "none", "--action-model", students["flat"],
            "--output", path, "--workers", 1, "--live", 2, *more]


def finished(path: Path) -> list[int]:
    """The variations in a file of `short_run`: all six, and each once."""
    variations = [episode["variation"] for episode in read_episodes(path)]
    assert sorted(variations) == list(range(93, 99))
    return variations


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_after_kill_9_only_what_is_missing_is_played(tmp_path, students):
    path = tmp_path / "episodes.jsonl"
    flags = short_run(students, path)
    family = kill_when("evaluate.py", *flags, ready=lambda: lines(path) >= 2)
    assert len(family) >= 2
    kept = path.read_bytes()
    done = run("evaluate.py", *flags)
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    finished(path)
    assert "| flat (no sub-goals) |" in done.stdout
    refused = run("evaluate.py", *flags, "--beams", 2, code=2)  # other episodes than those in the file
    assert "models" in refused.stderr and lines(path) == 6


def test_ctrl_c_ends_with_a_sentence_and_the_same_command_goes_on(tmp_path, students):
    path = tmp_path / "episodes.jsonl"
    flags = short_run(students, path)
    process = subprocess.Popen(
        command("evaluate.py", *flags), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background job ignores it
    deadline = time.time() + 120
    while not lines(path):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on" in said and "Traceback" not in said
    while any(alive(pid) for pid in family):
        assert time.time() < deadline, "a process was left behind"
        time.sleep(0.1)
    run("evaluate.py", *flags)
    finished(path)


def test_a_full_disk_loses_nothing(tmp_path, students):
    path = tmp_path / "episodes.jsonl"
    flags = short_run(students, path, "--engine", "transformers")
    limited = subprocess.run(["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command("evaluate.py", *flags)],
                             capture_output=True, text=True)
    assert limited.returncode == 2 and "Make room" in limited.stderr and "Traceback" not in limited.stderr
    assert path.stat().st_size == 100 * 1024 and 0 < lines(path) < 6
    run("evaluate.py", *flags)
    finished(path)


def test_ranks_share_the_episodes_and_report_once(tmp_path, students):
    path = tmp_path / "episodes.jsonl"
    flags = short_run(students, path)
    run("evaluate.py", *flags[:3], 5, *flags[4:])  # one process leaves one episode to play …
    lone = path.read_text().splitlines()[0]
    path.write_text(lone + "\n")  # … and a lost file leaves five
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = subprocess.run([*torchrun, *command("evaluate.py", *flags)[1:]], capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    assert finished(path) and path.read_text().startswith(lone)
    assert both.stderr.count("flat (no sub-goals): ") == 2 and both.stdout.count("| flat (no sub-goals) |") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["episodes.jsonl"]


def test_what_a_rank_left_behind_is_kept(tmp_path, students):
    path, left = tmp_path / "episodes.jsonl", tmp_path / "episodes.rank1.jsonl"
    flags = short_run(students, path)
    run("evaluate.py", *flags)
    everything = path.read_text().splitlines(keepends=True)
    path.write_text("".join(everything[:3]))
    left.write_text("".join(everything[2:]) + '{"task": "torn')
    before = run("evaluate.py", *flags)
    assert finished(path) and not left.exists() and "episodes:" not in before.stderr


def test_a_student_answers_the_same_alone_and_in_a_batch_by_either_engine(students, data):
    """… for the same states, and is asked once about each."""
    episodes = read_episodes(data)
    for role, examples in (("subgoal", subgoal_examples), ("action", action_examples)):
        states = [state for episode in episodes for state, _ in examples(episode)][:24]
        given = {}
        for engine in evaluate.ENGINES[::2]:
            student = Student(students[role], role, engine)
            given[engine] = student.answers(states, beams=5, best=3)
            student.known = {}
            assert [student.answers([state], beams=5, best=3)[0] for state in states] == given[engine]
            student.by_transformers = student.by_ctranslate2 = None  # it has answered all of these
            assert student.answers(states, beams=5, best=3) == given[engine]
        best = [[answers[0] for answers in of_engine] for of_engine in given.values()]
        assert best[0] == best[1]


def test_semi_random_keeps_the_function_and_replaces_the_rest(experts):
    agent = Agent(None, None, "semi-random", experts, beams=1)
    live = Live("boil", 1, 0, 0)
    given = agent.subgoal(live, "navigate_to(kitchen)")
    assert given.startswith("navigate_to(") and given != "navigate_to(kitchen)" and given in agent.pool
    assert agent.subgoal(live, "navigate_to(kitchen)") == given, "it is not the same from one step to the next"
    assert agent.subgoal(live, "no_such_function(kitchen)") == "no_such_function(kitchen)"


def test_random_sub_goals_are_drawn_anew_every_ten_steps(experts):
    agent, live = Agent(None, None, "random", experts, beams=1), Live("boil", 1, 0, 0)
    drawn = []
    for _ in range(40):
        drawn.append(agent.subgoal(live, None))
        live.note(drawn[-1], "wait", "", 0)
    assert set(drawn) <= set(agent.pool) and all(len(set(drawn[i : i + 10])) == 1 for i in (0, 10, 20, 30))
    assert len(set(drawn)) > 2


def test_an_agent_that_acts_as_the_expert_is_given_the_experts_sub_goals(experts):
    agent = Agent(None, None, "oracle", experts, beams=1)
    for episode in experts:
        live = Live(episode["task"], episode["variation"], 0, 0)
        for _, step in trained_states(episode):
            assert agent.subgoal(live, None) == step["subgoal"], (episode["task"], len(live.steps))
            live.note(None, step["action"], step["observation"], step["score"])


def test_an_oracle_without_the_experts_of_these_variations_is_refused(tmp_path, students, data):
    refused = run("evaluate.py", "--tasks", "7-1", "--subgoals", "oracle", "--data", data, "--action-model",
                  students["action"], "--output", tmp_path / "o.jsonl", code=2)
    assert "lacks 10 of the 10 variations" in refused.stderr


def test_watch_shows_the_game_move_by_move_and_writes_nothing(tmp_path, students):
    shown = run("evaluate.py", "--tasks", "7-1", "--variations", 1, "--subgoal-model", students["subgoal"],
                "--action-model", students["action"], "--watch", 0).stdout
    assert "lifespan-longest-lived, variation 93" in shown and "  1  " in shown and " moves: " in shown


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
