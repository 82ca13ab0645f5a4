"""The Triton kernel that decodes compressed pages, in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

from djinn_lib.paths import REPO


@pytest.mark.slow
def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="needs triton, whose interpreter runs kernels on the CPU")
    done = subprocess.run(
        [sys.executable, REPO / "tests" / "support" / "decoded_pages.py", "cpu"],
        env={**os.environ, "PYTHONPATH": str(REPO), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = {case.pop("case"): case for case in map(json.loads, done.stdout.splitlines())}
    assert len(cases) == 14
    assert not {name: case for name, case in cases.items() if not all(case.values())}
