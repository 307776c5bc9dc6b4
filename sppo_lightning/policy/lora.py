"""Low-rank adapters on a model: a fresh one, or one to start from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from sppo_lightning.limits import bounded
from sppo_lightning.policy.anatomy import non_text_modules
from sppo_lightning.policy.config import KEY, LoRAConfig
from sppo_lightning.policy.sharding import is_sharded, local
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

LONGEST_SECONDS = 120.0  # that an adapter may take to find its layers in a model without weights

# settings of PEFT's that say what low-rank matrices an adapter has, and where; with any other one it is more than that
MATRICES = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")
BEGINNING = ("init_lora_weights", "eva_config", "inference_mode", "runtime_config", "megatron_core")
RECORD = ("task_type", "peft_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
OWN = {*MATRICES, *PLACES, *BEGINNING, *RECORD, "ensure_weight_tying"}
# ways to begin an adapter that leave its base as it is
STARTS = (True, False, "gaussian", "orthogonal", "eva")


def with_adapter(model: nn.Module, lora: LoRAConfig, *, pretrained: str) -> PeftModel:
    """Freeze a model and put an adapter on it, in float32; one that is started from comes with its weights.

    A fresh one leaves alone what text never passes through, whatever its layers are called.

    Args:
        model: a transformers causal language model; on the meta device the adapter is left without weights.
        lora: which adapter.
        pretrained: folder, hub id or file that the model was read from.

    Raises:
        UserError: if the target modules match nothing, or if the adapter to start from is none, was made for another
            model, or holds more than low-rank matrices.
    """
    from peft import get_peft_model

    config = (
        _fresh_config(lora, non_text_modules(model))
        if lora.adapter is None
        else _read_config(lora, pretrained)
    )
    _check_ranks(model, config, "rank" if lora.adapter is None else "adapter")
    # patterns of an adapter of others may take hours; weights load after this was done without them
    untried = lora.adapter is not None and next(model.parameters()).is_meta
    try:
        with bounded(LONGEST_SECONDS) if untried else nullcontext():
            adapted: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)
    except Exception as error:
        if lora.adapter is not None:
            raise UserError(
                f"{KEY}.adapter={lora.adapter!r} cannot be put on model.policy.pretrained={pretrained!r} "
                f"({type(error).__name__}: {first_line(error)}): is that its base, and adapter_config.json whole?"
            ) from error
        if not isinstance(error, ValueError):
            raise
        raise UserError(f"{KEY}.target_modules: {first_line(error)}") from error
    _check_targets(adapted, lora.target_modules)
    _refuse_tied(adapted)
    adapted.peft_config["default"].base_model_name_or_path = _location(pretrained)
    if lora.adapter is not None:
        _take_weights(adapted, lora.adapter, pretrained)
    return adapted


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of what this process holds of the trainable weights, in host memory, by name."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: local(parameter.detach()).to("cpu", copy=True) for name, parameter in trained}


def adapter_is_off(model: nn.Module) -> bool:
    """Whether a model has an adapter that is switched off."""
    return hasattr(model, "peft_config") and cast(Any, model).get_model_status().enabled is False


@contextmanager
def replaced_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model have other trainable weights while the context lasts.

    Args:
        model: has its own weights back afterwards.
        weights: what this process holds of them, by name, on any device.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    if is_sharded(model):
        with _overwritten(trained, weights):
            yield
        return
    own = {name: parameter.data for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.data = weights[name].to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for name, parameter in trained.items():
            parameter.data = own[name]


@contextmanager
def _overwritten(trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Write into the memory that sharded weights are gathered from; another tensor in its place would go unseen."""
    own = {name: local(parameter.detach()).clone() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        local(parameter.detach()).copy_(weights[name])
    try:
        yield
    finally:
        for name, parameter in trained.items():
            local(parameter.detach()).copy_(own[name])


def _fresh_config(lora: LoRAConfig, excluded: list[str]) -> LoraConfig:
    """Return PEFT's settings of a fresh adapter, on none of the excluded modules and of what is in them."""
    from peft import LoraConfig

    assert lora.rank is not None
    names = "|".join(map(re.escape, excluded))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=rf"({names})(\..+)?" if excluded else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def _read_config(lora: LoRAConfig, pretrained: str) -> LoraConfig:
    """Read the settings of the adapter to start from."""
    from peft import LoraConfig, PeftConfig, PeftType

    assert lora.adapter is not None
    given = f"{KEY}.adapter={lora.adapter!r}"
    try:
        config = PeftConfig.from_pretrained(lora.adapter)
    except Exception as error:
        raise UserError(
            f"{given} cannot be read as an adapter ({first_line(error)}): give a folder with adapter_config.json and "
            "adapter_model.safetensors, or a hub id that can be reached"
        ) from error
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{given} is a {PeftType(config.peft_type).value} adapter: only LoRA adapters can be trained here"
        )
    usual = LoraConfig()
    settings = [field.name for field in fields(config) if field.name not in OWN]
    extra = [name for name in settings if getattr(config, name) != getattr(usual, name)]
    if config.init_lora_weights not in STARTS:
        extra.append(f"init_lora_weights={config.init_lora_weights}")
    if extra:
        raise UserError(
            f"{given} is more than low-rank matrices on its base ({', '.join(extra)}): merge it into its base and "
            "train a fresh adapter on the result"
        )
    base = config.base_model_name_or_path
    if base and not lora.ignore_adapter_base and not _same_model(str(base), pretrained):
        raise UserError(
            f"{given} was made for {base}, but model.policy.pretrained={pretrained!r}: give the adapter's own base; if "
            f"they are the same model, set {KEY}.ignore_adapter_base=true"
        )
    config.base_model_name_or_path = None
    config.inference_mode = False
    config.init_lora_weights = False  # they are overwritten
    config.lora_dropout = lora.dropout
    return config


