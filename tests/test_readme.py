"""What README.md tells users to write: every scheme is one that a large tensor can have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commlib.codecs import CODECS, STAGES
from commlib.modes import ErrorFeedback
from commlib.policy import Role, Scheme

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
SPANS = {span.strip('"').replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", TEXT)}
NAMES = tuple(rf"{name}\b" for name in (*CODECS, *STAGES))
SCHEMES = {span for span in SPANS if re.match("|".join(NAMES), span) and " " not in span}
SCHEMES -= {*STAGES, *(f"{name}|" for name in STAGES)}  # what stands before a codec, by itself
REFUSED = {"ternary+ef"}  # as the README says


@pytest.mark.parametrize("text", sorted(SCHEMES))
def test_schemes_are_taken(text: str) -> None:
    if text in REFUSED:
        with pytest.raises(ValueError, match="diverges"):
            Scheme.parse(text)
        return
    scheme = Scheme.parse(text).resolve(Role.GRADIENT)
    if isinstance(scheme.feedback, ErrorFeedback):
        scheme.feedback.check(scheme.codec, 1 << 20)


def test_schemes_are_found() -> None:
    """Of every kind: were the README written in another way, none might be."""
    assert len(SCHEMES) >= 30
    for part in ("int4+ef", "+ef:", "+delta", "@", "rotate|", "|entropy", "topk"):
        assert any(part in text for text in SCHEMES), part
