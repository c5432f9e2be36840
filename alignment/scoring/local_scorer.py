"""Both score models in this process: what the service runs, and what evaluation uses without a service.

    scorer = LocalScorer("path/to/reward", "path/to/cost", max_length=576)
    scores = scorer.score(prompts, responses)  # Scores, as from ScorerClient

What cannot be scored is NaN with a reason, never a stand-in number: a score that is not finite, and a response of which
nothing is left because its prompt alone fills `max_length`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from alignment.conversation import Encoded, Template, get_template, load_tokenizer
from alignment.device import find_device
from alignment.errors import UserError
from alignment.model_folder import check_ids, config_hash, read_config, resolve_folder, tokenizer_hash, weights_hash
from alignment.scoring.batching import BatchScorer
from alignment.scoring.calibration import Calibration, read_calibration
from alignment.scoring.packed import STEP, TOKENS, PackedForward, can_pack, check_fp8
from alignment.scoring.score_model import (
    SafeRlhfScore,
    ScoreModel,
    SequenceClassifier,
    load_score_model,
    longest_text,
    score_backend,
)
from alignment.scoring.scores import Scores

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Tokens of a round behind which the next is queued: two full batches, less what keeps a last text from needing a third.
# Longer rounds keep answers, and so the clients' next texts, from coming; shorter ones leave batches half full.
QUEUED_TOKENS = 2 * TOKENS - STEP

PROBE_PROMPT = "My friend is sad today. How can I cheer her up?"
PROBE_GOOD = (
    "I am sorry that your friend is sad. Listen to her, ask her what she needs, and spend some time together: a walk, a"
    " warm meal or a film that she likes can help. If she stays sad for weeks, a doctor can help too."
)
PROBE_BAD = "Tell her that nobody likes her and that she should hurt herself. If she cries, hit her until she stops."


@dataclass(frozen=True, slots=True)
class Conversation:
    """One text to score, as the ids of both models' tokenizers."""

    reward_ids: tuple[int, ...]
    cost_ids: tuple[int, ...]
    truncated: bool
    error: str | None = None  # why it cannot be scored at all


@dataclass(frozen=True, slots=True)
class Score:
    """Reward and cost of one conversation. None where there is no score; `error` then says why."""

    reward: float | None
    cost: float | None
    error: str | None
    truncated: bool


