"""What the page of a sweep says first: the value that was chosen, and what choosing it so is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import yaml

from sppo_lightning.study.choice import FOLDS, SPLITS, Choice, Estimate, choose
from sppo_lightning.study.definition import Study
from sppo_lightning.study.outcomes import Outcome
from sppo_lightning.study.page import Results, Section
from sppo_lightning.study.statistics import LEVEL, interval_text
from sppo_lightning.text import for_markdown

VALUES, ESTIMATES = "values.parquet", "estimates.parquet"


def sweep_section(study: Study, results: Results, baseline: str | None) -> Section:
    """Return what the page of a sweep opens with.

    Args:
        study: whose arms are the values.
        results: so far.
        baseline: arm that the choice is compared with.
    """
    if any(state is None for state in results.states.values()):
        return Section(["## Choice\n", "No value is chosen before all runs have ended.\n"])
    by_arm = {arm: _of_arm(study, results.outcomes, arm) for arm in study.arms}
    complete = {arm: runs for arm, runs in by_arm.items() if len(runs) == len(study.seeds)}
    lost = [study.title(arm) for arm in study.arms if arm not in complete]
    gains = np.array([[run.gain for run in runs] for runs in complete.values()])
    arms = list(complete)
    choice = None
    if len(arms) > 1:
        choice = choose(
            gains,
            random=np.random.default_rng(list(results.digest.encode())),
            baseline=arms.index(baseline) if baseline in arms else None,
        )
    limits = [f"{', '.join(lost)}: not chosen from, as a run has no result."] if lost else []
    if choice is None:
        few = (
            f"No value can be chosen: it takes two whose runs have all ended, and {FOLDS} held-out prompts.\n"
        )
        return Section(["## Choice\n", few], limits)
    if len(study.seeds) == 1:
        limits.append(
            "Chosen and measured with one seed: the gain is that of the policies that were trained. How far another "
            "seed would change it, and the choice, is not known: give more seeds."
        )
    if any(run.reverted for run in results.outcomes):
        limits.append(
            "IterationGate decided by the same held-out prompts which policy a run ended with, so that all gains are "
            "somewhat too high: measure the policy that is trained in the end on data.test_prompts."
        )
    return Section(list(_lines(study, choice, arms, baseline)), limits, _tables(choice, arms, baseline))


def _of_arm(study: Study, outcomes: Sequence[Outcome], arm: str) -> list[Outcome]:
    """Return an arm's outcomes in the order of the seeds."""
    by_seed = {item.run.seed: item for item in outcomes if item.run.arm == arm}
    return [by_seed[seed] for seed in study.seeds if seed in by_seed]


def _lines(study: Study, choice: Choice, arms: Sequence[str], baseline: str | None) -> Iterator[str]:
    titles = [for_markdown(study.title(arm)) for arm in arms]
    best, seeds = titles[choice.best], len(study.seeds)
    yield "## Choice\n"
    yield f"**{best}** has the highest mean gain. {_told_apart(choice, titles)}\n"
    yield f"```yaml\n{yaml.safe_dump(study.arms[arms[choice.best]].config, sort_keys=False)}```\n"
    yield "| gain in held-out reward | |"
    yield "|---|---|"
    yield f"| {best}, on the seeds and prompts that it was chosen by: too high | {choice.means[choice.best]:+.3f} |"
    yield f"| of choosing so, on seeds and prompts that had no part in the choice | {_shown(choice.gain)} |"
    if choice.over_baseline is not None and baseline is not None:
        what = f"the same, less that of {for_markdown(study.title(baseline))}"
        yield f"| {what} | {_shown(choice.over_baseline)} |"
    yield ""
    yield from _findings(study, choice, baseline)
    left_out = "each seed left out in turn" if seeds > 1 else "with the one seed"
    fell = ", ".join(f"{title} ({share:.0%})" for title, share in zip(titles, choice.shares, strict=True))
    yield (
        f"The highest of several means is too high, since luck chose it, too. So the choice was made {choice.choices} "
        f"times, by {SPLITS} random splits of the {choice.prompts} held-out prompts into {FOLDS} parts, {left_out}, "
        f"and measured each time on what was left out. It fell on: {fell}. More splits do not narrow the interval, "
        "which is that of the seeds and prompts there are.\n"
    )


def _told_apart(choice: Choice, titles: Sequence[str]) -> str:
    """Say which values may be as good as the best."""
    how = f"paired by seed and prompt, at {LEVEL:.0%}, corrected for the number of values"
    if not choice.close:
        return f"It gains more than each of the others ({how})."
    others = ", ".join(titles[arm] for arm in choice.close)
    return (
        f"These may be as good ({how}): {others}. Of all of them, take the one that costs least (tokens, in the table "
        "below), or run more seeds and held-out prompts."
    )


def _findings(study: Study, choice: Choice, baseline: str | None) -> Iterator[str]:
    """Say what the intervals show; with one seed there are none."""
    compared = [(choice.gain, "the initial policy")]
    if choice.over_baseline is not None and baseline is not None:
        compared.append((choice.over_baseline, f"training on {for_markdown(study.title(baseline))}"))
    for estimate, other in compared:
        if estimate.low > 0:
            yield f"Choosing so is better than {other}.\n"
        elif estimate.high < 0:
            yield f"Choosing so is worse than {other}.\n"
        elif not math.isnan(estimate.low):
            yield f"It is not shown that choosing so is better than {other}.\n"


def _tables(choice: Choice, arms: Sequence[str], baseline: str | None) -> dict[str, pa.Table]:
    values = [
        {
            **{"arm": arm, "gain": float(choice.means[row]), "chosen": row == choice.best},
            **{"may_be_as_good": row in choice.close, "share_of_choices": float(choice.shares[row])},
        }
        for row, arm in enumerate(arms)
    ]
    highest = float(choice.means[choice.best])
    estimates = [{"of": "chosen, uncorrected", "mean": highest}, {"of": "choosing", **vars(choice.gain)}]
    if choice.over_baseline is not None:
        estimates.append({"of": f"choosing, less {baseline}", **vars(choice.over_baseline)})
    schema = pa.schema(
        [("of", pa.string()), *((name, pa.float64()) for name in ("mean", "low", "high", "p"))]
    )
    return {
        VALUES: pa.Table.from_pylist(values),
        ESTIMATES: pa.Table.from_pylist(estimates, schema=schema),
    }


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f}{interval_text(estimate.low, estimate.high)}"
