"""What a run ran on, start by start: versions and devices, for who reads its results later."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sppo_lightning.system.durable import read_checksummed, with_checksum, write_atomically

PACKAGES = (
    "sppo-lightning",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "vllm",
)


def describe_environment(device: torch.device, *, processes: int, step: int) -> dict[str, Any]:
    """Return what this process runs on, in JSON types; no name of a machine or a user.

    Args:
        device: that it computes on.
        processes: that share the run.
        step: optimizer step that the run starts or resumes from.
    """
    found = {name: _version(name) for name in PACKAGES}
    versions = {"python": platform.python_version()}
    versions |= {name: known for name, known in found.items() if known is not None}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "step": step,
        "device": name,
        "processes": processes,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def add_start(path: Path, start: Mapping[str, Any]) -> None:
    """Add a start to those that a run's file names.

    Args:
        path: of the file.
        start: as :func:`describe_environment` returns it.

    Raises:
        UserError: if the disk is full or out of reach.
    """
    write_atomically(path, with_checksum({"starts": [*read_starts(path), start]}))


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return the starts that a run's file names, the first one first; none where it is missing or damaged."""
    try:
        found = read_checksummed(path.read_bytes())["starts"]
        return [dict(start) for start in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []
