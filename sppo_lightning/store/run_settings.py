"""A run's settings, as its ``config.yaml`` has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from sppo_lightning.limits import check_size
from sppo_lightning.store.run_folder import RunFolder
from sppo_lightning.types import UserError


def read_settings(folder: RunFolder) -> dict[str, Any]:
    """Return a run's settings.

    Raises:
        UserError: if this is no run, or its config cannot be read.
    """
    if not folder.config.is_file():
        raise UserError(
            f"{str(folder.root)!r} is no run: it has no config.yaml; give a folder that was a fit's "
            "trainer.default_root_dir"
        )
    with reading_settings(folder):
        config = yaml.safe_load(folder.config.read_bytes())
        check_size(config)
        if not isinstance(config, dict):
            raise TypeError("it holds no settings")
        return config


@contextmanager
def reading_settings(folder: RunFolder) -> Iterator[None]:
    """Let what cannot be made of a run's settings be an error that names their file.

    Raises:
        UserError: if a setting that is read inside is missing, or is no such setting.
    """
    try:
        yield
    except UserError:
        raise
    except (
        OSError,
        yaml.YAMLError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{folder.config} cannot be read as a run's config ({' '.join(str(error).split())}): restore it, or use "
            "the version of sppo-lightning that wrote it"
        ) from error