def _same_model(one: str, other: str) -> bool:
    """Whether two locations may name one model: the same place, or under the same name one that is not here."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    both_here = Path(one).exists() and Path(other).exists()
    return not both_here and Path(one).name.lower() == Path(other).name.lower()


def _location(pretrained: str) -> str:
    """Return where a model lies, so that it is found from any folder."""
    return os.path.abspath(pretrained) if Path(pretrained).exists() else pretrained


def _check_ranks(model: nn.Module, config: LoraConfig, setting: str) -> None:
    """Refuse ranks that no matrix of the model has, before matrices of that size are made."""
    largest = max(size for parameter in model.parameters() for size in parameter.shape)
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    wrong = next((rank for rank in ranks if type(rank) is not int or not 0 < rank <= largest), None)
    if wrong is not None:
        raise UserError(
            f"{KEY}.{setting}: {wrong!r} is no rank for this model: give a number from 1 to {largest}, the size of its "
            "largest matrix"
        )


def _check_targets(model: PeftModel, targets: str | list[str]) -> None:
    """Refuse names that match no layer; PEFT minds only if none of them does."""
    tuner: Any = model.base_model
    named: list[str] = tuner.targeted_module_names
    for target in targets if isinstance(targets, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in named):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in named}))
            raise UserError(
                f"{KEY}.target_modules: {target!r} matches no layer of the model; what the others match: {known}"
            )


def _refuse_tied(model: PeftModel) -> None:
    """Refuse an adapter on weights that serve as embedding and as head: it would change one of the two."""
    base: Any = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    parts = {
        name: getattr(part, "base_layer", None)
        for name, part in {"embedding": embedding, "head": head}.items()
    }
    plain = [getattr(part, "base_layer", part).weight for part in (embedding, head)]
    if plain[0] is plain[1] and any(part is not None for part in parts.values()):
        raise UserError(
            f"{KEY}.target_modules adapts the embedding or the head, which share their weights in this model: leave "
            "both out"
        )


def _take_weights(model: PeftModel, adapter: str, pretrained: str) -> None:
    """Give the adapter the weights of the one that is started from, if they fit."""
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    try:
        weights: dict[str, Tensor] = load_peft_weights(adapter, device="cpu")
    except Exception as error:
        raise UserError(
            f"{KEY}.adapter={adapter!r} has no weights that can be read ({first_line(error)})"
        ) from error
    wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        name = sorted(dict(wanted.items() ^ found.items()))[0]
        raise UserError(
            f"{KEY}.adapter={adapter!r} was made for another base than model.policy.pretrained={pretrained!r}: {name} "
            f"is {_shape(found.get(name))} in the adapter, {_shape(wanted.get(name))} on the model"
        )
    if next(model.parameters()).device.type != "meta":
        set_peft_model_state_dict(model, weights)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))
