"""The LightningDataModule: the loop's settings, their checks, and the dataloaders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from sppo_lightning.batching import PairBatch, PairDataset, accumulation_steps
from sppo_lightning.collect import Collector
from sppo_lightning.difficulty import Reestimation, StatisticsTable
from sppo_lightning.evaluation import EvaluationLoader, HeldOut, write_predictions
from sppo_lightning.generation import Generator
from sppo_lightning.iteration import IterationBuilder
from sppo_lightning.iteration_state import IterationState
from sppo_lightning.layouts import PairLayout
from sppo_lightning.module import PreferenceModule
from sppo_lightning.pairing import BestWorst, Pairing
from sppo_lightning.pairs import PairTable
from sppo_lightning.preflight import (
    check_comparative,
    check_context,
    check_memory,
    check_sizes,
    check_trainer,
    read_stage_prompts,
    shrink,
    workload_of,
)
from sppo_lightning.prompt_sets import PromptSets
from sppo_lightning.prompt_table import EncodedPrompts
from sppo_lightning.rewards import Reward
from sppo_lightning.rollouts import RunFolder, describe
from sppo_lightning.rules import IterationRules
from sppo_lightning.scoring import UnfinishedRule
from sppo_lightning.selection import AllPairs, AllPrompts, Curriculum, RandomOrder, Schedule, Selection
from sppo_lightning.trainer import TrainerRanks, fit_position, is_dev_run
from sppo_lightning.types import PhaseObserver, UserError

Sources = str | list[str]


class SelfPlayDataModule(pl.LightningDataModule):
    """Samples, scores, selects and pairs, once an iteration, inside ``train_dataloader``.

    Args:
        prompts: training prompts: file(s), glob, folder or hub dataset; jsonl, json, csv or parquet.
        iterations: self-play iterations.
        samples_per_prompt: responses that a pair is chosen from, at least 2.
        generator: answers prompts.
        reward: scores answers.
        selection: which prompts to train on, given their difficulty.
        pairs_per_step: pairs of one optimizer step, all devices together.
        batch_size: pairs of one micro-batch on one device.
        epochs_per_iteration: passes over an iteration's pairs.
        probe_samples: responses that a difficulty is estimated from; ``None``: ``samples_per_prompt``.
        schedule: candidate prompts of each iteration; default ``AllPrompts``.
        curriculum: order of the pairs; default ``RandomOrder``.
        pairing: chosen and rejected response; default ``BestWorst``.
        pair_selection: which pairs to keep, given their statistics; default ``AllPairs``.
        eval_prompts: held-out prompts, evaluated before the first and after each iteration.
        test_prompts: held-out prompts of ``test``.
        predict_prompts: prompts of ``predict``.
        max_prompt_tokens: longer prompts are dropped and counted, never truncated.
        prompts_per_shard: prompts of one rollout file, the unit of work and of recovery.
        system_prompt: opens the conversations that have no system message of their own; the policy sees it, the
            reward does not.
        unfinished: what becomes of a response that its length limit cut: ``keep`` it as it is, ``drop`` it, or
            ``penalise`` it. Held-out answers are always kept.
        unfinished_penalty: taken off the reward of such a response; with ``penalise`` only.
        max_failed_share: share of a phase's responses that may fail (no finite reward, no answer from a server),
            in [0, 1]; more is an error.
        memory_check: what becomes of a run that is estimated to need more memory than its device has.
        seed: decides every random choice of the loop; linked to ``seed_everything`` by the CLI.
    """

    def __init__(
        self,
        prompts: Sources,
        iterations: int,
        samples_per_prompt: int,
        generator: Generator,
        reward: Reward,
        selection: Selection,
        pairs_per_step: int,
        batch_size: int,
        epochs_per_iteration: int = 1,
        probe_samples: int | None = None,
        schedule: Schedule | None = None,
        curriculum: Curriculum | None = None,
        pairing: Pairing | None = None,
        pair_selection: Selection | None = None,
        eval_prompts: Sources | None = None,
        test_prompts: Sources | None = None,
        predict_prompts: Sources | None = None,
        max_prompt_tokens: int = 1024,
        prompts_per_shard: int = 32,
        system_prompt: str | None = None,
        unfinished: Literal["keep", "drop", "penalise"] = "keep",
        unfinished_penalty: float | None = None,
        max_failed_share: float = 0.5,
        memory_check: Literal["refuse", "warn"] = "refuse",
        seed: int = 42,
    ) -> None:
        super().__init__()
        sizes = {
            "epochs_per_iteration": epochs_per_iteration,
            "max_prompt_tokens": max_prompt_tokens,
            "prompts_per_shard": prompts_per_shard,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if not 0 <= max_failed_share <= 1:
            raise ValueError(f"data.max_failed_share={max_failed_share} must lie in [0, 1]")
        self.unfinished = UnfinishedRule(unfinished, unfinished_penalty)
        self.max_failed_share = max_failed_share
        self.memory_check = memory_check
        self.rules = IterationRules(
            iterations=iterations,
            samples_per_prompt=samples_per_prompt,
            probe_samples=samples_per_prompt if probe_samples is None else probe_samples,
            pairs_per_step=pairs_per_step,
            batch_size=batch_size,
            schedule=schedule or AllPrompts(),
            selection=selection,
            pairing=pairing or BestWorst(),
            pair_selection=pair_selection or AllPairs(),
            seed=seed,
        )
        self.curriculum = curriculum or RandomOrder()
        self.generator = generator
        self.reward = reward
        self._made_with = {
            "generator": describe(generator),
            "reward": describe(reward),
            "system_prompt": system_prompt,
        }
        self.epochs_per_iteration = epochs_per_iteration
        self.prompts_per_shard = prompts_per_shard
        self.prompt_sets = PromptSets(
            {
                "prompts": prompts,
                "eval_prompts": eval_prompts,
                "test_prompts": test_prompts,
                "predict_prompts": predict_prompts,
            },
            max_prompt_tokens,
            system_prompt,
        )
        self.observers: list[PhaseObserver] = []
        self._state = IterationState()

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Read and check the prompts, before any model loads."""
        assert self.trainer is not None
        self.ranks = TrainerRanks(self.trainer)
        self.folder = RunFolder(Path(self.trainer.default_root_dir))
        keys = read_stage_prompts(self.prompt_sets, stage)
        if stage == "fit":
            if is_dev_run(self.trainer):
                self.rules = shrink(self.prompt_sets, self.rules)
            else:
                check_trainer(self.trainer, epochs=self.rules.iterations * self.epochs_per_iteration)
            self.trainer.accumulate_grad_batches = accumulation_steps(
                pairs_per_step=self.rules.pairs_per_step,
                batch_size=self.rules.batch_size,
                world_size=self.trainer.world_size,
            )
        self.generator.check()
        if stage == "fit":
            check_comparative(self.reward, self.rules, self.curriculum)
            if not self.generator.reproducible:
                rank_zero_info(
                    f"data.generator {type(self.generator).__name__}: responses depend on more than their seeds. A run "
                    "that is started again keeps its finished shards, and samples the others anew."
                )
        if stage != "predict":
            self.reward.check()
            for key in keys:
                self.reward.check_prompts(self.prompt_sets.read(key))
        self.module.check()
        for key in keys:
            check_context(self._encoded(key), self.generator, self.module.live.model_config, key=key)
        if stage == "fit":
            check_sizes(self.rules, self._encoded("prompts").ids)
            longest = {key: max(len(prompt.token_ids) for prompt in self._encoded(key)) for key in keys}
            check_memory(
                workload_of(
                    self.module,
                    self.rules,
                    self.generator,
                    self.reward,
                    compute_dtype=self.module.compute_dtype,
                    longest_prompt=max(longest.values()),
                    longest_trained_prompt=longest["prompts"],
                    device=self.trainer.strategy.root_device,
                    processes=self.trainer.world_size,
                    spread=isinstance(self.trainer.strategy, ModelParallelStrategy),
                ),
                self.ranks,
                otherwise=self.memory_check,
            )
        if is_dev_run(self.trainer):
            own = tempfile.mkdtemp(prefix="sppo-dev-") if self.ranks.rank == 0 else ""
            self.folder = RunFolder(Path(self.ranks.same(own)))

    def teardown(self, stage: str) -> None:
        """Remove what a dev run left."""
        assert self.trainer is not None
        if is_dev_run(self.trainer) and self.ranks.rank == 0:
            shutil.rmtree(self.folder.root, ignore_errors=True)

    @property
    def module(self) -> PreferenceModule:
        """The module that is being trained."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, PreferenceModule)
        return module

    def _encoded(self, key: str) -> EncodedPrompts:
        return self.prompt_sets.encode(key, self.module.live.tokenizer)

    def _collector(self) -> Collector:
        return Collector(
            generator=self.generator,
            reward=self.reward,
            policy=self.module.live,
            device=self.module.device,
            seed=self.rules.seed,
            prompts_per_shard=self.prompts_per_shard,
            ranks=self.ranks,
            observers=self.observers,
            unfinished=self.unfinished,
            max_failed_share=self.max_failed_share,
        )

    # ---------------------------------------------------------------- training

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Ensure the current iteration's data, and return its pairs in training order.

        After a resume at an epoch's end Lightning asks for the finished epoch once more, with the new
        weights: a finished iteration returns its stored pairs.
        """
        assert self.trainer is not None
        position = fit_position(self.trainer)
        if position.inside:
            raise UserError(
                "the checkpoint was saved in the middle of an epoch, where it cannot be continued: use the run's "
                "own checkpoints/last.ckpt"
            )
        iteration, epoch_in_iteration = divmod(position.epoch, self.epochs_per_iteration)
        if iteration != self._state.current and not position.epoch_is_over:
            if iteration == 0 and self.prompt_sets.named("eval_prompts"):
                self._held_out("eval_prompts").measure(0)
            fingerprint = self.module.live.fingerprint()
            self._state.enter(
                iteration, folder=self.folder, policy_fingerprint=fingerprint, builder=self._builder
            )
        else:
            self._state.reopen(iteration, folder=self.folder)
        sampler = self._state.steps(
            iteration,
            folder=self.folder,
            rules=self.rules,
            curriculum=self.curriculum,
            ranks=self.ranks,
            epoch=epoch_in_iteration,
            epochs=self.epochs_per_iteration,
        )
        dataset = PairDataset(self.pairs, self._pair_layout)
        return DataLoader(
            dataset, sampler=sampler, batch_size=None, pin_memory=self.module.device.type == "cuda"
        )

    @property
    def _pair_layout(self) -> PairLayout:
        return self.module.pair_layout(self.prompt_sets.max_tokens + self.generator.max_new_tokens)

    def _builder(self) -> IterationBuilder:
        return IterationBuilder(
            rules=self.rules,
            prompts=self._encoded("prompts").by_id(),
            too_long=self.prompt_sets.too_long("prompts"),
            collector=self._collector(),
            made_with={**self._made_with, "unfinished": vars(self.unfinished)},
            reference=self.module,
            layout=self._pair_layout,
        )

    # -------------------------------------------------------------- iterations

    @property
    def current_iteration(self) -> int:
        """The iteration whose data was made last; -1 before the first."""
        return self._state.current

    @property
    def pairs(self) -> PairTable:
        """The current iteration's pairs, in pair order."""
        return self._state.pairs

    @property
    def reestimation(self) -> Reestimation | None:
        """What ``DifficultyReestimation`` found due when the next iteration starts."""
        return self._state.due

    @reestimation.setter
    def reestimation(self, due: Reestimation | None) -> None:
        self._state.due = due

    def difficulty_after(self, iteration: int) -> StatisticsTable:
        """Return the difficulties known once ``iteration``, the one made last, has all its rollouts."""
        return self._state.difficulty_after(iteration, folder=self.folder)

    @property
    def iteration_ends(self) -> bool:
        """Whether the trainer stands at the end of an iteration's last epoch."""
        assert self.trainer is not None
        position = fit_position(self.trainer)
        return position.epoch_is_over and position.trained % self.epochs_per_iteration == 0

    @property
    def iteration_metrics(self) -> dict[str, float]:
        """What the loggers get at the current iteration's start."""
        return self._state.metrics(self.folder)

    # -------------------------------------------------------------- evaluation

    def _held_out(self, key: str) -> HeldOut:
        prefix = "" if key == "eval_prompts" else f"{key.removesuffix('_prompts')}-"
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        return HeldOut(
            folder=self.folder,
            prefix=prefix,
            prompts=self._encoded(key),
            collector=self._collector(),
            policy=self.module.live,
            made_with=self._made_with,
            replace_others=fitting,
        )

    def _evaluation_loader(self, key: str) -> EvaluationLoader:
        held_out = self._held_out(key)
        return EvaluationLoader(
            lambda: held_out.measure(self._finished_iterations()), len(held_out.prompts), self.ranks
        )

    def val_dataloader(self) -> Any:
        """Return the held-out evaluation of the policy as it is when the loader is read."""
        return self._evaluation_loader("eval_prompts") if self.prompt_sets.named("eval_prompts") else []

    def test_dataloader(self) -> Any:
        """Return the evaluation on ``test_prompts``."""
        return self._evaluation_loader("test_prompts")

    def _finished_iterations(self) -> int:
        assert self.trainer is not None
        if self.trainer.state.fn != "fit":
            return self._state.finished
        position = fit_position(self.trainer)
        return (position.trained + position.inside) // self.epochs_per_iteration

    def predict_dataloader(self) -> DataLoader[Any]:
        """Answer ``predict_prompts`` greedily into ``predictions.jsonl``."""
        lines = write_predictions(self.folder.root, self._encoded("predict_prompts"), self._collector())
        rank_zero_info(f"{len(lines)} answers written to {self.folder.root / 'predictions.jsonl'}")
        return DataLoader(cast(Any, lines), batch_size=None)

    # ------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the store."""
        assert self.trainer is not None
        finished = fit_position(self.trainer).trained // self.epochs_per_iteration
        return self._state.state_dict(finished=finished)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stood."""
        self._state.load_state_dict(state_dict)


def self_play_data(trainer: pl.Trainer) -> SelfPlayDataModule:
    """Return a Trainer's data module, for callbacks of the loop.

    Raises:
        UserError: if it is none of this package's.
    """
    datamodule = cast(Any, trainer).datamodule
    if not isinstance(datamodule, SelfPlayDataModule):
        raise UserError(f"the loop's callbacks need a SelfPlayDataModule, got {type(datamodule).__name__}")
    return datamodule
