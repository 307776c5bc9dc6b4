"""The policy that is being trained: its states, swapped in and out, with full weights and with sharded ones."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.models import byte_tokenizer
from support.processes import Processes, together
from support.tiny import batch_of, new_model, pairs_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sppo_lightning.pair_forward import AutoForward, PlainForward
from sppo_lightning.pair_forward.layouts import PlainLayout
from sppo_lightning.policy import sharding
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.lora import copied_weights, replaced_weights
from sppo_lightning.policy.spec import PolicySpec
from sppo_lightning.policy.trained import ShardedPolicy, TrainedPolicy, UnshardedPolicy, load_trained_policy
from sppo_lightning.training.reference import check_reference_is_frozen
from sppo_lightning.types import UserError

LORA = LoRAConfig(rank=2, alpha=4)


def loaded(policy: Path, folder: Path, mesh: DeviceMesh | None, **config: Any) -> TrainedPolicy:
    spec = PolicySpec(PolicyConfig(str(policy), **config))
    spec.check(compute_dtype=torch.bfloat16, device=torch.device("cpu"))
    torch.manual_seed(0)  # of a fresh adapter
    return load_trained_policy(
        spec, mesh, steps=lambda: 0, release=AutoForward().release, workspace=folder / ".sampling"
    )


def change(policy: TrainedPolicy) -> None:
    """Other weights, the same for unsharded and for sharded ones."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            sharding.local(parameter.detach()).add_(0.1 * sharding.shard_like(noise, parameter))


# ---------------------------------------------------------------- full weights


def test_a_policy_is_loaded_to_be_trained(tiny_policy: Path, tmp_path: Path) -> None:
    lora = LoRAConfig(rank=2, alpha=4, dropout=0.5)
    policy = loaded(tiny_policy, tmp_path, None, lora=lora)
    assert isinstance(policy, UnshardedPolicy)
    assert not policy.is_sharded
    assert policy.model.training
    dropouts = {m.p for m in policy.model.modules() if isinstance(m, nn.Dropout)}
    assert dropouts == {0.5}  # the adapter's own
    policy.cleanup_sampling_weights()
    assert list(tmp_path.iterdir()) == []


