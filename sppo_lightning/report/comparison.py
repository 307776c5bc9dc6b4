"""Several runs next to each other: what differs in their settings, and how their answers to the same prompts do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sppo_lightning.evaluation.measures import measure, paired_difference
from sppo_lightning.report.estimates import Estimate
from sppo_lightning.report.run_data import RunData, section
from sppo_lightning.report.settings import flat_settings
from sppo_lightning.types import UserError


class RunDifference(NamedTuple):
    """A run's held-out answers after some iterations, against the first run's after as many."""

    run: int  # place of the run; 0 is the one that others are compared with
    finished: int
    reward: Estimate  # paired difference
    win_rate: Estimate  # answers with a higher reward; ties count half
    length: Estimate  # paired difference, tokens


def check_comparable(runs: Sequence[RunData]) -> None:
    """Refuse runs whose held-out prompts differ; a run without any yet is not compared.

    Raises:
        UserError: naming two runs.
    """
    evaluated = [run for run in runs if run.evaluations]
    for run in evaluated[1:]:
        prompts = [
            {row.prompt_id: row.prompt for row in each.evaluations[0].rows} for each in (evaluated[0], run)
        ]
        if prompts[0] != prompts[1]:
            same = sum(prompts[1].get(key) == text for key, text in prompts[0].items())
            raise UserError(
                f"the runs {evaluated[0].name} and {run.name} have different held-out prompts ({len(prompts[0])} and "
                f"{len(prompts[1])}, {same} of them the same): compare runs with the same data.eval_prompts, or report "
                "each one by itself"
            )


def differences(runs: Sequence[RunData]) -> Iterator[RunDifference]:
    """Yield how each later run differs from the first one, where both were evaluated."""
    first = {one.finished: one.rows for one in runs[0].evaluations}
    for place, run in enumerate(runs[1:], 1):
        if not _same_scale(runs[0], run):
            run.reader.note(
                run.reader.folder.evaluations,
                f"rewards are comparisons with the run's own initial policy, which answered unlike that of "
                f"{runs[0].name}. Differences from it are not shown.",
            )
            continue
        for one in run.evaluations:
            baseline = first.get(one.finished)
            if baseline is None or one.finished == 0:
                continue
            try:
                batch = measure(one.rows, baseline)
            except UserError:  # no finite reward, which is noted where the run is read
                continue
            lengths = {row.prompt_id: row.length for row in baseline if row.finish_reason != "failed"}
            longer = [
                float(row.length - lengths[row.prompt_id])
                for row in one.rows
                if row.finish_reason != "failed" and row.prompt_id in lengths
            ]
            yield RunDifference(
                place,
                one.finished,
                reward=Estimate.of_difference(paired_difference(one.rows, baseline)),
                win_rate=Estimate.of(batch.win),
                length=Estimate.of(torch.tensor(longer, dtype=torch.float64)),
            )


def _same_scale(first: RunData, run: RunData) -> bool:
    """Whether rewards of two runs can be compared: those that are comparisons, only against the same answers."""
    from sppo_lightning.rewards.comparisons import compares_responses  # with what loads models: slow

    if not any(compares_responses(section(each.config, "data").get("reward")) for each in (first, run)):
        return True
    texts = [
        {row.prompt_id: row.response for one in each.evaluations if one.finished == 0 for row in one.rows}
        for each in (first, run)
    ]
    return texts[0] == texts[1]


def differing_settings(runs: Sequence[RunData]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, each run's value; ``None``: not set."""
    flat: list[Mapping[str, Any]] = [flat_settings(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    found = {key: [each.get(key) for each in flat] for key in keys if key != "trainer.default_root_dir"}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values[1:])}
