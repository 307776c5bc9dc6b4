"""``metrics.csv`` while it grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from sppo_lightning.resume.metrics_csv import MetricsCSV
from sppo_lightning.watch.metrics import MetricsTail


def test_new_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    tail = MetricsTail(path)
    assert not tail.update()
    logger = MetricsCSV(path)
    logger.log_metrics({"a": 1.0}, step=0)
    assert tail.update()
    assert not tail.update()
    first = tail.rows[0]
    logger.log_metrics({"a": 2.0}, step=1)
    assert tail.update()
    assert tail.rows[0] is first
    assert tail.column("a") == [1.0, 2.0]
    logger.log_metrics({"b": 3.0}, step=2)  # a new column: the file is written anew
    assert tail.update()
    assert (tail.column("a"), tail.column("b"), tail.column("c")) == ([1.0, 2.0], [3.0], [])
    assert tail.rows[2] == {"step": 2.0, "b": 3.0}


def test_another_file_of_the_same_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\n0,1.5\n")
    tail = MetricsTail(path)
    tail.update()
    path.write_bytes(b"step,a,b\n0,1.5,\n1,2.5,7\n")  # in place, as where a file's number is used again
    assert tail.update()
    assert (tail.column("a"), tail.column("b")) == ([1.5, 2.5], [7.0])


def test_a_line_under_way_waits_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\n0,1.5\n1,")
    tail = MetricsTail(path)
    tail.update()
    assert tail.column("a") == [1.5]
    with path.open("ab") as file:
        file.write(b"2.5\n2,\xff\xfe\n3,4,5,6\n")
    tail.update()
    assert tail.column("a") == [1.5, 2.5, 4.0]
    with path.open("ab") as file:
        file.write(b"4," + b"x" * 200_000 + b"\n5,6.5\n")  # longer than a cell may be
    tail.update()
    assert tail.column("a") == [1.5, 2.5, 4.0, 6.5]
    path.write_bytes(b"step,a\n0,9\n")
    assert tail.update()
    assert tail.column("a") == [9.0], "shorter than before: another file"
