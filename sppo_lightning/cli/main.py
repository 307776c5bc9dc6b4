"""LightningCLI wiring: defaults, derived keys and checks of the config; no logic of the loop."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from sppo_lightning.cli.defaults import given_loggers, with_default_callbacks, with_default_loggers
from sppo_lightning.cli.estimate import SelfPlayTrainer, plan_on_cpu, planned_sharding
from sppo_lightning.cli.messages import hide_unactionable, show_messages
from sppo_lightning.cli.parse_errors import check_config_files, class_paths, explain
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.loggers.runs import continue_runs
from sppo_lightning.loggers.settings import check_loggers, hide_command_line, tracker_errors
from sppo_lightning.module import PreferenceModule
from sppo_lightning.paths import expand_path
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.predictions.formats import FORMATS
from sppo_lightning.redaction import masked, masked_keys
from sppo_lightning.resume.checkpoints import check_checkpoint, verify_checkpoint
from sppo_lightning.resume.run_config import check_writable, recorded_setting, resume_path
from sppo_lightning.short_names import with_class_paths
from sppo_lightning.store.run_folder import RunFolder, check_kinds, remove_leftovers
from sppo_lightning.system.durable import disk_error
from sppo_lightning.system.lock import RunLock, check_ranks, is_first_process
from sppo_lightning.text import for_terminal
from sppo_lightning.training.precision import fast_precision
from sppo_lightning.types import UserError

# Trainer flags that the loop sets by itself: the value they must keep, and what to do instead
FIXED_FLAGS: dict[str, tuple[Any, str]] = {
    "max_time": (None, "stop the run by a signal instead: it resumes from its last optimizer step"),
    "max_steps": (-1, "set data.iterations and data.epochs_per_iteration instead"),
    "min_epochs": (None, "set data.iterations and data.epochs_per_iteration instead"),
    "min_steps": (None, "set data.iterations and data.epochs_per_iteration instead"),
    "limit_train_batches": (None, "set data.schedule instead, e.g. RandomSubset"),
    "limit_val_batches": (None, "name a smaller data.eval_prompts file instead"),
    "limit_test_batches": (None, "name a smaller data.test_prompts file instead"),
    "limit_predict_batches": (None, "name a smaller data.predict_prompts file instead"),
    "overfit_batches": (0, "name a small data.prompts file instead"),
    "val_check_interval": (None, "leave it out (an evaluation of data.eval_prompts follows each iteration)"),
    "accumulate_grad_batches": (1, "set data.pairs_per_step and data.batch_size instead"),
    "reload_dataloaders_every_n_epochs": (
        1,
        "leave it out (data.epochs_per_iteration says when new pairs are made)",
    ),
    "num_sanity_val_steps": (0, "leave it out (data.eval_prompts are evaluated before the first step)"),
    "use_distributed_sampler": (False, "leave it out (data.pairs_per_step is split between devices)"),
    "barebones": (False, "leave it out"),
}

# the classes of the sections of a config that name none
SECTIONS: dict[str, type] = {
    "model": PreferenceModule,
    "model.policy": PolicyConfig,
    "model.policy.lora": LoRAConfig,
    "data": SelfPlayDataModule,
}


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, without hundreds of lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and leave."""
        if not self.exit_on_error:  # a component's own parser: the outer one reports, with the whole key
            super().error(message, ex)
        sections = {"trainer": Trainer, **SECTIONS}
        keys = [f"{name}.{key}" for name, owner in sections.items() for key in signature(owner).parameters]
        print(for_terminal(f"sppo-lightning: error: {explain(message, keys)}"), file=sys.stderr)
        sys.exit(2)


