"""No secret stands in the tree, and one that did would be found."""

import random
import re
from pathlib import Path

import pytest

from gwproxy.core.identity import KeyKind, mint
from tests.leaks import OWN, leaks, main

ROOT = Path(__file__).parent.parent


def test_no_secret_stands_in_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("kind", KeyKind)
def test_a_key_of_ours_is_found_wherever_it_stands_and_never_printed(
    kind: KeyKind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = mint(kind, random.Random(1).randrange)
    assert re.fullmatch(OWN, key)
    (tmp_path / "a").mkdir()
    for text in (key, f'KEY="{key}"\n', f"\n\n?key={key}&x", f"\xff{key}\x00"):
        (tmp_path / "a" / "file").write_text(text)
        assert main([str(tmp_path)]) == 1
        out = capsys.readouterr().out
        assert out.endswith(": a gwproxy key\n") and key not in out
    # What only looks like one opens nothing: an example in a document is no leak.
    assert list(leaks(key[:-1] + ("0" if key[-1] != "0" else "1"))) == []
    assert list(leaks("x" + key)) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("sk-" + "a1" * 24, "an OpenAI key"),
        ("AIza" + "b2" * 17 + "c", "a Google key"),
        ("hf_" + "c3" * 17, "a Hugging Face token"),
        ("ghp_" + "d4" * 18, "a GitHub token"),
        ("AKIA" + "E5" * 8, "an AWS key"),
        ("-----BEGIN " + "PRIVATE KEY-----\n" + "A" * 64, "a private key"),
    ],
)
def test_others_secrets_are_found_too(text: str, what: str) -> None:
    assert (2, what) in list(leaks("line\n" + text + "\n"))


def test_the_expression_that_is_documented_is_the_one_that_is_used() -> None:
    assert OWN.replace("?:", "") in (ROOT / "docs" / "KEY_ROTATION.md").read_text()
