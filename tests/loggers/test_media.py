"""Tables and histograms, given to each logger, as far as no tracker has to be installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from support.trackers import read_tensorboard

from sppo_lightning.loggers.media import markdown_table, media_of
from sppo_lightning.resume.metrics_csv import MetricsCSV


@pytest.mark.parametrize("make", [CSVLogger, lambda folder: MetricsCSV(folder / "metrics.csv")])
def test_other_loggers_get_metrics_only(make: type, tmp_path: Path) -> None:
    assert media_of(make(tmp_path)) is None


def test_a_markdown_table() -> None:
    text = markdown_table(("prompt", "reward"), [("a | <b>\nc", 0.25), ("![x](http://e)", float("nan"))])
    assert text == (
        "| prompt | reward |\n|---|---|\n| a \\| &lt;b> c | 0.250 |\n| !\\[x](http://e) | nan |\n"
    )


def test_tensorboard_gets_a_text_and_a_histogram(tmp_path: Path) -> None:
    logger = TensorBoardLogger(save_dir=tmp_path, name="", version="t")
    media = media_of(logger)
    assert media is not None
    media.log_table("samples", ("prompt", "reward"), [("<script>\x1b[2J", 1.0)], 3)
    media.log_histogram("iteration/reward", np.array([1.0, 2.0, 2.5]), 3)
    logger.finalize("success")
    stored = read_tensorboard(tmp_path / "t")
    assert stored.tables == {3: [["| prompt | reward |\n|---|---|\n| &lt;script>\\\\x1b\\[2J | 1.000 |\n"]]}
    assert stored.histograms == {"iteration/reward": {3: 3}}


def test_only_the_first_process_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    media = media_of(TensorBoardLogger(save_dir=tmp_path, name="", version="t"))
    assert media is not None
    media.log_histogram("iteration/reward", np.array([1.0]), 0)
    assert not list(tmp_path.iterdir())
