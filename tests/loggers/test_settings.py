"""What is refused of ``trainer.logger`` before a run starts."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from support.runs import cli_arguments

from sppo_lightning.__main__ import main
from sppo_lightning.loggers import settings
from sppo_lightning.loggers.settings import check_loggers, tracker_errors
from sppo_lightning.types import UserError

WANDB = "lightning.pytorch.loggers.WandbLogger"
MLFLOW = "lightning.pytorch.loggers.MLFlowLogger"
TRACKIO = "sppo_lightning.loggers.TrackioLogger"
CSV = "lightning.pytorch.loggers.CSVLogger"


def logger(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tracker's package seems to be there."""
    monkeypatch.setattr(settings, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    "given", [None, True, False, [], logger(CSV, save_dir="x"), logger(WANDB, project="p")]
)
def test_others_pass(given: Any, installed: None) -> None:
    check_loggers(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            logger(WANDB, api_key="sk-1"),
            r"^trainer\.logger\.init_args\.api_key holds a secret.*WANDB_API_KEY\)$",
        ),
        (
            [logger(CSV), {"class_path": WANDB, "dict_kwargs": {"settings": {"api_key": "sk-1"}}}],
            r"^trainer\.logger\[1\]\.init_args\.settings\.api_key holds a secret",
        ),
        (
            logger(MLFLOW, tracking_uri="https://me:sk-1@host"),
            r"init_args\.tracking_uri holds a secret.*MLFLOW_TRACKING_PASSWORD\)$",
        ),
        (
            logger(TRACKIO, server_url="https://host/?write_token=sk-1"),
            r"init_args\.server_url holds a secret.*TRACKIO_WRITE_TOKEN\)$",
        ),
        (logger(CSV, hf_token="sk-1"), r"init_args\.hf_token holds a secret.*set it in the environment$"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(given: Any, said: str, installed: None) -> None:
    with pytest.raises(UserError, match=said) as raised:
        check_loggers(given)
    assert "sk-1" not in str(raised.value)


def test_an_address_from_the_environment_may_hold_a_password(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "databricks://me:sk-1@host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    check_loggers(logger(MLFLOW, tracking_uri=address))


@pytest.mark.parametrize(("path", "extra"), [(WANDB, "wandb"), (MLFLOW, "mlflow"), (TRACKIO, "trackio")])
def test_a_missing_package_names_the_extra(
    path: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main(["fit", *cli_arguments(tmp_path, tmp_path, tmp_path / "run", trainer__logger=path)])
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"sppo-lightning: error: trainer.logger: {path} needs {extra}, which is not installed here: "
        f"pip install 'sppo-lightning[{extra}]'"
    )


class Refuses(BaseHTTPRequestHandler):
    """A server that wants a login."""

    def do_HEAD(self) -> None:
        self.send_error(401)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The address of such a server."""
    with HTTPServer(("127.0.0.1", 0), Refuses) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_server_that_wants_a_login_is_there(server: str, installed: None) -> None:
    check_loggers(logger(MLFLOW, tracking_uri=server))


def test_a_server_that_is_not_there_is_refused(installed: None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        UserError, match=rf"init_args\.tracking_uri={address} gave no answer.*start the server"
    ):
        check_loggers(logger(MLFLOW, tracking_uri=address))


def test_a_server_that_says_nothing_is_waited_for_shortly(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "REACHED_WITHIN", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"gave no answer within 0\.2 s \(timed out\)"):
            check_loggers(logger(TRACKIO, server_url=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert time.monotonic() - begun < 5


def test_a_trackers_error_is_one_line() -> None:
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    with (
        pytest.raises(
            UserError, match=r"^trainer\.logger: wandb ended the run \(UsageError\): No key \[.*WANDB_API_KEY"
        ),
        tracker_errors(),
    ):
        raise error("No key\nat all")


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(KeyError), tracker_errors():
        raise KeyError("x")
