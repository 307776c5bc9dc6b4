"""Verdicts on disk, one a line, as they come: a command that is given again asks for the missing ones only."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sppo_lightning.judging.contract import Shown, Verdict
from sppo_lightning.system.durable import disk_error, read_checksummed, with_checksum, write_atomically
from sppo_lightning.types import UserError, first_line


class Journal:
    """The verdicts of one annotator, by what was shown.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verdicts_path = folder / "verdicts.jsonl"
        self.settings_path = folder / "settings.json"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Take note of the annotator's settings, or check that they are those of the verdicts that are there.

        Raises:
            UserError: naming the first setting that differs, or a file that is damaged.
        """
        settings = json.loads(json.dumps(settings))
        if not self.settings_path.exists():
            if self.verdicts_path.exists():
                raise UserError(
                    f"{self.settings_path} is gone, so that nothing says who gave the verdicts there: restore it, or "
                    "name another folder with --output"
                )
            write_atomically(self.settings_path, with_checksum(settings))
            return
        try:
            before = read_checksummed(self.settings_path.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{self.settings_path} is damaged ({first_line(error)}): restore it, or name another folder with "
                "--output"
            ) from error
        found = next(_differences("--by", before, settings), None)
        if found is not None:
            key, old, new = found
            raise UserError(
                f"{self.folder} holds verdicts with {key}={old!r}, but this command has {new!r}: name another folder "
                "with --output, or delete that one"
            )

    def read(self) -> dict[str, Verdict]:
        """Return the verdicts by :func:`digest_of`; a last line that a kill cut off is removed.

        Raises:
            UserError: naming a line that is damaged.
        """
        if not self.verdicts_path.exists():
            return {}
        content = self.verdicts_path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.verdicts_path.open("rb+") as file:
                file.truncate(len(whole))
        lines = enumerate(whole.splitlines(), start=1)
        return dict(_verdict(line, f"{self.verdicts_path}:{number}") for number, line in lines)

    def append(self, shown: Shown, verdict: Verdict) -> None:
        """Put a verdict on disk.

        Raises:
            UserError: if the disk is full or out of reach.
        """
        row = {
            "shown": digest_of(shown),
            "prompt_id": shown.prompt.id,
            **verdict._asdict(),
            "first_wins": None if math.isnan(verdict.first_wins) else verdict.first_wins,
            "logprobs": dict(verdict.logprobs),
        }
        try:
            with self.verdicts_path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            message = disk_error(error, self.verdicts_path)
            if message is None:
                raise
            raise message from error


def _verdict(line: bytes, where: str) -> tuple[str, Verdict]:
    try:
        row = json.loads(line)
        first_wins = math.nan if row["first_wins"] is None else float(row["first_wins"])
        return str(row["shown"]), Verdict(
            first_wins,
            row["reason"],
            row["said"],
            row["logprobs"],
            row["prompt_tokens"],
            row["completion_tokens"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} is damaged ({first_line(error)}): remove that line, and it is asked for again"
        ) from error


def digest_of(shown: Shown) -> str:
    """Return a digest of what was shown, order included."""
    texts = [
        [[turn["role"], turn["content"]] for turn in shown.prompt.messages],
        shown.first.text,
        shown.second.text,
    ]
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def _differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs in two descriptions of a component: key, older and present value."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield key, before, now
        return
    for name in sorted(before.keys() | now.keys()):
        inner = key if name in ("class_path", "init_args") else f"{key}.{name}"
        yield from _differences(inner, before.get(name), now.get(name))
