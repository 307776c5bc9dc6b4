"""The arms of ``train_step.py`` that are TRL's ``DPOTrainer``, version 1.16.

TRL is no dependency of the project: ``pip install -c requirements/pins.txt trl==1.16.0``. Only the processes of these
arms import it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import workload
from arms import Rounds
from gate import FirstStep
from workload import TokenPair

VERSION = "1.16.0"


@dataclass(frozen=True)
class TRLSetting:
    """What one of TRL's arms sets beside what the run needs."""

    options: dict[str, Any] = field(default_factory=dict)
    follows_checkpointing: bool = False  # else gradient checkpointing stays TRL's default, on


BEST = {
    "precompute_ref_log_probs": True,
    "optim": "adamw_torch_fused",
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,  # looks at the loss on the host at every step
    "max_grad_norm": 0.0,
}
SETTINGS = {
    "trl-best": TRLSetting(BEST, follows_checkpointing=True),
    "trl-compile": TRLSetting({**BEST, "torch_compile": True}, follows_checkpointing=True),
    "trl-default": TRLSetting(),
}


def token_ids_trainer() -> type:
    """Return TRL's trainer on token ids: nothing is tokenised, no end token is added, no order is drawn."""
    from datasets import Dataset
    from trl import DPOTrainer

    class TokenIdsDPOTrainer(DPOTrainer):  # type: ignore[misc]
        order: list[int]

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
            return self.order

    return TokenIdsDPOTrainer


def callback(
    *, begin: Callable[[], None], before_update: Callable[[Any], None], end: Callable[[int], None]
) -> Any:
    """Return a transformers callback.

    Args:
        begin: called before the first step.
        before_update: called with the model, its gradient complete.
        end: called after each step with its number.
    """
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before_update(kwargs["model"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            end(state.global_step - 1)

    return Steps()


def load(settings: argparse.Namespace) -> Any:
    """Return the model in the dtype that our arms hold it in."""
    from transformers import AutoModelForCausalLM

    dtype = workload.compute_dtype(settings) if settings.lora_rank else torch.float32
    if settings.shape is not None:
        return workload.random_model(settings, dtype)
    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)


def make_trainer(
    settings: argparse.Namespace, arm: TRLSetting, pairs: list[TokenPair], folder: str, *, steps: int
) -> Any:
    """Return the trainer of an arm.

    Args:
        settings: of the command line.
        arm: which of TRL's arms.
        pairs: token ids of the pairs.
        folder: for whatever the trainer writes.
        steps: optimizer steps.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig

    if version("trl") != VERSION:
        raise SystemExit(f"these arms are TRL {VERSION}'s, {version('trl')} is installed")
    options: dict[str, Any] = {
        "output_dir": folder,
        "beta": workload.BETA,
        "learning_rate": workload.LEARNING_RATE,
        "per_device_train_batch_size": settings.pairs,
        "max_steps": steps,
        "max_length": None,
        "bf16": settings.precision == "bf16-mixed",
        "use_cpu": settings.device == "cpu",
        "dataloader_pin_memory": settings.device == "cuda",
        "seed": settings.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arm.options,
    }
    if arm.follows_checkpointing:
        options["gradient_checkpointing"] = settings.checkpointing
    model = load(settings)
    if settings.shape is None:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    else:
        workload.write_shape(settings, Path(folder) / "model")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    live_copy = settings.shape is not None and not settings.lora_rank
    lora = LoraConfig(
        r=settings.lora_rank or 1,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    precomputed = options.get("precompute_ref_log_probs", False)
    trainer = token_ids_trainer()(
        model=model,
        # TRL reads a reference from the model's folder by itself, which random weights have none of
        ref_model=load(settings) if live_copy and not precomputed else None,
        args=DPOConfig(**options),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt_ids": list(pair.prompt),
                    "chosen_ids": list(pair.chosen),
                    "rejected_ids": list(pair.rejected),
                }
                for pair in pairs
            ]
        ),
        processing_class=tokenizer,
        peft_config=lora if settings.lora_rank else None,
    )
    workload.same_adapter(trainer.model, settings.seed)
    trainer.order = workload.training_order(settings, len(pairs))
    return trainer


def _pairs(settings: argparse.Namespace) -> list[TokenPair]:
    return workload.token_pairs(settings, workload.model_config(settings).vocab_size)


def time_steps(settings: argparse.Namespace, rounds: Rounds, name: str) -> None:
    """Train one step a round."""
    pairs = _pairs(settings)

    def end(step: int) -> None:
        rounds.report(workload.step_tokens(settings, pairs, step))
        rounds.wait()

    with tempfile.TemporaryDirectory() as folder:
        steps = workload.total_steps(settings)
        trainer = make_trainer(settings, SETTINGS[name], pairs, folder, steps=steps)
        trainer.add_callback(callback(begin=rounds.wait, before_update=lambda model: None, end=end))
        trainer.train()


def first_step(settings: argparse.Namespace, name: str) -> FirstStep:
    """Train one step, without clipping, and return what the gate compares."""
    first = FirstStep()
    arm = SETTINGS[name]
    unclipped = replace(arm, options={**arm.options, "max_grad_norm": 0.0})

    def after_forward(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            first.keep_logps(*output.log_probs.sum(1).chunk(2))

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, unclipped, _pairs(settings), folder, steps=1)
        trainer.model.register_forward_hook(after_forward, with_kwargs=True)
        compute_loss = trainer.compute_loss

        def kept_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = compute_loss(*args, **kwargs)
            first.keep_loss(loss)
            return loss

        trainer.compute_loss = kept_loss
        trainer.add_callback(
            callback(begin=lambda: None, before_update=first.keep_gradient, end=lambda step: None)
        )
        trainer.train()
    return first
