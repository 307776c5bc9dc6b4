"""Refuses settings of ``trainer.logger`` before anything loads: secrets, missing packages, servers out of reach."""

from __future__ import annotations

import os
import pkgutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from sppo_lightning.loggers.trackio import TrackioLogger
from sppo_lightning.redaction import masked, masked_keys, without_passwords
from sppo_lightning.types import UserError, first_line

REACHED_WITHIN = 10.0  # seconds in which a tracking server has to answer
FROM_ENVIRONMENT = "MLFLOW_TRACKING_URI"
"""The variable that MLFlowLogger has its address from by default, a password perhaps included."""


class Tracker(NamedTuple):
    """What a logger of Lightning's or ours logs to."""

    package: str  # that the logger imports; the extra has the same name
    secrets: str  # environment variables that hold its keys
    run: tuple[str, ...]  # the logger's arguments that name the run to go on with


TRACKERS: dict[type, Tracker] = {
    WandbLogger: Tracker("wandb", "WANDB_API_KEY", ("version", "id")),
    MLFlowLogger: Tracker(
        "mlflow",
        "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ("run_id",),
    ),
    TrackioLogger: Tracker("trackio", "HF_TOKEN or TRACKIO_WRITE_TOKEN", ("name",)),
}


class LoggerSettings(NamedTuple):
    """One logger of a config."""

    key: str  # dotted
    given: Any  # its class_path and arguments, as the parser has them
    tracker: Tracker | None  # None: a logger that is not known here

    @property
    def class_path(self) -> str:
        """Of the logger."""
        return str(self.given["class_path"])

    @property
    def arguments(self) -> dict[str, Any]:
        """What it is given, by name."""
        return {**self.given.get("init_args", {}), **self.given.get("dict_kwargs", {})}


def loggers_of(given: Any) -> Iterator[LoggerSettings]:
    """Yield the loggers that ``trainer.logger`` names.

    Args:
        given: its value, as the parser has it: ``None``, a bool, a logger or several.
    """
    several = isinstance(given, list)
    for number, item in enumerate(given if several else [given]):
        if item is None or isinstance(item, bool):
            continue
        kind = pkgutil.resolve_name(item["class_path"])
        tracker = next((found for base, found in TRACKERS.items() if issubclass(kind, base)), None)
        yield LoggerSettings(f"trainer.logger[{number}]" if several else "trainer.logger", item, tracker)


def check_loggers(given: Any) -> None:
    """Refuse what would fail later, or should not be in a config.

    Args:
        given: the value of ``trainer.logger``, as the parser has it.

    Raises:
        UserError: naming the key and what to do instead.
    """
    for logger in loggers_of(given):
        _check_secrets(logger)
        if logger.tracker is not None and find_spec(logger.tracker.package) is None:
            package = logger.tracker.package
            raise UserError(
                f"{logger.key}: {logger.class_path} needs {package}, which is not installed here: "
                f"pip install 'sppo-lightning[{package}]'"
            )
        for name in ("tracking_uri", "server_url"):
            address = str(logger.arguments.get(name))
            if address.startswith(("http://", "https://")):
                _check_reachable(f"{logger.key}.init_args.{name}", address)


def _check_secrets(logger: LoggerSettings) -> None:
    """Refuse a key, a token or a password: trackers show a run's settings, and configs are handed on."""
    default = os.environ.get(FROM_ENVIRONMENT)
    own = {name: value for name, value in logger.arguments.items() if value is None or value != default}
    found = next(masked_keys(masked(own)), None)
    if found is not None:
        variables = "" if logger.tracker is None else f" ({logger.tracker.secrets})"
        raise UserError(
            f"{logger.key}.init_args.{found} holds a secret, which a config must not: leave it out, and set it in the "
            f"environment{variables}"
        )


def _check_reachable(key: str, address: str) -> None:
    """Refuse a server that does not answer; whatever it answers, it is there."""
    parts = urlsplit(address)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    try:
        with urlopen(Request(plain, method="HEAD"), timeout=REACHED_WITHIN):
            return
    except (HTTPError, HTTPException):
        return
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):  # trackers have settings of their own for certificates
            return
        raise UserError(
            f"{key}={plain} gave no answer within {REACHED_WITHIN:g} s ({reason}): start the server, or correct the "
            "address"
        ) from error


def hide_command_line() -> None:
    """Keep W&B, which records the command line, from recording it: it may hold a secret."""
    os.environ["WANDB_X_DISABLE_META"] = "true"


@contextmanager
def tracker_errors() -> Iterator[None]:
    """Turn an error of a tracker's package, such as a missing login, into a :class:`UserError`."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0].replace("sqlalchemy", "mlflow")  # its database's
        tracker = next((found for found in TRACKERS.values() if found.package == package), None)
        if tracker is None:
            raise
        raise UserError(
            f"trainer.logger: {package} ended the run ({type(error).__name__}): "
            f"{without_passwords(first_line(error))} [its keys come from the environment: {tracker.secrets}; the same "
            "command resumes the run]"
        ) from error
