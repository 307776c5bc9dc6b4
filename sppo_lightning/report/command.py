"""``sppo-lightning report``: what happened in a run, in several, or in a study, as a page, Markdown or JSON."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sppo_lightning.paths import expand_path
from sppo_lightning.prompts.reading import read_prompts
from sppo_lightning.report.comparison import check_comparable
from sppo_lightning.report.markdown import markdown
from sppo_lightning.report.page import page
from sppo_lightning.report.run_data import RunData, read_run, section
from sppo_lightning.report.study_folder import StudyData, is_study, read_study
from sppo_lightning.report.summary import summary
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.text import for_terminal
from sppo_lightning.types import UserError, first_line

Format = Literal["html", "md", "json"]
SUMMARY = "Write what happened in a run, in several, or in a study, as one HTML file, as Markdown or as JSON."
MAX_MEGABYTES = 25.0


def report(
    runs: Sequence[str],
    format: Format = "html",
    output: str | None = None,
    max_megabytes: float = MAX_MEGABYTES,
    prompts: str | None = None,
    category_field: str = "category",
) -> Path | None:
    """Write what happened in a run, or in several, as one HTML file, as Markdown or as JSON.

    A run may be in progress, and files may be missing: the report says which. No link is followed out of a run's
    folder. Several runs are compared with the first one on the same held-out prompts. Of a study, its arms and claims
    are shown, and the runs of one seed.

    Args:
        runs: folders of the runs, or the folder of one study.
        format: ``html``: a page with all prompts and responses, which loads nothing from elsewhere; ``md``: tables of
            numbers; ``json``: the same and more, for programs.
        output: file to write; default: report.html in the folder of the run or study, or in the current one for several
            runs;
            for md and json the standard output.
        max_megabytes: size of the page; responses that would make it larger are left out, those of the oldest
            iterations first.
        prompts: the training prompts' file, for their categories, which a run's folder does not hold.
        category_field: field of a prompt that holds its category.

    Returns:
        The file; ``None`` for the standard output.

    Raises:
        UserError: if one is no run, or held-out prompts differ.
    """
    if not max_megabytes > 0:
        raise UserError(f"--max_megabytes {max_megabytes} must be more than 0")
    roots = [Path(expand_path(run, key="RUN")) for run in runs]
    if len({root.resolve() for root in roots}) < len(roots):
        raise UserError("report: the same run is named twice: name each once")
    study = _study(roots)
    found = [read_run(root) for root in (roots if study is None else study.shown)]
    check_comparable(found)
    if format == "html":
        categories = {} if prompts is None else _categories(prompts, category_field, found)
        content = page_of(found, study, max_megabytes=max_megabytes, categories=categories)
    else:
        contents = summary(found, study)
        text = markdown(contents) if format == "md" else json.dumps(contents, indent=2) + "\n"
        content = text.encode()
    if output is None and format != "html":
        print(content.decode(), end="")
        return None
    place = Path(expand_path(output, key="--output")) if output is not None else _default(roots)
    if place.is_dir():
        raise UserError(f"--output {place} is a folder: name a file")
    try:
        write_atomically(place, content)
    except OSError as error:
        raise UserError(
            f"--output {place} cannot be written ({first_line(error)}): name another file"
        ) from error
    return place


def page_of(
    runs: Sequence[RunData],
    study: StudyData | None = None,
    *,
    max_megabytes: float = MAX_MEGABYTES,
    categories: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """Return the page of some runs.

    Args:
        runs: later ones are compared with the first.
        study: that they belong to.
        max_megabytes: size of the page, which leaves texts out that would make it larger.
        categories: of prompts, by id.
    """
    return page(summary(runs, study), runs, max_megabytes=max_megabytes, categories=categories)


def _study(roots: Sequence[Path]) -> StudyData | None:
    """Return the study whose folder is given; ``None``: runs are."""
    studies = [root for root in roots if is_study(root)]
    if studies and len(roots) > 1:
        raise UserError(f"report: {studies[0]} is a study, which is reported by itself: name it alone")
    return read_study(studies[0]) if studies else None


def _default(roots: Sequence[Path]) -> Path:
    return RunFolder(roots[0]).report if len(roots) == 1 else Path("report.html")


def _categories(source: str, field: str, runs: Sequence[RunData]) -> dict[str, str]:
    columns: Any = section(runs[0].config, "data").get("columns") if runs else None
    table = read_prompts(source, key="--prompts", columns=columns if isinstance(columns, dict) else {})
    found = categories_of(table, field)
    if not found:
        raise UserError(
            f"--prompts {source}: no prompt has the field {field!r}: name another with --category_field"
        )
    return found


def categories_of(prompts: Sequence[Any], field: str) -> dict[str, str]:
    """Return the category of each prompt that has one, by id."""
    return {
        prompt.id: str(prompt.metadata[field]) for prompt in prompts if prompt.metadata.get(field) is not None
    }


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: after ``sppo-lightning report``.

    Raises:
        UserError: if they are no valid arguments, or the report cannot be made.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="sppo-lightning report", exit_on_error=False, description=SUMMARY)
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="folder of a run or of a study")
    parser.add_function_arguments(report, skip={"runs"}, as_group=False)
    try:
        given = parser.parse_args(list(args)).as_dict()
    except (ArgumentError, ValueError) as error:
        raise UserError(f"report: {' '.join(str(error).split())}") from error
    place = report(**given)
    if place is not None:
        print(for_terminal(f"The report lies in {place}; open it in a browser."), file=sys.stderr)
