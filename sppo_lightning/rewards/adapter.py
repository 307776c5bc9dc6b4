"""A reward model that is a LoRA adapter (PEFT, ``SEQ_CLS``) on a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo_lightning.policy.weights import read_model
from sppo_lightning.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADS = ("score.", "classifier.", "classification_head.")
"""How names of a classification head begin: the adapter brings it, its base has none."""
LAST_LAYERS = (
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
)
"""How names of a head's last weights end, which has a row for each logit."""


class RewardAdapter(NamedTuple):
    """An adapter's folder and what it was made for."""

    folder: str
    base: str
    labels: int  # logits of its head
    weights: dict[str, tuple[int, ...]]  # shapes by name

    def configure(self, config: PretrainedConfig) -> None:
        """Give the base's settings as many logits as the adapter's head has."""
        config.num_labels = self.labels

    def read(self, *, given: str, **options: Any) -> PreTrainedModel:
        """Return the base with the adapter merged into it.

        Args:
            given: key and value of the config, for errors.
            options: of ``from_pretrained``.

        Raises:
            UserError: if base or adapter lack weights, or do not fit each other.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from transformers import AutoModelForSequenceClassification

        model = read_model(
            AutoModelForSequenceClassification,
            self.base,
            given=f"{given}, whose base is {self.base!r},",
            later=HEADS,
            num_labels=self.labels,
            **options,
        )
        try:
            adapted = PeftModel.from_pretrained(model, self.folder)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{given} does not fit its base {self.base!r} ({first_line(error)})") from error
        wanted = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
        different = sorted(dict(wanted.items() ^ self.weights.items()))
        if different:
            raise UserError(
                f"{given} does not fit its base {self.base!r}: {different[0]} is not the same in both"
            )
        merged: PreTrainedModel = adapted.merge_and_unload()
        return merged


def reward_adapter(pretrained: str, base: str | None, *, key: str) -> RewardAdapter | None:
    """Return the adapter that a folder holds; ``None``: it holds none.

    Args:
        pretrained: the folder.
        base: its base, instead of the one that it names.
        key: of the config, for errors.

    Raises:
        UserError: if it is an adapter that gives no reward, or cannot be read.
    """
    folder = Path(pretrained)
    settings = folder / "adapter_config.json"
    given = f"{key}={pretrained!r}"
    if not settings.is_file():
        if base is not None:
            raise UserError(f"{given} is no adapter, so that it has no base: leave out base")
        return None
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads(settings.read_bytes())
        task, named = config.get("task_type"), config.get("base_model_name_or_path")
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"{given} cannot be read as an adapter ({first_line(error)})") from error
    heads = [shape for name, shape in shapes.items() if name.endswith(LAST_LAYERS)]
    if task != "SEQ_CLS" or not heads:
        raise UserError(
            f"{given} is an adapter for {task or 'no task'}, which gives no reward: give one that was trained for "
            "sequence classification (SEQ_CLS) with its head, or a whole reward model"
        )
    if base is None and not named:
        raise UserError(f"{given} names no base: set {key.rpartition('.')[0]}.base")
    return RewardAdapter(pretrained, base or str(named), heads[0][0], shapes)
