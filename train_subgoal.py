#!/usr/bin/env python3
"""Stage 2: the sub-goal generator (the planner), fine-tuned to name the sub-goal of the next step.

    reads   --data, the annotated episodes of stage 1, and --template, the text that the model is shown
    writes  --output_dir, a model folder: weights, tokenizer, student.json with the template and the scores on dev,
            command.json with all that made it, checkpoints

    python train_subgoal.py --data train.jsonl dev.jsonl --model tiny --output_dir subgoal
    python train_subgoal.py --data train.jsonl dev.jsonl --model google/flan-t5-large --output_dir subgoal
    torchrun --nproc-per-node 8 train_subgoal.py --data train.jsonl dev.jsonl --model google/flan-t5-large
    torchrun --nproc-per-node 8 train_subgoal.py --data train.jsonl dev.jsonl --fsdp       weights shared out, too

Beside the flags below, all of Hugging Face's TrainingArguments are flags. Several processes share each batch, so the
updates are those of one process. After a stop, the same command goes on from the last checkpoint. Stage 3 trains the
action generator with the functions of this file.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import string
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import huggingface_hub
import jinja2
import numpy as np
import pandas as pd
import scienceworld
import transformers  # loads its parts, and PyTorch, only when they are used

from annotate import PROMPTS, Episode, Step, claim, digest, fail, parse_action, read_episodes, room_of

# ---------------------------------------------------------------------------------------------------------------------
# Settings. Those of a training are flags: see `Options`, and the defaults of `parse_flags`.

HISTORY = 10  # the last ten actions are shown (the paper's number)
TELLING = re.compile("examine|look at|read|use thermometer")  # actions whose point is the observation
MEASURE = re.compile(r"(-?\d+(?:\.\d)?) (degrees|ticks)")  # a reading of thermometer or stopwatch, or a task's limit
WORD = re.compile("[a-z]+")  # a word of a description in small letters: yellow-orange is two
NAME = re.compile(r"[\w-]+")  # a word of an object's name
LITTLE = re.compile("a|an|and|in|of|on|the|with")  # words that name nothing
FOCUS = re.compile("focus[_ ]on")  # final: a focus on the wrong object fails the task
# Expert steps left out of training: these actions, as in the paper, and those that the simulator answers like this.
UNTRAINED = re.compile("look around|close door .*")
ALREADY = re.compile(r"The .* is already open\.")
# T5s built from scratch, by name. A Llama of tiny's size, trained on the demo for as long, has an exact match of 78% on
# dev (tiny: 92 to 95%), and 0% where no training example has the answer (tiny: 46 to 78%).
SIZES = {
    "nano": dict(d_model=64, d_kv=32, num_heads=4, d_ff=256, num_layers=2, num_decoder_layers=2),
    "tiny": dict(d_model=128, d_kv=32, num_heads=4, d_ff=512, num_layers=2, num_decoder_layers=2),
    "small": dict(d_model=192, d_kv=32, num_heads=6, d_ff=768, num_layers=2, num_decoder_layers=2),
    "medium": dict(d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=6, num_decoder_layers=6),
}
VOCABULARY = 4096  # tokens of a tokenizer built from scratch, at most
KINDS = {  # examples by their answer (see `kind_of`), and the least share of each in what is shown of a task (`Order`)
    "last": 0.2,  # no other answer comes after it
    "named": 0.1,  # the first to name what the task is about
    "new": 0.2,  # in neither of the two steps before
    "next": 0.2,  # in one of them
    "before": 0.2,  # in both, and the next step has another
    "again": 1,  # in both: these take what is left
}
REPEATED = 40  # times that an epoch shows an example of a short task, at most: see `Order`
BATCH = 64  # answers generated at a time
ABOUT = "student.json"  # makes a folder a student's: written last, read first

# The paper's settings are the defaults. Models from scratch have their own, chosen on dev variations. With a learning
# rate of 1e-3 a planner of 30 tasks is ahead after 2,000 updates (loss on train 0.29, not 0.39), but not after 13,000.
PAPER = dict(per_device_train_batch_size=8, gradient_accumulation_steps=4, adam_epsilon=1e-6, warmup_steps=0)
SCRATCH = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, adam_epsilon=1e-6, warmup_steps=200,
               learning_rate=4e-4, adam_beta2=0.98, max_source_length=512, rename=0.3,
               load_best_model_at_end=False)  # the last checkpoint answers best, whatever its loss
ALWAYS = dict(eval_strategy="steps", eval_steps=0.125, save_strategy="steps", save_steps=0.125, save_total_limit=2,
              logging_steps=0.125, load_best_model_at_end=True, metric_for_best_model="loss",
              per_device_eval_batch_size=32, report_to="none", disable_tqdm=True, log_level_replica="error",
              dataloader_pin_memory=False, ddp_find_unused_parameters=False)


# ---------------------------------------------------------------------------------------------------------------------
# From an episode to what a student reads.


def state_of(description: str, steps: list[Step], look: str, inventory: str) -> dict:
    """All that a template can show of the state after `steps`, the expert's or the agent's own: the paper's fields.

    description  the task                          completed  sub-goals finished so far, oldest first
    step         number of the step to take, 1 …   subgoal    the sub-goal of the step before, or None
    score        percent so far                    history    last ten steps: action, reward, observation
    look, inventory, room                          visited    rooms seen so far, in order of the first visit
    changed      whether the step before changed   lasted     steps that were taken towards `subgoal`, without a break
                 look or inventory                 results    of finished sub-goals that ended in a measurement or
                                                              the like: the last observation
    """
    pursued = [(name, list(group)) for name, group in groupby(steps, key=itemgetter("subgoal"))]
    scores = [0] + [step["score"] for step in steps]
    history = [{"action": step["action"], "observation": step["observation"], "reward": after - before}
               for step, before, after in zip(steps, scores, scores[1:], strict=False)]
    rooms = [room_of(step["look"]) for step in steps] + [room_of(look)]
    return {
        "description": description,
        "step": len(steps) + 1,
        "score": scores[-1],
        "completed": [name for name, _ in pursued[:-1]],
        "subgoal": pursued[-1][0] if pursued else None,
        "lasted": len(pursued[-1][1]) if pursued else 0,
        "results": {name: taken[-1]["observation"] for name, taken in pursued[:-1]
                    if TELLING.match(taken[-1]["action"])},
        "changed": not steps or (steps[-1]["look"], steps[-1]["inventory"]) != (look, inventory),
        "history": history[-HISTORY:],
        "look": look,
        "inventory": inventory,
        "room": rooms[-1],
        "visited": list(dict.fromkeys(rooms)),
    }


def trained_states(episode: Episode) -> Iterator[tuple[dict, Step]]:
    """(state, step taken in it) of an expert's steps, without those that are left out: see UNTRAINED and ALREADY.

    Answers are in small letters, as most of the expert's actions are: the simulator takes either, and students need not
    learn when to write which. Doubled words become one: what experts call `baby baby wolf` is the look's `baby wolf`,
    and the simulator answers to both.
    """
    def plain(text: str) -> str:
        return re.sub(r"\b([a-z]+) \1\b", r"\1", text.lower())

    steps = [{**step, "subgoal": plain(step["subgoal"]), "action": plain(step["action"])}
             for step in episode["steps"]
             if not UNTRAINED.fullmatch(step["action"]) and not ALREADY.fullmatch(step["observation"])]
    for i, step in enumerate(steps):
        yield state_of(episode["description"], steps[:i], step["look"], step["inventory"]), step


def subgoal_examples(episode: Episode) -> Iterator[tuple[dict, str]]:
    """The planner's examples: a state, and the sub-goal of the step that the expert took in it."""
    for state, step in trained_states(episode):
        yield state, step["subgoal"]


