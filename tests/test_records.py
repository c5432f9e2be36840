"""Records: one row stays one row whatever is inside its strings, and files are whole or absent."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import UserError
from alignment.records import (
    JsonlWriter,
    atomic_open,
    load_prompts,
    read_jsonl,
    save_npy,
    to_json,
    write_json,
    write_jsonl,
)

ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=40)  # lone surrogates and separators included
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(ANY_TEXT, VALUES, max_size=3), max_size=6))
def test_rows_survive_the_way_through_a_file(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    text = path.read_bytes().decode("utf-8")  # valid UTF-8, lone surrogates included
    assert len(text.splitlines()) == len(rows)  # str.splitlines breaks at U+2028 and U+0085 too


@given(st.lists(st.dictionaries(ANY_TEXT, VALUES, max_size=3), min_size=1, max_size=5), st.data())
def test_a_torn_tail_never_costs_a_whole_row(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("torn") / "rows.jsonl"
    content = b"".join(to_json(row).encode() + b"\n" for row in rows)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    with JsonlWriter(path) as writer:
        writer.append({"after": 1})
    whole = content[:cut].count(b"\n")
    found = read_jsonl(path)
    complete_without_newline = cut > 0 and content[cut : cut + 1] == b"\n"
    assert found == rows[: whole + complete_without_newline] + [{"after": 1}]
    assert bool(writer.dropped) == (not complete_without_newline and not content[:cut].endswith(b"\n") and cut > 0)


def test_nan_is_no_json():
    with pytest.raises(ValueError):
        to_json({"x": float("nan")})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', [":2", "ends in the middle"]),
        (b"prompt\n", [":1", "not valid JSON"]),
        (b'["a"]\n', [":1", "object", "list"]),
        (b'{"prompt": "a"}\n\n{"text": "a"}\n', [":3", "'prompt'", "text"]),
        (b'{"prompt": "\xff"}\n', [":1", "UTF-8"]),
        (b'{"prompt": "  \\u2028 "}\n', [":1", "'prompt'"]),
        (b'{"prompt": "a"}\n\n{"prompt": 3}\n', [":3", "'prompt'"]),
        (b'{"prompt": "a\\ud800"}\n', [":1", "'prompt'", "\\ud800", "half of a character"]),
        (b"", ["no rows"]),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(path)
    assert all(word in str(error.value) for word in [*words, "p.jsonl"]), str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl"):
        load_prompts(tmp_path / "nothing.jsonl")


def test_prompts_are_kept_as_they_are(tmp_path):
    rows = [
        {"prompt": text} for text in ("a\u2028b\u0085", " x\x00 ", "\U0001f600", "é" * 1_000_000, "ASSISTANT: USER:")
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    assert load_prompts(tmp_path / "p.jsonl") == rows
    assert load_prompts(tmp_path / "p.jsonl", limit=2) == rows[:2]


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row["prompt"] for row in load_prompts(tmp_path / "p.jsonl")] == ["a", "b"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})
    with pytest.raises(RuntimeError), atomic_open(path) as file:
        file.write("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_a_clear_line_and_loses_nothing(tmp_path):
    # A limit on the size of files is the full disk that needs no root.
    code = (
        "import resource, sys; from alignment.records import JsonlWriter; from alignment.errors import UserError\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "writer = JsonlWriter(sys.argv[1])\n"
        "try:\n"
        "    while True: writer.append({'row': 'x' * 90})\n"
        "except UserError as error: print(error)\n"
    )
    path = tmp_path / "rows.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000  # the limit was the child's
    assert read_jsonl(path) == [{"row": "x" * 90}] * 9


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "x.json", {})


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.json"):
        write_json(tmp_path / "file" / "x.json", {})


def test_arrays_hold_no_pickles(tmp_path):
    save_npy(tmp_path / "a.npy", np.arange(3, dtype=np.float32))
    assert np.load(tmp_path / "a.npy", allow_pickle=False).tolist() == [0, 1, 2]
    with pytest.raises(ValueError):
        save_npy(tmp_path / "b.npy", np.array([object()]))
    assert not (tmp_path / "b.npy").exists()
