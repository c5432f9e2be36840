"""The scorer service's environment, read and checked before anything is loaded. Its variables stand in README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from alignment.conversation import get_template
from alignment.errors import UserError
from alignment.scoring.discovery import LOOPBACK, new_token, read_secret

Default = TypeVar("Default", int, None)

DEFAULT_REWARD = "PKU-Alignment/beaver-7b-unified-reward"
DEFAULT_COST = "PKU-Alignment/beaver-7b-unified-cost"
DTYPES = ("auto", "float32", "float16", "bfloat16")
DIGITS = 9  # of a number of anything here: what has more is a mistake
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may be. Each is the environment variable SCORER_<NAME>."""

    max_body: int = 32 * 2**20  # bytes of a request
    max_texts: int = 10_000  # of a request
    max_characters: int = 2_000_000  # of one text; a prompt and its response are one
    max_queued_tokens: int = 8_000_000  # of all texts that wait for their scores
    max_requests: int = 512  # under way, from their first byte to their answer
    stop_seconds: int = 25  # that SIGTERM leaves for what is queued; SLURM kills after 30
    stuck_seconds: int = 600  # that a round may take, before /health calls the scorer stuck


@dataclass(frozen=True)
class Settings:
    """The environment, read and checked."""

    host: str
    port: int | None  # None: not asked for
    auth: str | None = field(repr=False)  # the token, None for no check
    token_file: str | None  # where the token came from, if from a file
    logs_dir: str | None  # None: the address is not published there
    address_file: str | None
    probe: dict | None
    probe_off: bool
    log_texts: bool
    limits: Limits
    scorer: dict = field(repr=False)  # LocalScorer's arguments


def read_settings(env: Mapping[str, str], port: int | None = None) -> Settings:
    """Settings from the environment. Raises UserError naming the variable."""
    host = env.get("HOST") or "127.0.0.1"
    auth, token_file = read_token(env, host)
    dtype = env.get("SCORER_DTYPE") or "auto"
    bf16 = _switch(env, "USE_BF16")
    if bf16 is not None:
        # Published: bfloat16 when true, float16 when false.
        asked = "bfloat16" if bf16 else "float16"
        if dtype not in ("auto", asked):
            raise UserError(f"USE_BF16 asks for {asked}, SCORER_DTYPE for {dtype}: set one of them")
        dtype = asked
    if dtype not in DTYPES:
        raise UserError(f"SCORER_DTYPE is {dtype!r}, expected one of {', '.join(DTYPES)}")
    template = env.get("SCORER_TEMPLATE") or "pku"
    if template != "chat":  # which is the models' own
        try:
            get_template(template)
        except UserError as error:
            raise UserError(f"SCORER_TEMPLATE: {error}") from error
    probe = env.get("SCORER_PROBES") or ""
    address_file = env.get("SCORER_ADDRESS_FILE") or None
    limits = Limits()
    scorer = {
        "reward_model": env.get("REWARD_MODEL") or DEFAULT_REWARD,
        "cost_model": env.get("COST_MODEL") or DEFAULT_COST,
        "dtype": dtype,
        "max_length": _integer(env, "MAX_LENGTH", 576, least=2),
        "template": template,
        "deterministic": _switch(env, "SCORER_DETERMINISTIC"),
        "reference": bool(_switch(env, "SCORER_REFERENCE")),
        "fp8": bool(_switch(env, "SCORER_FP8")),
        "calibration": env.get("SCORER_CALIBRATION") or None,
    }
    return Settings(
        host=host,
        port=_integer(env, "PORT", None) if port is None else port,
        auth=auth,
        token_file=token_file,
        # Who names a file for the address finds the scorer there, and need not meet it in everybody's folder.
        logs_dir=env.get("LOGS_DIR") or (None if address_file else "logs"),
        address_file=address_file,
        probe=read_probe(probe) if probe and probe != "none" else None,
        probe_off=probe == "none",
        log_texts=bool(_switch(env, "SCORER_LOG_TEXTS")),
        limits=Limits(
            **{name: _integer(env, f"SCORER_{name.upper()}", value, least=1) for name, value in vars(limits).items()}
        ),
        scorer=scorer,
    )


def read_token(env: Mapping[str, str], host: str) -> tuple[str | None, str | None]:
    """The token to ask for, and the file that it came from. Beyond loopback one is made up unless SCORER_AUTH=none."""
    auth, path = env.get("SCORER_AUTH") or None, env.get("SCORER_TOKEN_FILE") or None
    if auth and path:
        raise UserError("SCORER_AUTH and SCORER_TOKEN_FILE both name a token: set one of them")
    token = read_secret(path) if path else auth
    if token == "none":
        return None, None
    if token is None:
        return (None if host in LOOPBACK else new_token()), None
    if not token.isprintable() or " " in token:
        raise UserError(
            f"{'SCORER_TOKEN_FILE' if path else 'SCORER_AUTH'}: a token has no spaces or control characters"
        )
    return token, str(Path(path).resolve()) if path else None


def read_probe(path: str) -> dict:
    """{"prompt", "good", "bad"} from a JSON file, in place of the built-in start-up texts."""
    try:
        probe = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: str(probe[key]) for key in ("prompt", "good", "bad")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"SCORER_PROBES: {path}: expected a JSON object with prompt, good, bad: {error}") from error


def _switch(env: Mapping[str, str], name: str) -> bool | None:
    value = env.get(name, "").strip().lower()
    if value and value not in TRUE | FALSE:
        raise UserError(f"{name} is {env[name]!r}, expected 1 or 0 (or true, false)")
    return value in TRUE if value else None


def _integer(env: Mapping[str, str], name: str, default: Default, least: int = 0) -> int | Default:
    value = env.get(name, "").strip()
    if not value:
        return default
    if not (value.isascii() and value.isdecimal()) or len(value) > DIGITS or int(value) < least:
        raise UserError(f"{name} is {value[:40]!r}, expected a whole number" + (f" from {least} on" if least else ""))
    return int(value)
