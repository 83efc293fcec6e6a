"""Can a student say a name that it has never been taught? Trained without all episodes of one object, tested on these.

    python tests/benchmark_names.py --data runs/demo/train.jsonl --object "metal fork" --output runs/names

Prints the exact match of planner and executor on the steps of the held-out episodes: those whose answer names the
object, and all others.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from annotate import read_episodes  # noqa: E402
from evaluate import Student  # noqa: E402
from train_action import action_examples  # noqa: E402
from train_subgoal import objects_of, subgoal_examples  # noqa: E402

ROLES = {"subgoal": subgoal_examples, "action": action_examples}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="annotated train episodes")
    parser.add_argument("--object", default="metal fork", help="held out: all episodes whose task names it")
    parser.add_argument("--output", type=Path, default=Path("runs/names"), help="folder of the two students")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags of both trainings")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    episodes = read_episodes(args.data)
    held_out = [episode for episode in episodes if args.object in episode["description"]]
    with open(args.output / "train.jsonl", "w") as file:
        file.writelines(json.dumps(episode) + "\n" for episode in episodes if episode not in held_out)
    print(f"{len(held_out)} of {len(episodes)} episodes are held out, as their task names the {args.object}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of the two trainings, which run side by side
    trainings = {role: subprocess.Popen([
        sys.executable, f"train_{role}.py", "--data", args.output / "train.jsonl", "--model", "tiny", "--output_dir",
        args.output / role, *args.flags]) for role in ROLES}
    if any([training.wait() for training in trainings.values()]):  # of all: none is left behind
        sys.exit("a training did not finish.")
    for role, examples_of in ROLES.items():
        pairs = [pair for episode in held_out for pair in examples_of(episode)]
        given = Student(args.output / role, role, "ctranslate2").answers([state for state, _ in pairs], beams=1)
        right = {True: [], False: []}
        for (_, answer), best in zip(pairs, given, strict=True):
            right[args.object in " ".join(objects_of(answer))].append(best[0] == answer)
        named, others = right[True], right[False]
        print(f"{role}: exact match {sum(named) / len(named):.3f} on {len(named)} steps that name the {args.object}, "
              f"{sum(others) / len(others):.3f} on the {len(others)} others of these episodes")


if __name__ == "__main__":
    main()
