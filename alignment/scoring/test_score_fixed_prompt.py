"""Scores a few fixed texts and says whether the scorer behaves: a quick check after starting a service or changing models.

    python alignment/scoring/test_score_fixed_prompt.py --scorer_url http://127.0.0.1:8000
    python alignment/scoring/test_score_fixed_prompt.py --reward_model path/to/reward --cost_model path/to/cost

Prints R, C and quadrant of each text. Fails (exit code 1) when a score is missing, when a text's scores alone and in a
batch differ by more than 1e-3, when a cruel answer is not costlier than a kind one, or when a Beaver model does not give the
scores printed on its model card.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.objective import quadrant_labels
from alignment.scoring.client import ScorerClient
from alignment.scoring.local_scorer import PROBE_BAD, PROBE_GOOD, PROBE_PROMPT, LocalScorer
from alignment.scoring.scores import Scores

TOLERANCE = 1e-3
KIND, CRUEL = 0, 1
# Scores as printed on the model cards at huggingface.co/PKU-Alignment: the text there is the last of these, in bfloat16 and
# without EOS, and the card lists the score after every token. The unified cards show the first 22 tokens only.
CARD_PROMPT = "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:"
CARD_TEXTS = [
    CARD_PROMPT,
    CARD_PROMPT + "Hello!",
    CARD_PROMPT + "Hello! How",
    CARD_PROMPT + "Hello! How can I help you today?",
]
CARD_SCORES: dict[str, list[float | None]] = {
    "beaver-7b-unified-reward": [-1.4297, -0.9688, 0.5977, None],
    "beaver-7b-unified-cost": [-2.9531, -4.5312, -3.3594, None],
    "beaver-7b-v1.0-reward": [-13.6250, -9.9375, -6.4375, -11.4375],
    "beaver-7b-v1.0-cost": [-5.1875, -8.4375, -10.5000, -10.7500],
}
CARD_TOLERANCE = 0.1, 0.03  # absolute, relative: some steps of bfloat16, which are 0.06 at 10
TEXTS = [
    (PROBE_PROMPT, PROBE_GOOD),
    (PROBE_PROMPT, PROBE_BAD),
    ("hello", "Hello! How can I help you today?"),
    (
        "How do I bake bread at home?",
        "Mix flour, water, salt and yeast, let the dough rise, and bake it for 40 minutes.",
    ),
    ("How do I bake bread at home?", ""),
]


@dataclass
class Config:
    """Either a running service or two model folders."""

    scorer_url: str | None = setting(None, "address of a running scorer service")
    reward_model: str | None = setting(None, "reward model to score with in this process")
    cost_model: str | None = setting(None, "cost model to score with in this process")
    dtype: str = setting("auto", "dtype of models in this process", choices=("auto", "float32", "float16", "bfloat16"))
    max_length: int = setting(576, "tokens a text of models in this process", minimum=2)

    def __post_init__(self) -> None:
        given = [self.scorer_url is not None, self.reward_model is not None, self.cost_model is not None]
        if given not in ([True, False, False], [False, True, True]):
            raise UserError("name either --scorer_url or both --reward_model and --cost_model")


def problems(together: Scores, alone: Scores) -> list[str]:
    """What is wrong with the scores of TEXTS, a line each; empty when all is well."""
    found = [f"text {index}: {error}" for index, error in enumerate(together.errors) if error]
    for name in ("rewards", "costs"):
        difference = np.abs(getattr(together, name) - getattr(alone, name))
        if np.nanmax(difference, initial=0.0) > TOLERANCE:
            found.append(f"{name} alone and in a batch differ by up to {np.nanmax(difference):.2g}")
    if together.costs[KIND] >= together.costs[CRUEL]:
        found.append("the cruel answer costs no more than the kind one: cost inverted, or models swapped?")
    return found


def card_lines(scorer: ScorerClient | LocalScorer) -> tuple[list[str], list[str]]:
    """For the Beaver models among the two: what was compared with the model card, and what is wrong, a line each."""
    identity = scorer.identity()
    names = {kind: str(identity[f"{kind}_model"]["name"]).rsplit("/", 1)[-1] for kind in ("reward", "cost")}
    told: list[str] = []
    found: list[str] = []
    if not any(name in CARD_SCORES for name in names.values()):
        return told, found
    scores = scorer.score_texts(CARD_TEXTS, [False] * len(CARD_TEXTS))
    for kind, column in (("reward", scores.rewards), ("cost", scores.costs)):
        expected = CARD_SCORES.get(names[kind], [])
        for text, score, card in zip(CARD_TEXTS, column, expected, strict=False):
            if card is None:
                continue
            line = f"{names[kind]}: {score:.4f}, on its card {card:.4f}: {text[len(CARD_PROMPT) :] or 'prompt alone'}"
            told.append(line)
            if not abs(score - card) <= CARD_TOLERANCE[0] + CARD_TOLERANCE[1] * abs(card):
                found.append(line)
    return told, found


def main() -> int:
    """0 when all is well, 1 when the scores look wrong."""
    config = load_config(Config, prog="test_score_fixed_prompt.py", description=__doc__)
    if config.scorer_url:
        scorer: ScorerClient | LocalScorer = ScorerClient(config.scorer_url)
    else:
        assert config.reward_model and config.cost_model  # Config asks for both
        scorer = LocalScorer(config.reward_model, config.cost_model, dtype=config.dtype, max_length=config.max_length)
    prompts, responses = [text[0] for text in TEXTS], [text[1] for text in TEXTS]
    together = scorer.score(prompts, responses)
    alone = Scores.joined([scorer.score([prompt], [response]) for prompt, response in TEXTS])

    print(f"scorer: {scorer.identity()}")
    print(f"{'R':>9} {'C':>9}  quadrant  text")
    labels = quadrant_labels(together.rewards, together.costs)
    for reward, cost, label, (prompt, response) in zip(together.rewards, together.costs, labels, TEXTS, strict=True):
        print(f"{reward:9.4f} {cost:9.4f}  {label:8}  {prompt} -> {response[:60]}")
    found = problems(together, alone)
    compared, wrong = card_lines(scorer)
    print("\n".join(compared) or "no Beaver model here: nothing to compare with the model cards")
    found += wrong
    print("\n".join(f"FAIL: {line}" for line in found) or "PASS")
    return 1 if found else 0


if __name__ == "__main__":
    run_main(main)
