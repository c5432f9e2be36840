"""The policy's own turn in sampled token ids: what is scored, and which tokens are trained on."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.generation import Generation, TransformersEngine


@dataclass(frozen=True)
class Turn:
    """One completion. `ids` is what TRL pads, scores and trains on; when `closed`, their last one is an EOS of ours."""

    answer: Generation
    ids: list[int]
    closed: bool


def own_turn(engine: TransformersEngine, prompt_ids: list[int], tokens: list[int]) -> Turn:
    """Reads sampled `tokens` (up to and with EOS) as the engine does, and drops the ids of an invented next turn.

    The kept ids are the most whose text is no longer than the response. They are closed with EOS, so that TRL counts the
    completion as finished; the model did not sample that EOS, so it must not be trained on.
    """
    answer = engine.read(prompt_ids, tokens)
    if not answer.cut:
        ended = answer.num_tokens < len(tokens)
        return Turn(answer, tokens[: answer.num_tokens + ended], closed=False)
    # Not a bisection: in the middle of a character of several byte tokens the text's length goes up and down.
    kept = answer.num_tokens
    while len(engine.read(prompt_ids, tokens[:kept]).raw) > len(answer.response):
        kept -= 1
    return Turn(answer, [*tokens[:kept], engine.tokenizer.eos_token_id], closed=True)
