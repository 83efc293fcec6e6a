"""Real tokens a second of our training, next to the peers' 8 inputs padded to 1,024 tokens. A benchmark, not a test.

    make bench-train                                                       one trajectory of each task, collected first
    python tests/benchmark_train.py --data runs/paper/train.jsonl --model flan-t5-large --updates 20

All ways train one model on the same examples in updates of 32 (8 × 4, the paper's), turn by turn; ours also by the
library's attention. Tokens are those of inputs and answers, without padding. The device's peak is that of a large
matrix product in the same run and precision.
"""

import argparse
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from conftest import ROOT, run

from annotate import read_episodes
from train_action import action_examples
from train_subgoal import SIZES, Order, new_model, new_tokenizer, render, token_loss

SIZES["flan-t5-large"] = dict(d_model=1024, d_kv=64, num_heads=16, d_ff=2816, num_layers=24, num_decoder_layers=24,
                              feed_forward_proj="gated-gelu")  # 0.75 G parameters, with random weights
SOURCE, TARGET = 1024, 30
cuda = torch.cuda.is_available()


def operations(model, source: int, target: int) -> float:
    """Floating-point operations of one training step on one example of `source` and `target` tokens.

    Six for each weight and each token that it meets, two forward and four backward (Kaplan et al. 2020, section 2.1):
    the encoder's weights and the cross-attention's keys and values meet the source, the rest the target. Attention:
    12 · width · queries · keys for each layer (PaLM, Chowdhery et al. 2022, appendix B).
    """
    config = model.config
    width = config.num_heads * config.d_kv
    encoder = sum(weight.numel() for weight in model.encoder.block.parameters())
    decoder = sum(weight.numel() for weight in model.decoder.block.parameters())
    crossing = config.num_decoder_layers * 2 * width * config.d_model
    head = config.vocab_size * config.d_model
    weights = (encoder + crossing) * source + (decoder - crossing + head) * target
    pairs = config.num_layers * source**2 + config.num_decoder_layers * (target**2 + source * target)
    return 6 * weights + 12 * width * pairs


def peak(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the fastest of ten large matrix products."""
    size = 8192 if cuda else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: left @ right) for _ in range(10))


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="annotated episodes (default: one trajectory of each task is collected)")
    parser.add_argument("--model", choices=SIZES, default="flan-t5-large" if cuda else "tiny")
    parser.add_argument("--updates", type=int, default=8, help="of 32 examples, measured each way")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or str(Path(folder) / "all.jsonl")
        if not args.data:
            run("annotate.py", "--tasks", "all", "--variations", 1, "--annotator", "rules", "--output", data)
        episodes = read_episodes(data)
    template = (ROOT / "prompts" / "action.jinja").read_text()
    texts = [(render(template, state), action) for episode in episodes for state, action in action_examples(episode)]
    tokenizer = new_tokenizer([text for example in texts for text in example], [])
    examples = [dict(input_ids=tokenizer(text, truncation=True, max_length=SOURCE).input_ids,
                     labels=tokenizer(action, truncation=True, max_length=TARGET).input_ids) for text, action in texts]
    lengths = [len(example["input_ids"]) for example in examples]

    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = new_model(args.model, len(tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    collate = transformers.DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=8 if cuda else None)

    def ours(indices: list[int]) -> dict:
        return collate([dict(examples[i]) for i in indices]).to(device)

    def peers(indices: list[int]) -> dict:
        batch, pad = ours(indices), torch.nn.functional.pad
        longer, labels = SOURCE - batch["input_ids"].shape[1], batch["labels"]
        labels = pad(labels, (0, TARGET - labels.shape[1]), value=-100)
        return dict(input_ids=pad(batch["input_ids"], (0, longer)), labels=labels,
                    attention_mask=pad(batch["attention_mask"], (0, longer)),
                    decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels))

    def update(batches: list[list[int]], way, attention: str):
        model.set_attn_implementation(attention)
        count = sum(len(examples[i]["labels"]) for batch in batches for i in batch)
        for indices in batches:
            batch = way(indices)
            labels = batch.pop("labels")
            with torch.autocast(device, dtype) if cuda else nullcontext():
                outputs = model(**batch)
            token_loss(outputs, labels, count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    # Of an epoch's updates in order of length, as many as asked for, evenly spread: they stand for all the data.
    updates = np.reshape([example for _, example in Order(lengths, 32, seed=0)], (-1, 32))
    updates = sorted(updates.tolist(), key=lambda update: lengths[update[0]])
    updates = [updates[(2 * i + 1) * len(updates) // (2 * args.updates)] for i in range(args.updates)]
    by_length = np.reshape(updates, (-1, 4, 8)).tolist()
    mixed = np.random.default_rng(0).permutation(np.ravel(updates)).reshape(-1, 4, 8).tolist()
    ways = {"by length, padded to the batch": (by_length, ours, "unscaled"),
            "… by transformers' attention": (by_length, ours, "eager"),
            "8 × 1,024, padded to the end": (mixed, peers, "eager")}
    spent = Counter()
    for n in range(-1, args.updates):  # -1, the last, warms up
        for name, (batches, way, attention) in ways.items():
            spent[name] += (n >= 0) * seconds(partial(update, batches[n], way, attention))

    sizes = [(lengths[i], len(examples[i]["labels"])) for update in updates for i in update]
    tokens, work = sum(map(sum, sizes)), sum(operations(model, *size) for size in sizes)
    most, average = peak(device, dtype), sum(source for source, _ in sizes) / len(sizes)
    print(f"{args.model}, {model.num_parameters() / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')}, on "
          f"{torch.cuda.get_device_name() if cuda else 'CPU'}: {most / 1e12:.2f} TFLOP/s at most\n"
          f"{len(sizes)} of {len(examples)} examples; their inputs hold {average:.0f} tokens on average, "
          f"those of all {sum(lengths) / len(lengths):.0f}")
    *_, last = spent.values()
    for name, took in spent.items():
        print(f"{name:31} {tokens / took:10,.0f} tokens a second, {work / took / most:6.1%} of the peak, "
              f"{last / took:.2f} times the last")


if __name__ == "__main__":
    main()
