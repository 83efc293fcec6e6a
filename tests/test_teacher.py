"""Stage 1 with an LLM: every trajectory ends labelled or is said not to be, and no answer is paid for twice.

The client is the real one; the server (openai_server.py) speaks the real protocol and misbehaves on purpose.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import pytest
from conftest import ROOT, wait_until, written
from openai_server import BEFORE_THE_ANSWER, MODEL, Server

from annotate import (
    EXAMPLES, actions_of, answer_for, labels_of, pair_of, read_episodes, read_response, whole_records, worked_examples
)

KEY = "sk-tests-6f1c0ffee5ecre7"


def trajectories(path: Path, number: int, longest: int = 40) -> list[dict]:
    """A file of `number` expert trajectories: real ones, again and again, each with a description of its own."""
    real = [e for e in read_episodes(EXAMPLES) if 6 <= len(e["steps"]) <= longest]
    episodes = [{**episode, "variation": 1000 + i, "description": f"{episode['description']} Trial {i}.",
                 "steps": [{**step, "subgoal": None} for step in episode["steps"]]}
                for i, episode in enumerate(islice(cycle(real), number))]
    written(path, episodes)
    return episodes


class House:
    """A folder with trajectories, and the command that annotates them with the server's model."""

    def __init__(self, folder: Path):
        self.folder, self.input = folder, folder / "input.jsonl"
        self.output = folder / "out.jsonl.part"  # as make calls what is not finished
        self.script = ROOT / "annotate.py"
        self.source = ["--input", self.input]

    def start(self, server: Server | None, *more, key: str = KEY, limit: int | str = "unlimited") -> subprocess.Popen:
        """Start the command, with `limit` blocks of 1,024 bytes that a file may have."""
        url = ["--base-url", server.url] if server else []
        flags = [*self.source, "--annotator", "llm", *url, "--llm", MODEL, "--output", self.output, "--price", "1,2"]
        limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", sys.executable]
        return subprocess.Popen([*limited, *map(str, [self.script, *flags, *more])], text=True,
                                env={**os.environ, "OPENAI_API_KEY": key},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def annotate(self, server: Server | None, *more, code: int = 0, **settings) -> str:
        """Run the command to its end; returns what it printed. Its exit code must be `code`."""
        process = self.start(server, *more, **settings)
        text, _ = process.communicate(timeout=180)
        assert process.returncode == code, text
        assert "Traceback" not in text and KEY not in text
        return text

    def responses(self) -> list[dict]:
        """What is on the disk of the server's answers."""
        return whole_records(self.folder / "out.responses.jsonl")

    def check(self, episodes: list[dict]):
        """All are labelled, none twice, each step's action is the expert's, its sub-goal the answer's."""
        annotated = read_episodes(self.output)
        expert = {pair_of(e): actions_of(e) for e in episodes}
        assert Counter(map(pair_of, annotated)) == Counter(expert.keys())
        for episode in annotated:
            assert actions_of(episode) == expert[pair_of(episode)]
            assert labels_of(episode) == [f"step_of_three({i // 3 + 1})" for i in range(len(episode["steps"]))]
            assert (episode["annotator"], episode["answer"]) == (MODEL, "asked") and episode["usage"]["calls"] >= 1


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


# ---- A server that misbehaves


def test_errors_on_the_way_cost_nothing_and_what_has_no_readable_answer_is_listed_and_asked_again(house):
    faults = [*BEFORE_THE_ANSWER, "truncated", "ignored", "nothing", "no completion", "too long"]
    episodes = trajectories(house.input, 80)
    fault_of = dict(zip((e["description"] for e in episodes[::4]), cycle(faults), strict=False))
    server = Server(faults=fault_of.get, key=KEY)
    text = house.annotate(server, "--concurrency", 16, "--timeout", 2, code=1)
    refused = {task for task, fault in fault_of.items() if fault == "too long"}
    undone = refused | {task for task, fault in fault_of.items() if fault not in BEFORE_THE_ANSWER}
    assert server.paid == Counter({e["description"] for e in episodes} - refused)
    for task in (task for task, fault in fault_of.items() if fault == "rate limit"):
        first, second = (moment for asked, moment in server.times if asked == task)
        assert second - first >= 1, "Retry-After was not honoured"
    assert len(read_episodes(house.output)) == 80 - len(undone) and len(house.responses()) == 80 - len(refused)
    assert {f"{e['task']} {e['variation']}" for e in episodes if e["description"] in undone} == set(
        re.findall("^not annotated: (.*?):", text, re.MULTILINE))
    assert f"{len(undone)} trajectories are not annotated" in text and "maximum context length" in text
    assert f"{len(undone - refused)} answers could not be read" in text and "heed response_format" in text

    house.annotate(server)
    house.check(episodes)
    assert all(server.paid[e["description"]] == 1 + (e["description"] in undone - refused) for e in episodes)


@pytest.mark.parametrize("fault, words, most", [
    ("ignored", "none of 10 answers could be read", 10), ("no quota", "exceeded your current quota", 9)])
def test_a_server_of_no_use_is_not_asked_about_every_trajectory(house, fault, words, most):
    trajectories(house.input, 40)
    server = Server()
    server.always = fault
    text = house.annotate(server, "--concurrency", 1, code=1)
    assert words in text.splitlines()[-1] and len(server.times) == most


# ---- Deaths


def test_kill_9_again_and_again_pays_for_no_written_answer_twice(house):
    episodes = trajectories(house.input, 120, longest=25)
    server, moments = Server(seconds=0.1), random.Random(7)
    for _ in range(4):
        goal = len(house.responses()) + moments.randrange(1, 8)
        process = house.start(server, "--concurrency", 8)
        wait_until(lambda goal=goal: len(house.responses()) >= goal, process)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait()
    house.annotate(server, "--concurrency", 16)
    house.check(episodes)
    assert len({record["asked"] for record in house.responses()}) == len(house.responses()) == 120
    assert sum(server.paid.values()) <= 120 + 4 * 8, "more was paid again than was under way"


def test_of_a_torn_file_a_report_reads_what_is_whole_and_a_run_asks_for_the_rest(house):
    episodes, server = trajectories(house.input, 6), Server()
    house.annotate(server, "--concurrency", 1)
    responses = house.folder / "out.responses.jsonl"
    torn = responses.read_bytes()[:-50]
    responses.write_bytes(torn)
    assert "5 calls" in house.annotate(None, "--report", house.output) and responses.read_bytes() == torn
    house.output.unlink()
    house.annotate(server)
    house.check(episodes)
    assert sorted(server.paid.values()) == [1, 1, 1, 1, 1, 2], "only the answer that was torn may be asked for again"


def test_a_second_run_is_refused_and_ctrl_c_waits_for_the_answers_under_way(house):
    episodes, server = trajectories(house.input, 60), Server(seconds=1)
    process = house.start(server, "--concurrency", 6)
    wait_until(lambda: len(server.times) >= 6, process)
    assert "another run" in house.annotate(server, code=2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on" in text and "Traceback" not in text
    assert len(house.responses()) == len(read_episodes(house.output)) == len(server.times) < 60
    server.seconds = 0
    house.annotate(server)
    house.check(episodes)
    assert sum(server.paid.values()) == 60


def test_on_a_full_disk_no_more_is_asked_and_the_same_command_goes_on_when_there_is_room(house):
    episodes, server = trajectories(house.input, 60), Server(seconds=0.05)
    text = house.annotate(server, "--concurrency", 4, limit=20, code=2)
    assert "Make room" in text and len(server.times) <= len(house.responses()) + 4
    house.annotate(server)
    house.check(episodes)


def test_with_the_simulator_an_answer_is_about_the_trajectory_on_disk(house):
    server, store = Server(seconds=0.3), house.folder / "out.trajectories.jsonl"
    house.source = ["--tasks", "7-1", "--variations", 4, "--workers", 1, "--concurrency", 1]
    process = house.start(server)
    wait_until(lambda: len(house.responses()) >= 2, process)
    process.kill()
    process.communicate()
    stored = whole_records(store)
    house.annotate(server)
    house.check(whole_records(store))
    assert whole_records(store)[: len(stored)] == stored, "a trajectory was collected twice"
    assert sum(server.paid.values()) <= 5


# ---- What was asked


def test_an_edited_prompt_asks_anew_and_an_unchanged_one_never_pays_twice(house):
    episodes, server = trajectories(house.input, 5), Server()
    shutil.copytree(ROOT / "prompts", house.folder / "prompts")
    house.script = Path(shutil.copy(ROOT / "annotate.py", house.folder))
    system = house.folder / "prompts" / "annotate_system.jinja"
    before = system.read_text()
    house.annotate(server)
    system.write_text(before.replace("You read how an expert", "You see how an expert"))
    assert "was made with another version of prompts" in house.annotate(server, code=2)
    for prompt, paid in ((system.read_text(), 2), (before, 2)):
        system.write_text(prompt)
        house.output.unlink()
        house.annotate(server)
        house.check(episodes)
        assert set(server.paid.values()) == {paid}


def test_the_form_of_an_answer_gives_each_action_one_subgoal():
    def read(answer: str, actions: list[str]) -> list[str] | None:
        return read_response({"choices": [{"message": {"content": answer}}]}, actions)

    for episode in read_episodes(EXAMPLES):
        actions, labels = actions_of(episode), labels_of(episode)
        assert read(answer_for(actions, labels), actions) == labels
    actions = ["go to kitchen", "wait", "wait"]
    for wrong in ('["wait()"]', '{"1. go to kitchen": "wait()"}', answer_for(actions, ["wait()", "", "wait()"]),
                  answer_for(actions[::-1], ["wait()"] * 3), answer_for(actions, ["wait()", "a word", "wait()"]), "no"):
        assert read(wrong, actions) is None


def test_a_question_shows_boiling_water_then_an_example_of_the_same_task_type():
    examples = read_episodes(EXAMPLES)
    assert len({e["task"] for e in examples}) == 30
    for own in examples:
        shown, siblings = worked_examples(examples, own), [e for e in examples if e["task"] == own["task"]]
        assert len(shown) == 2 and own not in shown
        if own["task"] != "boil":
            assert shown[0]["task"] == "boil" and (len(siblings) == 1 or shown[1]["task"] == own["task"])


# ---- Money and keys


def test_max_cost_stops_the_asking_and_a_higher_one_goes_on(house):
    episodes = trajectories(house.input, 50)
    server = Server(seconds=0.05, tokens=(1000, 500))  # 0.002 dollars each
    text = house.annotate(server, "--max-cost", 0.05, "--concurrency", 4, code=1)
    spent = sum(record["dollars"] for record in house.responses())
    assert spent == pytest.approx(0.002 * sum(server.paid.values())) and f"written, ${spent:.4f}" in text
    assert 0.05 <= spent + 1e-9 <= 0.05 + 4 * 0.002 and "--max-cost" in text.splitlines()[-1]
    assert len(read_episodes(house.output)) == sum(server.paid.values())
    described, agreement = house.annotate(None, "--report", house.output).split("Agreement")
    assert described in text and "rules (47)" in agreement and "of these files" not in agreement
    house.annotate(server, "--max-cost", 0.2)
    house.check(episodes)
    assert sum(server.paid.values()) == 50


def test_a_user_error_is_one_sentence_and_exit_2_before_anything_is_asked(house):
    trajectories(house.input, 20)
    server, nowhere = Server(key=KEY), Server()
    nowhere.close()
    for words, at, *more, key in [
        ("there is no key", None, ""),
        ("Incorrect API key provided: Bearer [key]", server, "sk-wrong"),
        ("Check OPENAI_API_KEY, --llm, --base-url", nowhere, KEY),
        ("the server has no model 'teacher-9'; the nearest are teacher-1", server, "--llm", "teacher-9", KEY),
        ("--price", server, "--price", "cheap", KEY),
    ]:
        last = house.annotate(at, *more, code=2, key=key).splitlines()[-1]
        assert words in last and last.startswith("annotate.py: ")
        house.folder.joinpath("out.command.json").unlink(missing_ok=True)
    assert not server.times and not house.responses()


def test_the_key_is_in_no_file_and_no_message(house):
    episodes = trajectories(house.input, 12)
    server = Server(key=KEY, faults={e["description"]: "tell the key" for e in episodes[:4]}.get)
    house.annotate(server, code=1)
    assert "[key]" in (house.folder / "out.responses.jsonl").read_text()
    server.always = "echo"
    assert "Cannot work for [key]" in house.annotate(server, code=1)
    for path in house.folder.iterdir():
        assert KEY not in path.read_text()


def test_dry_run_counts_and_prints_one_prompt_and_sends_nothing(house):
    trajectories(house.input, 20)
    server = Server()
    text = house.annotate(server, "--dry-run", key="")
    assert "20 calls" in text and "Nothing was sent" in text
    assert text.count("Sub-goals:") == 3 and "navigate_to(kitchen)" in text
    assert not server.times and [path.name for path in house.folder.iterdir()] == ["input.jsonl"]
    estimate = float(text.rpartition("about $")[2].split()[0].rstrip("."))
    house.annotate(server)
    spent = sum(record["dollars"] for record in house.responses())
    assert spent / 2 < estimate < spent * 2


# ---- Once per task


def test_propagate_asks_about_k_of_a_task_and_the_others_follow(house):
    episodes, server = trajectories(house.input, 120), Server()
    house.annotate(server, "--propagate", 1)
    annotated = read_episodes(house.output)
    carried = [e for e in annotated if e["answer"] == "carried over"]
    asked = sum(server.paid.values())
    assert len(annotated) == 120 and len({e["task"] for e in episodes}) <= asked == 120 - len(carried) < 60
    expert = {e["variation"]: e for e in episodes}
    for episode in carried:
        assert actions_of(episode) == actions_of(expert[episode["variation"]]) and "usage" not in episode
    house.annotate(server, "--propagate", 1)
    assert sum(server.paid.values()) == asked
