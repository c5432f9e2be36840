"""Downloads LLaMA-7B and the Alpaca weight difference from the Hugging Face hub, or accepts folders that are already there.

    python alignment/alpaca/download_models.py --models_dir DIR          # DIR/llama-7b and DIR/alpaca-7b-wdiff, 41 GB
    python alignment/alpaca/download_models.py --base /path/to/llama-7b  # a local folder is looked at and left where it is

The two published repositories are pinned to a commit; another repository is taken at its newest commit unless a revision is
given. Weights come in one format only (safetensors where the repository has them). A download that was interrupted, or whose
process was killed, goes on at the byte where it stopped: since version 2 the hub's own `snapshot_download` begins such a file
anew, so weight files are fetched one by one with its `http_get`. Each folder gets SHA256SUMS with the hub's own checksums,
which recover_alpaca_weights.py checks, and download.json, which lets a later run, on a node without network, see that the
folder is complete.

HF_TOKEN (or `hf auth login`) for gated repositories; HF_ENDPOINT for a mirror.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from alignment.alpaca.integrity import SUMS_FILE, file_sha256
from alignment.alpaca.pairing import TOKENIZER_FILES
from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.model_folder import weight_files
from alignment.records import atomic_open, check_writable_folder, read_object, write_json

BASE_REPO = "huggyllama/llama-7b"
DIFF_REPO = "tatsu-lab/alpaca-7b-wdiff"
PINNED = {
    BASE_REPO: "8416d3fefb0cb3ff5775a7b13c1692d10ff1aa16",
    DIFF_REPO: "8648f73a244a70f4e39884e0f7670fe362aa3cf3",
}
RECEIPT = "download.json"
PART = ".part"  # ending of a file that is not complete
SMALL_FILES = (".json", ".model", ".md", ".txt", ".jinja")
SPARE_BYTES = 256 << 20


@dataclass
class Settings:
    base: str = setting(BASE_REPO, "the base: a hub repository or a local folder")
    base_revision: str | None = setting(None, "commit, tag or branch of the base; default: the pinned commit")
    diff: str = setting(DIFF_REPO, "the difference: a hub repository or a local folder")
    diff_revision: str | None = setting(None, "commit, tag or branch of the difference; default: the pinned commit")
    models_dir: str = setting("alignment/outputs/alpaca", "where downloaded models go, one folder each")


def main() -> None:
    settings = load_config(Settings, prog="download_models.py", description=__doc__)
    for source, revision in ((settings.base, settings.base_revision), (settings.diff, settings.diff_revision)):
        print(f"{source}: {fetch(source, revision, Path(settings.models_dir).expanduser())}")


def fetch(source: str, revision: str | None, models_dir: Path) -> Path:
    """The folder with the model `source`: itself if it is a local one, else `models_dir`/its name after the download.

    Raises UserError in plain words: gated, unknown, offline, no room, incomplete.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        check_complete(local)
        return local
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source}: no such folder, and not a hub repository (OWNER/NAME)")
    revision = revision or PINNED.get(source, "main")
    target = models_dir / source.split("/")[1]
    if is_downloaded(target, source, revision):
        print(f"{target}: complete, nothing to download")
    else:
        _download(source, revision, target)
    check_complete(target)
    return target


def check_complete(folder: Path) -> None:
    """Raises UserError naming the first part that a model folder lacks: config.json, every weight file, a tokenizer."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: config.json is missing, expected a model folder in Hugging Face layout")
    weight_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer ({' or '.join(TOKENIZER_FILES)}): download the folder again")


def is_downloaded(target: Path, repo: str, revision: str) -> bool:
    """Whether an earlier run has finished this very download and all its files still have their sizes."""
    if not (target / RECEIPT).is_file():
        return False
    receipt = read_object(target / RECEIPT, repo=str, revision=str, commit=str, files=dict)
    if receipt["repo"] != repo or revision not in (receipt["revision"], receipt["commit"]):
        return False
    return all(
        (target / name).is_file() and (target / name).stat().st_size == size for name, size in receipt["files"].items()
    )


def choose_files(names: list[str]) -> list[str]:
    """What to take of a repository's files: its top level, small files, and weights in one format."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.startswith("model") and name.endswith(".safetensors")]
    weights = weights or [name for name in top if name.startswith("pytorch_model") and name.endswith(".bin")]
    other_format = ".bin.index.json" if weights and weights[0].endswith(".safetensors") else ".safetensors.index.json"
    small = [name for name in top if name.endswith(SMALL_FILES) or name.startswith("LICENSE")]
    return sorted(weights + [name for name in small if not name.endswith(other_format)])


