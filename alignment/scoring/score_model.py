"""Score models: a language model's backbone with one number at the end of the text, the Beaver reward and cost models.

    model = load_score_model("PKU-Alignment/beaver-7b-unified-reward", dtype=torch.bfloat16, device="cuda:0")
    scores = model(input_ids, lengths)  # (B, T) right-padded, (B,) -> (B,) float32

The score is `score_head(last hidden state of the last token)`, as in Safe-RLHF (`LlamaForScore`, `LlamaModelForScore`),
written anew on current transformers. Where it departs from the published code:
- Nothing is ever silently initialised: a missing, extra or misshapen tensor, or one that is not finite, is refused by key.
- The head is computed in float32 whatever the dtype, at the end token only.
- Inference only: normalizers are applied when the config says `do_normalize`, never updated.
- Padding is on the right and attention is causal, so that no pad can reach a score and no mask is needed.
A folder whose architecture is `...ForSequenceClassification` with one label serves as well, and SCORE_BACKEND=safe_rlhf
uses the class of a PKU Safe-RLHF clone instead.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from alignment.errors import UserError, first_line
from alignment.model_folder import read_config, resolve_folder
from alignment.pretrained import CONFIG_ERRORS, load_whole
from alignment.scoring.checkpoint import copy_tensors

EPSILON = 1e-8  # beside the standard deviation, as in Safe-RLHF's normalizers
BACKENDS = ("transformers", "safe_rlhf")
SCORE_TYPES = ("reward", "cost", "critic")
SAFE_RLHF_HELP = (
    "clone https://github.com/PKU-Alignment/safe-rlhf to alignment/safe-rlhf and put that folder on PYTHONPATH; its score"
    " models were checked with transformers 4.37 and do not import with 5.x; leave SCORE_BACKEND unset to do without"
)


class Normalizer(nn.Module):
    """What a score model's running statistics do to a score: a reward is standardised, a cost only scaled.

    A cost keeps its zero, which is the threshold between safe and unsafe; a critic's score stays as it is.
    """

    mean: torch.Tensor
    var: torch.Tensor

    def __init__(self, score_type: str, mean: list[float] | None = None, var: list[float] | None = None) -> None:
        super().__init__()
        self.score_type = score_type
        self.register_buffer("mean", torch.tensor([0.0] if mean is None else mean, dtype=torch.float32))
        self.register_buffer("var", torch.tensor([1.0] if var is None else var, dtype=torch.float32))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B,) float32 to (B,) float32."""
        if self.score_type == "reward":
            return (scores - self.mean) / (self.var.sqrt() + EPSILON)
        if self.score_type == "cost":
            return scores / (self.var.sqrt() + EPSILON)
        return scores


class ScoreModel(nn.Module):
    """The Beaver layout: `model.*` (the backbone), `score_head.*`, `normalizer.*`.

    Reads `score_type`, `score_bias`, `do_normalize`, `mean` and `var` from the config, with Safe-RLHF's defaults.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.score_type = getattr(config, "score_type", None) or "reward"
        self.do_normalize = bool(getattr(config, "do_normalize", False))
        if self.score_type not in SCORE_TYPES:
            raise UserError(f"score_type is {self.score_type!r}, expected one of {', '.join(SCORE_TYPES)}")
        if getattr(config, "score_dim", 1) != 1:
            raise UserError(f"score_dim is {config.score_dim}, expected 1: one score a text")
        self.model = AutoModel.from_config(config, dtype=dtype)
        # `bias` in these configs is the published default of another class; `score_bias` is the head's.
        self.score_head = nn.Linear(config.hidden_size, 1, bias=getattr(config, "score_bias", True), dtype=dtype)
        self.normalizer = Normalizer(self.score_type, getattr(config, "mean", None), getattr(config, "var", None))

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) int64, right-padded with any id, and lengths (B,) int64 >= 1 to end scores (B,) float32."""
        return self.end_scores(at_end(self.hidden(input_ids), lengths))

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) to the backbone's last hidden states (B, T, H) in its dtype."""
        return self.model(input_ids=input_ids, use_cache=False).last_hidden_state

    def end_scores(self, end: torch.Tensor) -> torch.Tensor:
        """Hidden states at the end tokens (B, H) to scores (B,) float32."""
        scores = apply_head(end, self.score_head)
        return self.normalizer(scores) if self.do_normalize else scores

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> ScoreModel:
        """Loads any published layout of the Beaver models, in eval mode. Raises UserError naming folder, file or key."""
        folder = resolve_folder(folder)
        config = read_config(folder)
        # The random start is overwritten below: it must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            try:
                model = cls(config, dtype=dtype)
            except UserError as error:
                raise UserError(f"{folder}/config.json: {error}") from error
            except torch.OutOfMemoryError:
                raise
            except CONFIG_ERRORS as error:
                raise UserError(f"{folder}/config.json: no model can be made from it: {first_line(error)}") from error
        # The first v1.0 revision has neither a head bias nor a normalizer: Safe-RLHF loads it with 0 and the identity.
        optional = set() if model.do_normalize else {f"normalizer.{name}" for name in ("mean", "var", "count")}
        if not hasattr(config, "score_bias"):
            nn.init.zeros_(model.score_head.bias)
            optional.add("score_head.bias")
        copy_tensors(folder, model.state_dict(), optional)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors in the Beaver layout."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        backbone = type(self.model).__name__.removesuffix("Model")  # Llama
        config.architectures = [f"{backbone}ForScore"]
        config.score_type, config.score_dim = self.score_type, 1
        config.score_bias, config.bias = self.score_head.bias is not None, False
        config.do_normalize = self.do_normalize
        config.mean, config.var = self.normalizer.mean.tolist(), self.normalizer.var.tolist()
        config.dtype = self.score_head.weight.dtype
        config.save_pretrained(folder)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class SequenceClassifier(nn.Module):
    """A plain `AutoModelForSequenceClassification` with one label, called like a ScoreModel."""

    score_type, do_normalize = "classifier", False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """As ScoreModel.forward."""
        head = getattr(self.model, "score", None)
        if isinstance(head, nn.Linear):
            # Decoders score their last token, which transformers looks for by pad id: wrong where a text holds that id.
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
            return apply_head(at_end(hidden, lengths), head)
        return self.model(input_ids=input_ids, attention_mask=attention_mask(input_ids, lengths)).logits[:, 0].float()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SequenceClassifier:
        """Loads the folder in eval mode. Raises UserError for more than one label and for every missing or extra key."""
        folder = resolve_folder(folder)
        labels = read_config(folder).num_labels
        if labels != 1:
            raise UserError(f"{folder}: the classifier has {labels} labels, expected 1: one score a text")
        model = load_whole(AutoModelForSequenceClassification, folder, dtype, device)
        return cls(model).eval().requires_grad_(False)


