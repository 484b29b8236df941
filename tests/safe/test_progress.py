"""The progress bar, where one can be shown."""

import pytest

from lora_ref.safe.progress import progress_bar


def test_a_notebook_without_ipywidgets_gets_no_bar_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert not progress_bar().disable and progress_bar(show=False).disable
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert progress_bar().disable
