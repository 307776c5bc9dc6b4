"""A study's folder: what its arms gained, what became of its claims, and which of its runs are shown one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from sppo_lightning.report.reading import DAMAGE, FolderReader
from sppo_lightning.types import UserError, first_line

REGISTRATION = "study.json"
_RUN_NAME = re.compile(r"[\w-][\w.-]*/seed-\d+/[\w-][\w.-]*")  # setting, seed, arm: a place below runs/
INITIAL = "initial"  # what claims call the policy that all arms start from
LACKS = "are not shown."
NAMED = 5  # runs that are named where more have not ended
ARM_NUMBERS = ("gain", "low", "high", "lowest_gain", "win_rate", "length_ratio", "pairs", "tokens", "initial")
CLAIM_NUMBERS = ("mean", "low", "high", "effect", "p_holm")

Row = dict[str, Any]


class Named(NamedTuple):
    """What was written down before a study ran."""

    digest: str
    name: str
    question: str
    titles: Mapping[str, str]  # of arms
    claims: Mapping[str, str]  # in words
    steps: str  # how the reading at the runs' ends is called
    limits: Sequence[str]
    runs: Sequence[str]


@dataclass(frozen=True)
class StudyData:
    """All that the report says of a study.

    Args:
        reader: of its folder; holds what is missing.
        named: before it ran.
        ended: folders of the runs that have ended.
        failed: how many runs did.
        arms: a row for each setting and arm.
        gains: by setting and arm: mean gain over seeds and prompts after each number of iterations.
        verdicts: a row for each claim, setting and reading.
    """

    reader: FolderReader
    named: Named
    ended: Sequence[Path]
    failed: int
    arms: Sequence[Row]
    gains: Mapping[tuple[str, str], Mapping[int, float]]
    verdicts: Sequence[Row]

    @property
    def shown(self) -> list[Path]:
        """The runs that are shown one by one: the arms with the first seed, in the first setting."""
        return [path for path in self.ended if path.parent == self.ended[0].parent]

    def content(self) -> dict[str, Any]:
        """Return it as JSON types."""
        named, shown = self.named, self.shown
        return {
            **{"name": named.name, "question": named.question, "digest": named.digest},
            "runs": {"all": len(named.runs), "ended": len(self.ended), "failed": self.failed},
            "settings": [
                {"name": name, "arms": [self._arm(row) for row in self.arms if row["setting"] == name]}
                for name in dict.fromkeys(row["setting"] for row in self.arms)
            ],
            "claims": [self._claim(row) for row in self.verdicts],
            "limits": list(named.limits),
            "shown": f"{shown[0].parent.parent.name}/{shown[0].parent.name}" if shown else None,
            "left_out": len(self.ended) - len(shown),
            "missing": self.reader.missing,
        }

    def _arm(self, row: Row) -> Row:
        gains = self.gains.get((row["setting"], row["arm"]), {})
        return {**row, "title": self.named.titles[row["arm"]], "by_iteration": dict(sorted(gains.items()))}

    def _claim(self, row: Row) -> Row:
        reading = "equal tokens" if row["reading"] == "tokens" else self.named.steps
        return {**row, "text": self.named.claims[row["claim"]], "reading": reading}


def is_study(root: Path) -> bool:
    """Whether a folder is a study's."""
    return (root / REGISTRATION).is_file()


def read_study(root: Path) -> StudyData:
    """Read a study's folder, also while it runs.

    Raises:
        UserError: if what it named before it ran cannot be read.
    """
    reader = FolderReader(root)
    place = root / REGISTRATION
    try:
        named = _named(place)
    except DAMAGE as error:
        raise UserError(f"{place} is damaged ({first_line(error)}): restore it from a copy") from error
    ended, failed = _runs(reader, named.runs)
    arms, gains, verdicts = (root / f"{name}.parquet" for name in ("arms", "prompts", "verdicts"))
    begun = not ended  # its tables come with the first run that ends
    return StudyData(
        reader,
        named,
        ended,
        failed,
        reader.read(arms, partial(_arms, arms, named), lacks=f"Arms {LACKS}", optional=begun) or [],
        reader.read(gains, partial(_gains, gains), lacks=f"Gains by iteration {LACKS}", optional=begun) or {},
        reader.read(verdicts, partial(_verdicts, verdicts, named), lacks=f"Claims {LACKS}", optional=begun)
        or [],
    )


