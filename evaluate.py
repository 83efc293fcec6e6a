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
    python evaluate.py --report-only hierarchical.jsonl flat.jsonl --report report.md

A run that was stopped goes on where it was when the same command is given again.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections import defaultdict, deque
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import transformers  # loads its parts, and PyTorch, only when they are used
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
    fail,
    positive,
    read_episodes,
    resolve_tasks,
    split_variations,
    stop,
    worker_pool,
)
from train_action import executor_state
from train_subgoal import ABOUT, answers, be_quiet, render, state_of

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Those that a user changes from run to run are command-line flags: see `parse_args`.

MAX_MOVES = 100  # the benchmark's limit on an episode
RANDOM_EVERY = 10  # steps that a random sub-goal stands for (as in the paper's ablation)
LOOP = 24  # steps: an episode whose last 24 repeat a cycle of at most LOOP / 4 has got stuck
REFUSED = "No known action matches that input."  # the simulator's answer to what is no action here; costs no move
AMBIGUOUS = "Ambiguous request"  # … to an action that several objects fit; we take the first, as the expert does
AGENTS = {"model": "hierarchical", "none": "flat (no sub-goals)", "random": "random sub-goals"}
PUBLISHED = [  # overall means over the 30 tasks (arXiv 2405.02749)
    ("hierarchical, FLAN-T5-large ×2 (published, 30 tasks)", 65.43),
    ("Swift-only, FLAN-T5-large (published, 30 tasks)", 48.72),
]


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
# In a simulator process: many live games, each in a slot.

GAMES = defaultdict(Game)


def start_game(slot: int, task: str, variation: int) -> tuple[str, dict]:
    """Start an episode in a slot: the task's description and the first state."""
    description = GAMES[slot].load(task, variation)
    return description, GAMES[slot].state()


@dataclass
class Move:
    """What came of one turn of one game."""

    taken: list[tuple[str, str, int]]  # (action, observation, score): one, and a second where an answer `0` was needed
    completed: bool
    state: dict  # look and inventory after it
    choice: int | None  # which of the candidates was taken: 0 the likeliest; None if none would do


def play_turn(turns: list[tuple[int, list[str]]]) -> list[Move]:
    """One move in each of the (slot, candidate actions)."""
    return [play_move(GAMES[slot], candidates) for slot, candidates in turns]


VALID = {}  # game: (its state, the valid actions there); listing them takes up to a second, and stuck agents ask often


def valid_actions(game: Game) -> list[str]:
    """The game's valid actions, listed anew when something visible has changed."""
    state = game.state()
    if VALID.get(game, (None,))[0] != state:
        VALID[game] = (state, game.valid_actions())
    return VALID[game][1]


def play_move(game: Game, candidates: list[str]) -> Move:
    """Take the first candidate that the simulator accepts, else the valid action nearest to the first one.

    Only the likeliest may be a focus: on the wrong object it fails the task for good, so it is no makeshift.
    """
    for choice, action in enumerate(candidates):
        if choice and action.startswith("focus "):
            continue
        observation, score, completed = game.step(action)
        if not observation.startswith(REFUSED):
            break
    else:
        choice = None
        harmless = [action for action in valid_actions(game) if not action.startswith("focus ")]
        action, _, _ = process.extractOne(candidates[0], harmless, scorer=fuzz.ratio)
        observation, score, completed = game.step(action)
    taken = [(action, observation, score)]
    if observation.startswith(AMBIGUOUS):
        observation, score, completed = game.step("0")
        taken.append(("0", observation, score))
    return Move(taken, completed, game.state(), choice)


# ---------------------------------------------------------------------------------------------------------------------
# The agent


class Student:
    """A trained model folder, ready to answer: weights, tokenizer, and the template that it was trained on."""

    def __init__(self, folder: str | Path, role: str):
        import torch

        be_quiet()
        self.about = check_student(folder, role)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype="auto")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answers(self, states: list[dict], beams: int, best: int = 1) -> list[list[str]]:
        """The `best` likeliest answers in every state, likeliest first."""
        texts = [render(self.about["template"], state) for state in states]
        return answers(self.model, self.tokenizer, texts, self.about, beams, best)


def check_student(folder: str | Path, role: str) -> dict:
    """What student.json says of a model folder; ends the program if it is none, or none for this role."""
    try:
        about = json.loads((Path(folder) / ABOUT).read_text())
    except (OSError, ValueError):
        fail(f"{folder} is not a finished model folder (it has no whole {ABOUT}). Train one with train_{role}.py.")
    if about["role"] != role:
        fail(f"{folder} holds a model trained by train_{about['role']}.py, this needs one of train_{role}.py.")
    return about


