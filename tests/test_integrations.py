"""The trainers' libraries are optional: nothing imports them unasked, and their absence is told."""

import subprocess
import sys

import pytest

LIBRARIES = ("transformers", "accelerate", "lightning", "pytorch_lightning", "datasets")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_emp_fast_imports_none_of_them():
    program = f"""
import sys
import emp_fast, emp_fast.integrations
print([name for name in {LIBRARIES} if name in sys.modules])
"""
    assert run(program) == "[]\n"


@pytest.mark.parametrize(
    ("module", "library"),
    [("huggingface", "transformers"), ("lightning", "lightning"), ("accelerate", "accelerate")],
)
def test_an_absent_library_is_named_with_what_to_install(module, library):
    program = f"""
import sys
for name in {LIBRARIES}:
    sys.modules[name] = None  # as if it were not installed
try:
    import emp_fast.integrations.{module}
except ImportError as error:
    print(error)
"""
    assert run(program) == (
        f"emp_fast.integrations.{module} needs {library}, which is not installed: "
        f"pip install 'emp_fast[{module}]'\n"
    )
