"""Places that cannot be written, disks that fill up, and files of ours that were damaged or edited by hand."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from matplotlib.figure import Figure
from safetensors.torch import save_file
from script_here import (
    CLASSIFY,
    COMPARE,
    CURVES,
    ES,
    FIGURE,
    GRID,
    GRPO,
    PARETO,
    RATE,
    RATIOS,
    REBUILD,
    REPORT,
    bad_file,
    refused,
    run_script,
)
from tokenizers import Tokenizer, models

from alignment.errors import UserError
from alignment.evaluation.answers import generate_answers
from alignment.evaluation.classify_settings import load_settings
from alignment.evaluation.prompts import load_rows
from alignment.evaluation.scores import add_scores
from alignment.records import (
    JsonlWriter,
    check_room,
    check_writable_file,
    check_writable_folder,
    read_jsonl,
    save_npy,
    write_json,
    write_jsonl,
)
from alignment.runs import MetricsLog, atomic_directory
from alignment.visualization.style import save_figure

POINT = {"prompt": "p", "response": "r", "reward": 1.0, "cost": -1.0, "label": "SH"}
NO_SCORER = ["--scorer_url", "http://127.0.0.1:9", "--scorer_max_wait", "0"]


def mount(folder: Path, options: str) -> None:
    """A small file system in memory; only root may."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")


@pytest.fixture
def small_disk(tmp_path):
    """256 KiB of disk."""
    folder = tmp_path / "small"
    mount(folder, "size=256k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["under a file", "read-only"])
def no_place(request, tmp_path):
    """A folder in which nothing can be written."""
    if request.param == "under a file":
        (tmp_path / "file").write_text("")
        yield tmp_path / "file" / "below"
    elif os.geteuid() != 0:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        yield folder
    else:  # root may write where the mode forbids it, but not where the disk does
        folder = tmp_path / "closed"
        mount(folder, "size=64k,ro")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)


WRITERS = {
    "ES": (ES, "--policy_model_path", "no/model", *NO_SCORER, "--train_jsonl", "P", "--eval_jsonl", "P",
           "--experiment_dir", "PLACE"),
    "GRPO": (GRPO, "--model_name", "no/model", *NO_SCORER, "--train_jsonl", "P", "--eval_jsonl", "P",
             "--output_dir", "PLACE"),
    "classify": (CLASSIFY, "--policy_model_path", "no/model", "--from_jsonl", "P", "--output_dir", "PLACE"),
    "rate": (RATE, "--judge", "scorer", "--ratings_out", "PLACE/r.json", "--plot_out", "P.png"),
    "rate's figure": (RATE, "--judge", "scorer", "--ratings_out", "P.json", "--plot_out", "PLACE/r.png"),
    "compare": (COMPARE, "a", "b", "--output", "PLACE/c"),
    "grid": (GRID, "--output", "PLACE/x.png"),
    "ratios": (RATIOS, "--output", "PLACE/x.png"),
    "pareto": (PARETO, "--output", "PLACE/x.pdf"),
    "curves": (CURVES, "no/run", "--output", "PLACE/x.png"),
    "figure": (FIGURE, "--outfile", "PLACE/x.png"),
    "report": (REPORT, "--output", "PLACE/x.html"),
    "rebuild": (REBUILD, "--journal", "no/journal", "--policy_model_path", "no/model", "--output", "PLACE/x"),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, no_place, writer):
    write_jsonl(tmp_path / "prompts", [{"prompt": "p"}])
    command = [
        word.replace("PLACE", str(no_place)) if "PLACE" in word else str(tmp_path / "prompts") + word.removeprefix("P")
        if word in ("P", "P.png", "P.json") else word
        for word in WRITERS[writer]
    ]  # fmt: skip
    message = refused(*command)
    assert str(no_place) in message
    assert "cannot write" in message


@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in ("ES", "GRPO", "classify", "rebuild")])
def test_a_folder_where_a_file_is_to_be_written(tmp_path, writer):
    command = [word.replace("PLACE", str(tmp_path)).replace("P.", f"{tmp_path}/p.") for word in WRITERS[writer]]
    places = [Path(word) for word in command if word.startswith(str(tmp_path)) and "/p." not in word]
    (places[0].with_name(places[0].name + ".json") if writer == "compare" else places[0]).mkdir()
    message = refused(*command)
    assert str(places[0]) in message
    assert "it is a folder" in message


def test_looking_whether_a_place_can_be_written_leaves_nothing_behind(tmp_path):
    check_writable_folder(tmp_path / "a" / "b")
    check_writable_file(tmp_path / "a" / "b" / "c.json")
    assert list(tmp_path.iterdir()) == []


