"""``sppo-lightning judge``, from the command line to the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.judges import completion, labelled, longer, prefers, texts, write_answers, write_run
from support.servers import Answer as Sent
from support.servers import Request, serving

from sppo_lightning.__main__ import main
from sppo_lightning.evaluation.length_controlled import length_controlled_win_rate
from sppo_lightning.evaluation.win_rate import win_rate
from sppo_lightning.judging import Annotator, Shown, Verdict

GOLDEN = json.loads((Path(__file__).parents[1] / "support/golden/alpaca_eval.json").read_text())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as left:
        main(["judge", *map(str, args)])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def test_a_run_against_its_initial_policy_by_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = ["a"] * 8, ["ab", "abc", "a b", "a", "b", "ab", "abcd", ""]
    run = write_run(tmp_path / "mine", [before, after])
    main(["judge", str(run), "--against", "initial", "--by", "reward"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "mine (after 1 iteration) against mine (initial policy): 8 prompts"
    place = run / "judgements/mine-after-1-iteration--against-mine-initial-policy--by-reward"
    found = read(place / "results.json")
    preferences = [1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 0.0]
    rate = win_rate(preferences, seed=42)
    controlled = length_controlled_win_rate(preferences, list(map(len, after)), [1] * 8, seed=42)
    assert found["win_rate"]["rate"] == rate.rate == 0.75
    assert (found["win_rate"]["low"], found["win_rate"]["high"]) == (rate.low, rate.high)
    assert found["length_controlled"]["rate"] == controlled.rate
    assert found["length_controlled"]["name"] == "length_controlled_minimal"
    assert found["order_disagreement"] is None
    assert f"win rate           75.0% ({rate.low:.1%} to {rate.high:.1%})" in shown[1]
    assert "5 won, 1 lost, 2 tied" in shown[1]
    assert f"length-controlled  {controlled.rate:.1%} (" in shown[2]
    rows = read(place / "annotations.json")
    assert [row["preference"] for row in rows] == [2.0, 2.0, 2.0, 1.5, 1.5, 2.0, 2.0, 1.0]
    assert rows[1] == {
        "instruction": "Question 1?",
        "output_1": "a",
        "generator_1": "mine (initial policy)",
        "output_2": "abc",
        "generator_2": "mine (after 1 iteration)",
        "annotator": "reward",
        "preference": 2.0,
    }


def by_server(ours: Path, theirs: Path, url: str, *more: object) -> list[str]:
    return [
        *("judge", str(ours), "--against", str(theirs), "--by", "judge", f"--by.base_url={url}"),
        *("--by.model=judge", "--by.max_retries=0", *map(str, more)),
    ]


def test_two_files_by_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It likes longer answers, and of answers that are equally long the one that it sees first."""

    def first_of_equals(first: str, second: str) -> str:
        return "A" if len(first) >= len(second) else "B"

    ours = write_answers(tmp_path / "ours.json", ["long answer", "s", "ab", "same", "cd"])
    theirs = write_answers(tmp_path / "theirs.json", ["short", "longer", "xy", "same", "c"], dataset="toy")
    with serving(prefers(first_of_equals)) as server:
        prices = "--by.prompt_price=1000", "--by.completion_price=5000"
        main(by_server(ours, theirs, server.url, *prices))
        assert len(server.requests) == 9, "a trial, and both orders of four pairs"
    shown = capsys.readouterr().out
    place = tmp_path / "judgements/ours-against-theirs-by-judge"
    assert [row["preference"] for row in read(place / "annotations.json")] == [2.0, 1.0, 1.5, 1.5, 2.0]
    assert read(place / "annotations.json")[0]["dataset"] == "toy"
    found = read(place / "results.json")
    assert found["order_disagreement"] == 0.25
    assert found["tokens"] == {"prompt": 800, "completion": 80}
    assert found["cost"] == pytest.approx(0.8 + 0.4)
    assert "orders disagree    25.0% of the prompts judged in both orders" in shown
    assert "judge's tokens     800 read, 80 written; cost 1.2000" in shown
    assert len((place / "verdicts.jsonl").read_text().splitlines()) == 8

    main(by_server(ours, theirs, "http://127.0.0.1:9/v1", "--by.timeout=3"))
    assert read(place / "results.json")["win_rate"] == found["win_rate"], "nobody is asked again"
    line = refused(
        capsys, *by_server(ours, theirs, "http://127.0.0.1:9/v1", "--by.format=LabelProbabilities")[1:]
    )
    assert "--by.format='sppo_lightning.judging.WrittenVerdict', but this command has " in line
    assert "name another folder with --output" in line


def test_log_probs_make_soft_preferences(tmp_path: Path) -> None:
    def respond(request: Request) -> Sent:
        first, second = (-0.1 if "good" in text else -3.1 for text in texts(request))
        return completion("A", logprobs=labelled(first, second))

    ours = write_answers(tmp_path / "ours.json", ["good", "bad", "good, too"])
    theirs = write_answers(tmp_path / "theirs.json", ["bad", "good", "good"])
    with serving(respond) as server:
        label = "--by.format=sppo_lightning.judging.LabelProbabilities"
        main(by_server(ours, theirs, server.url, label, f"--output={tmp_path / 'out'}"))
    found = [row["preference"] for row in read(tmp_path / "out/annotations.json")]
    better = 1 / (1 + 2.718281828459045**-3)
    assert found == pytest.approx([1 + better, 2 - better, 1.5])
    first = json.loads((tmp_path / "out/verdicts.jsonl").read_text().splitlines()[0])
    assert set(first["logprobs"]) == {"A", "B"}


