"""Self-play preference optimisation on PyTorch Lightning, driven by prompt difficulty.

The face: :class:`SelfPlayDataModule` makes each iteration's pairs, :class:`PreferenceModule` trains on them, and
:class:`UserError` is what both raise for bad input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sppo_lightning.datamodule import SelfPlayDataModule
    from sppo_lightning.module import PreferenceModule
    from sppo_lightning.types import UserError

__version__ = "0.1.0"
__all__ = ["PreferenceModule", "SelfPlayDataModule", "UserError", "__version__"]

_FACE = {"PreferenceModule": "module", "SelfPlayDataModule": "datamodule", "UserError": "types"}


def __getattr__(name: str) -> Any:
    """Import a class of the face when it is asked for: the command line stays fast."""
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