@dataclass
class Live:
    """An episode that is being played, in a slot of a worker."""

    task: str
    variation: int
    worker: int
    slot: int
    description: str
    state: dict
    started: float
    steps: list[Step] = field(default_factory=list)
    marks: list[tuple] = field(default_factory=list)  # a step's whole effect, to recognise a loop
    invalid: list[int] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)

    def situation(self) -> dict:
        return state_of(self.description, self.steps, **self.state)

    def take(self, subgoal: str | None, move: Move) -> str | None:
        """Note a move; returns why the episode has ended, or None."""
        if move.choice != 0:
            self.invalid.append(len(self.steps))
        if move.choice is None:
            self.repaired.append(len(self.steps))
        for action, observation, score in move.taken:
            self.steps.append(Step(**self.state, subgoal=subgoal, action=action, observation=observation, score=score))
            self.marks.append((action, observation, *move.state.values()))
        self.state = move.state
        if self.steps[-1]["score"] < 0:
            return "failed"
        if move.completed:
            return "done"
        if len(self.steps) >= MAX_MOVES:
            return "moves"
        return "loop" if is_loop(self.marks) else None


def is_loop(marks: list) -> bool:
    """Whether the last LOOP steps repeat one cycle, with nothing new in any state."""
    last = marks[-LOOP:]
    return len(last) == LOOP and any(last[period:] == last[:-period] for period in range(1, LOOP // 4 + 1))


class Agent:
    """Planner and executor. `subgoals` is model, none or random; `pool` holds what random sub-goals are drawn from."""

    def __init__(self, executor: Student, planner: Student | None, subgoals: str, pool: list[str], beams: int):
        self.executor, self.planner, self.subgoals, self.pool, self.beams = executor, planner, subgoals, pool, beams

    def choose(self, episodes: list[Live]) -> tuple[list[str | None], list[list[str]]]:
        """Sub-goals and candidate actions, likeliest first, for all live episodes at once."""
        situations = [episode.situation() for episode in episodes]
        if self.subgoals == "model":
            subgoals = [best for (best,) in self.planner.answers(situations, self.beams)]
        elif self.subgoals == "random":
            subgoals = [self.draw(episode) for episode in episodes]
        else:
            subgoals = [None] * len(episodes)
        states = [executor_state(*pair) for pair in zip(situations, subgoals, strict=True)]
        return subgoals, self.executor.answers(states, self.beams, best=self.beams)

    def draw(self, episode: Live) -> str:
        """A sub-goal of the train set, for RANDOM_EVERY steps; the same ones each time that an episode is played."""
        seed = f"{episode.task} {episode.variation} {len(episode.steps) // RANDOM_EVERY}"
        return random.Random(seed).choice(self.pool)


def play(agent: Agent, todo: list[tuple[str, int]], workers: int, live: int):
    """Play (task, variation) pairs, up to `live` at a time in each of the workers; yields (Live, why it ended).

    The live episodes form two halves that alternate: while one is in the simulators, the other is in the models.
    """
    pools = [worker_pool(1) for _ in range(workers)]
    waiting = list(reversed(todo))
    free = [(worker, slot) for slot in range(live) for worker in range(workers)]
    half = math.ceil(min(len(free), len(todo)) / 2)
    moving = deque([[], []])  # of each half: what `send` returned
    try:
        while waiting or any(moving):
            episodes = []
            for episode, subgoal, move in moving.popleft():
                if ended := episode.take(subgoal, move()):
                    free.append((episode.worker, episode.slot))
                    yield episode, ended
                else:
                    episodes.append(episode)
            starting = [(*waiting.pop(), *free.pop(0)) for _ in range(min(len(waiting), half - len(episodes)))]
            started = [(game, pools[game[2]].submit(start_game, game[3], *game[:2])) for game in starting]
            episodes += [Live(*game, *future.result(), time.time()) for game, future in started]
            moving.append(send(pools, episodes, *agent.choose(episodes)) if episodes else [])
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)


def send(pools: list, episodes: list[Live], subgoals: list, candidates: list[list[str]]) -> list[tuple]:
    """Give each simulator process the turns of its episodes; the last of a tuple waits for what came of a turn."""
    moving = []
    for worker, pool in enumerate(pools):
        mine = [i for i, episode in enumerate(episodes) if episode.worker == worker]
        turns = pool.submit(play_turn, [(episodes[i].slot, candidates[i]) for i in mine])
        for n, i in enumerate(mine):
            moving.append((episodes[i], subgoals[i], lambda turns=turns, n=n: turns.result()[n]))
    return moving


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
    parser.add_argument("--subgoals", choices=AGENTS, default="model", help="from the planner; none, for an executor "
                        "trained with --flat; or random ones of --data, drawn every 10 steps (default: model)")
    parser.add_argument("--subgoal-model", help="the planner's folder (stage 2)")
    parser.add_argument("--action-model", help="the executor's folder (stage 3)")
    parser.add_argument("--data", help="annotated episodes that random sub-goals are drawn from")
    parser.add_argument("--beams", type=positive, default=5, metavar="N", help="width of the beam search (default: 5)")
    parser.add_argument("--output", help="the JSONL file to write; an unfinished one is gone on with")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                        help="simulator processes, up to 1 GB each (default: one a core)")
    parser.add_argument("--live", type=positive, default=20, metavar="N",
                        help="episodes at a time in each of them (default: 20)")
    parser.add_argument("--report", help="a Markdown file to write the table to as well")
    parser.add_argument("--report-only", nargs="+", metavar="FILE",
                        help="play nothing, report on these played episodes")
    return parser.parse_args()


