"""Rules of a user's own, by class path: several pairs of a prompt, and a state from iteration to iteration."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.runs import cli_arguments
from support.same_run import differences, rows
from torch import Tensor

from sppo_lightning.__main__ import main
from sppo_lightning.difficulty import StatisticsTable
from sppo_lightning.pairing import Choice, Pairing, Responses
from sppo_lightning.selection import Curriculum, Selection
from sppo_lightning.store.iterations import IterationStore
from sppo_lightning.store.shards import read_rollouts
from sppo_lightning.types import Rollout

KEPT = 6  # prompts that the selection keeps
STEP = 4  # pairs


class BestAgainstCut(Pairing):
    """The best response against each one that its length limit cut, the longest first, and twice against the last."""

    def __init__(self, most_pairs: int = 1) -> None:
        self.most_pairs = most_pairs

    def pairs(self, responses: Responses, generator: torch.Generator) -> list[Choice]:
        best = int(responses.rewards.argmax())
        cut = [row for row, reason in enumerate(responses.finish_reasons) if reason == "length"]
        cut.sort(key=lambda row: (-int(responses.lengths[row]), responses.sample_indices[row]))
        choices = [Choice(best, row) for row in cut if row != best]
        return [*choices, *choices[-1:]]


class LeastOften(Selection):
    """Prompts that were selected least often; of those, the ones with the highest reward a token in the probe."""

    requires = ("responses", "history")

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._times: Counter[str] = Counter()

    def select(self, table: StatisticsTable, *, iteration: int, seed: int) -> Tensor:
        responses = table.responses
        density = responses.rewards / responses.lengths
        best = torch.full((len(table),), -math.inf, dtype=torch.float64)
        best.scatter_reduce_(0, responses.rows, density, "amax")
        times = torch.tensor([float(self._times[prompt_id]) for prompt_id in table.prompt_ids])
        before = torch.zeros(len(table), dtype=torch.float64)
        for earlier in table.history:
            before += earlier["selected"]
        assert times.tolist() == before.tolist(), "what the rule knows is not what happened"
        order = sorted(range(len(table)), key=lambda row: (float(times[row]), -float(best[row])))
        mask = torch.zeros(len(table), dtype=torch.bool)
        mask[order[: self.keep]] = True
        self._times.update(table.prompt_ids[row] for row in order[: self.keep])
        return mask

    def size(self, total: int, *, iteration: int) -> int:
        return min(self.keep, total)

    def state_dict(self) -> dict[str, Any]:
        return {"times": self._times}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._times = Counter(state["times"])


class Turning(Curriculum):
    """Pairs as they are stored, begun one later each time that it is asked."""

    def __init__(self) -> None:
        self._asked = 0

    def order(self, difficulty: Tensor, keys: Tensor) -> Tensor:
        self._asked += 1
        assert len(set(keys.tolist())) == len(keys), "pairs of one prompt have one key"
        return torch.arange(len(keys)).roll(self._asked)

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._asked = state["asked"]


class KilledError(RuntimeError):
    """Stands for whatever ends a run."""


class StopAt(pl.Callback):
    """Ends the run at the start of an optimizer step."""

    step = 10**9

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == StopAt.step:
            raise KilledError


CALLBACKS = [
    {"class_path": "sppo_lightning.callbacks.DifficultyReestimation"},
    {"class_path": "sppo_lightning.callbacks.RunCheckpoint", "init_args": {"every_n_minutes": 1e-9}},
    {"class_path": f"{__name__}.StopAt"},
]


class OwnRules:
    """Runs with these rules, in one folder in turn, so that no path in a file tells them apart."""

    def __init__(self, policy: Path, prompts: Path, folder: Path) -> None:
        self.root = folder / "run"
        self.arguments = cli_arguments(
            policy,
            prompts,
            self.root,
            data__iterations=3,
            data__epochs_per_iteration=2,
            data__samples_per_prompt=4,
            data__pairs_per_step=STEP,
            data__pairing=f"{__name__}.BestAgainstCut",
            data__pairing__most_pairs=4,
            data__selection=f"{__name__}.LeastOften",
            data__selection__fraction=None,
            data__selection__keep=KEPT,
            data__curriculum=f"{__name__}.Turning",
            trainer__callbacks=json.dumps(CALLBACKS),
        )
        self.fit()
        self.whole = folder / "whole"
        self.root.rename(self.whole)

    def fit(self) -> None:
        main(["fit", *self.arguments])

    def manifest(self, iteration: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.whole / f"iterations/{iteration:03d}/manifest.json").read_text()
        )
        return found

    def responses(self, iteration: int, name: str) -> dict[str, list[Rollout]]:
        """Return the responses to each prompt, by sample index."""
        found: dict[str, list[Rollout]] = {}
        for path in sorted((self.whole / f"iterations/{iteration:03d}/rollouts").glob(f"{name}-*.parquet")):
            for row in read_rollouts(path):
                found.setdefault(row.prompt_id, []).append(row)
        return {key: sorted(group, key=lambda row: row.sample_index) for key, group in found.items()}

    def table(self, iteration: int, name: str) -> list[dict[str, Any]]:
        return rows(self.whole, f"iterations/{iteration:03d}/{name}.parquet").popitem()[1]


@pytest.fixture(scope="module")
def runs(tiny_policy: Path, counting_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> OwnRules:
    """An uninterrupted run."""
    return OwnRules(tiny_policy, counting_prompts / "train.jsonl", tmp_path_factory.mktemp("own"))


def expected_pairs(responses: Sequence[Rollout]) -> list[tuple[int, int]]:
    """Sample indices of the pairs that :class:`BestAgainstCut` is to give."""
    best = max(responses, key=lambda row: (row.reward or 0.0, -row.sample_index))
    cut = [row for row in responses if row.finish_reason == "length" and row is not best]
    cut = [row for row in cut if row.reward != best.reward and row.response != best.response]
    cut.sort(key=lambda row: (-row.length, row.sample_index))
    return [(best.sample_index, row.sample_index) for row in cut]


@pytest.mark.parametrize("iteration", range(3))
def test_a_pairing_gives_several_pairs_of_a_prompt(runs: OwnRules, iteration: int) -> None:
    """Its last choice comes twice: that is one pair, and a choice that is counted as dropped."""
    found: dict[str, list[tuple[int, int]]] = {}
    responses = runs.responses(iteration, "*")
    for pair in runs.table(iteration, "pairs"):
        indices = pair["chosen_sample_index"], pair["rejected_sample_index"]
        chosen, rejected = (responses[pair["prompt_id"]][index] for index in indices)
        assert (pair["chosen"], pair["rejected"]) == (chosen.response, rejected.response)
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (chosen.reward, rejected.reward)
        assert math.isfinite(pair["reference_chosen_logp"])
        assert pair["chosen_win_probability"] is None
        found.setdefault(pair["prompt_id"], []).append(indices)
    selected = [row["prompt_id"] for row in runs.table(iteration, "difficulty") if row["selected"]]
    expected = {key: expected_pairs(responses[key]) for key in selected}
    assert found == {key: pairs for key, pairs in expected.items() if pairs}
    manifest = runs.manifest(iteration)
    pairs = sum(map(len, found.values()))
    assert manifest["counts"]["pairs"] == pairs > len(found) == manifest["counts"]["paired_prompts"]
    assert manifest["counts"]["prompts"] == 14 == len(found) + sum(manifest["dropped"].values())
    assert 0 < manifest["pairs_dropped"]["repeated_pair"] <= len(found)
    assert manifest["metrics"]["iteration/pairs/prompts"] == len(found)
    assert manifest["metrics"]["iteration/pairs/count"] == pairs


def test_all_pairs_are_trained_on(runs: OwnRules) -> None:
    steps = sum(2 * -(-runs.manifest(number)["counts"]["pairs"] // STEP) for number in range(3))
    with (runs.whole / "metrics.csv").open(newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["train/loss"]]) == steps


def test_a_selection_sees_responses_and_history_and_keeps_what_it_knows(runs: OwnRules) -> None:
    times: Counter[str] = Counter()
    for iteration in range(3):
        probe = runs.responses(iteration, "probe")
        assert {len(group) for group in probe.values()} == {2}
        density = {key: max((row.reward or 0) / row.length for row in group) for key, group in probe.items()}
        wanted = set(sorted(probe, key=lambda key: (times[key], -density[key]))[:KEPT])
        assert wanted == {row["prompt_id"] for row in runs.table(iteration, "difficulty") if row["selected"]}
        times.update(wanted)
        assert runs.manifest(iteration)["rule_states"]["selection"] == {"times": times}
    assert len(times) > 2 * KEPT  # the least often selected came first


def kill_at_step(runs: OwnRules, patch: pytest.MonkeyPatch, fraction: float) -> None:
    """End the run in iteration 1, behind a share of its steps."""
    first, second = (2 * -(-runs.manifest(number)["counts"]["pairs"] // STEP) for number in (0, 1))
    patch.setattr(StopAt, "step", first + int(fraction * second))


def kill_at(name: str) -> Callable[[OwnRules, pytest.MonkeyPatch], None]:
    """End the run where iteration 1 writes ``name``."""

    def arrange(runs: OwnRules, patch: pytest.MonkeyPatch) -> None:
        original = getattr(IterationStore, name)

        def write(store: IterationStore, *content: Any) -> None:
            if store.folder.name == "001":
                raise KilledError
            original(store, *content)

        patch.setattr(IterationStore, name, write)

    return arrange


@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(
            lambda runs, patch: kill_at_step(runs, patch, 0),
            id="between two iterations",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda runs, patch: kill_at_step(runs, patch, 0.7), id="in an iteration's second epoch"),
        pytest.param(kill_at("write_difficulty"), id="once the rule has selected", marks=pytest.mark.slow),
        pytest.param(kill_at("write_pairs"), id="once all is sampled and paired"),
    ],
)
def test_a_run_that_was_killed_selects_and_trains_the_same(
    runs: OwnRules, arrange: Callable[[OwnRules, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(runs.root, ignore_errors=True)
    with monkeypatch.context() as patch:
        arrange(runs, patch)
        with pytest.raises(KilledError):
            runs.fit()
    runs.fit()
    assert differences(runs.whole, runs.root) == []


def test_too_few_pairs_are_counted_in_prompts_and_in_pairs(
    runs: OwnRules, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four pairs of each of six prompts would be enough, but the rule does not find as many."""
    counts, dropped = runs.manifest(0)["counts"], runs.manifest(0)["dropped"]
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                *runs.arguments,
                f"--data.pairs_per_step={4 * KEPT}",
                f"--trainer.default_root_dir={tmp_path / 'run'}",
            ]
        )
    chosen = counts["pairs"] + sum(runs.manifest(0)["pairs_dropped"].values())
    message = (
        f"iteration 0 has {counts['pairs']} pairs, fewer than one optimizer step of data.pairs_per_step=24; of 14 "
        f"prompts were dropped: {dropped['not_selected']} not_selected; of {chosen} pairs that were chosen were "
    )
    assert message in capsys.readouterr().err
