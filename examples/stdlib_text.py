"""Text that comes with every Python: the sources of its standard library, and its manual."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

PACKAGES = ("asyncio", "email", "http", "multiprocessing", "unittest", "xml")
WORDS = 2000  # number of word ids; 0 is padding, 1 any rarer word
LINES = 4  # lines per snippet
LENGTH = 32  # maximum words per snippet


class Snippets(NamedTuple):
    """Lines of source code, and the package that each is from."""

    words: list[list[int]]
    labels: list[int]  # in the order of PACKAGES


def snippets(per_package: int) -> tuple[Snippets, Snippets]:
    """Snippets to train on, from which the vocabulary comes, and every fifth one to test on."""
    cut = {package: list(islice(_snippets_of(package), per_package)) for package in PACKAGES}
    labelled = [
        (re.findall(r"\w+|[^\w\s]", text), label)
        for label, package in enumerate(PACKAGES)
        for text in cut[package]
    ]
    train = [sample for number, sample in enumerate(labelled) if number % 5]
    counts = Counter(word for words, _ in train for word in words)
    ids = {word: 2 + rank for rank, (word, _) in enumerate(counts.most_common(WORDS - 2))}

    def encoded(samples: list[tuple[list[str], int]]) -> Snippets:
        words = [[ids.get(word, 1) for word in words[:LENGTH]] for words, _ in samples]
        return Snippets(words, [label for _, label in samples])

    return encoded(train), encoded(labelled[::5])


def paragraphs(longest: int) -> tuple[list[bytes], list[bytes]]:
    """Paragraphs of Python's language reference, cut to a length; every tenth is for testing."""
    found = [part.encode() for text in topics.values() for part in text.split("\n\n")]
    long_enough = [part[:longest] for part in found if len(part) >= 40]
    return [p for n, p in enumerate(long_enough) if n % 10], long_enough[::10]


def _snippets_of(package: str) -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"), package)
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return ["\n".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES)]
