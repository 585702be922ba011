"""The code and the links of README.md and docs/: every ```python block runs, page by page.

The blocks of a page run in order in one namespace, in an empty folder. A comment above a block says
what else it needs, and is not seen by the reader::

    <!-- test: setup            code that the page leaves out, up to the end of the comment
    model = ...
    -->
    <!-- test: needs tensorboard -->            left out where that module is not installed
    <!-- test: ranks 2 -->                      a whole script, as torchrun runs it on so many ranks
    <!-- test: skip it needs a GPU -->          with the reason
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_PIECE = re.compile(
    r"^<!-- test: (?P<comment>.*?)-->$|^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)")
_RANKS_TIMEOUT = 120  # seconds


class Block(NamedTuple):
    """Code of a page, and how it is run: "run", "ranks", "needs" or "skip", with its argument."""

    code: str
    line: int
    how: str
    argument: str


def blocks_of(text: str) -> list[Block]:
    blocks, how, argument = [], "run", ""
    for piece in _PIECE.finditer(text):
        line = text.count("\n", 0, piece.start()) + 1
        if piece["comment"] is not None:
            comment = piece["comment"].strip()
            how, _, argument = comment.partition("\n" if "\n" in comment else " ")
            if how == "setup":
                blocks.append(Block(argument, line + 1, "run", ""))
                how, argument = "run", ""
            elif how not in ("needs", "ranks", "skip") or not argument:
                raise ValueError(f"line {line}: what does 'test: {comment}' mean?")
        elif piece["language"] == "python":
            blocks.append(Block(piece["code"], line + 1, how, argument))
            how, argument = "run", ""
    return blocks


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p.read_text())], ids=named)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    left_out = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks_of(page.read_text()):
            where = f"{named(page)}:{block.line}"
            if block.how == "skip" or (block.how == "needs" and find_spec(block.argument) is None):
                left_out.append(f"{where}: {block.how} {block.argument}")
            elif block.how == "ranks":
                run_on_ranks(block, tmp_path)
            else:  # the lines of a traceback are those of the page
                exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
    if any(": needs " in reason for reason in left_out):
        pytest.skip("all else ran; left out: " + "; ".join(left_out))


def run_on_ranks(block: Block, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(block.code)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = int(block.argument)
    told = run_ranks(ranks, [run_script], folder, script, store.port, grouped=False)
    for rank, outcomes in enumerate(told):
        error = outcomes.get("run_script", (None, "it died, or took too long"))[1]
        assert error is None, f"line {block.line}, rank {rank}:\n{error}"


def run_script(rank: int, size: int, script: Path, port: int) -> None:
    """What torchrun does for one rank, in a process that has torch already."""
    signal.alarm(_RANKS_TIMEOUT)  # a rank whose peers have failed would wait for half an hour
    os.chdir(script.parent)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # no rank opens the port: it is open
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
        at = (page.parent / target).resolve() if target else page
        assert at.exists(), f"{named(page)} links to {target}"
        if anchor and at.suffix == ".md":
            assert anchor[1:] in anchors(at), f"{named(page)} links to {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_every_page():
    linked = {target for target, _ in _LINK.findall((ROOT / "README.md").read_text())}
    assert {named(page) for page in PAGES[1:]} <= linked


def test_every_environment_variable_is_listed():
    listed = re.search(
        r"## Environment variables\n(.*?)\n## ",
        (ROOT / "docs" / "contributing.md").read_text(),
        re.DOTALL,
    )[1]
    sources = [ROOT / "setup.py", ROOT / ".ci" / "run"]
    sources += [p for f in ("emp_fast", "tests") for p in (ROOT / f).rglob("*.[ps][yh]")]
    variable = r"(?<!-D)EMP_FAST_[A-Z_]+"  # not what CMake or a compiler is told
    named = {name for p in sources for name in re.findall(variable, p.read_text())}
    named -= {"EMP_FAST_"}  # a prefix
    assert "EMP_FAST_CPU_ISA" in named
    assert named == set(re.findall(r"EMP_FAST_[A-Z_]+", listed))


def test_the_readme_names_what_no_gpu_has_run():
    verified = json.loads((ROOT / "emp_fast" / "verified.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    kernels = [one["what"] for one in verified["not_run"] if one["used"]]
    assert len(kernels) >= 1
    for what in kernels:
        assert what in readme
    for one in verified["ran"] + verified["not_run"]:
        assert one["backend"] in ("cuda", "triton")


# ---- the tests' own tools -----------------------------------------------------------------------


def test_blocks_are_found_with_what_they_need():
    text = "\n".join(
        [
            "# Page",
            "<!-- test: setup",
            "x = 1",
            "-->",
            "```python",
            "y = x",
            "```",
            "```",
            "not code",
            "```",
            "<!-- test: needs tensorboard -->",
            "```python",
            "z = 2",
            "```",
            "<!-- a comment of another kind -->",
            "```python",
            "z = 3",
            "```",
            "",
        ]
    )
    assert blocks_of(text) == [
        Block("x = 1", 3, "run", ""),
        Block("y = x\n", 6, "run", ""),
        Block("z = 2\n", 13, "needs", "tensorboard"),
        Block("z = 3\n", 17, "run", ""),
    ]
    for bad in ("<!-- test: skip -->", "<!-- test: run it -->"):
        with pytest.raises(ValueError, match="line 1: what does"):
            blocks_of(f"{bad}\n```python\n```\n")


def test_an_error_is_told_with_its_line(tmp_path, monkeypatch):
    page = ROOT / "docs" / "none.md"
    monkeypatch.setattr(Path, "read_text", lambda self: "\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        test_the_code_of_a_page_runs(page, tmp_path, monkeypatch)
    frame = caught.traceback[-1]
    assert (str(frame.path), frame.lineno + 1) == (str(page), 5)