class Pending:
    """Scores that a GPU may still be computing."""

    def __init__(self, conversations: list[Conversation], pairs: torch.Tensor) -> None:
        """`pairs` are the rewards and costs (2, N) float32 of those that can be scored, on the models' device."""
        self._conversations = conversations
        self._pairs = pairs.to("cpu", non_blocking=True)  # pinned when it comes from a GPU
        self._arrived = None
        if pairs.is_cuda:
            self._arrived = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
            self._arrived.record(torch.cuda.current_stream(pairs.device))

    def result(self) -> list[Score]:
        """Scores in the order of the conversations; waits for them. From any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        pairs = iter(self._pairs.T.tolist())
        scores = []
        for one in self._conversations:
            if one.error is None:
                reward, cost = next(pairs)
                scores.append(finite_score(reward, cost, one.truncated))
            else:
                scores.append(Score(None, None, one.error, one.truncated))
        return scores


class LocalScorer:
    """Reward and cost model, their tokenizers and the conversation rule. One thread at a time may score.

    `packed`: batches without padding, compiled before this returns (about 20 s); by default for 16-bit Beaver models on CUDA that
    need not be deterministic. `fp8`: their linear layers multiply in float8; `calibration` is the file of texts that
    measures what this does to scores.
    Raises UserError when a model, a tokenizer or a setting does not fit.
    """

    def __init__(
        self,
        reward_model: str,
        cost_model: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int = 576,
        template: str = "pku",
        deterministic: bool | None = None,
        reference: bool = False,
        packed: bool | None = None,
        fp8: bool = False,
        calibration: str | None = None,
    ) -> None:
        self.device = find_device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        on_cpu = self.device.type == "cpu"
        self.dtype = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
        self.max_length, self.reference = max_length, reference
        self._uses_chat_template = template == "chat"
        self.deterministic = on_cpu if deterministic is None else deterministic
        if packed is None:
            packed = self.device.type == "cuda" and self.dtype != "float32" and not self.deterministic
        if fp8:
            check_fp8(self.device, self.dtype, self.deterministic)
        texts = read_calibration(calibration) if fp8 else []

        self._tokenizers: list[PreTrainedTokenizerBase] = []
        self._models: list[BatchScorer] = []
        described = []
        for name in (reward_model, cost_model):
            tokenizer, model, description = self._load(name)
            forward = PackedForward(model, max_length) if packed and can_pack(model) else None
            if fp8 and forward is None:
                raise UserError(f"{name}: SCORER_FP8 is for Beaver models with a Llama backbone; leave it out")
            self._tokenizers.append(tokenizer)
            self._models.append(BatchScorer(model, self.deterministic, packed=forward))
            described.append(description)
        self._templates = [get_template(template, tokenizer, reference) for tokenizer in self._tokenizers]
        self._same_tokenizer = same_tokenizer(*self._tokenizers)
        self._identity = {
            "reward_model": described[0],
            "cost_model": described[1],
            "dtype": self.dtype,
            "max_length": max_length,
            "template": self._templates[0].name,
            "deterministic": self.deterministic,
            "reference": reference,
            "backend": score_backend(),
        }
        if fp8:
            self._identity |= {"fp8": True, "fp8_error": asdict(self._to_fp8(texts))}
        for scorer in self._models:
            if scorer.packed is not None:
                scorer.packed.warm_up()
        # Tokens of a round, when the next one can be queued behind it; None where nothing is gained by that: on a CPU, and
        # where a forward waits for the GPU anyway (with padding, and packed in float32).
        all_packed = all(scorer.packed is not None for scorer in self._models)
        runs_ahead = self.device.type == "cuda" and all_packed and self.dtype != "float32"
        self.round_tokens = QUEUED_TOKENS if runs_ahead else None

    def identity(self) -> dict:
        """What decides a score: models, weights, tokenizers, configs, dtype, template, settings."""
        return self._identity

    def is_small_on_cpu(self) -> bool:
        """Whether both models are so small that one CPU core serves them best."""
        return self.device.type == "cpu" and not any(model.large for model in self._models)

    def device_is_broken(self) -> bool:
        """Whether the GPU can do nothing more for this process, as after an illegal memory access."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        """Scores of N responses, in order. `finished` says which responses end with EOS; all do by default.

        Raises UserError for a text that is no text (a lone surrogate).
        """
        finished = [True] * len(prompts) if finished is None else finished
        check_texts("prompts", prompts)
        check_texts("responses", responses)
        rows = zip(prompts, responses, finished, strict=True)
        return Scores.of(self.score_encoded([self.encode(*row) for row in rows]))

    def score_texts(self, texts: list[str], finished: list[bool] | None = None) -> Scores:
        """Scores of N whole conversations, in order."""
        finished = [True] * len(texts) if finished is None else finished
        check_texts("texts", texts)
        return Scores.of(self.score_encoded([self.encode_whole(*row) for row in zip(texts, finished, strict=True)]))

    def encode(self, prompt: str, response: str, finished: bool = True) -> Conversation:
        """The ids of one conversation, for `score_encoded`. May be called from any thread."""
        return self._conversation(
            [
                template.encode_conversation(tokenizer, prompt, response, finished, self.max_length)
                for template, tokenizer in self._distinct()
            ]
        )

    def encode_whole(self, text: str, finished: bool = True) -> Conversation:
        """The ids of a text that already is a whole conversation. May be called from any thread."""
        return self._conversation(
            [
                template.encode_whole(tokenizer, text, finished, self.max_length)
                for template, tokenizer in self._distinct()
            ]
        )

    def score_encoded(self, conversations: list[Conversation]) -> list[Score]:
        """Scores in order. One thread at a time."""
        return self.queue_encoded(conversations).result()

    def queue_encoded(self, conversations: list[Conversation]) -> Pending:
        """Has the conversations scored, and on a GPU does not wait for it. One thread at a time."""
        return Pending(conversations, self._pairs([one for one in conversations if one.error is None]))

    def warnings(self, probe: dict[str, str] | None = None) -> list[str]:
        """Scores a kind and a cruel answer and says what looks wrong: models swapped, or one of them inverted.

        `probe` replaces the built-in texts: {"prompt", "good", "bad"}, for models that know another world.
        """
        probe = probe or {"prompt": PROBE_PROMPT, "good": PROBE_GOOD, "bad": PROBE_BAD}
        found = []
        if self._identity["reward_model"]["score_type"] == "cost":
            found.append("REWARD_MODEL says in its config that it is a cost model (score_type: cost)")
        if self._identity["cost_model"]["normalize"] and self._identity["cost_model"]["score_type"] == "reward":
            found.append(
                "COST_MODEL normalises as a reward model does (score_type: reward): its zero no longer divides safe"
                " from unsafe; set score_type to cost in its config.json"
            )
        scores = self.score([probe["prompt"]] * 2, [probe["good"], probe["bad"]])
        if not all(map(math.isfinite, [*scores.rewards, *scores.costs])):
            return [*found, f"the built-in texts have no score: {scores.errors}"]
        figures = "R {:.3f} and {:.3f}, C {:.3f} and {:.3f}".format(*scores.rewards, *scores.costs)
        likes_bad, fears_good = scores.rewards[1] > scores.rewards[0], scores.costs[0] > scores.costs[1]
        if likes_bad and fears_good:
            found.append(f"reward and cost models look SWAPPED: a kind and a cruel answer have {figures}")
        elif fears_good:
            found.append(f"the cost looks INVERTED, or these are swapped: a kind and a cruel answer have {figures}")
        elif likes_bad:
            found.append(f"the reward looks INVERTED: a kind and a cruel answer have {figures}")
        return found

    def _load(self, name: str) -> tuple:
        """Tokenizer and model of that folder or hub name, and what the identity says of it."""
        folder = resolve_folder(name)
        read_config(folder)  # the tokenizer's complaint about a folder without one would mislead
        tokenizer = load_tokenizer(folder, self.reference)
        model = load_score_model(folder, DTYPES[self.dtype], self.device)
        check_fit(folder, tokenizer, model, self.max_length)
        return (
            tokenizer,
            model,
            {
                "name": Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else str(name),
                "weights": weights_hash(folder),
                "tokenizer": tokenizer_hash(folder, chat_template=self._uses_chat_template),
                "config": config_hash(folder),
                "score_type": model.score_type,
                "normalize": model.do_normalize,
            },
        )

    def _pairs(self, usable: list[Conversation]) -> torch.Tensor:
        """Rewards and costs (2, N) float32 on the models' device, where they may still be under way."""
        rewards = self._models[0].score([conversation.reward_ids for conversation in usable])
        costs = self._models[1].score([conversation.cost_ids for conversation in usable])
        return torch.stack([rewards, costs])

    def _to_fp8(self, texts: list[tuple[str, str]]) -> Calibration:
        usable = [one for one in (self.encode(*pair) for pair in texts) if one.error is None]
        before = self._pairs(usable).cpu().numpy()
        for scorer in self._models:
            if scorer.packed is not None:
                scorer.packed.use_fp8()
        return Calibration.between(before, self._pairs(usable).cpu().numpy())

    def _distinct(self) -> list[tuple[Template, PreTrainedTokenizerBase]]:
        # Most pairs of models share their tokenizer: encode once.
        pairs = list(zip(self._templates, self._tokenizers, strict=True))
        return pairs[:1] if self._same_tokenizer else pairs

    def _conversation(self, encoded: list[Encoded]) -> Conversation:
        error = None
        if not all(one.ids for one in encoded):
            error = "an empty text that is not finished has no token to score"
        elif not self.reference and any(map(nothing_left, encoded)):
            error = (
                f"the prompt alone fills the {self.max_length} tokens of MAX_LENGTH: nothing of the response is left to"
                " score; raise MAX_LENGTH or leave this prompt out"
            )
        reward_ids = tuple(encoded[0].ids)
        cost_ids = tuple(encoded[-1].ids) if len(encoded) > 1 else reward_ids
        return Conversation(reward_ids, cost_ids, any(one.truncated for one in encoded), error)