def test_room_that_a_checkpoint_needs(tmp_path):
    check_room(tmp_path / "not" / "there", 1000)
    with pytest.raises(UserError, match=r"needs 1.05e\+06 GiB and its disk has \S+ GiB left"):
        check_room(tmp_path / "not" / "there", 2**50)
    with pytest.raises(UserError, match="GiB left"), atomic_directory(tmp_path / "checkpoint", needed=2**50):
        raise AssertionError("began to write")
    assert list(tmp_path.iterdir()) == []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BIG = 300_000  # bytes or more: does not fit onto the small disk


def write_folder(folder: Path, write) -> None:
    with atomic_directory(folder) as temporary:
        write(temporary)


FILLERS = {
    "JSON": lambda place: write_json(place, {"x": "y" * BIG}),
    "rows": lambda place: write_jsonl(place, ({"x": "y" * 1000} for _ in range(BIG // 1000))),
    "array": lambda place: save_npy(place, np.zeros(BIG)),
    "PNG": lambda place: save_figure(noisy_figure(), place.with_suffix(".png")),
    "PDF": lambda place: save_figure(noisy_figure(), place.with_suffix(".pdf")),
    "a folder with text": lambda place: write_folder(place, lambda to: (to / "a").write_bytes(bytes(BIG))),
    "a folder with tensors": lambda place: write_folder(
        place, lambda to: save_file({"a": torch.zeros(BIG)}, to / "a.safetensors")
    ),
    "a folder with a tokenizer": lambda place: write_folder(place, lambda to: big_tokenizer().save(str(to / "a.json"))),
    "a folder with a state": lambda place: write_folder(place, lambda to: torch.save(torch.zeros(BIG), to / "a.pt")),
}


def big_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel({f"word{number}": number for number in range(BIG // 16)}, "word0"))


def noisy_figure() -> Figure:
    figure = Figure()
    figure.subplots().imshow(np.random.default_rng(0).random((700, 700)), interpolation="nearest")
    return figure


@pytest.mark.parametrize("what", FILLERS)
def test_a_disk_that_fills_while_something_is_written(small_disk, what):
    for name in ("x", "x.png", "x.pdf"):
        (small_disk / name).write_text("old") if "folder" not in what else None
    if "folder" in what:
        write_folder(small_disk / "x", lambda to: (to / "a").write_text("old"))
    before = tree(small_disk)
    with pytest.raises(UserError, match="cannot write .*(o space left|written|is the disk full)") as error:
        FILLERS[what](small_disk / "x")
    assert "\n" not in str(error.value)
    assert tree(small_disk) == before


def test_rows_that_no_longer_fit_are_not_half_there(small_disk):
    rows = 0
    with JsonlWriter(small_disk / "rows.jsonl") as writer, pytest.raises(UserError, match="written before is whole"):
        while True:
            writer.append({"row": rows, "text": "x" * 999})
            rows += 1
    assert rows > 100
    assert [row["row"] for row in read_jsonl(small_disk / "rows.jsonl")] == list(range(rows))


def test_metrics_on_a_full_disk(small_disk):
    log = MetricsLog(small_disk, keep=lambda row: True)
    rows = 0
    with pytest.raises(UserError, match="cannot (append|write)"):
        while True:
            log.log({"kind": "train", "iteration": rows, "text": "x" * 2000}, rows)
            rows += 1
    log.close()
    assert [row["iteration"] for row in read_jsonl(small_disk / "metrics.jsonl")][:rows] == list(range(rows))


SCRIPT = """
import sys
from alignment.errors import UserError, run_main

def main():
    print("much text", flush=sys.argv[1] == "at once")
    if sys.argv[1] == "with an error":
        raise UserError("what went wrong")

run_main(main)
"""
FULL = "error: cannot write to disk: No space left on device; make room and run it again\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["-c", SCRIPT, "at the end"], FULL),
        (["-c", SCRIPT, "at once"], FULL),
        (["-c", SCRIPT, "with an error"], "error: what went wrong\n"),
        (["slurm/sweep_tasks.py", "--help"], FULL),
    ],
    ids=lambda value: value[-1],
)
def test_what_is_printed_onto_a_full_disk(command, said):
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # a file's text then waits in a buffer, as it does for users
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *command], cwd=REPO, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, said)


@pytest.fixture
def classified(tmp_path) -> Path:
    """A folder with two classified models, A and B, as arrays and points."""
    folder = tmp_path / "models"
    for name in "AB":
        rows = [POINT | {"prompt": f"p{number}"} for number in range(4)]
        write_jsonl(folder / f"{name}_points.jsonl", rows)
        save_npy(folder / f"{name}_Rs.npy", np.ones(4, np.float32))
        save_npy(folder / f"{name}_Cs.npy", -np.ones(4, np.float32))
        write_json(folder / f"{name}_summary.json", {"scorer": {"reward_model": {"name": "r"}}})
    return folder


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("a.npy", npy(np.ones(4)))
    return file.getvalue()


GOOD_NPY = npy(np.ones(4, np.float32))
ARRAYS = {
    "empty": b"",
    "a folder": None,
    "cut off in its head": GOOD_NPY[:40],
    "cut off": GOOD_NPY[:-3],
    "text": b"1.0\n2.0\n",
    "a pickle": npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "an archive": archive(),
    "a broken archive": archive()[:-30],
    "two dimensions": npy(np.ones((2, 2), np.float32)),
    "one number": npy(np.float32(1.0)),
    "whole numbers": npy(np.ones(4, np.int64)),
    "texts": npy(np.array(["a", "b"])),
    "another length": npy(np.ones(3, np.float32)),
    "more than there is memory for": GOOD_NPY.replace(b"(4,), }", b"(4" + b"0" * 17 + b",), }").replace(
        b" " * 17, b"", 1
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize("script", [GRID, RATIOS, PARETO, REPORT])
def test_damaged_arrays(classified, tmp_path, script, case):
    (classified / "B_Cs.npy").unlink()
    path = bad_file(classified, "B_Cs.npy", ARRAYS[case])
    message = refused(
        script, "--data_dir", classified, "--output", tmp_path / ("x.html" if script == REPORT else "x.png")
    )
    assert str(path) in message


RATINGS = {"helpfulness": {"A": 1000, "B": 1010.5}, "harmlessness": {"A": 1000, "B": 990}}
SPAN = {"rating": 1000, "low": 990, "high": 1010}
DETAILS = {
    "rating": {"method": "elo", "baseline": "A"},
    "dimensions": {d: {"ratings": {m: SPAN | {"rating": r} for m, r in part.items()}} for d, part in RATINGS.items()},
}
TABLES = {
    "empty": b"",
    "a folder": None,
    "cut off": json.dumps(RATINGS).encode()[:-5],
    "a list": b"[]",
    "not UTF-8": b'{"helpfulness": "\xff"}',
    "one dimension": json.dumps({"helpfulness": {"A": 1}}).encode(),
    "ratings in words": json.dumps(RATINGS | {"helpfulness": {"A": "high"}}).encode(),
    "ratings a list": json.dumps(RATINGS | {"helpfulness": [1000]}).encode(),
    "no number": b'{"helpfulness": {"A": NaN}, "harmlessness": {"A": 1}}',
    "without end": b'{"helpfulness": {"A": Infinity}, "harmlessness": {"A": 1}}',
    "no common model": json.dumps(RATINGS | {"helpfulness": {"C": 1}}).encode(),
}
DETAIL_FILES = {
    "empty": b"",
    "cut off": json.dumps(DETAILS).encode()[:-5],
    "a list": b"[]",
    "nothing in it": b"{}",
    "no method": json.dumps(DETAILS | {"rating": {}}).encode(),
    "method a list": json.dumps(DETAILS | {"rating": []}).encode(),
    "dimensions a list": json.dumps(DETAILS | {"dimensions": []}).encode(),
    "no interval": json.dumps(DETAILS).replace('"low"', '"lower"').encode(),
    "an interval in words": json.dumps(DETAILS).replace("1010,", '"1010",').replace("1010}", '"1010"}').encode(),
}


def ratings_readers(ratings: Path, classified: Path, tmp_path: Path) -> list[list]:
    return [
        [FIGURE, "--ratings", ratings, "--outfile", tmp_path / "x.png"],
        [PARETO, "--ratings", ratings, "--output", tmp_path / "x.png"],
        [REPORT, "--ratings", ratings, "--data_dir", classified, "--output", tmp_path / "x.html"],
    ]


@pytest.mark.parametrize("case", TABLES)
def test_damaged_ratings(classified, tmp_path, case):
    path = bad_file(tmp_path, "ratings.json", TABLES[case])
    for command in ratings_readers(path, classified, tmp_path):
        assert str(path) in refused(*command)


@pytest.mark.parametrize("case", DETAIL_FILES)
def test_damaged_details_of_ratings(classified, tmp_path, case):
    write_json(tmp_path / "ratings.json", RATINGS)
    path = bad_file(tmp_path, "ratings_details.json", DETAIL_FILES[case])
    for command in ratings_readers(tmp_path / "ratings.json", classified, tmp_path):
        assert str(path) in refused(*command)


@pytest.mark.parametrize("content", [b"[]", b'{"A": 5}', b"{", None])
def test_damaged_names(tmp_path, content):
    write_json(tmp_path / "ratings.json", RATINGS)
    path = bad_file(tmp_path, "names.json", content)
    output = ["--ratings", tmp_path / "ratings.json", "--outfile", tmp_path / "x.png"]
    assert str(path) in refused(FIGURE, "--name_map", path, *output)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b'{"scorer": 5}', b'{"scorer": "x"}', b"\xff", None])
def test_damaged_summaries(classified, tmp_path, content):
    (classified / "B_summary.json").unlink()
    path = bad_file(classified, "B_summary.json", content)
    commands = [
        [COMPARE, "A", "B", "--data_dir", classified, "--output", tmp_path / "c"],
        [REPORT, "--data_dir", classified, "--output", tmp_path / "x.html"],
        [
            RATE,
            "--judge",
            "scorer",
            "--data_dir",
            classified,
            "--ratings_out",
            tmp_path / "r.json",
            "--plot_out",
            tmp_path / "r.png",
        ],
    ]
    for command in commands:
        assert str(path) in refused(*command)
    if content != b'{"scorer": 5}' and content != b'{"scorer": "x"}':
        given = ["--responses_from", classified / "A_points.jsonl", "--output_dir", classified, "--model_name", "B"]
        assert str(path) in refused(CLASSIFY, *given, *NO_SCORER[:2])
        (tmp_path / "sweeps.yaml").write_text(
            f"sweeps: [{{model_name: B, output_dir: {classified}, policy_model_path: m}}]\n"
        )
        assert str(path) in refused("slurm/sweep_tasks.py", "todo", tmp_path / "sweeps.yaml", "B")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"deciding": []}', '{"deciding": "x"}', '{"deciding": null}']
)
def test_a_manifest_that_was_edited_by_hand(tmp_path, content):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}])
    path = bad_file(tmp_path / "run", "manifest.json", content.encode())
    files = ["--train_jsonl", tmp_path / "p.jsonl", "--eval_jsonl", tmp_path / "p.jsonl"]
    message = refused(GRPO, "--model_name", "no/model", *NO_SCORER, *files, "--output_dir", path.parent)
    assert str(path) in message


