"""The LightningModule: a policy, its frozen reference, a preference loss. Formulas live elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from sppo_lightning.evaluation.metrics import EvaluationBatch, EvaluationMetrics
from sppo_lightning.losses import PairLogps, PreferenceLoss
from sppo_lightning.pair_forward import AutoForward, PairForward
from sppo_lightning.pair_forward.layouts import PairLayout
from sppo_lightning.pair_forward.parity import ParityCheck, probe_pairs
from sppo_lightning.policy import loading as policies
from sppo_lightning.policy.anatomy import unwrapped
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.live import LivePolicy
from sppo_lightning.policy.rounding import check_updates_survive
from sppo_lightning.policy.sharding import load_rest, local
from sppo_lightning.schedules import LearningRateSchedule, Linear
from sppo_lightning.seeding import derive_seed
from sppo_lightning.training.batching import PairBatch
from sppo_lightning.training.hardware import check_hardware, compute_dtype
from sppo_lightning.training.metrics import StepMetrics
from sppo_lightning.training.optimizers import (
    OptimizerFactory,
    build_optimizer,
    clip_gradients,
    clips_unscaled,
    forget,
)
from sppo_lightning.training.reference import check_reference_is_frozen, check_same_logps
from sppo_lightning.types import UserError

MOVED_SAMPLE = 1 << 20  # weights watched through the first optimizer step


class PreferenceModule(pl.LightningModule):
    """Trains a policy on preference pairs against a frozen reference.

    Args:
        policy: which model, and how to hold it.
        loss: preference loss.
        learning_rate: peak rate of each iteration.
        reference: ``previous_iteration``: the policy as it was when the iteration started; ``initial``: the
            policy that the run started from.
        lr_schedule: the rate within an iteration, as a share of the peak; default: linear, warm-up 0.1.
        optimizer: optimizer class; default AdamW, fused unless gradients are scaled and clipped (float16). Its
            own ``lr`` and ``weight_decay`` are not used.
        weight_decay: decoupled decay of matrices (not of norms and biases), per step and unit of rate.
        carry_optimizer: keep the optimizer's state from one iteration to the next, instead of clearing it.
        pair_forward: how log-probs are computed; default: the fastest way that this model can take.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        loss: PreferenceLoss,
        learning_rate: float,
        reference: Literal["previous_iteration", "initial"],
        lr_schedule: LearningRateSchedule | None = None,
        optimizer: OptimizerFactory | None = None,
        weight_decay: float = 0.0,
        carry_optimizer: bool = False,
        pair_forward: PairForward | None = None,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate} must be greater than 0")
        if weight_decay < 0:
            raise ValueError(f"model.weight_decay={weight_decay} must be 0 or more")
        self.pair_forward = pair_forward or AutoForward()
        self.live = LivePolicy(
            policy,
            steps=lambda: self.trainer.global_step,
            release=self.pair_forward.release,
            workspace=lambda: Path(self.trainer.default_root_dir) / ".sampling",
        )
        self.loss = loss
        self.learning_rate = learning_rate
        self.reference = reference
        self.lr_schedule = lr_schedule or Linear()
        self.optimizer_factory = optimizer
        self.weight_decay = weight_decay
        self.carry_optimizer = carry_optimizer
        self.strict_loading = (
            False  # checkpoints hold what was trained; on_load_checkpoint compares the names
        )
        self.policy: nn.Module | None = None
        self.step_metrics = StepMetrics()
        self.evaluation_metrics = EvaluationMetrics()
        self._pair_layout: PairLayout | None = None
        self._reference_model: nn.Module | None = None
        self._optimizers: list[Optimizer] = []  # of spread weights, while those are loaded
        self._watched: tuple[nn.Parameter, Tensor] | None = None

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Check everything that can be checked before weights are loaded."""
        self.check()

    def teardown(self, stage: str) -> None:
        """Leave a policy that generates."""
        if self.policy is not None:
            self.live.withdraw()
            self.pair_forward.release(self.policy)

    def check(self) -> None:
        """Raise :class:`~sppo_lightning.types.UserError` if the Trainer or the policy's settings do not fit."""
        check_hardware(self.trainer)
        self.live.check(compute_dtype=self.compute_dtype, device=self.trainer.strategy.root_device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the trainer's matrix products."""
        return compute_dtype(self.trainer)

    def configure_model(self) -> None:
        """Load the policy, once."""
        if self.policy is not None:
            return
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        self.policy = self.live.load(self.compute_dtype, self.trainer.strategy.root_device, mesh)
        check_updates_survive(self._trainable(), self.learning_rate)

    def pair_layout(self, longest: int) -> PairLayout:
        """Return the layout that micro-batches must have; the first call tries the forward on the policy.

        Args:
            longest: most tokens of prompt and response together that may come.
        """
        assert self.policy is not None
        if self._pair_layout is None:
            check = ParityCheck(
                longest,
                self.trainer.precision_plugin.forward_context,
                self.trainer.strategy.reduce_boolean_decision,
            )
            with policies.without_dropout(self.policy):
                told = self.pair_forward.prepare(self.policy, check)
            rank_zero_info(f"Training forward: {told}.")
            pad = self.live.tokenizer.pad_token_id
            assert isinstance(pad, int)
            self._pair_layout = self.pair_forward.layout(pad)
            if self.live.config.lora is not None:
                check_reference_is_frozen(self.live, self._trial_logps)
        return self._pair_layout

    def _trial_logps(self, model: nn.Module) -> Tensor:
        """Return log-probs of a few random tokens by the training forward."""
        assert self._pair_layout is not None
        vocabulary = unwrapped(model).config.get_text_config().vocab_size
        rows = move_data_to_device(self._pair_layout.rows(*probe_pairs(vocabulary)), self.device)
        with (
            torch.no_grad(),
            self.trainer.precision_plugin.forward_context(),
            policies.without_dropout(model),
        ):
            return torch.cat(self.pair_forward.logps(model, rows))

    def _trainable(self) -> list[nn.Parameter]:
        assert self.policy is not None
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _trained_names(self) -> set[str]:
        """Return the names that trained weights have in a checkpoint."""
        if self.policy is None:
            return set()
        return {f"policy.{name}" for name, p in self.policy.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer; the rate is set at every batch."""
        return build_optimizer(
            self.optimizer_factory,
            self._trainable(),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clips_unscaled=clips_unscaled(self.compute_dtype, clips=bool(self.trainer.gradient_clip_val)),
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer step.

        Lightning refuses fused optimizers under every mixed precision, though only float16's scaler is in the way, and
        clips values in a way that spread weights have not.
        """
        own = self.compute_dtype == torch.bfloat16 or self.live.is_sharded
        if own and gradient_clip_val is not None and gradient_clip_val > 0:
            clip_gradients(self._trainable(), gradient_clip_val, algorithm=gradient_clip_algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        """Keep the optimizer from Lightning while it loads spread weights: it cannot do without a stored state."""
        if self.live.is_sharded:
            strategy = self.trainer.strategy
            self._optimizers, strategy.optimizers = strategy.optimizers, []

    def _give_optimizers_back(self) -> None:
        if self._optimizers:
            self.trainer.strategy.optimizers, self._optimizers = self._optimizers, []

    def on_train_start(self) -> None:
        """Log the initial policy's evaluation, and start to watch some weights."""
        self._give_optimizers_back()
        if self.trainer.global_step == 0:
            datamodule = cast(Any, self.trainer).datamodule
            batches = list(datamodule.val_dataloader())
            for batch in batches:
                self.evaluation_metrics.update(move_data_to_device(batch, self.device))
            if batches:
                self._log_now(self._evaluation_result("val"))
            largest = max(self._trainable(), key=lambda parameter: local(parameter.detach()).numel())
            self._watched = (largest, _sample(largest))

    def on_train_epoch_start(self) -> None:
        """Begin an epoch, and at an iteration's first one log its data."""
        assert self.policy is not None
        self.live.withdraw()
        self.policy.train()
        datamodule = cast(Any, self.trainer).datamodule
        if datamodule.steps_taken == 0:
            self._log_now(datamodule.iteration_metrics)

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Set the learning rate, a function of the step in the iteration."""
        if batch.slot.first_in_step:  # an adapter's dropout draws from torch's own generator
            seed = cast(Any, self.trainer).datamodule.rules.seed
            torch.manual_seed(derive_seed(seed, "step", self.trainer.global_step, self.trainer.global_rank))
        rate = self.learning_rate * self.lr_schedule.factor(batch.slot.step, batch.slot.steps)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Return the micro-batch's share of the step's mean loss, scaled for Lightning's accumulation."""
        assert self.policy is not None
        if batch_idx == 0 and batch.slot.step == 0:
            self._check_reference(batch)
        policy = self.pair_forward.logps(self.policy, batch.rows)
        terms = self.loss(policy, batch.reference)
        self.step_metrics.update(policy, batch.reference, terms, batch.weights)
        if batch.slot.last_in_step:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            result = self.step_metrics.result()
            self.log_dict({**result, "train/lr": rate}, batch_size=1)
            if batch.slot.step == batch.slot.steps - 1:
                self._warn_of_displacement(result)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / batch.slot.step_pairs
        return (terms.loss * batch.weights).sum() * scale

    def on_train_batch_end(self, outputs: Any, batch: PairBatch | None, batch_idx: int) -> None:
        """Free what is not needed any more; after the first optimizer step, log how many weights it moved."""
        if batch is None:  # a resumed run whose iteration has no step left
            return
        if batch.slot.last_in_step:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()  # Lightning would, but only behind the next forward, whose peak they add to
                if batch.slot.step == batch.slot.steps - 1 and not self.carry_optimizer:
                    forget(optimizer)  # before the next iteration samples, rather than when it trains
        if self._watched is not None and batch.slot.last_in_step:
            parameter, before = self._watched
            moved = (_sample(parameter) != before).float().mean()
            if moved == 0 and self.compute_dtype == torch.float16:
                return  # a gradient scaler skips steps until its scale fits
            self._watched = None
            self._log_now({"train/weights_moved": float(moved)})
            if moved == 0:
                rank_zero_warn(
                    "The first optimizer step moved no weight: raise model.learning_rate, or find out why the loss "
                    "does not reach the trained weights."
                )

    def _check_reference(self, batch: PairBatch) -> None:
        """Raise if the policy's log-probs differ from the reference's although the two are the same."""
        assert self.policy is not None
        if self.reference_stays and self.trainer.current_epoch > 0:
            return
        with torch.no_grad(), policies.without_dropout(self.policy):
            policy = self.pair_forward.logps(self.policy, batch.rows)
        check_same_logps(policy, batch.reference, tokens=batch.rows.targets.numel(), dtype=self.compute_dtype)

    def _warn_of_displacement(self, result: dict[str, Tensor]) -> None:
        """Say so if an iteration made the chosen responses less likely too."""
        chosen, rejected = (float(result[f"train/logratios/{side}"]) for side in ("chosen", "rejected"))
        if chosen < 0 and rejected < 0:
            rank_zero_info(
                f"By the iteration's last step chosen responses lost {-chosen:.2f} nat and rejected ones "
                f"{-rejected:.2f}: both became less likely. A larger beta or a smaller learning rate holds them."
            )

    def _log_now(self, metrics: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    # --------------------------------------------------------------- reference

    @property
    def reference_stays(self) -> bool:
        """Whether all iterations have the same reference."""
        return self.reference == "initial"

    @property
    def reads_together(self) -> bool:
        """Whether all processes have to read equally many batches."""
        return self.live.is_sharded

    def reference_fingerprint(self) -> str:
        """Return a digest of the reference that is held."""
        return self.live.fingerprint()

    @contextmanager
    def reference_pass(self) -> Iterator[None]:
        """Hold the reference in memory while the context lasts."""
        assert self.policy is not None
        held = self.live.initial() if self.reference_stays else nullcontext(self.policy)
        with held as model:
            self._reference_model = model
            try:
                with policies.without_dropout(model):
                    yield
            finally:
                self._reference_model = None

    def reference_logps(self, batch: PairBatch) -> PairLogps:
        """Return the reference's log-probs through the training forward, ``[B]`` each, float64, on the CPU."""
        assert self._reference_model is not None
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            logps = self.pair_forward.logps(
                self._reference_model, move_data_to_device(batch.rows, self.device)
            )
        return PairLogps(logps.chosen.cpu(), logps.rejected.cpu())

    # -------------------------------------------------------------- evaluation

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Aggregate stored, scored answers."""
        self.evaluation_metrics.update(batch)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Aggregate stored, scored answers."""
        self.evaluation_metrics.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the evaluation."""
        self.log_dict(self._evaluation_result("val"), rank_zero_only=False)

    def on_test_epoch_end(self) -> None:
        """Log the evaluation."""
        self.log_dict(self._evaluation_result("test"), rank_zero_only=False)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return stored answers."""
        return batch

    def _evaluation_result(self, prefix: str) -> dict[str, float]:
        result = self.evaluation_metrics.result(prefix)
        if result[f"{prefix}/failed/share"] > 0:
            rank_zero_warn(
                f"{result[f'{prefix}/failed/share']:.1%} of the {prefix} answers have a non-finite reward."
            )
        return result

    # ------------------------------------------------------------- checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trained weights only: what checkpoints hold, and what is asked of them."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        kept = {f"{prefix}{name}" for name in self._trained_names()}
        for name in [name for name in state if name not in kept]:
            del state[name]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep no optimizer state that has been forgotten."""
        if cast(Any, self.trainer).datamodule.iteration_is_trained and not self.carry_optimizer:
            for state in checkpoint.get("optimizer_states", ()):
                state["state"] = {}  # a paged optimizer's is emptied only
            for optimizer in self.trainer.optimizers:
                forget(optimizer)  # of spread weights torch has just made one, to have something to save

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another policy; load the optimizer's state where weights are spread."""
        self._give_optimizers_back()
        expected = self._trained_names()
        found = set(checkpoint.get("state_dict", ()))
        if self.live.is_sharded:
            assert self.trainer.ckpt_path is not None
            path, fitting = Path(self.trainer.ckpt_path), self.trainer.state.fn == "fit"
            found = load_rest(path, self, self.trainer.optimizers if fitting else [])
        if found != expected:
            some = sorted(expected ^ found)[0]
            raise UserError(
                f"the checkpoint does not fit model.policy ({len(expected ^ found)} weights differ, e.g. {some}): "
                "use the model.policy settings that it was trained with"
            )


def _sample(parameter: nn.Parameter) -> Tensor:
    """Return a copy of some of the weights that this process holds."""
    return local(parameter.detach()).flatten()[:MOVED_SAMPLE].clone()
