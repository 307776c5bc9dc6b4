"""``sppo-lightning judge``: how often one set of answers beats another."""

from __future__ import annotations

import json
import math
import re
import sys
from argparse import ArgumentError
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sppo_lightning.evaluation.length_controlled import read_gamed_baselines
from sppo_lightning.judging.answers import Iteration, matched, read_answers
from sppo_lightning.judging.by_reward import RewardAnnotator
from sppo_lightning.judging.by_server import ServerJudge
from sppo_lightning.judging.comparing import Pair, Progress, compare
from sppo_lightning.judging.contract import Annotator, AnswerSet
from sppo_lightning.judging.journal import Journal
from sppo_lightning.judging.results import Results, alpaca_eval_annotations, results_of
from sppo_lightning.short_names import with_class_paths
from sppo_lightning.store.identity import identity
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.system.lock import RunLock
from sppo_lightning.system.signals import StopSignal
from sppo_lightning.text import for_terminal
from sppo_lightning.types import UserError, first_line

ANNOTATORS = {kind.name: f"sppo_lightning.judging.{kind.__name__}" for kind in (RewardAnnotator, ServerJudge)}
SUMMARY = "Compare two sets of answers prompt by prompt: win rate, length-controlled win rate, annotations."
INITIAL = "initial"


def judge(
    answers: str,
    against: str,
    by: Annotator,
    iteration: Iteration = "last",
    against_iteration: Iteration = "last",
    output: str | None = None,
    difficulties: str | None = None,
    seed: int = 42,
) -> tuple[Results, Path]:
    """Compare two sets of answers prompt by prompt.

    Prompts are matched by their exact text. What is written to ``output``: ``annotations.json``, which AlpacaEval
    reads, ``results.json``, and of a judge on a server ``verdicts.jsonl`` with its words, log-probs and tokens, each
    line as it comes, so that the same command continues after a stop.

    Args:
        answers: whose win rate is wanted: folder of a run, for its held-out answers, or a file of answers.
        against: whom they are compared with: ``initial``, for the same run's initial policy; another run; or a file.
        by: ``reward``: the run's reward, stored or computed; ``judge``: a language model on a server; or the class path
            of an annotator of your own. Its arguments are given as ``--by.NAME VALUE``.
        iteration: of a run ``answers``: self-play iteration whose policy answered, from 0; ``initial``, ``last`` or
            ``best``.
        against_iteration: the same of a run ``against``.
        output: folder to write; default: below ``judgements`` in the run's folder, or next to the file.
        difficulties: AlpacaEval's ``df_gamed.csv``, for its exact length-controlled win rate; ``against`` must then
            hold AlpacaEval's prompts, all of them, in order. Default: that without difficulties, called minimal.
        seed: decides the intervals.

    Returns:
        The figures, and the folder.

    Raises:
        UserError: if there is nothing to compare, or nobody to compare it.
    """
    gamed = None if difficulties is None else read_gamed_baselines(Path(difficulties))
    judged = read_answers(answers, iteration=iteration, key="answers")
    if against == INITIAL:
        if judged.run is None:
            raise UserError(
                f"--against initial: {answers} is no run, which would have an initial policy; name a file"
            )
        others = read_answers(answers, iteration="initial", key="--against")
    else:
        others = read_answers(against, iteration=against_iteration, key="--against")
    judged, others = _told_apart(judged, others)
    judged, others = by.prepare(judged, others)
    pairs = _paired(judged, others, complete=gamed is not None)
    place = _folder(judged, others, by) if output is None else Path(output)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {place} cannot be a folder ({first_line(error)}): name another one"
        ) from error
    with _stoppable(), RunLock(place / ".lock", instead="name another folder with --output"):
        journal = Journal(place) if by.keeps_verdicts else None
        if journal is not None:
            journal.open(identity(by))
        with _ProgressBar(by) as bar:
            pairs = compare(by, pairs, journal, bar.show)
        _require_some(pairs)
        results = results_of(pairs, gamed=gamed, seed=seed, cost=by.cost)
        name = by.name or type(by).__name__
        rows = alpaca_eval_annotations(pairs, judged=judged.name, others=others.name, annotator=name)
        _write_json(place / "annotations.json", rows)
        found = {
            "answers": judged.name,
            "against": others.name,
            "by": identity(by),
            "seed": seed,
            **results.as_json(),
        }
        _write_json(place / "results.json", found)
    return results, place


