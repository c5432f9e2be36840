"""Verifies a recovered model: files against the manifest, token ids against the weights, answers in both templates.

    python alignment/alpaca/verify_alpaca.py --model_path MODEL [--expect Paris]

Exit code 0 when everything holds, 1 when something does not (each finding is a line), 2 when it cannot be looked at.
The model is asked in Alpaca's own template, which it was tuned with, and in the conversation template that the rest of this
project uses by default; the answers are printed for a person to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from alignment.alpaca.integrity import MANIFEST, damaged_tensors, read_manifest
from alignment.config import load_config, setting
from alignment.conversation import get_template
from alignment.errors import UserError, run_main
from alignment.generation import TransformersEngine

TEMPLATES = ("alpaca", "pku")


@dataclass
class Settings:
    model_path: str = setting("", "folder of the recovered model", aliases=("--path_tuned",))
    prompt: str = setting("What is the capital of France?", "what the model is asked")
    expect: str | None = setting(None, "text that the answer in Alpaca's template must contain, in any case")
    max_new_tokens: int = setting(64, "longest answer", minimum=1)
    check_files: bool = setting(True, f"compare every tensor with {MANIFEST}")
    dtype: str = setting(
        "auto", "dtype to load in; auto: float32 on a CPU", choices=("auto", "float32", "float16", "bfloat16")
    )
    device: str = setting("cpu", "cpu or cuda:N")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise UserError("--model_path is needed (--help explains it)")


def main() -> int:
    settings = load_config(Settings, prog="verify_alpaca.py", description=__doc__)
    folder = Path(settings.model_path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected the folder that recover_alpaca_weights.py wrote")
    if settings.check_files:
        findings = file_findings(folder)
        if findings:  # corrupt weights are not worth loading
            return report(findings)
    engine = TransformersEngine(folder, template=TEMPLATES[0], device=settings.device, dtype=settings.dtype)
    findings = id_findings(engine)
    for template in TEMPLATES:
        findings += answer_findings(engine, template, settings)
    return report(findings)


def report(findings: list[str]) -> int:
    for finding in findings:
        print(f"FAILED: {finding}")
    print(f"not verified: {len(findings)} of the checks failed" if findings else "verified")
    return 1 if findings else 0


def file_findings(folder: Path) -> list[str]:
    """Every tensor against the manifest: which file and which tensor is missing or corrupt."""
    if not (folder / MANIFEST).is_file():
        print(f"{folder}: no {MANIFEST}, so the files have nothing to be compared with")
        return []
    tensors = read_manifest(folder / MANIFEST)["tensors"]
    findings = damaged_tensors(folder, tensors)
    print(f"files: {len(tensors) - len(findings)} of {len(tensors)} tensors as in {MANIFEST}")
    return findings


def id_findings(engine: TransformersEngine) -> list[str]:
    """Sizes and special ids of tokenizer, config and weights against each other."""
    tokenizer, model = engine.tokenizer, engine.model
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    head_rows = model.get_output_embeddings().weight.shape[0]
    findings = []
    if not rows == head_rows == model.config.vocab_size:
        findings.append(
            f"embeddings have {rows} rows, the head {head_rows}, config.json says {model.config.vocab_size}"
        )
    if len(tokenizer) != rows:
        findings.append(f"the tokenizer has {len(tokenizer)} tokens, the embeddings {rows} rows")
    if tokenizer.pad_token_id is None:
        findings.append("the tokenizer has no pad token, expected [PAD] from the difference")
    elif tokenizer.pad_token_id != rows - 1:
        findings.append(f"the pad token has id {tokenizer.pad_token_id}, expected the added row {rows - 1}")
    for name in ("bos_token_id", "eos_token_id"):
        own, configured = getattr(tokenizer, name), getattr(model.config, name)
        if own != configured:
            findings.append(f"{name}: the tokenizer says {own}, config.json {configured}")
    print(f"ids: {rows} rows, bos {tokenizer.bos_token_id}, eos {tokenizer.eos_token_id}, pad {tokenizer.pad_token_id}")
    return findings


def answer_findings(engine: TransformersEngine, template: str, settings: Settings) -> list[str]:
    """One greedy answer in the template; prints it."""
    engine.template = get_template(template, engine.tokenizer)
    ids = engine.template.encode_prompt(engine.tokenizer, settings.prompt)
    findings = []
    if ids[0] != engine.tokenizer.bos_token_id:
        findings.append(f"{template}: the prompt begins with id {ids[0]}, not with bos {engine.tokenizer.bos_token_id}")
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([ids], device=engine.device)).logits
    if not torch.isfinite(logits).all():
        return [*findings, f"{template}: the model's output is not finite"]
    answer = engine.generate([settings.prompt], settings.max_new_tokens)[0]
    print(
        f"{template}: {answer.response.strip()!r} ({answer.num_tokens} tokens, {'' if answer.finished else 'not '}finished)"
    )
    if not answer.response.strip():
        findings.append(f"{template}: the answer to {settings.prompt!r} is empty")
    expected = settings.expect if template == "alpaca" else None
    if expected is not None and expected.lower() not in answer.response.lower():
        findings.append(
            f"{template}: the answer to {settings.prompt!r} does not contain {expected!r}: {answer.response!r}"
        )
    return findings


if __name__ == "__main__":
    run_main(main)
