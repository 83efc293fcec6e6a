#!/usr/bin/env python3
"""Stage 4: the small agent alone in the simulator, and the table of what it reached.

At every step the planner names a sub-goal and the executor an action towards it; no LLM is called. A worker is a thread
with a simulator of its own and many live episodes, whose moves are chosen in one batch; the models are shared.

    reads   two model folders, of stages 2 and 3
    writes  --output, one episode a line as it ends (stage 1's record and the fields of `Played`), and --report

    python evaluate.py --tasks 4,7-1 --split test --variations 10 \\
        --subgoal-model subgoal --action-model action --output hierarchical.jsonl
    python evaluate.py --tasks 4,7-1 --subgoals none --action-model flat --output flat.jsonl
    python evaluate.py --tasks 4-2 --subgoal-model subgoal --action-model action --watch
    python evaluate.py --report-only hierarchical.jsonl flat.jsonl --report report.md

After a stop, the same command goes on where it was.
"""

import argparse
import base64
import gzip
import json
import math
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import groupby, islice, permutations, zip_longest
from pathlib import Path
from typing import NotRequired

import jinja2
import numpy as np
import pandas as pd
import transformers  # loads its parts, and PyTorch, only when they are used
from markdown_it import MarkdownIt
from markupsafe import Markup
from rapidfuzz import fuzz, process
from tqdm import tqdm

from annotate import (
    ID2TASK, PROMPTS, SIMPLIFICATIONS, SPLITS, Episode, EpisodeFile, Game, Simulator, SimulatorDied, Step, cores,
    digest, fail, in_threads, parse_action, positive, read_episodes, resolve_tasks, room_of, split_variations
)
from train_action import executor_state
from train_subgoal import (
    ABOUT, FOCUS, LITTLE, NAME, answers, be_quiet, case_of, cased, cases_of, examples_of, has_bf16, missing,
    model_class, objects_of, question_tokens, render, state_of, topics_of, trained_states, uncased, unnamed, unshown,
    whole
)

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Those that a user changes from run to run are command-line flags: see `parse_args`.

MAX_MOVES = 100  # the benchmark's limit on an episode
RANDOM_EVERY = 10  # steps that a random sub-goal stands for (as in the paper's ablation)
LOOP = 24  # steps: an episode whose last 24 repeat a cycle of at most LOOP / 4 has got stuck
# How the simulator answers …
REFUSED = "No known action matches that input."  # what is no action here; costs no move
FOCUSED = "You focus on"  # a focus
IN_VAIN = re.compile(r"(?!.*appear).*\b(already|can't|not|no)\b.*")  # what does nothing; a broken stove is news
AMBIGUOUS = "Ambiguous request"  # an action that several objects fit; we take the first, as the expert does
TRIES = 3  # times that an episode is played whose simulator dies
SAMPLE, SAME = 32, 0.9  # inputs on which a converted model is compared, and the share of equal answers it must reach
AGENTS = {  # --subgoals: the agent's name in the report, and the flags that it cannot do without
    "model": ("hierarchical", ["action_model", "subgoal_model"]),
    "none": ("flat (no sub-goals)", ["action_model"]),
    "random": ("random sub-goals", ["action_model", "data"]),
    "semi-random": ("semi-random sub-goals", ["action_model", "subgoal_model", "data"]),
    "oracle": ("oracle sub-goals", ["action_model", "data"]),
}
PUBLISHED = [  # overall means over the 30 tasks (arXiv 2405.02749)
    ("hierarchical, FLAN-T5-large ×2 (published, 30 tasks)", 65.43),
    ("Swift-only, FLAN-T5-large (published, 30 tasks)", 48.72),
]
# How often a sub-goal, or an action, may be chosen in one and the same state before another beam goes first. Of the
# experts' actions 1% are such repetitions, and no sub-goal takes over 7 steps in one state, the PATIENT ones apart.
OFTEN = {"subgoal": 5, "action": 1}
PATIENT = re.compile("wait|examine|use|look|monitor_temperature")
PATIENCE = 16  # steps in circles after which these, too, make way: 5 of 2,421 experts go on for longer
NEEDS = re.compile("find|focus_on|pick_up|move")  # sub-goals whose object has to be at hand
SURE = 50  # percent: how likely a final choice must be; with more points to lose, as many percent as these
ITSELF = re.compile(r"(?!pour)\w+[( ](.+)(?:, | to )\1\)?")  # a thing moved into itself, heated on itself …
WHERE = re.compile(" in (?!the ).*")  # behind an object's name: in self watering flower pot 6, not in the adult stage
DOOR = re.compile(r"A door to the ([\w ]+) \(")  # in a look, with the room behind it
ENDINGS = {  # why an episode ended, in words
    "done": "Done", "moves": "At the limit of moves", "failed": "Failed for good", "loop": "Going in circles",
    "died": "The simulator died of it",
}


class Played(Episode):
    """An episode that our agent played: the record of stage 1, and how it went."""

    agent: str  # its row in the report: --name, or the one in AGENTS
    subgoals: str  # where they come from: a key of AGENTS
    models: str  # a digest of its students' weights and templates: another one is another trained copy of the agent
    parameters: dict[str, int]  # of the models: {"planner": …, "executor": …}
    seen: bool  # whether its models were trained on other variations of this task
    expert_moves: NotRequired[float | None]  # of the experts on those, on average
    teacher: dict  # who named the sub-goals that they learned from, at what cost: see `teacher_of` in stage 2
    ended: str  # a key of ENDINGS; died: the simulator, see the last observation
    invalid: list[int]  # places in `steps` where the first choice was refused
    repaired: list[int]  # … and every other beam, too: see `makeshift`
    seconds: float  # from the episode's start to its end, shared with all that were live beside it


# ---------------------------------------------------------------------------------------------------------------------
# The agent


