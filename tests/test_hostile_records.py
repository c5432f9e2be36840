"""Whatever a file holds, it is read exactly or refused in one line; whatever a user writes stays where it was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from script_here import CLASSIFY, bad_file, refused, run_script

from alignment.config import read_yaml_mapping
from alignment.conversation import get_template, load_tokenizer
from alignment.errors import UserError
from alignment.ES.journal import read_journal
from alignment.evaluation.classify_settings import load_settings
from alignment.evaluation.judging.store import read_judgments
from alignment.evaluation.loading import load_split
from alignment.evaluation.points import load_scores, read_points
from alignment.evaluation.prompts import load_rows
from alignment.evaluation.scores import add_scores
from alignment.records import load_prompts, read_json, read_jsonl, write_jsonl
from alignment.scoring.scores import Scores
from alignment.visualization.plot_gpt_elo_figure import load_details, load_ratings
from alignment.visualization.training_runs import load_runs

SEPARATORS = [
    "\u2028",
    "\u2029",
    "\u0085",
    "\x0b",
    "\x0c",
    "\x1c",
    "\r",
    "\r\n",
    "\n",
    "\0",
    "\ufeff",
    "\u202e",
    "\U0001f600",
]
MARKERS = ["USER:", " ASSISTANT:", "BEGINNING OF CONVERSATION: USER: ", "</s>", "<s>", "### Response:", "<|im_end|>"]
# Any text that has an encoding: what a tokenizer can read.
TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10) | st.sampled_from(SEPARATORS + MARKERS), max_size=6
).map("".join)
PROMPT = TEXT.filter(str.strip)
HALF = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF)


class ByLength:
    """A scorer whose scores tell which texts it was given."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def identity(self) -> dict:
        return {"name": "by length"}

    def score(self, prompts, responses, finished=None) -> Scores:
        self.asked += zip(prompts, responses, strict=True)
        rewards = np.array([len(prompt) + 0.5 for prompt in prompts], np.float32)
        costs = np.array([len(response) - 0.5 for response in responses], np.float32)
        return Scores(rewards, costs, [None] * len(prompts), [False] * len(prompts))


