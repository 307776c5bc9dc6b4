"""A run's folder as plain records: settings, metrics, held-out answers, and numbers of each iteration."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml

from sppo_lightning.evaluation.gate import Decision, read_decisions
from sppo_lightning.evaluation.stored import LOGPS, stored_divergences, stored_logps
from sppo_lightning.limits import check_size
from sppo_lightning.redaction import masked
from sppo_lightning.report.prompt_rows import PromptRow, Samples, prompt_rows
from sppo_lightning.report.reading import RunReader
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.rows import stored_rollouts
from sppo_lightning.store.shards import STORED_SCHEMA, by_prompt, read_rollouts
from sppo_lightning.store.tables import read_table
from sppo_lightning.system.environment import read_starts
from sppo_lightning.types import Rollout

T = TypeVar("T")
Curve = tuple[list[int], list[float]]
"""Optimizer steps, and a metric's value at each."""
LONGEST_METRICS = 2**17
"""Characters of a line of metrics; thousands of columns need less."""


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to the held-out prompts after some iterations.

    Args:
        finished: self-play iterations; 0: the initial policy.
        rows: the answers.
        logps: of some of them, summed log-probs under the policy that gave them, by prompt id, nats.
        divergences: how much less likely the policy makes the initial one's answers, by prompt id, nats per token.
    """

    finished: int
    rows: Sequence[Rollout]
    logps: Mapping[str, float]
    divergences: Mapping[str, float]


@dataclass(frozen=True)
class Iteration:
    """An iteration's numbers.

    Args:
        number: of the iteration, from 0.
        complete: whether its data is final.
        dropped: prompts without a pair, by reason.
        counts: of prompts and pairs.
        metrics: what was logged when its data was made.
        diagnostics: what it did to the policy, by metric name.
        samples: its responses, by prompt id.
        rows: its prompts.
        tokens: by phase: sampled in probe and top-up, read in the pairs.
    """

    number: int
    complete: bool
    dropped: Mapping[str, float]
    counts: Mapping[str, float]
    metrics: Mapping[str, float]
    diagnostics: Mapping[str, float]
    samples: Mapping[str, Samples]
    rows: Sequence[PromptRow]
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class RunData:
    """All that the report says of a run, but the texts of its rollouts.

    Args:
        name: of its folder.
        reader: of its folder; holds what is missing.
        config: its settings, secrets masked.
        starts: what each start ran on.
        evaluations: in order.
        iterations: in order.
        curves: each metric that was logged, by name.
        decisions: of the gate, in order.
    """

    name: str
    reader: RunReader
    config: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Evaluation]
    iterations: Sequence[Iteration]
    curves: Mapping[str, Curve]
    decisions: Sequence[Decision]

    @property
    def planned(self) -> int | None:
        """Iterations that the config asks for; ``None``: not known."""
        planned = section(self.config, "data").get("iterations")
        return planned if isinstance(planned, int) else None

    @property
    def finished(self) -> int:
        """Iterations that are trained."""
        found = [one.number + 1 for one in self.iterations if one.diagnostics]
        found += [one.number for one in self.iterations]  # the next one has begun
        found += [one.finished for one in self.evaluations]
        found += [one.finished for one in self.decisions]
        return max(found, default=0)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a config; empty where it has none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def read_run(root: Path) -> RunData:
    """Read a run's folder.

    Raises:
        UserError: if it is no run.
    """
    reader = RunReader(root)
    folder = reader.folder
    config = reader.read(folder.config, partial(_config, folder.config), lacks="The settings are not shown.")
    curves = reader.read(folder.metrics, partial(_curves, folder.metrics), lacks="The curves are not shown.")
    starts = reader.read(
        folder.environment,
        lambda: _some(read_starts(folder.environment)),
        lacks="Versions are not shown.",
        optional=True,  # runs of older versions have none
    )
    decisions = reader.read(
        folder.gate,
        partial(read_decisions, folder),
        lacks="The gate's decisions are not shown.",
        optional=True,
    )
    return RunData(
        name=reader.name,
        reader=reader,
        config=config or {},
        starts=starts or [],
        evaluations=list(_evaluations(reader)),
        iterations=[
            _iteration(reader, folder.iteration(number)) for number in sorted(folder.iteration_numbers())
        ],
        curves=curves or {},
        decisions=decisions or [],
    )


def _config(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_bytes())
    check_size(config)
    if not isinstance(config, dict):
        raise TypeError("no settings")
    found: dict[str, Any] = masked(config)
    return found


def _curves(path: Path) -> dict[str, Curve]:
    """Return all metrics; a line that is being written is left out."""
    found: dict[str, Curve] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(_lines(file)):
            try:
                step = int(row.pop("step"))
                values = {name: float(value) for name, value in row.items() if value and name}
            except (KeyError, TypeError, ValueError):
                continue
            for name, value in values.items():
                steps, curve = found.setdefault(name, ([], []))
                steps.append(step)
                curve.append(value)
    return found


def _lines(file: TextIO) -> Iterator[str]:
    """Yield lines; csv's own limit is the process's, and reading prompts raises it."""
    for line in file:
        if len(line) > LONGEST_METRICS:
            raise ValueError(f"a line of {len(line)} characters")
        yield line


def _evaluations(reader: RunReader) -> Iterator[Evaluation]:
    folder = reader.folder
    numbers = sorted(int(path.name) for path in folder.evaluations.glob("[0-9]*") if path.name.isdecimal())
    for number in numbers:
        place = folder.evaluation(f"{number:03d}")
        path = place / "rollouts.parquet"
        if not path.exists() and any(place.glob("parts-*")):
            reader.note(path, "not there yet: the held-out prompts are being answered.")
            continue
        rows = reader.read(
            path,
            partial(read_rollouts, path),
            lacks=f"Held-out answers after {number} iteration(s) are missing.",
        )
        if rows:
            logps = reader.read(
                place / LOGPS, partial(_logps, place), lacks="Their log-probs are missing.", optional=True
            )
            yield Evaluation(number, rows, logps or {}, stored_divergences(place, "0") if logps else {})


def _logps(place: Path) -> dict[str, float]:
    return _some(stored_logps(place))


def _iteration(reader: RunReader, store: IterationStore) -> Iteration:
    found = reader.read(store.manifest_path, store.read_manifest, lacks="Counts and reasons are missing.")
    manifest: Mapping[str, Any] = found or {}
    complete, pruned = bool(manifest.get("complete")), bool(manifest.get("pruned"))
    if manifest and not complete:
        reader.note(store.folder, "its data is not complete yet.")
    table = reader.read(
        store.difficulty_path,
        store.read_difficulty,
        lacks="Difficulties are missing.",
        optional=not complete,
    )
    pairs = reader.read(
        store.pairs_path,
        store.read_pairs,
        lacks="Chosen and rejected are not marked.",
        optional=not complete,
    )
    diagnostics = reader.read(
        store.diagnostics_path,
        lambda: _some(store.read_diagnostics()),
        lacks="Its KL is missing.",
        optional=True,
    )
    if pruned:
        reader.note(
            store.shards.folder,
            "deleted to save space (data.keep_iterations): of its responses only pairs are there.",
        )
    samples, tokens = _samples(reader, store)
    difficulty, selected = table if table is not None else (None, set())
    dropped = _numbers(manifest.get("dropped"))
    if pairs is not None:
        tokens["reference"] = tokens["training"] = int(pairs.tokens().sum())
    return Iteration(
        number=int(store.folder.name),
        complete=complete,
        dropped=dropped,
        counts=_numbers(manifest.get("counts")),
        metrics=_numbers(manifest.get("metrics")),
        diagnostics=diagnostics or {},
        samples=samples,
        rows=prompt_rows(samples, difficulty, selected, pairs, dropped),
        tokens=tokens,
    )


def _numbers(found: object) -> dict[str, float]:
    return {str(name): float(value) for name, value in found.items()} if isinstance(found, Mapping) else {}


def _samples(reader: RunReader, store: IterationStore) -> tuple[dict[str, Samples], dict[str, int]]:
    """Return the numbers of an iteration's responses, by prompt id, and the tokens sampled by phase."""
    found: dict[str, Samples] = {}
    tokens: dict[str, int] = {}
    for name, phase in (("probe", "probing"), ("topup", "generating")):
        for path in store.shards.paths(name):
            shard = reader.read(
                path, partial(_shard, path, probe=name == "probe"), lacks="Its responses are missing."
            )
            for prompt_id, samples in (shard or {}).items():
                found.setdefault(prompt_id, Samples()).update(samples)
                tokens[phase] = tokens.get(phase, 0) + sum(samples.lengths)
    return found, tokens


def _shard(path: Path, *, probe: bool) -> dict[str, Samples]:
    found: dict[str, Samples] = {}
    for prompt_id, rows in by_prompt(stored_rollouts(read_table(path, STORED_SCHEMA))):
        found.setdefault(prompt_id, Samples()).add(rows, probe=probe)
    return found


def _some(found: T) -> T:
    """Return what a file holds, unless that is nothing: it is damaged then."""
    if not found:
        raise ValueError("nothing can be read")
    return found
