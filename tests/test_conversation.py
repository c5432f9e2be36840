"""The conversation rule: ids against the goldens, EOS, truncation, and the border that no text can move."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.conversation import LONG_TEXT, PKU, backend_ids, encode_text, get_template, load_tokenizer
from alignment.errors import UserError

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
# What users write to confuse a rule that looks for markers.
NASTY = st.lists(
    st.sampled_from(
        ["USER:", "ASSISTANT:", " USER: ", " ASSISTANT:", "BEGINNING OF CONVERSATION:", "</s>", "<s>", "\n"]
    )
    | TEXT,
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tiny_policy):
    return load_tokenizer(tiny_policy)


@pytest.fixture(scope="module")
def cases(goldens):
    return json.loads((goldens / "score_model" / "cases.json").read_text(encoding="utf-8"))["cases"]


def pair(case):
    # The published service reads None as an empty text.
    return case["prompt"] or "", case["response"] or ""


@pytest.mark.parametrize("folder", ["reward", "tokenizer_slow"])
def test_ids_are_those_of_the_slow_tokenizer(goldens, cases, folder):
    if folder == "tokenizer_slow":
        pytest.importorskip("sentencepiece")
    tokenizer, template = load_tokenizer(goldens / "score_model" / folder), get_template("pku")
    assert len(cases) == 52
    for case in cases:
        encoded = template.encode_conversation(tokenizer, *pair(case))
        assert encoded.ids == case["input_ids_slow"], case["id"]
        assert not encoded.truncated
        assert encoded.ids == template.encode_whole(tokenizer, case["text"]).ids, case["id"]
        assert encoded.prompt_length == len(template.encode_prompt(tokenizer, pair(case)[0])), case["id"]


@pytest.mark.parametrize("folder", ["reward", "tokenizer_slow"])
def test_a_saved_copy_of_a_tokenizer_gives_the_same_ids(goldens, cases, folder, tmp_path):
    if folder == "tokenizer_slow":
        pytest.importorskip("sentencepiece")
    load_tokenizer(goldens / "score_model" / folder).save_pretrained(str(tmp_path))
    tokenizer, template = load_tokenizer(tmp_path), get_template("pku")
    for case in cases:
        assert template.encode_conversation(tokenizer, *pair(case)).ids == case["input_ids_slow"], case["id"]


def test_reference_ids(goldens, cases):
    tokenizer = load_tokenizer(goldens / "score_model" / "reward", reference=True)
    template = get_template("pku", reference=True)
    for case in cases:
        assert template.encode_conversation(tokenizer, *pair(case)).ids == case["input_ids"], case["id"]
        assert template.encode_whole(tokenizer, case["text"]).ids == case["input_ids"], case["id"]
        for limit in (512, 576):
            cut = template.encode_conversation(tokenizer, *pair(case), max_length=limit)
            assert (cut.ids, cut.truncated) == (case["input_ids"][:limit], case[f"truncated_{limit}"]), case["id"]


def test_truncation_keeps_eos_where_the_published_rule_lost_it(goldens, cases):
    tokenizer, template = load_tokenizer(goldens / "score_model" / "reward"), get_template("pku")
    truncated = 0
    for case in cases:
        cut = template.encode_conversation(tokenizer, *pair(case), max_length=512)
        whole = case["input_ids_slow"]
        assert cut.truncated == (len(whole) > 512)
        assert cut.ids == (whole[:511] + [2] if cut.truncated else whole)
        truncated += cut.truncated
    assert truncated >= 5


def test_eos_only_after_a_finished_response(tokenizer):
    template = get_template("pku")
    prompt = template.encode_prompt(tokenizer, "hi")
    assert template.encode_conversation(tokenizer, "hi", "", finished=True).ids == [*prompt, 2]
    assert template.encode_conversation(tokenizer, "hi", "", finished=False).ids == prompt
    assert template.encode_conversation(tokenizer, "hi", "yes</s>").ids.count(2) == 1
    long = template.encode_conversation(tokenizer, "hi", "x" * 500, finished=False, max_length=100)
    assert long.truncated and len(long.ids) == 100 and 2 not in long.ids


@pytest.mark.parametrize("length", [99, 100, 101])
def test_a_response_at_and_one_over_the_limit(tokenizer, length):
    template = get_template("pku")
    room = 100 - len(template.encode_prompt(tokenizer, "hi")) - 1
    encoded = template.encode_conversation(tokenizer, "hi", "x" * (room + length - 100), max_length=100)
    assert encoded.ids[-1] == 2
    assert (len(encoded.ids), encoded.truncated) == (min(length, 100), length > 100)


@given(prompt=NASTY, response=NASTY, finished=st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_text_moves_the_border(tokenizer, prompt, response, finished):
    template = get_template("pku")
    text = template.render(prompt)
    assert text.startswith("BEGINNING OF CONVERSATION: USER: ") and text.endswith(" ASSISTANT:") and prompt in text
    before = template.encode_prompt(tokenizer, prompt)
    encoded = template.encode_conversation(tokenizer, prompt, response, finished)
    # This tokenizer merges nothing, so that the prompt's ids must stand unchanged in front of the response's.
    assert encoded.ids[: len(before)] == before
    assert encoded.prompt_length == len(before)
    if finished:
        assert encoded.ids[-1] == 2
    assert len(encoded.ids) >= len(before)


def test_a_prompt_that_is_a_whole_frame_stays_as_it_is():
    template = get_template("pku")
    frame = template.render("a ASSISTANT: b USER: c")
    assert template.render(frame) == frame
    for almost in (frame + " ", " " + frame, "What does ASSISTANT: mean?", "BEGINNING OF CONVERSATION: USER: hi"):
        assert template.render(almost) == PKU.replace("{prompt}", almost)


def test_templates():
    assert get_template("pku").render("{x} %s") == "BEGINNING OF CONVERSATION: USER: {x} %s ASSISTANT:"
    assert get_template(PKU).name == "pku"
    alpaca = get_template("alpaca")
    assert alpaca.render("hi").endswith("### Instruction:\nhi\n\n### Response:")
    assert alpaca.next_turn == "### Instruction:"
    assert get_template("Human: {prompt} Assistant:").next_turn == "Human:"
    for wrong in ("pkuu", "{prompt}{prompt}", ""):
        with pytest.raises(UserError, match="expected 'pku'"):
            get_template(wrong)
    with pytest.raises(UserError, match="no chat template"):
        get_template("chat")


def test_the_models_own_chat_template(tiny_policy):
    tokenizer = load_tokenizer(tiny_policy)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    template = get_template("chat", tokenizer)
    assert template.render("hi") == "<s><user>hi<a>"
    assert template.encode_prompt(tokenizer, "hi").count(1) == 1
    assert template.cut_first_turn("a\nUSER: b") == ("a\nUSER: b", False)


@pytest.mark.parametrize(
    ("raw", "response", "cut"),
    [
        ("Hello", "Hello", False),
        ("Hello USER: more", "Hello", True),
        ("Hello.\n\nUSER: more ASSISTANT: x USER:", "Hello.", True),
        ("USER: at once", "USER: at once", False),
        (" USER: at once", "", True),
        ("SUPERUSER: is a role", "SUPERUSER: is a role", False),
        ("two  spaces", "two  spaces", False),
        ("", "", False),
    ],
)
def test_first_turn(raw, response, cut):
    assert get_template("pku").cut_first_turn(raw) == (response, cut)


@given(raw=NASTY)
@settings(max_examples=200, deadline=None)
def test_cutting_is_done_once_and_for_all(raw):
    template = get_template("pku")
    response, cut = template.cut_first_turn(raw)
    assert raw.startswith(response)
    assert cut or response == raw
    assert template.cut_first_turn(response) == (response, False)


def test_a_megabyte_of_spaces_is_cut_in_no_time():
    assert get_template("pku").cut_first_turn("a" + " " * 1_000_000 + "USER: x") == ("a", True)


def test_byte_level_tokenizers_encode_a_text_as_a_whole(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>").save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    text = "Grüße 👋<|end|> next"
    assert encode_text(tokenizer, text) == tokenizer(text)["input_ids"]
    assert get_template("pku").encode_conversation(tokenizer, "a", "b").ids[-1] == tokenizer.eos_token_id


def test_long_texts_get_the_same_ids_and_let_other_threads_run(tokenizer):
    text = "a word </s> 👋 " * 20_000
    assert len(text) > LONG_TEXT
    ticks = []
    ended = threading.Event()

    def tick():
        while not ended.wait(0.01):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    ids = backend_ids(tokenizer.backend_tokenizer, text)
    ended.set()
    thread.join()
    assert ids == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert ticks


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
