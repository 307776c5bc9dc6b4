"""A study's results: one page that reads as a result, its tables as Parquet, and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sppo_lightning.study.agreement import agreement_section, agreements
from sppo_lightning.study.definition import INITIAL, Study
from sppo_lightning.study.dynamics import training_rows, training_section
from sppo_lightning.study.figure import gains_figure
from sppo_lightning.study.outcomes import Outcome, mean_of_known, prompt_table, shared_tokens
from sppo_lightning.study.plan import PlannedRun
from sppo_lightning.study.quartiles import flat, quartile_section, quartiles
from sppo_lightning.study.runner import RunState
from sppo_lightning.study.statistics import LEVEL, Comparison, compare, interval_text
from sppo_lightning.study.verdicts import Verdict, verdicts
from sppo_lightning.system.durable import replacing, write_atomically
from sppo_lightning.text import for_markdown

PAGE, FIGURE = "README.md", "gains.svg"
TABLES = (
    *("prompts.parquet", "arms.parquet", "verdicts.parquet"),
    *("quartiles.parquet", "training.parquet", "agreement.parquet"),
)


@dataclass(frozen=True)
class Section:
    """What a page says of a study beside its arms and claims.

    Args:
        lines: of Markdown, before the arms.
        limits: what the study cannot say, as far as its results tell.
        tables: by file name.
    """

    lines: Sequence[str] = ()
    limits: Sequence[str] = ()
    tables: Mapping[str, pa.Table] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """What a study has so far.

    Args:
        runs: all of them.
        states: by a run's name; ``None``: it has not ended.
        outcomes: of the runs that have ended.
        left_out: runs that have ended but cannot be read or compared, and why.
        digest: of what was named before the first run.
    """

    runs: Sequence[PlannedRun]
    states: Mapping[str, RunState | None]
    outcomes: Sequence[Outcome]
    left_out: Mapping[str, str]
    digest: str

    @property
    def problems(self) -> dict[str, str]:
        """Why runs have no results, by name."""
        failed = {
            name: state.message
            for name, state in self.states.items()
            if state is not None and state.status == "failed"
        }
        return {**failed, **self.left_out}


def write_results(study: Study, results: Results, section: Section = Section()) -> Path:
    """Write the page and the tables into the study's folder, and return the page's path.

    Args:
        study: what was compared.
        results: so far.
        section: that opens the page.
    """
    folder, outcomes = study.folder, results.outcomes
    found = [*verdicts(study, outcomes, "steps"), *verdicts(study, outcomes, "tokens")]
    arms = list(_arms(study, outcomes))
    by_quartile, training = quartiles(study, outcomes), training_rows(outcomes)
    agreement = agreements(study, outcomes)
    if outcomes:
        rows = (arms, map(_flat, found), map(flat, by_quartile), training, map(vars, agreement))
        tables = [prompt_table(outcomes), *(pa.Table.from_pylist(list(each)) for each in rows)]
        for name, table in zip(TABLES, tables, strict=True):
            _write_table(folder / name, table)
    for name, table in section.tables.items():
        _write_table(folder / name, table)
    figure = gains_figure(study, arms)
    if figure is not None:
        write_atomically(folder / FIGURE, figure)
    more = [
        *quartile_section(study, by_quartile),
        *training_section(study, training),
        *agreement_section(study, agreement),
    ]
    text = "\n".join(_page(study, results, arms, found, section, has_figure=figure is not None, more=more))
    write_atomically(folder / PAGE, text.encode())
    return folder / PAGE


def _arms(study: Study, outcomes: Sequence[Outcome]) -> Iterator[dict[str, object]]:
    """Yield one row for each setting and arm."""
    for setting in study.settings:
        for arm in study.arms:
            here = [item for item in outcomes if (item.run.setting, item.run.arm) == (setting, arm)]
            if not here:
                continue
            gain = compare(np.stack([item.gain for item in here]))
            initial = [mean_of_known(item.evaluations[0].rewards) for item in here]
            yield {
                **{"setting": setting, "arm": arm, "seeds": len(here), "prompts": gain.prompts},
                "initial": float(np.mean(initial)),
                **{"gain": gain.mean, "low": gain.low, "high": gain.high},
                "gains": [mean_of_known(item.gain) for item in here],
                "lowest_gain": min(item.lowest_gain for item in here),
                "win_rate": float(np.mean([item.win_rate for item in here])),
                "length_ratio": float(np.mean([item.length_ratio for item in here])),
                "pairs": float(np.mean([np.mean(item.pairs) for item in here])),
                "tokens": float(np.mean([item.tokens for item in here])),
                "reverted": sum(item.reverted for item in here),
            }


def _flat(verdict: Verdict) -> dict[str, object]:
    return {
        **{"claim": verdict.claim, "setting": verdict.setting, "reading": verdict.reading},
        **vars(verdict.comparison),
        **{"p_holm": verdict.p, "verdict": verdict.word},
    }


def _write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def _page(
    study: Study,
    results: Results,
    arms: Sequence[dict[str, object]],
    found: Sequence[Verdict],
    section: Section,
    *,
    has_figure: bool,
    more: Sequence[str],
) -> Iterator[str]:
    problems = results.problems
    yield f"# {for_markdown(study.name)}\n"
    yield f"{for_markdown(study.question)}\n"
    settings = f"{len(study.settings)} setting{'s' * (len(study.settings) > 1)}"
    yield (
        f"{len(study.arms)} arms, {settings}; {len(results.outcomes)} of {len(results.runs)} runs "
        f"have ended{f', {len(problems)} without a result' if problems else ''}. Arms, claims, seeds and configs were "
        f"written down before the first run (`study.json`, digest `{results.digest}`). {_protocol(study)}\n"
    )
    if results.outcomes:
        yield f"{_sampled(results.outcomes)}\n"
    yield from section.lines
    for setting in study.settings:
        rows = [row for row in arms if row["setting"] == setting]
        if rows:
            yield f"## {for_markdown(setting)}\n"
            yield from _arm_table(study, rows)
    if has_figure:
        yield f"![Gain in held-out reward of each arm, with intervals]({FIGURE})\n"
    if study.claims:
        yield "## Claims\n"
        yield from _claims(study, found)
    yield from more
    if problems:
        yield "## Runs without a result\n"
        yield from (f"- {name}: {for_markdown(message)}" for name, message in problems.items())
        yield ""
    yield "## What this cannot say\n"
    one = [arm for arm in study.arms if len(study.seeds_of(arm)) == 1]
    if one:
        yield f"- {', '.join(one)}: one seed, so that no interval and no verdict can be given."
    yield from (f"- {for_markdown(limit)}" for limit in (*study.limits, *section.limits))
    yield ""


def _protocol(study: Study) -> str:
    steps = (
        "All arms of a setting take equally many optimizer steps (`data.steps_per_iteration`): one with fewer pairs "
        "passes over them more often. "
        if study.matched == "steps"
        else "Each arm passes over the pairs that it has, so that optimizer steps differ. "
    )
    return (
        steps
        + "Runs with the same seed share the initial policy's responses. The gain is the held-out reward of the "
        f"policy that a run ended with less that of the initial policy; intervals are at {LEVEL:.0%}."
    )


def _sampled(outcomes: Sequence[Outcome]) -> str:
    tokens, shared = sum(item.tokens for item in outcomes), shared_tokens(outcomes)
    share = f"{shared:,} ({shared / max(tokens, 1):.0%})"
    return (
        f"The runs' responses have {tokens:,} tokens, of which {share} were shared and not sampled again; held-out "
        "answers are not counted."
    )


def _arm_table(study: Study, rows: Sequence[dict[str, object]]) -> Iterator[str]:
    names = ("arm", "seeds", "gain", "each seed", "lowest after any iteration", "win rate", "length")
    yield f"| {' | '.join((*names, 'pairs', 'tokens sampled', 'reverted'))} |"
    yield "|---" * 10 + "|"
    for row in rows:
        gain, low, high, lowest, wins, ratio, pairs, tokens = (
            _number(row[name])
            for name in ("gain", "low", "high", "lowest_gain", "win_rate", "length_ratio", "pairs", "tokens")
        )
        gains = row["gains"]
        assert isinstance(gains, list)
        cells = (
            for_markdown(study.title(str(row["arm"]))),
            str(row["seeds"]),
            f"{gain:+.3f}{interval_text(low, high)}",
            ", ".join(f"{each:+.3f}" for each in gains),
            f"{lowest:+.3f}",
            f"{wins:.1%}",
            f"{ratio:.2f}",
            f"{pairs:.0f}",
            f"{tokens:,.0f}",
            str(row["reverted"]),
        )
        yield f"| {' | '.join(cells)} |"
    initial = _number(rows[0]["initial"])
    yield (
        f"\nThe initial policy's held-out reward is {initial:.3f}, over {rows[0]['prompts']} prompts. Length: of the "
        "final answers in tokens, over that of the initial ones. Pairs: of an iteration. Reverted: iterations that the "
        "gate gave up.\n"
    )


def _claims(study: Study, found: Sequence[Verdict]) -> Iterator[str]:
    if not found:
        yield "No claim can be read yet.\n"
        return
    yield "| claim | setting | reading | difference | effect size | p | verdict | to settle it |"
    yield "|---|---|---|---|---|---|---|---|"
    for verdict in found:
        each, claim = verdict.comparison, study.claims[verdict.claim]
        against = "the initial policy" if claim.against == INITIAL else study.title(claim.against)
        what = f"{claim.text} ({study.title(claim.arm)} against {against})"
        cells = (
            for_markdown(what),
            for_markdown(verdict.setting),
            _reading(study, verdict),
            f"{each.mean:+.3f}{interval_text(each.low, each.high)}",
            "" if math.isnan(each.effect) else f"{each.effect:+.2f}",
            "" if math.isnan(verdict.p) else f"{verdict.p:.3g}",
            f"**{verdict.word}**",
            _to_settle(verdict.word, each),
        )
        yield f"| {' | '.join(cells)} |"
    yield (
        "\nDifferences are paired by seed and prompt, both taken as drawn at random: variance components, with degrees "
        "of freedom after Satterthwaite. Effect size is Cohen's d for paired samples; p is two-sided and corrected for "
        "the claims and settings of a reading (Holm). No verdict is given before all seeds have ended. Equal tokens: "
        "both arms once they had sampled as many tokens as the one that sampled fewer, between two evaluations on the "
        "line that joins them.\n"
    )


def _reading(study: Study, verdict: Verdict) -> str:
    if verdict.reading == "tokens":
        return "equal tokens"
    return "equal steps" if study.matched == "steps" else "at the end"


def _to_settle(word: str, each: Comparison) -> str:
    """Return how many seeds or prompts would show the difference that was seen, at a power of 0.8."""
    if word != "undecided":
        return ""
    ways = []
    if each.seeds_needed is not None:
        ways.append(f"{max(each.seeds_needed, each.seeds + 1)} seeds")
    if each.prompts_needed is not None:
        ways.append(f"{max(each.prompts_needed, each.prompts + 1)} prompts")
    return " or ".join(ways) or "more seeds and more prompts"


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