class Agent:
    """Planner and executor. `subgoals` is a key of AGENTS; random and oracle ones are of the `known` episodes."""

    def __init__(self, executor: "Student", planner: "Student | None", subgoals: str, known: list[Episode], beams: int):
        self.executor, self.planner, self.subgoals, self.beams = executor, planner, subgoals, beams
        self.experts = {(e["task"], e["variation"]): [step for _, step in trained_states(e)] for e in known}
        self.pool = sorted({step["subgoal"] for steps in self.experts.values() for step in steps})

    def choose(self, episodes: list["Live"]) -> tuple[list[str | None], list[list[str]]]:
        """Sub-goals and candidate actions, likeliest first, of several live episodes at once."""
        situations = [state_of(episode.description, episode.done, **episode.state) for episode in episodes]
        planned = [(None, None)] * len(episodes)
        if self.planner:
            beams = self.ask(self.planner, episodes, situations)
            planned = [episode.search(best) or 2 * episode.fresh_first(best, "subgoal")[:1]
                       for episode, best in zip(episodes, beams, strict=True)]
        subgoals = [self.subgoal(episode, name) for episode, (name, _) in zip(episodes, planned, strict=True)]
        # The executor is told the sub-goal or, in a search, the way.
        told = [way if subgoal == name else subgoal for subgoal, (name, way) in zip(subgoals, planned, strict=True)]
        states = [executor_state(*pair) for pair in zip(situations, told, strict=True)]
        return subgoals, self.ask(self.executor, episodes, states)

    def ask(self, student: "Student", episodes: list["Live"], states: list[dict]) -> list[list[str]]:
        """A student's answers, best first: the greedy one alone, which is cheap, or all beams.

        All beams are asked for where an episode hesitates, or where there is an objection to the greedy answer. They
        are then ranked by objection, and within one by likelihood:

        STRANGE  no expert would say so (`Live.strange`)
        DOUBT    a final choice, a focus or one of two boxes, of which the student that decides is not SURE: a wrong one
                 fails the task for good

        If a strange focus is all that is left, the agent waits instead.
        """
        decides = student is self.planner or self.subgoals == "none"
        NONE, DOUBT, STRANGE = range(3)  # in the order in which they are ranked

        @cache
        def objection(i: int, answer: str) -> int:
            episode, topics = episodes[i], student.topics(states[i])
            if episode.strange(answer, student.about, topics):
                return STRANGE
            final = FOCUS.match(answer) or cased(answer, states[i], topics) != answer
            sure = not decides or not final or 100 * student.likelihood(states[i], answer) >= max(SURE, episode.score)
            return NONE if sure else DOUBT

        def asked(some: list[int], beams: int) -> dict[int, list[str]]:
            return dict(zip(some, student.answers([states[i] for i in some], beams, best=beams), strict=True))

        found = asked([i for i, episode in enumerate(episodes) if not episode.hesitates], 1)
        found |= asked([i for i in range(len(episodes)) if i not in found or objection(i, found[i][0])], self.beams)
        ranked = [sorted(found[i], key=partial(objection, i)) for i in range(len(episodes))]
        wait = "wait()" if student is self.planner else "wait1"
        return [[wait, *beams] if FOCUS.match(beams[0]) and objection(i, beams[0]) == STRANGE else beams
                for i, beams in enumerate(ranked)]

    def subgoal(self, episode: "Live", planned: str | None) -> str | None:
        """The sub-goal that the executor is given where the planner says `planned`: see --subgoals."""
        if self.subgoals == "oracle":
            return self.expert_subgoal(episode)
        if self.subgoals in ("model", "none"):
            return planned
        choices = self.pool
        if planned is not None:
            function = planned.partition("(")[0] + "("
            choices = [other for other in self.pool if other.startswith(function) and other != planned] or [planned]
        seed = f"{episode.task} {episode.variation} {planned} {len(episode.steps) // RANDOM_EVERY}"
        return random.Random(seed).choice(choices)  # the same each time that the episode is played

    def expert_subgoal(self, episode: "Live") -> str:
        """The sub-goal of the expert's first step that the agent has not taken yet.

        An action counts as the expert's if it is among those left of the expert's present sub-goal or of the next one;
        the steps before it then count as taken. A sub-goal that earned the expert points counts as done once the agent
        has as many.
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


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Live:
    """An episode that is being played."""

    task: str
    variation: int
    deaths: int = 0  # simulators that died of it
    started: float = field(default_factory=time.time)
    ended: str | None = None  # a key of ENDINGS

    def __post_init__(self):
        self.game, self.description, self.state = None, "", {"look": "", "inventory": ""}
        self.steps: list[Step] = []
        self.effects: list[tuple] = []  # all that each step showed, to recognise a loop
        self.invalid: list[int] = []
        self.repaired: list[int] = []
        self.sought = ""  # the find(X) whose X is looked for in other rooms: see `search`
        self.needs = ""  # the sub-goal that was planned when X was missing
        self.refused: set[str] = set()  # actions refused in the present state
        self.valid: list[str] = []  # the present state's valid actions, once listed, which is slow

    @property
    def score(self) -> int:
        return self.steps[-1]["score"] if self.steps else 0

    @property
    def done(self) -> list[Step]:
        """The steps that did something. Students are not shown others: experts have none but at open doors."""
        return [step for step in self.steps if not IN_VAIN.fullmatch(step["observation"])]

    @property
    def here(self) -> list[Step]:
        """The steps that were taken in the very state in which it is now."""
        return [step for step in self.steps if {name: step[name] for name in self.state} == self.state]

    @property
    def hesitates(self) -> bool:
        """Whether one answer is not enough: in this state something was refused, or done, or has just been found."""
        return bool(self.refused or self.here or self.sought and not self.missing(self.sought))

    def fresh_first(self, candidates: list[str], kind: str) -> list[str]:
        """Candidate actions or sub-goals, with those last that were chosen too often in this very state: see OFTEN.

        No focus goes ahead of them: there is a way back from a repetition, and none from a focus.
        """
        chosen, patient = Counter(step[kind] for step in self.here), not self.circles(PATIENCE)

        def last(name: str) -> bool:
            if FOCUS.match(name) and name != candidates[0]:
                return True
            return chosen[name] >= OFTEN[kind] and not (patient and PATIENT.match(name))

        return sorted(candidates, key=last)

    def circles(self, steps: int) -> bool:
        """Whether the last so many steps repeat one cycle of at most LOOP / 4."""
        last = self.effects[-steps:]
        return len(last) == steps and any(last[period:] == last[:-period] for period in range(1, LOOP // 4 + 1))

    def strange(self, answer: str, about: dict, topics: tuple[str, ...]) -> bool:
        """Whether no expert would say so. `about` is the student's student.json, which knows the experts.

        No expert looks for what it has, focuses on a thing twice, moves or heats a thing into or on itself (but for
        what is poured), calls a thing by words that neither state nor task shows (but for a few: `unshown`), or breaks
        the habits of its task (`habits_of`).
        """
        first, others = set(objects_of(answer)[:1]), unnamed(self.description, answer, topics)
        had = answer.startswith("find(") and any(whole(name).search(self.state["inventory"]) for name in first)
        unheard = unshown(answer, self.description, *self.state.values()) - set(about["unshown"])
        again = FOCUS.match(answer) and any(
            step["observation"].startswith(FOCUSED) and answer in (step["subgoal"], step["action"])
            for step in self.steps)
        if had or unheard or again or ITSELF.fullmatch(answer):
            return True
        habits = about["habits"].get(self.task)
        return bool(habits and (
            others & set(habits["told"]) or habits["focus"] and FOCUS.match(answer) and others & first))

    def missing(self, subgoal: str) -> list[str]:
        """The objects of a sub-goal that the task names, but neither look nor inventory shows."""
        return missing(objects_of(subgoal), self.description, "\n".join(self.state.values()))

    def search(self, planned: list[str]) -> list[str]:
        """Where the likeliest sub-goal lacks its X: find(X), and what the executor is told; else an empty list.

        The executor is told find(X) for as long as that opens something here, then the way to a room in which the agent
        has not been. All these steps count as find(X). When X has been found, the planner goes on as if it had been at
        hand: with what it was needed for, or the likeliest sub-goal about X.
        """
        if NEEDS.match(planned[0]) and (names := self.missing(planned[0])):
            find = f"find({names[0]})"
            if planned[0] != find:
                self.needs = self.needs or planned[0]
            if not self.sought and sum(step["subgoal"] == find for step in self.here) < OFTEN["subgoal"]:
                return [find, find]
            self.sought = self.sought or find
        if not self.sought:
            return []
        if not self.missing(self.sought):
            [name] = objects_of(self.sought)
            return 2 * [goal for goal in (self.needs, *planned) if goal != self.sought and name in objects_of(goal)][:1]
        looks = [self.state["look"], *(step["look"] for step in reversed(self.steps))]
        been = {room_of(look) for look in looks}
        unknown = [room for look in looks for room in DOOR.findall(look) if room not in been]
        return [self.sought, f"navigate_to({unknown[0]})"] if unknown else []

    def begin(self, game: Game):
        self.game, self.description = game, game.load(self.task, self.variation)
        self.state = game.state()

    def note(self, subgoal: str | None, action: str, observation: str, score: int):
        if not self.missing(self.sought):
            self.sought = self.needs = ""  # it has been found, and this step was taken there
        self.steps.append(Step(**self.state, subgoal=subgoal, action=action, observation=observation, score=score))


def play(agent: Agent, todo: Iterator[tuple[str, int]], live: int, simulator: Simulator,
         watch: Callable[[Live], None] = lambda episode: None) -> Iterator[Live]:
    """Play (task, variation) pairs, up to `live` at a time, and yield each episode as it ends. `watch` sees each move.

    This is one worker's loop; all share `todo` and the agent. When the simulator dies, all its live episodes begin
    again; the one that it died of, TRIES times at most.
    """
    episodes, games = [], []  # games: those that wait for another episode, as a new one takes half a second
    while True:
        episodes += [Live(*pair) for pair in islice(todo, live - len(episodes))]
        if not episodes:
            return
        try:
            for current in episodes:
                if not current.game:
                    with simulator.watched():
                        current.begin(games.pop() if games else simulator.game())
            for current, subgoal, candidates in zip(episodes, *agent.choose(episodes), strict=True):
                with simulator.watched():
                    completed = move(current, subgoal, candidates)
                if completed is None:
                    continue  # the next time, all beams are asked for
                current.ended = ending(current, completed)
                if current.ended:
                    games.append(current.game)
                watch(current)
        except SimulatorDied as death:
            current.deaths += 1
            if current.deaths == TRIES:
                current.note(None, "", f"The simulator {death}, in each of {TRIES} tries.", current.score)
                current.ended = "died"
            episodes = [episode if episode.ended else replace(episode) for episode in episodes]  # from the first move
            games = []
        yield from (episode for episode in episodes if episode.ended)
        episodes = [episode for episode in episodes if not episode.ended]


def move(episode: Live, subgoal: str | None, candidates: list[str]) -> bool | None:
    """Take the first candidate that the simulator accepts, else a makeshift; returns whether that completed the task.

    None if the greedy answer, asked for alone, was refused: no move was made, and from now on the episode hesitates.
    Only the first choice may be a focus: one on the wrong object fails the task for good.
    """
    hesitated = episode.hesitates
    ordered = episode.fresh_first(candidates, "action")
    safe = [said for said in ordered if said == candidates[0] or not said.startswith("focus ")]
    for action in (wording for said in safe for wording in wordings(said, episode.state)):
        if action in episode.refused:
            continue
        observation, score, completed = episode.game.step(action)
        if not observation.startswith(REFUSED):
            break
        episode.refused.add(action)
    else:
        if len(candidates) == 1 and not hesitated:
            return None
        episode.valid = episode.valid or episode.game.valid_actions()
        action = makeshift(candidates, episode.valid)
        observation, score, completed = episode.game.step(action)
        episode.repaired.append(len(episode.steps))
    if action != ordered[0]:
        episode.invalid.append(len(episode.steps))
    taken = [(action, observation, score)]
    if observation.startswith(AMBIGUOUS):
        observation, score, completed = episode.game.step("0")
        taken.append(("0", observation, score))
    state = episode.game.state()
    for one in taken:
        episode.note(subgoal, *one)
        episode.effects.append((*one[:2], *state.values()))
    if state != episode.state:
        episode.state, episode.refused, episode.valid = state, set(), []
    return completed


def wordings(action: str, state: dict) -> Iterator[str]:
    """An action; then, if that is refused, without where its one object is said to be; then with its words reordered.

    The object is the same, wherever it is said to be. Words are put in the order of look or inventory: what experts
    call `egg turtle` is a look's `turtle egg`, and not every egg answers to both.
    """
    yield action
    if len(names := parse_action(action)[1]) == 1:
        action = action.replace(names[0], WHERE.sub("", names[0]))
        yield action
    for name in parse_action(action)[1]:
        words = name.split()
        orders = map(" ".join, permutations(words)) if len(words) <= 4 else ()
        seen = (order for order in orders if any(whole(order).search(text) for text in state.values()))
        action = action.replace(name, next(seen, name))
    yield action


def makeshift(candidates: list[str], valid: list[str]) -> str:
    """What is done when all candidates are refused: the valid action nearest to one of them, with its verb and goal.

    The goal is the second of two objects (the box that something is moved to); a lone object may be any. So a makeshift
    never decides what the student has not: without such an action it is a look around, and it is never a focus.
    """
    parsed = [(action, *parse_action(action)) for action in valid]
    for candidate in candidates:
        verb, objects = parse_action(candidate)
        near = [action for action, other, others in parsed if verb == other != "focus on"
                and len(objects) == len(others) and (len(objects) == 1 or objects[1:] == others[1:])]
        if near:
            return process.extractOne(candidate, near, scorer=fuzz.ratio)[0]
    return "look around"


def ending(episode: Live, completed: bool) -> str | None:
    """Why an episode has ended with its last move; None if it goes on."""
    if episode.score < 0:
        return "failed"
    if completed:
        return "done"
    if len(episode.steps) >= MAX_MOVES:
        return "moves"
    return "loop" if episode.circles(LOOP) else None


# ---------------------------------------------------------------------------------------------------------------------
# The diagnosis of an episode

ENDS = ["solved", "wrong focus", "wrong move", "loop", "out of moves", "died"]
SIGNS = ["invalid", "repaired", "stuck"]
STUCK = 9  # actions: no sub-goal of the demo's 1,055 expert trajectories needs more (5,343 sub-goals; most take 1)


def diagnose(episode: Played) -> dict:
    """How an episode ended, and its failure signatures: of steps their places, 0 …

    ending    one of ENDS, or "unsolved" where the simulator ended it below 100
    invalid   the first choice was refused, another beam taken
    repaired  all beams were refused, a valid action taken instead
    stuck     after STUCK actions for one sub-goal, one more that had done the same in the same state
    broke     the place where it went wrong: the fatal move, or the first step after the last gain; None if solved
    """
    steps, stuck = episode["steps"], []
    moves = [tuple(step[name] for name in ("look", "inventory", "action", "observation")) for step in steps]
    for subgoal, (first, *others) in groupby(range(len(steps)), key=lambda i: steps[i]["subgoal"]):
        stuck += [i for i in others[STUCK - 1 :] if subgoal and moves[i] in moves[first:i]]
    last, scores = len(steps) - 1, [0, *(step["score"] for step in steps)]
    if episode["score"] == 100:
        end, broke = "solved", None
    elif scores[-1] < 0:  # a focus on the wrong thing fails a task for good, and in 2-1 so does the wrong box
        chosen = next((step["action"] for step in reversed(steps) if not step["action"].isdigit()), "")
        end, broke = "wrong focus" if chosen.startswith("focus ") else "wrong move", last
    elif episode["ended"] == "died":
        end, broke = "died", last
    else:
        end = {"loop": "loop", "moves": "out of moves"}.get(episode["ended"], "unsolved")
        gains = [i for i in range(len(steps)) if scores[i + 1] > scores[i]]
        broke = min(last, max(gains, default=-1) + 1)
    invalid = [i for i in episode["invalid"] if i not in episode["repaired"]]
    return {"ending": end, "broke": broke, "invalid": invalid, "repaired": episode["repaired"], "stuck": stuck}


# ---------------------------------------------------------------------------------------------------------------------
# The report: one table of episodes; every mean, per-task score and paired difference is a grouping of it. Its words
# are in prompts/report.jinja, the page in prompts/report.html.jinja.

TASKS = [f"{id} {task}" for id, task in ID2TASK.items()]
NOT_IN_ETO = ("2-3", "9-1", "9-2", "9-3", "10-1", "10-2")  # tasks that the test set of ETO and GLIDER lacks


def gather(files: list[str]) -> pd.DataFrame:
    """The table of episodes, a row each; ends the program for files that do not go together.

    agent, models (another one is another copy of the agent), task, variation, subgoals, seen, score, expert_moves,
    moves, planner, executor and parameters (theirs, together), ENDS, SIGNS as shares of the steps, and `episode`, the
    whole record with its diagnosis.
    """
    rows = []
    for path in files:
        for episode in read_episodes(path):
            if not Played.__required_keys__ <= episode.keys() or episode["task"] not in ID2TASK.values():
                fail(f"{path} holds episodes that evaluate.py did not play. Name the files that it wrote.")
            found, sizes = diagnose(episode), episode["parameters"]
            rows.append({
                **{name: episode[name] for name in ("agent", "models", "variation", "subgoals", "seen", "score")},
                "task": next(task for task in TASKS if task.split()[1] == episode["task"]),
                "expert_moves": episode.get("expert_moves") or math.nan, "moves": len(episode["steps"]),
                "planner": sizes.get("planner", math.nan), "executor": sizes["executor"],
                "parameters": sum(sizes.values()), "episode": episode | {"diagnosis": found}, "path": path,
                "protocol": f"{episode['split']} {episode['simplifications']}",
                **{end: found["ending"] == end for end in ENDS},
                **{sign: len(found[sign]) / len(episode["steps"]) for sign in SIGNS}})
    episodes = pd.DataFrame(rows)
    key = ["agent", "models", "task", "variation"]
    if len(twice := episodes[episodes.duplicated(key)]):
        fail("{path} holds {task}, variation {variation}, of {agent} once more. Name every episode once.".format_map(
            twice.iloc[0]))
    if episodes["protocol"].nunique() > 1:
        fail(f"the files hold episodes of different splits or simplifications: {', '.join(set(episodes['protocol']))}. "
             "Report on one of them at a time.")
    for column in ("agent", "models"):  # agents, and the copies of each, in the order in which the files have them
        episodes[column] = pd.Categorical(episodes[column], episodes[column].unique())
    episodes["task"] = pd.Categorical(episodes["task"], TASKS)
    return episodes.sort_values(key, ignore_index=True)


def averaged(figures: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Of each group: the mean over copies of the mean over tasks of the mean over episodes, of all that are numbers."""
    for keys in ([*by, "models", "task"], [*by, "models"], by):
        figures = figures.groupby(list(dict.fromkeys(keys))).mean(numeric_only=True)
    return figures


