"""Other models through settings alone: tiny Qwen-, Mistral- and Gemma-style policies, score models that are classifiers.

Each policy has what is awkward about its family: a tokenizer without BOS or with one that the chat template writes as well, a
template that adds a system turn or refuses one, several end tokens, no pad token, tied embeddings, sliding windows, and a
generation_config.json that bends decoding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from fake_scorer import FakeScorer
from scorer_process import running
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignment.conversation import get_template, load_tokenizer
from alignment.errors import UserError
from alignment.evaluation import classify_reward_cost_unified as classify
from alignment.generation import TransformersEngine
from alignment.GRPO.turns import own_turn
from alignment.records import read_json, read_jsonl, write_jsonl
from alignment.scoring.client import ScorerClient
from alignment.scoring.local_scorer import LocalScorer

REPO = Path(__file__).resolve().parents[1]
FAMILIES = ("qwen2", "qwen3_base", "mistral", "gemma2", "gemma3")

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_level_tokenizer(folder: Path, eos: str) -> None:
    """As Qwen's: bytes, no BOS, no <unk>, ChatML's tokens behind the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # 256, 257, 258
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(str(folder))


def sentence_piece_tokenizer(folder: Path, template: str, more: list[str], pad: bool) -> None:
    """As Mistral's and Gemma's: BOS in front of every text, and in the chat template, too."""
    from tokenizers.processors import TemplateProcessing

    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = template
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(str(folder))