def _download(repo: str, revision: str, target: Path) -> None:
    check_writable_folder(target)
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # the hub's own kinds, and those of the HTTP library below it
        raise _in_plain_words(error, repo, revision) from error
    commit = info.sha or revision
    files = {file.rfilename: file for file in info.siblings or []}
    chosen = choose_files(list(files))
    if not any(name.endswith((".safetensors", ".bin")) for name in chosen):
        raise UserError(f"{repo}: has no weights in Hugging Face layout at revision {revision}")
    sizes = {name: files[name].size or 0 for name in chosen}
    _check_room(repo, target, sizes)
    (target / RECEIPT).unlink(missing_ok=True)  # it comes back when everything is there
    sums = {name: lfs.sha256 for name in chosen if (lfs := files[name].lfs) is not None}  # of the large files
    try:
        snapshot_download(repo, revision=commit, local_dir=target, allow_patterns=[x for x in chosen if x not in sums])
        for name, sha256 in sums.items():
            _fetch_file(repo, commit, target / name, sizes[name], sha256)
    except UserError:
        raise
    except Exception as error:
        raise _in_plain_words(error, repo, revision) from error
    for name, size in sizes.items():
        found = (target / name).stat().st_size if (target / name).is_file() else 0
        if found != size:
            raise UserError(f"{target}/{name}: {found} bytes, the hub says {size}: delete it and run this again")
    with atomic_open(target / SUMS_FILE) as file:
        file.write("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()))
    write_json(target / RECEIPT, {"repo": repo, "revision": revision, "commit": commit, "files": sizes})


def _fetch_file(repo: str, commit: str, path: Path, size: int, sha256: str) -> None:
    """Downloads one large file; what is there already, of the file or of its first part, is not fetched again."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if path.is_file() and path.stat().st_size == size:
        return
    part = path.with_name(path.name + PART)
    if part.is_file() and part.stat().st_size > size:
        part.unlink()
    with open(part, "ab") as file:
        url = hf_hub_url(repo, path.name, revision=commit)
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=size)
        file.flush()
        os.fsync(file.fileno())
    if file_sha256(part) != sha256:
        part.unlink()
        raise UserError(f"{path}: what came is not what the hub has (SHA-256 differs): run this again")
    part.replace(path)


def _check_room(repo: str, target: Path, sizes: dict[str, int]) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another --models_dir") from error
    missing = sum(
        size for name, size in sizes.items() if not (target / name).is_file() or (target / name).stat().st_size != size
    )
    # Parts of an interrupted download are completed, not fetched again.
    missing -= sum(part.stat().st_size for part in target.glob(f"*{PART}"))
    free = shutil.disk_usage(target).free
    if missing + SPARE_BYTES > free:
        raise UserError(
            f"{target}: {free / 1e9:.1f} GB free, {repo} needs {(missing + SPARE_BYTES) / 1e9:.1f} GB: make room or "
            f"choose another --models_dir"
        )


def _in_plain_words(error: Exception, repo: str, revision: str) -> UserError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    elsewhere = "download on a node with network and run again, or give a local folder"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then set HF_TOKEN (or run `hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{repo}: no such repository, or a private one: check the name, set HF_TOKEN if it is private")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{repo}: has no revision {revision}; leave the revision out for the pinned or newest one")
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(f"{repo}: is not here, and HF_HUB_OFFLINE forbids to download it: unset it; {elsewhere}")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = "set HF_TOKEN to a valid token" if status in (401, 403) else "try again later"
        return UserError(f"{repo}: the hub answered {status}: {hint}; {elsewhere}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"{repo}: {error.strerror} while downloading: make room and run again, it goes on where it stopped"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, LocalEntryNotFoundError):
        return UserError(f"{repo}: {error.strerror}: {error.filename or ''}")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"{repo}: {constants.ENDPOINT} cannot be reached ({reason}): {elsewhere}")


if __name__ == "__main__":
    run_main(main)
