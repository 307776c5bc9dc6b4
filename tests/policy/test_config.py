"""Settings of a policy that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.types import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": "nf4"},
            r"model\.policy\.quantization=nf4 freezes the weights, so that there is nothing to train: set "
            r"model\.policy\.lora too, or quantization: none",
        ),
        (
            {"quantization": "int8", "lora": LoRAConfig(rank=1, alpha=1, dora=True)},
            r"model\.policy\.lora\.dora=true and quantization=int8 do not go together: .*; use nf4 or none",
        ),
        (
            {"double_quantization": False, "quantization": "int8", "lora": LoRAConfig(rank=1, alpha=1)},
            r"model\.policy\.double_quantization=false with quantization=int8 would do nothing: only nf4 has scales "
            r"to quantise; leave it out",
        ),
    ],
)
def test_a_policy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        PolicyConfig("policy", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"needs rank and alpha \(or adapter, to start from one\): set model\.policy\.lora\.rank"),
        ({"rank": 4}, r"needs rank and alpha .*: set model\.policy\.lora\.alpha"),
        ({"rank": 0, "alpha": 8}, r"\.rank=0 must be at least 1"),
        ({"rank": 4, "alpha": 0}, r"\.alpha=0 must be greater than 0"),
        ({"rank": 4, "alpha": 8, "dropout": 1.0}, r"\.dropout=1\.0 must lie in \[0, 1\)"),
        (
            {"adapter": "a", "rank": 4},
            r"\.rank=4 and model\.policy\.lora\.adapter do not go together: the adapter says its own; leave one of "
            "them out",
        ),
        ({"adapter": "a", "dora": True}, r"\.dora=True and .* do not go together"),
        ({"adapter": "a", "target_modules": ["q_proj"]}, r"\.target_modules=\['q_proj'\] and "),
    ],
)
def test_an_adapter(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.policy\.lora ?{message}"):
        LoRAConfig(**settings)


def test_an_adapter_to_start_from_takes_dropout() -> None:
    assert LoRAConfig(adapter="a", dropout=0.1).rank is None
