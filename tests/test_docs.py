"""Files that the documents name are there."""

from __future__ import annotations

import re

import pytest
from conftest import REPO

DOCUMENTS = sorted(
    path.relative_to(REPO)
    for path in [
        *REPO.glob("*.md"),
        *REPO.glob("docs/*.md"),
        *REPO.glob("slurm/*.md"),
        *REPO.glob("bench/*.md"),
        *REPO.glob("alignment/**/*.md"),
    ]
    if "outputs" not in path.parts
)
PATH = re.compile(r"(?<![\w/.])(?:alignment|slurm|bench|tests|docs)/[\w./-]*\.(?:py|sh|md|yaml|ipynb|example)\b")
MADE_BY_USERS = re.compile(r"^slurm/(?:site\.env|\w+\.yaml)$|^alignment/(?:data|outputs)/")


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_what_a_document_names_exists(document):
    text = (REPO / document).read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (REPO / document.parent / link).exists()]
    named = [name for name in PATH.findall(text) if not MADE_BY_USERS.match(name)]
    missing += [name for name in named if not (REPO / name).exists()]
    assert not missing
