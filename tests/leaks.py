"""A search of files for secrets: `python -m tests.leaks [PATH...]`, exit code 1 where there is one.

gwproxy's own keys carry a checksum, so an example that nobody could use is told from a real one;
of other vendors' keys and of private keys the usual forms are known. It prints where, never what.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gwproxy.core.identity import well_formed

OWN: Final = r"gw_(?:live|test|admin)_[0-9A-Za-z]{46}"
"""The expression that README.md gives to those who look for leaked keys elsewhere."""

FORMS: Final = {
    "a gwproxy key": re.compile(rf"(?<![0-9A-Za-z]){OWN}(?![0-9A-Za-z])"),
    "an OpenAI key": re.compile(r"\bsk-(?:proj-|svcacct-)?[0-9A-Za-z_-]{40,}"),
    "an Anthropic key": re.compile(r"\bsk-ant-[0-9A-Za-z_-]{40,}"),
    "a Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a Hugging Face token": re.compile(r"\bhf_[0-9A-Za-z]{34}\b"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[0-9A-Za-z]{36}|github_pat_[0-9A-Za-z_]{60,})"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{40}"),
}

_PASSED_OVER: Final = {
    *(".git", ".venv", "__pycache__", "node_modules"),
    *(".hypothesis", ".pytest_cache", ".mypy_cache", ".ruff_cache"),
}
_LARGEST_BYTES: Final = 16 << 20


def leaks(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) of each."""
    for what, form in FORMS.items():
        for match in form.finditer(text):
            if what != "a gwproxy key" or well_formed(match[0]):
                yield text.count("\n", 0, match.start()) + 1, what


def search(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if not path.is_file() or _PASSED_OVER.intersection(path.relative_to(root).parts):
            continue
        if path.stat().st_size <= _LARGEST_BYTES:
            text = path.read_bytes().decode("utf-8", "replace")
            yield from (f"{path}:{line}: {what}" for line, what in leaks(text))


def main(paths: list[str]) -> int:
    found = [each for path in paths or ["."] for each in search(Path(path))]
    print("\n".join(found) or "no secret found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