def _told_apart(judged: AnswerSet, others: AnswerSet) -> tuple[AnswerSet, AnswerSet]:
    """Return the sets under different names; AlpacaEval takes two of one name for the same answers.

    Raises:
        UserError: if they are the same answers.
    """
    if judged.name != others.name:
        return judged, others
    if Path(judged.source).resolve() == Path(others.source).resolve():
        raise UserError(
            f"both sets are the answers of {judged.name}: name another run, iteration or file with --against"
        )
    first, second = (replace(each, name=f"{each.name} [{each.source}]") for each in (judged, others))
    return first, second


def _paired(judged: AnswerSet, others: AnswerSet, *, complete: bool) -> list[Pair]:
    """Return the prompts that both sets answer, in the order of ``others``; say how many are left out.

    Args:
        judged: whose win rate is wanted.
        others: whom they are compared with.
        complete: refuse to leave one out.
    """
    pairs = [
        Pair((own if judged.run is not None else other).prompt, own, other)
        for other, own in matched(judged, others)
        if own is not None
    ]
    left_out = (
        len(others.answers) - len(pairs),
        len(judged.answers) - len({id(pair.answer) for pair in pairs}),
    )
    if complete and left_out[0]:
        raise UserError(
            f"{left_out[0]} of {len(others.answers)} prompts of {others.source} have no answer in {judged.source}, but "
            "--difficulties belong to prompts by their number: add the answers, or leave --difficulties out"
        )
    if any(left_out):
        _say(
            f"{len(pairs)} prompts are in both sets; left out: {left_out[1]} of {judged.source}, {left_out[0]} of "
            f"{others.source}"
        )
    return pairs


def _folder(judged: AnswerSet, others: AnswerSet, by: Annotator) -> Path:
    """Return where a comparison is written to by default."""
    beside = judged.run.root if judged.run is not None else Path(judged.source).parent
    name = f"{judged.name}-against-{others.name}-by-{by.name or type(by).__name__}"
    return beside / "judgements" / re.sub(r"[^\w.-]+", "-", name)[:150].strip("-.")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let signals end the command with a line that says that it can be continued."""
    stop = StopSignal()
    stop.listen()
    try:
        yield
    finally:
        stop.ignore()


class _ProgressBar:
    """Shows how many verdicts are there, and what they took.

    Args:
        by: who judges.
    """

    def __init__(self, by: Annotator) -> None:
        self._by = by
        self._bar: Any = None

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Show it; nothing where nobody watches."""
        if self._bar is None:
            self._bar = tqdm(
                total=progress.total, initial=progress.done, desc="judging", unit="verdict", disable=None
            )
        cost = self._by.cost(progress.prompt_tokens, progress.completion_tokens)
        if progress.prompt_tokens:
            self._bar.set_postfix_str(
                f"{progress.prompt_tokens + progress.completion_tokens:,} tokens"
                + ("" if cost is None else f", cost {cost:,.2f}"),
                refresh=False,
            )
        self._bar.update(progress.done - self._bar.n)


def _require_some(pairs: Sequence[Pair]) -> None:
    """Refuse a comparison that says nothing.

    Raises:
        UserError: with the reasons, and what was said first.
    """
    if not all(math.isnan(pair.preference) for pair in pairs):
        return
    reasons = Counter(pair.reason for pair in pairs)
    counted = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    said = next((verdict.said for pair in pairs for verdict in pair.verdicts if verdict.said), "")
    first = f"; the first answer: {' '.join(said.split())[:200]!r}" if said else ""
    raise UserError(
        f"none of {len(pairs)} prompts has a preference ({counted}{first}): correct what is given to --by, or name "
        "another annotator"
    )


def _write_json(path: Path, content: Sequence[Any] | Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())


def _say(line: str) -> None:
    print(for_terminal(line), file=sys.stderr)


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: after ``sppo-lightning judge``.

    Raises:
        UserError: if they are no valid arguments, or nothing can be compared.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="sppo-lightning judge", exit_on_error=False, description=SUMMARY)
    parser.add_argument("answers", type=str, help="folder of a run, or a file of answers")
    parser.add_function_arguments(judge, skip={"answers"}, as_group=False)
    try:
        written_out = with_class_paths(args, "--by", ANNOTATORS, what="annotator")
        given = parser.instantiate(parser.parse_args(written_out)).as_dict()
    except (ArgumentError, ValueError, ImportError) as error:  # the latter two an annotator's own
        if isinstance(error, UserError):
            raise
        raise UserError(f"judge: {' '.join(str(error).split())}") from error
    results, place = judge(**given)
    found = json.loads((place / "results.json").read_bytes())
    print(for_terminal(f"{found['answers']} against {found['against']}: {results.prompts} prompts"))
    for line in results.lines():
        print(for_terminal(f"  {line}"))
    print(for_terminal(f"Written to {place}: annotations.json, which AlpacaEval reads, and results.json"))
