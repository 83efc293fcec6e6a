"""Stage 1 with an LLM: whatever the server does, every trajectory ends labelled and no answer is paid for twice.

The client is the real one; the server (openai_server.py) speaks the real protocol and misbehaves on purpose.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import pytest
from openai_server import BEFORE_THE_ANSWER, FAULTS, MODEL, Server

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from annotate import (  # noqa: E402
    EXAMPLES,
    actions_of,
    agreement,
    annotate_by_examples,
    annotate_by_rules,
    ask_for,
    beside,
    boundaries,
    labels_of,
    parse_answer,
    read_answer,
    read_answers,
    read_episodes,
    worked_examples,
)

KEY = "sk-tests-6f1c0ffee5ecre7"
ANOTHER_CALL = {"truncated", "missing two", "empty"}  # faults that cannot be repaired without a second question


def key_of(episode: dict) -> str:
    """What the server knows a trajectory by: its task's text."""
    return f"{zlib.crc32(episode['description'].encode()):08x}"


def trajectories(path: Path, number: int, longest: int = 40) -> list[dict]:
    """A file of `number` expert trajectories: real ones, again and again, each with a description of its own."""
    real = [e for e in read_episodes(EXAMPLES) if 6 <= len(e["steps"]) <= longest]
    episodes = [{**episode, "variation": 1000 + i, "description": f"{episode['description']} Trial {i}.",
                 "steps": [{**step, "subgoal": None} for step in episode["steps"]]}
                for i, episode in enumerate(islice(cycle(real), number))]
    path.write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    return episodes


def command(*flags) -> list[str]:
    return [sys.executable, str(ROOT / "annotate.py"), *map(str, flags)]


