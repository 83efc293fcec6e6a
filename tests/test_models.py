"""Students of any architecture, whole and by LoRA: small random models, by the real scripts."""

import json
from functools import partial

import pytest
import torch
from conftest import kill_when, run
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer, DataCollatorForSeq2Seq, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM,
    Qwen3Config, Qwen3ForCausalLM, T5GemmaConfig, T5GemmaForConditionalGeneration, TrainingArguments
)

from annotate import read_episodes
from evaluate import Student
from train_action import action_examples
from train_subgoal import (
    ABOUT, PROMPTS, Examples, answers, examples_of, frame_of, make_trainer, model_class, new_model, new_tokenizer,
    question_tokens, render, state_of, token_loss, with_adapters
)

DECODERS = ["llama", "qwen3", "gemma3"]
ARCHITECTURES = ["t5", "t5gemma", *DECODERS]
CHAT = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
TEMPLATE = (PROMPTS / "action_compact.jinja").read_text()


@pytest.fixture(scope="module")
def texts(data) -> list[tuple[str, str]]:
    """(question, answer) of the executor."""
    return [(render(TEMPLATE, state), answer) for episode in read_episodes(data)
            for state, answer in action_examples(episode)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, texts) -> dict:
    """A folder of each architecture: random weights, a small tokenizer, for Qwen a chat template, too."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer([text for example in texts for text in example], [])
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=32,
                 num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    windows = dict(sliding_window=64, query_pre_attn_scalar=32)
    kinds = ["sliding_attention", "full_attention"]
    half = {**shape, **windows, "layer_types": kinds}
    models = {
        "t5": new_model("nano", len(tokenizer)),
        "t5gemma": T5GemmaForConditionalGeneration(T5GemmaConfig(
            encoder=half, decoder=half, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=1)),
        "llama": LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**shape)),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**shape, **windows, layer_types=kinds)),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        tokenizer.chat_template = CHAT if name == "qwen3" else None
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def loaded(folder) -> tuple:
    """(model, tokenizer, what student.json would say) of a folder."""
    model, tokenizer = model_class(folder).from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    frame = frame_of(tokenizer, not model.config.is_encoder_decoder)
    return model, tokenizer, dict(frame=frame, max_source_length=256, max_target_length=20)


def flags(model, data, output, *more) -> list:
    return ["--data", data, "--model", model, "--template", PROMPTS / "action_compact.jinja", "--max_steps", 4,
            "--eval_steps", 4, "--save_steps", 4, "--per_device_train_batch_size", 4, "--max_source_length", 256,
            "--gradient_accumulation_steps", 1, "--output_dir", output, *more]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_students_train_on_any_architecture_and_play(tmp_path, folders, data, name):
    run("train_subgoal.py", *flags(folders[name], data, tmp_path / "subgoal"))
    run("train_action.py", *flags(folders[name], data, tmp_path / "action", "--lora", 4))
    assert not list((tmp_path / "action").glob("adapter*")), "what LoRA leaves is an ordinary folder"
    run("evaluate.py", "--tasks", "7-1", "--variations", 1, "--subgoal-model", tmp_path / "subgoal", "--action-model",
        tmp_path / "action", "--beams", 2, "--output", tmp_path / "e.jsonl")
    assert len(read_episodes(tmp_path / "e.jsonl")) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_of_the_answer_and_its_end_mark_alone(folders, texts, name):
    model, tokenizer, about = loaded(folders[name])
    decoder = not model.config.is_encoder_decoder
    for text, answer in texts[:20]:
        [example] = examples_of(tokenizer, [(text, answer)], about, decoder)
        learned = [label for label in example["labels"] if label != -100]
        assert tokenizer.decode(learned[:-1]).strip() == answer and learned[-1] == tokenizer.eos_token_id
        if decoder:  # every label stands where the token before it is read
            written = example["input_ids"][example["labels"].index(learned[0]) + 1 :]
            assert written == learned[:-1]


def trainer_on(folder, texts: list[tuple], output) -> tuple:
    """The trainer of a model folder on some texts, eight in a batch; and the model."""
    model, tokenizer, about = loaded(folder)
    tokenise = partial(examples_of, tokenizer, about=about, decoder=not model.config.is_encoder_decoder)
    training = TrainingArguments(str(output), per_device_train_batch_size=8, max_steps=1, logging_steps=1,
                                 dataloader_pin_memory=False, report_to="none", eval_strategy="no", use_cpu=True)
    examples = Examples([(*text, {}, ("", "new")) for text in texts], tokenise, [], 0, 0)
    return make_trainer(model, tokenizer, training, examples, None, None), model


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_computed_of_answers_alone_and_the_trainers_loss_is_that_of_all(tmp_path, folders, texts, name):
    trainer, model = trainer_on(folders[name], texts[:8], tmp_path)
    examples = [trainer.train_dataset[0, i] for i in range(8)]
    everywhere = DataCollatorForSeq2Seq(trainer.processing_class, model)(examples)
    labels = everywhere.pop("labels")
    expected = token_loss(model(**everywhere), labels).item()
    computed = trainer.model(**next(iter(trainer.get_train_dataloader()))).logits.shape[1]
    assert computed < everywhere["input_ids"].shape[1] / 2
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_have_few_lengths_as_each_new_one_keeps_a_cpus_memory(tmp_path, folders, texts, name):
    trainer, _ = trainer_on(folders[name], texts[:60], tmp_path)
    assert {batch["input_ids"].shape[1] % 8 for batch in trainer.get_train_dataloader()} == {0}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_long_question_loses_its_end_and_not_what_frames_it(folders, name):
    _, tokenizer, about = loaded(folders[name])
    [short], [long] = (question_tokens(tokenizer, [text], about) for text in ("go", "go " * 1000))
    before, between, _ = about["frame"]
    assert len(long) == 256 and long[: len(before)] == before and long[len(long) - len(between) :] == between
    assert short[: len(before)] == before and short[len(short) - len(between) :] == between


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_answer_does_not_depend_on_what_shares_its_batch(folders, texts, name):
    model, tokenizer, about = loaded(folders[name])
    questions = [text for text, _ in texts[:6]] + ["go"]
    together = answers(model, tokenizer, questions, about, beams=1)
    assert together == [answers(model, tokenizer, [question], about, beams=1)[0] for question in questions]


@pytest.mark.parametrize("engine", ["ctranslate2", "transformers"])
def test_beams_are_in_the_order_of_the_whole_answers_likelihood(tmp_path, engine):
    tokenizer = new_tokenizer([], ["a", "b", "c", "d"])
    tokenizer.bos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # The next word depends on the last one alone: of "b" the likelihood is 0.45, of "a c d" 0.27, but a word's more.
    follows = {"<pad>": {"▁a": 0.55, "▁b": 0.45}, "▁a": {"▁c": 0.7, "</s>": 0.3}, "▁c": {"▁d": 0.7, "▁c": 0.3}}
    likelihoods = [[follows.get(last, {"</s>": 1}).get(word, 1e-9) for last in words] for word in words]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=len(words), intermediate_size=6,
                                         num_hidden_layers=1, num_attention_heads=1, head_dim=6))
    for name, weight in model.named_parameters():
        torch.nn.init.constant_(weight, float("norm" in name))
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    model.lm_head.weight.data = torch.tensor(likelihoods).log() / len(words)**0.5  # what norms make of a row of eye_
    model.save_pretrained(tmp_path)
    (tmp_path / ABOUT).write_text(json.dumps(dict(
        role="action", template="{{ text }}", frame=[[], [0], [1]], max_source_length=9, max_target_length=9,
        habits={}, wordings=[], unshown=[])))
    student = Student(tmp_path, "action", engine)
    states = [{**state_of("", [], "", ""), "text": text} for text in ("c", "a b")]
    assert student.answers(states, beams=5, best=3) == 2 * [["b", "a c d", "a"]]
    assert student.engine == engine
    likely = [student.likelihood(states[0], answer) for answer in ("b", "a c d", "a")]
    assert likely == pytest.approx([0.45, 0.55 * 0.7 * 0.7, 0.55 * 0.3], rel=0.02)


def test_merged_adapters_answer_as_unmerged_ones(folders, texts):
    """Told by the likelihood of each token: beams of a random model differ by so little that rounding reorders them."""
    @torch.inference_mode()
    def likelihoods(model):
        return torch.cat([model(torch.tensor([row])).logits[0].log_softmax(-1) for row in questions])

    torch.manual_seed(0)
    model, tokenizer, about = loaded(folders["llama"])
    questions = question_tokens(tokenizer, [text for text, _ in texts[:6]], about)
    plain = likelihoods(model)
    model = with_adapters(model, 4).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    adapted = likelihoods(model)
    torch.testing.assert_close(likelihoods(model.merge_and_unload()), adapted, rtol=0, atol=0.01)
    assert (plain - adapted).abs().max() > 0.1


@pytest.mark.parametrize("script, model, more", [
    ("train_subgoal.py", "nano", []), ("train_action.py", "nano", []), ("train_action.py", "llama", ["--lora", 4])])
def test_a_killed_training_goes_on_and_ends_with_the_weights_of_one_that_was_not(
        tmp_path, folders, data, script, model, more):
    killed, whole = (
        flags(folders.get(model, model), data, tmp_path / name, *more, "--max_steps", 40, "--eval_steps", 5,
              "--save_steps", 5, "--per_device_train_batch_size", 16, "--learning_rate", 1e-3)
        for name in ("killed", "whole"))
    kill_when(script, *killed, ready=lambda: list(tmp_path.glob("killed/checkpoint-*/trainer_state.json")))
    assert "going on from step" in run(script, *killed).stdout
    run(script, *whole)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = (json.loads((tmp_path / name / ABOUT).read_text()) for name in ("killed", "whole"))
    assert one == other


@pytest.mark.parametrize("config", [
    dict(model_type="bert", architectures=["BertForMaskedLM"]),
    dict(model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"]),
])
def test_a_model_that_does_not_write_text_after_text_is_refused_in_a_sentence(tmp_path, data, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = run("train_subgoal.py", "--data", data, "--model", tmp_path, "--output_dir", tmp_path / "out", code=2)
    assert "does not write text after text" in refused.stderr and refused.stderr.strip().count("\n") == 0