def summary(episodes: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Of each group: `averaged` figures (scores 0-100, shares 0-1), the score's interval, counts."""
    table, grouped = averaged(episodes, by), episodes.groupby(by)
    table[["low", "high"]] = [interval(group) for _, group in grouped]
    return table.assign(copies=grouped["models"].nunique(), episodes=grouped.size())


def score_tables(*agents: pd.DataFrame) -> list[list[np.ndarray]]:
    """By task, the scores of each agent: (copies, variations that all agents played), NaN where a copy lacks one."""
    scores = [agent.pivot(index=["task", "variation"], columns="models", values="score") for agent in agents]
    shared = scores[0].index.intersection(scores[-1].index).sort_values()
    tasks = shared.get_level_values("task")
    return [[each.loc[shared[tasks == task]].to_numpy(float).T for each in scores] for task in tasks.unique()]


def interval(*agents: pd.DataFrame, draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of an agent's mean over tasks of the mean score; of two, of the first one's gain.

    An agent's copies are drawn again, and within each task its variations: the same for all copies and both agents,
    as these play the same ones. Of a single copy it is therefore an interval of these weights, not of their recipe.
    """
    generator, means = np.random.default_rng(0), []
    copies = [agent["models"].nunique() for agent in agents]
    drawn = [generator.integers(count, size=(draws, count, 1)) for count in copies]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")  # a draw of copies that lack the variations drawn
        for tables in score_tables(*agents):
            variations = generator.integers(tables[0].shape[1], size=(draws, 1, tables[0].shape[1]))
            mean, *other = (np.nanmean(table[chosen, variations], axis=(1, 2))
                            for table, chosen in zip(tables, drawn, strict=True))
            means.append(mean - sum(other))
        return tuple(np.nanpercentile(np.nanmean(means, axis=0), [2.5, 97.5]))


def difference(agent: pd.DataFrame, base: pd.DataFrame) -> list[str]:
    """How much an agent is above another on the episodes that both played, with its interval; and their number."""
    tables = score_tables(agent, base)
    if not tables:
        return ["no episode in common", "0"]
    mean = np.mean([np.nanmean(mine) - np.nanmean(other) for mine, other in tables])
    low, high = interval(agent, base)
    return [f"{mean:+.1f} ({low:+.1f} to {high:+.1f})", str(sum(mine.shape[1] for mine, _ in tables))]


def scored(row, digits: int = 1) -> str:
    """The score and interval of a row of `summary`, as the tables have them."""
    return f"{row.score:.1f} ({row.low:.{digits}f} to {row.high:.{digits}f})"


def millions(parameters: float) -> str:
    return "" if pd.isna(parameters) else f"{parameters / 1e6:.1f} M"


def score_table(agents: pd.DataFrame) -> pd.DataFrame:
    """A row for each agent of a `summary`, and for each published figure."""
    score = "score (95% interval of these weights)" if agents["copies"].max() < 3 else "score (95% interval)"
    rows = [{"agent": name, score: scored(s), "copies": f"{s.copies:.0f}", "solved": f"{s.solved:.0%}",
             "moves": f"{s.moves:.1f}", "invalid actions": f"{s.invalid + s.repaired:.1%}",
             "episodes": f"{s.episodes:.0f}", "parameters": millions(s.parameters), "LLM calls": "0"}
            for name, s in agents.iterrows()]
    rows += [{"agent": name, score: f"{published:.2f}", "LLM calls": "0"} for name, published in PUBLISHED]
    return pd.DataFrame(rows).fillna("")


def by_agent(episodes: pd.DataFrame, column: str, digits: int = 1) -> pd.DataFrame:
    """A table of scores: a row for each value of a column of the table of episodes, a column for each agent."""
    cells = summary(episodes, [column, "agent"]).apply(scored, axis=1, digits=digits).unstack("agent")
    return cells.astype(object).fillna("").rename_axis(columns=None).reset_index()


def by_kind(episodes: pd.DataFrame, kinds: pd.Series) -> pd.DataFrame | None:
    """A table of scores by the kind of the task; None if all tasks are of one."""
    if kinds.nunique() < 2:
        return None
    table = by_agent(episodes.assign(kind=kinds), "kind")
    table.insert(1, "tasks", episodes.groupby(kinds)["task"].nunique().to_numpy())
    return table


def ablations(episodes: pd.DataFrame, agents: pd.DataFrame, base: str) -> pd.DataFrame:
    """A row for each agent of a `summary`: what it is made of, and how far it is above `base`."""
    played = dict(iter(episodes.groupby("agent")))
    rows = [[name, played[name]["subgoals"].iloc[0], millions(s.planner), millions(s.executor), f"{s.score:.1f}",
             *(["", ""] if name == base else difference(played[name], played[base]))] for name, s in agents.iterrows()]
    header = ["agent", "--subgoals", "planner", "executor", "score", f"minus {base} (95% interval)", "episodes"]
    return pd.DataFrame(rows, columns=header)


def over_moves(episodes: pd.DataFrame) -> dict[str, list[float]]:
    """Each agent's mean score after 0, 1, … moves: an ended episode keeps its last score, a failed one has 0."""
    scores = [[0, *(max(0, step["score"]) for step in episode["steps"])] for episode in episodes["episode"]]
    places = pd.MultiIndex.from_frame(episodes[["agent", "models", "task"]])
    held = pd.DataFrame(zip_longest(*scores, fillvalue=math.nan), columns=places).ffill().T
    return averaged(held, ["agent"]).T.to_dict("list")


def diagnosis(episodes: pd.DataFrame, by: str) -> pd.DataFrame:
    """By agent or by task: how episodes ended, and what went wrong on the way."""
    figures = averaged(episodes, [by])
    cells = figures[[*ENDS, *SIGNS]].map("{:.0%}".format).assign(moves=figures["moves"].map("{:.1f}".format))
    cells.loc[episodes.groupby(by)["subgoals"].first() == "none", "stuck"] = ""
    return cells.reset_index()


def plain(text: str) -> str:
    """A text as Markdown that shows it as it is: names of agents are anyone's."""
    return re.sub(r"([\\`*\[\]|<>&])", r"\\\1", " ".join(text.split()))


def as_markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown, its columns aligned, so that a terminal shows it, too."""
    sides = ["left", *["right"] * (table.shape[1] - 1)]
    table = table.astype(str).map(plain).rename(columns=plain)
    return table.to_markdown(index=False, disable_numparse=True, colalign=sides)


TEXTS = jinja2.Environment(loader=jinja2.FileSystemLoader(PROMPTS), autoescape=jinja2.select_autoescape(["html.jinja"]),
                           undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
TEXTS.filters |= {"plain": plain, "table": as_markdown}


def replays(episodes: pd.DataFrame) -> dict[str, list[dict]]:
    """The episodes of each copy of an agent, for the page: gzip in base64, as there are hundreds of them."""
    shown = {}
    for name, agent in episodes.groupby("agent"):
        for n, (_, copy) in enumerate(agent.groupby("models"), 1):
            played = shown[f"{name} (copy {n})" if agent["models"].nunique() > 1 else name] = []
            for row in copy.itertuples():
                text = json.dumps({key: row.episode[key] for key in ("description", "steps", "diagnosis")})
                packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
                played.append(dict(task=row.task, variation=row.variation, score=row.score, packed=packed))
    return shown


def write_report(files: list[str], target: Path | None) -> str:
    """Write target.md and target.html about files of played episodes; returns the score tables, for the terminal."""
    episodes = gather(files)
    agents, times = summary(episodes, ["agent"]), episodes.groupby(["task", "variation"]).size()
    everywhere = (episodes.groupby("agent")["task"].nunique() == len(TASKS)).all()
    others = episodes[~episodes["task"].str.startswith(tuple(f"{id} " for id in NOT_IN_ETO))]
    lengths = pd.cut(episodes["expert_moves"], [0, 20, 50, math.inf], labels=["up to 20", "20 to 50", "more than 50"])
    kinds = episodes.groupby("agent")["subgoals"].first()
    base = next((name for name, kind in kinds.items() if kind == "model"), agents.index[0])
    facts = dict(
        tasks=episodes["task"].nunique(), all_tasks=len(TASKS), copies=agents["copies"].min(), played=len(times),
        in_common=(times == agents["copies"].sum()).sum(), without=NOT_IN_ETO,
        theirs={name: scored(s) for name, s in summary(others, ["agent"]).iterrows()} if everywhere else {},
        scores=score_table(agents), scores_by_task=by_agent(episodes, "task", digits=0),
        episodes=len(episodes), one=episodes["episode"].iloc[0], base=base, kinds=kinds.nunique(), stuck=STUCK,
        teachers={str(episode["teacher"]): episode["teacher"] for episode in episodes["episode"]}.values(),
        scores_by_length=by_kind(episodes, lengths), ablations=ablations(episodes, agents, base),
        scores_by_seen=by_kind(episodes, episodes["seen"].map({True: "seen", False: "unseen"})),
        diagnosis=diagnosis(episodes, "agent"),
        diagnosis_by_task={name: diagnosis(mine, "task") for name, mine in episodes.groupby("agent")})
    printed, text = (TEXTS.get_template("report.jinja").render(facts, whole=whole) for whole in (False, True))
    if target is None:
        return printed
    page = TEXTS.get_template("report.html.jinja").render(
        report=Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(text)),
        curves=over_moves(episodes), replays=replays(episodes))
    link = f"Score over moves, and a replay of every episode: [{target.name}.html](<{target.name}.html>)\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(f"{target.name}.html").write_text(page)
        target.with_name(f"{target.name}.md").write_text(f"{text}\n{link}")
    except OSError as error:
        fail(f"{error.filename} cannot be written ({error.strerror}). Name another --report.")
    return printed


# ---------------------------------------------------------------------------------------------------------------------
# The students


class Student:
    """A trained model folder, ready to answer: weights, tokenizer, and the template that it was trained on.

    All workers share it. `engine` is transformers, the reference, or ctranslate2 where that gives the same answers, the
    default where there is no GPU. Ends the program if the folder holds no student, or one of another role.
    """

    lock = threading.RLock()  # of all students: loading, tokenizers and transformers' passes take one thread at a time

    def __init__(self, folder: str | Path, role: str, engine: str | None = None):
        import torch

        be_quiet()
        self.folder = Path(folder)
        try:
            self.about = json.loads((self.folder / ABOUT).read_text())
            trained, *_ = (self.about[name] for name in ("role", "frame", "habits", "wordings", "unshown"))
        except (OSError, ValueError, KeyError):
            fail(f"{folder} is not a finished model folder (it has no whole {ABOUT}). Train one with train_{role}.py.")
        if trained != role:
            fail(f"{folder} holds a model trained by train_{trained}.py, this needs one of train_{role}.py.")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.engine = engine or ("transformers" if self.device == "cuda" else "ctranslate2")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.translator = None
        self.known = {}  # answers by what was asked: an agent that changed nothing is not asked again

    def files(self) -> list[Path]:
        """All that makes the student: weights, tokenizer, template."""
        names = (ABOUT, "tokenizer.json", "config.json")
        return [file for file in sorted(self.folder.iterdir()) if file.suffix == ".safetensors" or file.name in names]

    def answers(self, states: list[dict], beams: int, best: int = 1) -> list[list[str]]:
        """The `best` likeliest answers in every state, likeliest first."""
        texts = [render(self.about["template"], state, self.about["wordings"]) for state in states]
        new = [text for text in dict.fromkeys(texts) if (text, beams, best) not in self.known]
        for text, given in zip(new, self.generate(new, beams, best) if new else [], strict=True):
            self.known[text, beams, best] = given
        return [[uncased(answer, state, self.topics(state)) for answer in self.known[text, beams, best]]
                for text, state in zip(texts, states, strict=True)]

    def topics(self, state: dict) -> tuple[str, ...]:
        """What the state's task is about: see `topics_of`."""
        return topics_of(state["description"], tuple(self.about["wordings"]))

    def likelihood(self, state: dict, answer: str) -> float:
        """The probability of an answer in a state, by a forward pass of transformers, whatever the engine."""
        import torch

        text = render(self.about["template"], state, self.about["wordings"]), cased(answer, state, self.topics(state))
        with self.lock, torch.inference_mode():
            [example] = examples_of(self.tokenizer, [text], self.about, not self.model.config.is_encoder_decoder)
            tokens, labels = (torch.tensor([example[name]], device=self.device) for name in ("input_ids", "labels"))
            logits = self.model(input_ids=tokens, labels=labels).logits[labels >= 0].float()
            return float(logits.log_softmax(-1).gather(1, labels[labels >= 0][:, None]).sum().exp())

    def generate(self, texts: list[str], beams: int, best: int) -> list[list[str]]:
        with self.lock:
            if self.engine == "ctranslate2" and not self.translator:
                self.convert(texts)
            if self.engine == "transformers":
                return answers(self.model, self.tokenizer, texts, self.about, beams, best)
        return self.translate(texts, beams, best)

    @cached_property
    def model(self):
        """The model for transformers, on a GPU if there is one."""
        dtype = "bfloat16" if has_bf16() else "auto"
        return model_class(self.folder).from_pretrained(self.folder, dtype=dtype).to(self.device).eval()

    def convert(self, texts: list[str]):
        """Load the folder's model for CTranslate2: converted, and compared with transformers, on first use.

        A converter's errors are silent, and some show only in long inputs, so the sample has some that are cut off.
        """
        from ctranslate2.converters import TransformersConverter

        folder = self.folder / "ctranslate2"
        if folder.exists():
            self.load_translator(folder)
            return
        texts = texts[:SAMPLE] + [" ".join(texts[i:SAMPLE] * SAMPLE) for i in range(min(4, len(texts)))]
        with tempfile.TemporaryDirectory(dir=self.folder) as new:  # moved into place when it has been checked
            try:
                TransformersConverter(str(self.folder)).convert(new, force=True)
                self.load_translator(new)
                reference = answers(self.model, self.tokenizer, texts, self.about, beams=1)
                # greedy ones: a hardly trained model's wider beams hold many answers of one likelihood
                same = np.mean([ours == theirs for ours, theirs in zip(self.translate(texts), reference, strict=True)])
                if same < SAME:
                    raise ValueError(f"{1 - same:.0%} of its greedy answers are other ones")
            except (ValueError, RuntimeError, NotImplementedError) as error:  # or an architecture that it does not know
                self.engine, self.translator = "transformers", None
                complaint = str(error).partition("\n")[0]
                print(f"{self.folder}: played by transformers, not by CTranslate2: {complaint}", file=sys.stderr)
                return
            os.chmod(new, 0o755)
            Path(new).rename(folder)
        print(f"{self.folder}: converted for CTranslate2; {same:.0%} of {len(texts)} greedy answers are those of "
              "transformers", file=sys.stderr)
        del self.model

    def load_translator(self, folder: str | Path):
        """Load CTranslate2's model in a folder, on the GPU if there is one, else a batch a core."""
        import ctranslate2

        gpu = ctranslate2.get_cuda_device_count() > 0
        decoder = "decoder_start_token" not in json.loads((Path(folder) / "config.json").read_text())
        self.translator = (ctranslate2.Generator if decoder else ctranslate2.Translator)(
            str(folder), device="cuda" if gpu else "cpu", compute_type="bfloat16" if gpu else "float32",
            inter_threads=1 if gpu else cores(), intra_threads=1)

    def translate(self, texts: list[str], beams: int = 1, best: int = 1) -> list[list[str]]:
        """CTranslate2's `best` likeliest answers to every text. Threads share its model, but not the tokenizer."""
        tokenizer, most = self.tokenizer, self.about["max_target_length"]
        with self.lock:
            tokens = [tokenizer.convert_ids_to_tokens(row) for row in question_tokens(tokenizer, texts, self.about)]
        # All but no bonus for length: with none at all, CTranslate2 stops before its longer answers are complete.
        shared = dict(
            beam_size=beams, num_hypotheses=best, length_penalty=1e-9, patience=beams, max_batch_size=32,
            end_token=self.about["frame"][2])
        if hasattr(self.translator, "generate_batch"):
            results = self.translator.generate_batch(tokens, max_length=most, include_prompt_in_result=False, **shared)
            written = [result.sequences_ids for result in results]
        else:
            results = self.translator.translate_batch(tokens, max_decoding_length=most, max_input_length=0, **shared)
            written = [list(map(tokenizer.convert_tokens_to_ids, result.hypotheses)) for result in results]
        with self.lock:
            return [[text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] for ids in written]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", default="all", help="names, ids such as 1-1, topics such as 4, or all; with commas")
    add("--split", choices=SPLITS, default="test", help="whose variations (default: test)")
    add("--variations", type=positive, default=10, metavar="N", help="of each task the first N, of train N spread "
        "over all (default: 10)")
    add("--subgoals", choices=AGENTS, default="model", help="model: the planner's; none: for an executor trained with "
        "--flat; random: any of --data, drawn every 10 steps; semi-random: the planner's function with another object "
        "or room of --data; oracle: those of --data's expert for the very variation played, an upper bound (default: "
        "model)")
    add("--subgoal-model", help="the planner's folder (stage 2)")
    add("--action-model", help="the executor's folder (stage 3)")
    add("--data", help="annotated episodes that sub-goals are taken from")
    add("--name", help="the agent's row in the report (default: from --subgoals)")
    add("--beams", type=positive, default=5, metavar="N", help="width of the beam search (default: 5)")
    add("--engine", choices=("ctranslate2", "transformers"), help="what runs the models (default: transformers where "
        "there is a GPU, ctranslate2 on a CPU)")
    add("--output", help="the JSONL file to write; an unfinished one is gone on with")
    add("--workers", type=positive, default=cores(), metavar="N", help="threads with a simulator, up to 1 GB each "
        "(default: one a core)")
    add("--live", type=positive, default=20, metavar="N", help="episodes at a time in each of them (default: 20)")
    add("--timeout", type=positive, default=60, metavar="SECONDS", help="a simulator that takes longer for a move is "
        "replaced (default: 60)")
    add("--watch", type=float, nargs="?", const=1.0, metavar="SECONDS", help="play in the terminal, one move at a "
        "time, with a pause after each (default: 1); writes nothing")
    add("--report", metavar="PATH", help="`report` or `report.md` writes report.md and report.html (default: the "
        "scores are only printed)")
    add("--report-only", nargs="+", metavar="FILE", help="play nothing, report on these played episodes: one or more "
        "agents, or copies of one")
    return parser.parse_args()


def agent_of(args: argparse.Namespace) -> Agent:
    """The agent that the flags describe; ends the program for flags that do not go together."""
    _, needs = AGENTS[args.subgoals]
    for flag in ["output"] * (args.watch is None) + needs:
        if not getattr(args, flag):
            fail(f"--{flag.replace('_', '-')} is needed with --subgoals {args.subgoals}.")
    executor = Student(args.action_model, "action", args.engine)
    flat = executor.about.get("flat", False)
    if flat != (args.subgoals == "none"):
        fail(f"{args.action_model} was trained {'with' if flat else 'without'} --flat: it acts with --subgoals "
             f"{'none' if flat else 'model, random, semi-random or oracle'}.")
    planner = Student(args.subgoal_model, "subgoal", args.engine) if "subgoal_model" in needs else None
    known = read_episodes(args.data, annotated=True) if "data" in needs else []
    return Agent(executor, planner, args.subgoals, known, args.beams)


# The code that decides how an agent plays: episodes of other code are not mixed with its own.
DECIDING = (Agent, Student.likelihood, Live, play, move, wordings, makeshift, ending, unnamed, unshown, missing,
            cased, uncased, cases_of, case_of, topics_of, OFTEN, PATIENCE, LOOP, SURE, FOCUSED,
            *(pattern.pattern for pattern in (PATIENT, FOCUS, NEEDS, ITSELF, WHERE, LITTLE, NAME, IN_VAIN)))


def run(args: argparse.Namespace):
    """Play what --output lacks, and append each episode to it as it ends; or with --watch show them all."""
    agent, simulator = agent_of(args), Simulator(args.timeout)
    try:
        wanted = split_variations(simulator, resolve_tasks(args.tasks), args.split, args.variations)
    except SimulatorDied as death:
        fail(f"the simulator cannot be started (it {death}); it needs 1 GB of memory for each of --workers.", 1)
    if args.subgoals == "oracle" and (lacking := [pair for pair in wanted if pair not in agent.experts]):
        fail(f"{args.data} lacks {len(lacking)} of the {len(wanted)} variations to play, such as "
             f"{' '.join(map(str, lacking[0]))}. Make it with annotate.py --split {args.split}.")
    if args.watch is not None:
        return watch(agent, wanted, simulator, args.watch)
    simulator.close()
    students = {"executor": agent.executor} | ({"planner": agent.planner} if agent.planner else {})
    about = dict(split=args.split, simplifications=SIMPLIFICATIONS, agent=args.name or AGENTS[args.subgoals][0],
                 subgoals=args.subgoals, models=digest(*(file for each in students.values() for file in each.files())))
    output = EpisodeFile(args.output, {
        **about, "beams": args.beams, "engine": agent.executor.engine,
        "data": digest(Path(args.data)) if agent.experts else None, "code": digest(*DECIDING)})
    executor, decider = agent.executor.about, (agent.planner or agent.executor).about
    about |= dict(parameters={role: student.about["parameters"] for role, student in students.items()},
                  teacher=decider["teacher"])
    trained = {task: moves for task, moves in executor["tasks"].items() if task in decider["tasks"]}
    todo = [pair for pair in wanted if pair not in output.done]
    if not todo:
        return
    random.Random(0).shuffle(todo)  # so that the workers have slow and quick tasks alike
    workers, scores, waiting = min(args.workers, len(todo)), [], iter(todo)
    with tqdm(total=len(todo), desc=f"{about['agent']}, episodes", unit="", dynamic_ncols=True) as progress:
        for episode in in_threads(workers, partial(play, agent, waiting, args.live), args.timeout):
            scores.append(0 if episode.ended == "died" else max(0, episode.score))
            output.append(Played(
                task=episode.task, variation=episode.variation, description=episode.description, steps=episode.steps,
                score=scores[-1], ended=episode.ended, invalid=episode.invalid, repaired=episode.repaired,
                seen=episode.task in trained, expert_moves=trained.get(episode.task),
                seconds=round(time.time() - episode.started, 1), **about))
            progress.set_postfix(mean=f"{np.mean(scores):.1f}")
            progress.update()


def watch(agent: Agent, wanted: list[tuple[str, int]], simulator: Simulator, pause: float):
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
        time.sleep(pause)

    for episode in play(agent, iter(wanted), 1, simulator, show):
        print(f"\n{ENDINGS[episode.ended]} after {len(episode.steps)} moves: {max(0, episode.score)} points")
        time.sleep(pause)


def main():
    args = parse_args()
    try:
        if not args.report_only:
            run(args)
    except KeyboardInterrupt:
        fail("stopped. The episodes that had ended are kept; the same command goes on from there.", 130)
    if args.watch is not None:
        return
    target = args.report and Path(re.sub(r"\.(md|html)$", "", args.report))
    print(write_report(args.report_only or [args.output], target))
    if target:
        print(f"{target}.md and {target}.html hold the whole report.", file=sys.stderr)


if __name__ == "__main__":
    main()