def environment(key: str = KEY) -> dict:
    return {**{name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"},
            **({"OPENAI_API_KEY": key} if key else {})}


class House:
    """A folder with trajectories, and the command that annotates them with the server's model."""

    def __init__(self, folder: Path):
        self.folder, self.input, self.output = folder, folder / "input.jsonl", folder / "out.jsonl"

    def flags(self, server: Server | None, *more) -> list:
        url = ["--base-url", server.url] if server else []
        return ["--input", self.input, "--annotator", "llm", *url, "--llm", MODEL, "--output", self.output,
                "--price", "1,2", *more]

    def annotate(self, server: Server | None, *more, code: int = 0, key: str = KEY) -> str:
        """Run the command to its end; returns what it printed. Its exit code must be `code`."""
        done = subprocess.run(command(*self.flags(server, *more)), capture_output=True, text=True,
                              env=environment(key), timeout=120)
        text = done.stdout + done.stderr
        assert done.returncode == code, text
        assert "Traceback" not in text and KEY not in text
        return text

    def start(self, server: Server, *more) -> subprocess.Popen:
        return subprocess.Popen(command(*self.flags(server, *more)), env=environment(), stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    def lines(self, suffix: str) -> list[dict]:
        """The whole lines of the file with this suffix; none if there is no file."""
        path = self.folder / f"out{suffix}"
        lines = path.read_text().splitlines(True) if path.exists() else []
        return [json.loads(line) for line in lines if line[-1] == "\n"]

    def answers(self) -> int:
        """How many responses are on the disk."""
        path = self.folder / "out.responses.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def check(self, episodes: list[dict]):
        """All are labelled, none twice, each step's action is the expert's."""
        labelled = read_episodes(self.output)
        expert = {(e["task"], e["variation"]): actions_of(e) for e in episodes}
        assert Counter((e["task"], e["variation"]) for e in labelled) == Counter(expert.keys())
        for episode in labelled:
            assert actions_of(episode) == expert[episode["task"], episode["variation"]]
            assert all(step["subgoal"] for step in episode["steps"])
            assert episode["annotator"] == MODEL and episode["usage"]["calls"] >= 1


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path)


@pytest.fixture
def serve():
    """Starts servers, and closes them when the test is over."""
    servers = []

    def start(**settings) -> Server:
        servers.append(Server(**settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def wait_for(ready, seconds: float = 30):
    deadline = time.time() + seconds
    while not ready():
        assert time.time() < deadline, "it never got so far"
        time.sleep(0.01)


# ---- The run against a server that misbehaves


def test_200_trajectories_end_labelled_though_one_answer_in_five_is_hit_by_a_fault(house, serve):
    episodes = trajectories(house.input, 200)
    fault_of = dict(zip((key_of(e) for e in episodes[::5]), cycle(FAULTS), strict=False))
    assert set(fault_of.values()) == set(FAULTS)
    server = serve(faults=fault_of.get, key=KEY, stall=5)
    text = house.annotate(server, "--concurrency", 16, "--timeout", 2)
    house.check(episodes)

    paid = {key_of(e): 1 + (fault_of.get(key_of(e)) in ANOTHER_CALL) for e in episodes}
    assert server.paid == paid, "more calls than the faults cost"
    failed_requests = sum(fault in BEFORE_THE_ANSWER for fault in fault_of.values())
    assert sum(server.attempts.values()) == sum(paid.values()) + failed_requests
    assert house.answers() == sum(paid.values())
    for key in (key for key, fault in fault_of.items() if fault == "rate limit"):
        first, second = (moment for asked, moment in server.times if asked == key)
        assert second - first >= 1, "Retry-After was not honoured"

    asked_again = sum(calls == 2 for calls in paid.values())
    repaired = sum(fault_of.get(key_of(e)) in ("missing one", "invented", "reordered", "duplicated") for e in episodes)
    assert f"asked again {asked_again} " in text and f"repaired {repaired} " in text
    assert f"{sum(paid.values())} calls" in text


def test_labels_are_the_answers_own_whatever_its_form(house, serve):
    episodes = trajectories(house.input, 60)
    forms = ["prose", "fence", "capitals", "not json", "unlisted", "reordered", "invented", "duplicated", None]
    fault_of = dict(zip(map(key_of, episodes), cycle(forms), strict=False))
    house.annotate(serve(faults=fault_of.get))
    for episode in read_episodes(house.output):
        if fault_of[key_of(episode)] in ("prose", "fence", "capitals", "not json", "unlisted", None):
            assert episode["answer"] in ("as it came", "repaired")
            assert boundaries(labels_of(episode)) == {i for i in range(3, len(episode["steps"]), 3)}


def test_an_answer_beyond_repair_is_listed_with_its_text_and_the_run_says_so(house, serve):
    episodes = trajectories(house.input, 12)
    hopeless = key_of(episodes[3])
    server = serve(faults=lambda key: "always prose alone" if key == hopeless else None)
    text = house.annotate(server, "--retries", 1, code=1)
    assert "1 trajectories are not annotated" in text and "failed 1 " in text
    [failure] = house.lines(".failures.jsonl")
    assert failure["variation"] == episodes[3]["variation"] and failure["answers"] == ["I would rather not say."] * 2
    assert len(read_episodes(house.output)) == 11

    house.annotate(server, "--retries", 1, code=1)
    assert server.paid[hopeless] == 2, "the same command paid for a known failure again"
    server.faults = lambda key: None
    house.annotate(server, "--retries", 2)
    house.check(episodes)
    assert house.lines(".failures.jsonl") == []


def test_one_answer_that_the_server_cannot_give_leaves_the_others_done(house, serve):
    episodes = trajectories(house.input, 8)
    server = serve(faults=lambda key: "too long" if key == key_of(episodes[0]) else None)
    text = house.annotate(server, code=1)
    assert "maximum context length" in text and len(read_episodes(house.output)) == 7


# ---- Deaths


def test_kill_9_ten_times_then_a_full_run_pays_for_no_written_answer_again(house, serve):
    episodes = trajectories(house.input, 200, longest=25)
    server, moments, kept = serve(seconds=0.1), random.Random(7), []
    for _ in range(10):
        before = house.answers()
        process = house.start(server, "--concurrency", 8)
        goal = before + moments.randrange(1, 8)
        wait_for(lambda goal=goal: house.answers() >= goal)
        time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        time.sleep(0.2)  # requests under way at the server end
        written = {(record["task"], record["variation"]) for record in house.lines(".responses.jsonl")}
        kept.append({key: server.paid[key] for e in episodes
                     if (e["task"], e["variation"]) in written for key in [key_of(e)]})
    house.annotate(server, "--concurrency", 16)
    house.check(episodes)
    assert len(kept[-1]) >= 10
    for paid_then in kept:
        assert {key: server.paid[key] for key in paid_then} == paid_then, "an answer on the disk was paid for again"
    assert sum(server.paid.values()) <= 200 + 10 * 8


def test_lines_torn_by_a_kill_are_cut_off_and_whole_ones_kept(house, serve):
    episodes, server = trajectories(house.input, 6), serve()
    house.annotate(server)
    for suffix in (".jsonl", ".responses.jsonl"):
        path = house.folder / f"out{suffix}"
        lines = path.read_text().splitlines(True)
        path.write_text("".join(lines[:-1]) + lines[-1][:50])
    house.annotate(server)
    house.check(episodes)
    assert sorted(server.paid.values()) == [1, 1, 1, 1, 1, 2], "only the answer that was torn may be asked for again"


def test_ctrl_c_waits_for_the_answers_under_way(house, serve):
    episodes, server = trajectories(house.input, 60), serve(seconds=1)
    process = house.start(server, "--concurrency", 6)
    wait_for(lambda: len(server.times) >= 6)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert house.answers() == sum(server.paid.values()) == len(server.times) < 60
    server.seconds = 0
    house.annotate(server)
    house.check(episodes)
    assert sum(server.paid.values()) == 60


def test_two_runs_on_one_output_are_refused(house, serve):
    trajectories(house.input, 20)
    server = serve(seconds=2)
    process = house.start(server)
    wait_for(lambda: server.times)
    assert "another run" in house.annotate(server, code=2)
    process.kill()
    process.wait()


def test_with_the_simulator_an_answer_is_about_the_trajectory_on_disk(house, serve):
    server = serve(seconds=0.3)
    flags = ["--tasks", "7-1", "--variations", 4, "--workers", 1, "--concurrency", 1, "--annotator", "llm",
             "--base-url", server.url, "--llm", MODEL, "--output", house.output]
    process = subprocess.Popen(command(*flags), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: house.answers() >= 2)
    process.kill()
    process.wait()
    stored = house.lines(".trajectories.jsonl")
    assert len(stored) >= 2
    subprocess.run(command(*flags), env=environment(), check=True, capture_output=True, timeout=60)
    house.check(house.lines(".trajectories.jsonl"))
    assert house.lines(".trajectories.jsonl")[: len(stored)] == stored, "a trajectory was collected twice"
    assert sum(server.paid.values()) <= 5


# ---- Money and keys


def test_max_cost_is_never_passed_and_a_higher_one_goes_on(house, serve):
    episodes, server = trajectories(house.input, 50), serve(seconds=0.05, tokens=(1000, 500))  # 0.002 dollars each
    text = house.annotate(server, "--max-cost", 0.05, "--answer-tokens", 1000, "--concurrency", 16, code=1)
    spent = sum(record["dollars"] for record in house.lines(".responses.jsonl"))
    assert spent == pytest.approx(0.002 * sum(server.paid.values()))
    assert 0.03 < spent <= 0.05 and "--max-cost" in text and f"${spent:.4f}" in text
    assert len(read_episodes(house.output)) == sum(server.paid.values())
    house.annotate(server, "--max-cost", 0.2)
    house.check(episodes)
    assert sum(server.paid.values()) == 50


def test_max_cost_without_a_price_is_refused(house, serve):
    trajectories(house.input, 2)
    flags = ["--input", house.input, "--annotator", "llm", "--llm", "no-list-price", "--output", house.output]
    done = subprocess.run(command(*flags, "--max-cost", 1), capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "--price" in done.stderr


def test_a_user_error_is_one_sentence_and_exit_2_and_loses_nothing(house, serve):
    episodes, server = trajectories(house.input, 30), serve(key=KEY, tokens=(1000, 500))
    house.annotate(server, "--max-cost", 0.02, "--answer-tokens", 500, code=1)
    before = house.output.read_text()
    assert before
    nowhere = serve()
    nowhere.close()
    quota = {"status": 429, "code": "insufficient_quota", "message": "You exceeded your current quota."}

    def refused(words: str, at: Server | None, *more, **settings):
        started = time.time()
        text = house.annotate(at, *more, code=2, **settings)
        last = text.strip().splitlines()[-1]
        assert words in last and last.startswith("annotate.py: "), text
        assert house.output.read_text() == before and time.time() - started < 15

    refused("OPENAI_API_KEY", None, key="")
    refused("refuses the key", server, key="sk-wrong")
    refused("no server answers", nowhere)
    house.output.rename(house.folder / "kept")
    (house.folder / "out.responses.jsonl").rename(house.folder / "kept.responses")
    house.output.write_text(before.replace(MODEL, "teacher-9"))
    before = house.output.read_text()
    refused("no model 'teacher-9'; the nearest are teacher-1", server, "--llm", "teacher-9")
    (house.folder / "kept").rename(house.output)
    (house.folder / "kept.responses").rename(house.folder / "out.responses.jsonl")
    before = house.output.read_text()
    server.refuse = quota
    refused("quota is used up", server)
    assert all(times <= 1 for times in server.attempts.values()), "it kept asking an empty account"
    server.refuse = None
    house.annotate(server)
    house.check(episodes)


def test_the_key_is_in_no_file_and_no_message(house, serve):
    trajectories(house.input, 12)
    server = serve(key=KEY)
    server.faults = {key_of(e): "echo key" for e in read_episodes(house.input)[:4]}.get
    house.annotate(server, "--retries", 0, code=1)
    assert "[key]" in (house.folder / "out.responses.jsonl").read_text()
    house.annotate(serve(key="another"), code=2)  # this server's refusal repeats the key
    server.refuse = {"status": 400, "code": "bad_request", "message": f"Cannot work for {KEY}"}
    assert "Cannot work for [key]" in house.annotate(server, "--retries", 3, code=1)
    house.annotate(server, "--dry-run")
    house.annotate(server, "--batch", "--poll", 0.1, code=1)
    for path in house.folder.iterdir():
        assert KEY not in path.read_text()


def test_dry_run_counts_and_prints_one_prompt_and_sends_nothing(house, serve):
    trajectories(house.input, 20)
    server = serve()
    text = house.annotate(server, "--dry-run", key="")
    assert "20 calls" in text and "$0.0" in text and "Nothing was sent" in text and "step 1" not in text
    assert text.count("Sub-goals:") >= 3 and "navigate_to(kitchen)" in text
    assert not server.times and [path.name for path in house.folder.iterdir()] == ["input.jsonl"]
    estimate = float(text.rpartition("about $")[2].split()[0].rstrip(".")) if "about $" in text else 0
    house.annotate(server)
    spent = sum(record["dollars"] for record in house.lines(".responses.jsonl"))
    assert spent / 1.5 < estimate < spent * 1.5


# ---- Batches


def test_a_batch_survives_being_closed_and_costs_half(house, serve):
    episodes = trajectories(house.input, 30)
    fault_of = {key_of(e): "missing two" for e in episodes[:5]}
    server = serve(faults=fault_of.get, polls=10**9, tokens=(1000, 500))
    process = house.start(server, "--batch", "--poll", 0.1)
    wait_for(lambda: any(batch["polls"] for batch in server.batches.values()))
    process.kill()
    process.wait()
    assert "--batch" in house.annotate(server, code=2), "without --batch it would have paid a second time"
    process = house.start(server, "--batch", "--poll", 0.1)
    polls = sum(batch["polls"] for batch in server.batches.values())
    wait_for(lambda: sum(batch["polls"] for batch in server.batches.values()) > polls)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    server.polls = 2
    house.annotate(server, "--batch", "--poll", 0.1)
    house.check(episodes)
    assert len(server.batches) == 2, "one batch for all, one for the five short questions"
    assert sum(server.paid.values()) == 35 and not server.attempts
    assert sum(r["dollars"] for r in house.lines(".responses.jsonl")) == pytest.approx(35 * 0.001)
    assert not (house.folder / "out.batch.json").exists()


def test_a_batch_whose_creation_got_no_reply_is_found_and_not_made_again(house, serve):
    episodes = trajectories(house.input, 10)
    server = serve(faults={"batch reply": "dropped"}.get)
    house.annotate(server, "--batch", "--poll", 0.1)
    house.check(episodes)
    assert len(server.batches) == 1


def test_a_kill_while_batch_results_are_written_pays_for_none_again(house, serve):
    episodes, server = trajectories(house.input, 200), serve()
    process = house.start(server, "--batch", "--poll", 0.1)
    wait_for(lambda: house.answers() >= 5)
    process.kill()
    process.wait()
    assert house.answers() < 200
    house.annotate(server, "--batch", "--poll", 0.1)
    house.check(episodes)
    assert len(server.batches) == 1 and set(server.paid.values()) == {1}
    assert house.answers() == 200, "an answer was kept, and counted, twice"


def test_requests_that_a_batch_did_not_answer_are_sent_again(house, serve):
    episodes = trajectories(house.input, 10)
    refused = key_of(episodes[0])
    server = serve(faults=lambda key: "batch error" if key == refused and len(server.batches) == 1 else None)
    house.annotate(server, "--batch", "--poll", 0.1)
    house.check(episodes)
    server.faults = lambda key: "batch error"
    house.output.unlink()
    (house.folder / "out.responses.jsonl").unlink()
    assert "overloaded" in house.annotate(server, "--batch", "--poll", 0.1, code=1)


def test_max_cost_holds_for_batches(house, serve):
    episodes, server = trajectories(house.input, 30), serve(tokens=(1000, 500))  # 0.001 dollars each in a batch
    house.annotate(server, "--batch", "--poll", 0.1, "--max-cost", 0.015, "--answer-tokens", 500, code=1)
    assert 0.009 < sum(record["dollars"] for record in house.lines(".responses.jsonl")) <= 0.015
    house.annotate(server, "--batch", "--poll", 0.1)
    house.check(episodes)


def test_a_server_without_batches_is_refused_with_one_sentence(house, serve):
    trajectories(house.input, 3)
    server = serve(refuse={"status": 404, "code": "not_found", "message": "Not Found"})
    assert "no Batch API" in house.annotate(server, "--batch", code=2)


# ---- Once per task


def test_propagate_asks_about_k_of_a_task_and_the_others_follow(house, serve):
    episodes, server = trajectories(house.input, 120), serve()
    tasks = Counter(e["task"] for e in episodes)
    house.annotate(server, "--propagate", 1)
    house.check_carried = read_episodes(house.output)
    assert len(house.check_carried) == 120
    carried = [e for e in house.check_carried if e["answer"] == "carried over"]
    asked = sum(server.paid.values())
    assert len(tasks) <= asked == 120 - len(carried) and len(carried) > 60
    expert = {key_of(e): e for e in episodes}
    for episode in carried:
        assert actions_of(episode) == actions_of(expert[key_of(episode)]) and "usage" not in episode
    house.annotate(server, "--propagate", 1)
    assert sum(server.paid.values()) == asked


def test_carrying_over_renames_objects_and_follows_longer_walks_and_waits():
    def episode(description: str, *actions: str, subgoals=()) -> dict:
        labels = [name for name, count in subgoals for _ in range(count)] or [None] * len(actions)
        return {"description": description, "steps": [
            {"action": action, "subgoal": label, "look": ""} for action, label in zip(actions, labels, strict=True)]}

    subgoals = [("navigate_to(kitchen)", 2), ("find(metal pot)", 2), ("wait()", 1), ("heat(water, metal pot)", 2)]
    source = episode("boil water", "open door to kitchen", "go to kitchen", "open cupboard", "pick up metal pot",
                     "wait1", "move metal pot to stove", "activate stove", subgoals=subgoals)
    other = episode("boil lead", "open door to hallway", "go to hallway", "open door to foundry", "go to foundry",
                    "open drawer", "pick up tin cup", "wait1", "wait1", "wait1", "move tin cup to blast furnace",
                    "activate blast furnace")
    labels = labels_of(annotate_by_examples([source], other))
    assert labels == ["navigate_to(foundry)"] * 4 + ["find(tin cup)"] * 2 + ["wait()"] * 3 + ["heat(lead, tin cup)"] * 2
    stranger = annotate_by_examples([source], episode("x", "read book", "eat apple", "dunk cup into bath"))
    assert stranger["answer"] == "rules" and labels_of(stranger)[0] == "read(book)"


def test_trajectories_in_a_file_are_annotated_without_a_simulator_or_a_server(house):
    episodes = trajectories(house.input, 50)
    for annotator in ("examples", "rules"):
        output = house.folder / f"{annotator}.jsonl"
        subprocess.run(command("--input", house.input, "--annotator", annotator, "--output", output), check=True,
                       capture_output=True, env={**environment(""), "PATH": ""}, timeout=60)
        annotated = sorted(read_episodes(output), key=lambda e: e["variation"])
        assert list(map(actions_of, annotated)) == list(map(actions_of, episodes))
        assert all(all(labels_of(e)) and e["annotator"] == annotator for e in annotated)


def test_the_embedded_annotators_are_close_to_the_hand():
    examples = read_episodes(EXAMPLES)
    by_rules = agreement([(labels_of(annotate_by_rules(e)), labels_of(e)) for e in examples])
    assert by_rules["F1"] >= 0.85
    held_out = [(e, [other for other in examples if other["task"] == e["task"] and other is not e]) for e in examples]
    held_out = [(e, others) for e, others in held_out if others]
    assert len({e["task"] for e, _ in held_out}) >= 10
    carried = agreement([(labels_of(annotate_by_examples(others, e)), labels_of(e)) for e, others in held_out])
    by_rules = agreement([(labels_of(annotate_by_rules(e)), labels_of(e)) for e, _ in held_out])
    assert carried["F1"] >= by_rules["F1"] and carried["same sub-goal"] >= by_rules["same sub-goal"] + 0.1


# ---- Reading answers

ACTIONS = ["open door to kitchen", "go to kitchen", "open cupboard", "pick up metal pot", "look around"]
NAMES = ["navigate_to(kitchen)"] * 2 + ["find(pot, in cupboard (old))"] * 3


@pytest.mark.parametrize("answer", [
    "1- navigate_to(kitchen): {'open door to kitchen', 'go to kitchen'}\n"
    "2- find(pot, in cupboard (old)): {'open cupboard', 'pick up metal pot', 'look around'}",
    "Sure!\n```text\n1) navigate_to(kitchen) : {\"open door to kitchen\",\n \"go to kitchen\"} 2) find(pot,\n in "
    "cupboard (old)): {\"open cupboard\", \"pick up metal pot\", \"look around\"}\n```\nDone (I think).",
    "**1. navigate_to(kitchen)**: [open door to kitchen, go to kitchen]\n**2. find(pot, in cupboard (old))**:\n"
    "- open cupboard\n- pick up metal pot\n- look around",
    "{“navigate_to('kitchen')”: [‘open door to kitchen’, ‘go to kitchen’], "
    "“find(pot, in cupboard (old))”: [‘open cupboard’, ‘pick up metal pot’, ‘look around’]}",
    "Here you go\n1. navigate_to(kitchen)\n   * open door to kitchen\n   * go to kitchen\n2. find(pot, in cupboard "
    "(old))\n   * open cupboard\n   * pick up metal pot\n   * look around\n",
    json.dumps([{"subgoal": name, "actions": actions} for name, actions in
                (("navigate_to(kitchen)", ACTIONS[:2]), ("find(pot, in cupboard (old))", ACTIONS[2:]))]),
    "1- navigate_to(kitchen): {`Open door to kitchen`, `Go to the kitchen`}\n"
    "2- find(pot, in cupboard (old)): {`open cupboard`, `pick up metal pot`, `look around`",
])
def test_an_answer_is_read_in_any_form(answer):
    assert read_answer(answer, ACTIONS)[0] == NAMES


def test_an_action_that_is_missing_alone_joins_the_subgoal_before_it_and_two_are_asked_for():
    def read(*lists: str, also: str = ""):
        answers = [("whole", "\n".join(f"{i}- f_{i}(x): {{{actions}}}" for i, actions in enumerate(lists, 1)))]
        return read_answers(ACTIONS, answers + [("missing", also)] * bool(also), retries=1)

    alone = read("'open door to kitchen', 'go to kitchen'", "'pick up metal pot', 'look around'")
    assert (alone.labels, alone.question, alone.answer) == (["f_1(x)"] * 3 + ["f_2(x)"] * 2, None, "repaired")
    first = read("'go to kitchen', 'open cupboard', 'pick up metal pot', 'look around'")
    assert first.labels == ["f_1(x)"] * 5
    two = read("'open door to kitchen', 'go to kitchen'", "'look around'")
    assert (two.labels, two.question) == (["f_1(x)"] * 2 + [None] * 2 + ["f_2(x)"], "missing")
    filled = read("'open door to kitchen', 'go to kitchen'", "'look around'",
                  also="1- find(pot): {'open cupboard', 'pick up metal pot'}")
    assert filled.labels == ["f_1(x)"] * 2 + ["find(pot)"] * 2 + ["f_2(x)"] and filled.answer == "asked again"
    hopeless = read_answers(ACTIONS, [("whole", "no")] * 2, retries=1)
    assert hopeless.question is None and hopeless.labels == [None] * 5


def test_actions_that_come_again_and_again_are_aligned_in_order():
    actions = ["wait", "look around", "wait", "look around", "wait"]
    answer = "1- a(): {'wait', 'look around'} 2- b(): {'wait', 'sing', 'look around', 'wait'}"
    assert read_answer(answer, actions) == (["a()"] * 2 + ["b()"] * 3, False)


def test_parse_answer_takes_parentheses_and_commas_within_names():
    answer = "1- move(cup (red, old), box): {'move cup to box'}"
    assert parse_answer(answer) == [("move(cup (red, old), box)", "move cup to box")]


# ---- The question


def test_a_question_shows_boiling_water_then_an_example_of_the_same_task_type():
    examples = read_episodes(EXAMPLES)
    assert len({e["task"] for e in examples}) == 30
    for task in {e["task"] for e in examples}:
        of_task = [e for e in examples if e["task"] == task]
        shown = worked_examples(examples, {**of_task[0], "variation": -1})
        assert len(shown) == 2 and shown[0]["task"] == "boil"
        if task != "boil" or len(of_task) > 1:
            assert shown[1] == of_task[task == "boil"]
        for own in of_task:
            shown = worked_examples(examples, own)
            assert len(shown) == 2 and own not in shown
            if len(of_task) > 1:
                assert shown[task != "boil"]["task"] == task


def test_the_short_question_shows_what_is_missing_and_nothing_of_the_worked_examples():
    episode = read_episodes(EXAMPLES)[0]
    labels = labels_of(episode)[:3] + [None] * 2 + labels_of(episode)[5:]
    [_, message] = ask_for("missing", episode, labels, read_episodes(EXAMPLES))
    assert f"'{episode['steps'][3]['action']}', '{episode['steps'][4]['action']}'" in message["content"]
    [_, whole] = ask_for("whole", episode, labels, read_episodes(EXAMPLES))
    assert len(message["content"]) < len(whole["content"]) / 2


# ---- The report


def test_agreement_counts_boundaries_and_names():
    figures = agreement([(["a(x)", "a(x)", "b(y)", "c(z)"], ["a(x)", "a(x)", "b(x)", "b(x)"])])
    assert figures == pytest.approx(
        {"precision": 0.5, "recall": 1, "F1": 2 / 3, "same function": 0.75, "same sub-goal": 0.5})


def test_files_beside_an_output_have_one_name_while_it_is_made_and_when_it_is_done():
    assert beside("runs/train.jsonl.part", ".responses.jsonl") == beside("runs/train.jsonl", ".responses.jsonl")
    assert beside("runs/train.jsonl", ".batch.json") == Path("runs/train.batch.json")


def test_the_report_of_a_file_says_what_the_run_said(house, serve):
    trajectories(house.input, 10)
    text = house.annotate(serve())
    done = subprocess.run(command("--report", house.output), capture_output=True, text=True, check=True)
    assert done.stdout in text and "10 calls" in done.stdout and "rules, all" in done.stdout