@given(st.lists(st.tuples(PROMPT, TEXT), min_size=1, max_size=8))
def test_no_text_changes_the_count_or_the_order_of_rows(tmp_path_factory, pairs):
    """From the file of answers through scoring to the points file that plots and comparisons read."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "given.jsonl", [{"prompt": prompt, "response": response} for prompt, response in pairs])
    assert [row["prompt"] for row in load_prompts(folder / "given.jsonl")] == [prompt for prompt, _ in pairs]
    argv = ["--responses_from", str(folder / "given.jsonl"), "--device", "cpu"]
    rows, scorer = load_rows(load_settings(argv)), ByLength()
    add_scores(rows, scorer, 1, folder / "scores.jsonl")
    assert sorted(scorer.asked) == sorted(pairs)
    write_jsonl(folder / "A_points.jsonl", rows)
    points = read_points(folder / "A_points.jsonl")
    assert [(row["prompt"], row["response"]) for row in points] == pairs
    scores = load_scores(folder, "A")
    assert scores.rewards.tolist() == [len(prompt) + 0.5 for prompt, _ in pairs]
    assert scores.costs.tolist() == [len(response) - 0.5 for _, response in pairs]


@given(before=TEXT, half=HALF, after=TEXT, rows=st.lists(PROMPT, max_size=3))
def test_half_a_character_is_refused_with_its_line(tmp_path_factory, before, half, after, rows):
    text = before + half + after
    path = tmp_path_factory.mktemp("half") / "p.jsonl"
    write_jsonl(path, [*({"prompt": prompt} for prompt in rows), {"prompt": text}])
    try:
        text.encode("utf-16", "surrogatepass").decode("utf-16").encode("utf-8")
        whole = json.loads(json.dumps(text)) != text  # two halves that met are one character once they were in JSON
    except UnicodeDecodeError:
        whole = False
    if whole:
        assert len(load_prompts(path)) == len(rows) + 1
    else:
        with pytest.raises(UserError, match=rf"p\.jsonl:{len(rows) + 1}: 'prompt' holds .*half of a character"):
            load_prompts(path)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte or character, so that ids on one side of a border tell nothing of the other side."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("name", ["pku", "alpaca", "chat", "Question: {prompt}\nAnswer:"])
@given(prompt=PROMPT, other=PROMPT, response=TEXT, finished=st.booleans())
@settings(max_examples=60)
def test_nothing_in_a_prompt_moves_the_border(tokenizer, name, prompt, other, response, finished):
    """What follows the prompt's ids is the response's, the same behind every prompt."""
    template = get_template(name, tokenizer)
    tails = []
    for text in (prompt, other):
        rendered = template.render(text)
        assert text in rendered
        encoded = template.encode_conversation(tokenizer, text, response, finished)
        assert encoded.ids[: encoded.prompt_length] == template.encode_prompt(tokenizer, text)
        tails.append(encoded.ids[encoded.prompt_length :])
    assert tails[0] == tails[1]
    assert bool(tails[0]) == (bool(response) or finished)


@pytest.mark.parametrize("name", ["pku", "alpaca", "chat", "Question: {prompt}\nAnswer:"])
@given(prompt=PROMPT, other=PROMPT)
@settings(max_examples=60)
def test_two_prompts_never_look_the_same(tokenizer, name, prompt, other):
    template = get_template(name, tokenizer)
    frames = [
        template.before and text.startswith(template.before) and text.endswith(template.after)
        for text in (prompt, other)
    ]
    if prompt != other and not any(frames):
        assert template.render(prompt) != template.render(other)


GOOD = {
    "prompts": ('{"prompt": "a"}\n{"prompt": "b", "n": 1.5e3}\n', load_prompts),
    "points": (
        '{"prompt": "p", "response": "r", "reward": 1.0, "cost": -1.0, "label": "SH", "finished": true, "num_tokens": 3}\n'
        '{"prompt": "q", "response": "", "reward": null, "cost": null, "label": null, "categories": ["x"]}\n',
        read_points,
    ),
    "journal": (
        '{"kind": "start", "base_weights": "x", "settings": {}}\n'
        '{"kind": "step", "iteration": 0, "seeds": [1], "coefficients": [0.5], "lambda_state": {}}\n',
        read_journal,
    ),
    "judgments": (
        '{"model_a": "a", "model_b": "b", "dimension": "helpfulness", "question": "q", "scores": [7, 2]}\n'
        '{"model_a": "b", "model_b": "a", "dimension": "harmlessness", "question": "q", "scores": null}\n',
        lambda path: read_judgments(str(path), (), None, None, 0.5, "tie"),
    ),
    "our judgments": (
        '{"model_a": "a", "model_b": "b", "dimension": "helpfulness", "question": "q", "scores": [7, 2], "key": "k", '
        '"outcome": "win", "judge": "j", "template": "t", "usage": {"prompt_tokens": 3, "completion_tokens": 4}, '
        '"answers": ["0", "1"], "options": {"temperature": 0.2}}\n',
        lambda path: read_judgments(str(path), (), None, None, 0.5, "tie"),
    ),
    "metrics": (
        '{"kind": "train", "iteration": 0, "reward_mean": 1.0, "seconds": {"total": 1}}\n'
        '{"kind": "eval", "iteration": 0, "cost_mean": null, "cost_mean_low": 1}\n',
        lambda path: load_runs([path]),
    ),
    "ratings": ('{"helpfulness": {"A": 1000}, "harmlessness": {"A": 990.5}}', load_ratings),
    "details": (
        '{"rating": {"method": "elo", "baseline": "A"}, "dimensions": {"helpfulness": {"ratings": {"A": '
        '{"rating": 1, "low": 0, "high": null}}}}}',
        lambda path: load_details(path.with_name("x.json"), {}),
    ),
    "settings": ("a: 1\nb: [x, {y: 2026-01-02}]\nc: &x {d: ~}\ne: *x\n", read_yaml_mapping),
    "JSON": ('{"a": [1, {"b": null}]}', read_json),
}


@pytest.mark.parametrize("kind", GOOD)
@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path_factory, kind, data):
    """Bytes changed, cut out, put in; values put in place of others: never anything but a result or a UserError."""
    text, read = GOOD[kind]
    content = text.encode()
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(begin, min(len(content), begin + 12)))
        pieces = st.binary(max_size=4) | st.sampled_from(
            [
                b"null",
                b"true",
                b"[]",
                b"{}",
                b'"x"',
                b"-1",
                b"1e999",
                b"NaN",
                b"[" * 1500,
                b"\n",
                b"1" * 5000,
                b": ",
                b",",
            ]
        )
        content = content[:begin] + data.draw(pieces) + content[end:]
    path = tmp_path_factory.mktemp("damaged") / "x_details.json"
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert str(path) in str(error) or kind == "metrics"
        assert len(str(error).splitlines()) == 1


@given(
    st.lists(PROMPT, min_size=1, max_size=4), st.binary(min_size=1, max_size=8).filter(lambda tail: b"\n" not in tail)
)
def test_what_stands_behind_the_last_row_costs_no_row_silently(tmp_path_factory, prompts, tail):
    path = tmp_path_factory.mktemp("tail") / "p.jsonl"
    write_jsonl(path, [{"prompt": prompt} for prompt in prompts])
    path.write_bytes(path.read_bytes() + tail)
    try:
        rows = load_prompts(path)
    except UserError as error:
        assert f"p.jsonl:{len(prompts) + 1}: " in str(error)
    else:
        assert [row["prompt"] for row in rows] == prompts
        assert not tail.strip()


LONG = "x" * 1_000_000
ODD = [
    "a\u2028b\u0085c",
    "NUL \0 in it",
    "\u202eright to left",
    "ASSISTANT: USER: ASSISTANT:",
    "</s><s>",
    "\U0001f600",
    LONG,
]


def test_odd_texts_go_through_the_classification_as_they_are(tiny_scorers, tmp_path):
    pairs = [(one, two) for one in ODD[:-1] for two in (one, "")] + [("short", LONG)]
    write_jsonl(tmp_path / "given.jsonl", [{"prompt": prompt, "response": response} for prompt, response in pairs])
    models = [
        "--reward_model",
        tiny_scorers[0],
        "--cost_model",
        tiny_scorers[1],
        "--max_length",
        256,
        "--device",
        "cpu",
    ]
    files = ["--responses_from", tmp_path / "given.jsonl", "--output_dir", tmp_path, "--model_name", "odd"]
    done = run_script(CLASSIFY, *models, *files)
    assert done.code == 0, done.err
    points = read_points(tmp_path / "odd_points.jsonl")
    assert [(row["prompt"], row["response"]) for row in points] == pairs
    assert points[-1]["truncated"]
    assert len((tmp_path / "odd_points.jsonl").read_bytes().decode("utf-8").splitlines()) == len(pairs)


def test_a_prompt_that_no_model_can_hold_is_named(tiny_policy, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "short"}, {"prompt": LONG}])
    files = ["--from_jsonl", tmp_path / "p.jsonl", "--output_dir", tmp_path, "--policy_max_new_tokens", 4]
    files += ["--scorer_url", "http://127.0.0.1:9"]
    message = refused(CLASSIFY, "--policy_model_path", tiny_policy, "--device", "cpu", *files)
    assert "xxx" in message
    assert "1024" in message, message
    assert len(message) < 600
    assert not (tmp_path / f"{tiny_policy.name}_summary.json").exists()


DATA_SETS = {
    "a Parquet file that is text": ("data.parquet", b"prompt\n", "data.parquet"),
    "an empty Parquet file": ("data.parquet", b"", "data.parquet"),
    "a folder of broken rows": ("data/train.jsonl", b'{"prompt": "a"}\n{"prompt": ', "data"),
    "a folder without data": ("data/README", b"", "data"),
    "a saved data set whose files are gone": ("data/state.json", b"{}", "data"),
    "a saved data set that is no JSON": ("data/dataset_dict.json", b"{", "data"),
}


@pytest.mark.parametrize("case", DATA_SETS)
def test_damaged_data_sets(tmp_path, case):
    name, content, asked = DATA_SETS[case]
    bad_file(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        load_split(str(tmp_path / asked), "alpaca-7b", "train", required=("prompt",))
    assert str(tmp_path / asked) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_data_set_whose_prompts_are_no_texts(tmp_path):
    bad_file(tmp_path, "data/train.jsonl", b'{"prompt": "a"}\n{"prompt": "  "}\n')
    folder: Path = tmp_path / "data"
    message = refused(
        CLASSIFY, "--dataset_name", folder, "--split", "train", "--policy_model_path", "m", "--output_dir", tmp_path
    )
    assert f"{folder}: 'prompt' of a row that was drawn must be text that is not empty" in message
    assert read_jsonl(folder / "train.jsonl")
