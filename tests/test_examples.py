"""Every example in its short form, on one process and on two."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"


class Example(NamedTuple):
    library: str
    samples: tuple[int, int]  # that the run without pruning and the one with it train on
    learns: float | None  # accuracy that both exceed; None: the short form is too short


EXAMPLES = {
    "images_ddp": Example("sklearn", (3 * 1348, 6 * 674), 0.9),
    "images_lightning": Example("lightning", (3 * 1348, 6 * 674), 0.9),
    "snippets_accelerate": Example("accelerate", (5 * 960, 10 * 480), 0.5),
    "snippets_huggingface": Example("transformers", (4 * 240, 8 * 120), None),
    "manual_huggingface": Example("transformers", (3 * 64, 4 * 45), None),
}
TOOLS = {"stdlib_text"}


def run(name: str, processes: int) -> str:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ran = subprocess.run(
        [*command, str(FOLDER / f"{name}.py"), "--quick"],
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_with_and_without_pruning(name, processes):
    example = EXAMPLES[name]
    if find_spec(example.library) is None:
        pytest.skip(f"needs {example.library}")
    told = re.findall(
        r"^pruned +(\d+)%  \w+ (\d+)  (accuracy|loss) ([\d.]+)", run(name, processes), re.MULTILINE
    )
    rates, seen, metrics, values = zip(*told, strict=True)
    assert rates[0] == "0"
    assert int(rates[1]) > 0
    for samples, wanted in zip(map(int, seen), example.samples, strict=True):
        # Two processes repeat a few samples, so that both have as many batches.
        assert samples == wanted if processes == 1 else wanted <= samples <= 1.3 * wanted
    if example.learns is not None:
        assert set(metrics) == {"accuracy"}
        assert min(map(float, values)) > example.learns


def test_no_example_is_forgotten():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES) | TOOLS
