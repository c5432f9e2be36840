"""Score models: goldens, every published layout, refusals by key, and bits that do not depend on the batch."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, tiny_llama_config
from safetensors.torch import load_file, save_file

from alignment.errors import UserError
from alignment.model_folder import resolve_folder, weights_hash
from alignment.scoring.batching import ROWS, BatchScorer, rows_to_run
from alignment.scoring.local_scorer import LocalScorer
from alignment.scoring.score_model import Normalizer, ScoreModel, SequenceClassifier, load_score_model

LETTER = {"reward": "R", "cost": "C"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(goldens) -> Path:
    return goldens / "score_model"


@pytest.fixture(scope="module")
def cases(folder):
    return json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture
def copy_of(tiny_scorers, tmp_path):
    """A reward model of its own that a test may damage."""
    return Path(shutil.copytree(tiny_scorers[0], tmp_path / "reward"))


@torch.inference_mode()
def score(model, ids: list[int]) -> float:
    return model(torch.tensor([ids]), torch.tensor([len(ids)])).item()


def edit(folder: Path, change) -> None:
    """Applies `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


# --- goldens


@pytest.mark.parametrize(
    ("name", "letter", "key"),
    [("reward", "R", "alone_512"), ("cost", "C", "alone_512"), ("reward_legacy_v1", "R", "alone_512_legacy_v1")],
)
def test_golden_scores_alone(folder, cases, name, letter, key):
    model = load_score_model(folder / name)
    for case in cases:
        assert score(model, case["input_ids"][:512]) == pytest.approx(case[letter][key], abs=1e-5), case["id"]
        if name != "reward_legacy_v1":
            slow = score(model, case["input_ids_slow"][:512])
            assert slow == pytest.approx(case[letter]["alone_512_slow_ids"], abs=1e-5), case["id"]
            whole = score(model, case["input_ids"])
            assert whole == pytest.approx(case[letter]["alone_full"], abs=1e-5), case["id"]


@pytest.mark.parametrize("name", ["reward", "cost"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_golden_scores_in_a_batch(folder, cases, name, deterministic):
    scorer = BatchScorer(load_score_model(folder / name), deterministic)
    scores = scorer.score([tuple(case["input_ids"][:512]) for case in cases]).tolist()
    for case, value in zip(cases, scores, strict=True):
        assert value == pytest.approx(case[LETTER[name]]["batch_right_512"], abs=1e-5), case["id"]


@pytest.mark.parametrize("name", ["reward", "cost"])
@pytest.mark.parametrize(("dtype", "suffix"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_golden_scores_in_half_precision(folder, cases, name, dtype, suffix):
    """Nearer to the reference in that dtype than that is to float32 (the goldens' own differences)."""
    model, letter = load_score_model(folder / name, dtype=dtype), LETTER[name]
    own = max(abs(case[letter][f"alone_512_{suffix}"] - case[letter]["alone_512"]) for case in cases)
    for case in cases:
        value = score(model, case["input_ids"][:512])
        assert value == pytest.approx(case[letter][f"alone_512_{suffix}"], abs=own), case["id"]


@pytest.mark.parametrize("name", ["reward", "cost"])
def test_golden_scores_normalized(folder, cases, name):
    model = load_score_model(folder / name)
    model.do_normalize = True
    for case in cases:
        expected = case[LETTER[name]]["alone_512_normalized"]
        assert score(model, case["input_ids"][:512]) == pytest.approx(expected, abs=1e-5), case["id"]


def test_golden_normalizer_values_come_from_the_weights(folder, cases, tmp_path):
    golden = json.loads((folder / "normalizer_precedence.json").read_text())
    target = Path(shutil.copytree(folder / "reward", tmp_path / "reward"))
    (target / "config.json").chmod(0o644)
    target.chmod(0o755)
    mean, var = golden["config_mean_var_set_to"]
    set_config(target, mean=[mean], var=[var], do_normalize=True)
    model = load_score_model(target)
    assert [model.normalizer.mean.item(), model.normalizer.var.item()] == golden["loaded_normalizer"]
    expected = golden["do_normalize_reward_alone_512"]
    assert score(model, cases[0]["input_ids"]) == pytest.approx(expected, abs=1e-5)


def test_golden_score_type_trap(folder, cases, tmp_path):
    """A cost model that calls itself a reward model (as the published v1.0 one) is harmless until it normalises."""
    golden = json.loads((folder / "score_type_trap.json").read_text())
    target = Path(shutil.copytree(folder / "cost", tmp_path / "cost"))
    (target / "config.json").chmod(0o644)
    target.chmod(0o755)
    set_config(target, score_type="reward")
    ids = cases[0]["input_ids"]
    assert score(load_score_model(target), ids) == pytest.approx(cases[0]["C"]["alone_512"], abs=1e-5)
    set_config(target, do_normalize=True)
    assert score(load_score_model(target), ids) == pytest.approx(golden["C_first_case_alone_512"], abs=1e-5)
    warnings = LocalScorer(folder / "reward", target).warnings()
    assert any("COST_MODEL normalises as a reward model" in warning for warning in warnings)


def test_golden_normalizer_functions(folder):
    golden = json.loads((folder / "normalizer.json").read_text())
    for score_type, function in (("reward", "affine"), ("cost", "scale"), ("critic", "identity")):
        result = golden["results"][f"RunningMeanStd/{function}"]
        last = result["trajectory"][-1]
        normalizer = Normalizer(score_type, last["mean"], last["var"])
        assert normalizer(torch.tensor(golden["probe"])).tolist() == pytest.approx(result["normalize_probe"], abs=1e-6)


def test_all_goldens_through_the_scorer(folder, cases):
    """From the two texts to the score, with both rules; alone, in any order and in any company with the same bits."""
    prompts = [case["prompt"] or "" for case in cases]
    responses = [case["response"] or "" for case in cases]
    names = folder / "reward", folder / "cost"
    published = LocalScorer(*names, max_length=512, reference=True).score(prompts, responses)
    scorer = LocalScorer(*names, max_length=2048)
    ours = scorer.score(prompts, responses)
    for index, case in enumerate(cases):
        for letter, theirs, own in (("R", published.rewards, ours.rewards), ("C", published.costs, ours.costs)):
            assert theirs[index] == pytest.approx(case[letter]["alone_512"], abs=1e-5), case["id"]
            if len(case["input_ids_slow"]) <= 512:
                assert own[index] == pytest.approx(case[letter]["alone_512_slow_ids"], abs=1e-5), case["id"]
    assert published.truncated == [case["truncated_512"] for case in cases]
    order = list(range(52))
    for seed in range(5):
        random.Random(seed).shuffle(order)
        some = order[: 1 + 10 * seed]
        again = scorer.score([prompts[i] for i in some], [responses[i] for i in some])
        assert again.rewards.tolist() == ours.rewards[some].tolist()
        assert again.costs.tolist() == ours.costs[some].tolist()


# --- batches


def random_texts(count: int, vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocabulary) for _ in range(rng.randint(1, 90))) for _ in range(count)]


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "mlp_size", "threads"),
    [
        (torch.float32, 32, 64, 1),
        (torch.float32, 44, 101, 1),  # sizes that fill no vector of any CPU
        pytest.param(torch.float32, 44, 101, 2, marks=pytest.mark.slow),
        (torch.bfloat16, 44, 101, 1),
        (torch.float16, 32, 64, 1),
    ],
)
def test_deterministic_scores_have_the_same_bits_in_any_company(dtype, hidden_size, mlp_size, threads):
    torch.manual_seed(0)
    config = tiny_llama_config(400, hidden_size, initializer_range=0.3)
    config.intermediate_size = mlp_size
    scorer = BatchScorer(ScoreModel(config, dtype=dtype).eval(), deterministic=True)
    texts = random_texts(60, 400)
    try:
        torch.set_num_threads(threads)
        alone = [scorer.score([text]).item() for text in texts]
        for seed in range(4):
            order = random.Random(seed).sample(range(60), 60 - 15 * seed)
            assert scorer.score([texts[i] for i in order]).tolist() == [alone[i] for i in order]
    finally:
        torch.set_num_threads(1)
    assert len(set(alone)) > 50


def test_plain_batches_agree_within_rounding():
    torch.manual_seed(0)
    model = ScoreModel(tiny_llama_config(400, initializer_range=0.3)).eval()
    texts = random_texts(60, 400)
    batched = BatchScorer(model, deterministic=False, tokens_per_batch=256).score(texts).tolist()
    assert batched == pytest.approx([score(model, list(text)) for text in texts], abs=1e-5)


def test_a_batch_that_rounds_differently_is_not_used(monkeypatch):
    torch.manual_seed(0)
    model = ScoreModel(tiny_llama_config(400)).eval()
    plain = model.hidden

    def last_row_differs(input_ids):
        states = plain(input_ids)
        if len(input_ids) == 8:
            states[-1] += 1e-6
        return states

    monkeypatch.setattr(model, "hidden", last_row_differs)
    assert BatchScorer(model, True).rows_for(16) == (16, 4, 2, 1)
    monkeypatch.setattr(model, "hidden", lambda ids: plain(ids) + 1e-6 * torch.arange(len(ids))[:, None, None])
    assert BatchScorer(model, True).rows_for(16) == (1,)


def test_identical_texts_are_scored_once(monkeypatch):
    torch.manual_seed(0)
    model = ScoreModel(tiny_llama_config(400)).eval()
    scorer = BatchScorer(model, True)
    scorer.score([(1, 5)])
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, lengths: rows.append(len(ids)) or forward(ids, lengths))
    assert len(set(scorer.score([(1, 5)] * 100).tolist())) == 1
    assert rows == [1]


def test_how_many_rows_run():
    assert [rows_to_run(n, ROWS) for n in (1, 2, 3, 5, 9, 12, 13, 16, 40)] == [1, 2, 4, 8, 8, 8, 16, 16, 16]
    assert [rows_to_run(n, (16, 4)) for n in (1, 3, 5, 13)] == [4, 4, 4, 16]
    assert rows_to_run(7, (1,)) == 1


def test_right_pads_do_not_reach_a_score():
    torch.manual_seed(0)
    model = ScoreModel(tiny_llama_config(400, initializer_range=0.3)).eval()
    ids = torch.randint(400, (1, 20))
    lengths = torch.tensor([11])
    other = ids.clone()
    other[:, 11:] = 7
    assert torch.equal(model(ids, lengths), model(other, lengths))


# --- layouts


def test_save_and_load_give_the_same_model(tmp_path):
    torch.manual_seed(0)
    config = tiny_llama_config(400, score_type="cost", do_normalize=True, mean=[0.5], var=[4.0])
    model = ScoreModel(config).eval()
    model.save_pretrained(tmp_path)
    again = load_score_model(tmp_path)
    assert (again.score_type, again.do_normalize) == ("cost", True)
    assert score(again, [1, 5, 2]) == score(model, [1, 5, 2])
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["architectures"], saved["score_type"], saved["var"]) == (["LlamaForScore"], "cost", [4.0])


@pytest.mark.parametrize("layout", ["safetensors shards", "bin", "bin shards"])
def test_every_weight_layout_gives_the_same_score(copy_of, layout):
    expected = score(load_score_model(copy_of), [1, 5, 2])
    tensors = load_file(copy_of / "model.safetensors")
    (copy_of / "model.safetensors").unlink()
    single, write = ("model.safetensors", save_file) if "safetensors" in layout else ("pytorch_model.bin", torch.save)
    stem, suffix = single.rsplit(".", 1)
    if "shards" in layout:
        shards = {f"{stem}-0000{i}-of-00002.{suffix}": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
        weight_map = {key: name for name, part in shards.items() for key in part}
        (copy_of / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name, part in shards.items():
            write(part, copy_of / name)
    else:
        write(tensors, copy_of / single)
    assert score(load_score_model(copy_of), [1, 5, 2]) == expected
    assert len(weights_hash(copy_of)) == 16


def test_the_first_v1_revision(copy_of):
    """No score_type, no head bias, no normalizer; rotary tables stored; weights in .bin files."""
    set_config(copy_of, architectures=["LlamaModelForScore"], bias=False, score_bias="absent", score_type="absent")
    tensors = load_file(copy_of / "model.safetensors")
    bias = tensors.pop("score_head.bias").item()
    expected = score(load_score_model(copy_of), [1, 5, 2]) - bias
    for key in ("mean", "var", "count"):
        tensors.pop(f"normalizer.{key}")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(tensors, copy_of / "pytorch_model.bin")
    (copy_of / "model.safetensors").unlink()
    model = load_score_model(copy_of)
    assert score(model, [1, 5, 2]) == pytest.approx(expected, abs=1e-6)
    assert (model.score_type, model.do_normalize) == ("reward", False)


def test_a_plain_sequence_classifier_serves(tmp_path):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = tiny_llama_config(400, num_labels=1)
    LlamaForSequenceClassification(config).eval().save_pretrained(tmp_path)
    model = load_score_model(tmp_path)
    assert isinstance(model, SequenceClassifier)
    plain = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 5, 9, 2]])
    assert score(model, ids[0].tolist()) == pytest.approx(plain(ids).logits.item(), abs=1e-6)
    # A text that ends with the pad's id is read at its end all the same.
    assert score(model, [1, 5, 9, 3]) != pytest.approx(score(model, [1, 5, 9]), abs=1e-6)
    edit(tmp_path, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(UserError, match=r"missing: score\.weight"):
        load_score_model(tmp_path)
    set_config(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(UserError, match="2 labels, expected 1"):
        load_score_model(tmp_path)


def test_an_encoder_classifier_serves(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **sizes)).eval()
    plain.save_pretrained(tmp_path)
    model = load_score_model(tmp_path)
    padded = model(torch.tensor([[1, 5, 0, 0]]), torch.tensor([2]))
    assert padded.item() == pytest.approx(plain(torch.tensor([[1, 5]])).logits.item(), abs=1e-5)


def test_the_class_of_a_safe_rlhf_clone(monkeypatch, copy_of):
    monkeypatch.setenv("SCORE_BACKEND", "safe_rlhf")
    monkeypatch.setitem(sys.modules, "safe_rlhf", None)
    with pytest.raises(UserError, match=r"transformers 4\.37"):
        load_score_model(copy_of)

    class AutoModelForScore(torch.nn.Module):
        """Answers with the sum of the ids that are not masked."""

        config = types.SimpleNamespace(score_type="cost", do_normalize=False)

        @classmethod
        def from_pretrained(cls, folder, torch_dtype):
            assert (Path(folder), torch_dtype) == (copy_of, torch.float32)
            return cls()

        def forward(self, input_ids, attention_mask):
            return types.SimpleNamespace(end_scores=(input_ids * attention_mask).sum(-1, keepdim=True))

    stub = types.ModuleType("safe_rlhf.models")
    stub.AutoModelForScore = AutoModelForScore
    monkeypatch.setitem(sys.modules, "safe_rlhf", types.ModuleType("safe_rlhf"))
    monkeypatch.setitem(sys.modules, "safe_rlhf.models", stub)
    model = load_score_model(copy_of)
    assert model.score_type == "cost"
    assert model(torch.tensor([[3, 4, 9], [1, 2, 3]]), torch.tensor([2, 3])).tolist() == [7.0, 6.0]
    monkeypatch.setenv("SCORE_BACKEND", "vllm")
    with pytest.raises(UserError, match="SCORE_BACKEND"):
        load_score_model(copy_of)


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("score_head.weight"), r"missing: score_head\.weight$"),
        (lambda t: t.pop("score_head.bias"), r"missing: score_head\.bias$"),
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight$"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3)}), r"not expected: lm_head\.weight$"),
        (lambda t: t.update({"score_head.weight": torch.ones(2, 32)}), r"wrong shape: score_head\.weight is \(2, 32\)"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"not finite: model\.norm\.weight$"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(copy_of, change, message):
    edit(copy_of, change)
    with pytest.raises(UserError, match=message):
        load_score_model(copy_of)


def test_weights_too_large_for_the_dtype_are_refused(copy_of):
    edit(copy_of, lambda tensors: tensors["score_head.bias"].fill_(1e6))
    load_score_model(copy_of)
    with pytest.raises(UserError, match=r"not finite: score_head\.bias"):
        load_score_model(copy_of, dtype=torch.float16)


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_a_pickle_that_would_run_code_is_refused(copy_of, capsys):
    (copy_of / "model.safetensors").unlink()
    torch.save({"score_head.weight": Malicious()}, copy_of / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        load_score_model(copy_of)
    (copy_of / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="could run code"):
        load_score_model(copy_of)
    assert capsys.readouterr().out == ""


def test_damaged_and_absent_files(copy_of, tmp_path):
    data = (copy_of / "model.safetensors").read_bytes()
    (copy_of / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_score_model(copy_of)
    (copy_of / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights found"):
        load_score_model(copy_of)
    (copy_of / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        load_score_model(copy_of)
    (copy_of / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    (copy_of / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="which is not in the folder"):
        load_score_model(copy_of)
    (copy_of / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_score_model(copy_of)
    with pytest.raises(UserError, match="no such model folder"):
        resolve_folder(tmp_path / "absent")


def test_a_config_that_is_no_score_model(copy_of):
    set_config(copy_of, score_dim=2)
    with pytest.raises(UserError, match="score_dim is 2"):
        load_score_model(copy_of)
    set_config(copy_of, score_dim=1, score_type="rewards")
    with pytest.raises(UserError, match="score_type is 'rewards'"):
        load_score_model(copy_of)


def test_loading_leaves_the_callers_random_numbers_alone(copy_of):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_score_model(copy_of)
    assert torch.equal(torch.rand(3), expected)


# --- the pair


def test_tokenizer_and_model_must_belong_together(tiny_scorers, copy_of):
    with pytest.raises(UserError, match="reads up to 1024 tokens"):
        LocalScorer(*tiny_scorers, max_length=2000)
    set_config(copy_of, eos_token_id=7)
    with pytest.raises(UserError, match="do not belong together"):
        LocalScorer(copy_of, tiny_scorers[1])
    shutil.rmtree(copy_of)
    ScoreModel(tiny_llama_config(300)).save_pretrained(copy_of)
    make_tokenizer(copy_of)
    with pytest.raises(UserError, match="ids up to 354, the model knows 300"):
        LocalScorer(copy_of, tiny_scorers[1])


def test_swapped_and_inverted_models_are_a_warning(tiny_scorers, tmp_path):
    """A random model and its negative stand in for models that know right from wrong."""
    reward, cost = tiny_scorers
    plain = LocalScorer(reward, cost)
    names = {"R": reward, "C": cost}
    scores = plain.score(["hi"] * 2, ["good", "bad"])
    for name, values, sign in (("R", scores.rewards, 1), ("C", scores.costs, -1)):
        if sign * (values[0] - values[1]) < 0:
            names[name] = negative(names[name], tmp_path / name)
    probe = {"prompt": "hi", "good": "good", "bad": "bad"}
    assert LocalScorer(names["R"], names["C"]).warnings(probe) == []
    swapped = LocalScorer(names["C"], names["R"]).warnings(probe)
    assert "SWAPPED" in swapped[-1]
    assert ("cost model" in swapped[0]) == (len(swapped) == 2)
    inverted = LocalScorer(names["R"], negative(names["C"], tmp_path / "inverted")).warnings(probe)
    assert "cost looks INVERTED" in inverted[-1]
    unhelpful = LocalScorer(negative(names["R"], tmp_path / "unhelpful"), names["C"]).warnings(probe)
    assert "reward looks INVERTED" in unhelpful[-1]


def negative(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    edit(target, lambda tensors: (tensors["score_head.weight"].neg_(), tensors["score_head.bias"].neg_()))
    return target


def test_each_model_reads_with_its_own_tokenizer(tiny_scorers, tmp_path):
    other = Path(shutil.copytree(tiny_scorers[1], tmp_path / "cost"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    one, swapped = (LocalScorer(tiny_scorers[0], other).encode("hi", text) for text in ("abc", "bac"))
    assert one.reward_ids != one.cost_ids
    assert one.cost_ids == swapped.reward_ids


def test_what_cannot_be_scored_is_missing_with_a_reason(tiny_scorers):
    scorer = LocalScorer(*tiny_scorers, max_length=100)
    scores = scorer.score(["hi", "x" * 500, "hi"], ["yes", "no", "y" * 500])
    assert scores.truncated == [False, True, True]
    assert scores.errors[0] is None and scores.errors[2] is None
    assert "the prompt alone fills the 100 tokens" in scores.errors[1]
    assert [bool(missing) for missing in scores.rewards != scores.rewards] == [False, True, False]


def test_a_score_that_is_not_finite_is_missing_with_a_reason(copy_of, tiny_scorers):
    """float16 overflows for texts that hold a Z; the others keep their scores."""
    letter = json.loads((copy_of / "tokenizer.json").read_text())["model"]["vocab"]["Z"]

    def overflow(tensors):
        tensors["model.embed_tokens.weight"][letter] = 65000.0
        tensors["model.layers.0.mlp.down_proj.weight"].mul_(1000)

    edit(copy_of, overflow)
    scores = LocalScorer(copy_of, tiny_scorers[1], dtype="float16").score(["hi"] * 3, ["yes", "Z", "no"])
    assert scores.errors[1] in ("reward is nan", "reward is inf", "reward is -inf")
    assert [error is None for error in scores.errors] == [True, False, True]
    assert scores.rewards[1] != scores.rewards[1]
    assert all(abs(cost) < 1e3 for cost in scores.costs)
