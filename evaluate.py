#!/usr/bin/env python3
"""Stage 4: the small agent alone in the simulator, and the table of what it reached.

At every step the planner names a sub-goal and the executor an action towards it; no LLM is
called. All live episodes take their turn together: one batch for the planner, one for the executor, one message to each
simulator process.

    reads   two model folders, of stages 2 and 3
    writes  --output, one episode a line as it ends (stage 1's record and the fields of `Played`), and --report

    python evaluate.py --tasks 4,7-1 --split test --variations 10 \\
        --subgoal-model subgoal --action-model action --output hierarchical.jsonl
    python evaluate.py --tasks 4,7-1 --subgoals none --action-model flat --output flat.jsonl
    python evaluate.py --tasks 4-2 --subgoal-model subgoal --action-model action --watch
    torchrun --nproc-per-node 8 evaluate.py --subgoal-model subgoal --action-model action --output hierarchical.jsonl
    python evaluate.py --report-only hierarchical.jsonl flat.jsonl --report report.md

A run that was stopped goes on where it was when the same command is given again.
"""

import argparse
import base64
import glob
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from itertools import chain, groupby, zip_longest
from pathlib import Path

import jinja2
import numpy as np
import transformers  # loads its parts, and PyTorch, only when they are used
from markupsafe import Markup
from py4j.protocol import Py4JError
from rapidfuzz import fuzz, process
from tqdm import tqdm

from annotate import (
    ID2TASK,
    SIMPLIFICATIONS,
    SPLITS,
    Episode,
    EpisodeFile,
    Game,
    Step,
    beside,
    fail,
    positive,
    read_episodes,
    resolve_tasks,
    split_variations,
    stop,
    template,
    worker_pool,
)
from train_action import executor_state
from train_subgoal import ABOUT, answers, be_quiet, has_bf16, render, state_of, trained_states

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Those that a user changes from run to run are command-line flags: see `parse_args`.

MAX_MOVES = 100  # the benchmark's limit on an episode
RANDOM_EVERY = 10  # steps that a random sub-goal stands for (as in the paper's ablation)
LOOP = 24  # steps: an episode whose last 24 repeat a cycle of at most LOOP / 4 has got stuck
REFUSED = "No known action matches that input."  # the simulator's answer to what is no action here; costs no move
AMBIGUOUS = "Ambiguous request"  # … to an action that several objects fit; we take the first, as the expert does
TRIES = 3  # times that an episode is played whose simulator dies
SAMPLE, SAME = 32, 0.95  # states on which a converted model is compared, and the share of equal answers it must reach
AGENTS = {  # --subgoals: the agent's name in the report
    "model": "hierarchical",
    "none": "flat (no sub-goals)",
    "random": "random sub-goals",
    "semi-random": "semi-random sub-goals",
    "oracle": "oracle sub-goals",
}
NEEDS = {  # --subgoals: the flags that it cannot do without
    "model": ["action_model", "subgoal_model"],
    "none": ["action_model"],
    "random": ["action_model", "data"],
    "semi-random": ["action_model", "subgoal_model", "data"],
    "oracle": ["action_model", "data"],
}
ENGINES = ("ctranslate2", "ctranslate2-int8", "transformers")
PUBLISHED = [  # overall means over the 30 tasks (arXiv 2405.02749)
    ("hierarchical, FLAN-T5-large ×2 (published, 30 tasks)", 65.43),
    ("Swift-only, FLAN-T5-large (published, 30 tasks)", 48.72),
]
REASONS = {  # why an episode ended, in words
    "done": "Done", "moves": "At the limit of moves", "failed": "Failed for good", "loop": "Going in circles",
    "died": "The simulator died of it",
}


class Played(Episode):
    """An episode that our agent played: the record of stage 1, and how it went."""

    agent: str  # its row in the report: --name, or the one in AGENTS
    subgoals: str  # where they come from: a key of AGENTS
    models: str  # a hash of all that decides how it plays: weights, templates, beams …
    parameters: dict[str, int]  # of the models: {"planner": …, "executor": …}
    seen: bool  # whether its models were trained on other variations of this task
    teacher: dict  # what naming the sub-goals that they learned from cost: see `teacher_of` in stage 2
    stop: str  # done, moves (the limit), failed (score below 0), loop, died (the simulator: see the last observation)
    invalid: list[int]  # places in `steps` whose first choice was refused
    repaired: list[int]  # … and for which no other beam would do, so that the nearest valid action was taken
    seconds: float  # from the episode's start to its end, shared with all that were live beside it


# ---------------------------------------------------------------------------------------------------------------------
# In a simulator process: many live games in one JVM, each in a slot.

GAMES: dict[int, Game] = {}
REFUSALS: dict[int, tuple[dict, set, list]] = {}  # slot: a state, the actions refused in it, and the valid ones


class Death(str):
    """Why the simulator died, in the place of what it should have answered."""


@contextmanager
def awake(seconds: float):
    """Kill a JVM that does not answer in time, so that a hang becomes a death, which py4j reports."""
    watch = threading.Timer(seconds, lambda: Game.gateway.java_process.kill())
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def bury(started: float, timeout: float) -> Death:
    """Forget the JVM and all its games; the next game that is started launches a new one."""
    GAMES.clear()
    REFUSALS.clear()
    if Game.gateway:
        Game.gateway.java_process.kill()
    Game.gateway = None
    return Death(f"gave no answer for {timeout:g} s" if time.time() - started >= timeout else "died")


def start_game(slot: int, task: str, variation: int, actions: list[str], timeout: float) -> tuple | Death:
    """Start an episode in a slot, and take the actions that it had come to before its simulator died.

    Returns the task's description, the state (look and inventory), the score, and the seconds that it took.
    """
    started = first = time.time()
    REFUSALS.pop(slot, None)
    score = 0
    try:
        game = GAMES.pop(slot, None) or Game()
        with awake(timeout):
            description = game.load(task, variation)
        for action in actions:
            started = time.time()
            with awake(timeout):
                _, score, _ = game.step(action)
        GAMES[slot] = game
        return description, game.state(), score, time.time() - first
    except (Py4JError, OSError, ValueError):  # the latter two: no JVM could be launched
        return bury(started, timeout)


@dataclass
class Move:
    """What came of one turn of one game."""

    taken: list[tuple[str, str, int]]  # (action, observation, score): one, and a second where an answer `0` was needed
    completed: bool
    state: dict  # look and inventory after it
    choice: int | None  # which of the candidates was taken: 0 the likeliest; None if none would do
    seconds: float = 0.0  # in the simulator


def play_turn(turns: list[tuple[int, list[str]]], timeout: float) -> list[Move | Death | None]:
    """One move in each of the (slot, candidate actions); None where the game has gone with its simulator."""
    moves = []
    for slot, candidates in turns:
        started = time.time()
        try:
            with awake(timeout):
                moves.append(play_move(slot, candidates) if slot in GAMES else None)
        except Py4JError:
            moves.append(bury(started, timeout))
        if isinstance(moves[-1], Move):
            moves[-1].seconds = time.time() - started
    return moves


def play_move(slot: int, candidates: list[str]) -> Move:
    """Take the first candidate that the simulator accepts, else the valid action nearest to the first one.

    Only the likeliest may be a focus: on the wrong object it fails the task for good, so it is no makeshift.
    A stuck agent tries the same again and again: what was refused in a state is remembered until something visible
    changes, and so are its valid actions, which take up to a second to list.
    """
    game = GAMES[slot]
    state, refused, valid = REFUSALS.pop(slot, (None, set(), []))
    if state and state != game.state():
        state, refused, valid = None, set(), []
    for choice, action in enumerate(candidates):
        if action in refused or (choice and action.startswith("focus ")):
            continue
        observation, score, completed = game.step(action)
        if not observation.startswith(REFUSED):
            break
        refused.add(action)
        state = state or game.state()
    else:
        choice = None
        valid = valid or [action for action in game.valid_actions() if not action.startswith("focus ")]
        action, _, _ = process.extractOne(candidates[0], valid, scorer=fuzz.ratio)
        observation, score, completed = game.step(action)
    if state:
        REFUSALS[slot] = (state, refused, valid)
    taken = [(action, observation, score)]
    if observation.startswith(AMBIGUOUS):
        observation, score, completed = game.step("0")
        taken.append(("0", observation, score))
    return Move(taken, completed, game.state(), choice)


