"""How many examples does a student need? Exact match on dev by the number of trajectories, for several models.

    GEMMA="gemma-3-270m --template prompts/action_compact.jinja --num_train_epochs 3 --warmup_steps 10 --eval_steps 0.5
        --save_steps 0.5 --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
    python tests/benchmark_examples.py --data runs/demo/train.jsonl runs/demo/dev.jsonl --trajectories 8 32 --dev 12 \\
        --models "whole: $GEMMA --learning_rate 5e-5" "LoRA: $GEMMA --learning_rate 5e-4 --lora 16" \\
        "from scratch: tiny --max_steps 2000"

Trains an executor of each model, by its flags, on the first N trajectories, which are taken in turn from all tasks; 0
asks the model as it is. Prints a table and, for Markdown, a plot; what is finished is not trained again.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from annotate import Episode, read_episodes  # noqa: E402


def in_turn(episodes: list[Episode]) -> list[Episode]:
    """The episodes in an order that takes the next of each task in turn, those of a task in a random order."""
    tasks = defaultdict(list)
    for episode in random.Random(0).sample(episodes, len(episodes)):
        tasks[episode["task"]].append(episode)
    return [episode for episode in chain(*zip_longest(*tasks.values())) if episode]


def student(model: str, count: int, train: list[Episode], dev: list[Episode], output: Path) -> dict:
    """What student.json says of an executor trained on some trajectories."""
    label, _, settings = model.partition(": ")
    name, *flags = settings.split()
    folder = output / f"{count} {label}"
    if not (folder / "student.json").exists():
        data = output / f"{count}.jsonl"
        with open(data, "w") as file:
            file.writelines(json.dumps(episode) + "\n" for episode in [*train[: count or 1], *dev])
        flags += [] if count else ["--max_steps", "1", "--learning_rate", "0"]
        subprocess.run([sys.executable, ROOT / "train_action.py", "--data", data, "--model", name, *flags,
                        "--output_dir", folder], check=True)
    return json.loads((folder / "student.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="annotated episodes of splits train and dev")
    parser.add_argument("--models", nargs="+", required=True, help="each a label: a model and flags of its training")
    parser.add_argument("--trajectories", nargs="+", type=int, default=[0, 8, 32, 128], help="to train on")
    parser.add_argument("--dev", type=int, default=16, help="dev trajectories, taken in turn from all tasks")
    parser.add_argument("--output", type=Path, default=Path("runs/examples"), help="folder of the students")
    args = parser.parse_args()
    if any(": " not in model for model in args.models):
        parser.error("--models takes labels before the models: 'from scratch: tiny --max_steps 2000'")

    args.output.mkdir(parents=True, exist_ok=True)
    episodes = [episode for path in args.data for episode in read_episodes(path)]
    train, dev = (in_turn([e for e in episodes if e["split"] == split]) for split in ("train", "dev"))
    rows = {}
    for model in args.models:
        rows[model] = [student(model, count, train, dev[: args.dev], args.output) for count in args.trajectories]
    dev_examples = next(iter(rows.values()))[0]["dev_examples"]
    print(f"Exact match on {dev_examples} dev examples (their loss), by trajectories trained on\n\n"
          f"| model | {' | '.join(map(str, args.trajectories))} |\n| --- |{' --- |' * len(args.trajectories)}")
    for model, row in rows.items():
        cells = [f"{100 * about['dev_exact_match']:.0f}% ({about['dev_loss']:.2f})" for about in row]
        print(f"| {model.partition(':')[0]} | {' | '.join(cells)} |")
    print("\n```mermaid\nxychart-beta\n    x-axis \"trajectories\"", json.dumps(list(map(str, args.trajectories))),
          "\n    y-axis \"exact match, %\" 0 --> 100")
    for row in rows.values():
        print("    line", [round(100 * about["dev_exact_match"]) for about in row])
    print("```")


if __name__ == "__main__":
    main()
