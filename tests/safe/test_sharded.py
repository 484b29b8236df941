"""Which of several processes writes."""

import pytest

from lora_ref.safe.plain import is_main_process


@pytest.mark.parametrize("rank, writes", [(0, True), (1, False), (2, False)])
def test_of_several_processes_that_of_rank_0_writes(monkeypatch: pytest.MonkeyPatch, rank: int, writes: bool) -> None:
    assert is_main_process()  # alone
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    assert is_main_process() is writes