# What `compact` leaves out or shortens in the simulator's texts: small models then read less and learn sooner.
COMPACT = [
    (r"This (?:room|outside location) is called the [\w ]+\. (?:In it|Here),? you see:", ""),
    (r"\n\t(?:the agent|a substance called air)(?=\n)", ""),
    (r"In your inventory, you see:", ""),
    (r"You also see:", "; doors"),
    (r"A door to the ([\w ]+) \(that is \w+\)", r"\1"),
    (r"\. The [\w ]+ door is closed\.", " closed"),
    (r" On the [\w ]+ is: nothing\.| In the [\w ]+ is: nothing\.| The [\w ]+ door is open\.", ""),
    (r" \(containing nothing\)|, which is (?:turned off|off|deactivated)", ""),
    (r"currently reading a temperature of|the thermometer measures a temperature of", ""),
    (r"(?:In|On) the ([\w ]+) is: ", ""),
    (r"\b(?:an?|A|substance called|containing) ", ""),
    (r"\s*\n\s*", " , "),
    (r"[\s,.]*,[\s,]*", " , "),
    (r"\s+", " "),
]


def compact(text: str) -> str:
    """A shorter wording of a look, an inventory or an observation, with every object kept."""
    for pattern, replacement in COMPACT:
        text = re.sub(pattern, replacement, text)
    return text.strip(" ,.;")


def compared(text: str) -> str:
    """The text with each measurement as `more`, `less` or `equal`, compared with the first of its unit.

    The first is the limit that the task sets, or what was measured before. From a few hundred measurements small models
    do not learn to compare numbers: they learn the numbers by heart.
    """
    first = {}

    def word(measured: re.Match) -> str:
        value, unit = float(measured[1]), measured[2]
        limit = first.setdefault(unit, value)
        return f"{'more' if value > limit else 'less' if value < limit else 'equal'} {unit}"

    return MEASURE.sub(word, text)


ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters |= {"compact": cache(compact), "compared": compared}
compiled = cache(ENVIRONMENT.from_string)


def render(template: str, state: dict, wordings: Iterable[str] = ()) -> str:
    """What a student is shown of a state: the template's text, in one line. A field that does not exist is an error.

    Beside the fields of the state a template has `about`: the task's topics (`topics_of`), each with its case
    (`cases_of`), and `here` if it is in view: `about above red here ; about below blue ;`.
    """
    topics = topics_of(state["description"], tuple(wordings))
    cases = cases_of(state, topics)
    away = missing(topics, state["description"], f"{state['look']}\n{state['inventory']}")
    about = "".join(f"about {cases.get(topic, '')} {topic} {'' if topic in away else 'here'} ; " for topic in topics)
    return " ".join(compiled(template).render(state, about=about).split())


def wording_of(descriptions: Iterable[str]) -> str:
    """The words that all descriptions of a task have in common."""
    return " ".join(sorted(set.intersection(*(set(WORD.findall(text.lower())) for text in descriptions))))


@cache
def topics_of(description: str, wordings: tuple[str, ...]) -> tuple[str, ...]:
    """What a task is about: the phrases in which its descriptions differ. Of `boil apple juice` it is apple juice.

    They are what is left without the task's wording (`wording_of`): the one of `wordings` that the description has most
    in common with. From a few substances a student would not learn where in the description to find what it must name.
    """
    words = re.findall(rf"{WORD.pattern}|\S", description.lower())
    fixed = max((set(wording.split()) for wording in wordings), default=set(words),
                key=lambda fixed: len(fixed & set(words)) - len(fixed - set(words)))
    runs = groupby(words, key=lambda word: bool(WORD.fullmatch(word)) and word not in fixed)
    return tuple(dict.fromkeys(" ".join(run) for varies, run in runs if varies))


