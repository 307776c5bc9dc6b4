"""A training step: the reference is the policy itself, weights load once, and the host waits for nothing."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support.runs import cli_arguments
from support.tiny import batch_of, new_model, pairs_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sppo_lightning.__main__ import main
from sppo_lightning.losses import DPOLoss
from sppo_lightning.module import PreferenceModule
from sppo_lightning.pair_forward import AutoForward, PairForward, PlainForward, SharedForward
from sppo_lightning.pair_forward.logprobs import summed
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.loading import load_base_model

LORA = LoRAConfig(rank=4, alpha=8)


@pytest.mark.parametrize("forward_class", [PlainForward, AutoForward])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["previous_iteration", "initial"])
def test_reference_and_policy_agree_in_every_bit_at_the_start(
    tiny_policy: Path, reference: Any, lora: LoRAConfig | None, forward_class: type[PairForward]
) -> None:
    config = PolicyConfig(str(tiny_policy), lora=lora)
    module = PreferenceModule(config, DPOLoss(0.1), 1e-3, reference, pair_forward=forward_class())
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.check()
    module.configure_model()
    batch = batch_of(pairs_of(), module.pair_layout(20))
    with module.reference.held():
        reference_logps = summed(module.reference.logps_by_token(batch))
    assert module.policy is not None
    policy = module.pair_forward.logps(module.policy, batch.rows)
    assert policy.chosen.requires_grad
    assert not reference_logps.chosen.requires_grad
    for ours, theirs in zip(policy, reference_logps, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "loads"),
    [
        ({}, 1),
        ({"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8}, 1),
        (
            {
                "model__policy__lora__rank": 4,
                "model__policy__lora__alpha": 8,
                "model__reference": "initial",
            },
            1,
        ),
        ({"model__reference": "initial"}, 3),  # each iteration reads its reference once, and frees it
    ],
    ids=["full", "lora", "lora, initial", "full, initial"],
)
def test_weights_are_loaded_once(
    tiny_policy: Path,
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    settings: dict[str, Any],
    loads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[int] = []
    monkeypatch.setattr(
        "sppo_lightning.policy.loading.load_base_model",
        lambda *given, **options: loaded.append(1) or load_base_model(*given, **options),
    )
    changes = {"data__generator__max_new_tokens": 4, "data__pairs_per_step": 2, **settings}
    main(["fit", *cli_arguments(tiny_policy, write_prompts(), tmp_path / "run", **changes)])
    assert (tmp_path / "run/iterations/001/pairs.parquet").exists()
    assert len(loaded) == loads


@pytest.mark.filterwarnings("ignore")
def test_what_a_step_draws_depends_on_the_step_alone(
    tiny_policy: Path, write_prompts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout of a run is the same whatever else draws from torch's generator, before or between the steps."""
    changes = {
        "model__policy__lora": json.dumps({"rank": 4, "alpha": 8, "dropout": 0.3}),
        "data__generator__max_new_tokens": 4,
        "data__iterations": 1,
        "data__pairs_per_step": 2,
    }
    prompts = write_prompts()
    after = PreferenceModule.on_train_batch_end

    def drawing(*given: Any) -> None:
        torch.rand(3)
        after(*given)

    main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / "quiet", **changes)])
    monkeypatch.setattr(PreferenceModule, "on_train_batch_end", drawing)
    main(["fit", *cli_arguments(tiny_policy, prompts, tmp_path / "drawing", **changes)])
    weights = [
        (tmp_path / run / "policy/adapter_model.safetensors").read_bytes() for run in ("quiet", "drawing")
    ]
    assert weights[0] == weights[1]


# ------------------------------------------------------------ waiting for the device

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}


def whose() -> str:
    """The package whose code asked: that of the innermost frame outside torch."""
    files = [frame.filename for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    name = next(file for file in reversed(files) if file != __file__)
    return next(
        (package for package in ("sppo_lightning", "torchmetrics", "transformers") if f"/{package}/" in name),
        name,
    )


class Waits(TorchDispatchMode):
    """Records who makes the host wait for values, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            self.found.append((func.overloadpacket.__name__, whose()))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Records who reads values, by method."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.found.append((func.__name__, whose()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gemma3_capped", "qwen3_moe"])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("forward_class", [PlainForward, SharedForward])
def test_a_micro_step_waits_for_nothing(
    forward_class: type[PairForward], chunk: int | None, kind: str
) -> None:
    """But the library's own look at the positions of padded rows, once a pass and kind of mask."""
    forward = forward_class(chunk)
    module = PreferenceModule(
        PolicyConfig("made in the test"),
        DPOLoss(0.1),
        1e-3,
        reference="previous_iteration",
        pair_forward=forward,
    )
    module.policy = new_model(kind).train()
    module.trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=1)  # type: ignore[assignment]
    batch = batch_of(pairs_of(), forward.layout(2))
    batch = batch._replace(slot=batch.slot._replace(last_in_step=False, step=1))
    with Waits() as waits, Reads() as reads:
        module.training_step(batch, 1).backward()
    found = {package for _, package in waits.found + reads.found}
    assert found == ({"transformers"} if forward_class is PlainForward else set())
    with Waits() as waits, Reads() as reads:
        module.step_metrics.result()["train/loss"].item()
    assert waits.found
    assert reads.found  # the recorders do see such things
