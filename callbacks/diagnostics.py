"""What an iteration did to the policy, in numbers: displacement, divergence, length, diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.callbacks.base import SelfPlayCallback
from sppo_lightning.datamodule import SelfPlayDataModule, self_play_data
from sppo_lightning.evaluation.divergence import read_answers
from sppo_lightning.evaluation.gate import read_decisions
from sppo_lightning.evaluation.measures import paired_difference
from sppo_lightning.evaluation.results import held_out_results
from sppo_lightning.evaluation.stored import load_evaluation
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.system.durable import with_checksum, write_atomically
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.types import Rollout

LOG_RATIOS = ("logratios/chosen", "logratios/rejected", "logratios/chosen_fell")
LESS_DIVERSE = 0.8  # of the initial policy's distinct bigrams


class LearningDiagnostics(SelfPlayCallback):
    """Logs at an iteration's end what it did to the policy, and stores it in ``iterations/NNN/diagnostics.json``.

    - ``learning/logratios/chosen`` and ``…/rejected``: mean log-ratios to the reference over the iteration's steps,
      nat a response, each pair as its step found it; ``…/chosen_fell``: share of pairs whose chosen response had
      become less likely.
    - ``val/kl/initial`` and ``val/kl/iteration_start``: how much less likely the policy makes the greedy held-out
      answers of the initial policy, and of the policy that the iteration started from, nat a token, over 32 prompts:
      an estimate of the KL divergence from that policy.
    - ``val/response_length/growth``: mean tokens of a held-out answer over the initial policy's.
    - ``val/response_unfinished/share``: held-out answers cut by the length limit.
    - ``val/diversity/distinct_2``: distinct bigrams over all bigrams of the held-out answers.

    The last four need held-out prompts. A reward that rises while win rate or diversity falls is named as what it may
    be: reward hacking.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._pairs = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over the iteration so far."""
        return {"sums": dict(self._sums), "pairs": self._pairs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume inside an iteration."""
        self._sums, self._pairs = dict(state_dict["sums"]), float(state_dict["pairs"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the initial policy's held-out answers, to compare later ones with."""
        data = self_play_data(trainer)
        if trainer.global_step == 0 and data.prompt_sets.named("eval_prompts"):
            _read(trainer, data, 0, {})

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch | None,
        batch_idx: int,
    ) -> None:
        """Add a step's means."""
        if batch is None or not batch.slot.last_in_step:
            return
        if batch.slot.step == 0:
            self._sums, self._pairs = {}, 0.0
        self._pairs += batch.slot.step_pairs
        for name in LOG_RATIOS:
            value = trainer.callback_metrics.get(f"train/{name}")
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + float(value) * batch.slot.step_pairs

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and store, once the policy's held-out answers are there."""
        data = self_play_data(trainer)
        if trainer.state.fn != "fit" or not data.iteration_is_trained:
            return
        metrics = self._training() | self._held_out(trainer, data, data.current_iteration)
        self._store(trainer, data, data.current_iteration, metrics)

    def on_iteration_end(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> None:
        """Log and store, where there are no held-out prompts."""
        if not data.prompt_sets.named("eval_prompts"):
            self._store(trainer, data, iteration, self._training())

    def _training(self) -> dict[str, float]:
        return {f"learning/{name}": total / self._pairs for name, total in self._sums.items()}

    def _held_out(self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int) -> dict[str, float]:
        folder, finished = data.folder, iteration + 1
        start = next(
            (item.policy for item in reversed(read_decisions(folder)) if item.finished == iteration),
            iteration,
        )
        metrics = _read(trainer, data, finished, {"initial": 0, "iteration_start": start})
        initial, now = (load_evaluation(folder.evaluation(f"{number:03d}")) for number in (0, finished))
        if initial is None or now is None:
            return metrics
        before, after = _mean_length(initial), _mean_length(now)
        if before > 0:
            metrics["val/response_length/growth"] = after / before
        answered = [row for row in now if row.finish_reason != "failed"]
        if answered:
            cut = sum(row.finish_reason == "length" for row in answered)
            metrics["val/response_unfinished/share"] = cut / len(answered)
        metrics["val/diversity/distinct_2"] = distinct_bigrams(now)
        _name_reward_hacking(
            folder, start, finished, distinct_bigrams(initial), metrics["val/diversity/distinct_2"]
        )
        return metrics

    def _store(
        self, trainer: pl.Trainer, data: SelfPlayDataModule, iteration: int, metrics: dict[str, float]
    ) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if trainer.is_global_zero:
            write_atomically(data.folder.iteration(iteration).diagnostics_path, with_checksum(metrics))


def _read(
    trainer: pl.Trainer, data: SelfPlayDataModule, finished: int, earlier: dict[str, int]
) -> dict[str, float]:
    """Let the policy read its own and earlier held-out answers; return ``val/kl/…``."""
    folder = data.folder
    places = {number: folder.evaluation(f"{number:03d}") for number in {finished, *earlier.values()}}
    answers = {number: load_evaluation(place) for number, place in places.items()}
    now = answers[finished]
    if now is None:
        return {}
    known = {
        str(number): (rows, places[number])
        for number in dict.fromkeys(earlier.values())
        if (rows := answers[number]) is not None
    }
    found = read_answers(data.answer_reader(), now, known, places[finished], writes=trainer.is_global_zero)
    return {f"val/kl/{name}": found[str(number)] for name, number in earlier.items() if str(number) in found}


def _mean_length(rows: Sequence[Rollout]) -> float:
    lengths = [row.length for row in rows if row.finish_reason != "failed"]
    return sum(lengths) / len(lengths) if lengths else math.nan


def distinct_bigrams(rows: Sequence[Rollout]) -> float:
    """Return the distinct bigrams of tokens over all bigrams of some answers; NaN without any."""
    bigrams = [pair for row in rows for pair in zip(row.token_ids, row.token_ids[1:], strict=False)]
    return len(set(bigrams)) / len(bigrams) if bigrams else math.nan


def _name_reward_hacking(folder: RunFolder, start: int, finished: int, before: float, after: float) -> None:
    """Say so where the reward rose since the policy that the iteration started from, and what it stands for fell."""
    results = {item.finished: item for item in held_out_results(folder, finished)}
    rows, earlier = (load_evaluation(folder.evaluation(f"{number:03d}")) for number in (finished, start))
    now, last = results.get(finished), results.get(start)
    if rows is None or earlier is None or now is None or last is None:
        return
    rise = paired_difference(rows, earlier)
    if not rise.mean > rise.stderr:  # one that may be chance, or a fall
        return
    signs = []
    if start > 0 and now.win_rate < last.win_rate:
        signs.append(
            f"the win rate against the initial policy fell from {last.win_rate:.1%} to {now.win_rate:.1%}"
        )
    if after < LESS_DIVERSE * before:
        signs.append(
            f"held-out answers became less diverse (distinct bigrams from {before:.2f} to {after:.2f})"
        )
    if signs:
        rank_zero_info(
            f"The held-out reward rose by {rise.mean:.3f} ± {rise.stderr:.3f} to {now.reward:.3f}, but "
            f"{' and '.join(signs)}: this may be reward hacking. Read samples.md."
        )
