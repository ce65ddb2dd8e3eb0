"""Tests that need a GPU. Without one, each is reported as not tested rather than left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
NOT_TESTED = "not tested: no GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:  # all that were collected, also those of other folders
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=NOT_TESTED))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    untested = [
        report
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple) and report.longrepr[2].endswith(NOT_TESTED)
    ]
    if untested:
        terminalreporter.write_line(f"{NOT_TESTED} ({len(untested)} tests in tests/gpu)")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
