"""Checks of a run before any weights load: prompts, Trainer, sizes, context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.generation import CachedGenerator, Generator
from sppo_lightning.generation.context import check_context, check_engine_limit, longest_prompt
from sppo_lightning.iteration.reward_checks import check_comparative, check_loss, check_win_probabilities
from sppo_lightning.iteration.rule_checks import check_sizes, set_up_rules
from sppo_lightning.iteration.rules import IterationRules
from sppo_lightning.memory.check import check_memory
from sppo_lightning.memory.workload import PromptLengths, TrainingSettings, Workload
from sppo_lightning.predictions import PredictionFormat
from sppo_lightning.predictions.answering import check_follow_ups
from sppo_lightning.prompts.encoding import EncodingResult
from sppo_lightning.prompts.reading import check_disjoint
from sppo_lightning.prompts.sets import PromptSets
from sppo_lightning.rewards import Reward
from sppo_lightning.training.batching import accumulation_steps
from sppo_lightning.training.hardware import Hardware, hardware_of, is_dev_run
from sppo_lightning.training.protocol import SelfPlayModule
from sppo_lightning.types import Prompt, Ranks, UserError

PROMPTS_OF = {"validate": "eval_prompts", "test": "test_prompts", "predict": "predict_prompts"}


class LoopSettings(Protocol):
    """What a data module holds, as far as it is read here."""

    prompt_sets: PromptSets
    rules: IterationRules
    epochs_per_iteration: int
    generator: Generator
    reward: Reward
    predict_format: PredictionFormat
    memory_check: Literal["refuse", "warn"]


def prepare_run(
    stage: str, trainer: pl.Trainer, module: SelfPlayModule, data: LoopSettings, ranks: Ranks
) -> None:
    """Check all that can be checked before any weights load, in the order of what it costs, and set accumulation.

    Args:
        stage: as Lightning names it.
        trainer: that will run the loop; gets the accumulation of ``fit``.
        module: the policy's settings and training's.
        data: the loop's settings.
        ranks: the processes.

    Raises:
        UserError: naming the key to change.
    """
    sets, rules, generator, reward = data.prompt_sets, data.rules, data.generator, data.reward
    keys = read_stage_prompts(sets, stage)
    if stage == "fit":
        set_up_rules(rules, sets.read("prompts"))
        if not is_dev_run(trainer):
            check_trainer(trainer, epochs=rules.iterations * data.epochs_per_iteration)
        trainer.accumulate_grad_batches = accumulation_steps(
            pairs_per_step=rules.pairs_per_step, batch_size=rules.batch_size, world_size=trainer.world_size
        )
    generator.check()
    if stage == "predict":
        data.predict_format.check_prompts(sets.records("predict_prompts"))
    if stage == "fit":
        check_comparative(reward, rules)
        check_win_probabilities(reward, rules)
        check_loss(module.loss, rules, reward)
        if not generator.reproducible:
            rank_zero_info(
                f"data.generator {type(generator).__name__}: responses depend on more than their seeds. A run that is "
                "started again keeps its finished shards, and samples the others anew."
            )
    if stage != "predict":
        reward.check()
        for key in keys:
            reward.check_prompts(sets.read(key))
    module.check()
    spec = module.policy_spec
    encoded = partial(sets.encode, tokenizer=spec.tokenizer, arguments=spec.config.chat_template_kwargs)
    longest: dict[str, int] = {}
    for key in keys:
        longest[key] = max(len(prompt.token_ids) for prompt in encoded(key))
        check_context(longest[key], generator, module.policy_spec.model_config, key=key)
    check_engine_limit(max(longest.values()), generator)
    if stage == "predict":
        check_follow_ups(
            data.predict_format, sets.records("predict_prompts"), encode_later(sets, module, generator)
        )
    if stage == "fit":
        check_sizes(rules, encoded("prompts").ids)
        workload = workload_of(
            trainer,
            module,
            data,
            hardware=hardware_of(trainer),
            prompts=PromptLengths(answered=max(longest.values()), trained=longest["prompts"]),
        )
        check_memory(workload, ranks, otherwise=data.memory_check)


def read_stage_prompts(sets: PromptSets, stage: str) -> list[str]:
    """Read the prompts that a stage needs, and return their keys.

    Raises:
        UserError: if some are missing, broken, or also among the training prompts.
    """
    keys = ["prompts", "eval_prompts"] if stage == "fit" else [PROMPTS_OF[stage]]
    keys = [key for key in keys if stage != "fit" or key == "prompts" or sets.named(key)]
    for key in keys:
        sets.read(key)
    if stage != "predict" and sets.named("prompts"):
        for key in set(keys) - {"prompts"}:
            check_disjoint(sets.read("prompts"), sets.read(key), key=f"data.{key}")
    return keys


def check_trainer(trainer: pl.Trainer, *, epochs: int) -> None:
    """Refuse a Trainer, made without the command line, that would not run the loop.

    Raises:
        UserError: naming the argument and its value.
    """
    for name, value in {"max_epochs": epochs, "reload_dataloaders_every_n_epochs": 1}.items():
        if getattr(trainer, name) != value:
            raise UserError(f"the Trainer needs {name}={value}, got {getattr(trainer, name)}")


def shrink(sets: PromptSets, rules: IterationRules) -> IterationRules:
    """Keep one optimizer step's worth of prompts, with room for ties, and one iteration; for a dev run."""
    wanted = 2 * rules.pairs_per_step
    rules = replace(rules, iterations=1, steps_per_iteration=None)
    set_up_rules(rules, sets.read("prompts"))
    ids = sets.read("prompts").ids
    for count in range(wanted, len(ids), rules.pairs_per_step):
        if rules.expected_pairs(ids[:count], 0, each=1)[1] >= wanted:
            sets.keep_first("prompts", count)
            break
    if sets.named("eval_prompts"):
        sets.keep_first("eval_prompts", rules.pairs_per_step)
    return rules


def encode_later(
    sets: PromptSets, module: SelfPlayModule, generator: Generator
) -> Callable[[Sequence[Prompt]], EncodingResult]:
    """Return what encodes conversations that the policy's own answers are part of, up to its context."""
    spec = module.policy_spec
    return partial(
        sets.encode_later,
        tokenizer=spec.tokenizer,
        arguments=spec.config.chat_template_kwargs,
        max_tokens=longest_prompt(generator, spec.model_config),
    )


def workload_of(
    trainer: pl.Trainer,
    module: SelfPlayModule,
    data: LoopSettings,
    *,
    hardware: Hardware,
    prompts: PromptLengths,
) -> Workload:
    """Return what decides a run's memory; the module's settings have been checked.

    Args:
        trainer: clips gradients.
        module: the policy's settings and training's.
        data: the loop's settings.
        hardware: what the run computes on, which may be more than the trainer has.
        prompts: how long they are.
    """
    return Workload(
        policy=module.policy_spec.config,
        model_config=module.policy_spec.model_config,
        training=TrainingSettings(
            pair_forward=module.pair_forward,
            reference=module.reference.kind,
            optimizer=module.optimizer_factory,
            carry_optimizer=module.carry_optimizer,
            clips_gradients=bool(trainer.gradient_clip_val),
            pairs_per_step=data.rules.pairs_per_step,
            batch_size=data.rules.batch_size,
        ),
        generator=data.generator.generator if isinstance(data.generator, CachedGenerator) else data.generator,
        reward=data.reward,
        prompts=prompts,
        hardware=hardware,
    )