class Simulators:
    """The simulator processes as the agent's process sees them. One that dies is replaced, empty."""

    def __init__(self, workers: int, timeout: float):
        self.pools, self.timeout = [worker_pool(1) for _ in range(workers)], timeout

    def submit(self, worker: int, function, *arguments) -> Callable:
        """Have a worker call the function; returns a function that waits for what it returned.

        That is a `Death` if the process died of it, and None if it had died before.
        """
        pool = self.pools[worker]
        try:
            future = pool.submit(function, *arguments, self.timeout)
        except BrokenProcessPool:  # it died while nobody was waiting for it
            self.replace(worker, pool)
            return self.submit(worker, function, *arguments)

        @cache
        def wait():
            try:
                return future.result()
            except (BrokenProcessPool, CancelledError):
                return Death("died, its process too") if self.replace(worker, pool) else None

        return wait

    def start(self, episode: "Live") -> Callable:
        """Start an episode's game, or bring it back to where it was; returns a function that waits for it."""
        return self.submit(episode.worker, start_game, episode.slot, episode.task, episode.variation,
                           [step["action"] for step in episode.steps])

    def move(self, episodes: list["Live"], subgoals: list, candidates: list[list[str]]) -> list[tuple]:
        """Give each process the turns of its episodes; the last of a tuple waits for what came of a turn."""
        moving = []
        for worker in {episode.worker for episode in episodes}:
            mine = [i for i, episode in enumerate(episodes) if episode.worker == worker]
            turns = self.submit(worker, play_turn, [(episodes[i].slot, candidates[i]) for i in mine])
            for n, i in enumerate(mine):
                moving.append((episodes[i], subgoals[i], partial(self.turn, turns, n)))
        return moving

    @staticmethod
    def turn(turns: Callable, n: int) -> Move | Death | None:
        moves = turns()
        return moves[n] if isinstance(moves, list) else moves

    def replace(self, worker: int, pool) -> bool:
        """Put a new process in the place of a dead one; False if that has been done."""
        if self.pools[worker] is not pool:
            return False
        pool.shutdown(wait=False, cancel_futures=True)
        self.pools[worker] = worker_pool(1)
        return True

    def close(self):
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The students


def check_student(folder: str | Path, role: str) -> dict:
    """What student.json says of a model folder; ends the program if it is none, or none for this role."""
    try:
        about = json.loads((Path(folder) / ABOUT).read_text())
    except (OSError, ValueError):
        fail(f"{folder} is not a finished model folder (it has no whole {ABOUT}). Train one with train_{role}.py.")
    if about["role"] != role:
        fail(f"{folder} holds a model trained by train_{about['role']}.py, this needs one of train_{role}.py.")
    return about


class Student:
    """A trained model folder, ready to answer: weights, tokenizer, and the template that it was trained on."""

    def __init__(self, folder: str | Path, role: str, engine: str = "transformers"):
        be_quiet()
        self.folder, self.engine = Path(folder), engine
        self.about = check_student(folder, role)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = self.translator = None
        self.known = {}  # answers by what was asked: an agent that changed nothing is not asked again

    def answers(self, states: list[dict], beams: int, best: int = 1) -> list[list[str]]:
        """The `best` likeliest answers in every state, likeliest first."""
        texts = [render(self.about["template"], state) for state in states]
        new = [text for text in dict.fromkeys(texts) if (text, beams, best) not in self.known]
        if new:
            generate = self.by_transformers if self.engine == "transformers" else self.by_ctranslate2
            for text, given in zip(new, generate(new, beams, best), strict=True):
                self.known[text, beams, best] = given
        return [self.known[text, beams, best] for text in texts]

    def by_transformers(self, texts: list[str], beams: int, best: int) -> list[list[str]]:
        """Answers by Hugging Face's generate: the reference, and the faster one where there is a GPU."""
        if self.model is None:
            import torch

            dtype = torch.bfloat16 if has_bf16() else "auto"
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(self.folder, dtype=dtype)
            self.model = model.to(f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu").eval()
        return answers(self.model, self.tokenizer, texts, self.about, beams, best)

    def by_ctranslate2(self, texts: list[str], beams: int, best: int) -> list[list[str]]:
        """Answers by CTranslate2, on all cores. The folder is converted on first use, and a sample compared."""
        if self.translator is None:
            self.translator = self.converted(texts[:SAMPLE], beams)
        length = self.about["max_source_length"]
        ids = self.tokenizer(texts, truncation=True, max_length=length).input_ids
        results = self.translator.translate_batch(
            [self.tokenizer.convert_ids_to_tokens(text) for text in ids], beam_size=beams, num_hypotheses=best,
            max_decoding_length=self.about["max_target_length"], max_input_length=0, max_batch_size=32)
        tokens = [hypothesis for result in results for hypothesis in result.hypotheses]
        decoded = self.tokenizer.batch_decode(
            [self.tokenizer.convert_tokens_to_ids(hypothesis) for hypothesis in tokens], skip_special_tokens=True)
        return [decoded[i : i + best] for i in range(0, len(decoded), best)]

    def converted(self, sample: list[str], beams: int):
        """The folder's model for CTranslate2, converted and checked once: its answers must be those of transformers."""
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        def load(folder: Path):
            gpu = ctranslate2.get_cuda_device_count() > 0
            float_type = "bfloat16" if gpu else "float32"
            return ctranslate2.Translator(
                str(folder), device="cuda" if gpu else "cpu", device_index=local_rank() if gpu else 0,
                compute_type=f"int8_{float_type}" if self.engine.endswith("int8") else float_type,
                inter_threads=cores(), intra_threads=1)

        folder = self.folder / self.engine
        if folder.exists():
            return load(folder)
        with tempfile.TemporaryDirectory(dir=self.folder) as new:  # moved into place when it has been checked
            TransformersConverter(str(self.folder)).convert(new, force=True)
            self.translator = load(Path(new))
            same = {width: sum(one == other for one, other in zip(
                self.by_ctranslate2(sample, width, 1), self.by_transformers(sample, width, 1), strict=True))
                for width in (1, beams)}
            print(f"{self.folder}: converted for {self.engine}; at beam {beams}, {same[beams]} of {len(sample)} "
                  "answers are those of transformers", file=sys.stderr)
            if same[1] < SAME * len(sample):  # a hardly trained model's wider beams hold many answers of one likelihood
                stop(f"{self.engine} answers differently from transformers. Use --engine transformers.", 1)
            os.chmod(new, 0o755)
            with suppress(OSError):  # another rank was first
                Path(new).rename(folder)
        self.model = None
        return self.translator


def local_rank() -> int:
    """Which of the processes that torchrun started on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0))


def cores() -> int:
    """The cores that this process may count as its own, beside the other ranks on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---------------------------------------------------------------------------------------------------------------------
# The agent


@dataclass
class Live:
    """An episode that is being played, in a slot of a worker."""

    task: str
    variation: int
    worker: int
    slot: int
    description: str = ""
    state: dict = field(default_factory=lambda: {"look": "", "inventory": ""})
    there: bool = False  # whether its game is in the simulator: not before it has begun, nor when that has died
    deaths: int = 0  # simulators that died of it
    started: float = field(default_factory=time.time)
    steps: list[Step] = field(default_factory=list)
    marks: list[tuple] = field(default_factory=list)  # a step's whole effect, to recognise a loop
    invalid: list[int] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)

    def situation(self) -> dict:
        return state_of(self.description, self.steps, **self.state)

    @property
    def score(self) -> int:
        return self.steps[-1]["score"] if self.steps else 0

    def begin(self, beginning: tuple | Death | None) -> str | None:
        """Note what `start_game` returned; returns why the episode has ended, or None.

        A game that was brought back may differ from what it was, as the mendelian tasks have chance in them: then it
        starts anew.
        """
        if isinstance(beginning, Death):
            return self.die(beginning)
        if beginning:
            description, state, score, _ = beginning
            self.there = not self.steps or (same_things(state, self.state) and score == self.score)
            if self.there:
                self.description, self.state = description, state
            else:
                self.forget()

    def take(self, subgoal: str | None, move: Move | Death | None) -> str | None:
        """Note what `play_turn` returned; returns why the episode has ended, or None."""
        if isinstance(move, Death):
            return self.die(move)
        if not move:
            self.there = False
            return None
        if move.choice != 0:
            self.invalid.append(len(self.steps))
        if move.choice is None:
            self.repaired.append(len(self.steps))
        for action, observation, score in move.taken:
            self.note(subgoal, action, observation, score)
            self.marks.append((action, observation, *move.state.values()))
        self.state = move.state
        if self.score < 0:
            return "failed"
        if move.completed:
            return "done"
        if len(self.steps) >= MAX_MOVES:
            return "moves"
        return "loop" if is_loop(self.marks) else None

    def die(self, death: Death) -> str | None:
        """Start anew after a simulator died of this episode; "died" if that was the last try."""
        self.there = False
        self.deaths += 1
        if self.deaths < TRIES:
            return self.forget()
        self.note(None, "", f"The simulator {death}, in each of {TRIES} tries.", self.score)
        return "died"

    def forget(self):
        for moves in (self.steps, self.marks, self.invalid, self.repaired):
            moves.clear()

    def note(self, subgoal: str | None, action: str, observation: str, score: int):
        self.steps.append(Step(**self.state, subgoal=subgoal, action=action, observation=observation, score=score))


