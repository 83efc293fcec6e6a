#!/usr/bin/env python3
"""Stage 2: the sub-goal generator (the planner), fine-tuned to name the sub-goal of the next step.

    reads   --data, the annotated episodes of stage 1, and --template, the text that the model is shown
    writes  --output-dir, a model folder: weights, tokenizer, student.json with the template and the scores on dev;
            beside the data, its tokens: DATA.ROLE-HASH.npz, made again when data, template or tokenizer change

    python train_subgoal.py --data train.jsonl dev.jsonl --model tiny --output-dir subgoal
    python train_subgoal.py --data train.jsonl dev.jsonl --model tiny --dry-run
    torchrun --nproc-per-node 8 train_subgoal.py --data train.jsonl dev.jsonl --model google/flan-t5-large
    torchrun --nproc-per-node 8 train_subgoal.py … --fsdp                      weights and optimizer shared out
    torchrun --nproc-per-node 8 train_subgoal.py … --deepspeed zero2.json      the same, by DeepSpeed

Flags are those below and Hugging Face's TrainingArguments. Batch size and accumulation are those of one process: of
several, each does its share of the same updates. A run that was stopped goes on from its last checkpoint when the same
command is given again; SIGTERM makes a single process leave one first. Stage 3 trains the action generator with the
functions of this file.
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, product
from pathlib import Path

import huggingface_hub
import jinja2
import numpy as np
import transformers  # loads its parts, and PyTorch, only when they are used

import annotate
from annotate import PROMPTS, Episode, Step, fail, read_episodes, room_of, stop

HISTORY = 10  # the last ten actions are shown (the paper's number)
UNTRAINED = re.compile(r"look around|close door .*")  # the expert's steps that are left out, as in the paper

# T5s built from scratch, by name: d_model, layers of encoder and decoder, heads of 32 dimensions, of 64 in medium.
SIZES = {
    "nano": dict(d_model=64, d_kv=32, num_heads=2, d_ff=256, num_layers=2, num_decoder_layers=2),
    "tiny": dict(d_model=128, d_kv=32, num_heads=4, d_ff=512, num_layers=2, num_decoder_layers=2),
    "small": dict(d_model=256, d_kv=32, num_heads=8, d_ff=1024, num_layers=3, num_decoder_layers=3),
    "medium": dict(d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=6, num_decoder_layers=6),
}
VOCABULARY = 4096  # tokens of a tokenizer built from scratch, at most
BATCH = 64  # answers generated at a time
MEASURED = 20  # seconds that --dry-run measures
ABOUT = "student.json"  # what makes a folder a student's: written last, read first


# ---------------------------------------------------------------------------------------------------------------------
# From an episode to what a student reads.


def state_of(description: str, steps: list[Step], look: str, inventory: str) -> dict:
    """All that a template can show of the state after `steps`: the paper's fields.

    The same function serves training, on a prefix of an expert's steps, and acting, on the agent's own steps.

    description  the task                          completed  sub-goals finished so far, oldest first
    step         number of the step to take, 1 …   subgoal    the sub-goal of the step before, or None
    score        percent so far                    history    last ten steps: action, reward, observation
    look, inventory, room                          visited    rooms seen so far, in order of the first visit
    """
    subgoals = [name for name, _ in groupby(step["subgoal"] for step in steps)]
    scores = [0] + [step["score"] for step in steps]
    history = [
        {"action": step["action"], "observation": step["observation"], "reward": after - before}
        for step, before, after in zip(steps, scores, scores[1:], strict=False)
    ]
    rooms = [room_of(step["look"]) for step in steps] + [room_of(look)]
    return {
        "description": description,
        "step": len(steps) + 1,
        "score": scores[-1],
        "completed": subgoals[:-1],
        "subgoal": subgoals[-1] if subgoals else None,
        "history": history[-HISTORY:],
        "look": look,
        "inventory": inventory,
        "room": rooms[-1],
        "visited": list(dict.fromkeys(rooms)),
    }


def trained_states(episode: Episode) -> Iterator[tuple[dict, Step]]:
    """(state, step taken in it) of an expert's steps, without those that are left out of training."""
    steps = [step for step in episode["steps"] if not UNTRAINED.fullmatch(step["action"])]
    for i, step in enumerate(steps):
        yield state_of(episode["description"], steps[:i], step["look"], step["inventory"]), step