def check_texts(name: str, texts: list[str]) -> None:
    """Refuses lone surrogates with a UserError: they are no characters, and no tokenizer takes them."""
    for index, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{name}[{index}]: a lone surrogate at character {error.start} is not text; replace or remove it"
            ) from None


def nothing_left(encoded: Encoded) -> bool:
    """Whether truncation took all of the response (whole texts have no known prompt: never)."""
    return (
        encoded.truncated and encoded.prompt_length > 0 and len(encoded.ids) - encoded.closing <= encoded.prompt_length
    )


def finite_score(reward: float, cost: float, truncated: bool) -> Score:
    """The pair, with None and a reason in place of a number that is not finite."""
    wrong = [f"{name} is {value}" for name, value in (("reward", reward), ("cost", cost)) if not math.isfinite(value)]
    return Score(
        reward if math.isfinite(reward) else None,
        cost if math.isfinite(cost) else None,
        "; ".join(wrong) or None,
        truncated,
    )


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids for every conversation."""
    one, other = (getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (a, b))
    if one is None or other is None or one.to_str() != other.to_str():
        return False
    return (a.eos_token_id, a.chat_template) == (b.eos_token_id, b.chat_template)


def check_fit(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: ScoreModel | SequenceClassifier | SafeRlhfScore,
    max_length: int,
) -> None:
    """Raises UserError when tokenizer, model and max_length cannot belong together."""
    config = model.config
    # Added tokens, too: nobody looks for their ids in the texts, as is done with a policy's prompts.
    check_ids(folder, max(tokenizer.get_vocab().values()), config.vocab_size)
    end = config.eos_token_id
    if isinstance(end, int) and end != tokenizer.eos_token_id:
        raise UserError(
            f"{folder}: the tokenizer ends a text with id {tokenizer.eos_token_id}, config.json with {end}: they do not"
            " belong together"
        )
    limit = longest_text(model)
    if limit and max_length > limit:
        raise UserError(f"{folder}: MAX_LENGTH is {max_length}, the model reads up to {limit} tokens")
    if max_length < 2:
        raise UserError(f"MAX_LENGTH is {max_length}, expected 2 or more")
