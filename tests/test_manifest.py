"""Documents survive the way to storage and back, and nothing else passes for one."""

import json

import pytest

from phema_dist.errors import RunError
from phema_dist.storage.manifest import Attempt, Manifest, RunInfo, ShardFile, TensorFacts, from_json, to_json

FILE = ShardFile("sigma_rel-0.05/rank-00003.safetensors", 0.05, 128, 4096, ("0011", "2233"))
MANIFEST = Manifest(1, 1000, 0, "abc", 3, 8, 1000, ((900, 90), (1000, 1)), "F32", 4 << 20, (FILE,), None)
RUN = RunInfo(
    1, "0.1.0", (0.05, 0.28), "steps", 0, only_save_diff=False,
    tensors={"w": TensorFacts((2, 3), "F32", "parameter")}, aliases={"v": "w"},
)  # fmt: skip


@pytest.mark.parametrize("document", [MANIFEST, RUN, Attempt(1, 0, 500, 8, "abc"), Attempt(0, None, 0, 1, "def")])
def test_documents_come_back_equal(document: object) -> None:
    assert from_json(type(document), to_json(document), "there") == document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"there has format 2; this phema-dist reads formats up to 1\. Upgrade phema-dist"),
        ({"rank": -1}, "rank must not be negative, found -1"),
        ({"rank": "3"}, "rank must be int, found '3'"),
        ({"rank": True}, "rank must be int, found 'True'"),
        ({"rank": 3.5}, "rank must be int"),
        ({"files": {}}, "files must be a list"),
        ({"files": [1]}, r"files\[0\] must have exactly the fields of ShardFile"),
        ({"updates": [[1, 2, 3]]}, r"updates\[0\] must be a list like"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(to_json(MANIFEST)), **change}).encode()
    with pytest.raises(RunError, match=message):
        from_json(Manifest, text, "there")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\x80\x04K\x01."])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(RunError, match="there"):
        from_json(Manifest, text, "there")


def test_a_missing_field_is_named() -> None:
    facts = json.loads(to_json(MANIFEST))
    del facts["token"]
    with pytest.raises(RunError, match=r"differs in \['token'\]"):
        from_json(Manifest, json.dumps(facts).encode(), "there")
