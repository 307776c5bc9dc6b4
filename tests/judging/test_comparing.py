"""Preferences of verdicts in both orders, and verdicts that are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sppo_lightning.judging import Annotator, Answer, Shown, Verdict
from sppo_lightning.judging.comparing import Pair, Progress, compare
from sppo_lightning.judging.journal import Journal, digest_of
from sppo_lightning.types import Message, Prompt, UserError

NAN = math.nan


class Scripted(Annotator):
    """Says what it is told of the first answer's text; breaks down after some verdicts."""

    def __init__(self, said: dict[str, Verdict] | None = None, breaks_after: int = 10**9) -> None:
        self.said = said or {}
        self.breaks_after = breaks_after
        self.asked: list[tuple[str, str]] = []
        self.checked = 0

    def check(self) -> None:
        self.checked += 1

    def judge(self, comparisons: Sequence[Shown]) -> Iterator[tuple[int, Verdict]]:
        for position in reversed(range(len(comparisons))):
            if len(self.asked) == self.breaks_after:
                raise KeyboardInterrupt
            shown = comparisons[position]
            self.asked.append((shown.first.text, shown.second.text))
            yield position, self.said.get(shown.first.text, Verdict(1.0, said="first", prompt_tokens=3))


def pair(number: int, answer: str, other: str) -> Pair:
    prompt = Prompt(f"p{number}", f"{number}?", (Message(role="user", content=f"{number}?"),))
    return Pair(prompt, Answer(prompt, answer), Answer(prompt, other))


PAIRS = [pair(0, "a", "b"), pair(1, "c", "d"), pair(2, "same", "same")]


def verdicts(*wins: float) -> Pair:
    return Pair(PAIRS[0].prompt, PAIRS[0].answer, PAIRS[0].other, tuple(Verdict(win, "lost") for win in wins))


@pytest.mark.parametrize(
    ("first_wins", "preference", "disagree"),
    [
        ((1.0, 0.0), 1.0, False),  # both say that the answer wins
        ((0.0, 1.0), 0.0, False),
        ((1.0, 1.0), 0.5, True),  # both like the first place
        ((0.5, 0.5), 0.5, False),
        ((1.0, 0.5), 0.75, True),
        ((0.75, 0.25), 0.75, False),
        ((0.75, 0.375), 0.6875, False),
        ((0.25, 0.125), 0.5625, True),
        ((1.0,), 1.0, False),
        ((), 0.5, False),  # the same texts
    ],
)
def test_both_orders_make_a_preference(
    first_wins: tuple[float, ...], preference: float, disagree: bool
) -> None:
    found = verdicts(*first_wins)
    assert found.preference == preference
    assert found.orders_disagree is disagree
    assert found.reason == ""


@pytest.mark.parametrize("first_wins", [(NAN, 1.0), (1.0, NAN), (NAN, NAN)])
def test_one_order_alone_makes_none(first_wins: tuple[float, ...]) -> None:
    found = verdicts(*first_wins)
    assert math.isnan(found.preference)
    assert found.reason == "lost"


