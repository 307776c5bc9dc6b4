"""``predict --format`` written out."""

from __future__ import annotations

import pytest

from sppo_lightning.__main__ import main
from sppo_lightning.cli.predict_format import with_predict_format
from sppo_lightning.types import UserError

ALPACA = "sppo_lightning.predictions.AlpacaEval"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--format", "alpaca_eval"], ["--data.predict_format", ALPACA]),
        (["--format=alpaca_eval"], ["--data.predict_format", ALPACA]),
        (
            ["--format", "alpaca_eval", "--format.model=mine"],
            ["--data.predict_format", ALPACA, "--data.predict_format.model=mine"],
        ),
        (["--format=my_formats.Mine"], ["--data.predict_format", "my_formats.Mine"]),
        (["--data.seed", "3"], ["--data.seed", "3"]),
    ],
)
def test_short_for_a_key(given: list[str], meant: list[str]) -> None:
    assert with_predict_format(["predict", *given]) == ["predict", *meant]


def test_only_of_predict() -> None:
    assert with_predict_format(["fit", "--format", "alpaca_eval"]) == ["fit", "--format", "alpaca_eval"]


def test_a_name_that_is_none() -> None:
    with pytest.raises(UserError, match="give jsonl, alpaca_eval, arena_hard, mt_bench, or the class path"):
        with_predict_format(["predict", "--format", "lpaca"])


def test_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["predict", "--format=lpaca"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(
        "sppo-lightning: error: --format lpaca: there is no such format"
    )