@cache
def case_of(topic: str, description: str, topics: tuple[str, ...]) -> str:
    """The word that sets a topic apart from its alternative: above, of `If it is above 5 degrees, use the red box.`

    It is the last word before the topic that the most similar sentence about another topic lacks; "" if no such
    sentence has three quarters of its words, or if the topic stands in several sentences.
    """
    def naming(name: str) -> list[str]:
        return [sentence for sentence in description.lower().split(". ") if whole(name).search(sentence)]

    def shared(sentence: str) -> int:
        return len(words & set(WORD.findall(sentence)))

    if len(naming(topic)) != 1:
        return ""
    [own] = naming(topic)
    words = set(WORD.findall(own))
    others = [sentence for other in topics for sentence in naming(other) if sentence != own]
    likest = max(others, key=shared, default="")
    before = WORD.findall(own[: whole(topic).search(own).start()]) if shared(likest) >= 0.75 * len(words) else []
    return next((word for word in reversed(before) if word not in WORD.findall(likest)), "")


def cases_of(state: dict, topics: tuple[str, ...]) -> dict[str, str]:
    """The case of each topic that has one: the word that sets it apart in the description (`case_of`).

    Where topics are measured and the task sets no limit: `known` for the first, then `more` and `less` for the two.
    """
    told = {topic: case for topic in topics if (case := case_of(topic, state["description"], topics))}
    shown = dict(state["results"])
    if state["subgoal"] and state["history"] and TELLING.match(state["history"][-1]["action"]):
        shown[state["subgoal"]] = state["history"][-1]["observation"]
    read = {topic: float(measured[1]) for name, text in shown.items() if (measured := MEASURE.search(text))
            for topic in topics if whole(topic).search(name)}
    if len(topics) < 2 or not read or MEASURE.search(state["description"]):
        return told
    if len(set(read.values())) == 1:
        return told | dict.fromkeys(read, "known")
    return told | {max(read, key=read.get): "more", min(read, key=read.get): "less"}


def cased(answer: str, state: dict, topics: tuple[str, ...]) -> str:
    """An answer with the cases said first, as students that decide learn it: `focus_on(above red box)`.

    Having said the case, a small model copies the box that stands behind it. To find case and box in one step was too
    much: after 8,000 updates it still guessed.
    """
    for topic, case in cases_of(state, topics).items():
        for name in objects_of(answer):
            if whole(topic).search(name) and (case in ("more", "less") or whole(name).search(state["description"])):
                answer = answer.replace(name, whole(topic).sub(f"{case} {topic}", name))
    return answer


def uncased(answer: str, state: dict, topics: tuple[str, ...]) -> str:
    """The answer without its cases, as the simulator knows it: `focus_on(red box)`."""
    for topic, case in cases_of(state, topics).items():
        answer = answer.replace(f"{case} {topic}", topic)
    return answer


def missing(names: Iterable[str], description: str, shown: str) -> list[str]:
    """Those of the names that the description says and `shown` does not show: a tin cup is no tin."""
    def following(name: str, text: str) -> set[str]:
        return set(re.findall(rf"(?i)\b{re.escape(name)}\b ?(\w*)", text))  # "" at the end of a phrase

    return [name for name in names
            if (said := following(name, description)) and not following(name, shown) & {"", "called", *said}]


# ---------------------------------------------------------------------------------------------------------------------
# Other names for the objects. A student from scratch says only what training examples have said: it learns to write the
# names that it knows, and learns to copy the one that it reads only where names change all the time.


def simulator_words() -> set[str]:
    """The words of the simulator's own object types: of `…misc.ForkMetal`, fork and metal."""
    names = re.findall(r"(\w+)\t", Path(scienceworld.__file__).with_name("object_type_ids.tsv").read_text())
    return {word.lower() for name in names for word in re.findall("[A-Z][a-z]*", name)}


def objects_of(answer: str) -> list[str]:
    """The objects and rooms in a sub-goal or an action: of `move egg in inventory to red box`, egg and red box."""
    subgoal = re.fullmatch(r"\w+\((.*)\)", answer)
    parts = subgoal[1].split(", ") if subgoal else parse_action(answer)[1]
    return [name for part in parts for name in re.split(" (?:in|into|on|containing|and) ", part) if name]


def named_in(description: str, answers: Iterable[str], topics: tuple[str, ...] = ()) -> dict[str, int]:
    """The objects that an episode's answers name, and how often a text must name each for `renamed` to rename it.

    Once, if the task names it; else twice, as what stands there only once was chosen among others for what it is. Of
    objects that the task is about, the topic alone is renamed (`topics_of`): the red of the red box. Of an object that
    the task does not name as it is, also those of its words that the task has: asked for turtles, an expert focuses on
    `egg turtle`, where a look shows a turtle egg.
    """
    def told(name: str) -> bool:
        return bool(whole(name).search(description))

    said = {name for answer in answers for name in objects_of(answer)}
    about = {topic for topic in topics  # of two boxes also the one that is not chosen
             if case_of(topic, description, topics) or any(map(whole(topic).search, said))}
    objects = about | {name for name in said if not told(name) or not any(whole(topic).search(name) for topic in about)}
    words = {word for name in objects if not told(name) for word in name.split() if not LITTLE.fullmatch(word)}
    return {name: 1 if told(name) else 2 for name in sorted(objects | set(filter(told, words)))}


def renamed(text: str, answer: str, named: dict[str, int], words: list[str], chance: random.Random,
            share: float) -> tuple[str, str]:
    """The example with other names for a share of its objects: one to three words, some with a letter or a digit.

    Some of the words are two in one, like the simulator's `greenpaint`, and have to be spelled. `named` has the objects
    of all the episode's answers: if only this answer's were renamed, a student would learn to say whatever is strange.
    """
    new = {}
    for name, least in named.items():
        if chance.random() < share and len(whole(name).findall(text)) >= least:
            made = chance.choices(words, k=chance.randint(1, 3))
            if chance.random() < 0.2:
                made[-1] += chance.choice(words)
            if chance.random() < 0.2:
                made.append(chance.choice(string.ascii_lowercase + string.digits))
            new[name] = " ".join(made)
    if not new:
        return text, answer
    old = re.compile("|".join(whole(name).pattern for name in sorted(new, key=len, reverse=True)), re.IGNORECASE)
    return tuple(old.sub(lambda name: new[name[0].lower()], part) for part in (text, answer))


