"""``sppo-lightning study``: arms over seeds, with claims that were named before."""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from sppo_lightning.study.comparable import comparable
from sppo_lightning.study.definition import Study, read_study
from sppo_lightning.study.outcomes import read_outcome
from sppo_lightning.study.page import Results, Section, write_results
from sppo_lightning.study.plan import PlannedRun, of_arms, of_job, pinned_settings, plan
from sppo_lightning.study.registration import check_registered, read_registration, register
from sppo_lightning.study.runner import holding, run_all, state_of
from sppo_lightning.study.sizes import check_pairs
from sppo_lightning.study.sweep import baseline_of, sweep_study
from sppo_lightning.study.sweep_page import sweep_section
from sppo_lightning.system.lock import is_first_process
from sppo_lightning.text import for_terminal
from sppo_lightning.types import UserError

SUMMARY = (
    "Compare ways to train: arms over seeds, under one protocol, with claims that are named before they run."
)
Action = Literal["run", "status", "tables"]
PAGE_SHARE = 0.02  # of a study's time, for its page between two runs


def study(
    config: str,
    action: Action = "run",
    job: str | None = None,
    arms: str | None = None,
    sweep: str | None = None,
    values: str | None = None,
    seeds: str | None = None,
    output: str | None = None,
) -> Path:
    """Run a study, or what is left of it, and write its tables as runs end.

    Args:
        config: the study file; with ``sweep`` a config of ``fit``.
        action: ``run``: run what has not ended, failed runs again; ``status``: say what has; ``tables``: write the page
            and the tables anew.
        job: ``i/n``: run the i-th of n shares, which together are the study, e.g. in a job array; i from 1.
        sweep: instead of a study file: ``fraction``: which fraction of the easiest prompts is best to train on.
        values: of a sweep, e.g. ``0.1,0.3,1.0``.
        seeds: of a sweep, e.g. ``1,2,3``.
        output: folder of a sweep; default: ``runs/studies/<sweep>-<name of the config>``.

    Returns:
        The page with the results.

    Raises:
        UserError: if the study cannot be run, or runs failed.
    """
    _check_environment()
    path = Path(config)
    if sweep is not None:
        named = sweep_study(path, sweep, values=values, seeds=seeds, output=output)
    elif any(given is not None for given in (values, seeds, output)):
        raise UserError("--values, --seeds and --output belong to --sweep: a study file names its own")
    else:
        named = read_study(path)
    with holding(named.folder / ".registration.lock", wait_s=1800):
        before = read_registration(named)
        if before is None and action != "run":
            raise UserError(f"{named.folder} holds no study yet: run it first")
        pinned = pinned_settings(named, path) if before is None else before.pinned
        runs = plan(named, path, pinned)
        mine = runs if job is None else of_job(runs, *_job(job))
        mine = mine if arms is None else of_arms(mine, _arms(named, arms))
        if before is None:
            check_pairs(runs)
        else:
            check_registered(named, runs, before)
        registered = before or register(named, runs, pinned)
    if action == "status":
        _print_status(named, runs)
        return named.folder
    failed = 0
    if action == "run":
        failed = run_all(named, mine, ended=paced(lambda: _write(named, runs, registered.digest, sweep)))
    page = _write(named, runs, registered.digest, sweep)
    if failed:
        raise UserError(f"{failed} of {len(mine)} runs failed, see {page}: the same command runs them again")
    return page


def _check_environment() -> None:
    """Refuse to be one of several processes, and to run for hours towards statistics that cannot be computed."""
    several = any(os.environ.get(name, "1") not in ("", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    if several or not is_first_process(os.environ):
        raise UserError(
            "study was started as several processes (WORLD_SIZE, SLURM_NTASKS or a rank is set): start one, and set "
            "trainer.devices in the base config for arms on several devices"
        )
    if find_spec("scipy") is None:
        raise UserError("a study's statistics need SciPy: pip install 'sppo-lightning[study]'")


def _write(study: Study, runs: Sequence[PlannedRun], digest: str, sweep: str | None) -> Path:
    """Write the page and the tables of what has ended; jobs do so one after the other."""
    with holding(study.folder / ".results.lock", wait_s=60):
        states = {run.name: state_of(study, run) for run in runs}
        outcomes, unreadable = [], {}
        for run in runs:
            state = states[run.name]
            if state is None or state.status != "ended":
                continue
            try:
                outcomes.append(read_outcome(run))
            except UserError as error:
                unreadable[run.name] = str(error)
        found = comparable(outcomes)
        results = Results(runs, states, found.kept, {**unreadable, **found.left_out}, digest)
        section = Section() if sweep is None else sweep_section(study, results, baseline_of(study, sweep))
        return write_results(study, results, replace(section, limits=(*section.limits, *found.notes)))


def paced(write: Callable[[], object], *, share: float = PAGE_SHARE) -> Callable[[], None]:
    """Return a function that writes, unless it has been called so soon that writing would take too much of the time.

    Args:
        write: reads what all runs came to, so that it takes longer with each of them.
        share: of the time that writing may take.
    """
    not_before = -math.inf

    def write_if_due() -> None:
        nonlocal not_before
        began = time.monotonic()
        if began >= not_before:
            write()
            ended = time.monotonic()
            not_before = ended + (ended - began) / share

    return write_if_due


def _print_status(study: Study, runs: Sequence[PlannedRun]) -> None:
    states = [(run, state_of(study, run)) for run in runs]
    for run, state in states:
        begun = "begun" if run.folder.exists() else "not begun"
        message = "" if state is None else for_terminal(state.message)
        print(f"{begun if state is None else state.status:>9}  {run.name}  {message}")
    ended, failed = (
        sum(state is not None and state.status == status for _, state in states)
        for status in ("ended", "failed")
    )
    print(f"{ended} of {len(runs)} runs have ended, {failed} failed")


def _job(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise UserError(f"--job {text}: give the number of the job and how many there are, e.g. 2/8")


def _arms(study: Study, text: str) -> list[str]:
    """Return the arms that ``--arms`` names."""
    found = [name.strip() for name in text.split(",")]
    unknown = next((name for name in found if name not in study.arms), None)
    if unknown is not None:
        raise UserError(f"--arms {text}: there is no arm {unknown!r}; there are {', '.join(study.arms)}")
    return found


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