def make_policy(family: str, folder: Path) -> None:
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 512, "initializer_range": 0.5}
    if family.startswith("qwen"):
        # A base model has a chat template too, and neither tokenizer nor generation config names its <|im_end|>.
        base = family.endswith("base")
        byte_level_tokenizer(folder, "<|endoftext|>" if base else "<|im_end|>")
        ends = {"eos_token_id": 256 if base else 258, "pad_token_id": 256, "bos_token_id": None}
        small = sizes | {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 264}
        config = t.Qwen3Config(**small, head_dim=16, **ends) if base else t.Qwen2Config(**small, **ends)
        model = t.AutoModelForCausalLM.from_config(config)
        told = {
            "repetition_penalty": 1.5,
            "top_k": 5,
            "top_p": 0.8,
            "do_sample": True,
            "num_beams": 3,
            "min_new_tokens": 5,
        }
        told |= {"suppress_tokens": list(range(200)), "exponential_decay_length_penalty": [1, 5.0], "min_p": 0.9}
        told |= {"eos_token_id": 256 if base else [258, 256]}
    else:
        more = [] if family == "mistral" else ["<start_of_turn>", "<end_of_turn>"]  # 355, 356
        sentence_piece_tokenizer(folder, INST if family == "mistral" else GEMMA, more, pad=family != "mistral")
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None if family == "mistral" else 3}
        small = sizes | {"vocab_size": 360, "sliding_window": 8, "num_key_value_heads": 1, **ends}
        config = {
            "mistral": lambda: t.MistralConfig(**small, tie_word_embeddings=False),
            "gemma2": lambda: t.Gemma2Config(**small, head_dim=16),
            "gemma3": lambda: t.Gemma3TextConfig(**small, head_dim=16),
        }[family]()
        model = t.AutoModelForCausalLM.from_config(config)
        told = {"mistral": {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}}.get(
            family, {"eos_token_id": [2, 356], "cache_implementation": "hybrid", "do_sample": True, "top_k": 64}
        )
    model.save_pretrained(str(folder))
    (folder / "generation_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """A policy folder by family; made when first asked for."""
    folders = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(3)
            make_policy(family, folders[family])
        return folders[family]

    return get


def ids_by_transformers(tokenizer, prompt: str) -> list[int]:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def greedy_by_hand(folder: Path, prompt: str, ends: set[int], longest: int) -> list[int]:
    """The most likely token, again and again, with nothing of generation_config.json."""
    model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    ids = ids_by_transformers(AutoTokenizer.from_pretrained(str(folder)), prompt)
    new: list[int] = []
    while len(new) < longest and (not new or new[-1] not in ends):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_ids_that_transformers_gives_them(policies, family):
    tokenizer = load_tokenizer(policies(family))
    template = get_template("chat", tokenizer)
    for prompt in ("Hi", "two\nlines, ünd 👋", "USER: what does ASSISTANT: mean?", "[INST] <s> <|im_end|>"):
        assert template.encode_prompt(tokenizer, prompt) == ids_by_transformers(tokenizer, prompt)


@pytest.mark.parametrize(
    ("family", "closing", "stops", "next_turn"),
    [
        ("qwen2", "<|im_end|>\n", ["<|im_end|>", "<|im_start|>"], ""),
        ("mistral", "</s>", ["</s>"], "[INST]"),
        ("gemma2", "<end_of_turn>\n", ["<end_of_turn>", "<start_of_turn>"], ""),
    ],
)
def test_where_a_turn_ends_is_read_off_the_template(policies, family, closing, stops, next_turn):
    tokenizer = load_tokenizer(policies(family))
    template = get_template("chat", tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(template.stops)) == stops
    assert template.next_turn == next_turn

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    finished, cut_off = (template.encode_conversation(tokenizer, "Hi", "Yes.", done) for done in (True, False))
    assert finished.ids == whole and tokenizer.apply_chat_template(turns, tokenize=False).endswith(closing)
    assert cut_off.ids == whole[: len(whole) - finished.closing]
    short = template.encode_conversation(tokenizer, "Hi", "Yes, certainly.", max_length=len(whole) - 2)
    assert short.truncated and len(short.ids) == len(whole) - 2
    assert short.ids[-finished.closing :] == whole[-finished.closing :]


def test_the_next_users_turn_is_cut_where_the_template_marks_it_with_words(policies):
    template = get_template("chat", load_tokenizer(policies("mistral")))
    assert template.cut_first_turn("Yes. [INST] And you?") == ("Yes.", True)
    assert template.cut_first_turn("Yes.[INST] And you?") == ("Yes.", True)
    assert template.cut_first_turn("USER: is a word here") == ("USER: is a word here", False)
    tokenizer = load_tokenizer(policies("qwen2"))
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    assert get_template("chat", tokenizer).next_turn == "<|user|>"
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    with pytest.raises(UserError, match="cannot render two turns: one turn only"):
        get_template("chat", tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_a_loop_by_hand(policies, family):
    engine = TransformersEngine(policies(family), template="chat", batch_size=2)
    ends = {"qwen2": {256, 257, 258}, "qwen3_base": {256, 257, 258}, "mistral": {2}}.get(family, {2, 355, 356})
    assert set(engine.end_ids) == ends
    prompts = ["Hi", "How do I bake bread with far too many words in the question?", "Why?"]
    for prompt, answer in zip(prompts, engine.generate(prompts, 24), strict=True):
        new = greedy_by_hand(policies(family), prompt, ends, 24)
        assert answer == engine.read(ids_by_transformers(engine.tokenizer, prompt), new)
        assert answer.num_tokens == len(new) - (new[-1] in ends)


def test_log_probabilities_count_the_end_of_the_turn_and_nothing_behind_it(policies):
    engine = TransformersEngine(policies("gemma2"), template="chat")
    prompt = ids_by_transformers(engine.tokenizer, "Hi")
    own = engine.tokenizer.encode("Yes.", add_special_tokens=False)
    ids = torch.tensor([prompt + own + [356]])
    with torch.no_grad():
        logs = torch.log_softmax(engine.model(ids).logits[0].double(), -1)
    wanted = np.mean([float(logs[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1])])
    response = engine.read(prompt, own).response
    assert engine.mean_log_probs(["Hi"], [response], [True])[0] == pytest.approx(wanted, abs=1e-5)


def test_grpo_trains_on_nothing_behind_any_of_the_end_tokens(policies):
    engine = TransformersEngine(policies("qwen2"), template="chat")
    prompt = engine.template.encode_prompt(engine.tokenizer, "Hi")
    for end in (256, 257, 258):
        turn = own_turn(engine, prompt, [40, 41, end, 42, 43])
        assert (turn.ids, turn.closed, turn.answer.finished) == ([40, 41, end], False, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_is_whole_and_ends_where_this_one_does(policies, family, tmp_path):
    engine = TransformersEngine(policies(family), template="chat")
    engine.save_pretrained(tmp_path)
    again = TransformersEngine(tmp_path, template="chat")
    assert set(again.end_ids) == set(engine.end_ids)
    told, kept = (read_json(folder / "generation_config.json") for folder in (policies(family), tmp_path))
    assert all(kept[name] == value for name, value in told.items() if name != "eos_token_id")  # for others who read it
    assert again.weights_hash() == engine.weights_hash()
    assert again.template.render("Hi") == engine.template.render("Hi")


# -- through the scripts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}?"} for i in range(4)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(3)])
    return folder


def run_script(script: str, prompts: Path, url: str, **settings) -> None:
    settings |= {"train_jsonl": prompts / "train.jsonl", "eval_jsonl": prompts / "eval.jsonl", "scorer_url": url}
    flags = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
    done = subprocess.run([sys.executable, script, *flags], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def check_held_out(policy: Path, run: Path) -> None:
    """The answers before training are the chat template's, by hand."""
    engine = TransformersEngine(policy, template="chat")
    for point in read_jsonl(run / "eval" / "iteration_00000_points.jsonl"):
        new = greedy_by_hand(policy, point["prompt"], set(engine.end_ids), 6)
        wanted = engine.read(engine.template.encode_prompt(engine.tokenizer, point["prompt"]), new)
        assert (point["response"], point["finished"]) == (wanted.response, wanted.finished)
    for name in ("final", "best"):
        TransformersEngine(run / name, template="chat")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_base", "mistral", "gemma2"])
def test_es(policies, prompts, tmp_path, family):
    settings = {"policy_template": "chat", "population_size": 2, "batch_size": 2, "num_iterations": 2, "sigma": 0.02}
    settings |= {"max_new_tokens": 6, "eval_every": 1, "save_every": 1, "alpha": 0.05}
    where = {"policy_model_path": policies(family), "experiment_dir": tmp_path / "run"}
    with FakeScorer() as scorer:
        run_script("alignment/ES/es-fine-tuning_alignment_accl_api.py", prompts, scorer.url, **settings, **where)
    check_held_out(policies(family), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3"])
def test_grpo(policies, prompts, tmp_path, family):
    settings = {"policy_template": "chat", "num_generations": 2, "prompts_per_step": 2, "max_steps": 2, "eval_every": 1}
    settings |= {"per_device_train_batch_size": 2, "max_completion_length": 6, "save_steps": 1, "beta": 0.1}
    where = {"model_name": policies(family), "output_dir": tmp_path / "run"}
    with FakeScorer() as scorer:
        run_script("alignment/GRPO/train_grpo_alignment.py", prompts, scorer.url, **settings, **where)
    check_held_out(policies(family), tmp_path / "run")
    assert all(np.isfinite(row["kl"]) for row in read_jsonl(tmp_path / "run/metrics.jsonl") if row["kind"] == "train")


@pytest.mark.parametrize("family", FAMILIES)
def test_classification(policies, prompts, tmp_path, family):
    flags = ["--policy_model_path", policies(family), "--policy_template", "chat", "--policy_max_new_tokens", 6]
    flags += ["--from_jsonl", prompts / "eval.jsonl", "--output_dir", tmp_path, "--base_model_path", policies(family)]
    with FakeScorer() as scorer:
        scorer.identity = {"reward_model": {"name": "r"}, "cost_model": {"name": "c"}, "dtype": "float32"}
        classify.main([*map(str, flags), "--scorer_url", scorer.url, "--model_name", "m", "--device", "cpu"])
    points = read_jsonl(tmp_path / "m_points.jsonl")
    assert len(points) == 3 and all(point["log_prob_base"] < 0 for point in points if point["num_tokens"])


# -- score models that are plain classifiers --------------------------------------------------------------------------


def encoder_tokenizer(folder: Path) -> None:
    """As DeBERTa's: [CLS] text [SEP], and [SEP] between two texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *map(chr, range(33, 127))]
    raw = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [("[CLS]", 1), ("[SEP]", 2)]
    raw.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special)
    tokens = {"bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", **tokens).save_pretrained(
        str(folder)
    )


def make_classifier(kind: str, seed: int, folder: Path) -> Path:
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 512, "initializer_range": 0.5, "num_labels": 1}
    torch.manual_seed(seed)
    if kind == "qwen2":
        byte_level_tokenizer(folder, "<|im_end|>")
        ends = {"eos_token_id": 258, "pad_token_id": 256, "bos_token_id": None}
        config = t.Qwen2Config(**sizes, vocab_size=264, num_key_value_heads=1, **ends)
    else:
        encoder_tokenizer(folder)
        ends = {"vocab_size": 98, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        if kind == "roberta":
            config = t.RobertaConfig(**sizes | {"max_position_embeddings": 130}, **ends, type_vocab_size=1)
        else:
            config = t.DebertaV2Config(**sizes, **ends, type_vocab_size=0, relative_attention=True)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(str(folder))
    return folder


PAIRS = [("Hi", "Yes."), ("How do I bake bread with many words?", "Mix flour and water, wait, and bake it."), ("a", "")]


def logit(folder: Path, **inputs) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        return float(model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0, 0])


@pytest.mark.slow
def test_decoder_classifiers_in_the_service_score_what_their_chat_template_writes(tmp_path):
    folders = [make_classifier("qwen2", seed, tmp_path / name) for seed, name in ((1, "reward"), (2, "cost"))]
    tokenizer = AutoTokenizer.from_pretrained(str(folders[0]))
    with running(folders, tmp_path, SCORER_TEMPLATE="chat", MAX_LENGTH="200") as service:
        scores = ScorerClient(service.url).score(*map(list, zip(*PAIRS, strict=True)))
    for folder, got in zip(folders, (scores.rewards, scores.costs), strict=True):
        for (prompt, response), value in zip(PAIRS, got, strict=True):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
            assert value == pytest.approx(logit(folder, input_ids=ids), abs=1e-5)


def test_encoder_classifiers_score_a_pair_of_texts(tmp_path):
    folders = [make_classifier("deberta", seed, tmp_path / str(seed)) for seed in (1, 2)]
    scorer = LocalScorer(*map(str, folders), template="{prompt}[SEP]", max_length=200)
    scores = scorer.score(*map(list, zip(*PAIRS, strict=True)))
    tokenizer = AutoTokenizer.from_pretrained(str(folders[0]))
    for folder, got in zip(folders, (scores.rewards, scores.costs), strict=True):
        for pair, value in zip(PAIRS, got, strict=True):
            assert value == pytest.approx(logit(folder, input_ids=tokenizer(*pair)["input_ids"]), abs=1e-5)


def test_robertas_last_position_is_not_the_last_row_of_its_table(tmp_path):
    """Its positions are numbered from its padding's id + 1 on: a longer text would be an error on every GPU for good."""
    folders = [str(make_classifier("roberta", seed, tmp_path / str(seed))) for seed in (1, 2)]
    with pytest.raises(UserError, match="MAX_LENGTH is 130, the model reads up to 129 tokens"):
        LocalScorer(*folders, template="{prompt}[SEP]", max_length=130)
    scores = LocalScorer(*folders, template="{prompt}[SEP]", max_length=129).score(["p", "p"], ["x" * 200, "x"])
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    cut = tokenizer("p", "x" * 200)["input_ids"][:128] + [2]
    assert scores.truncated == [True, False]
    for ids, value in zip((cut, tokenizer("p", "x")["input_ids"]), scores.rewards, strict=True):
        assert value == pytest.approx(logit(Path(folders[0]), input_ids=ids), abs=1e-5)


def test_models_that_share_all_but_the_chat_template_get_their_own(tmp_path):
    folders = [make_classifier("qwen2", seed, tmp_path / str(seed)) for seed in (1, 2)]
    tokenizer = AutoTokenizer.from_pretrained(str(folders[1]))
    tokenizer.chat_template = CHATML.replace("You help.", "You judge harm.")
    tokenizer.save_pretrained(str(folders[1]))
    conversation = LocalScorer(*map(str, folders), template="chat", max_length=200).encode("Hi", "Yes.")
    for ids, words in ((conversation.reward_ids, "You help."), (conversation.cost_ids, "You judge harm.")):
        assert words in tokenizer.decode(ids)