@cache
def whole(name: str) -> re.Pattern:
    """Finds a name, in either case, that is neither part of a longer word nor a sub-goal's function."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?![\w(])", re.IGNORECASE)


def unnamed(description: str, answer: str, topics: Iterable[str]) -> set[str]:
    """The objects in an answer that the task does not name, and whose names hold none of its topics."""
    return {name for name in objects_of(answer)
            if not whole(name).search(description) and not any(whole(topic).search(name) for topic in topics)}


def unshown(answer: str, *texts: str) -> set[str]:
    """The words of an answer's objects that none of the texts has."""
    shown = set(NAME.findall(" ".join(texts).lower()))
    return {word for name in objects_of(answer) for word in NAME.findall(name)
            if word not in shown and not LITTLE.fullmatch(word)}


def habits_of(experts: list[tuple[str, list[str]]], wordings: tuple[str, ...]) -> dict:
    """What all experts of a task do, from the description and the answers of each.

    focus  whether they focus only on what the task names
    told   the names that several of them say, but only where the task does: `water`, as some are to boil water
    """
    said, untold, focus = Counter(), set(), True
    for description, answers in experts:
        said.update({name for answer in answers for name in objects_of(answer)})
        for answer in answers:
            others = unnamed(description, answer, topics_of(description, wordings))
            untold |= others
            focus &= not (FOCUS.match(answer) and others & set(objects_of(answer)[:1]))
    return {"focus": focus, "told": sorted(name for name, count in said.items() if count > 1 and name not in untold)}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def new_tokenizer(texts: list[str], words: list[str]) -> "transformers.PreTrainedTokenizerFast":
    """A byte-pair tokenizer for a T5 from scratch: `words`, and others that are frequent, whole; digits one by one.

    Punctuation is set apart by spaces before the split, and letters are small: the lead of `find(lead)` and of `Your
    task is to boil lead.`, the jam of `'jam sandwich'` and of `cup containing jam`, the B of a look and the b of an
    action are one and the same token, which a small model can copy. Decoding joins all again but stops, which no
    sub-goal and no action has. A bracket after a space, as in `focus on book (the origin of species)`, is another token
    than a function's: `[`, which no text has.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    apart = [normalizers.Replace(*pair) for pair in [(" (", " [ "), *((mark, f" {mark} ") for mark in "(),.-'")]]
    tokenizer.normalizer = normalizers.Sequence(
        [*apart, normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)])
    pairs = [(" [ ", " ("), (" ( ", "("), ("( )", "()"), (" )", ")"), (" , ", ", "), (" - ", "-"), (" ' ", "'")]
    together = [decoders.Replace(*pair) for pair in pairs]
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), *together])
    tokenizer.train_from_iterator(texts + 2 * words, trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=[chr(code) for code in range(33, 127)]))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def new_model(size: str, vocabulary: int) -> "transformers.T5ForConditionalGeneration":
    """A T5 with random weights, set up to copy.

    A student's answer is mostly words of its input. To copy them takes a T5 from scratch thousands of updates to learn,
    and few when it starts with what copying needs:

    - For a word, the cross-attention's value and output projections are each other's transpose, so that what is
      attended to in the encoder reaches the output as it is.
    - For a name of several words, an induction head (Olsson et al. 2022, arXiv 2209.11895): a head of the encoder notes
      beside each token the one before it, and half of the decoder's heads attend to the place whose token before is the
      one just written.
    - Two more heads note what stands around each token: which of two boxes a condition means is the one beside the
      words of what was measured.
    - In the second layer a head looks at the same token elsewhere in the text, and notes what stands before it there:
      which of the planes that the task names has been measured.
    """
    import torch
    from torch.nn.init import orthogonal_
    from transformers.masking_utils import eager_mask

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=vocabulary, decoder_start_token_id=0, dropout_rate=0.0, **SIZES[size]))
    transformers.AttentionInterface.register("unscaled", attend)
    transformers.AttentionMaskInterface.register("unscaled", eager_mask)
    model.set_attn_implementation("unscaled")
    width = model.config.d_kv  # of a head
    first = model.encoder.block[0].layer[0].SelfAttention
    bias = first.relative_attention_bias.weight.data  # (distance, head)
    bias[1, 0] = 10  # the token before
    bias[17:22, 1] = 5  # the next five
    bias[2:10, 2] = 5  # those from the second to the fifteenth before
    bias[0, 3] = -3  # rather any other place than its own
    read = orthogonal_(torch.empty(width, model.config.d_model))
    *notes, rest = orthogonal_(torch.empty(model.config.d_model, 4 * width)).chunk(4, dim=1)  # apart from each other
    rows = slice(3 * width)
    first.q.weight.data[rows] *= 0.1  # so that these heads look there whatever the tokens
    first.v.weight.data[rows], first.o.weight.data[:, rows] = read.repeat(3, 1), torch.cat(notes, dim=1)
    second, rows = model.encoder.block[1].layer[0].SelfAttention, slice(3 * width, 4 * width)
    second.q.weight.data[rows] = second.k.weight.data[rows] = 1.2 * rest.T  # a token apart from its notes
    second.v.weight.data[rows], second.o.weight.data[:, rows] = notes[2].T, rest
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        orthogonal_(attention.v.weight)
        attention.o.weight.data.copy_(attention.v.weight.T)
        for head in range(model.config.num_heads // 2):
            attention.q.weight.data[head * width : (head + 1) * width] = read
            attention.k.weight.data[head * width : (head + 1) * width] = notes[0].T
    return model


def attend(module, query, key, value, mask, position_bias, **_):
    """T5's attention, bit for bit transformers' eager one, without its product of all scores with a scale of 1.

    `query`, `key`, `value` are (batch, heads, tokens, width). A model from scratch trains a tenth faster by it; for so
    small a one both are faster than PyTorch's fused attention.
    """
    scores = query @ key.transpose(2, 3) + position_bias
    if mask is not None:
        scores += mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def be_quiet():
    """Leave the terminal to our own lines: of Hugging Face's libraries only errors are shown."""
    for logging in (transformers.logging, huggingface_hub.logging):
        logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def model_class(name: str):
    """The class that loads a model, by its architecture: an encoder with a decoder (T5), or a decoder alone (Llama).

    Ends the program if it is neither, or not to be had; loads no weights.
    """
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        fail(f"{name} is not a model folder (it has no config.json). Name another --model.")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        fail(f"the model {name} is neither a folder here nor can it be downloaded. Check its name and the network, or "
             f"build one from scratch with --model {'|'.join(SIZES)}.")
    if config.is_encoder_decoder and type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForSeq2SeqLM
    if not config.is_encoder_decoder and str(config.architectures).endswith(("ForCausalLM']", "LMHeadModel']")):
        return transformers.AutoModelForCausalLM
    fail(f"{name} does not write text after text (it is a {config.model_type}). Name a model such as "
         "google/flan-t5-large or Qwen/Qwen3-0.6B.")