def test_a_report_shows_manifests_and_settings_that_are_no_text(classified, tmp_path):
    """They are shown, not understood: what is not UTF-8 in them is no reason to have no report."""
    write_jsonl(tmp_path / "run" / "metrics.jsonl", [{"kind": "train", "iteration": 0, "reward_mean": 1.0}])
    bad_file(tmp_path / "run", "manifest.json", b'{"command": "\xff"}')
    done = run_script(REPORT, "--data_dir", classified, "--runs", tmp_path / "run", "--output", tmp_path / "x.html")
    assert done.code == 0, done.err


class Refuses:
    """A scorer that is never asked."""

    def identity(self) -> dict:
        return {"name": "nobody"}


@pytest.mark.parametrize(
    "changed",
    [{"start": "0"}, {"rewards": 5}, {"costs": None}, {"errors": {}}, {"truncated": "no"}],
)
def test_saved_scores_that_were_edited_by_hand(tmp_path, changed):
    rows = [{"id": "1", "prompt": "p", "response": "r", "finished": True}]
    saved, chunk = tmp_path / "scores.jsonl", {"start": 0, "rewards": [1.0], "costs": [1.0], "errors": [None]}
    chunk |= {"truncated": [False]}
    with pytest.raises(AttributeError):  # writes what it is about, and has no one to ask
        add_scores([dict(row) for row in rows], Refuses(), 1, saved)
    write_jsonl(saved, [*read_jsonl(saved), chunk])
    add_scores([dict(row) for row in rows], Refuses(), 1, saved)
    write_jsonl(saved, [read_jsonl(saved)[0], chunk | changed])
    with pytest.raises(UserError, match=r"scores\.jsonl:2.*remove"):
        add_scores([dict(row) for row in rows], Refuses(), 1, saved)


def test_saved_answers_that_were_edited_by_hand(tiny_policy, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
    argv = ["--policy_model_path", str(tiny_policy), "--from_jsonl", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    config, path = load_settings([*argv, "--policy_max_new_tokens", "3"]), tmp_path / "generations.jsonl"
    rows = load_rows(config)
    generate_answers(config, rows, path)
    first, *answers = read_jsonl(path)
    del answers[1]["response"]
    write_jsonl(path, [first, *answers])
    with pytest.raises(UserError, match=r"generations\.jsonl:3: an answer without 'response'"):
        generate_answers(config, rows, path)
    write_jsonl(path, [first, answers[0]])
    generate_answers(config, rows, path)
    assert len(read_jsonl(path)) == 3
