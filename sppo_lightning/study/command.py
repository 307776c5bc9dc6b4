"""``sppo-lightning study``: arms over seeds, with claims that were named before."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from sppo_lightning.study.definition import Study, read_study
from sppo_lightning.study.outcomes import Outcome, read_outcome
from sppo_lightning.study.page import write_results
from sppo_lightning.study.plan import PlannedRun, of_job, plan
from sppo_lightning.study.runner import register, run_all, state_of
from sppo_lightning.types import UserError

SUMMARY = (
    "Compare ways to train: arms over seeds, under one protocol, with claims that are named before they run."
)
Action = Literal["run", "status", "tables"]


def study(config: str, action: Action = "run", job: str | None = None) -> Path:
    """Run a study, or what is left of it, and write its tables as runs end.

    Args:
        config: the study file.
        action: ``run``: run what has not ended, failed runs again; ``status``: say what has; ``tables``: write the page
            and the tables anew.
        job: ``i/n``: run the i-th of n shares, which together are the study, e.g. in a job array; i from 1.

    Returns:
        The page with the results.

    Raises:
        UserError: if the study cannot be run, or runs failed.
    """
    path = Path(config)
    found = read_study(path)
    runs = plan(found, path)
    mine = runs if job is None else of_job(runs, *_job(job))
    if action == "status":
        _print_status(found, runs)
        return found.folder
    failed = 0
    if action == "run":
        register(found)
        failed = run_all(found, mine, ended=lambda: _write(found, runs))
    page = _write(found, runs)
    if failed:
        raise UserError(f"{failed} of {len(mine)} runs failed, see {page}: the same command runs them again")
    return page


def _write(study: Study, runs: Sequence[PlannedRun]) -> Path:
    states = {run.name: state_of(study, run) for run in runs}
    outcomes = [
        read_outcome(run)
        for run in runs
        if (state := states[run.name]) is not None and state.status == "ended"
    ]
    _check_prompts(outcomes)
    return write_results(study, runs, states, outcomes)


def _check_prompts(outcomes: Sequence[Outcome]) -> None:
    """Refuse runs of one setting that were measured on different prompts."""
    first: dict[str, Outcome] = {}
    for item in outcomes:
        other = first.setdefault(item.run.setting, item)
        if item.prompt_ids != other.prompt_ids:
            raise UserError(
                f"{item.run.name} and {other.run.name} were measured on different held-out prompts: the prompt file "
                "changed in between; give the study another output"
            )


def _print_status(study: Study, runs: Sequence[PlannedRun]) -> None:
    states = [(run, state_of(study, run)) for run in runs]
    for run, state in states:
        begun = "begun" if run.folder.exists() else "not begun"
        print(
            f"{begun if state is None else state.status:>9}  {run.name}  {'' if state is None else state.message}"
        )
    counts = [
        sum(state is not None and state.status == status for _, state in states)
        for status in ("ended", "failed")
    ]
    print(f"{counts[0]} of {len(runs)} runs have ended, {counts[1]} failed")


def _job(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise UserError(f"--job {text}: give the number of the job and how many there are, e.g. 2/8")


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: after ``sppo-lightning study``.

    Raises:
        UserError: if they are no valid arguments, or runs failed.
    """
    parser = ArgumentParser(prog="sppo-lightning study", exit_on_error=False, description=SUMMARY)
    parser.add_function_arguments(study, as_group=False)
    given = list(args)
    if given and not given[0].startswith("-"):
        given = [f"--action={given[0]}", *given[1:]]
    try:
        found = parser.parse_args(given)
    except (ArgumentError, ValueError) as error:
        raise UserError(f"study: {' '.join(str(error).split())}") from error
    page = study(**found.as_dict())
    if found.action != "status":
        print(f"The results lie in {page}", file=sys.stderr)
