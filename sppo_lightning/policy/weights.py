"""Reads all of a model's weights from its own files: nothing that is missing there is initialised at random."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LISTED = 3  # names of weights that a message shows
POINTER = b"version https://git-lfs"  # how a file begins that stands for one that was not fetched
PREFIXES = ("module.", "_orig_mod.", "model.module.", "base_model.model.", "v_head.", "pretrained_model.")
"""What wrappers of a model put in front of its weights' names."""


def read_model(
    loader: Any, location: str, *, given: str, later: tuple[str, ...] = (), **options: Any
) -> PreTrainedModel:
    """Load a model, and refuse one whose files lack weights, or hold other shapes or numbers that are not finite.

    Args:
        loader: transformers' class to load by.
        location: folder or hub id.
        given: key and value of the config, e.g. ``model.policy.pretrained='folder'``, for errors.
        later: how names begin that something else will give: they may be missing.
        options: of ``from_pretrained``.

    Raises:
        UserError: naming the first weights that are missing, or the file that cannot be read.
    """
    safe = {} if "gguf_file" in options else {"use_safetensors": True}
    if "gguf_file" not in options:
        check_files(Path(location), given)
    try:
        model, info = loader.from_pretrained(location, output_loading_info=True, **safe, **options)
    except OSError as error:
        raise UserError(
            f"{given} has no weights that can be read ({first_line(error)}): put the model's safetensors files into "
            "the folder"
        ) from error
    except Exception as error:
        if not _is_about_files(error):
            raise
        raise UserError(
            f"{given}: its weights cannot be read ({first_line(error)}): fetch its files again"
        ) from error
    missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    missing = [name for name in missing if not name.startswith(later)] if later else missing
    unexpected = sorted(info["unexpected_keys"])
    if later:  # the head of a language model, in the place of which another one comes
        unexpected = [name for name in unexpected if not name.startswith("lm_head.")]
    if missing:
        raise UserError(f"{given} lacks {_names(missing)}, which would be random{_hint(missing, unexpected)}")
    if unexpected:
        warnings.warn(f"{given} holds {_names(unexpected)}, which this model has no place for", stacklevel=2)
    _check_finite(model, given)
    return model  # type: ignore[no-any-return]


def check_files(folder: Path, given: str) -> None:
    """Refuse files of a model's folder that stand for others: an index that leads out of it, a Git LFS pointer.

    Raises:
        UserError: naming the file.
    """
    if not folder.is_dir():
        return
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{given}: {index} is no index of weights: fetch it again") from error
        for name in files:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{given}: {index} names {name!r}, which lies outside of the folder")
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise UserError(f"{given}: {file} is a Git LFS pointer, not the file: run git lfs pull")


def _is_about_files(error: Exception) -> bool:
    """Whether an error of loading comes from what the files hold, and not from a wrong option or a bug."""
    from safetensors import SafetensorError

    text = str(error)
    return isinstance(error, SafetensorError) or "size mismatch" in text or "ignore_mismatched_sizes" in text


def _names(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"{', '.join(found[:LISTED])}{more}"


def _hint(missing: list[str], unexpected: list[str]) -> str:
    """Return what is probably the matter, as the end of a sentence."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in unexpected):
            return f"; its files hold names that begin with {prefix!r}, of a wrapped model: save the model inside"
    if any(name.startswith("v_head.") or ".v_head." in name for name in unexpected):
        return "; its files hold a value head: give a sequence-classification model"
    if unexpected:
        return f"; its files hold {_names(unexpected)} instead: is this another kind of model?"
    return ": is this the whole folder, and the right kind of model?"


def _check_finite(model: PreTrainedModel, given: str) -> None:
    for name, weight in model.named_parameters():
        readable = weight.is_floating_point() and weight.element_size() > 1 and weight.device.type != "meta"
        if readable and not torch.isfinite(weight).all():
            raise UserError(f"{given}: the weight {name} holds NaN or infinity")
