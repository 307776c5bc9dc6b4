"""Weights spread over two gloo processes give what whole ones give."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from support.models import byte_tokenizer
from support.tiny import batch_of, new_model, pairs_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sppo_lightning.iteration.reference_pass import reference_pass
from sppo_lightning.pair_forward import AutoForward, PlainForward
from sppo_lightning.pair_forward.layouts import PlainLayout
from sppo_lightning.pair_forward.parity import ParityCheck
from sppo_lightning.policy import sharding
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.fingerprint import fingerprint
from sppo_lightning.policy.live import LivePolicy
from sppo_lightning.policy.loading import disable_dropout
from sppo_lightning.policy.lora import copied_weights, replaced_weights
from sppo_lightning.policy.rounding import check_updates_survive
from sppo_lightning.store import reference_parts
from sppo_lightning.store.pairs import PairTable
from sppo_lightning.store.reference_parts import ReferenceParts
from sppo_lightning.training.hardware import check_hardware
from sppo_lightning.training.optimizers import build_optimizer, clip_gradients
from sppo_lightning.training.reference import check_reference_is_frozen
from sppo_lightning.types import UserError

WORLD = 2


def together(work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(mesh, *arguments)`` on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_begin, (port, work, arguments), nprocs=WORLD)


def _begin(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        work(init_device_mesh("cpu", (WORLD,), mesh_dim_names=("data_parallel",)), *arguments)
    finally:
        dist.destroy_process_group()
    # not through the interpreter's end: a mesh keeps gloo's threads, and one that lets go of a tensor then aborts
    os._exit(0)


class Processes:
    """Ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank, self.world_size = mesh.get_local_rank(), mesh.size()

    def check(self) -> None:
        """None fails here."""

    def barrier(self, name: str) -> None:
        dist.barrier()

    def gather(self, values: list[Any]) -> list[list[Any]]:
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, values)
        return gathered

    def same(self, value: Any) -> Any:
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]


def spread(kind: str, mesh: DeviceMesh, *, checkpointed: bool = False) -> nn.Module:
    """The tiny model over all processes; all but the first start from a model without weights."""
    model = new_model(kind)
    if mesh.get_local_rank() > 0:
        model = model.to("meta")
        model.tie_weights()
    prepare(model, checkpointed=checkpointed)
    sharding.spread(model, mesh)
    return model


def prepare(model: Any, *, checkpointed: bool) -> None:
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    disable_dropout(model)
    model.train()


def a_step(model: nn.Module, *, half: bool) -> tuple[dict[str, Tensor], str, str]:
    """Log-probs, their clipped gradients and the weights after a step, the digest before, the forward that served."""

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    forward = AutoForward(chunk=4)  # several chunks of the head, most of them computed again
    digest = fingerprint(model, "tiny")
    told = forward.prepare(model, ParityCheck(30, context, lambda agreed: agreed))
    rows = batch_of(pairs_of(), forward.layout(2)).rows
    with torch.no_grad(), context():
        found = {"before": torch.cat(forward.logps(model, rows))}
    with context():
        logps = torch.cat(forward.logps(model, rows))
    (logps * torch.linspace(-1, 2, len(logps)).double()).sum().backward()
    clip_gradients(model.parameters(), 1.0, algorithm="norm")
    clip_gradients(model.parameters(), 0.05, algorithm="value")
    found["logps"] = logps.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = sharding.whole(parameter.grad).clone()
    parameters = list(model.parameters())
    optimizer = build_optimizer(None, parameters, learning_rate=1e-3, weight_decay=0.1, clips_unscaled=False)
    optimizer.step()
    assert fingerprint(model, "tiny") != digest
    found |= {f"{name} after": sharding.whole(p.detach()).clone() for name, p in model.named_parameters()}
    return found, digest, told


def compare_steps(mesh: DeviceMesh, kind: str, checkpointed: bool, half: bool) -> None:
    whole = new_model(kind)
    prepare(whole, checkpointed=checkpointed)
    expected, digest, told = a_step(whole, half=half)
    model = spread(kind, mesh, checkpointed=checkpointed)
    assert sharding.is_sharded(model)
    assert all(sharding.local(p.detach()).numel() < p.numel() for p in model.parameters())
    found, spread_digest, spread_told = a_step(model, half=half)
    assert spread_told == told
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    if not half:
        torch.testing.assert_close(found["logps"], expected["logps"], rtol=0, atol=0)
    assert spread_digest == digest


@pytest.mark.parametrize(
    ("kind", "checkpointed", "half"),
    [("llama", False, False), ("llama", True, True), ("gemma3_capped", True, False), ("gpt2", False, False)],
)
def test_a_step_is_the_one_of_whole_weights(kind: str, checkpointed: bool, half: bool) -> None:
    """Tied and separate heads, shared and plain rows, recomputed layers: same log-probs, gradients and digest."""
    together(compare_steps, kind, checkpointed, half)


