"""The length-controlled win rate against AlpacaEval's own."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from sppo_lightning.evaluation.length_controlled import length_controlled_win_rate, read_gamed_baselines
from sppo_lightning.evaluation.win_rate import win_rate
from sppo_lightning.types import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "support/golden/alpaca_eval.json").read_text())
CASES = sorted(GOLDEN["cases"])


def preferences(case: dict[str, Any]) -> list[float]:
    return [math.nan if value is None else value for value in case["preferences"]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", ["length_controlled_v1", "length_controlled_minimal"])
def test_equals_alpaca_eval(name: str, model: str, tmp_path: Path) -> None:
    case = GOLDEN["cases"][name]
    file = tmp_path / "df_gamed.csv"
    file.write_text(case["df_gamed"])
    gamed = read_gamed_baselines(file) if model == "length_controlled_v1" else None
    found = length_controlled_win_rate(
        preferences(case), case["lengths"], case["other_lengths"], gamed=gamed, seed=0, resamples=20
    )
    expected = case["found"][model]
    assert found.name == model
    assert 100 * found.rate == pytest.approx(expected["length_controlled_winrate"], abs=1e-9)
    assert 100 * found.stderr == pytest.approx(expected["lc_standard_error"], abs=1e-9)
    assert found.low < found.rate < found.high
    assert 100 * win_rate(preferences(case), seed=0).rate == pytest.approx(expected["win_rate"])


def test_longer_answers_that_win_by_their_length_win_no_longer() -> None:
    """Two kinds of prompt, one answer long on each: length decides, and nothing else is different."""
    lengths, others = [100, 900] * 40, [900, 100] * 40
    wins = [0.1, 0.9] * 40
    wins[:40] = [0.9] * 40  # twenty short ones too
    found = length_controlled_win_rate(wins, lengths, others, seed=0, resamples=5)
    assert found.length_weight > 0
    swapped = length_controlled_win_rate([1 - win for win in wins], others, lengths, seed=0, resamples=5)
    assert swapped.rate == pytest.approx(1 - found.rate, abs=1e-3)
    assert swapped.length_weight == pytest.approx(found.length_weight, abs=1e-2)


def test_equal_lengths_leave_the_win_rate(capfd: pytest.CaptureFixture[str]) -> None:
    wins = [1.0, 0.0, 1.0, 1.0] * 10
    found = length_controlled_win_rate(wins, [50] * 40, [50] * 40, seed=0, resamples=5)
    assert found.rate == pytest.approx(0.75, abs=0.01)
    assert length_controlled_win_rate([1.0] * 40, [50] * 40, [9] * 40, seed=0).rate == 1.0
    assert capfd.readouterr() == ("", "")  # liblinear warns past Python of a class that is missing


def test_the_seed_decides_the_interval_of_the_fit() -> None:
    case = GOLDEN["cases"][CASES[0]]
    given = preferences(case), case["lengths"], case["other_lengths"]
    first, again, other = (length_controlled_win_rate(*given, seed=seed, resamples=10) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_a_penalty_that_leaves_nothing_does_not_hide_how_few_the_prompts_are() -> None:
    wins = [1.0, 0.0] * 15
    lengths = [50 + 37 * number % 400 for number in range(30)]
    found = length_controlled_win_rate(wins, lengths, lengths[::-1], seed=0, resamples=50)
    assert (found.rate, found.length_weight) == (0.5, 0)
    assert found.low < 0.45 < 0.55 < found.high
    tied = length_controlled_win_rate([0.5] * 30, lengths, lengths[::-1], seed=0, resamples=5)
    assert (tied.low, tied.rate, tied.high) == pytest.approx((0.5, 0.5, 0.5))


def test_an_interval_holds_its_rate_however_few_the_prompts() -> None:
    """Here the fit leaves nothing, and each refit of the five wins more."""
    lengths, other_lengths = [19, 8, 39, 163, 131], [182, 103, 123, 194, 147]
    found = length_controlled_win_rate(
        [1.0, 0.0, 1.0, 1.0, 1.0], lengths, other_lengths, seed=0, resamples=30
    )
    assert found.low <= found.rate <= found.high


def test_too_few_prompts_have_none() -> None:
    found = length_controlled_win_rate([1.0, 0.0, 1.0, 0.0, math.nan], [1] * 5, [2] * 5, seed=0)
    assert math.isnan(found.rate)


def test_difficulties_of_other_prompts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "df_gamed.csv"
    file.write_text(GOLDEN["cases"]["soft preferences"]["df_gamed"])
    gamed = read_gamed_baselines(file)
    with pytest.raises(UserError, match="difficulties of 60 prompts, but 3 are compared"):
        length_controlled_win_rate([1.0, 0.0, 0.5], [1, 2, 3], [3, 2, 1], gamed=gamed, seed=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no column 'index'"),
        ("index,preference\n0,1\n", "has no column 'std_delta_len'"),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,x,1,1,False\n",
            "cannot be read as difficulties",
        ),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,1,1,1,maybe\n",
            "cannot be read as difficulties",
        ),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,1\n",
            "cannot be read as difficulties",
        ),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n1,1,1,1,False\n",
            "does not begin with one row a prompt",
        ),
    ],
)
def test_files_of_difficulties_that_are_none(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "df_gamed.csv"
    file.write_text(content)
    with pytest.raises(UserError, match=said):
        read_gamed_baselines(file)


def test_a_file_of_difficulties_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as difficulties"):
        read_gamed_baselines(tmp_path / "none.csv")


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("sppo_lightning.evaluation.length_controlled.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sppo-lightning\[judge\]'"):
        length_controlled_win_rate([1.0] * 9, [1] * 9, [2] * 9, seed=0)
