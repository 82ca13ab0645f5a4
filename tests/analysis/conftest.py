"""Runs that the tests of tables only read: one of a GPU, one without."""

from __future__ import annotations

import pytest
from run_factory import write_run

from djinn_lib.analysis.run import Run, load_run


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("gpu"), gpu=True))


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(write_run(tmp_path_factory.mktemp("cpu")))