def go_on_after_a_failure(mesh: DeviceMesh) -> None:
    model = spread("llama", mesh)
    rows = batch_of(pairs_of(), PlainLayout(2)).rows
    expected = torch.cat(PlainForward().logps(model, rows))
    layer = model.model.layers[1]  # type: ignore[union-attr]
    own = layer.mlp.forward

    def failing(*args: Any) -> None:
        raise RuntimeError("cannot")

    layer.mlp.forward = failing
    with pytest.raises(RuntimeError, match="cannot"):
        PlainForward().logps(model, rows)
    layer.mlp.forward = own
    if not hasattr(model, "reset_iter_state"):  # before torch 2.13
        with pytest.raises(UserError, match=r"cannot go on from a forward that failed .* or use torch 2\.13"):
            sharding.recover(model)
        return
    sharding.recover(model)
    assert all(isinstance(p, sharding.DTensor) for p in model.parameters())  # none is left whole
    found = torch.cat(PlainForward().logps(model, rows))
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(isinstance(p, sharding.DTensor) and p.grad is not None for p in model.parameters())


def test_a_forward_that_failed_is_followed_by_one_that_does_not() -> None:
    together(go_on_after_a_failure)


def live(policy: Path, folder: Path, mesh: DeviceMesh | None, **config: Any) -> LivePolicy:
    found = LivePolicy(
        PolicyConfig(str(policy), **config),
        steps=lambda: 0,
        release=AutoForward().release,
        workspace=lambda: folder / ".sampling",
    )
    dtype, device = torch.bfloat16, torch.device("cpu")
    found.check(compute_dtype=dtype, device=device)
    torch.manual_seed(0)  # of a fresh adapter
    found.load(dtype, device, mesh)
    return found


def change(policy: LivePolicy) -> None:
    """Other weights, the same for whole and for spread ones."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            sharding.local(parameter.detach()).add_(0.1 * sharding.part_of(noise, parameter))


def show_faces(mesh: DeviceMesh, tiny: Path, folder: Path, lora: LoRAConfig | None) -> None:
    ranks, first = Processes(mesh), mesh.get_local_rank() == 0
    whole, policy = live(tiny, folder, None, lora=lora), live(tiny, folder, mesh, lora=lora)
    assert policy.is_sharded
    assert policy.end_token_ids == whole.end_token_ids
    change(whole)
    change(policy)
    assert policy.fingerprint() == whole.fingerprint()
    ids = torch.arange(3, 40)[None]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids).logits
        return found

    policy.publish(ranks, wanted=False)
    assert not (folder / ".sampling").exists()  # nobody samples
    policy.publish(ranks, wanted=not first)
    sampled = policy.sampling_model()
    assert not sharding.is_sharded(sampled)
    assert not sampled.training
    torch.testing.assert_close(logits(sampled), logits(whole.sampling_model()), rtol=0, atol=0)
    if not first:  # a server's hand-over, by one process alone
        policy.export(folder / "handed")
        config = folder / "handed/generation_config.json"
        config.write_text("{}")  # as a hand-over does
        assert (folder / ".sampling/policy/generation_config.json").read_text() != "{}"
    dist.barrier()
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert (folder / "handed" / weights).stat().st_nlink == 2
    dist.barrier()
    policy.withdraw()
    dist.barrier()
    assert not (folder / ".sampling").exists()

    policy.save(folder / "saved", first=first)
    whole.save(folder / f"whole-{ranks.rank}", first=True)
    dist.barrier()
    for name in ("config.json", "generation_config.json") if lora is None else ("generation_config.json",):
        saved = json.loads((folder / "saved" / name).read_text())
        assert saved == json.loads((folder / f"whole-{ranks.rank}" / name).read_text())
    assert (folder / "saved" / weights).read_bytes() == (
        folder / f"whole-{ranks.rank}" / weights
    ).read_bytes()

    with whole.initial() as model:
        before, digest = logits(model.eval()), whole.fingerprint()
        expected = logits(whole.sampling_model())
    with policy.initial() as model:
        assert sharding.is_sharded(model)
        torch.testing.assert_close(logits(model.eval()), before, rtol=0, atol=0)
        assert policy.fingerprint() == digest != whole.fingerprint()
        policy.publish(ranks, wanted=True)
        torch.testing.assert_close(logits(policy.sampling_model()), expected, rtol=0, atol=0)
    assert policy.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=4)], ids=["full", "lora"])
def test_a_spread_policy_shows_the_faces_of_a_whole_one(
    tiny_policy: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Fingerprint, sampling model, exports and the initial policy."""
    together(show_faces, tiny_policy, tmp_path, lora)


def hand_over_eyes(mesh: DeviceMesh, model: Path, adapter: Path, folder: Path) -> None:
    """An adapter that another tool put on the eyes too goes along as it was."""
    policy = live(model, folder, mesh, lora=LoRAConfig(adapter=str(adapter)))
    change(policy)
    policy.publish(Processes(mesh), wanted=True)
    found = load_file(folder / ".sampling/policy/adapter_model.safetensors")
    given = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == given.keys()
    same = {name for name in found if torch.equal(found[name], given[name])}
    assert same == {name for name in found if "vision_tower" in name} != set()


