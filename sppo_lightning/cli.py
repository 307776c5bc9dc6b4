"""LightningCLI wiring: links, defaults and checks of the config; no logic of the loop."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from sppo_lightning.callbacks import PolicyExport, RunSummary, SampleTable, SelfPlayProgress
from sppo_lightning.callbacks.run_config import RunConfigFile
from sppo_lightning.datamodule import SelfPlayDataModule
from sppo_lightning.metrics_csv import MetricsCSV
from sppo_lightning.module import PreferenceModule
from sppo_lightning.run_config import check_same_run, check_writable
from sppo_lightning.types import UserError

# Trainer flags that the loop sets by itself: the value they must keep, and what to set instead
FIXED_FLAGS: dict[str, tuple[Any, str]] = {
    "max_steps": (-1, "data.iterations and data.epochs_per_iteration"),
    "min_epochs": (None, "data.iterations and data.epochs_per_iteration"),
    "min_steps": (None, "data.iterations and data.epochs_per_iteration"),
    "limit_train_batches": (None, "data.schedule, e.g. RandomSubset"),
    "overfit_batches": (0.0, "a small data.prompts file"),
    "val_check_interval": (None, "data.epochs_per_iteration (an evaluation follows each iteration)"),
    "accumulate_grad_batches": (1, "data.pairs_per_step and data.batch_size"),
    "reload_dataloaders_every_n_epochs": (1, "nothing"),
    "num_sanity_val_steps": (0, "nothing (the initial policy is evaluated before the first step)"),
    "use_distributed_sampler": (False, "nothing (pairs are split between ranks already)"),
    "barebones": (False, "nothing"),
}
LINKED_FLAGS = {
    "max_epochs": "data.iterations and data.epochs_per_iteration",
    "check_val_every_n_epoch": "data.epochs_per_iteration",
}


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, without hundreds of lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and leave."""
        text = " ".join(line.strip() for line in message.splitlines() if line.strip())
        text = re.sub(r'^Parser key "(?P<key>[^"]+)": ', r"\g<key>: ", text)
        print(f"sppo-lightning: error: {text}", file=sys.stderr)
        sys.exit(2)


class SelfPlayCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` of the self-play trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what must agree, and set the loop's defaults."""
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments(
            ("data.iterations", "data.epochs_per_iteration"),
            "trainer.max_epochs",
            compute_fn=lambda iterations, epochs: iterations * epochs,
        )
        parser.link_arguments("data.epochs_per_iteration", "trainer.check_val_every_n_epoch")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "trainer.log_every_n_steps": 1,
                "trainer.enable_model_summary": False,
                "trainer.reload_dataloaders_every_n_epochs": 1,
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "model.lr_schedule": {"class_path": "sppo_lightning.schedules.Linear"},
                "model.optimizer": {"class_path": "torch.optim.AdamW"},
                "data.schedule": {"class_path": "sppo_lightning.selection.AllPrompts"},
                "data.curriculum": {"class_path": "sppo_lightning.selection.RandomOrder"},
                "data.pairing": {"class_path": "sppo_lightning.pairing.BestWorst"},
                "data.pair_selection": {"class_path": "sppo_lightning.selection.AllPairs"},
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: the command line's config is what counts."""

    def before_instantiate_classes(self) -> None:
        """Check the config against the Trainer, the run folder and the run that it may hold."""
        config = self.config[self.subcommand]
        for name, (value, instead) in FIXED_FLAGS.items():
            given = config.trainer.get(name)
            if given not in (value, None):
                raise UserError(
                    f"trainer.{name}={given} would break the self-play loop: set {instead} instead"
                )
        if isinstance(config.seed_everything, bool):
            raise UserError(
                "seed_everything must be a number: every random choice of the run derives from it"
            )
        self.root = Path(config.trainer.default_root_dir)
        self.run_config = yaml.safe_load(self._parser(self.subcommand).dump(config))
        for name in ("ckpt_path", "weights_only", "verbose", "return_predictions", "config"):
            self.run_config.pop(name, None)
        if not config.trainer.fast_dev_run:
            check_writable(self.root)
            if self.subcommand == "fit":
                check_same_run(self.root, self.run_config)

    def instantiate_classes(self) -> None:
        """Instantiate; a component that refuses its settings is a user's error."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(str(error)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Add the callbacks and loggers that a run has by default."""
        given = config.get("callbacks") or []
        given = [*(given if isinstance(given, list) else [given]), *callbacks]
        checkpoint = ModelCheckpoint(
            dirpath=self.root / "checkpoints",
            filename="last",
            every_n_epochs=self.config[self.subcommand].data.epochs_per_iteration,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        defaults: list[Callback] = [SampleTable(), PolicyExport(), RunSummary()]
        if config["enable_checkpointing"] is not False:
            defaults.append(checkpoint)
        if config["enable_progress_bar"] is not False:
            defaults.append(SelfPlayProgress())
        defaults.append(RunConfigFile(yaml.safe_dump(self.run_config, sort_keys=False)))
        given += [item for item in defaults if not any(isinstance(other, type(item)) for other in given)]
        return self.trainer_class(**{**config, "callbacks": given, "logger": self._loggers(config["logger"])})

    def _loggers(self, given: Any) -> list[Logger]:
        always: list[Logger] = [MetricsCSV(self.root / "metrics.csv")] if self.subcommand == "fit" else []
        if given is None or given is True:
            return [TensorBoardLogger(save_dir=self.root, name="", version="tensorboard"), *always]
        if given is False:
            return always
        return [*(given if isinstance(given, list) else [given]), *always]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Read checkpoints safely, and go on from the run's own one."""
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        last = self.root / "checkpoints" / "last.ckpt"
        given = kwargs.get("ckpt_path")
        if given is not None and not Path(given).exists():
            raise UserError(f"ckpt_path={given!r}: no such file")
        if subcommand == "fit" and given is None and last.exists() and not self.trainer.fast_dev_run:
            print(f"Continuing the run in {self.root} from {last}", file=sys.stderr)
            kwargs["ckpt_path"] = str(last)
        return kwargs


def _quiet() -> None:
    """Silence what a user of the loop cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")


def run(args: list[str] | None = None) -> None:
    """Parse ``args`` (default: the process's) and run the sub-command."""
    given = sys.argv[1:] if args is None else args
    for name, instead in LINKED_FLAGS.items():
        if any(re.match(rf"--trainer\.{name}(=|$)", arg) for arg in given):
            raise UserError(f"trainer.{name} follows from the loop: set {instead} instead")
    _quiet()
    SelfPlayCLI(
        PreferenceModule,
        SelfPlayDataModule,
        args=args,
        parser_class=Parser,
        save_config_callback=None,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "sppo-lightning", "description": "Self-play preference optimisation"},
    )
