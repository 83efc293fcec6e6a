#!/usr/bin/env python3
"""Stage 3: the action generator (the executor), fine-tuned to choose the next action towards a sub-goal.

    reads   --data, the annotated episodes of stage 1, and --template, the text that the model is shown
    writes  --output_dir, a model folder: weights, tokenizer, student.json with the template and the scores on dev

    python train_action.py --data train.jsonl dev.jsonl --model tiny --output_dir action
    python train_action.py --data train.jsonl dev.jsonl --model tiny --output_dir flat --flat
    python train_action.py --data train.jsonl dev.jsonl --model google/flan-t5-large --output_dir action

With --flat it learns to act without sub-goals: standard imitation learning, the baseline. Everything else, from
building the input to training and going on after a kill, is stage 2's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from annotate import Episode
from train_subgoal import Options, fine_tune, parse_flags, trained_states


@dataclass
class ActionOptions(Options):
    flat: bool = field(default=False, metadata={"help": "learn without sub-goals: the baseline"})


def executor_state(state: dict, subgoal: str | None) -> dict:
    """The state as the executor sees it: with the sub-goal to pursue now, or for the flat baseline without any."""
    if subgoal is None:
        return {**state, "subgoal": None, "completed": [], "results": {}}
    finished = [state["subgoal"]] if state["subgoal"] not in (None, subgoal) else []
    return {**state, "subgoal": subgoal, "completed": state["completed"] + finished}


def action_examples(episode: Episode, flat: bool = False) -> Iterator[tuple[dict, str]]:
    """The executor's examples: a state with the sub-goal that its step serves, and the expert's action."""
    for state, step in trained_states(episode):
        yield executor_state(state, None if flat else step["subgoal"]), step["action"]


def main():
    paper, scratch = dict(learning_rate=1e-4, num_train_epochs=30), dict(num_train_epochs=8)
    options, training = parse_flags("action", ActionOptions, __doc__, paper, scratch)
    fine_tune("action", options, training, lambda episode: action_examples(episode, options.flat), flat=options.flat)


if __name__ == "__main__":
    main()