def subgoal_examples(episode: Episode) -> Iterator[tuple[dict, str]]:
    """The planner's examples: a state, and the sub-goal of the step that the expert took in it."""
    for state, step in trained_states(episode):
        yield state, step["subgoal"]


# What `compact` leaves out or shortens in a text of the simulator, so that small models read less and learn sooner.
COMPACT = [
    (r"This (?:room|outside location) is called the [\w ]+\. (?:In it|Here),? you see:", ""),
    (r"\n\t(?:the agent|a substance called air)(?=\n)", ""),
    (r"In your inventory, you see:", ""),
    (r"You also see:", "; doors"),
    (r"A door to the ([\w ]+) \(that is \w+\)", r"\1"),
    (r" On the [\w ]+ is: nothing\.| In the [\w ]+ is: nothing\.| The [\w ]+ door is \w+\.", ""),
    (r" \(containing nothing\)|, which is (?:turned off|off|deactivated)", ""),
    (r"currently reading a temperature of", ""),
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


@cache
def environment() -> jinja2.Environment:
    """Templates fail on a field that does not exist, and put all their lines into one."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["compact"] = cache(compact)
    return environment


@cache
def compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def render(template: str, state: dict) -> str:
    """What a student is shown of a state: the template's text, in one line."""
    return " ".join(compiled(template).render(state).split())


# ---------------------------------------------------------------------------------------------------------------------
# Models


def new_tokenizer(texts: list[str]) -> "transformers.PreTrainedTokenizerFast":
    """A byte-pair tokenizer for a T5 from scratch: words whole where they are frequent, digits one by one.

    Brackets and commas are set apart by spaces before the split and joined again on decoding, so that the kitchen of
    `navigate_to(kitchen)` and of `go to kitchen` is one and the same token, which a small model can copy.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    apart = [normalizers.Replace(mark, f" {mark} ") for mark in "(),"]
    tokenizer.normalizer = normalizers.Sequence(
        [*apart, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)])
    together = [decoders.Replace(*pair) for pair in [(" ( ", "("), ("( )", "()"), (" )", ")"), (" , ", ", ")]]
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), *together])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=2, show_progress=False, special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=[chr(code) for code in range(33, 127)]))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return loaded_tokenizer(tokenizer.to_str())


def loaded_tokenizer(text: str) -> "transformers.PreTrainedTokenizerFast":
    """A tokenizer built from scratch, from its JSON text."""
    from tokenizers import Tokenizer

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def new_model(size: str, vocabulary: int) -> "transformers.T5ForConditionalGeneration":
    """A T5 with random weights, set up to copy.

    A student's answer is mostly words of its input, and learning to copy them takes a T5 from scratch thousands of
    updates. It takes far fewer when what the decoder attends to in the encoder reaches the output as it is: value and
    output projection of the cross-attention start as each other's transpose, so that together they are the identity.
    """
    import torch

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=vocabulary, decoder_start_token_id=0, dropout_rate=0.0, **SIZES[size]))
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        torch.nn.init.orthogonal_(attention.v.weight)
        attention.o.weight.data.copy_(attention.v.weight.T)
    return model


def be_quiet():
    """Leave the terminal to our own lines: of Hugging Face's libraries only errors are shown."""
    for logging in (transformers.logging, huggingface_hub.logging):
        logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def answers(model, tokenizer, texts: list[str], about: dict, beams: int, best: int = 1) -> list[list[str]]:
    """The `best` likeliest answers to every text, by beam search. Texts of a length share a batch of `BATCH`."""
    import torch

    inputs = tokenizer(texts, truncation=True, max_length=about["max_source_length"]).input_ids
    order = sorted(range(len(texts)), key=lambda i: len(inputs[i]))
    result = [[]] * len(texts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        padded = tokenizer.pad({"input_ids": [inputs[i] for i in chosen]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(**padded, num_beams=beams, num_return_sequences=best, do_sample=False,
                                    early_stopping=beams > 1, max_new_tokens=about["max_target_length"])
        decoded = tokenizer.batch_decode(output, skip_special_tokens=True)
        for row, i in enumerate(chosen):
            result[i] = decoded[row * best : (row + 1) * best]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Training, the same for both students. `role` is subgoal or action: the script's name and its templates'.


@dataclass
class Options:
    """What is trained on what. The training itself is set by Hugging Face's flags, below."""

    data: list[str] = field(metadata={
        "help": "annotated episodes, one or more JSONL files; those of split dev choose the best checkpoint (without "
        "any, every 20th variation does)"})
    model: str = field(default="google/flan-t5-large", metadata={
        "help": f"a seq2seq model of the hub or a folder, or one made from scratch: {', '.join(SIZES)}"})
    template: str | None = field(default=None, metadata={
        "help": "what the model is shown (default: prompts/ROLE.jinja; from scratch prompts/ROLE_compact.jinja)"})
    max_source_length: int = field(default=1024, metadata={"help": "tokens of the input, the rest is cut off"})
    max_target_length: int = field(default=30, metadata={"help": "tokens of the answer"})
    tokens_per_batch: int | None = field(default=None, metadata={
        "help": "fill a batch with as many examples as pad to this many input tokens (default: as many as "
        "--per_device_train_batch_size says)"})
    dry_run: bool = field(default=False, metadata={
        "help": "only say what the training would be, take and need, measured on a few updates; keeps nothing"})


# The paper's settings are the defaults; models from scratch have their own, chosen on dev variations.
PAPER = dict(per_device_train_batch_size=8, gradient_accumulation_steps=4, adam_epsilon=1e-6, warmup_steps=0)
SCRATCH = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, learning_rate=4e-4, warmup_steps=200,
               adam_beta2=0.98, adam_epsilon=1e-6, max_source_length=320)
RUN = dict(eval_strategy="steps", save_strategy="steps", eval_steps=0.125, save_steps=0.125, save_total_limit=2,
           load_best_model_at_end=True, metric_for_best_model="loss", per_device_eval_batch_size=32,
           train_sampling_strategy="group_by_length", logging_steps=0.125, report_to="none", disable_tqdm=True,
           log_level_replica="error", dataloader_pin_memory=False, ddp_find_unused_parameters=False)


def parse_flags(role: str, options: type, description: str, paper: dict, scratch: dict):
    """(options, Hugging Face's training arguments) from the command line.

    `paper` and `scratch` are the role's own defaults for pretrained models and for those made from scratch. Batch size
    and accumulation come as those of one process, and are handed on as each process's share of the same update.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says
    if processes == 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread one process over all GPUs
    parser = transformers.HfArgumentParser(
        (options, transformers.TrainingArguments), description=description,
        usage=f"train_{role}.py --data FILE [FILE ...] [--model MODEL] [--output-dir FOLDER] [any flag below]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**RUN, **PAPER, **paper, bf16=has_bf16(), output_dir=role,
                        template=str(PROMPTS / f"{role}.jinja"))
    if parser.parse_known_args()[0].model in SIZES:
        parser.set_defaults(**SCRATCH, **scratch, template=str(PROMPTS / f"{role}_compact.jinja"))
    known = parser.parse_args()
    examples = known.per_device_train_batch_size * known.gradient_accumulation_steps
    shares = max(processes, known.gradient_accumulation_steps)
    if shares % processes or shares % known.gradient_accumulation_steps or examples % shares:
        fail(f"{processes} processes cannot share updates of {known.per_device_train_batch_size} × "
             f"{known.gradient_accumulation_steps} examples evenly. Start another number of them, or change "
             "--per_device_train_batch_size or --gradient_accumulation_steps.")
    mine = ["--per_device_train_batch_size", examples // shares, "--gradient_accumulation_steps", shares // processes]
    if known.tokens_per_batch:
        mine += ["--tokens_per_batch", known.tokens_per_batch * known.gradient_accumulation_steps // shares]
    try:
        return parser.parse_args_into_dataclasses([*sys.argv[1:], *map(str, mine)])
    except ValueError as error:  # of flags that do not go together
        fail(f"{error} Change that flag; --help lists them all.")


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bf16. On a CPU it was no faster for small models, at twice the memory."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def check_model(name: str):
    """End the program if `name` is no model that can be loaded; loads no weights."""
    if name in SIZES:
        return
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        fail(f"{name} is not a model folder (it has no config.json). Name another --model.")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        fail(f"the model {name} is neither a folder here nor can it be downloaded. Check its name and the network, or "
             f"build one from scratch with --model {'|'.join(SIZES)}.")
    if not config.is_encoder_decoder:
        fail(f"{name} is no seq2seq model. Name one such as google/flan-t5-large.")


def read_data(options: Options) -> list[Episode]:
    """The annotated episodes of `options.data`, of splits train and dev, in the order of tasks and variations."""
    episodes = sorted((episode for path in options.data for episode in read_episodes(path)),
                      key=lambda episode: (episode["task"], episode["variation"]))
    if any(episode["split"] == "test" for episode in episodes):
        fail("--data holds test episodes. Train on the splits train and dev alone.")
    for episode in episodes:
        if any(step["subgoal"] is None for step in episode["steps"]):
            fail(f"{episode['task']} {episode['variation']} has no sub-goals. Annotate it with annotate.py.")
    if not any(episode["split"] == "dev" for episode in episodes):
        episodes = [{**episode, "split": "train" if i % 20 else "dev"} for i, episode in enumerate(episodes)]
    if not any(episode["split"] == "train" for episode in episodes):
        fail("--data holds no train episode. Add the file that `annotate.py --split train` wrote.")
    return episodes


def teacher_of(episodes: list[Episode]) -> dict:
    """Who named the sub-goals of some trajectories, and what the LLM was asked for that, as in `Episode`'s usage."""
    usages = [episode["usage"] for episode in episodes if "usage" in episode]
    total = {kind: sum(usage[kind] for usage in usages) for kind in ("calls", "prompt_tokens", "completion_tokens")}
    dollars = [usage["dollars"] for usage in usages]
    return {"annotators": sorted({episode.get("annotator", "nobody") for episode in episodes}),
            "trajectories": len(episodes), **total, "dollars": None if None in dollars else sum(dollars)}


def prepared(about: dict, options: Options, make_examples: Callable, tokenizer) -> tuple[dict, dict]:
    """(tokens, notes) of the data, from the file beside it that the first run on this data leaves.

    tokens   arrays: the inputs and the labels of train and dev, each end to end, and how long each is
    notes    tasks and teacher of the training data; how many inputs and labels were cut off; the dev examples as
             texts; without a `tokenizer`, the one that was built from the training data
    """
    key = json.dumps([about, tokenizer and tokenizer.get_vocab()], sort_keys=True).encode()
    for path in (*options.data, annotate.__file__, __file__, inspect.getsourcefile(make_examples)):
        try:
            key += hashlib.sha256(Path(path).read_bytes()).digest()
        except OSError as error:
            fail(f"{path} cannot be read ({error.strerror}). Make it with annotate.py, or name another file.")
    cache = Path(f"{options.data[0]}.{about['role']}-{hashlib.sha256(key).hexdigest()[:12]}.npz")
    if not cache.exists():
        episodes = {"train": [], "dev": []}
        for episode in read_data(options):
            episodes[episode["split"]].append(episode)
        texts = {split: [(render(about["template"], state), answer) for episode in episodes[split]
                         for state, answer in make_examples(episode)] for split in episodes}
        built = None if tokenizer else new_tokenizer([text for example in texts["train"] for text in example])
        tokens, cut = {}, {}
        for split, kind in product(texts, ("inputs", "labels")):
            most = options.max_source_length if kind == "inputs" else options.max_target_length
            column = [example[kind == "labels"] for example in texts[split]]
            rows = [row for start in range(0, len(column), 1000)  # not all at once: the tokenizer takes much memory
                    for row in (tokenizer or built)(column[start : start + 1000]).input_ids]
            cut[f"{split}_{kind}"] = sum(len(row) > most for row in rows)
            rows = [row if len(row) <= most else row[: most - 1] + row[-1:] for row in rows]  # the end mark stays
            tokens[f"{split}_{kind}"] = np.fromiter((token for row in rows for token in row), dtype=np.int32)
            tokens[f"{split}_{kind}_lengths"] = np.array([len(row) for row in rows])
        notes = dict(tasks=sorted({episode["task"] for episode in episodes["train"]}), cut=cut, dev=texts["dev"],
                     teacher=teacher_of(episodes["train"]), tokenizer=built and built.backend_tokenizer.to_str())
        part = cache.with_name(f"{cache.name}.{os.getpid()}")
        try:
            with part.open("wb") as file:
                np.savez(file, notes=np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8), **tokens)
            part.rename(cache)
        except OSError as error:
            fail(f"{part} cannot be written ({error.strerror}). Make room, or put the data where you may write.")
    with np.load(cache) as file:
        tokens = dict(file)
    return tokens, json.loads(tokens.pop("notes").tobytes())


def examples_of(tokens: dict, split: str) -> list[dict]:
    """The examples of a split as the Trainer takes them."""
    inputs, labels = (np.split(tokens[name], tokens[f"{name}_lengths"].cumsum()[:-1])
                      for name in (f"{split}_inputs", f"{split}_labels"))
    return [{"input_ids": i, "labels": label.tolist()} for i, label in zip(inputs, labels, strict=True)]


class Batches:
    """The batches of one process: a batch sampler over updates that are the same however many processes share them.

    An update is a stretch of the examples in order of length, those of about one length shuffled, so that little is
    padded. It is cut into `shares`, one for each process and accumulation step. All follows from seed and epoch alone:
    a run that goes on after a kill is given what it would have been given without.

    lengths   tokens of each input
    examples  of an update; or, if `tokens` is given, as many as pad to at most so many
    shares    of an update, a multiple of `processes`; this is process `rank`
    """

    def __init__(self, lengths, examples: int, tokens: int | None = None, shares=1, seed=0, rank=0, processes=1):
        self.lengths = -(-np.asarray(lengths) // 8)  # in eights: coarse enough to mix
        self.examples, self.tokens, self.shares, self.seed = examples, tokens, shares, seed
        self.rank, self.processes = rank, processes
        self.epoch, self.over = 0, False
        self.count = len(self.updates())

    def updates(self) -> list[np.ndarray]:
        """The updates of this epoch, in order; their number is the same in every epoch."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        updates, start = [], 0
        while start < len(order):
            size = self.tokens // (8 * int(self.lengths[order[start]])) if self.tokens else self.examples
            least = self.shares if self.tokens else size  # the last update is filled up from the one before
            updates.append(order[max(0, min(start, len(order) - least)) : start + max(size, self.shares)])
            start += len(updates[-1])
        longest, *others = updates  # first: too little memory shows at once
        return [longest, *(others[i] for i in generator.permutation(len(others)))]

    def __iter__(self) -> Iterator[list[int]]:
        for update in [] if self.over else self.updates():
            for share in range(self.rank, self.shares, self.processes):
                yield update[share :: self.shares].tolist()

    def __len__(self) -> int:
        return self.count * self.shares // self.processes


def token_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy, averaged over the answer tokens of a whole update: of all its batches and processes.

    T5's own loss averages over each batch, so that accumulated gradients would be a multiple of one large batch's.
    """
    import torch

    loss = torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def answer_losses(logits, labels):
    """(examples, 2): each answer's cross-entropy and number of tokens, for `dev_loss`."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits[0].transpose(1, 2), labels, reduction="none").sum(1)
    return torch.stack([losses, labels.ne(-100).sum(1)], dim=1)


def dev_loss(given: "transformers.EvalPrediction") -> dict:
    """Cross-entropy per answer token, each example counted once however many processes there are."""
    loss, tokens = given.predictions.sum(axis=0)
    return {"loss": loss / tokens}


def fine_tune(role: str, options: Options, training, make_examples: Callable, **more):
    """Train a student on the examples of `options.data` and leave it, tested on dev, in `training.output_dir`.

    `more` is noted in its student.json, with the template and the scores.
    """
    import torch

    be_quiet()
    check_model(options.model)
    output, template = Path(training.output_dir), Path(options.template)
    if not template.is_file():
        fail(f"{template} is not a file. Name a --template such as {PROMPTS / f'{role}.jinja'}.")
    about = dict(role=role, **more, max_source_length=options.max_source_length,
                 max_target_length=options.max_target_length, template=template.read_text())
    tokenizer = None if options.model in SIZES else transformers.AutoTokenizer.from_pretrained(options.model)
    shares = training.gradient_accumulation_steps * training.world_size
    size = dict(examples=training.per_device_train_batch_size * shares,
                tokens=options.tokens_per_batch and options.tokens_per_batch * shares)
    # The first process prepares what the others then find. What it complains of, they need not repeat.
    silent = redirect_stderr(io.StringIO()) if training.process_index else nullcontext()
    with silent, training.main_process_first(local=False):
        tokens, notes = prepared(about, options, make_examples, tokenizer)
        if len(tokens["train_inputs_lengths"]) < shares:
            fail(f"--data holds fewer train examples than the {shares} batches of an update. Add more.")
        about |= dict(base=options.model, tasks=notes["tasks"], teacher=notes["teacher"])
        resume = None if options.dry_run else last_checkpoint(output, fingerprint(about, tokens, training, size))

    transformers.set_seed(training.seed)
    if tokenizer:
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(options.model)
    else:
        tokenizer = loaded_tokenizer(notes["tokenizer"])
        model = new_model(options.model, len(tokenizer))
    about |= dict(parameters=model.num_parameters(), train_examples=len(tokens["train_inputs_lengths"]),
                  dev_examples=len(tokens["dev_inputs_lengths"]))
    name = f"{output.stem} ({about['parameters'] / 1e6:.1f} M parameters)"
    train, dev = (examples_of(tokens, split) for split in ("train", "dev"))
    batches = Batches(tokens["train_inputs_lengths"], **size, shares=shares, seed=training.seed,
                      rank=training.process_index, processes=training.world_size)
    collator = transformers.DataCollatorForSeq2Seq(
        tokenizer, model=model, pad_to_multiple_of=8 if training.bf16 else None)  # what a GPU's kernels like
    with tempfile.TemporaryDirectory() as nowhere:
        if options.dry_run:
            training.output_dir = nowhere
        trainer = transformers.Trainer(
            model=model, args=training, processing_class=tokenizer, train_dataset=train, eval_dataset=dev,
            data_collator=collator, compute_loss_func=token_loss, preprocess_logits_for_metrics=answer_losses,
            compute_metrics=dev_loss)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(progress_callback(name, batches))
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            train, batch_sampler=batches, collate_fn=collator, num_workers=training.dataloader_num_workers,
            pin_memory=training.dataloader_pin_memory)
        if options.dry_run:
            return forecast(name, trainer, batches, tokens, notes["cut"])
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model()  # by all processes, as each may hold a part of the weights
    if not trainer.is_world_process_zero():
        return
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(output).to(training.device).eval()
    given = answers(model, tokenizer, [text for text, _ in notes["dev"]], about, beams=1)
    exact = sum(best == target for (best,), (_, target) in zip(given, notes["dev"], strict=True)) / len(dev)
    loss = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    about |= dict(dev_loss=loss, dev_exact_match=exact)
    (output / ABOUT).write_text(json.dumps(about, indent=1))
    print(f"{output}: exact match {exact:.1%} and loss {loss:.3f} on {len(dev)} dev examples")


def progress_callback(name: str, batches: Batches) -> "transformers.TrainerCallback":
    """Tells `batches` the epoch, prints a line at every evaluation, and leaves a checkpoint on SIGTERM.

    Lines, not a bar, as several students may train side by side.
    """

    class Progress(transformers.TrainerCallback):
        def on_train_begin(self, training, state, control, **_):
            self.started, self.first, self.stopped = time.time(), state.global_step, False
            self.say = print if state.is_world_process_zero else lambda *_, **__: None
            if training.world_size == 1:  # several might save at different steps, and wait for each other
                self.default = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))
            resumed = f", going on from step {self.first}" if self.first else ""
            self.say(f"{name}: {state.max_steps} steps{resumed}", flush=True)

        def on_epoch_begin(self, training, state, control, **_):
            batches.epoch = state.global_step // batches.count
            batches.over = state.global_step >= state.max_steps  # the Trainer itself would train on

        def on_step_end(self, training, state, control, **_):
            control.should_log |= control.should_evaluate  # for the line that on_evaluate prints
            control.should_save |= self.stopped

        def on_save(self, training, state, control, **_):
            if self.stopped:
                stop(f"{name}: stopped at step {state.global_step}. The same command goes on from there.", 143)

        def on_train_end(self, training, state, control, **_):
            if training.world_size == 1:
                signal.signal(signal.SIGTERM, self.default)

        def on_evaluate(self, training, state, control, metrics, **_):
            pace = (time.time() - self.started) / max(1, state.global_step - self.first)
            left = round(pace * (state.max_steps - state.global_step))
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self.say(f"{name}: step {state.global_step} of {state.max_steps}, loss {float(losses[-1]):.3f} on train "
                     f"and {metrics['eval_loss']:.3f} on dev, {left // 60}:{left % 60:02} left", flush=True)

    return Progress()


def forecast(name: str, trainer, batches: Batches, tokens: dict, cut: dict):
    """Print what the training would be and need, after some of its updates on this device; nothing of them is kept."""
    import torch

    training, moments = trainer.args, []
    cuda = training.device.type == "cuda"
    updates = batches.updates()
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * len(updates))

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, training, state, control, **_):
            if cuda:
                torch.cuda.synchronize()
            moments.append(time.time())
            control.should_training_stop |= len(moments) > 2 and moments[-1] - moments[0] > MEASURED

    trainer.add_callback(Clock)
    training.max_steps, training.eval_strategy, training.save_strategy = min(steps, 1000), "no", "no"
    training.load_best_model_at_end = False
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    measured = [index for update in updates[2 : len(moments)] for index in update]  # the first ones warm up
    lengths = {kind: tokens[f"train_{kind}_lengths"] for kind in ("inputs", "labels")}
    pace = lengths["inputs"][measured].sum() / (moments[-1] - moments[1])
    evaluations = 1 / training.eval_steps if training.eval_steps < 1 else steps / training.eval_steps
    read = steps / len(updates) * lengths["inputs"].sum() + evaluations * tokens["dev_inputs"].size / 3  # forward alone
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parts = [update[share :: batches.shares] for update in updates for share in range(batches.shares)]
    print(f"{name} on {training.world_size} × {torch.cuda.get_device_name() if cuda else 'CPU'}\n"
          f"examples  {len(lengths['inputs']):,} to train on, {len(tokens['dev_inputs_lengths']):,} of dev")
    for kind, word in (("inputs", "inputs"), ("labels", "answers")):
        padded = sum(len(part) * lengths[kind][part].max() for part in parts)
        print(f"{word:8}  {lengths[kind].sum():,} tokens an epoch, {padded:,} with padding; "
              f"{cut[f'train_{kind}']:,} of them are cut to {lengths[kind].max()} tokens")
    print(f"steps     {steps:,}: {steps / len(updates):.1f} epochs of {len(updates):,} updates, each of "
          f"{len(lengths['inputs']) / len(updates):.1f} examples in {batches.shares} batches\n"
          f"memory    {16 * trainer.model.num_parameters() / 1e9:.1f} GB for weights, gradients and AdamW, "
          f"{peak / 1e9:.1f} GB in all while it was measured, the longest inputs included\n"
          f"time      {read / pace / 3600:.2f} hours at {pace:,.0f} input tokens a second, dev included")


def fingerprint(about: dict, tokens: dict, training, size: dict) -> str:
    """A hash of everything that decides what a checkpoint is a checkpoint of; not how many processes share the work."""
    settings = {key: value for key, value in training.to_dict().items() if not key.startswith(("logging", "output"))}
    settings |= dict(per_device_train_batch_size=size, gradient_accumulation_steps=None)
    key = hashlib.sha256(json.dumps([about, settings], default=str).encode())
    for name in sorted(tokens):
        key.update(tokens[name].tobytes())
    return key.hexdigest()


def last_checkpoint(output: Path, settings: str) -> Path | None:
    """The newest whole checkpoint, to go on from; ends the program if the folder is of a run with other settings."""
    output.mkdir(parents=True, exist_ok=True)
    mark = output / "settings.sha256"
    if mark.exists() and mark.read_text() != settings:
        fail(f"{output} holds a model of other settings or data. Delete it, or name another --output-dir.")
    mark.write_text(settings)
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    whole = [folder for folder in checkpoints if (folder / "trainer_state.json").exists()]  # what is written last
    for folder in set(checkpoints) - set(whole):
        shutil.rmtree(folder)
    return whole[-1] if whole else None


def main():
    paper, scratch = dict(learning_rate=4e-4, num_train_epochs=20), dict(num_train_epochs=7)
    options, training = parse_flags("subgoal", Options, __doc__, paper, scratch)
    fine_tune("subgoal", options, training, subgoal_examples)


if __name__ == "__main__":
    main()
