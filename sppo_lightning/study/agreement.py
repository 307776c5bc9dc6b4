"""How far estimates of difficulty agree: between iterations, settings and numbers of answers; and what they go with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from sppo_lightning.study.correlation import FEWEST, Correlation, Ranked, spearman
from sppo_lightning.study.definition import Study
from sppo_lightning.study.outcomes import Outcome
from sppo_lightning.study.probes import Estimates, categories, estimates, initial_estimates
from sppo_lightning.study.statistics import interval_text
from sppo_lightning.text import for_markdown

NUMBERS = (2, 5, 10)  # of answers, against as many others at least


@dataclass(frozen=True)
class Agreement:
    """Two measurements of the same prompts, compared.

    Args:
        kind: ``iterations``, ``settings``, ``answers``, ``length`` or ``category``.
        setting: where; of ``settings``, the first one.
        arm: whose runs; ``None``: the initial policy, which arms share.
        first: what is compared.
        second: with what.
        measure: ``spearman``; of a category, ``epsilon²``: H / (P - 1) of Kruskal and Wallis, the share of the ranks'
            variance that lies between categories (Tomczak and Tomczak, 2014).
        value: of the measure, mean over seeds.
        low: lower end of the interval; NaN: there is none.
        high: upper end.
        p: that categories do not differ; NaN: not computed.
        seeds: that it is the mean of.
        prompts: of a seed, on average.
    """

    kind: str
    setting: str
    arm: str | None
    first: str
    second: str
    measure: str
    value: float
    low: float
    high: float
    p: float
    seeds: int
    prompts: float


def agreements(study: Study, outcomes: Sequence[Outcome]) -> list[Agreement]:
    """Return all that can be compared of the runs that have ended.

    Args:
        study: whose settings and arms they are of.
        outcomes: of the runs that have ended.
    """
    initial = initial_estimates(outcomes)
    here = {
        name: [each for (setting, _), each in initial.items() if setting == name] for name in study.settings
    }
    return [
        *_between_iterations(study, outcomes),
        *_between_settings(here),
        *(row for name, probes in here.items() for row in _between_answers(name, probes)),
        *(row for name, probes in here.items() for row in _with_length(name, probes)),
        *(row for name, probes in here.items() for row in _with_category(study, name, probes)),
    ]


def _between_iterations(study: Study, outcomes: Sequence[Outcome]) -> Iterator[Agreement]:
    for setting in study.settings:
        for arm in study.arms:
            runs = [item for item in outcomes if (item.run.setting, item.run.arm) == (setting, arm)]
            found = [
                {each.iteration: each.difficulty for each in estimates(item.run, len(item.pairs))}
                for item in runs
            ]
            for pair in combinations(sorted({number for each in found for number in each}), 2):
                samples = [
                    _ranked(*(each[number] for number in pair)) for each in found if each.keys() >= set(pair)
                ]
                first, second = (f"iteration {number}" for number in pair)
                yield from _row("iterations", setting, arm, first, second, spearman(samples))


def _between_settings(here: Mapping[str, Sequence[Estimates]]) -> Iterator[Agreement]:
    """Prompts are the same in two settings where id and text are."""
    for first, second in combinations(here, 2):
        seeds = [{each.run.seed: each for each in here[name]} for name in (first, second)]
        common = [(seeds[0][seed], seeds[1][seed]) for seed in seeds[0] if seed in seeds[1]]
        if not common:
            continue
        ours, theirs = (each.texts() for each in common[0])
        same = {key for key, text in ours.items() if theirs.get(key) == text}
        samples = [
            _ranked({key: mean for key, mean in one.difficulty.items() if key in same}, other.difficulty)
            for one, other in common
        ]
        yield from _row("settings", first, None, first, second, spearman(samples))


def _between_answers(setting: str, probes: Sequence[Estimates]) -> Iterator[Agreement]:
    """The first N answers against the others, of which there are N at least."""
    most = max((each.samples for each in probes), default=0)
    rewards = [each.rewards() for each in probes] if most >= 2 * NUMBERS[0] else []
    for number in NUMBERS:
        samples = []
        for of_seed in rewards:
            enough = {key: values for key, values in of_seed.items() if len(values) >= 2 * number}
            first = {key: float(values[:number].mean()) for key, values in enough.items()}
            others = {key: float(values[number:].mean()) for key, values in enough.items()}
            samples.append(_ranked(first, others))
        yield from _row(
            "answers", setting, None, f"{number} answers", f"{most - number} others", spearman(samples)
        )


def _with_length(setting: str, probes: Sequence[Estimates]) -> Iterator[Agreement]:
    if probes:
        lengths = {key: float(len(text)) for key, text in probes[0].texts().items()}
        samples = [_ranked(each.difficulty, lengths) for each in probes]
        yield from _row("length", setting, None, "mean reward", "characters of the prompt", spearman(samples))


def _with_category(study: Study, setting: str, probes: Sequence[Estimates]) -> Iterator[Agreement]:
    from scipy.stats import kruskal  # an extra

    field = study.category_field or "category"
    known = categories(probes[0].run, field) if probes else {}
    common = [key for key in known if all(key in each.difficulty for each in probes)]
    means = {key: float(np.mean([each.difficulty[key] for each in probes])) for key in common}
    groups: dict[str, list[float]] = {}
    for key, mean in means.items():
        groups.setdefault(known[key], []).append(mean)
    if len(groups) < 2 or len(means) < max(FEWEST, 2 * len(groups)) or len(set(means.values())) < 2:
        return
    test = kruskal(*groups.values())
    found = Correlation(float(test.statistic) / (len(means) - 1), math.nan, math.nan, len(probes), len(means))
    for row in _row("category", setting, None, "mean reward", f"{field}, {len(groups)} of them", found):
        yield replace(row, measure="epsilon²", p=float(test.pvalue))


def _ranked(first: Mapping[str, float], second: Mapping[str, float]) -> Ranked:
    """Return the prompts that have both, and finite ones."""
    keys = [key for key in first if math.isfinite(first[key]) and math.isfinite(second.get(key, math.nan))]
    return Ranked(keys, np.array([first[key] for key in keys]), np.array([second[key] for key in keys]))


def _row(
    kind: str, setting: str, arm: str | None, first: str, second: str, found: Correlation | None
) -> Iterator[Agreement]:
    if found is not None:
        ends = (found.value, found.low, found.high, math.nan)
        yield Agreement(kind, setting, arm, first, second, "spearman", *ends, found.samples, found.prompts)


def agreement_section(study: Study, rows: Sequence[Agreement]) -> Iterator[str]:
    """Yield the page's lines."""
    if not rows:
        return
    yield "## Agreement of difficulty\n"
    yield "| setting | arm | difficulty by | with | prompts | seeds | Spearman |"
    yield "|---" * 7 + "|"
    for row in rows:
        arm = "initial policy" if row.arm is None else study.title(row.arm)
        value = f"{row.value:+.3f}{interval_text(row.low, row.high)}"
        if row.kind == "category":
            value = f"ε² {row.value:.3f}, p {row.p:.3g}"
        names = map(for_markdown, (row.setting, arm, row.first, row.second))
        yield f"| {' | '.join((*names, f'{row.prompts:.0f}', str(row.seeds), value))} |"
    yield (
        "\nDifficulty is a prompt's mean reward (higher: easier); equal ones share their ranks; values are means over "
        "the seeds. Intervals come from each prompt's influence on Fisher's z, prompts that seeds share counted once "
        "(infinitesimal jackknife). Between iterations: prompts that both have estimated anew. Answers: those of the "
        "initial policy, the first ones of a prompt against its others; the noise of few answers bounds all agreement "
        "below 1. ε²: share of the ranks' variance that lies between categories (Kruskal and Wallis). Summaries of "
        "arXiv 2510.05534, the paper on prompt difficulty, give about 0.7 between reward models and between policies.\n"
    )