def test_the_current_snapshot_stays_until_weights_change(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they change without an optimizer step, as when a checkpoint is loaded; each is hashed once."""
    policy = loaded(tiny_policy, tmp_path, None)
    taken: list[str] = []
    monkeypatch.setattr(
        "sppo_lightning.policy.snapshot.fingerprint",
        lambda *given: taken.append(fingerprint(*given)) or taken[-1],
    )
    first = policy.current()
    digests = [policy.current().fingerprint(), policy.current().fingerprint()]
    assert policy.current() is first
    with torch.no_grad():
        next(iter(policy.model.parameters())).view(-1)[0] += 1
    digests.append(policy.current().fingerprint())
    policy.model.load_state_dict({name: value + 1 for name, value in policy.model.state_dict().items()})
    digests.append(policy.current().fingerprint())
    assert digests[0] == digests[1] == first.fingerprint()
    assert len(set(digests)) == len(taken) == 3
    assert digests[-1] == fingerprint(policy.model, str(tiny_policy))


def test_an_optimizer_step_ends_a_snapshot(tiny_policy: Path, tmp_path: Path) -> None:
    """Also one by kernels that torch does not see."""
    policy = loaded(tiny_policy, tmp_path, None)
    steps = 0
    policy.steps = lambda: steps
    before = policy.current()
    assert policy.current() is before
    steps = 1
    assert policy.current() is not before


def test_the_initial_full_policy_is_read_again_and_freed(tiny_policy: Path, tmp_path: Path) -> None:
    policy = loaded(tiny_policy, tmp_path, None)
    before = policy.current().fingerprint()
    change(policy)
    with policy.initial() as initial:
        assert initial.model is not policy.model
        assert initial.fingerprint() == before != policy.current().fingerprint()
        assert next(initial.model.parameters()).dtype == torch.float32
        held = weakref.ref(initial.model)
    gc.collect()
    assert held() is None  # although the snapshot is kept, as an engine does
    assert initial.fingerprint() == before


def test_the_initial_policy_of_a_fresh_adapter_is_its_base(tiny_policy: Path, tmp_path: Path) -> None:
    """Whose digest is the location's."""
    policy = loaded(tiny_policy, tmp_path, None, lora=LORA)
    change(policy)
    trained = policy.current().fingerprint()
    with policy.initial() as initial:
        assert initial.model is policy.model
        assert initial.fingerprint() == hashlib.sha256(str(tiny_policy).encode()).hexdigest()[:32] != trained
    assert policy.current().fingerprint() == trained


def test_the_initial_policy_of_an_adapter_that_was_started_from_is_that(
    tiny_policy: Path, tmp_path: Path
) -> None:
    first = loaded(tiny_policy, tmp_path, None, lora=LORA)
    change(first)
    first.save(tmp_path / "adapter", is_rank0=True)
    policy = loaded(tiny_policy, tmp_path, None, lora=LoRAConfig(adapter=str(tmp_path / "adapter")))
    started = policy.current().fingerprint()
    change(policy)
    trained = policy.current().fingerprint()
    with policy.initial() as initial:
        assert initial.fingerprint() == started != trained
        initial.export(tmp_path / "initial")
    exported = load_file(tmp_path / "initial/adapter_model.safetensors")
    for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items():
        assert torch.equal(exported[name], value)
    assert policy.current().fingerprint() == trained


def test_a_policy_is_put_back_after_an_error(tiny_policy: Path, tmp_path: Path) -> None:
    policy = loaded(tiny_policy, tmp_path, None, lora=LORA)
    change(policy)
    trained = policy.current().fingerprint()
    with pytest.raises(InterruptedError), policy.initial() as initial:
        raise InterruptedError
    assert not hasattr(initial, "model")
    assert policy.current().fingerprint() == trained


def test_rank_0_saves_a_full_policy(tiny_policy: Path, tmp_path: Path) -> None:
    policy = loaded(tiny_policy, tmp_path, None)
    policy.save(tmp_path / "other", is_rank0=False)
    assert not (tmp_path / "other").exists()
    policy.save(tmp_path / "saved", is_rank0=True)
    found = load_file(tmp_path / "saved/model.safetensors")
    assert all(
        torch.equal(found[name], value)
        for name, value in load_file(tiny_policy / "model.safetensors").items()
    )


# ------------------------------------------------------------- sharded weights


def test_quantised_weights_are_not_sharded(tiny_policy: Path, tmp_path: Path) -> None:
    mesh: Any = object()
    with pytest.raises(
        UserError, match=r"quantization=nf4 and .*set quantization: none, or use strategy ddp"
    ):
        loaded(tiny_policy, tmp_path, mesh, quantization="nf4", lora=LORA)


def compare_states(mesh: DeviceMesh, tiny: Path, folder: Path, lora: LoRAConfig | None) -> None:
    ranks, first = Processes(mesh), mesh.get_local_rank() == 0
    full, policy = loaded(tiny, folder, None, lora=lora), loaded(tiny, folder, mesh, lora=lora)
    assert isinstance(full, UnshardedPolicy)
    assert isinstance(policy, ShardedPolicy)
    change(full)
    change(policy)
    expected, snapshot = full.current(), policy.current()
    assert snapshot.end_token_ids == expected.end_token_ids
    assert snapshot.embedding_rows == expected.embedding_rows  # the rows of all shards
    assert snapshot.fingerprint() == expected.fingerprint()
    ids = torch.arange(3, 40)[None]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids).logits
        return found

    snapshot.sync_sampling_weights(ranks, needed=False)
    assert not (folder / ".sampling").exists()  # nobody samples
    snapshot.sync_sampling_weights(ranks, needed=not first)
    sampled = snapshot.sampling_model()
    assert not sharding.is_sharded(sampled)
    assert not sampled.training
    torch.testing.assert_close(logits(sampled), logits(expected.sampling_model()), rtol=0, atol=0)
    if not first:  # a server's hand-over, by one process alone
        snapshot.export(folder / "handed")
        config = folder / "handed/generation_config.json"
        config.write_text("{}")  # as a hand-over does
        assert (folder / ".sampling/policy/generation_config.json").read_text() != "{}"
    dist.barrier()
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert (folder / "handed" / weights).stat().st_nlink == 2
    dist.barrier()
    policy.cleanup_sampling_weights()
    dist.barrier()
    assert not (folder / ".sampling").exists()
    policy.current().sync_sampling_weights(ranks, needed=True)  # once more, although no weight has changed
    assert (folder / ".sampling/policy" / weights).exists()

    policy.save(folder / "saved", is_rank0=first)
    full.save(folder / f"full-{ranks.rank}", is_rank0=True)
    dist.barrier()
    for name in ("config.json", "generation_config.json") if lora is None else ("generation_config.json",):
        saved = json.loads((folder / "saved" / name).read_text())
        assert saved == json.loads((folder / f"full-{ranks.rank}" / name).read_text())
    assert (folder / "saved" / weights).read_bytes() == (folder / f"full-{ranks.rank}" / weights).read_bytes()

    with full.initial() as initial:
        before, digest = logits(initial.model.eval()), initial.fingerprint()
        answers = logits(initial.sampling_model())
    with policy.initial() as initial:
        assert sharding.is_sharded(initial.model)
        torch.testing.assert_close(logits(initial.model.eval()), before, rtol=0, atol=0)
        assert initial.fingerprint() == digest != expected.fingerprint()
        initial.sync_sampling_weights(ranks, needed=True)
        torch.testing.assert_close(logits(initial.sampling_model()), answers, rtol=0, atol=0)
        if lora is None:
            initial.export(folder / f"initial-{ranks.rank}")
            found = load_file(folder / f"initial-{ranks.rank}" / weights)
            assert all(value.dtype == torch.bfloat16 for value in found.values())
        else:
            with pytest.raises(UserError, match=r"is its adapter switched off, which no folder holds"):
                initial.export(folder / f"initial-{ranks.rank}")
    assert policy.current().fingerprint() == full.current().fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_sharded_policy_shows_what_an_unsharded_one_does(
    tiny_policy: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Fingerprint, sampling model, exports and the initial policy."""
    together(compare_states, tiny_policy, tmp_path, lora)


def sync_vision_adapter(mesh: DeviceMesh, model: Path, adapter: Path, folder: Path) -> None:
    """An adapter that another tool put on the vision tower too goes along as it was."""
    policy = loaded(model, folder, mesh, lora=LoRAConfig(adapter=str(adapter)))
    change(policy)
    policy.current().sync_sampling_weights(Processes(mesh), needed=True)
    found = load_file(folder / ".sampling/policy/adapter_model.safetensors")
    given = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == given.keys()
    same = {name for name in found if torch.equal(found[name], given[name])}
    assert same == {name for name in found if "vision_tower" in name} != set()


def test_a_sharded_adapter_on_a_vision_tower_is_synced_in_full(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    new_model("mistral3_seeing").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(new_model("mistral3_seeing"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    together(sync_vision_adapter, tmp_path / "model", tmp_path / "adapter", tmp_path / "run")


def swap_adapters(mesh: DeviceMesh, tiny: Path, folder: Path) -> None:
    policy = loaded(tiny, folder, mesh, lora=LoRAConfig(rank=2, alpha=4))
    rows = batch_of(pairs_of(), PlainLayout(2)).rows

    def logps(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat(PlainForward().logps(model, rows))

    change(policy)
    before = logps(policy.model)
    held = copied_weights(policy.model)
    with replaced_weights(policy.model, {name: torch.zeros_like(value) for name, value in held.items()}):
        between = logps(policy.model)
    with policy.initial() as initial:
        torch.testing.assert_close(between, logps(initial.model))
    assert not torch.equal(between, before)
    assert torch.equal(logps(policy.model), before)
    check_reference_is_frozen(policy, logps)


def test_sharded_adapters_are_swapped_and_put_back(tiny_policy: Path, tmp_path: Path) -> None:
    together(swap_adapters, tiny_policy, tmp_path)


# ------------------------------------------------------------- weights kept to revert to


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_kept_weights_come_back_to_the_last_bit(
    tiny_policy: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    policy = loaded(tiny_policy, tmp_path, None, lora=lora)
    change(policy)
    kept, digest = copied_weights(policy.model), policy.current().fingerprint()
    policy.keep(tmp_path / "elsewhere", is_rank0=False)
    assert not (tmp_path / "elsewhere").exists()
    policy.keep(tmp_path / "kept", is_rank0=True)
    change(policy)
    assert policy.current().fingerprint() != digest
    policy.restore(tmp_path / "kept")
    assert policy.current().fingerprint() == digest
    found = copied_weights(policy.model)
    assert all(torch.equal(found[name], value) for name, value in kept.items())


def test_weights_of_another_policy_or_none_are_not_restored(tiny_policy: Path, tmp_path: Path) -> None:
    policy = loaded(tiny_policy, tmp_path, None)
    loaded(tiny_policy, tmp_path, None, lora=LORA).keep(tmp_path / "adapter", is_rank0=True)
    digest = policy.current().fingerprint()
    with pytest.raises(UserError, match=r"weights\.safetensors holds other weights"):
        policy.restore(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"weights\.safetensors cannot be read"):
        policy.restore(tmp_path / "nowhere")
    assert policy.current().fingerprint() == digest


def keep_shards(mesh: DeviceMesh, tiny: Path, folder: Path, lora: LoRAConfig | None) -> None:
    policy = loaded(tiny, folder, mesh, lora=lora)
    change(policy)
    kept, digest = copied_weights(policy.model), policy.current().fingerprint()
    policy.keep(folder / "kept", is_rank0=mesh.get_local_rank() == 0)
    change(policy)
    moved = copied_weights(policy.model)
    assert not any(torch.equal(moved[name], value) for name, value in kept.items() if value.numel())
    policy.restore(folder / "kept")
    assert policy.current().fingerprint() == digest
    found = copied_weights(policy.model)
    assert all(torch.equal(found[name], value) for name, value in kept.items())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_kept_shards_come_back_to_the_last_bit(
    tiny_policy: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    together(keep_shards, tiny_policy, tmp_path, lora)
