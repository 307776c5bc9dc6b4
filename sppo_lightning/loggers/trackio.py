"""A Lightning logger for Trackio."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _add_prefix, _convert_params
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.imports import RequirementCache

from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from trackio.run import Run

_TRACKIO = RequirementCache("trackio>=0.43")


class TrackioLogger(Logger):
    """Logs to `Trackio <https://github.com/gradio-app/trackio>`_: a local database, or a Space of the hub.

    The database lies in the folder that the environment variable ``TRACKIO_DIR`` names; ``trackio show`` shows it.
    Tokens come from the environment: ``HF_TOKEN`` for a Space, ``TRACKIO_WRITE_TOKEN`` for a server.

    Args:
        project: that the run belongs to.
        name: of the run; a run of this name is continued. ``None``: Trackio makes one up.
        group: of runs that belong together.
        space_id: ``owner/name`` of a Space to log to; it is created if it is not there.
        server_url: of a Trackio server to log to.
        private: whether only its owner sees a Space that is created: held-out prompts and answers are logged too.
        prefix: stands before the names of metrics.

    Raises:
        ModuleNotFoundError: if Trackio is not installed.
        UserError: when the run starts, if Trackio refuses a setting or finds no token.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self,
        project: str = "sppo-lightning",
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
        private: bool = True,
        prefix: str = "",
    ) -> None:
        if not _TRACKIO:
            raise ModuleNotFoundError(str(_TRACKIO))
        super().__init__()
        self._project = project
        self._run_name = name
        self._group = group
        self._space_id = space_id
        self._server_url = server_url
        self._private = private
        self._prefix = prefix
        self._run: Run | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The run; the first look at it starts one, or continues the one of this name."""
        if self._run is None:
            import trackio

            try:
                self._run = trackio.init(
                    self._project,
                    name=self._run_name,
                    group=self._group,
                    space_id=self._space_id,
                    server_url=self._server_url,
                    private=self._private,
                    resume="allow",
                    embed=False,
                )
            except (ValueError, OSError) as error:  # a setting it refuses, or a token that is missing
                raise UserError(f"trainer.logger: Trackio does not start: {first_line(error)}") from error
            self._run_name = self._run.name
        return self._run

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name; ``None`` before it has one."""
        return self._run_name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add to the run's config, which Trackio stores with the first metrics."""
        self.experiment.config.update(_convert_params(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, or whatever else Trackio takes."""
        self.experiment.log(dict(_add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until everything is written."""
        if self._run is not None:
            import trackio

            trackio.finish()
            self._run = None  # a later look continues it