def frame_of(tokenizer, decoder: bool) -> list[list[int]]:
    """What stands before a question, between it and its answer, and after the answer, in token ids.

    A decoder's chat template says so, if it has one: the first token after the answer ends the turn.
    """
    ids = partial(tokenizer.encode, add_special_tokens=False)
    if decoder and tokenizer.chat_template:
        chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        asked, answered = (tokenizer.apply_chat_template(
            chat[:turns], tokenize=False, add_generation_prompt=turns == 1, enable_thinking=False) for turns in (1, 2))
        before, between = asked.split("QUESTION")
        return [ids(before), ids(between), ids(answered.rpartition("ANSWER")[2])[:1]]
    whole, question = tokenizer("QUESTION").input_ids, ids("QUESTION")
    start = next(i for i in range(len(whole)) if whole[i : i + len(question)] == question)
    between = ids("\nAnswer:") if decoder else whole[start + len(question) :]
    return [whole[:start], between, [tokenizer.eos_token_id]]


def question_tokens(tokenizer, texts: list[str], about: dict) -> list[list[int]]:
    """Token ids of what a student is asked; a text that is too long loses its end."""
    before, between, _ = about["frame"]
    room = about["max_source_length"] - len(before) - len(between)
    return [[*before, *row[:room], *between] for row in tokenizer(texts, add_special_tokens=False).input_ids]


def examples_of(tokenizer, texts: list[tuple], about: dict, decoder: bool) -> list[dict]:
    """(question, answer, …) texts as the Trainer takes them. A label stands where it is predicted; -100 is no label."""
    questions = question_tokens(tokenizer, [question for question, *_ in texts], about)
    end = about["frame"][2]
    room = about["max_target_length"] - len(end)
    written = tokenizer([answer for _, answer, *_ in texts], add_special_tokens=False).input_ids
    answers = [row[:room] + end for row in written]
    if decoder:
        return [dict(input_ids=question + answer[:-1], labels=[-100] * (len(question) - 1) + answer)
                for question, answer in zip(questions, answers, strict=True)]
    return [dict(input_ids=question, labels=answer) for question, answer in zip(questions, answers, strict=True)]


