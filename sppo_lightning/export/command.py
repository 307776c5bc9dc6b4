"""``sppo-lightning export``: a run's policy in a folder, checked against what was trained; or its pairs as data."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from sppo_lightning.export.card import model_card
from sppo_lightning.export.check import Check, check_export
from sppo_lightning.export.data_card import data_card
from sppo_lightning.export.exporter import DataExporter, Exporter, ExportFormat
from sppo_lightning.export.finished_run import best_iteration, open_run
from sppo_lightning.export.formats import GGUFReadyModel, HFModel, MergedModel, PEFTAdapter
from sppo_lightning.export.preferences import PreferenceData
from sppo_lightning.export.saved_policy import SavedPolicy
from sppo_lightning.export.stored_run import StoredRun, read_run
from sppo_lightning.policy.pretrained import DTYPES
from sppo_lightning.short_names import with_class_paths
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import UserError, first_line

FORMATS = {
    kind.name: f"sppo_lightning.export.{kind.__name__}"
    for kind in (HFModel, PEFTAdapter, MergedModel, GGUFReadyModel, PreferenceData)
}
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SUMMARY = (
    "Write a run's policy as a folder that other tools load, and check that it is the policy that was trained; or its "
    "preference pairs as a data set."
)


def export(
    run: str,
    format: ExportFormat,
    output: str | None = None,
    iteration: int | Literal["best", "all"] | None = None,
    dtype: Dtype = "auto",
    device: str = "cpu",
) -> Path:
    """Write a run's policy as a folder that other tools load, and check that it is the policy that was trained.

    A few of the run's own responses are read by the trained policy and by the exported folder, one model in memory at
    a time. Their log-probs may differ by 1e-4 nat per token on average; where the export has 16 bits, also by four
    times what computing with it in 16 bits changes; where training held the base otherwise than its files do
    (quantised, rounded), also by twice what that does to the base alone. An adapter, or its merged weights before they
    are rounded, must give what the run's adapter gives on the same base: within 1e-4 nat per token; and the folder must
    hold each of these weights to the last bit, rounded once. Where the run's reference was the base alone, the base
    must also give the log-probs that training stored: within 1e-3 nat per token, 0.05 for products in 16 bits.

    Of data, such as the run's pairs, nothing is compared, and no model is loaded.

    Args:
        run: folder of the run.
        format: ``hf``: the full model of a run without lora; ``adapter``: the adapter in PEFT's layout; ``merged``:
            the adapter merged into its base, read again without quantisation; ``gguf-ready``: full weights, merged
            where there is an adapter, with what llama.cpp's convert_hf_to_gguf.py looks for; ``preferences``: the pairs
            as a data set for TRL; or the class path of an exporter of your own, with its arguments as
            ``--format.NAME VALUE``.
        output: folder to write, absent or empty; default: ``export-<format>`` in the run's folder.
        iteration: self-play iteration whose policy to take, from 0; ``best``: that of ``best/``, the one with the best
            held-out reward; default: that of ``policy/``, the last finished one or, after a step back that was
            reverted, the one that the run went on from. Of data: the iteration that made it; ``all``; default: the last
            one whose pairs are complete.
        dtype: of the written weights; ``auto``: as trained (float32) where no adapter is merged, else the dtype that
            the base's config names (float32 for a .gguf file).
        device: where the check computes, e.g. ``cuda``.

    Returns:
        The folder.

    Raises:
        UserError: if the run cannot be exported so, or the export is not the trained policy.
    """
    if isinstance(format, Exporter):
        if iteration == "all":
            raise UserError(
                "--iteration all is for data, e.g. --format preferences: name one policy's iteration"
            )
        return _export_policy(
            Path(run), format, output=output, iteration=iteration, dtype=DTYPES.get(dtype), device=device
        )
    if not isinstance(format, DataExporter):
        raise UserError(
            f"--format {type(format).__name__} exports nothing: subclass sppo_lightning.export.Exporter, or "
            "DataExporter"
        )
    if iteration == "best":
        raise UserError("--iteration best is for policies: give a number, or all")
    for option, given in (("--dtype", dtype != "auto"), ("--device", device != "cpu")):
        if given:
            raise UserError(f"{option} is for policies: leave it out, data has no weights")
    return _export_data(Path(run), format, output=output, iteration=iteration)


def _export_policy(
    root: Path,
    format: Exporter,
    *,
    output: str | None,
    iteration: int | Literal["best"] | None,
    dtype: torch.dtype | None,
    device: str,
) -> Path:
    source = open_run(root, iteration=iteration)
    format.validate(source, dtype=dtype)
    place = _free_place(source.folder, format, output)
    policy = SavedPolicy(source, dtype=dtype, device=_device(device))
    fresh = _unchecked(place)
    format.write(policy, fresh)
    check = check_export(format, policy, fresh)
    write_atomically(fresh / "README.md", model_card(format, policy, check).encode())
    if check is not None:
        check.require(fresh)
        _warn_of_rounding(check)
    best = best_iteration(source.folder)
    if best not in (None, source.iteration):
        print(
            f"This is the policy of iteration {source.iteration}; the best by held-out reward is iteration {best}'s: "
            "--iteration best",
            file=sys.stderr,
        )
    _give_name(fresh, place)
    return place


def _export_data(
    root: Path, format: DataExporter, *, output: str | None, iteration: int | Literal["all"] | None
) -> Path:
    source = read_run(root)
    iterations = _with_pairs(source, iteration)
    place = _free_place(source.folder, format, output)
    fresh = _unchecked(place)
    try:
        contents = list(format.write(source, iterations, fresh))
        write_atomically(fresh / "README.md", data_card(format, source, iterations, contents).encode())
    except BaseException:
        shutil.rmtree(fresh)
        raise
    _give_name(fresh, place)
    return place


def _with_pairs(run: StoredRun, iteration: int | Literal["all"] | None) -> list[int]:
    """Return the iterations whose data is asked for.

    Raises:
        UserError: if the data of one is not there.
    """
    folder = run.folder
    complete = [number for number in sorted(folder.iteration_numbers()) if folder.iteration(number).complete]
    if not complete:
        raise UserError(f"{folder.root} has no iteration whose pairs are complete yet: run fit for longer")
    wanted = complete if iteration == "all" else [complete[-1] if iteration is None else iteration]
    for number in wanted:
        if number not in complete:
            raise UserError(
                f"{folder.root} has no complete pairs of iteration {number}, only of "
                f"{', '.join(map(str, complete))}: name one of those"
            )
        path = folder.iteration(number).pairs_path
        if not path.exists():
            raise UserError(f"{path} is gone, so that iteration {number} has no pairs any more: name another")
    return wanted


def _free_place(folder: RunFolder, format: ExportFormat, output: str | None) -> Path:
    """Return where to write.

    Raises:
        UserError: if something is there.
    """
    name = format.name or type(format).__name__
    place = folder.export(name) if output is None else Path(output).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} is there and not empty: name another folder with --output, or delete it")
    return place


def _unchecked(place: Path) -> Path:
    """Make the folder that what is not whole and checked stands in, and return it."""
    fresh = place.with_name(f"{place.name}.unchecked")
    try:
        fresh.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"{fresh} is there, perhaps of an export that failed: delete it, or name another folder with --output"
        ) from error
    except OSError as error:
        raise UserError(
            f"--output {place}: the folder cannot be made ({error.strerror}): name another"
        ) from error
    return fresh


def _give_name(fresh: Path, place: Path) -> None:
    """Let what was written take its name."""
    if place.exists():  # perhaps the folder that one is in, which must not go
        for part in fresh.iterdir():
            part.rename(place / part.name)
        fresh.rmdir()
    else:
        fresh.rename(place)


def _warn_of_rounding(check: Check) -> None:
    """Say so where rounding the merged weights changes about as much as training did."""
    if check.moved is not None and check.rounded is not None and check.rounded > check.moved / 2:
        print(
            f"Training moved the log-probs by {check.moved:.2g} nat per token, rounding the merged weights by "
            f"{check.rounded:.2g}: --dtype float32 keeps what was trained, so does --format adapter.",
            file=sys.stderr,
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({first_line(error)}): leave it out for cpu"
        ) from error
    return device


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: after ``sppo-lightning export``.

    Raises:
        UserError: if they are no valid arguments, or the export fails.
    """
    import transformers.utils.logging
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="sppo-lightning export", exit_on_error=False, description=SUMMARY)
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_function_arguments(export, skip={"run"}, as_group=False)
    try:
        given = parser.instantiate(
            parser.parse_args(with_class_paths(args, "--format", FORMATS, what="format"))
        ).as_dict()
    except (ArgumentError, ValueError, ImportError) as error:  # the latter two an exporter's own
        raise UserError(f"export: {' '.join(str(error).split())}") from error
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing(_enable)?` is deprecated.*")
    place = export(**given)
    what = "policy" if isinstance(given["format"], Exporter) else "data"
    print(f"The exported {what} lies in {place}; README.md there says what it is and how to load it.")