def test_a_spread_adapter_on_eyes_is_handed_over_whole(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    new_model("mistral3_seeing").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(new_model("mistral3_seeing"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    together(hand_over_eyes, tmp_path / "model", tmp_path / "adapter", tmp_path / "run")


def swap_adapters(mesh: DeviceMesh, tiny: Path, folder: Path) -> None:
    policy = live(tiny, folder, mesh, lora=LoRAConfig(rank=2, alpha=4))
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
        torch.testing.assert_close(between, logps(initial))
    assert not torch.equal(between, before)
    assert torch.equal(logps(policy.model), before)
    check_reference_is_frozen(policy, logps)


def test_spread_adapters_are_swapped_and_put_back(tiny_policy: Path, tmp_path: Path) -> None:
    together(swap_adapters, tiny_policy, tmp_path)


class SpreadReference:
    """Reads pairs with a spread model; counts how often."""

    reference_stays = False
    reads_together = True

    def __init__(self, model: nn.Module) -> None:
        self.model, self.batches = model, 0

    def reference_fingerprint(self) -> str:
        return fingerprint(self.model, "tiny")

    def reference_pass(self) -> Any:
        return nullcontext()

    def reference_logps(self, batch: Any) -> Any:
        self.batches += 1
        with torch.no_grad():
            return PlainForward().logps(self.model, batch.rows)


def read_reference(mesh: DeviceMesh, folder: Path, pairs_count: int, passes: int) -> None:
    reference_parts.FEWEST = 1  # a part for each process, where there are pairs
    reference = SpreadReference(spread("llama", mesh))
    reports: list[tuple[int, int, int]] = []
    pairs = pairs_of()[:pairs_count]
    found, _ = reference_pass(
        PairTable.collect(pairs),
        reference,
        stored=ReferenceParts(folder),
        layout=PlainLayout(2),
        batch_size=1,
        first_fingerprint=None,
        ranks=Processes(mesh),
        report=lambda *progress: reports.append(progress),
    )
    assert reference.batches == passes
    mine = passes if mesh.get_local_rank() == 0 else pairs_count - passes
    assert [done for done, _, _ in reports[1:]] == list(range(1, mine + 1))
    with torch.no_grad():
        alone = PlainForward().logps(new_model(), batch_of(pairs, PlainLayout(2)).rows)
    torch.testing.assert_close(
        torch.tensor([pair.reference_chosen_logp for pair in found], dtype=torch.float64),
        alone.chosen,
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(("count", "passes"), [(1, 1), (3, 2)])
def test_processes_without_a_batch_read_along(tmp_path: Path, count: int, passes: int) -> None:
    """Else the others would wait for their parts of the weights."""
    together(read_reference, tmp_path, count, passes)


def refuse(mesh: DeviceMesh, tiny: Path, folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"quantization=nf4 and .*set quantization: none, or use strategy ddp"
    ):
        live(tiny, folder, mesh, quantization="nf4", lora=LoRAConfig(rank=2, alpha=4))
    model = spread("llama", mesh)
    check_updates_survive(model.parameters(), 1e-3)
    with pytest.raises(UserError, match="is lost to rounding in 100%"):
        check_updates_survive(model.parameters(), 1e-12)  # on all processes alike
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    with pytest.raises(
        UserError, match="AdamW8bit does not know weights that are spread over processes: leave"
    ):
        build_optimizer(
            AdamW8bit, list(model.parameters()), learning_rate=1e-3, weight_decay=0.0, clips_unscaled=False
        )


def test_what_cannot_be_spread_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    together(refuse, tiny_policy, tmp_path)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({}, r"with data_parallel_size=auto, tensor_parallel_size=auto for 1 processes: .*say both sizes"),
        (
            {"data_parallel_size": 1},
            r"tensor_parallel_size=auto .*\{data_parallel_size: 1, tensor_parallel_size: 1\}",
        ),
        ({"data_parallel_size": 2, "tensor_parallel_size": 1}, "data_parallel_size=2, .* for 1 processes"),
        (
            {"data_parallel_size": 1, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
            "save_distributed_checkpoint=false would gather .*: leave it out",
        ),
    ],
)
def test_sizes_are_explicit(settings: dict[str, Any], wording: str) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=ModelParallelStrategy(**settings), logger=False
    )
    with pytest.raises(UserError, match=wording):
        check_hardware(trainer)


def test_one_size_per_process_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy: Any = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False)
    check_hardware(trainer)
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())
    with pytest.raises(
        UserError,
        match=r"strategy=FSDPStrategy is not supported: use one device or ddp; for a model .*FSDP2: strat",
    ):
        check_hardware(trainer)
