"""What a scorer's identity holds, and who compares it: two scorers that may score differently never pass for one."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
from fake_scorer import FakeScorer

from alignment.errors import UserError
from alignment.ES.journal import Journal
from alignment.evaluation.compare_models import require_same_scorer
from alignment.records import write_json
from alignment.scoring.client import ScorerClient
from alignment.scoring.local_scorer import LocalScorer
from alignment.scoring.scores import ADDED, difference


def edited(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_letters(tokenizer: dict) -> None:
    ids = tokenizer["model"]["vocab"]
    ids["e"], ids["o"] = ids["o"], ids["e"]


@pytest.fixture
def folders(tiny_scorers, tmp_path):
    """Copies of both models, under names of their own."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in tiny_scorers]


def test_another_tokenizer_is_another_scorer(tiny_scorers, folders):
    first = LocalScorer(*tiny_scorers)
    assert LocalScorer(*folders).identity() == first.identity()  # the same files elsewhere
    edited(folders[1] / "tokenizer.json", swap_letters)
    other = LocalScorer(*folders)
    costs = [scorer.score(["hello"], ["one more"]).costs for scorer in (first, other)]
    assert not np.array_equal(*costs)
    assert difference(first.identity(), other.identity()).startswith("cost_model.tokenizer was '")


def test_settings_of_tokenizer_and_model_count(tiny_scorers, folders):
    first = LocalScorer(*tiny_scorers).identity()
    edited(folders[0] / "config.json", lambda config: config.update(rms_norm_eps=0.1))
    edited(folders[1] / "tokenizer_config.json", lambda config: config.update(legacy=True))
    now = LocalScorer(*folders).identity()
    changed = difference(first, now)
    assert "reward_model.config was" in changed and "cost_model.tokenizer was" in changed
    assert changed.count(" was ") == 2


def test_a_chat_template_counts_where_it_is_used(folders):
    template = "{% for turn in messages %}<s>{{ turn['role'] }}: {{ turn['content'] }}</s>{% endfor %}"
    for text in (template, template + " "):
        for folder in folders:
            (folder / "chat_template.jinja").write_text(text)
        identities = {name: LocalScorer(*folders, template=name).identity() for name in ("pku", "chat")}
        if text == template:
            before = identities
    assert identities["pku"] == before["pku"]
    assert identities["chat"]["reward_model"]["tokenizer"] != before["chat"]["reward_model"]["tokenizer"]


def test_the_backend_is_named(tiny_scorers):
    assert LocalScorer(*tiny_scorers).identity()["backend"] == "transformers"


NOW = {
    "reward_model": {"name": "r", "weights": "0a", "tokenizer": "1a", "config": "2a"},
    "cost_model": {"name": "c", "weights": "0b", "tokenizer": "1b", "config": "2b"},
    "dtype": "float32",
    "backend": "transformers",
}


def before_these_were_named(identity: dict) -> dict:
    """As an earlier version wrote it."""
    return {
        key: {name: one for name, one in value.items() if name not in ADDED} if isinstance(value, dict) else value
        for key, value in identity.items()
        if key not in ADDED
    }


def changed(identity: dict, model: str, key: str) -> dict:
    identity = copy.deepcopy(identity)
    identity[model][key] = "ff"
    return identity


def test_a_client_refuses_another_tokenizer_and_takes_what_an_old_run_did_not_know():
    with FakeScorer() as scorer:
        scorer.identity = NOW
        old_run = ScorerClient(scorer.url, expected_identity=before_these_were_named(NOW))
        client = ScorerClient(scorer.url, expected_identity=NOW)
        assert client.wait_until_ready() == old_run.wait_until_ready() == NOW
        scorer.identity = changed(NOW, "cost_model", "tokenizer")
        for one in (client, old_run):  # which by now knows it as well
            with pytest.raises(UserError, match=r"cost_model.tokenizer was '1b', is 'ff'; the run began with"):
                one.wait_until_ready()
        scorer.identity = before_these_were_named(NOW)  # an older service in its place
        with pytest.raises(UserError, match=r"backend was 'transformers', is None"):
            client.wait_until_ready()
        scorer.identity = changed(NOW, "cost_model", "weights")
        with pytest.raises(UserError) as caught:
            ScorerClient(scorer.url, expected_identity=before_these_were_named(NOW)).wait_until_ready()
        assert "cost_model.weights was '0b', is 'ff'; the run" in str(caught.value)
        assert "None" not in str(caught.value)


def test_runs_go_on_that_began_before(tmp_path):
    for number, begun in enumerate((NOW, before_these_were_named(NOW))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for identity in (begun, begun, NOW):  # begun, then gone on with
            Journal(folder, "base", {"sigma": 0.1, "scorer": identity}).close()
        for wrong in (
            changed(NOW, "cost_model", "weights"),
            before_these_were_named(changed(NOW, "cost_model", "name")),
        ):
            with pytest.raises(UserError, match="begun otherwise: scorer"):
                Journal(folder, "base", {"sigma": 0.1, "scorer": wrong})
    with pytest.raises(UserError, match="begun otherwise: scorer"):
        Journal(tmp_path / "0", "base", {"sigma": 0.1, "scorer": changed(NOW, "cost_model", "tokenizer")})


def test_files_are_compared_by_what_both_say(tmp_path):
    def points(name: str, identity: dict):
        write_json(tmp_path / f"{name}_summary.json", {"scorer": identity})
        return tmp_path / f"{name}_points.jsonl"

    now, old = points("now", NOW), points("old", before_these_were_named(NOW))
    require_same_scorer([now, old])
    require_same_scorer([old, now])
    with pytest.raises(UserError, match=r"scored differently: cost_model.tokenizer was '1b', is 'ff'"):
        require_same_scorer([now, points("other", changed(NOW, "cost_model", "tokenizer"))])
