"""Downloading for the recovery, through the real hub library against a small server that answers as the hub does."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignment.alpaca.download_models import (
    BASE_REPO,
    PINNED,
    RECEIPT,
    Settings,
    check_complete,
    choose_files,
    fetch,
    is_downloaded,
)
from alignment.alpaca.integrity import SUMS_FILE, read_sums
from alignment.errors import UserError

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "alignment" / "alpaca" / "download_models.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository `owner/tiny` with `files`; `refusal` is (status, X-Error-Code) for every request when set."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = files
        self.refusal: tuple[int, str] | None = None
        self.stop_after: int | None = None  # bytes of a weight file after which the server falls silent
        self.ranges: list[str] = []
        self.requests = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        hub: Hub = self.server
        hub.requests += 1
        path = self.path.split("?")[0]
        if hub.refusal is not None:
            self.reply(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
        elif path.startswith("/api/models/owner/tiny/revision/"):
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": digest(content), **lfs(name, content)}
                for name, content in hub.files.items()
            ]
            self.reply(200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/owner/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": digest(content), **lfs(name, content)}
                for name, content in hub.files.items()
            ]
            self.reply(200, json.dumps(tree).encode())
        elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            self.send_file(path.rsplit("/", 1)[1], body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str, body: bool):
        hub: Hub = self.server
        content = hub.files[name]
        start = 0
        if "Range" in self.headers:
            hub.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        if hub.stop_after is not None and name.endswith(".safetensors"):
            self.wfile.write(content[start : start + hub.stop_after])
            time.sleep(60)
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def reply(self, status: int, content: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lfs(name: str, content: bytes) -> dict:
    if not name.endswith((".safetensors", ".bin", ".model")):
        return {}
    return {"lfs": {"sha256": digest(content), "oid": digest(content), "size": len(content), "pointerSize": 130}}


@pytest.fixture
def hub(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file({"x": torch.randn(3_000_000)}, weights)
    server = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "model.safetensors": weights.read_bytes(),
            "pytorch_model.bin": b"the same in the other format",
            "tokenizer.model": b"pieces",
            "run_me.py": b"print()",
        }
    )
    yield server
    server.shutdown()
    server.server_close()


def download(hub_url: str, tmp_path: Path, *flags: str, **environment: str) -> subprocess.Popen:
    """The script for the hub's repository as base and difference, with a home of its own."""
    own = {"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, str(SCRIPT), "--base", "owner/tiny", "--diff", "owner/tiny"]
    return subprocess.Popen(
        [*command, "--models_dir", str(tmp_path / "models"), *flags],
        env={**os.environ, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_download_is_complete_has_checksums_and_is_not_repeated(hub, tmp_path):
    code, _, err = finish(download(hub.url, tmp_path))
    assert code == 0, err
    folder = tmp_path / "models" / "tiny"
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert names == {"config.json", "model.safetensors", "tokenizer.model", SUMS_FILE, RECEIPT}
    for name in names - {SUMS_FILE, RECEIPT}:
        assert (folder / name).read_bytes() == hub.files[name]
    assert read_sums(folder) == {name: digest(hub.files[name]) for name in ("model.safetensors", "tokenizer.model")}
    assert json.loads((folder / RECEIPT).read_text())["commit"] == COMMIT
    # Complete: a node without network is enough from now on.
    asked = hub.requests
    assert fetch("owner/tiny", None, tmp_path / "models") == folder
    assert fetch("owner/tiny", COMMIT, tmp_path / "models") == folder
    assert hub.requests == asked
    assert not is_downloaded(folder, "owner/tiny", "another-revision")
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert not is_downloaded(folder, "owner/tiny", "main")


@pytest.mark.slow
def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    hub.stop_after = 11_000_000  # the library writes in pieces of 10 MB
    process = download(hub.url, tmp_path)
    folder = tmp_path / "models" / "tiny"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        part = folder / "model.safetensors.part"
        if part.is_file() and part.stat().st_size > 9_000_000:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / RECEIPT).exists() and not (folder / "model.safetensors").exists()
    hub.stop_after = None
    code, _, err = finish(download(hub.url, tmp_path))
    assert code == 0, err
    assert len(hub.ranges) == 1 and int(hub.ranges[0].removeprefix("bytes=").split("-")[0]) > 9_000_000
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_file_that_came_corrupt_is_not_kept(hub, tmp_path):
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"the beginning of something else")
    code, _, err = finish(download(hub.url, tmp_path))
    assert code == 2 and "SHA-256 differs" in err and err.count("\n") == 1
    assert not list(folder.glob("model.safetensors*"))


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((403, "GatedRepo"), ["owner/tiny is gated", "accept its terms", "HF_TOKEN"]),
        ((404, "RepoNotFound"), ["no such repository"]),
        ((404, "RevisionNotFound"), ["has no revision main"]),
        ((403, ""), ["answered 403", "HF_TOKEN"]),
    ],
)
def test_the_hubs_refusals_in_plain_words(hub, tmp_path, refusal, words):
    hub.refusal = refusal
    code, _, err = finish(download(hub.url, tmp_path))
    assert code == 2 and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (tmp_path / "models").exists()