class SafeRlhfScore(nn.Module):
    """The score model class of a PKU Safe-RLHF clone, called like a ScoreModel (SCORE_BACKEND=safe_rlhf)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.score_type = getattr(model.config, "score_type", None) or "reward"
        self.do_normalize = bool(getattr(model.config, "do_normalize", False))

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """As ScoreModel.forward."""
        output = self.model(input_ids, attention_mask=attention_mask(input_ids, lengths))
        return output.end_scores[:, 0].float()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SafeRlhfScore:
        """Loads the folder with `safe_rlhf.models.AutoModelForScore`. Raises UserError when that cannot be imported."""
        try:
            from safe_rlhf.models import AutoModelForScore
        except ImportError as error:
            raise UserError(f"SCORE_BACKEND=safe_rlhf: {error}: {SAFE_RLHF_HELP}") from error
        model = AutoModelForScore.from_pretrained(str(resolve_folder(folder)), torch_dtype=dtype)
        return cls(model.to(device)).eval().requires_grad_(False)


def load_score_model(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> ScoreModel | SequenceClassifier | SafeRlhfScore:
    """The score model in `folder` (or of that name on the hub), of the class that its config and SCORE_BACKEND ask for."""
    if score_backend() == "safe_rlhf":
        return SafeRlhfScore.from_pretrained(folder, dtype, device)
    folder = resolve_folder(folder)
    architecture = (read_config(folder).architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return SequenceClassifier.from_pretrained(folder, dtype, device)
    return ScoreModel.from_pretrained(folder, dtype, device)


def longest_text(model: ScoreModel | SequenceClassifier | SafeRlhfScore) -> int | None:
    """How many tokens it can read, None for any number. RoBERTa's family numbers positions from its padding's id + 1 on."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def score_backend() -> str:
    """Whose classes score: SCORE_BACKEND. Raises UserError for one that there is not."""
    backend = os.environ.get("SCORE_BACKEND") or BACKENDS[0]
    if backend not in BACKENDS:
        raise UserError(f"SCORE_BACKEND is {backend!r}, expected transformers (the default) or safe_rlhf")
    return backend


def at_end(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, H) and lengths (B,) to the states at the end tokens (B, H)."""
    rows = torch.arange(len(lengths), device=hidden.device)
    return hidden[rows, lengths.to(hidden.device) - 1]


def apply_head(end: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """End states (B, H) and a one-row head to scores (B,) float32."""
    # Multiply and sum row by row: a matrix product may round differently with the number of rows.
    scores = (end.float() * head.weight[0].float()).sum(-1)  # (B,)
    return scores if head.bias is None else scores + head.bias.float()


def attention_mask(input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, T) int64: 1 for the first `lengths[b]` tokens of row b."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (positions < lengths.to(input_ids.device)[:, None]).long()
