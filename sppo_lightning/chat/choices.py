"""Which policy is meant by what a user has typed, found out before any weights load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from sppo_lightning.export.finished_run import ADAPTER_CONFIG, latest_iteration, open_run, read_json
from sppo_lightning.export.stored_run import StoredRun, read_run
from sppo_lightning.policy.config import PolicyConfig
from sppo_lightning.policy.pretrained import DTYPES, load_model_config, load_tokenizer
from sppo_lightning.prompts.chat_template import choose_chat_template
from sppo_lightning.training.precision import COMPUTE_DTYPES, fast_precision
from sppo_lightning.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Which = int | Literal["best", "initial"]


@dataclass(frozen=True)
class Choice:
    """A policy that was chosen.

    Args:
        name: for people.
        config: the model, or an adapter's base, and how it was held.
        dtype: of its weights.
        adapter: folder or hub id of an adapter on it, in PEFT's layout.
        tokenizer: folder, hub id or file of the tokenizer.
        run: that the policy comes from.
        system_prompt: opens each conversation.
        chat_template: in place of the tokenizer's own, see :class:`~sppo_lightning.policy.config.PolicyConfig`.
        note: what the user should know about the choice.
    """

    name: str
    config: PolicyConfig
    dtype: torch.dtype
    tokenizer: str
    adapter: str | None = None
    run: StoredRun | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    note: str | None = None

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """Further variables of the chat template."""
        return self.config.chat_template_kwargs or MappingProxyType({})

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer; one without a chat template takes plain text.

        Raises:
            UserError: if there is none.
        """
        tokenizer = load_tokenizer(
            self.tokenizer, key=self.name, trust_remote_code=self.config.trust_remote_code
        )
        if self.chat_template is not None:
            choose_chat_template(tokenizer, self.chat_template, key="model.policy.chat_template")
        return tokenizer


def choose(given: str, *, device: torch.device, run: StoredRun | None = None) -> Choice:
    """Return the policy that is meant.

    Args:
        given: a run's folder, a model's or an adapter's, a hub id or a ``.gguf`` file; of ``run``, also the number of
            an iteration, ``best`` or ``initial``.
        device: where it will be.
        run: whose policies have short names.

    Raises:
        UserError: if there is no such policy.
    """
    path = Path(given).expanduser()
    which = _which(given)
    if which is not None and not path.exists():
        if run is None:
            raise UserError(
                f"{given} is a policy of a run, and the policy talked to is of none: give the folder of a run"
            )
        return of_run(run, which)
    if (path / "config.yaml").is_file():
        return of_run(read_run(path), None)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        base = str(read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path"))
        return Choice(path.name, PolicyConfig(base), _fast(device), str(path), adapter=str(path))
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{given!r} is no run (it has no config.yaml) and no model (no config.json): give a run's or a model's "
            "folder, a hub id or a .gguf file"
        )
    name = str(path) if path.exists() else given
    load_model_config(name, key="chat", trust_remote_code=False, expect="causal-lm")
    return Choice(path.name, PolicyConfig(name), _fast(device), name)


def _which(given: str) -> Which | None:
    names: dict[str, Which] = {"best": "best", "initial": "initial"}
    return int(given) if given.isdecimal() else names.get(given)


def of_run(run: StoredRun, which: Which | None) -> Choice:
    """Return one of a run's policies.

    Args:
        run: the run.
        which: the iteration that it comes out of, from 0; ``None``: the last one, or the initial policy where there is
            none, with a note.

    Raises:
        UserError: if it is not there.
    """
    root = run.folder.root
    if which is None:
        latest = latest_iteration(run.folder)
        if latest is None:
            return _initial(
                run, f"{root} has no finished iteration yet: this is the policy that it starts from"
            )
        if latest < 0:
            return _initial(run, f"{root} reverted to the policy that it started from: this is that policy")
    if which == "initial":
        return _initial(run, None)
    found = open_run(root, iteration=which)
    name = f"{root.name}, iteration {found.iteration}" + (" (best)" if which == "best" else "")
    folder = str(found.policy_folder)
    if found.has_adapter:
        return _choice(run, name, found.policy_config, folder, adapter=folder)
    return _choice(run, name, replace(found.policy_config, pretrained=folder), folder)


def _initial(run: StoredRun, note: str | None) -> Choice:
    config, root = run.policy_config, run.folder.root
    latest = latest_iteration(run.folder)
    if config.lora is not None and latest is not None and latest >= 0:
        config = open_run(root).policy_config  # its adapter knows where the base lies
    load_model_config(
        config.pretrained,
        key=f"the policy that {root} started from",
        trust_remote_code=config.trust_remote_code,
        expect="causal-lm",
    )
    start = _choice(
        run,
        f"{root.name}, initial",
        config,
        config.pretrained,
        adapter=config.lora.adapter if config.lora is not None else None,
    )
    return replace(start, chat_template=config.chat_template, note=note)


def _choice(
    run: StoredRun, name: str, config: PolicyConfig, tokenizer: str, *, adapter: str | None = None
) -> Choice:
    computed = run.compute_dtype
    return Choice(
        name,
        config,
        computed if config.lora is None else DTYPES.get(config.dtype, computed),
        tokenizer,
        adapter,
        run,
        system_prompt=run.config["data"].get("system_prompt"),
    )


def _fast(device: torch.device) -> torch.dtype:
    return COMPUTE_DTYPES[fast_precision(device.type)]