def test_each_pair_is_shown_in_both_orders_but_the_same_texts_in_none() -> None:
    annotator, reports = Scripted(), list[Progress]()
    found = compare(annotator, PAIRS, None, reports.append)
    assert sorted(annotator.asked) == [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c")]
    assert [one.preference for one in found] == [0.5, 0.5, 0.5]
    assert [one.orders_disagree for one in found] == [True, True, False]
    assert reports[0] == Progress(0, 4, 0, 0)
    assert reports[-1] == Progress(4, 4, 12, 0)


def test_an_annotator_without_a_liking_for_a_place_is_asked_once() -> None:
    annotator = Scripted()
    annotator.both_orders = False
    assert [one.preference for one in compare(annotator, PAIRS, None)] == [1.0, 1.0, 0.5]
    assert len(annotator.asked) == 2


def test_the_same_pair_twice_is_judged_once() -> None:
    annotator = Scripted()
    compare(annotator, [PAIRS[0], pair(0, "a", "b")], None)
    assert len(annotator.asked) == 2


# ------------------------------------------------------------------------ journal


@pytest.mark.parametrize("stopped_after", range(5))
def test_what_is_missing_is_asked_for(stopped_after: int, tmp_path: Path) -> None:
    whole = compare(Scripted(), PAIRS, None)
    first, second = Scripted(breaks_after=stopped_after), Scripted()
    if stopped_after < 4:
        with pytest.raises(KeyboardInterrupt):
            compare(first, PAIRS, Journal(tmp_path))
    else:
        compare(first, PAIRS, Journal(tmp_path))
    reports = list[Progress]()
    assert compare(second, PAIRS, Journal(tmp_path), reports.append) == whole
    assert len(first.asked) == stopped_after
    assert len(second.asked) == 4 - stopped_after
    assert second.checked == (stopped_after < 4), "a server that is not needed need not be there"
    assert reports[0] == Progress(stopped_after, 4, 3 * stopped_after, 0)


def test_failures_are_asked_again_and_unknown_answers_are_kept(tmp_path: Path) -> None:
    said = {"a": Verdict(NAN, "server_error"), "c": Verdict(NAN, "unknown_answer", "Hm.", {"Hm": -0.5}, 7, 1)}
    found = compare(Scripted(said), PAIRS, Journal(tmp_path))
    assert [one.reason for one in found] == ["server_error", "unknown_answer", ""]
    again = Scripted()
    found = compare(again, PAIRS, Journal(tmp_path))
    assert again.asked == [("a", "b")]
    assert [one.reason for one in found] == ["", "unknown_answer", ""]
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    (unknown,) = (line for line in lines if line["reason"])
    assert unknown == {
        "shown": digest_of(Shown(PAIRS[1].prompt, PAIRS[1].answer, PAIRS[1].other)),
        "prompt_id": "p1",
        "first_wins": None,
        "reason": "unknown_answer",
        "said": "Hm.",
        "logprobs": {"Hm": -0.5},
        "prompt_tokens": 7,
        "completion_tokens": 1,
    }


def test_a_line_that_a_kill_cut_off_is_written_again(tmp_path: Path) -> None:
    compare(Scripted(), PAIRS, Journal(tmp_path))
    path = tmp_path / "verdicts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    annotator = Scripted()
    compare(annotator, PAIRS, Journal(tmp_path))
    assert len(annotator.asked) == 1
    assert path.read_bytes() == whole


def test_another_answer_is_another_comparison(tmp_path: Path) -> None:
    compare(Scripted(), PAIRS, Journal(tmp_path))
    annotator = Scripted()
    compare(annotator, [PAIRS[0], pair(1, "c", "e")], Journal(tmp_path))
    assert sorted(annotator.asked) == [("c", "e"), ("e", "c")]


SETTINGS = {
    "class_path": "Judge",
    "init_args": {"model": "m", "format": {"class_path": "F", "init_args": {"n": 1}}},
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"class_path": "Other", "init_args": SETTINGS["init_args"]},
            r"holds verdicts with --by='Judge', but .*'Other'",
        ),
        (
            {"class_path": "Judge", "init_args": {**dict(SETTINGS["init_args"]), "model": "n"}},
            r"--by\.model='m', but",
        ),
        (
            {
                "class_path": "Judge",
                "init_args": {"model": "m", "format": {"class_path": "F", "init_args": {}}},
            },
            r"with --by\.format\.n=1, but this command has None: name another folder with --output, or delete that one",
        ),
    ],
)
def test_a_changed_setting_is_refused_by_its_name(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    Journal(tmp_path).open(SETTINGS)
    Journal(tmp_path).open(json.loads(json.dumps(SETTINGS)))
    with pytest.raises(UserError, match=said):
        Journal(tmp_path).open(changed)


def test_files_that_are_damaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.open(SETTINGS)
    (tmp_path / "verdicts.jsonl").write_text('{"shown": 1}\n')
    with pytest.raises(UserError, match=r"verdicts\.jsonl:1 is damaged \('first_wins'\): remove that line"):
        journal.read()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        journal.open(SETTINGS)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match="is gone, so that nothing says who gave the verdicts"):
        journal.open(SETTINGS)
