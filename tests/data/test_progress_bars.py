import sys

import datasets
import pytest

from hafrm_ds.data.preparation import progress_bars_on_a_terminal


@pytest.mark.parametrize(
    ("terminal", "rank", "shown"), [(True, None, True), (True, "0", True), (True, "1", False), (False, "0", False)]
)
def test_bars_are_for_a_terminal_and_one_rank(monkeypatch, terminal, rank, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with progress_bars_on_a_terminal():
        assert datasets.are_progress_bars_disabled() == (not shown)
    assert not datasets.are_progress_bars_disabled()


def test_bars_that_were_hidden_stay_hidden(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    datasets.disable_progress_bars()
    try:
        with progress_bars_on_a_terminal():
            assert datasets.are_progress_bars_disabled()
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