def check(args: argparse.Namespace) -> dict[str, dict]:
    """What student.json says of {"executor": …, "planner": …}; ends the program for flags that do not go together."""
    needed = {"model": ["output", "action_model", "subgoal_model"], "random": ["output", "action_model", "data"]}
    for flag in needed.get(args.subgoals, ["output", "action_model"]):
        if not getattr(args, flag):
            fail(f"--{flag.replace('_', '-')} is needed with --subgoals {args.subgoals}.")
    students = {"executor": check_student(args.action_model, "action")}
    flat = students["executor"].get("flat", False)
    if flat != (args.subgoals == "none"):
        fail(f"{args.action_model} was trained {'with' if flat else 'without'} --flat: it acts with --subgoals "
             f"{'none' if flat else 'model or random'}.")
    if args.subgoals == "model":
        students["planner"] = check_student(args.subgoal_model, "subgoal")
    return students


def identity(args: argparse.Namespace) -> str:
    """A hash of all that decides how the agent plays: weights, templates, beams."""
    digest = hashlib.sha256(str(args.beams).encode())
    for folder in filter(None, [args.action_model, args.subgoals == "model" and args.subgoal_model]):
        for path in sorted(Path(folder).iterdir()):
            if path.is_file() and path.name != "training_args.bin":
                digest.update(path.read_bytes())
    if args.subgoals == "random":
        digest.update(Path(args.data).read_bytes())
    return digest.hexdigest()[:16]


def use_half_of_the_cores():
    """Leave cores to the simulators, which work on one half of the episodes while the models work on the other."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // 2))


def run(args: argparse.Namespace):
    """Play what --output lacks."""
    students = check(args)
    tasks = resolve_tasks(args.tasks)
    known = read_episodes(args.data) if args.subgoals == "random" else []
    pool = sorted({step["subgoal"] for episode in known for step in episode["steps"]})
    shared = dict(split=args.split, simplifications=SIMPLIFICATIONS, agent=AGENTS[args.subgoals],
                  subgoals=args.subgoals, models=identity(args))
    trained = set.intersection(*(set(about["tasks"]) for about in students.values()))
    made = dict(parameters={role: about["parameters"] for role, about in students.items()},
                teacher=students.get("planner", students["executor"])["teacher"])
    output = EpisodeFile(args.output, **shared)
    with worker_pool(1) as lister:
        parts = lister.map(partial(split_variations, args.split, args.variations), tasks)
        wanted = [pair for part in parts for pair in part]
    todo = [pair for pair in wanted if pair not in output.done]
    if not todo:
        return
    print(f"{shared['agent']}: {len(todo)} episodes of {len(tasks)} tasks", file=sys.stderr)
    use_half_of_the_cores()
    planner = Student(args.subgoal_model, "subgoal") if args.subgoals == "model" else None
    agent = Agent(Student(args.action_model, "action"), planner, args.subgoals, pool, args.beams)
    scores = []
    progress = tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc="episodes", unit="", dynamic_ncols=True)
    try:
        for live, reason in play(agent, todo, min(args.workers, len(todo)), args.live):
            scores.append(max(0, live.steps[-1]["score"]))
            output.append(Played(
                task=live.task, variation=live.variation, description=live.description, steps=live.steps,
                score=scores[-1], stop=reason, invalid=live.invalid, repaired=live.repaired,
                seconds=round(time.time() - live.started, 1), seen=live.task in trained, **made, **shared))
            progress.set_postfix(mean=f"{np.mean(scores):.1f}")
            progress.update()
    except KeyboardInterrupt:
        stop(f"stopped with {len(output.done)} episodes in {args.output}. The same command goes on from there.", 130)
    except BrokenProcessPool:
        stop("a simulator died; is there 1 GB of memory for each of --workers? The same command goes on.", 1)
    finally:
        progress.close()


def main():
    args = parse_args()
    if not args.report_only:
        run(args)
    text = report(args.report_only or [args.output])
    if args.report:
        Path(args.report).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
