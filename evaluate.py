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
import glob
import hashlib
import json
import math
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import transformers  # loads its parts, and PyTorch, only when they are used
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
STUCK: dict[int, tuple[dict, set, list]] = {}  # slot: a state, the actions refused in it, and the valid ones if listed


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
    STUCK.clear()
    Game.gateway.java_process.kill()
    Game.gateway = None
    return Death(f"gave no answer for {timeout:g} s" if time.time() - started >= timeout else "died")


def start_game(slot: int, task: str, variation: int, actions: list[str], timeout: float) -> tuple | Death:
    """Start an episode in a slot, and take the actions that it had come to before its simulator died.

    Returns the task's description, the state (look and inventory), the score, and the seconds that it took.
    """
    started = first = time.time()
    STUCK.pop(slot, None)
    game = GAMES.pop(slot, None) or Game()
    score = 0
    try:
        with awake(timeout):
            description = game.load(task, variation)
        for action in actions:
            started = time.time()
            with awake(timeout):
                _, score, _ = game.step(action)
        GAMES[slot] = game
        return description, game.state(), score, time.time() - first
    except Py4JError:
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
    state, refused, valid = STUCK.pop(slot, (None, set(), []))
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
        STUCK[slot] = (state, refused, valid)
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
            expected = self.by_transformers(sample, beams, 1)
            same = sum(a == b for a, b in zip(self.by_ctranslate2(sample, beams, 1), expected, strict=True))
            print(f"{self.folder}: converted for {self.engine}; {same} of {len(sample)} answers are those of "
                  "transformers", file=sys.stderr)
            if same < SAME * len(sample):
                stop(f"{self.engine} answers differently from transformers. Use --engine transformers.", 1)
            os.chmod(new, 0o755)
            with suppress(FileExistsError, OSError):  # another rank was first
                Path(new).rename(folder)
                Path(new).mkdir()  # for the end of `with`
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
    moving = deque([[], []])  # of each half: what `send` returned

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
                    agent.seconds["simulators"] += beginning[-1] if isinstance(beginning, tuple) else 0
                    if reason := episode.begin(beginning):
                        half.remove(episode)
                        free.append((episode.worker, episode.slot))
                        yield episode, reason
            moving.append(simulators.move(half, *agent.choose(half)) if half else [])
    finally:
        simulators.close()


# ---------------------------------------------------------------------------------------------------------------------
# The report


def interval(scores: list[list[float]], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean of the tasks' means: episodes are drawn again within each task."""
    generator = np.random.default_rng(0)
    means = np.mean([generator.choice(task, (draws, len(task))).mean(axis=1) for task in scores], axis=0)
    return tuple(np.percentile(means, [2.5, 97.5]))


def summary(played: list[Played]) -> dict:
    """What the table says of some episodes of one agent: means over tasks, each the mean over its episodes."""
    tasks = defaultdict(list)
    for episode in played:
        tasks[episode["task"]].append(episode)

    def mean(measure):
        return float(np.mean([np.mean([measure(episode) for episode in episodes]) for episodes in tasks.values()]))

    low, high = interval([[episode["score"] for episode in episodes] for episodes in tasks.values()])
    return {
        "score": mean(lambda episode: episode["score"]), "low": low, "high": high, "episodes": len(played),
        "success": mean(lambda episode: 100 * (episode["score"] == 100)),
        "steps": mean(lambda episode: len(episode["steps"])),
        "invalid": mean(lambda episode: 100 * len(episode["invalid"]) / len(episode["steps"])),
    }


def report(files: list[str]) -> str:
    """The result table in Markdown, of one or more files of played episodes: agents, then tasks."""
    agents = defaultdict(list)
    for path in files:
        for episode in read_episodes(path):
            if not Played.__required_keys__ <= episode.keys():
                fail(f"{path} holds episodes that evaluate.py did not play. Name the files that it wrote.")
            agents[episode["agent"]].append(episode)
    lines = ["| agent | score (95% interval) | solved | moves | invalid actions | episodes | LLM calls |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for agent, played in agents.items():
        s = summary(played)
        lines.append(f"| {agent} | {s['score']:.1f} ({s['low']:.1f} to {s['high']:.1f}) | {s['success']:.0f}% "
                     f"| {s['steps']:.1f} | {s['invalid']:.1f}% | {s['episodes']} | 0 |")
    lines += [f"| {name} | {score:.2f} | | | | | 0 |" for name, score in PUBLISHED]
    lines += ["", "| task | " + " | ".join(agents) + " |", "| --- |" + " --- |" * len(agents)]
    for id, task in ID2TASK.items():
        cells = []
        for played in agents.values():
            mine = [episode for episode in played if episode["task"] == task]
            s = mine and summary(mine)
            cells.append(f"{s['score']:.1f} ({s['low']:.0f} to {s['high']:.0f})" if mine else "")
        if any(cells):
            lines.append(f"| {id} {task} | " + " | ".join(cells) + " |")
    stops = {agent: ", ".join(f"{reason} {sum(e['stop'] == reason for e in played)}" for reason in
                              ("done", "failed", "loop", "moves")) for agent, played in agents.items()}
    lines += ["", *(f"- How the episodes of {agent} ended: {reasons}." for agent, reasons in stops.items())]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--report", help="a Markdown file to write the table to as well")
    parser.add_argument("--report-only", nargs="+", metavar="FILE",
                        help="play nothing, report on these played episodes")
    return parser.parse_args()


def check(args: argparse.Namespace) -> dict[str, dict]:
    """What student.json says of {"executor": …, "planner": …}; ends the program for flags that do not go together."""
    for flag in NEEDS[args.subgoals] + ["output"] * (args.watch is None):
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
    if not args.report_only and not run(args):
        return
    text = report(args.report_only or [args.output])
    if args.report:
        Path(args.report).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
