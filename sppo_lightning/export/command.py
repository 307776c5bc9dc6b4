"""``sppo-lightning export``: a run's policy as a folder that leaves the project, checked against what was trained."""

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
from sppo_lightning.export.check import require
from sppo_lightning.export.files import write_for_gguf
from sppo_lightning.export.finished_run import FinishedRun, open_run
from sppo_lightning.export.job import ROUNDED, ExportJob
from sppo_lightning.policy.pretrained import DTYPES
from sppo_lightning.system.durable import write_atomically
from sppo_lightning.types import UserError, first_line

Format = Literal["hf", "adapter", "merged", "gguf-ready"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SUMMARY = "Write a run's policy as a folder that other tools load, and check that it is the policy that was trained."


def export(
    run: str,
    format: Format,
    output: str | None = None,
    iteration: int | None = None,
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

    Args:
        run: folder of the run.
        format: ``hf``: the whole model of a run without lora; ``adapter``: the adapter in PEFT's layout; ``merged``:
            the adapter merged into its base, read again without quantisation; ``gguf-ready``: whole weights, merged
            where there is an adapter, with what llama.cpp's convert_hf_to_gguf.py looks for.
        output: folder to write, absent or empty; default: ``export-<format>`` in the run's folder.
        iteration: self-play iteration whose policy to take; default: the last finished one.
        dtype: of the written weights; ``auto``: as trained (float32) where no adapter is merged, else the dtype that
            the base's config names (float32 for a .gguf file).
        device: where the check computes, e.g. ``cuda``.

    Returns:
        The folder.

    Raises:
        UserError: if the run cannot be exported so, or the export is not the trained policy.
    """
    source = open_run(Path(run), iteration=iteration)
    _check_format(source, format, dtype)
    place = source.folder.export(format) if output is None else Path(output).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{place} is there and not empty: name another folder with --output, or delete it")
    fresh = place.with_name(f"{place.name}.unchecked")
    job = ExportJob(source, fresh, dtype=DTYPES.get(dtype), device=_device(device))
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--output {place}: the folder cannot be made ({error.strerror}): name another"
        ) from error
    if not source.adapted:
        job.write_whole()
    elif format == "adapter":
        job.write_adapter()
    else:
        job.write_merged()
    if format == "gguf-ready":
        write_for_gguf(fresh, job.tokenizer, pretrained=source.policy.pretrained)
    card = model_card(
        source,
        format=format,
        distances=job.distances,
        pairs=job.pairs,
        altered=job.altered,
        moved=job.moved,
        loader=job.loader.__name__,
    )
    write_atomically(fresh / "README.md", card.encode())
    require(job.distances, altered=job.altered, folder=fresh)
    _warn_of_rounding(job)
    if place.exists():  # perhaps the folder that one is in, which must not go
        for part in fresh.iterdir():
            part.rename(place / part.name)
        fresh.rmdir()
    else:
        fresh.rename(place)
    return place


def _check_format(source: FinishedRun, format: Format, dtype: Dtype) -> None:
    """Refuse a format that does not fit what the run trained."""
    if format == "hf" and source.adapted:
        raise UserError(
            f"{source.folder.root} trained an adapter (model.policy.lora), so that there is no whole model: use "
            "--format adapter for the adapter alone, or --format merged for base and adapter in one"
        )
    if format in ("adapter", "merged") and not source.adapted:
        raise UserError(
            f"{source.folder.root} trained all weights (no model.policy.lora), so that there is no adapter: use "
            "--format hf"
        )
    if format == "adapter" and dtype not in ("auto", "float32"):
        raise UserError(
            f"--dtype {dtype} is for whole models: an adapter stays float32, as it was trained; leave it out"
        )


def _warn_of_rounding(job: ExportJob) -> None:
    """Say so where rounding the merged weights changes about as much as training did."""
    for found in job.distances:
        if found.between == ROUNDED and job.moved is not None and found.nats > job.moved / 2:
            print(
                f"Training moved the log-probs by {job.moved:.2g} nat per token, rounding the merged weights by "
                f"{found.nats:.2g}: --dtype float32 keeps what was trained, so does --format adapter.",
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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: behind ``sppo-lightning export``; default: the process's.

    Raises:
        UserError: if they are no valid arguments, or the export fails.
    """
    import transformers.utils.logging
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="sppo-lightning export", exit_on_error=False, description=SUMMARY)
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_function_arguments(export, skip={"run"}, as_group=False)
    try:
        given = parser.parse_args(args).as_dict()
    except ArgumentError as error:
        raise UserError(f"export: {' '.join(str(error).split())}") from error
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing(_enable)?` is deprecated.*")
    place = export(**given)
    print(f"The exported policy lies in {place}; README.md there says what it is and how to load it.")