def test_unknown_answers_are_counted_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def respond(request: Request) -> Sent:
        first, second = texts(request)
        return completion("\x1b[31mHm." if "odd" in first + second else longer(first, second))

    ours = write_answers(tmp_path / "ours.json", ["odd", "long"])
    theirs = write_answers(tmp_path / "theirs.json", ["a", "b"])
    with serving(respond) as server:
        main(by_server(ours, theirs, server.url))
        assert "no preference      1 of 2 prompts (unknown_answer: 1)" in capsys.readouterr().out
        place = tmp_path / "judgements/ours-against-theirs-by-judge"
        assert [row["preference"] for row in read(place / "annotations.json")] == [None, 2.0]
        assert "\\u001b[31mHm." in (place / "verdicts.jsonl").read_text()
        ours = write_answers(tmp_path / "ours.json", ["odd", "odd, too"])
        line = refused(capsys, *by_server(ours, theirs, server.url, "--output", tmp_path / "odd")[1:])
    assert "none of 2 prompts has a preference (unknown_answer: 2; the first answer: " in line
    assert "\x1b" not in line


def test_alpaca_evals_own_figures_from_its_difficulties(tmp_path: Path) -> None:
    """A class of the user's own that knows the recorded preferences; one prompt has none."""
    case = GOLDEN["cases"]["soft preferences"]
    for name, lengths in {"ours": case["lengths"], "theirs": case["other_lengths"]}.items():
        write_answers(tmp_path / f"{name}.json", ["x" * length for length in lengths])
    (tmp_path / "df_gamed.csv").write_text(case["df_gamed"])
    main(
        [
            *("judge", str(tmp_path / "ours.json"), f"--against={tmp_path / 'theirs.json'}"),
            *(f"--by={__name__}.Recorded", f"--difficulties={tmp_path / 'df_gamed.csv'}"),
            f"--output={tmp_path / 'out'}",
        ]
    )
    found = read(tmp_path / "out/results.json")
    expected = case["found"]["length_controlled_v1"]
    assert found["length_controlled"]["name"] == "length_controlled_v1"
    assert 100 * found["length_controlled"]["rate"] == pytest.approx(
        expected["length_controlled_winrate"], abs=1e-9
    )
    assert 100 * found["win_rate"]["rate"] == pytest.approx(expected["win_rate"])


class Recorded(Annotator):
    """Knows what the record says."""

    both_orders = False

    def judge(self, comparisons: Sequence[Shown]) -> Iterator[tuple[int, Verdict]]:
        wins = GOLDEN["cases"]["soft preferences"]["preferences"]
        for position, shown in enumerate(comparisons):
            number = int(shown.prompt.text.removeprefix("Question ").removesuffix("?"))
            yield position, Verdict(wins[number])


def test_prompts_that_one_set_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", [["a", "b", "c"]])
    file = write_answers(tmp_path / "few.json", ["ab", "c"])
    main(["judge", str(run), "--against", str(file), "--by=reward"])
    shown = capsys.readouterr()
    assert f"2 prompts are in both sets; left out: 1 of {run}, 0 of {file}" in shown.err
    assert "length-controlled  not computed: too few prompts have a preference" in shown.out
    (tmp_path / "df_gamed.csv").write_text(GOLDEN["cases"]["soft preferences"]["df_gamed"])
    more = ["--by=reward", f"--difficulties={tmp_path / 'df_gamed.csv'}"]
    line = refused(capsys, file, "--against", run, *more)
    assert "1 of 3 prompts of" in line
    assert "--difficulties belong to prompts by their number" in line


def test_two_files_of_one_generator_are_told_apart(tmp_path: Path) -> None:
    for name, output in {"one": "a", "two": "ab"}.items():
        (tmp_path / name).mkdir()
        write_answers(tmp_path / name / "mine.json", [output])
    with serving(prefers(longer)) as server:
        given = tmp_path / "one/mine.json", tmp_path / "two/mine.json"
        main(by_server(*given, server.url, f"--output={tmp_path / 'out'}"))
    (row,) = read(tmp_path / "out/annotations.json")
    assert row["generator_1"] != row["generator_2"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", [["a"]])
    file = write_answers(tmp_path / "few.json", ["b"])
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Another?", "response": "b"}\n')
    said = {
        "is no run": (tmp_path, "--against", file, "--by=reward"),
        "no prompt of": (run, "--against", other, "--by=reward"),
        "there is no such annotator; give reward, judge": (run, "--against", file, "--by=rewards"),
        "both sets are the answers of mine (initial policy)": (run, "--against", "initial", "--by=reward"),
        "which would have an initial policy": (file, "--against", "initial", "--by=reward"),
        "cannot be reached": by_server(run, file, "http://127.0.0.1:9/v1")[1:],
        "must start with http": by_server(run, file, "localhost")[1:],
        "cannot be read as difficulties": (run, "--against", file, "--by=reward", "--difficulties=none.csv"),
        "judge: ": (run, "--against", file, "--by=judge"),
        "cannot be a folder": (run, "--against", file, "--by=reward", f"--output={file}"),
    }
    for expected, args in said.items():
        assert expected in refused(capsys, *args)