def is_loop(marks: list) -> bool:
    """Whether the last LOOP steps repeat one cycle, with nothing new in any state."""
    last = marks[-LOOP:]
    return len(last) == LOOP and any(last[period:] == last[:-period] for period in range(1, LOOP // 4 + 1))


def same_things(one: dict, other: dict) -> bool:
    """Whether two states show the same things, in whatever order: two loads of one variation list them differently."""
    return all(sorted(re.split(r"[\n,.()]", one[part])) == sorted(re.split(r"[\n,.()]", other[part])) for part in one)


class Agent:
    """Planner and executor. `subgoals` is a key of AGENTS; what random and oracle draw from are annotated episodes."""

    def __init__(self, executor: Student, planner: Student | None, subgoals: str, known: list[Episode], beams: int):
        self.executor, self.planner, self.subgoals, self.beams = executor, planner, subgoals, beams
        self.pool = sorted({step["subgoal"] for episode in known for step in episode["steps"]})
        self.experts = {(e["task"], e["variation"]): [step for _, step in trained_states(e)] for e in known}
        self.seconds = Counter()  # where the time went

    def choose(self, episodes: list[Live]) -> tuple[list[str | None], list[list[str]]]:
        """Sub-goals and candidate actions, likeliest first, for all live episodes at once."""
        started = time.time()
        situations = [episode.situation() for episode in episodes]
        planned = [[None]] * len(episodes)
        if self.planner:
            planned = self.planner.answers(situations, self.beams)
        subgoals = [self.subgoal(*pair) for pair in zip(episodes, (best for (best,) in planned), strict=True)]
        self.seconds["planner"] += (between := time.time()) - started
        states = [executor_state(*pair) for pair in zip(situations, subgoals, strict=True)]
        candidates = self.executor.answers(states, self.beams, best=self.beams)
        self.seconds["executor"] += time.time() - between
        return subgoals, candidates

    def subgoal(self, episode: Live, planned: str | None) -> str | None:
        """The sub-goal that the executor gets where the planner would say `planned`.

        random: any of the train set, for RANDOM_EVERY steps; semi-random: one of the planned one's function with
        another object or room, for as long. Both are the same each time that an episode is played.
        """
        if self.subgoals == "oracle":
            return self.expert_subgoal(episode)
        if self.subgoals in ("model", "none"):
            return planned
        choices = self.pool
        if planned is not None:
            function = planned.partition("(")[0] + "("
            choices = [other for other in self.pool if other.startswith(function) and other != planned] or [planned]
        seed = f"{episode.task} {episode.variation} {planned} {len(episode.steps) // RANDOM_EVERY}"
        return random.Random(seed).choice(choices)

    def expert_subgoal(self, episode: Live) -> str:
        """The sub-goal of the expert's first step that the agent has not taken yet.

        An action counts as the expert's if it is among those that are left of the expert's present sub-goal or of the
        next one; the steps before it are then taken as done. So is a sub-goal that gave the expert points, once the
        agent has as many.
        """
        expert = self.experts[episode.task, episode.variation]
        ends = [i for i in range(1, len(expert)) if expert[i]["subgoal"] != expert[i - 1]["subgoal"]]
        place = 0
        for step in episode.steps:
            end, after = [*(end for end in ends if end > place), len(expert), len(expert)][:2]
            left = [other["action"] for other in expert[place:after]]
            before, reached = (expert[i - 1]["score"] if i else 0 for i in (place, end))
            if step["action"] in left:
                place += left.index(step["action"]) + 1
            elif before < reached <= step["score"]:
                place = end
        return expert[min(place, len(expert) - 1)]["subgoal"]


def play(agent: Agent, todo: list[tuple[str, int]], workers: int, live: int, timeout: float = 60,
         watch: Callable[[Live], None] = lambda episode: None) -> Iterator[tuple[Live, str]]:
    """Play (task, variation) pairs, up to `live` at a time in each of the workers; yields (episode, why it ended).

    The live episodes form two halves that alternate: while one is in the simulators, the other is in the models.
    An episode of which its simulator dies, or on which it is silent for `timeout` seconds, is played again from the
    start, TRIES times in all; the others in that simulator are brought back to where they were. `watch` sees each move.
    """
    simulators = Simulators(workers, timeout)
    waiting = list(reversed(todo))
    free = [(worker, slot) for slot in range(live) for worker in range(workers)]
    size = math.ceil(min(len(free), len(todo)) / 2)
    moving = deque([[], []])  # of each half: what `Simulators.move` returned
    begun = False

    def waited(answer: Callable):
        started = time.time()
        result = answer()
        agent.seconds["waiting"] += time.time() - started
        return result

    try:
        while waiting or any(moving):
            half = []
            for episode, subgoal, answer in moving.popleft():
                move = waited(answer)
                reason = episode.take(subgoal, move)
                if isinstance(move, Move):
                    agent.seconds["simulators"] += move.seconds
                    watch(episode)
                if reason:
                    free.append((episode.worker, episode.slot))
                    yield episode, reason
                else:
                    half.append(episode)
            room = min(len(waiting), len(free), size - len(half))
            half += [Live(*waiting.pop(), *free.pop(0)) for _ in range(room)]
            while absent := [episode for episode in half if not episode.there]:
                for episode, answer in [(episode, simulators.start(episode)) for episode in absent]:
                    beginning = waited(answer)
                    if isinstance(beginning, tuple):
                        agent.seconds["simulators"] += beginning[-1]
                        begun = True
                    elif not begun:
                        raise BrokenProcessPool("the very first simulator cannot be started")
                    if reason := episode.begin(beginning):
                        half.remove(episode)
                        free.append((episode.worker, episode.slot))
                        yield episode, reason
            moving.append(simulators.move(half, *agent.choose(half)) if half else [])
    finally:
        simulators.close()


# ---------------------------------------------------------------------------------------------------------------------
# The report: a diagnosis of every episode, then one section after the other, as Markdown and as a page with a replay.

# Tokens per action of agents that call an LLM while they act, in ScienceWorld (SwiftSage project page)
PER_ACTION = {"SayCan": 1855.84, "ReAct": 1971.03, "Reflexion": 2983.46, "SwiftSage": 757.07}
SUBGOALS = {  # where they come from, in words: the keys of AGENTS
    "model": "of the planner", "none": "none", "random": "drawn from the train set", "oracle": "the expert's own",
    "semi-random": "the planner's, their objects drawn"}
STUCK = 9  # actions: no sub-goal of the demo's 1,055 expert trajectories needs more (5,343 sub-goals; most take 1)
SERVES = {  # verbs, as `template` has them, that serve a sub-goal without naming anything of it
    "navigate_to": ("go to", "open door to", "close door to"), "find": ("open",),
    "fill": ("open", "activate", "deactivate"), "water": ("move", "pour", "activate", "deactivate"),
    "heat": ("open", "activate"), "cool": ("open",), "mix": ("open",), "dig": ("use",),
    "power": ("connect", "activate"), "plant": ("move",), "harvest": ("move",), "pollinate": ("open", "close door to"),
    "measure_time": ("activate", "deactivate"),
}
LITTLE = {"to", "in", "on", "into", "up", "at", "of", "from", "with"}
SERIES = [  # colours of agents in plots: on a light page, on a dark one
    ("#0063a6", "#5fb3f0"), ("#c2500a", "#ff9a5c"), ("#00795a", "#3ecfa3"), ("#a5427f", "#f090cb"),
    ("#7d6300", "#e0c04a"), ("#5b4fc4", "#a9a0ff"), ("#8c1c2b", "#ff8f9c"), ("#4d4d4d", "#b8b8b8")]
INK = "#010101"  # stands in a plot for the page's own colour of text


def in_line(subgoal: str, action: str) -> bool:
    """Whether an action can serve a sub-goal in functional form: a rule of thumb.

    Looking and waiting always can. `navigate_to` wants walking and doors; every other function a verb of `SERVES`, or
    an object that has a word in common with its own. More than 98% of the steps of all 30 tasks' experts are in line.
    """
    def words(text):
        return {word.rstrip("s") for word in re.findall("[a-z0-9]+", text.lower())} - LITTLE

    function, _, objects = subgoal.partition("(")
    verb, named = template(action)
    if re.match(r"look|wait|examine|\d+$", action) or verb in SERVES.get(function, ()):
        return True
    return function != "navigate_to" and bool(words(objects) & words(" ".join(named)))


def diagnose(episode: Played) -> dict:
    """The failure signatures of an episode; of steps their places, 0 …

    invalid      the first choice was refused, another beam taken
    repaired     no beam would do: the valid action nearest to the first choice was taken
    out of line  the action does not serve its sub-goal: see `in_line`
    stuck        after STUCK actions for one sub-goal, one more that did the same in the same state before
    wrong focus, loop, out of moves, died    how the episode failed; at most one is True
    broke        the place where it went wrong: the wrong focus, or the first step after the last gain; None if solved
    outcome      all that in a sentence
    """
    steps, stop, stuck = episode["steps"], episode["stop"], []
    named = [i for i, step in enumerate(steps) if step["subgoal"]]
    for _, run in groupby(named, key=lambda i: steps[i]["subgoal"]):
        before = set()
        for n, i in enumerate(run):
            step = tuple(steps[i][name] for name in ("look", "inventory", "action", "observation"))
            if n >= STUCK and step in before:
                stuck.append(i)
            before.add(step)
    last, scores = len(steps) - 1, [0, *(step["score"] for step in steps)]
    gains = [i for i in range(len(steps)) if scores[i + 1] > scores[i]]
    wrong = scores[-1] < 0
    broke = last if wrong or stop == "died" else min(last, max(gains, default=-1) + 1)
    gained = f"nothing was gained from step {broke + 1} on"
    outcome = {"loop": f"went in circles: {gained}", "moves": f"ran out of moves: {gained}",
               "died": "the simulator died"}.get(stop, f"ended at {scores[-1]}: {gained}")
    if wrong:
        outcome = f"failed for good at step {last + 1}: “{steps[last]['action']}” was wrong"
    if episode["score"] == 100:
        broke, outcome = None, "solved"
    return {
        "invalid": [i for i in episode["invalid"] if i not in episode["repaired"]], "repaired": episode["repaired"],
        "out of line": [i for i in named if not in_line(steps[i]["subgoal"], steps[i]["action"])], "stuck": stuck,
        "wrong focus": wrong, "loop": stop == "loop", "out of moves": stop == "moves", "died": stop == "died",
        "broke": broke, "outcome": outcome}


Copies = list[list[Played]]  # an agent's episodes, of each of its trained copies (`models`)


def gather(files: list[str]) -> dict[str, Copies]:
    """{agent: its episodes, each with its diagnosis}; ends the program for files that do not go together."""
    agents, places, protocols = defaultdict(lambda: defaultdict(list)), {}, set()
    for path in files:
        for episode in read_episodes(path):
            if not Played.__required_keys__ <= episode.keys() or episode["task"] not in ID2TASK.values():
                fail(f"{path} holds episodes that evaluate.py did not play. Name the files that it wrote.")
            key = tuple(episode[name] for name in ("agent", "models", "task", "variation"))
            if key in places:
                fail(f"{episode['task']} {episode['variation']} of {episode['agent']} stands in {places[key]} and once "
                     f"more in {path}. Name every episode once.")
            places[key] = path
            protocols.add((episode["split"], episode["simplifications"]))
            agents[episode["agent"]][episode["models"]].append({**episode, "diagnosis": diagnose(episode)})
    if len(protocols) > 1:
        fail(f"the files hold episodes of different splits or simplifications: {sorted(protocols)}. Report on one of "
             "them at a time.")
    return {name: list(copies.values()) for name, copies in agents.items()}


def tasks_of(episodes: list[Played]) -> list[list[Played]]:
    """Episodes by task, in the benchmark's order."""
    found = ([episode for episode in episodes if episode["task"] == task] for task in ID2TASK.values())
    return [played for played in found if played]


def average(copies: Copies, measure):
    """Of a number (or array) of an episode: the mean over copies of the mean over tasks of the mean over episodes."""
    return np.mean([np.mean([np.mean([measure(episode) for episode in played], axis=0) for played in tasks_of(copy)],
                            axis=0) for copy in copies], axis=0)


def score_tables(*agents: Copies) -> list[list[np.ndarray]]:
    """By task, the scores of each agent: (copies, variations that all agents played), NaN where a copy lacks one."""
    known = [[{(e["task"], e["variation"]): e["score"] for e in copy} for copy in copies] for copies in agents]
    shared = set.intersection(*(set().union(*copies) for copies in known))
    tasks = ([pair for pair in sorted(shared) if pair[0] == task] for task in ID2TASK.values())
    return [[np.array([[copy.get(pair, np.nan) for pair in pairs] for copy in copies]) for copies in known]
            for pairs in tasks if pairs]


def interval(copies: Copies, base: Copies | None = None, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean over tasks of the mean score; with `base`, of its gain over another agent.

    An agent's copies are drawn again, and within each task its variations: the same for all copies and both agents,
    as these play the same ones.
    """
    generator = np.random.default_rng(0)
    agents = [copies, base] if base else [copies]
    drawn = [generator.integers(len(agent), size=(draws, len(agent), 1)) for agent in agents]
    means = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")  # a draw of copies that lack the variations drawn
        for tables in score_tables(*agents):
            variations = generator.integers(tables[0].shape[1], size=(draws, 1, tables[0].shape[1]))
            mean, *other = (np.nanmean(table[chosen, variations], axis=(1, 2))
                            for table, chosen in zip(tables, drawn, strict=True))
            means.append(mean - sum(other))
        return tuple(np.nanpercentile(np.nanmean(means, axis=0), [2.5, 97.5]))


def summary(copies: Copies) -> dict:
    """What the tables say of an agent: score and interval, 0-100; shares of its episodes or steps, 0-1; moves."""
    low, high = interval(copies)
    means = {"score": average(copies, lambda e: e["score"]), "moves": average(copies, lambda e: len(e["steps"])),
             "solved": average(copies, lambda e: e["score"] == 100)}
    for name in ("wrong focus", "loop", "out of moves", "died"):
        means[name] = average(copies, lambda e, name=name: e["diagnosis"][name])
    for name in ("invalid", "repaired", "out of line", "stuck"):
        means[name] = average(copies, lambda e, name=name: len(e["diagnosis"][name]) / len(e["steps"]))
    return {**means, "low": low, "high": high, "episodes": sum(map(len, copies)),
            "text": f"{means['score']:.1f} ({low:.1f} to {high:.1f})"}


def first(copies: Copies) -> Played:
    """An episode that speaks for its agent: its sub-goals, sizes and teacher."""
    return copies[0][0]


@dataclass
class Section:
    """A part of the report: paragraphs, tables (each a caption, a header and rows), plots (SVG, in the page alone)."""

    title: str
    text: list[str]
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)


def overall(agents: dict[str, Copies]) -> Section:
    """A row for each agent and published figure, and what a reader must know to compare them."""
    summaries = {name: summary(copies) for name, copies in agents.items()}
    several = any(len(copies) > 1 for copies in agents.values())
    header = ["agent", "score (95% interval)", *["copies"] * several, "solved", "moves", "invalid actions", "episodes",
              "parameters", "LLM calls"]
    rows = []
    for name, s in summaries.items():
        refused, size = s["invalid"] + s["repaired"], sum(first(agents[name])["parameters"].values())
        rows.append([name, s["text"], *[str(len(agents[name]))] * several, f"{s['solved']:.0%}", f"{s['moves']:.1f}",
                     f"{refused:.1%}", str(s["episodes"]), f"{size / 1e6:.1f} M", "0"])
    rows += [[name, f"{score:.2f}", *[""] * (len(header) - 3), "0"] for name, score in PUBLISHED]
    played = [{(e["task"], e["variation"]) for e in copy} for copies in agents.values() for copy in copies]
    tasks = {task for task, _ in set.union(*played)}
    text = ["Score: the mean over tasks of the mean over episodes, 0 to 100, and in brackets its 95% bootstrap "
            "interval. Solved: episodes that reached 100. Invalid actions: steps whose first choice was refused."]
    if several:
        text.append("Copies: the same agent trained several times. Its score is the mean over them, and the interval "
                    "draws copies as well as episodes.")
    if any(pairs != played[0] for pairs in played):
        text.append(f"NOT THE SAME EPISODES: the agents played different ones, {len(set.intersection(*played))} in "
                    "common. Their scores cannot be compared as they stand.")
    if len(tasks) < len(ID2TASK):
        text.append(f"The published figures are means over all {len(ID2TASK)} tasks; ours are of {len(tasks)} of them. "
                    "So they show the scale; they are no comparison.")

    def draw(axes):
        for y, (name, s) in enumerate(summaries.items()):
            dot(axes, y, s, color(y), 6)
            if len(agents[name]) > 1:
                scores = [average([copy], lambda e: e["score"]) for copy in agents[name]]
                axes.plot(scores, [y - 0.22] * len(scores), "|", color=color(y))
        for i, (name, score) in enumerate(PUBLISHED):
            axes.axvline(score, color=INK, linestyle="--", linewidth=0.8)
            axes.annotate(f"{name.partition(',')[0]}, published {score:.1f}", (score, len(agents) - 0.1), fontsize=8,
                          xytext=(-4 if i % 2 else 4, 0), textcoords="offset points", ha="right" if i % 2 else "left")
        axes.set(xlim=(0, 101), ylim=(len(agents), -0.6), xlabel="score")
        axes.set_yticks(range(len(agents)), [textwrap.fill(name, 20) for name in agents])

    caption = "Score with 95% interval" + ("; small strokes: single copies" if several else "")
    return Section("Scores", text, [("", header, rows)], [plot(caption, 0.9 + 0.45 * len(agents), draw)])


def color(i: int) -> str:
    """Of the i-th agent; `plot` exchanges it for one of the page's."""
    return SERIES[i % len(SERIES)][0]


def dot(axes, y: float, s: dict, ink: str, size: float, **more):
    """A score with its interval, on a horizontal line."""
    axes.plot([s["low"], s["high"]], [y, y], color=ink, linewidth=size / 3, solid_capstyle="round")
    axes.plot(s["score"], y, "o", color=ink, markersize=size, **more)


def per_task(agents: dict[str, Copies]) -> Section:
    cells = {}  # (task, agent): summary
    for name, copies in agents.items():
        for task in ID2TASK.values():
            mine = [[episode for episode in copy if episode["task"] == task] for copy in copies]
            if any(mine):
                cells[task, name] = summary([copy for copy in mine if copy])
    tasks = {task: f"{id} {task}" for id, task in ID2TASK.items() if any(task == played for played, _ in cells)}
    rows = [[label, *(f"{s['score']:.1f} ({s['low']:.0f} to {s['high']:.0f})" if (s := cells.get((task, name))) else ""
                      for name in agents)] for task, label in tasks.items()]

    def draw(axes):
        for y, task in enumerate(tasks):
            for i, name in enumerate(agents):
                if s := cells.get((task, name)):
                    shift = 0.7 * ((i + 0.5) / len(agents) - 0.5)
                    dot(axes, y + shift, s, color(i), 4, label=name if not y else None)
            axes.axhline(y - 0.5, color=INK, alpha=0.2, linewidth=0.5)
        axes.set(xlim=(-2, 102), ylim=(len(tasks) - 0.5, -0.5), xlabel="score")
        axes.set_yticks(range(len(tasks)), [textwrap.fill(label, 26) for label in tasks.values()], fontsize=8)
        legend(axes, agents)

    height = 1 + len(tasks) * max(0.32, 0.12 * len(agents) + 0.06)
    return Section("Tasks", [], [("", ["task", *agents], rows)],
                   [plot("Score of each task with 95% interval", height, draw)])


def over_moves(agents: dict[str, Copies]) -> Section:
    longest = max(len(episode["steps"]) for copies in agents.values() for copy in copies for episode in copy)

    def held(episode):
        """(longest + 1,): the score after each move; what ended keeps its last, and a failed one's is 0."""
        scores = [0, *(max(0, step["score"]) for step in episode["steps"])]
        return np.pad(np.array(scores), (0, longest + 1 - len(scores)), mode="edge")

    def draw(axes):
        for i, (name, copies) in enumerate(agents.items()):
            axes.plot(average(copies, held), color=color(i), label=name, drawstyle="steps-post")
        axes.set(xlim=(0, longest), ylim=(0, 101), xlabel="moves", ylabel="mean score")
        legend(axes, agents)

    text = "Mean score after so many moves. Episodes that have ended keep their last score; one that failed counts 0."
    return Section("Score over moves", [text], plots=[plot("Mean score after so many moves", 3.2, draw)])


def ablations(agents: dict[str, Copies]) -> Section | None:
    """Every agent against the one whose planner names the sub-goals (else the first); None if there is but one."""
    if len(agents) == 1:
        return None
    base = next((name for name, copies in agents.items() if first(copies)["subgoals"] == "model"), next(iter(agents)))
    rows = []
    for name, copies in agents.items():
        parameters = (first(copies)["parameters"].get(role) for role in ("planner", "executor"))
        kind = first(copies)["subgoals"]
        rows.append([name, SUBGOALS.get(kind, kind), *(f"{size / 1e6:.1f} M" if size else "" for size in parameters),
                     f"{summary(copies)['score']:.1f}",
                     *(["", ""] if name == base else difference(copies, agents[base]))])
    text = [f"What makes the difference: each agent against {base}. The differences are paired, of the same episodes. "
            "Where the interval holds 0, the data do not tell the two apart."]
    if len({row[1] for row in rows}) > 1:
        text.append("Agents with sub-goals are meant to share one executor, so that only the sub-goals differ; the "
                    "agent without any has an executor of its own, trained without them.")
    header = ["agent", "sub-goals", "planner", "executor", "score", f"minus {base} (95% interval)", "episodes"]
    return Section("Ablations and variants", text, [("", header, rows)])


def difference(copies: Copies, base: Copies) -> list[str]:
    """How much an agent is above another on the episodes that both played, with its interval; and their number."""
    tables = score_tables(copies, base)
    if not tables:
        return ["no episode in common", "0"]
    mean = np.mean([np.nanmean(mine) - np.nanmean(other) for mine, other in tables])
    low, high = interval(copies, base)
    return [f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", str(sum(mine.shape[1] for mine, _ in tables))]


def sizes(agents: dict[str, Copies]) -> Section | None:
    """Score by parameters; None if all planners are of a size, and all executors."""
    models = [first(copies)["parameters"] for copies in agents.values()]
    known = [[model[role] for model in models if role in model] for role in ("planner", "executor")]
    if not any(of_role and max(of_role) > 1.1 * min(of_role) for of_role in known):
        return None

    def draw(axes):
        from matplotlib.ticker import EngFormatter

        for i, (name, copies) in enumerate(agents.items()):
            s, size = summary(copies), sum(first(copies)["parameters"].values())
            axes.plot([size, size], [s["low"], s["high"]], color=color(i), linewidth=2)
            axes.plot(size, s["score"], "o", color=color(i), label=name)
        axes.set(xscale="log", ylim=(0, 101), xlabel="parameters, planner and executor together", ylabel="score")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter("")
        legend(axes, agents)

    return Section("Score by size", [], plots=[plot("Score by parameters, with 95% interval", 3.2, draw)])


def seen_unseen(agents: dict[str, Copies]) -> Section | None:
    """Tasks whose other variations were trained on against new ones; None if all are of one kind."""
    if len({episode["seen"] for copies in agents.values() for copy in copies for episode in copy}) == 1:
        return None
    rows = []
    for name, copies in agents.items():
        cells = []
        for seen in (True, False):
            mine = [[episode for episode in copy if episode["seen"] == seen] for copy in copies]
            mine = [copy for copy in mine if copy]
            count = len({episode["task"] for copy in mine for episode in copy})
            cells += [summary(mine)["text"] if mine else "", str(count)]
        rows.append([name, *cells])
    return Section("Seen and unseen tasks", [
        "Seen: the agent was trained on other variations of the task. Unseen: on none."],
        [("", ["agent", "seen", "tasks", "unseen", "tasks"], rows)])


def diagnosis(agents: dict[str, Copies]) -> Section:
    ends = ["solved", "wrong focus", "loop", "out of moves", "died"]
    signs = ["invalid", "repaired", "out of line", "stuck"]

    def row(label, copies):
        s, flat = summary(copies), first(copies)["subgoals"] == "none"
        shares = ["" if flat and sign in signs[2:] else f"{s[sign]:.0%}" for sign in ends + signs]
        return [label, *shares, f"{s['moves']:.1f}"]

    ids = {task: id for id, task in ID2TASK.items()}
    tables = [("", ["agent", *ends, *signs, "moves"], [row(name, copies) for name, copies in agents.items()])]
    for name, copies in agents.items():
        rows = []
        for played in tasks_of([*chain(*copies)]):
            task = played[0]["task"]
            mine = [[episode for episode in copy if episode["task"] == task] for copy in copies]
            rows.append(row(f"{ids[task]} {task}", [copy for copy in mine if copy]))
        tables.append((f"{name}, task by task", ["task", *ends, *signs, "moves"], rows))
    return Section("Diagnosis", [
        "How episodes ended, as shares of the episodes. Solved: at 100. Wrong focus: a mistake that fails the task for "
        "good. Loop: the last steps repeat one cycle, with nothing new. Died: the simulator did.",
        "What went wrong on the way, as shares of the steps. Invalid: the first choice was refused, another beam "
        "taken. Repaired: no beam was valid, the nearest valid action was taken. Out of line: the action does not "
        f"serve its sub-goal, by a rule of thumb. Stuck: more than {STUCK} actions for one sub-goal, and this one was "
        "done in the same state before (the demo's experts never need more)."], tables)


def cost(agents: dict[str, Copies]) -> Section | None:
    """What the teacher cost against agents that call an LLM while they act; None without an agent that it taught."""
    taught = {name: summary(copies) for name, copies in agents.items() if first(copies)["subgoals"] == "model"}
    if not taught:
        return None
    best = max(taught, key=lambda name: taught[name]["score"])
    moves, teacher = taught[best]["moves"], first(agents[best])["teacher"]
    tokens, dollars = teacher["prompt_tokens"] + teacher["completion_tokens"], teacher["dollars"]
    price = dollars / tokens if dollars and tokens else None
    bill = "an unknown price" if dollars is None else f"${dollars:,.2f}"
    text = [f"The teacher ({', '.join(teacher['annotators'])}) named the sub-goals of {teacher['trajectories']:,} "
            f"trajectories, once: {teacher['calls']:,} LLM calls, {tokens:,} tokens, {bill}. Since then, no LLM is "
            "called.",
            "Agents that call an LLM while they act pay for every action: here their published tokens per action "
            f"(SwiftSage project page), times the {moves:.1f} moves that an episode of {best} takes."]
    if not tokens:
        text.append("This teacher asked no LLM, so in tokens ours is ahead from the first episode.")
    elif price:
        text.append(f"Dollars at the teacher's own average price, ${1e6 * price:.2f} for a million tokens.")
    else:
        text.append("What the teacher's tokens cost in dollars is not known, so tokens alone are compared.")
    header = ["agent", "tokens an action", "tokens an episode", *["dollars an episode"] * bool(price),
              "the teacher costs less from"]
    rows = [[best, "0", "0", *["$0"] * bool(price), ""]]
    for name, count in PER_ACTION.items():
        spent = count * moves
        rows.append([f"{name} (published)", f"{count:,.2f}", f"{spent:,.0f}",
                     *[f"${spent * price:.4f}" for price in [price] if price],
                     f"episode {math.floor(tokens / spent) + 1:,}"])

    def draw(axes):
        from matplotlib.ticker import EngFormatter

        least, most = min(PER_ACTION.values()) * moves, max(PER_ACTION.values()) * moves
        far = 10 ** math.ceil(math.log10(max(1000, 10 * tokens / least)))
        episodes = np.geomspace(1, far, 50)
        for i, (name, count) in enumerate(PER_ACTION.items()):
            axes.plot(episodes, count * moves * episodes, color=color(i), label=name)
            if tokens:
                axes.plot(max(1, tokens / (count * moves)), tokens, "o", color=color(i), markersize=5, zorder=3)
        axes.plot([1, far], [tokens, tokens], color=INK, linewidth=2.5, label=best, clip_on=False)
        axes.set_xscale("log")
        floor = 10 ** math.floor(math.log10(min(tokens or least, least)))
        axes.set_yscale(*["log"] if tokens else ["symlog"], **{} if tokens else dict(linthresh=floor, linscale=0.3))
        axes.set(xlim=(1, far), ylim=(floor if tokens else 0, 2 * most * far), xlabel="episodes", ylabel="tokens spent")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(EngFormatter(sep=""))
        if price:
            right = axes.secondary_yaxis("right", functions=(lambda t: t * price, lambda d: d / price))
            right.yaxis.set_major_formatter("${x:,g}")
        legend(axes, [best, *PER_ACTION])

    caption = "Tokens spent by number of episodes" + ("; dots: where the teacher is paid off" if tokens else "")
    return Section("Cost", text, [("", header, rows)], [plot(caption, 3.4, draw)])


def legend(axes, names):
    columns = max(1, 60 // (6 + max(map(len, names))))
    axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def plot(caption: str, height: float, draw) -> Markup:
    """A plot as SVG that takes its colours from the page it stands in. draw(axes) fills it; `height` in inches.

    The same data gives the same text, byte for byte.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": caption, "text.parse_math": False, "font.size": 9,
             "axes.spines.top": False, "axes.spines.right": False}
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({**style, **inks}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that matplotlib's font lacks; browsers know it
        figure = Figure(figsize=(5.4, height), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        nameless = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nameless)
    svg = file.getvalue()[file.getvalue().index("<svg"):].replace(INK, "currentColor")
    for i, (light, _) in enumerate(SERIES):
        svg = svg.replace(light, f"var(--s{i})")
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", re.sub(r'<g id="[^"]*"', "<g", svg), count=2)
    return Markup('<figure>{}<figcaption>{}</figcaption></figure>').format(
        Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(caption), 1)), caption)


def safe(text: str) -> str:
    """A text as Markdown that shows it as it is: names of agents are anyone's."""
    return re.sub(r"([\\`*\[\]|<>])", r"\\\1", " ".join(text.split()))


def markdown(sections: list[Section]) -> str:
    """The sections in GitHub's Markdown, without plots."""
    lines = []
    for section in sections:
        if not section.tables:
            continue
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [safe(paragraph), ""]
        for caption, header, rows in section.tables:
            lines += [f"### {safe(caption)}", ""] * bool(caption)
            for row in [header, ["---"] * len(header), *rows]:
                lines.append(f"| {' | '.join(map(safe, row))} |")
            lines.append("")
    return "\n".join(lines)


def replays(agents: dict[str, Copies]) -> dict:
    """What the page's replay needs: all functions of sub-goals, the commonest first, and each copy's episodes, packed.

    An episode is gzip in base64, so that a page of hundreds stays small; the browser unpacks the one it shows.
    """
    functions, copied = Counter(), []
    for name, copies in agents.items():
        for n, copy in enumerate(copies, 1):
            episodes = []
            for episode in chain(*(sorted(played, key=lambda e: e["variation"]) for played in tasks_of(copy))):
                functions.update(step["subgoal"].partition("(")[0] for step in episode["steps"] if step["subgoal"])
                shown = {key: episode[key] for key in ("description", "steps", "diagnosis")}
                packed = base64.b64encode(gzip.compress(json.dumps(shown).encode(), mtime=0)).decode()
                episodes.append({"task": episode["task"], "variation": episode["variation"], "score": episode["score"],
                                 "outcome": episode["diagnosis"]["outcome"], "packed": packed})
            copied.append({"name": name + (f" (copy {n})" if len(copies) > 1 else ""), "episodes": episodes})
    return {"functions": [function for function, _ in functions.most_common()], "agents": copied}


def write_report(files: list[str], target: Path | None) -> str:
    """Write target.md and target.html about files of played episodes; returns the score tables, for the terminal."""
    agents = gather(files)
    if target is None:
        return markdown([overall(agents), per_task(agents)])
    made = [make(agents) for make in (overall, per_task, ablations, over_moves, sizes, seen_unseen, diagnosis, cost)]
    sections = [section for section in made if section]
    every = [episode for copies in agents.values() for copy in copies for episode in copy]
    title = f"What the agents reached on {len({episode['task'] for episode in every})} of {len(ID2TASK)} tasks"
    about = (f"{len(every):,} episodes of ScienceWorld, split {every[0]['split']}, simplifications "
             f"{every[0]['simplifications']}.")
    data = Markup(json.dumps(replays(agents)).replace("<", "\\u003c"))  # so that nothing in it can end its element
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    link = f"[{target.name}.html](<{target.name}.html>)"
    texts = {".md": f"# {title}\n\n{safe(about)} Plots, and a replay of every episode: {link}\n\n{markdown(sections)}",
             ".html": page.render(title=title, about=about, sections=sections, data=data, series=SERIES)}
    for suffix, text in texts.items():
        try:
            target.with_name(target.name + suffix).write_text(text)
        except OSError as error:
            fail(f"{target}{suffix} cannot be written ({error.strerror}). Name another --report.")
    return markdown(sections[:2])


def report_target(args: argparse.Namespace) -> Path | None:
    """Where the report goes, without a suffix, if it is asked for; ends the program if there is no place for it."""
    if not (args.report or args.report_only):
        return None
    target = Path(re.sub(r"\.(md|html)$", "", args.report or "report"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{target.parent} is no folder for a report ({error.strerror}). Name another --report.")
    return target


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --page: light-dark(#fff, #15171b); --panel: light-dark(#f4f5f7, #1f2228); --line: light-dark(#d5d9df, #3b4048);
  --ink: light-dark(#1b1d21, #e6e8ec); --soft: light-dark(#545a64, #a9b0bb); --wrong: light-dark(#b3261e, #ff8f85);
  {% for light, dark in series %}
  --s{{ loop.index0 }}: light-dark({{ light }}, {{ dark }});
  {% endfor %}
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; background: var(--page); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.25rem; margin: 2.5rem 0 0 } p { max-width: 48rem }
a { color: var(--s0) } nav a { margin-right: 1rem }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px } #replay:focus { outline: none }
.intro { display: flex; flex-wrap: wrap; gap: 0 2rem } .intro > * { flex: 1 1 20rem; min-width: 0; max-width: 46rem }
.intro figure { margin: 0 0 1rem; flex: 2 1 34rem } figcaption { color: var(--soft); font-size: .875rem }
figure svg { width: 100%; height: auto } figure text { font-family: system-ui, sans-serif !important }
.wide { overflow-x: auto; margin: 1rem 0 } summary { cursor: pointer }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
td { white-space: nowrap } th:first-child { text-align: left; min-width: 8rem }
thead th { color: var(--soft); font-weight: normal } tbody th { font-weight: 600 }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin: 1rem 0 }
.controls label { display: grid; grid-template-columns: minmax(0, auto); font-size: .875rem; color: var(--soft) }
select, button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
                 border-radius: .3rem; padding: .3rem .6rem; max-width: 100% }
button { cursor: pointer }
.lane { display: grid; grid-template-columns: 7.5rem 1fr; align-items: center; margin: 2px 0 }
.lane > span { font-size: .8rem; color: var(--soft) }
.strip { position: relative; display: grid; min-height: 1rem;
         grid-template-columns: repeat(var(--steps), minmax(0, 1fr)) }
.strip::after { content: ""; position: absolute; inset: -1px auto -1px calc(100% * var(--step) / var(--steps));
                width: calc(100% / var(--steps)); border: 2px solid; pointer-events: none } /* the step that is shown */
.strip > * { min-width: 0; padding: 0; border: 0; border-right: 1px solid var(--page); border-radius: 0;
             overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-size: .8rem; line-height: 1.6rem }
.strip .tick { line-height: 1.1rem; font-size: .65rem }
.strip .mark { background: var(--wrong); color: var(--page); line-height: 1rem }
.strip svg { height: 3rem; width: 100%; overflow: visible; background: var(--panel) }
.strip path { fill: none; stroke: var(--s0); stroke-width: 2px; vector-effect: non-scaling-stroke }
.goal { background: light-dark(hsl(var(--hue) 65% 84%), hsl(var(--hue) 40% 27%)) }
.stage { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: 1rem; margin-top: 1rem }
#actions { position: relative; margin: 0; padding: 0; list-style: none; height: 34rem; overflow-y: auto }
#actions button { display: block; width: 100%; text-align: left; background: none; border: 0; border-radius: 0;
                  border-left: .5rem solid transparent; padding: .1rem .5rem; font-size: .875rem }
#actions [aria-current] { background: var(--panel); font-weight: 600 }
#actions .wrong::after { content: " ✕"; color: var(--wrong) }
#actions .goal { padding: .1rem .5rem; font-size: .875rem }
dl { margin: 0 } dt { color: var(--soft); font-size: .8rem }
dd { margin: 0 0 .6rem; white-space: pre-wrap; tab-size: 2 }
#action { font-size: 1.25rem; font-weight: 600 } #goal span { padding: .1rem .5rem; border-radius: .3rem }
#wrong { color: var(--wrong); font-weight: 600 }
.state { font-size: .875rem; background: var(--panel); padding: .75rem }
@media (max-width: 45rem) { .stage, .lane { grid-template-columns: minmax(0, 1fr) } #actions { height: 12rem } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
<nav>
{% for section in sections %}
<a href="#{{ section.title | replace(' ', '-') }}">{{ section.title }}</a>
{% endfor %}
<a href="#replay">Replay</a>
</nav>
<main>
{% for section in sections %}
<section id="{{ section.title | replace(' ', '-') }}">
<h2>{{ section.title }}</h2>
<div class="intro">
{% if section.text %}<div>{% for paragraph in section.text %}<p>{{ paragraph }}</p>{% endfor %}</div>{% endif %}
{{ section.plots | join }}
</div>
{% for caption, header, rows in section.tables %}
{% if caption %}<details><summary>{{ caption }}</summary>{% endif %}
<div class="wide" tabindex="0" role="region" aria-label="{{ caption or section.title }}"><table>
<thead><tr>{% for cell in header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if caption %}</details>{% endif %}
{% endfor %}
</section>
{% endfor %}
<section id="replay" tabindex="-1">
<h2>Replay</h2>
<p>Pick an episode and step through it: ← and → go back and on, Home and End to its ends; a click on the bands jumps.
The page's address names the step, to be sent or kept.</p>
<div class="controls">
<label>Agent <select id="agent"></select></label>
<label>Task <select id="task"></select></label>
<label>Variation <select id="variation"></select></label>
</div>
<p id="description"></p>
<p><strong id="outcome"></strong></p>
<div id="lanes"></div>
<div class="controls">
<button data-go="first">« first</button> <button data-go="back">‹ back</button>
<button data-go="on">on ›</button> <button data-go="last">last »</button>
<span id="place"></span>
</div>
<div class="stage">
<ol id="actions" aria-label="Actions"></ol>
<div>
<dl aria-live="polite">
<dt>Sub-goal</dt><dd id="goal"></dd>
<dt>Action</dt><dd id="action"></dd>
<dt>Observation</dt><dd id="observation"></dd>
<dt>Went wrong</dt><dd id="wrong"></dd>
</dl>
<dl class="state"><dt>State in which it was chosen</dt><dd id="look"></dd><dd id="inventory"></dd></dl>
</div>
</div>
</section>
</main>
<script type="application/json" id="data">{{ data }}</script>
<script>
"use strict";
// Text from an episode only ever becomes text: textContent, and strings given to append().
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const WRONG = {
  "invalid": "the first choice was refused: this is another beam",
  "repaired": "no choice was valid: this is the valid action nearest to the first one",
  "out of line": "the action does not serve its sub-goal",
  "stuck": "stuck: nothing new under this sub-goal",
};
let entry, episode, step = 0;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function paint(element, subgoal) {  // a function has one colour in all episodes
  if (subgoal === null) return element;
  element.classList.add("goal");
  element.style.setProperty("--hue", (data.functions.indexOf(subgoal.split("(")[0]) * 137.5) % 360);
  return element;
}

function fill(select, values, labels, value) {
  select.replaceChildren(...values.map((value, i) => make("option", { value }, labels[i])));
  select.value = value;
}

async function open(wanted, linked = true) {
  const agent = data.agents.find(agent => agent.name === wanted.agent) || data.agents[0];
  const tasks = [...new Set(agent.episodes.map(episode => episode.task))];
  const task = tasks.includes(wanted.task) ? wanted.task : tasks[0];
  const ours = agent.episodes.filter(episode => episode.task === task);
  const picked = entry = ours.find(episode => String(episode.variation) === wanted.variation) || ours[0];
  const names = data.agents.map(agent => agent.name);
  fill(at("agent"), names, names, agent.name);
  fill(at("task"), tasks, tasks, task);
  fill(at("variation"), ours.map(episode => episode.variation),
       ours.map(episode => `${episode.variation}, score ${episode.score}`), picked.variation);
  const bytes = Uint8Array.from(atob(picked.packed), letter => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const found = await new Response(unpacked).json();
  if (picked !== entry) return;  // another one was picked meanwhile
  episode = found;
  draw();
  go((Number(wanted.step) || 1) - 1, linked);
}

function runs(items) {  // [[first, end], …] of equal neighbours
  const starts = items.map((_, i) => i).filter(i => i === 0 || items[i] !== items[i - 1]);
  return starts.map((start, i) => [start, starts[i + 1] ?? items.length]);
}

function jump(first, end, text, label, className = "") {  // a button over the steps first … end - 1
  const title = `${label}, step ${first + 1}`;
  const button = make("button", { className, title, ariaLabel: title, tabIndex: -1, onclick: () => go(first) }, text);
  button.style.gridColumn = `${first + 1} / ${end + 1}`;
  return button;
}

function lane(name, ...cells) {
  const strip = make("div", { className: "strip" }, ...cells);
  at("lanes").append(make("div", { className: "lane" }, make("span", {}, name), strip));
}

function draw() {
  const { steps, diagnosis } = episode;
  const goals = steps.map(step => step.subgoal), bands = runs(goals);
  const named = goal => goal ?? "no sub-goals";
  at("description").textContent = episode.description;
  at("outcome").textContent = `Score ${entry.score}: ${entry.outcome}.`;
  at("lanes").replaceChildren();
  at("lanes").style.setProperty("--steps", steps.length);
  lane("sub-goals", ...bands.map(([first, end]) =>
    paint(jump(first, end, named(goals[first]), named(goals[first])), goals[first])));
  lane("actions", ...steps.map((step, i) =>
    paint(jump(i, i + 1, steps.length > 40 ? "" : i + 1, step.action, "tick"), step.subgoal)));
  for (const kind in WRONG) {
    const flags = steps.map((_, i) => diagnosis[kind].includes(i));
    const marks = runs(flags).filter(([first]) => flags[first]);
    if (marks.length) lane(`${kind} (${diagnosis[kind].length})`,
                           ...marks.map(([first, end]) => jump(first, end, "", kind, "mark")));
  }
  const broke = diagnosis.broke;
  if (broke !== null) lane("broke here", jump(broke, broke + 1, "✕", "broke here", "mark"));
  const [line, path] = ["svg", "path"].map(tag => document.createElementNS("http://www.w3.org/2000/svg", tag));
  const heights = steps.map((step, i) => `H${i}V${100 - Math.max(0, step.score)}`);
  path.setAttribute("d", `M0 100${heights.join("")}H${steps.length}`);
  line.setAttribute("viewBox", `0 0 ${steps.length} 100`);
  line.setAttribute("preserveAspectRatio", "none");
  line.style.gridColumn = "1 / -1";
  line.append(path);
  lane("score, 0 to 100", line);
  const entries = bands.flatMap(([first, end]) => [
    paint(make("div", {}, named(goals[first])), goals[first]),
    ...steps.slice(first, end).map((step, n) => make("button", {
      className: wrongs(first + n).length ? "wrong" : "", onclick: () => go(first + n),
    }, `${first + n + 1} ${step.action}`))]);
  at("actions").replaceChildren(...entries.map(entry => make("li", {}, entry)));
}

function wrongs(i) {  // in words, what went wrong at a step
  const found = Object.keys(WRONG).filter(kind => episode.diagnosis[kind].includes(i)).map(kind => WRONG[kind]);
  return i === episode.diagnosis.broke ? [...found, `here the episode broke: ${entry.outcome}`] : found;
}

function go(to, linked = true) {  // linked: the page's address shall name this step
  const { steps } = episode;
  step = Math.max(0, Math.min(steps.length - 1, to));
  const now = steps[step], gain = now.score - (step ? steps[step - 1].score : 0);
  const gained = gain ? ` (${gain > 0 ? "+" : ""}${gain})` : "";
  at("place").textContent = `Step ${step + 1} of ${steps.length}, score ${now.score}${gained}`;
  at("goal").replaceChildren(paint(make("span", {}, now.subgoal ?? "none: this agent has none"), now.subgoal));
  for (const name of ["action", "observation", "look", "inventory"]) at(name).textContent = now[name].trim();
  at("wrong").textContent = wrongs(step).join("\n") || "–";
  at("lanes").style.setProperty("--step", step);
  const list = at("actions");
  list.querySelectorAll("button").forEach((button, i) => {
    button.tabIndex = i === step ? 0 : -1;
    button.toggleAttribute("aria-current", i === step);
    if (i === step) list.scrollTop = button.offsetTop - list.clientHeight / 2;
  });
  if (!linked) return;
  const place = { agent: at("agent").value, task: entry.task, variation: entry.variation, step: step + 1 };
  history.replaceState(null, "", "#" + new URLSearchParams(place));
}

const GO = { first: () => 0, back: () => step - 1, on: () => step + 1, last: () => Infinity };
const KEYS = { ArrowLeft: "back", ArrowRight: "on", Home: "first", End: "last" };
document.addEventListener("keydown", event => {
  const inside = at("replay").contains(document.activeElement);
  if (!KEYS[event.key] || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (!event.key.startsWith("Arrow") && (!inside || event.target.tagName === "SELECT")) return;
  event.preventDefault();
  go(GO[KEYS[event.key]]());
});
document.querySelectorAll("[data-go]").forEach(button => { button.onclick = () => go(GO[button.dataset.go]()); });
for (const id of ["agent", "task", "variation"]) at(id).onchange = () => open({
  agent: at("agent").value, task: at("task").value, variation: at("variation").value });

function openHash() {
  const wanted = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (!("agent" in wanted)) return false;
  at("replay").focus();
  at("replay").scrollIntoView();
  open(wanted);
  return true;
}
addEventListener("hashchange", openHash);
if (!openHash()) open({}, false);
</script>
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="all", help="names, ids such as 1-1, topics such as 4, or all; with commas")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose variations (default: test)")
    parser.add_argument("--variations", type=positive, default=10, metavar="N",
                        help="the first N of each task (default: 10)")
    parser.add_argument("--subgoals", choices=AGENTS, default="model", help="model: the planner's; none: for an "
                        "executor trained with --flat; random: any of --data, drawn every 10 steps; semi-random: the "
                        "planner's function with another object or room of --data; oracle: those of --data's expert "
                        "for the very variation played, an upper bound (default: model)")
    parser.add_argument("--subgoal-model", help="the planner's folder (stage 2)")
    parser.add_argument("--action-model", help="the executor's folder (stage 3)")
    parser.add_argument("--data", help="annotated episodes that sub-goals are taken from")
    parser.add_argument("--name", help="the agent's row in the report (default: from --subgoals)")
    parser.add_argument("--beams", type=positive, default=5, metavar="N", help="width of the beam search (default: 5)")
    parser.add_argument("--engine", choices=("auto", *ENGINES), default="auto", help="what runs the models (default: "
                        "auto, which is transformers where there is a GPU, and ctranslate2 on a CPU)")
    parser.add_argument("--output", help="the JSONL file to write; an unfinished one is gone on with")
    parser.add_argument("--workers", type=positive, default=cores(), metavar="N",
                        help="simulator processes, up to 1 GB each (default: one a core)")
    parser.add_argument("--live", type=positive, default=20, metavar="N",
                        help="episodes at a time in each of them (default: 20)")
    parser.add_argument("--timeout", type=positive, default=60, metavar="SECONDS",
                        help="a simulator that takes longer for a move is replaced (default: 60)")
    parser.add_argument("--watch", type=seconds, nargs="?", const=1.0, metavar="SECONDS",
                        help="play in the terminal, one move at a time, with a pause after each (default: 1); writes "
                        "nothing")
    parser.add_argument("--report", metavar="PATH", help="the report's name: `report` or `report.md` writes report.md "
                        "and report.html (default: with --report-only report, else the tables are only printed)")
    parser.add_argument("--report-only", nargs="+", metavar="FILE",
                        help="play nothing, report on these played episodes: one or more agents, or copies of one")
    return parser.parse_args()


def check(args: argparse.Namespace) -> dict[str, dict]:
    """What student.json says of {"executor": …, "planner": …}; ends the program for flags that do not go together."""
    for flag in ["output"] * (args.watch is None) + NEEDS[args.subgoals]:
        if not getattr(args, flag):
            fail(f"--{flag.replace('_', '-')} is needed with --subgoals {args.subgoals}.")
    students = {"executor": check_student(args.action_model, "action")}
    flat = students["executor"].get("flat", False)
    if flat != (args.subgoals == "none"):
        fail(f"{args.action_model} was trained {'with' if flat else 'without'} --flat: it acts with --subgoals "
             f"{'none' if flat else 'model, random, semi-random or oracle'}.")
    if "subgoal_model" in NEEDS[args.subgoals]:
        students["planner"] = check_student(args.subgoal_model, "subgoal")
    return students


def identity(args: argparse.Namespace) -> str:
    """A hash of all that decides how the agent plays: weights, templates, engine, beams, what random draws from."""
    digest = hashlib.sha256(f"{args.beams} {args.engine}".encode())
    for needed in NEEDS[args.subgoals]:
        path = Path(getattr(args, needed))
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and file.name != "training_args.bin":
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def gathered(output: str, **shared) -> EpisodeFile:
    """The output file, with what the ranks of this or an earlier run have left beside it in files of their own."""
    file = EpisodeFile(output, **shared)
    for part in sorted(file.path.parent.glob(glob.escape(beside(output, "").name) + ".rank*.jsonl")):
        for episode in EpisodeFile(part, **shared).episodes:
            if (episode["task"], episode["variation"]) not in file.done:
                file.append(episode)
        part.unlink()
    return file


def make_agent(args: argparse.Namespace) -> Agent:
    known = read_episodes(args.data) if "data" in NEEDS[args.subgoals] else []
    planner = Student(args.subgoal_model, "subgoal", args.engine) if "subgoal_model" in NEEDS[args.subgoals] else None
    return Agent(Student(args.action_model, "action", args.engine), planner, args.subgoals, known, args.beams)


def run(args: argparse.Namespace) -> bool:
    """Play what --output lacks, each rank of torchrun its share; returns whether this is the one that reports."""
    import torch
    from accelerate import PartialState

    # the others may have long to wait for the last
    ranks = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    if args.engine == "auto":
        args.engine = "transformers" if ranks.device.type == "cuda" else "ctranslate2"
    students = check(args)
    tasks = resolve_tasks(args.tasks)
    shared = dict(split=args.split, simplifications=SIMPLIFICATIONS, agent=args.name or AGENTS[args.subgoals],
                  subgoals=args.subgoals, models=identity(args))
    trained = set.intersection(*(set(about["tasks"]) for about in students.values()))
    made = dict(parameters={role: about["parameters"] for role, about in students.items()},
                teacher=students.get("planner", students["executor"])["teacher"])
    with worker_pool(1) as lister:
        parts = lister.map(partial(split_variations, args.split, args.variations), tasks)
        wanted = list(filter(None, chain.from_iterable(zip_longest(*parts))))  # tasks mixed, for fair shares
    if args.watch is not None:
        return watch(args, wanted)
    agent = make_agent(args)
    if args.subgoals == "oracle" and (missing := [pair for pair in wanted if pair not in agent.experts]):
        fail(f"{args.data} lacks {len(missing)} of the {len(wanted)} variations to play, such as "
             f"{' '.join(map(str, missing[0]))}. Make it with annotate.py --split {args.split}.")
    if ranks.is_main_process:
        gathered(args.output, **shared)
    ranks.wait_for_everyone()
    output = EpisodeFile(args.output, **shared)
    with ranks.split_between_processes([pair for pair in wanted if pair not in output.done]) as todo:
        if ranks.num_processes > 1:
            output = EpisodeFile(beside(args.output, f".rank{ranks.process_index}.jsonl"), **shared)
        if todo:
            play_all(args, agent, todo, output, trained, {**made, **shared})
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        gathered(args.output, **shared)
    return ranks.is_main_process


def play_all(args: argparse.Namespace, agent: Agent, todo: list, output: EpisodeFile, trained: set, about: dict):
    """Play episodes and append each to the output as it ends."""
    print(f"{about['agent']}: {len(todo)} episodes of {len({task for task, _ in todo})} tasks", file=sys.stderr)
    if args.engine == "transformers" and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, cores() // 2))  # the simulators need the others
    scores, moves, started = [], 0, time.time()
    progress = tqdm(total=len(todo), desc="episodes", unit="", dynamic_ncols=True)
    try:
        for live, reason in play(agent, todo, min(args.workers, len(todo)), args.live, args.timeout):
            scores.append(0 if reason == "died" else max(0, live.score))
            moves += len(live.steps)
            output.append(Played(
                task=live.task, variation=live.variation, description=live.description, steps=live.steps,
                score=scores[-1], stop=reason, invalid=live.invalid, repaired=live.repaired, seen=live.task in trained,
                seconds=round(time.time() - live.started, 1), **about))
            progress.set_postfix(mean=f"{np.mean(scores):.1f}")
            progress.update()
    except KeyboardInterrupt:
        stop(f"stopped with {len(output.done)} episodes in {output.path}. The same command goes on from there.", 130)
    except BrokenProcessPool:
        stop("no simulator can be started; is there 1 GB of memory for each of --workers? The same command goes on.", 1)
    finally:
        progress.close()
    seconds = time.time() - started
    planner, executor, waiting = (agent.seconds[part] / seconds for part in ("planner", "executor", "waiting"))
    busy = agent.seconds["simulators"] / seconds / min(args.workers, len(todo))
    print(f"{60 * len(todo) / seconds:.1f} episodes and {60 * moves / seconds:.0f} moves a minute. Time: planner "
          f"{planner:.0%}, executor {executor:.0%}, waiting for simulators {waiting:.0%}; simulators busy: {busy:.0%}.",
          file=sys.stderr)


def watch(args: argparse.Namespace, wanted: list[tuple[str, int]]) -> bool:
    """Play one episode after the other in the terminal, for a lecture."""
    def show(episode: Live):
        if len(episode.steps) == 1:
            print(f"\n{episode.task}, variation {episode.variation}\n{episode.description}\n")
        *_, before, step = {"subgoal": None, "score": 0}, *episode.steps
        if step["subgoal"] != before["subgoal"]:
            print(f"  ── {step['subgoal']}")
        gain = step["score"] - before["score"]
        print(f"{len(episode.steps):>3}  {step['action']}{f'  ({gain:+} points)' if gain else ''}")
        print(f"     {' '.join(step['observation'].split())}", flush=True)
        time.sleep(args.watch)

    try:
        for episode, reason in play(make_agent(args), wanted, 1, 1, args.timeout, show):
            print(f"\n{REASONS[reason]} after {len(episode.steps)} moves: {max(0, episode.score)} points", flush=True)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        print()
    return False


def seconds(text: str) -> float:
    """A command-line value: a number of seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def main():
    args = parse_args()
    target = report_target(args)
    if not args.report_only and not run(args):
        return
    print(write_report(args.report_only or [args.output], target))
    if target:
        print(f"{target}.md and {target}.html hold the whole report.", file=sys.stderr)
    else:
        print(f"The whole report: python evaluate.py --report-only {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