def answers(model, tokenizer, texts: list[str], about: dict, beams: int, best: int = 1) -> list[list[str]]:
    """The `best` likeliest answers to every text, by beam search. Texts of a length share a batch of `BATCH`."""
    inputs = question_tokens(tokenizer, texts, about)
    order = sorted(range(len(texts)), key=lambda i: len(inputs[i]))
    result = [[]] * len(texts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        padded = tokenizer.pad({"input_ids": [inputs[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **padded.to(model.device), num_beams=beams, num_return_sequences=best, do_sample=False,
            early_stopping=False, length_penalty=float(beams == 1),  # 0: no bonus for length
            max_new_tokens=about["max_target_length"], eos_token_id=about["frame"][2],
            pad_token_id=tokenizer.pad_token_id)
        if not model.config.is_encoder_decoder:
            output = output[:, padded["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(output, skip_special_tokens=True)
        for row, i in enumerate(chosen):
            result[i] = [text.strip() for text in decoded[row * best : (row + 1) * best]]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Training, the same for both students. `role` is subgoal or action: the script's name and its templates'.


def fine_tune(role: str, options: "Options", training, make_examples: Callable, **more):
    """Train a student on the examples of `options.data` and leave it, tested on dev, in `training.output_dir`.

    `more` is noted in its student.json, with the template and the scores.
    """
    import torch

    be_quiet()
    # What the first process has to complain of, the others need not repeat.
    silent = redirect_stderr(io.StringIO()) if training.process_index else nullcontext()
    with silent, training.main_process_first(local=False):
        if options.model not in SIZES:
            model_class(options.model)
        about, texts = prepare(role, options, make_examples, **more)
        if training.world_size != (started := int(os.environ.get("WORLD_SIZE", 1))):
            fail(f"{started} processes were started, but would train each for itself. On CPUs add --use_cpu.")
        if training.per_device_train_batch_size % training.world_size:
            fail(f"{training.world_size} processes cannot share batches of {training.per_device_train_batch_size} "
                 "evenly. Start another number of them, or change --per_device_train_batch_size.")
        resume = last_checkpoint(Path(training.output_dir), command_of(about, texts, options, training))

    if training.device.type == "cpu":
        torch.set_float32_matmul_precision("medium")  # where a CPU multiplies in bf16, a fifth faster; else as it was
    transformers.set_seed(training.seed)
    named = {word for _, _, names, _ in texts["train"] for name in names for word in name.split()}
    words = sorted(simulator_words() | {word for word in named if word.isalpha() and len(word) > 1})
    model, tokenizer = model_and_tokenizer(options, texts["train"], words)
    decoder = not model.config.is_encoder_decoder
    about |= dict(frame=frame_of(tokenizer, decoder), parameters=model.num_parameters(),
                  train_examples=len(texts["train"]), dev_examples=len(texts["dev"]))
    tokenise = partial(examples_of, tokenizer, about=about, decoder=decoder)
    train = Examples(texts["train"], tokenise, words, options.rename, training.seed)
    if options.lora:
        model = with_adapters(model, options.lora)
    trainer = make_trainer(model, tokenizer, training, train, tokenise(texts["dev"]), options.per_task)
    trainer.train(resume_from_checkpoint=resume)
    if training.eval_strategy == "no":
        trainer.evaluate()  # once, by all processes: the scores have the loss on dev
    if options.lora:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(training.output_dir)
        tokenizer.save_pretrained(training.output_dir)
    else:
        trainer.save_model()  # by all processes, as each may hold a part of the weights
    if trainer.is_world_process_zero():
        score_on_dev(Path(training.output_dir), tokenizer, about, texts, trainer)


def model_and_tokenizer(options: "Options", examples: list[tuple], words: list[str]) -> tuple:
    """A model from scratch, with a tokenizer of the examples' texts; or a pretrained one, with its own."""
    if options.model in SIZES:
        tokenizer = new_tokenizer([text for example in examples for text in example[:2]], words)
        return new_model(options.model, len(tokenizer)), tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = "bfloat16" if options.lora and has_bf16() else "float32"  # what is trained is always fp32
    return model_class(options.model).from_pretrained(options.model, dtype=dtype), tokenizer


def with_adapters(model, rank: int):
    """The model with a low-rank adapter beside every linear layer, which alone are trained (LoRA, arXiv 2106.09685)."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def prepare(role: str, options: "Options", make_examples: Callable, **more) -> tuple[dict, dict]:
    """(what student.json will say, {"train" and "dev": [(question, answer, objects that its episode names, kind)]}).

    A kind is (task, one of KINDS).
    """
    if not Path(options.template).is_file():
        fail(f"{options.template} is not a file. Name a --template such as {PROMPTS / f'{role}.jinja'}.")
    template, texts = Path(options.template).read_text(), {"train": [], "dev": []}
    told = role == "action" and not more["flat"]  # the executor decides nothing: its sub-goal says how an episode ends
    episodes = read_data(options.data)
    taught = [episode for episode in episodes if episode["split"] == "train"]
    wordings = [wording_of(episode["description"] for episode in group)
                for _, group in groupby(taught, key=itemgetter("task")) if "{{ about }}" in template]
    experts, unseen = {}, set()
    for episode in episodes:
        examples = list(make_examples(episode))
        said = [answer for _, answer in examples]
        topics = () if told else topics_of(episode["description"], tuple(wordings))
        named = named_in(episode["description"], said, topics)
        kinds = [(episode["task"], kind_of(said, i, told, topics)) for i in range(len(said))]
        texts[episode["split"]] += [(render(template, state, wordings), cased(answer, state, topics), named, kind)
                                    for (state, answer), kind in zip(examples, kinds, strict=True)]
        if episode["split"] == "train":
            experts.setdefault(episode["task"], []).append((episode["description"], said))
            unseen.update(*(unshown(answer, *(state[name] for name in ("description", "look", "inventory")))
                            for state, answer in examples))
    lengths = pd.Series({(e["task"], e["variation"]): len(e["steps"]) for e in taught}).groupby(level=0).mean()
    about = dict(
        role=role, **more, base=options.model, tasks=lengths.to_dict(), teacher=teacher_of(taught),
        wordings=wordings, habits={task: habits_of(theirs, tuple(wordings)) for task, theirs in experts.items()},
        unshown=sorted(unseen),
        max_source_length=options.max_source_length, max_target_length=options.max_target_length, template=template)
    return about, texts


def kind_of(said: list[str], i: int, told: bool = False, topics: Iterable[str] = ()) -> str:
    """Which of KINDS answer i of an episode is, whose task has these topics (`topics_of`).

    A student that is `told` the sub-goal does not decide how an episode ends: to it, the last answer is just a new one.
    """
    if times := said[max(0, i - 2) : i].count(said[i]):
        changes = said[i + 1 : i + 2] != [said[i]]
        return "next" if times == 1 else "before" if changes else "again"
    if set(said[i:]) == {said[i]} and not told:
        return "last"
    first = any(whole(name).search(said[i]) and not any(map(whole(name).search, said[:i])) for name in topics)
    return "named" if first else "new"


def read_data(paths: list[str]) -> list[Episode]:
    """The annotated episodes of some files, of splits train and dev, in the order of tasks and variations."""
    episodes = sorted((episode for path in paths for episode in read_episodes(path, annotated=True)),
                      key=lambda episode: (episode["task"], episode["variation"]))
    if any(episode["split"] == "test" for episode in episodes):
        fail("--data holds test episodes. Train on the splits train and dev alone.")
    if not any(episode["split"] == "dev" for episode in episodes):
        episodes = [{**episode, "split": "train" if i % 20 else "dev"} for i, episode in enumerate(episodes)]
    if not any(episode["split"] == "train" for episode in episodes):
        fail("--data holds no train episode. Add the file that `annotate.py --split train` wrote.")
    return episodes


def teacher_of(episodes: list[Episode]) -> dict:
    """Who named the sub-goals of some trajectories, and what asking the LLM took, as in `Episode`'s usage."""
    usages = [episode["usage"] for episode in episodes if "usage" in episode]
    total = {kind: sum(usage[kind] for usage in usages) for kind in ("calls", "prompt_tokens", "completion_tokens")}
    dollars = [usage["dollars"] for usage in usages]
    return {"annotators": sorted({episode.get("annotator", "nobody") for episode in episodes}),
            "trajectories": len(episodes), **total, "dollars": None if None in dollars else sum(dollars)}


class Examples:
    """The training examples as the Trainer takes them; each time, other objects are renamed at random.

    An index is (number of the showing, number of the example), from which the renaming follows: a resumed run and
    several processes see the very examples that one uninterrupted process sees.
    """

    def __init__(self, texts: list[tuple], tokenise: Callable, words: list[str], rename: float, seed: int):
        self.texts, self.tokenise, self.words, self.rename, self.seed = texts, tokenise, words, rename, seed
        self.lengths = [len(tokenise([text])[0]["input_ids"]) for text in texts]  # all at once would fill gigabytes

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: tuple[int, int]) -> dict:
        showing, i = index
        text, answer, named, _ = self.texts[i]
        chance = random.Random(f"{self.seed} {showing} {i}")
        return self.tokenise([renamed(text, answer, named, self.words, chance, self.rename)])[0]


class Order:
    """A sampler in whose order the examples of an update have about the same length, so that little is padded.

    With `per_task`, an epoch shows that many examples of each task: of a long one others each time, those of a short
    one up to REPEATED times, each time with other names. Each of KINDS has its least share, for a reason:

    last          what an episode ends with (into which box, after 25 steps of measuring) decides it, and is rare
    named         planners otherwise knew the training's topics by heart
    new           students otherwise wait until the moves are over
    next, before  planners otherwise left a measurement that had just begun, or had to be read once more

    The order follows from seed and epoch alone. `kinds` are those of `prepare`.
    """

    def __init__(self, lengths: list[int], update: int, seed: int, kinds: list[tuple[str, str]] = (),
                 per_task: int | None = None):
        self.lengths = -(-np.asarray(lengths) // 8)  # in eights: coarse enough to mix
        self.update, self.seed = update, seed
        tasks, kinds = (np.asarray(column) for column in zip(*(kinds or [("", "new")] * len(lengths)), strict=True))
        self.shares = []  # places of examples, and how many of them are shown in an epoch
        for task in sorted(set(tasks)):
            left, all_of_it = per_task, sum(tasks == task)
            for kind, least in KINDS.items():
                places = np.flatnonzero((tasks == task) & (kinds == kind))
                share = len(places)
                if per_task:
                    share = min(REPEATED * share, max(int(least * per_task), round(per_task * share / all_of_it)), left)
                    left -= share
                self.shares += [(places, share)] * (share > 0)
        self.size = sum(share for _, share in self.shares)
        self.epoch, self.over = 0, False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        count, shown = len(self.lengths), []  # `count + 3` is example 3 in its second showing
        for places, share in self.shares:
            showings = [generator.permutation(places) + count * n for n in range(-(-share // len(places)))]
            shown.append(np.concatenate(showings)[:share])
        order = generator.permutation(np.concatenate(shown))
        order = order[np.argsort(self.lengths[order % count], kind="stable")]
        order = np.resize(order, len(self))  # the last update is filled up
        *others, longest = order.reshape(-1, self.update)  # the longest first: too little memory shows at once
        order = [] if self.over else np.concatenate([longest, *generator.permutation(others)])
        return ((self.epoch * REPEATED + int(i) // count, int(i) % count) for i in order)

    def __len__(self) -> int:
        return -(-self.size // self.update) * self.update


def token_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy, averaged over the answer tokens of a whole update: of all its batches and processes.

    T5's own loss averages over each batch, so that accumulated gradients would be a multiple of one large batch's.
    """
    import torch

    loss = torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def make_trainer(model, tokenizer, training, train: Examples, dev: list[dict],
                 per_task: int | None) -> "transformers.Trainer":
    """Hugging Face's Trainer, with our loss, our order of the examples, and a line where it would print a record."""
    import torch

    update = training.per_device_train_batch_size * training.gradient_accumulation_steps
    order = Order(train.lengths, update, training.seed, [kind for *_, kind in train.texts], per_task)
    # Multiples of 8: GPUs compute with them faster, and on a CPU each new length keeps memory for good.
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8)
    chooses = not model.config.is_encoder_decoder and model._supports_logits_to_keep()

    def collate(examples: list[dict]) -> dict:
        """A batch, of whose places a decoder computes logits at those alone that have a label, and at the one before.

        Of a question's other tokens, logits over a vocabulary of 262,144 cost more than all the layers before. The
        place before is for the Trainer, which counts a decoder's labels from the second place on.
        """
        batch = collator(examples)
        if chooses:
            first, *others = batch["labels"].ne(-100).any(0).nonzero()[:, 0].tolist()
            batch["logits_to_keep"] = torch.tensor([first - 1, first, *others])
            batch["labels"] = batch["labels"][:, batch["logits_to_keep"]]
        return batch

    trainer = transformers.Trainer(
        model=model, args=training, processing_class=tokenizer, train_dataset=train, eval_dataset=dev,
        data_collator=collate, compute_loss_func=token_loss)
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(torch.utils.data.DataLoader(
        train, batch_size=training.per_device_train_batch_size, sampler=order, collate_fn=collate,
        num_workers=training.dataloader_num_workers, pin_memory=training.dataloader_pin_memory))
    trainer.remove_callback(transformers.PrinterCallback)
    name = f"{Path(training.output_dir).stem} ({model.num_parameters() / 1e6:.1f} M parameters)"
    trainer.add_callback(progress_callback(name, order))
    return trainer


def progress_callback(name: str, order: Order) -> "transformers.TrainerCallback":
    """Tells the sampler the epoch, and prints a line at every evaluation: several students may train side by side."""

    class Progress(transformers.TrainerCallback):
        def on_train_begin(self, training, state, control, **_):
            self.started, self.first = time.time(), state.global_step
            self.say = print if state.is_world_process_zero else lambda *_, **__: None
            resumed = f", going on from step {self.first}" if self.first else ""
            self.say(f"{name}: {state.max_steps} steps{resumed}", flush=True)

        def on_epoch_begin(self, training, state, control, **_):
            order.epoch = state.global_step // (len(order) // order.update)
            order.over = state.global_step >= state.max_steps  # the Trainer itself would train on

        def on_step_end(self, training, state, control, **_):
            control.should_log |= control.should_evaluate  # for the line that on_evaluate prints

        def on_evaluate(self, training, state, control, metrics, **_):
            pace = (time.time() - self.started) / max(1, state.global_step - self.first)
            left = round(pace * (state.max_steps - state.global_step))
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self.say(f"{name}: step {state.global_step} of {state.max_steps}, loss {float(losses[-1]):.3f} on train "
                     f"and {metrics['eval_loss']:.3f} on dev, {left // 60}:{left % 60:02} left", flush=True)

    return Progress()


def score_on_dev(output: Path, tokenizer, about: dict, texts: dict, trainer):
    """Ask the finished model for its answers on dev, and make its folder a student's."""
    model = model_class(output).from_pretrained(output).to(trainer.args.device).eval()
    given = answers(model, tokenizer, [question for question, *_ in texts["dev"]], about, beams=1)
    said = {answer for _, answer, *_ in texts["train"]}
    right = [best == answer for (best,), (_, answer, *_) in zip(given, texts["dev"], strict=True)]
    new = [same for same, (_, answer, *_) in zip(right, texts["dev"], strict=True) if answer not in said]
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    loss = min(losses) if trainer.args.load_best_model_at_end else losses[-1]
    about |= dict(dev_loss=loss, dev_exact_match=np.mean(right), dev_new_answers=len(new),
                  dev_new_exact_match=np.mean(new) if new else None)
    (output / ABOUT).write_text(json.dumps(about, indent=1))
    unsaid = f", {np.mean(new):.1%} where no training example has that answer ({len(new)})" if new else ""
    print(f"{output}: exact match {np.mean(right):.1%} on {len(right)} dev examples{unsaid}; loss {loss:.3f}")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, and the command line.


def command_of(about: dict, texts: dict, options: "Options", training) -> dict:
    """Everything that decides what a checkpoint is a checkpoint of; not how many processes share the work."""
    settings = {name: value for name, value in json.loads(training.to_json_string()).items()
                if not name.startswith(("logging", "output", "dataloader", "local", "per_device_eval"))}
    return {**about, **dict.fromkeys(("teacher", "habits", "wordings", "unshown")),
            "template": digest(about["template"]), "examples": digest(texts), "rename": options.rename,
            "per_task": options.per_task, "lora": options.lora, **settings}


def last_checkpoint(output: Path, command: dict) -> str | None:
    """The newest whole checkpoint, to go on from; ends the program if the folder is another command's."""
    claim(output / "command.json", command, output)
    for folder in output.glob("checkpoint-*"):
        if not (folder / "trainer_state.json").exists():  # what is written last
            shutil.rmtree(folder)
    return transformers.trainer_utils.get_last_checkpoint(output)


@dataclass
class Options:
    """What is trained on what. The training itself is set by Hugging Face's flags."""

    data: list[str] = field(metadata={
        "help": "annotated episodes, one or more JSONL files; those of split dev choose the best checkpoint (without "
        "any, every 20th variation does)"})
    model: str = field(default="google/flan-t5-large", metadata={
        "help": f"a model of the hub or a folder, seq2seq or a decoder alone, or one made from scratch: "
        f"{', '.join(SIZES)}"})
    rename: float = field(default=0.0, metadata={
        "help": "share of the objects in an example that have another name, by chance (default: 0; from scratch 0.3)"})
    per_task: int | None = field(default=None, metadata={
        "help": "examples of each task in an epoch, some of each of KINDS: a long task gives no more, those of a "
        "short one come again (default: all)"})
    lora: int | None = field(default=None, metadata={
        "help": "the rank of adapters that are trained in the weights' place, and merged into them at the end"})
    template: str | None = field(default=None, metadata={
        "help": "what the model is shown (default: prompts/ROLE.jinja; from scratch prompts/ROLE_compact.jinja)"})
    max_source_length: int = field(default=1024, metadata={"help": "tokens of the input, the rest is cut off"})
    max_target_length: int = field(default=30, metadata={"help": "tokens of the answer"})


def parse_flags(role: str, options: type, description: str, paper: dict, scratch: dict):
    """(options, Hugging Face's training arguments) from the command line.

    `paper` and `scratch` are the role's own defaults for pretrained models and for those made from scratch.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # as torchrun says
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread one process over all GPUs
    parser = transformers.HfArgumentParser(
        (options, transformers.TrainingArguments), description=description,
        usage=f"train_{role}.py --data FILE [FILE ...] [--model MODEL] [--output_dir FOLDER] [any flag below]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**ALWAYS, **PAPER, **paper, bf16=has_bf16(), output_dir=role,
                        accelerator_config={"split_batches": True}, template=str(PROMPTS / f"{role}.jinja"))
    known = parser.parse_known_args()[0]
    if known.model in SIZES:
        parser.set_defaults(**SCRATCH, **scratch, template=str(PROMPTS / f"{role}_compact.jinja"))
    elif known.lora:
        parser.set_defaults(learning_rate=10 * paper["learning_rate"])  # as adapters are known to want
    try:
        return parser.parse_args_into_dataclasses()
    except ValueError as error:  # of flags that do not go together
        fail(f"{error} Change that flag; --help lists them all.")


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bf16. On a CPU it was no faster for small models, at twice the memory."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def main():
    paper, scratch = dict(learning_rate=4e-4, num_train_epochs=20), dict(num_train_epochs=10)
    options, training = parse_flags("subgoal", Options, __doc__, paper, scratch)
    fine_tune("subgoal", options, training, subgoal_examples)


if __name__ == "__main__":
    main()
