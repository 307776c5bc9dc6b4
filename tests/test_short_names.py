"""Short names of classes on the command line."""

from __future__ import annotations

import pytest

from sppo_lightning.__main__ import main
from sppo_lightning.predictions.formats import FORMATS
from sppo_lightning.short_names import with_class_paths
from sppo_lightning.types import UserError

ALPACA = "sppo_lightning.predictions.AlpacaEval"


def written_out(*args: str, key: str | None = "--data.predict_format") -> list[str]:
    return with_class_paths(args, "--format", FORMATS, what="format", key=key)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--format", "alpaca_eval"], ["--data.predict_format", ALPACA]),
        (["--format=alpaca_eval"], ["--data.predict_format", ALPACA]),
        (
            ["--format", "alpaca_eval", "--format.model=mine", "--format.model", "mine"],
            [
                "--data.predict_format",
                ALPACA,
                "--data.predict_format.model=mine",
                "--data.predict_format.model",
                "mine",
            ],
        ),
        (["--format=my_formats.Mine", "--x"], ["--data.predict_format", "my_formats.Mine", "--x"]),
        (["--data.seed", "3", "alpaca_eval"], ["--data.seed", "3", "alpaca_eval"]),
        (["--formats", "alpaca_eval"], ["--formats", "alpaca_eval"]),
        (["--format"], ["--data.predict_format"]),
    ],
)
def test_short_for_a_class_path(given: list[str], meant: list[str]) -> None:
    assert written_out(*given) == meant


def test_a_flag_may_keep_its_name() -> None:
    assert written_out("--format", "alpaca_eval", "--format.a=b", key=None) == [
        "--format",
        ALPACA,
        "--format.a=b",
    ]


def test_a_name_that_is_none() -> None:
    with pytest.raises(
        UserError, match="give jsonl, alpaca_eval, arena_hard, mt_bench, or the class path of one"
    ):
        written_out("--format", "lpaca")


def test_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["predict", "--format=lpaca"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(
        "sppo-lightning: error: --format lpaca: there is no such format"
    )
