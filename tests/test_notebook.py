"""select_pku_balanced.ipynb as papermill runs it, on the embedded sample and on the real rows."""

import subprocess
import sys
from pathlib import Path

import pytest

from alignment.evaluation.selection import same_words, usual_folder
from alignment.records import read_json, read_jsonl

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path("alignment/evaluation/select_pku_balanced.ipynb")


def execute(folder: Path, **parameters) -> subprocess.CompletedProcess:
    pytest.importorskip("papermill")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOK),
        str(folder / "run.ipynb"),
        "-k",
        "python3",
        "--log-output",
    ]
    for name, value in ({"output_dir": folder / "data"} | parameters).items():
        command += ["-p", name, str(value)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def outputs(path: Path) -> list[dict]:
    cells = nbformat.read(path, as_version=4).cells
    return [output.get("data", {}) for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_committed_notebook_is_clean_and_takes_parameters():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    given: dict = {}
    exec(parameters.source, given)
    assert (given["train_size"], given["eval_size"], given["seed"], given["config"]) == (250, 500, 42, "alpaca-7b")
    assert given["data"] == "PKU-Alignment/PKU-SafeRLHF" and given["reference"] is False


def test_the_sample_does_not_replace_a_real_selection():
    """Both had the names custom_train_250.jsonl and custom_eval_500.jsonl in alignment/data."""
    real = usual_folder("PKU-Alignment/PKU-SafeRLHF")
    assert real == Path("alignment/data").resolve() and usual_folder("sample") == real / "sample"
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert "write_selection(selection, settings, found, output_dir or usual_folder(data))" in cells[-1].source


@pytest.mark.slow
def test_the_embedded_sample(tmp_path):
    done = execute(tmp_path, data="sample")
    assert done.returncode == 0, done.stderr[-2000:]
    train, evaluation = (read_jsonl(tmp_path / "data" / f"custom_{name}.jsonl") for name in ("train_250", "eval_500"))
    assert (len(train), len(evaluation)) == (250, 500)
    assert not {same_words(one["prompt"]) for one in train} & {same_words(one["prompt"]) for one in evaluation}
    assert (tmp_path / "data" / "pool_stats.json").exists()
    shown = outputs(tmp_path / "run.ipynb")
    assert sum("image/png" in data for data in shown) == 3
    assert sum("text/markdown" in data for data in shown) == 5


@pytest.mark.slow
def test_the_real_rows(goldens, tmp_path):
    data = b"".join(path.read_bytes() for path in sorted((goldens / "data").glob("*/*.jsonl")))
    (tmp_path / "rows.jsonl").write_bytes(data)
    test_data = goldens / "quadrants" / "Alpaca-7B_points.jsonl"
    done = execute(tmp_path, data=tmp_path / "rows.jsonl", test_data=test_data, train_size=100, eval_size=200)
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(tmp_path / "data" / "selection_report.json")
    assert report["leakage"]["train and eval"]["prompts"] == 0 and report["rows"]["identical_rows"] == 21
    assert set(report["leakage"]) == {"train and eval", "train and test", "eval and test"}
    text = "".join(data.get("text/markdown", "") for data in outputs(tmp_path / "run.ipynb"))
    assert "(False, True) only response 1 safe" in text and "| eval and test " in text


@pytest.mark.slow
def test_a_mistake_ends_the_run_with_its_reason(tmp_path):
    done = execute(tmp_path, data="sample", train_size=2000)
    assert done.returncode != 0 and "lower train_size or eval_size" in done.stderr
    assert not (tmp_path / "data").exists()
