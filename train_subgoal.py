#!/usr/bin/env python3
"""Stage 2: the sub-goal generator (the planner), fine-tuned to name the sub-goal of the next step.

    reads   --data, the annotated episodes of stage 1, and --template, the text that the model is shown
    writes  --output-dir, a model folder: weights, tokenizer, the template, scores.json

    python train_subgoal.py --data train.jsonl dev.jsonl --model tiny --output-dir subgoal
    python train_subgoal.py --data train.jsonl dev.jsonl --model google/flan-t5-large --output-dir subgoal --bf16
    torchrun --nproc-per-node 8 train_subgoal.py --data train.jsonl dev.jsonl --model google/flan-t5-large …

Every flag of Hugging Face's Seq2SeqTrainingArguments works. A run that was killed goes on from its last checkpoint when
the same command is given again. Stage 3 trains the action generator with the functions of this file.
"""

import argparse
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path

import huggingface_hub
import jinja2
import transformers  # loads its parts, and PyTorch, only when they are used

from annotate import PROMPTS, Episode, Step, fail, read_episodes, room_of

HISTORY = 10  # the last ten actions are shown (the paper's number)
UNTRAINED = re.compile(r"look around|close door .*")  # the expert's steps that are left out, as in the paper

# T5s built from scratch, by name: d_model, layers of encoder and decoder, heads of 32 (tiny, small) or 64 dimensions.
SIZES = {
    "tiny": dict(d_model=128, d_kv=32, num_heads=4, d_ff=512, num_layers=2, num_decoder_layers=2),
    "small": dict(d_model=256, d_kv=32, num_heads=8, d_ff=1024, num_layers=3, num_decoder_layers=3),
    "medium": dict(d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=6, num_decoder_layers=6),
}
VOCABULARY = 4096  # tokens of a tokenizer built from scratch, at most
BATCH = 64  # answers generated at a time
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
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


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


# The paper's settings are the defaults; models from scratch have their own, chosen on dev variations.
PAPER = dict(per_device_train_batch_size=8, gradient_accumulation_steps=4, adam_epsilon=1e-6, warmup_steps=0)
SCRATCH = dict(per_device_train_batch_size=16, gradient_accumulation_steps=1, learning_rate=4e-4, warmup_steps=200,
               adam_beta2=0.98, adam_epsilon=1e-6, max_source_length=320)
RUN = dict(eval_strategy="steps", save_strategy="steps", eval_steps=0.125, save_steps=0.125, save_total_limit=1,
           load_best_model_at_end=True, metric_for_best_model="loss", per_device_eval_batch_size=32,
           train_sampling_strategy="group_by_length", logging_steps=0.125, report_to="none", disable_tqdm=True,
           dataloader_pin_memory=False)


def parse_flags(role: str, options: type, description: str, paper: dict, scratch: dict):
    """(options, Hugging Face's training arguments) from the command line.

    `paper` and `scratch` are the role's own defaults for pretrained models and for those made from scratch.
    """
    parser = transformers.HfArgumentParser(
        (options, transformers.Seq2SeqTrainingArguments), description=description,
        usage=f"train_{role}.py --data FILE [FILE ...] [--model MODEL] [--output-dir FOLDER] [any flag below]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**RUN, **PAPER, **paper, bf16=has_bf16(), output_dir=role,
                        template=str(PROMPTS / f"{role}.jinja"))
    known, _ = parser.parse_known_args()
    if known.model in SIZES:
        parser.set_defaults(**SCRATCH, **scratch, template=str(PROMPTS / f"{role}_compact.jinja"))
    return parser.parse_args_into_dataclasses()


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


def fine_tune(role: str, options: Options, training, make_examples, **more):
    """Train a student on the examples of `options.data` and leave it, tested on dev, in `training.output_dir`.

    `more` is noted in its student.json, with the template and the scores.
    """
    be_quiet()
    check_model(options.model)
    template = Path(options.template)
    if not template.is_file():
        fail(f"{template} is not a file. Name a --template such as {PROMPTS / f'{role}.jinja'}.")
    text, episodes = template.read_text(), read_data(options)
    train, dev = ([(render(text, state), answer) for episode in episodes if episode["split"] == split
                   for state, answer in make_examples(episode)] for split in ("train", "dev"))
    output = Path(training.output_dir)
    taught = [episode for episode in episodes if episode["split"] == "train"]
    about = dict(role=role, **more, base=options.model, max_source_length=options.max_source_length,
                 max_target_length=options.max_target_length, template=text,
                 tasks=sorted({episode["task"] for episode in taught}), teacher=teacher_of(taught))
    resume = last_checkpoint(output, fingerprint(about, train, training))

    transformers.set_seed(training.seed)
    if options.model in SIZES:
        tokenizer = new_tokenizer([text for example in train for text in example])
        model = new_model(options.model, len(tokenizer))
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(options.model)

    def encoded(examples):
        texts, targets = zip(*examples, strict=True)
        inputs = tokenizer(list(texts), truncation=True, max_length=options.max_source_length).input_ids
        labels = tokenizer(list(targets), truncation=True, max_length=options.max_target_length).input_ids
        return [{"input_ids": i, "labels": label} for i, label in zip(inputs, labels, strict=True)]

    trainer = transformers.Seq2SeqTrainer(
        model=model, args=training, processing_class=tokenizer, train_dataset=encoded(train), eval_dataset=encoded(dev),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(progress_callback(f"{output.stem} ({model.num_parameters() / 1e6:.1f} M parameters)"))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    if not trainer.is_world_process_zero():
        return
    model.eval()
    given = answers(model, tokenizer, [text for text, _ in dev], about, beams=1)
    exact = sum(best == target for (best,), (_, target) in zip(given, dev, strict=True)) / len(dev)
    loss = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    trainer.save_model()
    about |= dict(parameters=model.num_parameters(), train_examples=len(train), dev_examples=len(dev), dev_loss=loss,
                  dev_exact_match=exact)
    (output / ABOUT).write_text(json.dumps(about, indent=1))
    print(f"{output}: exact match {exact:.1%} and loss {loss:.3f} on {len(dev)} dev examples")


def progress_callback(name: str) -> "transformers.TrainerCallback":
    """Prints a line at every evaluation. Lines, not a bar, as several students may train side by side."""

    class Progress(transformers.TrainerCallback):
        def on_train_begin(self, training, state, control, **_):
            self.started, self.first = time.time(), state.global_step
            resumed = f", going on from step {self.first}" if self.first else ""
            print(f"{name}: {state.max_steps} steps{resumed}", flush=True)

        def on_evaluate(self, training, state, control, metrics, **_):
            pace = (time.time() - self.started) / max(1, state.global_step - self.first)
            left = round(pace * (state.max_steps - state.global_step))
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            print(f"{name}: step {state.global_step} of {state.max_steps}, loss {float(losses[-1]):.3f} on train "
                  f"and {metrics['eval_loss']:.3f} on dev, {left // 60}:{left % 60:02} left", flush=True)

    return Progress()


def fingerprint(about: dict, train: list, training) -> str:
    """A hash of everything that decides what a checkpoint is a checkpoint of."""
    settings = {key: value for key, value in training.to_dict().items() if not key.startswith(("logging", "output"))}
    return hashlib.sha256(json.dumps([about, train, settings], default=str).encode()).hexdigest()


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
    paper, scratch = dict(learning_rate=4e-4, num_train_epochs=20), dict(num_train_epochs=5)
    options, training = parse_flags("subgoal", Options, __doc__, paper, scratch)
    fine_tune("subgoal", options, training, subgoal_examples)


if __name__ == "__main__":
    main()