def test_offline_is_said(tmp_path):
    code, _, err = finish(download("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1"))
    assert code == 2 and "HF_HUB_OFFLINE" in err and "local folder" in err and err.count("\n") == 1


def test_no_network_is_said(tmp_path):
    code, _, err = finish(download("http://127.0.0.1:9", tmp_path))
    assert code == 2 and "cannot be reached" in err and "node with network" in err and err.count("\n") == 1


def test_room_is_looked_at_before_the_download(hub, tmp_path):
    hub.files["model.safetensors"] = b"x"
    real = json.dumps  # the hub claims a size that no disk has

    def claims(value, *args, **more):
        for file in value.get("siblings", []) if isinstance(value, dict) else []:
            if file["rfilename"] == "model.safetensors":
                file["size"] = 10**18
        return real(value, *args, **more)

    json.dumps = claims
    try:
        code, _, err = finish(download(hub.url, tmp_path))
    finally:
        json.dumps = real
    assert code == 2 and "GB free, owner/tiny needs" in err and "--models_dir" in err
    assert not (tmp_path / "models" / "tiny" / "config.json").exists()


def test_a_target_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "models").write_text("a file")
    code, _, err = finish(download(hub.url, tmp_path))
    assert code == 2 and f"cannot write {tmp_path}/models/tiny" in err and err.count("\n") == 1


def test_local_folders_are_looked_at_and_left_where_they_are(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    for name, content in (("config.json", b"{}"), ("model.safetensors", b"w"), ("tokenizer.model", b"t")):
        with pytest.raises(UserError, match=str(folder)):
            fetch(str(folder), None, tmp_path / "models")
        (folder / name).write_bytes(content)
    assert fetch(str(folder), None, tmp_path / "models") == folder
    assert not (tmp_path / "models").exists()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors"):
        check_complete(folder)
    with pytest.raises(UserError, match="no such folder"):
        fetch(str(tmp_path / "nowhere"), None, tmp_path / "models")


def test_one_weight_format_is_taken():
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "LICENSE",
        "a/config.json",
    ]
    names += [
        "model.safetensors.index.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "x.py",
    ]
    assert choose_files(names) == sorted(["config.json", "LICENSE", *names[1:3], "model.safetensors.index.json"])
    only_bin = [name for name in names if "safetensors" not in name]
    assert choose_files(only_bin) == [
        "LICENSE",
        "config.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    ]


def test_the_published_repositories_are_pinned():
    assert all(len(commit) == 40 for commit in PINNED.values())
    assert Settings().base == BASE_REPO and set(PINNED) == {Settings().base, Settings().diff}