class SelfPlayCLI(LightningCLI):
    """``fit``, ``validate``, ``test``, ``predict`` and ``estimate`` of the self-play trainer."""

    def __init__(self, args: list[str], **kwargs: Any) -> None:
        self.start: Path | None = None  # checkpoint of the run folder that fit resumes from
        self._asked = args[:1]
        with ExitStack() as self._held, tracker_errors():
            super().__init__(PreferenceModule, SelfPlayDataModule, args=args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and called on self
        """Return the command that is asked for, and which of its arguments the command line does not take.

        All commands, where the first argument is none: a command's parser takes as long to make as a config to read.
        """
        known = {**LightningCLI.subcommands(), "estimate": {"model", "datamodule", "planned"}}
        return {name: known[name] for name in self._asked if name in known} or known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the loop's defaults."""
        parser.usage = "%(prog)s [--config FILE] [--KEY VALUE ...]"
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.log_every_n_steps": 1,
                "trainer.enable_model_summary": False,
                "trainer.reload_dataloaders_every_n_epochs": 1,
                "trainer.check_val_every_n_epoch": None,
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "model.lr_schedule": {"class_path": "sppo_lightning.schedules.Linear"},
                "data.seed": None,
                "data.schedule": {"class_path": "sppo_lightning.selection.AllPrompts"},
                "data.curriculum": {"class_path": "sppo_lightning.selection.RandomOrder"},
                "data.pairing": {"class_path": "sppo_lightning.pairing.BestWorst"},
                "data.pair_selection": {"class_path": "sppo_lightning.selection.AllPairs"},
            }
        )

    def _set_seed(self) -> None:
        """Seed everything."""
        seed = self.config[self.subcommand].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(
                f"seed_everything={seed} must be a number from 0 to {2**32 - 1}: every random choice derives from it"
            )
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: the command line's config is what counts."""

    def before_instantiate_classes(self) -> None:
        """Check the config against the Trainer, the run folder and the run that it may hold."""
        config = self.config[self.subcommand]
        for name, (value, instead) in FIXED_FLAGS.items():
            given = config.trainer.get(name)
            if given not in (value, None):
                raise UserError(f"trainer.{name}={given} would break the self-play loop: {instead}")
        check_ranks(os.environ, nodes=int(config.trainer.num_nodes))
        root = expand_path(str(config.trainer.default_root_dir), key="trainer.default_root_dir")
        config.trainer.default_root_dir = root
        self.folder = RunFolder(Path(root))
        check_kinds(self.folder)
        self._freeze_defaults(config)
        given = yaml.safe_load(self._parser(self.subcommand).dump(config))
        lost = next(masked_keys(given), None)
        if lost is not None:
            raise UserError(
                f"{lost} is masked, as a run's config.yaml holds it: give the secret itself again"
            )
        self.run_config = masked(given)
        if self.run_config != given:
            hide_command_line()
        for name in ("ckpt_path", "weights_only", "verbose", "return_predictions", "config"):
            self.run_config.pop(name, None)
        if self.subcommand != "estimate" and is_first_process(os.environ):
            check_loggers(config.trainer.logger)
        self._derive(config)
        self._check_optimizer(config.model.optimizer)
        planned_sharding(
            config.trainer
        )  # a strategy that does not serve is refused before any process starts
        if self.subcommand == "estimate":
            self.planned = config.trainer.clone()
            plan_on_cpu(config.trainer)
        elif not config.trainer.fast_dev_run:
            check_writable(self.folder)
            if is_first_process(os.environ):
                self._hold_folder()
            if self.subcommand == "fit":
                given = config.get("ckpt_path")
                self.start = resume_path(
                    self.folder,
                    config.data.resume,
                    self.run_config,
                    sections=SECTIONS,
                    given=None if given is None else Path(given),
                )
                continue_runs(self.folder, config.trainer.logger)

    def _freeze_defaults(self, config: Any) -> None:
        """Fill in what follows from this machine and this day, or, in a folder that holds a run, from that run's."""
        defaults = {
            "trainer.precision": fast_precision(config.trainer.accelerator),
            "model.policy.template_date": date.today().isoformat(),
            "data.eval_share": 0.1 if config.data.eval_prompts is None else None,
        }
        if config.trainer.plugins:  # one of them may be a precision
            del defaults["trainer.precision"]
        for key, value in defaults.items():
            if config[key] is None:
                holds_run, recorded = recorded_setting(self.folder, key)
                config[key] = recorded if holds_run else value
                if key == "trainer.precision" and not holds_run and is_first_process(os.environ):
                    print(
                        f"{key}={value}: the fast one on this device, unless you set another", file=sys.stderr
                    )

    def _hold_folder(self) -> None:
        """Keep other runs out of the run folder until this one has ended."""
        lock = RunLock(self.folder.lock)
        self._held.enter_context(lock)
        if lock.held:
            remove_leftovers(self.folder)

    def _check_optimizer(self, optimizer: Any) -> None:
        """Refuse optimizer settings that the module sets by itself."""
        if optimizer is None:
            return
        defaults = signature(pkgutil.resolve_name(optimizer.class_path)).parameters
        for name in ("lr", "weight_decay"):
            given = optimizer.get("init_args", {}).get(name)
            if name in defaults and given not in (None, defaults[name].default):
                key = {"lr": "model.learning_rate", "weight_decay": "model.weight_decay"}[name]
                raise UserError(
                    f"model.optimizer.init_args.{name}={given} would be overridden: set {key} instead"
                )

    def _derive(self, config: Any) -> None:
        """Set what follows from other keys, and refuse another value by hand."""
        epochs = config.data.epochs_per_iteration
        derived = {
            "trainer.max_epochs": (
                config.data.iterations * epochs,
                "data.iterations and data.epochs_per_iteration",
            ),
            "trainer.check_val_every_n_epoch": (epochs, "data.epochs_per_iteration"),
            "data.seed": (config.seed_everything, "seed_everything"),
        }
        for key, (value, source) in derived.items():
            if config[key] not in (value, None):
                raise UserError(f"{key}={config[key]} would break the self-play loop: set {source} instead")
            config[key] = value

    def instantiate_classes(self) -> None:
        """Instantiate; a component or a Trainer that refuses its settings is a user's error."""
        try:
            super().instantiate_classes()
        except (ValueError, ImportError, MisconfigurationException, OSError) as error:
            if disk_error(error, self.folder.root) is not None:
                raise
            raise UserError(explain(str(error), (), dict(class_paths(self.run_config)))) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add the callbacks and loggers that a run has by default."""
        given = config.get("callbacks") or []
        given = [*(given if isinstance(given, list) else [given]), *callbacks]
        added = with_default_callbacks(
            given,
            yaml.safe_dump(self.run_config, sort_keys=False),
            progress=config["enable_progress_bar"] is not False,
            checkpoint=config["enable_checkpointing"] is not False,
        )
        fits = self.subcommand == "fit"  # other commands must not write into its curves
        loggers = (
            with_default_loggers(config["logger"], self.folder) if fits else given_loggers(config["logger"])
        )
        return self.trainer_class(**{**config, "callbacks": added, "logger": loggers})

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Read checkpoints safely, and resume from the run's own one."""
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "estimate":
            return {**kwargs, "planned": self.planned}
        if kwargs.get("weights_only") is False:
            raise UserError("weights_only=false would run code from a checkpoint: leave it out")
        kwargs["weights_only"] = True
        given = kwargs.get("ckpt_path")
        if given is not None:
            check_checkpoint(Path(given), "ckpt_path")
        elif self.start is not None:
            if self.config[subcommand].trainer.enable_checkpointing is False:
                raise UserError(
                    f"trainer.enable_checkpointing=false: the run in {self.folder.root} resumes from its checkpoint, "
                    "and must go on writing it: leave it out"
                )
            print(f"Continuing the run in {self.folder.root} from {self.start}", file=sys.stderr)
            kwargs["ckpt_path"] = str(self.start)
        if kwargs.get("ckpt_path") is not None and is_first_process(os.environ):
            verify_checkpoint(Path(kwargs["ckpt_path"]))
        return kwargs


def run(args: list[str], other_commands: Sequence[str] = ()) -> None:
    """Parse the command line and run the sub-command.

    Args:
        args: of the command line.
        other_commands: named in the help, beside LightningCLI's own.
    """
    if args[:1] == ["predict"]:
        args = with_class_paths(args, "--format", FORMATS, what="format", key="--data.predict_format")
    check_config_files(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    hide_unactionable()
    show_messages()
    SelfPlayCLI(
        args,
        trainer_class=SelfPlayTrainer,
        parser_class=Parser,
        save_config_callback=None,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={
            "prog": "sppo-lightning",
            "description": "Self-play preference optimisation. Commands besides those below, each with --help: "
            f"{', '.join(other_commands)}.",
        },
    )