def _named(place: Path) -> Named:
    """Read what was written down."""
    content = json.loads(place.read_bytes())
    study, runs = content["study"], list(content["configs"])
    if not runs or not all(_RUN_NAME.fullmatch(name) for name in runs):
        raise ValueError("no runs, or names that are none")
    titles = {name: str(arm["title"] or name) for name, arm in study["arms"].items()}
    sides = {**titles, INITIAL: "the initial policy"}
    claims = {
        name: f"{claim['text']} ({sides[claim['arm']]} against {sides[claim['against']]})"
        for name, claim in study["claims"].items()
    }
    return Named(
        digest=str(content["digest"]),
        name=str(study["name"]),
        question=str(study["question"]),
        titles=titles,
        claims=claims,
        steps="equal steps" if study["matched"] == "steps" else "at the end",
        limits=[str(limit) for limit in study["limits"]],
        runs=runs,
    )


def _runs(reader: FolderReader, names: Sequence[str]) -> tuple[list[Path], int]:
    """Return the folders of the runs that have ended, and how many failed; what became of the others is noted."""
    waiting, ended, failed = [], [], 0
    for name in names:
        place, folder = reader.root / "state" / f"{name}.json", reader.root / "runs" / name
        state = reader.read(
            place, partial(_state, place), lacks="How the run ended is not known.", optional=True
        )
        if state is None:
            waiting.append(name)
        elif state[0] != "ended":
            failed += 1
            reader.note(folder, f"failed: {state[1]}")
        elif not folder.is_dir() or not reader.contains(folder):
            reader.note(folder, "not there, or a link out of the folder. The run is not shown.")
        else:
            ended.append(folder)
    if waiting:
        more = ", …" if len(waiting) > NAMED else ""
        reader.missing.append(
            f"{len(waiting)} of {len(names)} runs have not ended: {', '.join(waiting[:NAMED])}{more}"
        )
    return ended, failed


def _state(path: Path) -> tuple[str, str]:
    content = json.loads(path.read_bytes())
    return str(content["status"]), str(content["message"])


def _arms(path: Path, named: Named) -> list[Row]:
    return [
        {
            **{"setting": str(row["setting"]), "arm": _known(row["arm"], named.titles)},
            **{name: int(row[name]) for name in ("seeds", "prompts", "reverted")},
            **{name: float(row[name]) for name in ARM_NUMBERS},
            "gains": [float(gain) for gain in row["gains"]],
        }
        for row in _rows(path)
    ]


def _verdicts(path: Path, named: Named) -> list[Row]:
    return [
        {
            **{"claim": _known(row["claim"], named.claims)},
            **{name: str(row[name]) for name in ("setting", "reading", "verdict")},
            **{name: float(row[name]) for name in CLAIM_NUMBERS},
        }
        for row in _rows(path)
    ]


def _gains(path: Path) -> dict[tuple[str, str], dict[int, float]]:
    """Return the mean gain over the runs of each setting and arm, by finished iterations."""
    rewards: dict[tuple[str, str], dict[tuple[int, int], dict[str, float]]] = {}
    for row in _rows(path):
        runs = rewards.setdefault((row["setting"], row["arm"]), {})
        runs.setdefault((int(row["seed"]), int(row["finished"])), {})[row["prompt_id"]] = float(row["reward"])
    found: dict[tuple[str, str], dict[int, float]] = {}
    for place, runs in rewards.items():
        by_iteration: dict[int, list[float]] = {}
        for (seed, finished), here in runs.items():
            first = runs[seed, 0]
            differences = [here[key] - first[key] for key in here]
            by_iteration.setdefault(finished, []).append(_mean(differences))
        found[place] = {finished: _mean(means) for finished, means in by_iteration.items()}
    return found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _known(name: object, among: Mapping[str, Any]) -> str:
    if name not in among:
        raise KeyError(name)
    return str(name)


def _rows(path: Path) -> list[Row]:
    rows: list[Row] = pq.read_table(path, partitioning=None).to_pylist()
    return rows
