"""What engines and exports get of one state of a policy's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fakes import Alone
from torch import nn

from sppo_lightning.generation import PolicySource
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.loading import load_policy
from sppo_lightning.policy.snapshot import ShardedSnapshot, UnshardedSnapshot
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.types import UserError

LORA = LoRAConfig(rank=2, alpha=4)


def snapshot_of(
    policy: Path,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    lora: LoRAConfig | None = None,
    released: list[nn.Module] | None = None,
) -> UnshardedSnapshot:
    spec = PolicySpec(PolicyConfig(str(policy), lora=lora))
    spec.check(compute_dtype=compute_dtype, device=torch.device("cpu"))
    model = load_policy(spec.config, compute_dtype=compute_dtype).train()
    return UnshardedSnapshot(spec, model, [].append if released is None else released.append)


def test_a_snapshot_is_what_an_engine_takes(tiny_policy: Path) -> None:
    snapshot = snapshot_of(tiny_policy)
    source: PolicySource = snapshot
    source.sync_sampling_weights(Alone(), needed=True)
    assert source.tokenizer is snapshot.spec.tokenizer
    assert source.end_token_ids == {snapshot.spec.tokenizer.eos_token_id}
    assert source.embedding_rows == snapshot.model.config.vocab_size  # type: ignore[union-attr]
    assert not source.quantized


def test_end_tokens_are_the_generation_configs_where_it_names_some(tiny_policy: Path) -> None:
    snapshot = snapshot_of(tiny_policy)
    snapshot.model.generation_config.eos_token_id = [1, 7]  # type: ignore[union-attr]
    assert snapshot.end_token_ids == {1, 7}


def test_a_full_policy_is_sampled_from_a_copy_in_the_compute_dtype(tiny_policy: Path) -> None:
    released: list[nn.Module] = []
    snapshot = snapshot_of(tiny_policy, released=released)
    sampled = snapshot.sampling_model()
    assert released == [snapshot.model]
    assert sampled is not snapshot.model
    assert {parameter.dtype for parameter in sampled.parameters()} == {torch.bfloat16}
    assert not sampled.training
    assert snapshot.model.training


@pytest.mark.parametrize(("dtype", "lora"), [(torch.float32, None), (torch.bfloat16, LORA)])
def test_a_policy_is_its_own_sampling_model_where_nothing_is_cast(
    tiny_policy: Path, dtype: torch.dtype, lora: LoRAConfig | None
) -> None:
    released: list[nn.Module] = []
    snapshot = snapshot_of(tiny_policy, compute_dtype=dtype, lora=lora, released=released)
    assert snapshot.sampling_model() is snapshot.model
    assert released == [snapshot.model]
    assert not snapshot.model.training


def test_an_export_is_in_the_dtype_that_the_policy_is_held_in(tiny_policy: Path, tmp_path: Path) -> None:
    released: list[nn.Module] = []
    snapshot = snapshot_of(tiny_policy, released=released)
    snapshot.export(tmp_path / "export")
    assert released == [snapshot.model]
    found = load_file(tmp_path / "export/model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "export/chat_template.jinja").exists()


def test_an_adapter_that_is_switched_off_has_no_folder(tiny_policy: Path, tmp_path: Path) -> None:
    snapshot = snapshot_of(tiny_policy, lora=LORA)
    with (
        snapshot.model.disable_adapter(),  # type: ignore[operator]
        pytest.raises(
            UserError, match=r"is its adapter switched off, which no folder holds: evaluate it in fit, or"
        ),
    ):
        snapshot.export(tmp_path / "export")
    assert not (tmp_path / "export").exists()
    snapshot.export(tmp_path / "export")
    assert (tmp_path / "export/adapter_model.safetensors").exists()


def test_a_snapshot_is_fingerprinted_once(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of(tiny_policy)
    expected = fingerprint(snapshot.model, str(tiny_policy))
    assert snapshot.fingerprint() == expected
    monkeypatch.setattr("sppo_lightning.policy.snapshot.fingerprint", None)
    assert snapshot.fingerprint() == expected


def test_sharded_weights_are_synced_before_they_are_sampled_or_exported(
    tiny_policy: Path, tmp_path: Path
) -> None:
    full = snapshot_of(tiny_policy)
    snapshot = ShardedSnapshot(full.spec, full.model, tmp_path / "workspace")
    with pytest.raises(AssertionError, match=r"sync_sampling_weights\(\) comes first"):
        snapshot.sampling_model()
    with pytest.raises(AssertionError, match=r"sync_sampling_weights\(\) comes first"):
        snapshot.export(tmp_path / "export")
