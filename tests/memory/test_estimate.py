"""What the phases of a run take, and which settings let it fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.memory import (
    _HEADS,
    _MIXED,
    _SIZES,
    CONFIG,
    ESTIMATOR,
    GEMMA4,
    SAMPLING,
    peak_of,
    step,
    workload,
)
from support.models import byte_tokenizer, tiny_config
from support.tiny import OTHER_CONFIGS, TRAINED_CONFIGS, Source, kinds, new_model
from transformers import (
    AutoModelForCausalLM,
    BltConfig,
    Gemma3nTextConfig,
    LlamaForSequenceClassification,
    RwkvConfig,
    xLSTMConfig,
)

from sppo_lightning.generation import (
    AutoGenerator,
    ContinuousBatchingGenerator,
    Generator,
    HFGenerator,
    OffPolicy,
    OpenAIServerGenerator,
    VLLMGenerator,
)
from sppo_lightning.generation.hf import MEMORY_SHARE
from sppo_lightning.generation.protocol import SampleRequest
from sppo_lightning.memory.advice import (
    adapters,
    changes,
    diagnosis,
    paged_optimizer,
    quantization,
    serving,
    sharding,
    shorter_prompts,
    smaller_batches,
    smaller_ranks,
    smaller_rewards,
)
from sppo_lightning.memory.estimate import (
    ALLOCATOR_SHARE,
    CONTEXT_BYTES,
    GIB,
    PhaseNeed,
    available_bytes,
)
from sppo_lightning.memory.passes import rule_of_thumb
from sppo_lightning.memory.workload import PairShape, PromptLengths, Workload
from sppo_lightning.pair_forward import AutoForward, SharedForward
from sppo_lightning.policy.config import LoRAConfig, PolicyConfig
from sppo_lightning.policy.footprint import CannotEstimateError, footprint, quantized_matrix
from sppo_lightning.policy.loading import disable_dropout, load_policy
from sppo_lightning.rewards import (
    CombinedReward,
    FunctionReward,
    LengthPenalty,
    PairwiseReward,
    Reward,
    SequenceClassificationReward,
)
from sppo_lightning.rewards.classifier_forward import ACTIVATIONS
from sppo_lightning.rewards.protocol import RewardMemory
from sppo_lightning.types import Prompt

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LORA = LoRAConfig(rank=4, alpha=8)


class Heavy(Reward):
    """Takes what it is told to."""

    def __init__(self, weights: int, waiting: int = 0, lighter: Reward | None = None) -> None:
        self.taken = RewardMemory(weights=weights, conversation=10, waiting=waiting)
        self.lighter = lighter

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [0.0] * len(responses)

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        return self.taken

    def smaller(self) -> dict[str, Reward]:
        return {} if self.lighter is None else {"init_args.weights=5": self.lighter}


class Switches(Reward):
    """Has two settings that save memory."""

    def __init__(self, weights: int, free: bool = False, quantized: bool = False) -> None:
        self.weights, self.free, self.quantized = weights, free, quantized

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [0.0] * len(responses)

    def memory(self, device: torch.device, tokens: int) -> RewardMemory:
        held = self.weights // 4 if self.quantized else self.weights
        return RewardMemory(weights=held, waiting=0 if self.free else held)

    def smaller(self) -> dict[str, Reward]:
        found: dict[str, Reward] = {}
        if not self.free:
            found["init_args.free=true"] = Switches(self.weights, True, self.quantized)
        if not self.quantized:
            found["init_args.quantized=true"] = Switches(self.weights, self.free, True)
        return found


GEMMA3N = Gemma3nTextConfig(
    **_SIZES,
    **_HEADS,
    **_MIXED,
    intermediate_size=[64, 96],
    activation_sparsity_pattern=[0.0, 0.0],
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=_SIZES["vocab_size"],
    num_kv_shared_layers=0,
    laurel_rank=4,
)
# layers without heads
RWKV = RwkvConfig(**_SIZES, attention_hidden_size=32, intermediate_size=64)
XLSTM = xLSTMConfig(
    **{**_SIZES, "hidden_size": 64},
    num_heads=2,
    qk_dim_factor=0.5,
    v_dim_factor=1.0,
    chunkwise_kernel="chunkwise--native_autograd",
)
_BLT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BLT = BltConfig(
    encoder_hash_byte_group_vocab=64,
    encoder_hash_byte_group_size=[3],
    **{f"{part}_config": {**_BLT} for part in ("patcher", "encoder", "decoder", "global")},
)


def phases(**changes: Any) -> dict[str, dict[str, int]]:
    estimate = ESTIMATOR.estimate(workload(**changes))
    return {phase.name: dict(phase.parts) for phase in estimate.phases}


# ------------------------------------------------------------------- phases


def weight_count() -> int:
    return footprint(AutoModelForCausalLM.from_config(CONFIG)).trained_count


def test_full_fine_tuning_holds_weights_gradients_and_states() -> None:
    found, count = phases(), weight_count()
    assert {parts["policy"] for parts in found.values()} == {4 * count + 64}  # with rotary frequencies
    training = found["training"]
    assert training["gradients"] == 4 * count
    assert training["optimizer"] == pytest.approx(8 * count, rel=0.001)
    assert found["sampling"]["copy to sample from"] == 2 * count
    assert set(found["scoring"]) == {"policy", "allocator"}
    assert set(found["reference"]) == {"policy", "activations", "allocator"}


@pytest.mark.parametrize("quantized", [False, True])
def test_the_training_phase_is_the_real_one(quantized: bool, tmp_path: Path) -> None:
    """Adapter, recomputed layers, NF4: a real step with gradients there already, states apart."""
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    config = PolicyConfig(
        str(tmp_path),
        quantization="nf4" if quantized else "none",
        lora=LORA,
        gradient_checkpointing=True,
    )
    parts = phases(policy=config, pairs_per_step=6)["training"]
    model = load_policy(config, compute_dtype=torch.bfloat16).train()
    disable_dropout(model)
    shape = PairShape(3, 40, 24)
    step(model, SharedForward(), shape, torch.bfloat16)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]

    def with_gradients() -> None:
        step(model, SharedForward(), shape, torch.bfloat16)

    truth = peak_of(model, with_gradients) + sum(gradient.nbytes for gradient in gradients)
    assert parts["gradients"] + parts["activations"] == pytest.approx(truth, rel=0.1)


def test_a_quantised_matrix_is_whole_while_it_multiplies() -> None:
    plain, quantized = (
        phases(policy=PolicyConfig("x", quantization=kind, lora=LORA)) for kind in ("none", "nf4")
    )
    widest = 2 * 64 * 176
    for name, part in (("training", "activations"), ("reference", "activations")):
        assert quantized[name][part] - plain[name][part] == widest


def test_an_adapter_is_sampled_without_a_copy() -> None:
    found = phases(policy=PolicyConfig("x", lora=LORA))
    assert "copy to sample from" not in found["sampling"]
    assert found["training"]["gradients"] < found["training"]["policy"] / 5


def test_a_reference_that_stays_is_read_again() -> None:
    assert phases(reference="initial")["reference"]["initial weights"] == 4 * weight_count()
    adapted = phases(reference="initial", policy=PolicyConfig("x", lora=LORA))
    assert "initial weights" not in adapted["reference"]


def test_eyes_are_copied_and_read_again_though_they_are_not_trained() -> None:
    config = OTHER_CONFIGS["mistral3_seeing"]
    count = sum(parameter.numel() for parameter in new_model("mistral3_seeing").parameters())
    found = phases(model_config=config, reference="initial")
    assert found["sampling"]["copy to sample from"] == 2 * count
    assert found["reference"]["initial weights"] == 4 * count
    assert found["training"]["gradients"] < 4 * count


def test_optimizer_states_that_are_carried_stay() -> None:
    found = phases(carry_optimizer=True)
    assert len({parts["optimizer"] for parts in found.values()}) == 1


def test_several_micro_batches_and_processes_take_more() -> None:
    alone, after = phases(), phases(pairs_per_step=6)  # the same estimator tells them apart
    assert after["training"]["activations"] > alone["training"]["activations"]
    assert phases(pairs_per_step=6, processes=2)["training"]["DDP's buckets"] == 4 * weight_count()


def test_sharded_weights_are_full_only_where_they_are_sampled() -> None:
    """Everything that lies in parts is an eighth; a layer at a time is whole, and while sampling a bfloat16 copy."""
    full, sharded = phases(processes=8), phases(processes=8, sharded=True)
    everything = 4 * weight_count()
    for name, parts in sharded.items():
        assert "DDP's buckets" not in parts
        assert parts["policy"] == (everything + 64) // 8, name  # with rotary frequencies
    assert sharded["training"]["gradients"] == everything // 8
    assert sharded["training"]["optimizer"] == full["training"]["optimizer"] // 8
    assert sharded["sampling"]["copy to sample from"] == everything // 2 + 64
    layer = sum(p.nbytes for p in AutoModelForCausalLM.from_config(CONFIG).model.layers[0].parameters())
    rest = everything - CONFIG.num_hidden_layers * layer
    assert sharded["reference"]["gathered weights"] == max(2 * rest, rest + 3 * layer)
    assert sharded["training"]["gathered weights"] == max(2 * rest, rest + 3 * layer) + rest + 3 * layer
    initial = phases(processes=8, sharded=True, reference="initial")
    assert initial["reference"]["initial weights"] == everything // 8


def test_a_sharded_adapter_is_sampled_on_a_full_base() -> None:
    found = phases(processes=8, sharded=True, policy=PolicyConfig("x", lora=LORA))
    assert found["sampling"]["copy to sample from"] == pytest.approx(8 * found["sampling"]["policy"], abs=8)


def test_weights_that_fit_no_device_are_sharded_and_then_served_elsewhere() -> None:
    (sharded,) = sharding(workload(processes=8))
    assert sharded.workload.hardware.sharded
    assert sharded.settings == {
        "trainer.strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
        "trainer.strategy.init_args.data_parallel_size": 8,
        "trainer.strategy.init_args.tensor_parallel_size": 1,
    }
    (elsewhere,) = serving(sharded.workload)
    assert "OpenAIServerGenerator with a server, such as vLLM" in str(elsewhere.settings["data.generator"])
    parts = {p.name: p.parts for p in ESTIMATOR.estimate(elsewhere.workload).phases}["sampling"]
    assert "copy to sample from" not in parts
    assert [*sharding(elsewhere.workload), *serving(workload(processes=8)), *sharding(workload())] == []
    assert list(paged_optimizer(sharded.workload)) == []


@pytest.mark.parametrize(("device", "context"), [(CUDA, CONTEXT_BYTES), (CPU, 0)])
def test_a_device_has_overheads(device: torch.device, context: int) -> None:
    for parts in phases(device=device).values():
        assert parts.pop("CUDA context", 0) == context
        share = ALLOCATOR_SHARE[device.type]
        assert parts.pop("allocator") == pytest.approx(share * sum(parts.values()), abs=1)


def test_responses_are_as_long_as_they_may_be() -> None:
    """40 + 2 * 24 tokens under no limit; under 50 in all, prompts of 26 leave room for the longest responses."""
    assert workload().shape == PairShape(3, 40, 24)
    limited = workload(generator=HFGenerator(**SAMPLING, max_total_tokens=50))
    assert limited.shape == PairShape(3, 26, 24)
    assert limited.longest_sequence == 50


def test_a_model_that_does_not_run_dry_is_estimated_by_rule() -> None:
    estimate = ESTIMATOR.estimate(workload(model_config=TRAINED_CONFIGS["qwen3_moe"]))
    assert re.match(
        r"by a rule of thumb, since the model does not run on .* \(RuntimeError: ", estimate.passes.method
    )
    training = {phase.name: phase.parts for phase in estimate.phases}["training"]
    assert training["activations"] > 0


def test_the_rule_of_thumb_is_no_less_than_the_truth() -> None:
    for checkpointed in (False, True):
        policy = PolicyConfig("x", gradient_checkpointing=checkpointed)
        parts = phases(policy=policy)["training"]
        about = rule_of_thumb(
            CONFIG, workload().shape, dtype=torch.bfloat16, checkpointed=checkpointed, chunk=10**6
        )
        assert 0.7 * parts["activations"] < about < 3 * parts["activations"]


# ----------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", kinds("llama", "gemma2", "gpt_oss", "lfm2", "qwen3_moe"))
def test_the_bound_holds_for_all_kinds_of_models(kind: str) -> None:
    """Also where layers pad short rows, or hold a score for each pair of tokens."""
    load = workload(model_config=TRAINED_CONFIGS[kind], answered=300)
    found, bound = ESTIMATOR.estimate(load), ESTIMATOR.at_most(load)
    assert (bound is None) is (kind in ("qwen3_5", "lfm2"))
    if bound is None:
        return
    for phase, limit in zip(found.phases, bound.phases, strict=True):
        assert phase.total <= limit.total, phase.name


@pytest.mark.parametrize("config", [GEMMA4, GEMMA3N], ids=lambda config: config.model_type)
def test_layers_may_differ(config: Any) -> None:
    load = workload(model_config=config, answered=300)
    found, bound = ESTIMATOR.estimate(load), ESTIMATOR.at_most(load)
    assert bound is not None
    for phase, limit in zip(found.phases, bound.phases, strict=True):
        assert phase.total <= limit.total, phase.name


def test_the_widest_layer_counts() -> None:
    def about(inner: int | list[int]) -> int:
        config = Gemma3nTextConfig(**{**GEMMA3N.to_dict(), "intermediate_size": inner})
        return rule_of_thumb(config, PairShape(1, 8, 8), dtype=torch.float32, checkpointed=True, chunk=8)

    assert about([64, 96]) == about(96) > about(64)


@pytest.mark.parametrize(
    ("config", "missing"),
    [(XLSTM, "num_attention_heads"), (BLT, "num_hidden_layers")],
    ids=["xlstm", "blt"],
)
def test_a_model_that_does_not_tell_is_refused_by_name(config: Any, missing: str) -> None:
    load = workload(model_config=config)
    assert ESTIMATOR.at_most(load) is None
    with pytest.raises(
        CannotEstimateError,
        match=f"the memory of a '{config.model_type}' model cannot be estimated, since its config has no {missing}: "
        "give the generator a batch_size",
    ):
        ESTIMATOR.estimate(load)


def test_a_rule_of_thumb_is_told_from_a_measurement() -> None:
    assert ESTIMATOR.estimate(workload()).passes.measured
    bound = ESTIMATOR.at_most(workload())
    assert bound is not None
    assert not bound.passes.measured
    assert not ESTIMATOR.estimate(workload(model_config=TRAINED_CONFIGS["qwen3_moe"])).passes.measured


def test_prompts_that_are_only_answered_do_not_size_training() -> None:
    short, held_out, long = (
        workload(),
        workload(answered=300, trained=40),
        workload(answered=300),
    )
    assert held_out.shape == short.shape
    assert held_out.longest_sequence == long.longest_sequence
    for made in (ESTIMATOR.estimate, ESTIMATOR.at_most):
        few, some, most = (made(load) for load in (short, held_out, long))
        assert few is not None
        assert some is not None
        assert most is not None
        totals = {
            phase.name: (phase.total, other.total, last.total)
            for phase, other, last in zip(few.phases, some.phases, most.phases, strict=True)
        }
        for name in ("reference", "training"):
            assert totals[name][0] == totals[name][1] < totals[name][2], name
        assert totals["sampling"][0] < totals["sampling"][1] == totals["sampling"][2]


@pytest.mark.parametrize("settings", [{"lora": LORA}, {"lora": LORA, "gradient_checkpointing": True}, {}])
def test_the_bound_holds_for_adapters_and_short_rows(settings: dict[str, Any]) -> None:
    load = workload(policy=PolicyConfig("x", **settings), compute_dtype=torch.float32)
    bound = ESTIMATOR.at_most(load)
    assert bound is not None
    assert ESTIMATOR.estimate(load).fullest.total <= bound.fullest.total


def test_an_engine_counts_layers_that_differ() -> None:
    engine = HFGenerator(**SAMPLING)
    engine.load(Source(AutoModelForCausalLM.from_config(GEMMA4)))
    assert next(engine.generate([SampleRequest((3, 4, 5), (0,))])).responses


class TestEngines:
    def rows(self, generator: Generator, free: int = 1000, device: torch.device = CUDA) -> int:
        return generator.memory(10, free=free, total=2000, device=device).rows

    def test_hf_takes_what_the_memory_holds(self) -> None:
        assert self.rows(HFGenerator(**SAMPLING)) == MEMORY_SHARE * 1000 / 10
        assert self.rows(AutoGenerator(**SAMPLING)) == self.rows(HFGenerator(**SAMPLING))
        assert self.rows(HFGenerator(batch_size=7, **SAMPLING)) == 7
        assert self.rows(HFGenerator(**SAMPLING), free=0) == 1
        assert self.rows(HFGenerator(**SAMPLING), free=10**9) == 512
        assert self.rows(HFGenerator(**SAMPLING), free=10**9, device=CPU) == 128

    def test_continuous_batching(self) -> None:
        assert self.rows(ContinuousBatchingGenerator(**SAMPLING)) == 60
        assert self.rows(ContinuousBatchingGenerator(**SAMPLING), device=CPU) == 16
        assert self.rows(ContinuousBatchingGenerator(batch_size=9, **SAMPLING)) == 9

    def test_a_server_takes_nothing(self) -> None:
        server = OpenAIServerGenerator("http://localhost:1/v1", OffPolicy(), model="m", **SAMPLING)
        found = ESTIMATOR.estimate(workload(generator=server))
        assert found.rows == 0
        assert set(found.phases[0].parts) == {"policy", "allocator"}
        assert "responses do not grow in the policy's own memory" in found.table()

    def test_vllm_takes_its_share(self) -> None:
        found = ESTIMATOR.estimate(workload(generator=VLLMGenerator(0.25, **SAMPLING)))
        sampling = found.phases[0].parts
        assert sampling["engine"] == GIB // 4
        assert "copy to sample from" in sampling
        assert "one response" not in sampling

    def test_an_engine_of_a_users_own_grows_one_row(self) -> None:
        class Own(HFGenerator):
            memory = Generator.memory

        assert self.rows(Own(**SAMPLING)) == 1


# ------------------------------------------------------------------ rewards


def classifier(folder: Path, **settings: Any) -> SequenceClassificationReward:
    return SequenceClassificationReward(str(folder), **settings)


class TestRewards:
    def test_a_reward_model_is_counted_unread(self, tmp_path: Path) -> None:
        model = LlamaForSequenceClassification(tiny_config(num_labels=1))
        model.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()  # only its config is looked at
        held = footprint(model).weights
        found = classifier(tmp_path).memory(CPU, tokens=50)
        assert found == RewardMemory(held, ACTIVATIONS * 32 * 4 * 50, waiting=held)
        half = classifier(tmp_path, max_tokens=20).memory(CUDA, tokens=50)
        assert half.weights == pytest.approx(held / 2, rel=0.01)
        assert half[1:] == (ACTIVATIONS * 32 * 2 * 20, 0)
        quantized = classifier(tmp_path, quantization="nf4", between_phases="free")
        model = model.to(torch.float32)
        assert quantized.memory(CPU, tokens=50).waiting == 0
        assert quantized.memory(CPU, tokens=50).weights == footprint(model, quantized_matrix("nf4")).weights

    def test_what_makes_a_reward_model_smaller(self, tmp_path: Path) -> None:
        found = classifier(tmp_path).smaller()
        assert set(found) == {"init_args.between_phases=free", "init_args.quantization=nf4"}
        changed = found["init_args.quantization=nf4"]
        assert isinstance(changed, SequenceClassificationReward)
        assert changed.quantization == "nf4"
        assert not classifier(tmp_path, quantization="int8", between_phases="free").smaller()

    def test_a_reward_model_that_is_stored_quantised(self, tmp_path: Path) -> None:
        stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
        self.save(tmp_path, stored)
        model = LlamaForSequenceClassification(tiny_config(num_labels=1))
        found = classifier(tmp_path).memory(CPU, tokens=50)
        assert found.weights == footprint(model, quantized_matrix("nf4")).weights
        self.save(tmp_path, {"quant_method": "gptq", "bits": 4})
        load = workload(reward=classifier(tmp_path))
        with pytest.raises(CannotEstimateError, match="of a model with 'gptq' weights cannot be estimated"):
            ESTIMATOR.estimate(load)
        assert ESTIMATOR.at_most(load) is None

    @staticmethod
    def save(folder: Path, stored: dict[str, Any]) -> None:
        tiny_config(num_labels=1, quantization_config=stored).save_pretrained(folder)

    def test_nothing_is_quantised_without_bitsandbytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapted = workload(policy=PolicyConfig("x", lora=LORA))
        assert list(quantization(adapted))
        for module in ("memory.advice", "rewards.classifier"):
            monkeypatch.setattr(f"sppo_lightning.{module}.find_spec", lambda name: None)
        assert not list(quantization(adapted))
        assert set(classifier(tmp_path).smaller()) == {"init_args.between_phases=free"}

    @pytest.mark.parametrize(
        ("device", "saving"), [(CPU, ["between_phases", "quantization"]), (CUDA, ["quantization"])]
    )
    def test_settings_of_a_reward_are_tried_each(
        self, device: torch.device, saving: list[str], tmp_path: Path
    ) -> None:
        """On a GPU nothing waits, so that it gains nothing from waiting elsewhere."""
        tiny_config(num_labels=1).save_pretrained(tmp_path)
        run = workload(reward=classifier(tmp_path), device=device)
        before = totals(run)
        found = [
            key
            for change in smaller_rewards(run)
            for key in change.settings
            if totals(change.workload) != before
        ]
        assert found == [f"data.reward.init_args.{name}" for name in saving]

    def test_the_first_setting_of_a_reward_may_be_enough(self, tmp_path: Path) -> None:
        """A model that waits in the way of training is let go, though in four bits it would still be too much."""
        config = tiny_config(num_labels=1, vocab_size=200_000)  # an embedding stays as it is
        config.save_pretrained(tmp_path)
        run: dict[str, Any] = {"reward": classifier(tmp_path), "batch_size": 1, "pairs_per_step": 1}
        enough = need(**{**run, "reward": classifier(tmp_path, between_phases="free")})
        assert suggested(enough, **run) == "set data.reward.init_args.between_phases=free"

    def test_settings_of_a_reward_go_together(self) -> None:
        """Both are needed, and the second one changes the reward that the first has changed."""
        run: dict[str, Any] = {"policy": PolicyConfig("x", gradient_checkpointing=True), "batch_size": 1}
        run |= {"pairs_per_step": 1, "pair_forward": AutoForward(256)}
        enough = need(**run)
        message = suggested(enough, **run, reward=Switches(2 * enough))
        assert message == "set data.reward.init_args.free=true and data.reward.init_args.quantized=true"

    def test_rewards_around_others_pass_on(self) -> None:
        assert FunctionReward(lambda *_: []).memory(CPU, 5) == RewardMemory()
        light = Heavy(5)
        heavy = Heavy(100, waiting=7, lighter=light)
        penalty = LengthPenalty(heavy, per_character=1.0)
        assert penalty.memory(CPU, 5) == heavy.taken
        both = CombinedReward({"one": penalty, "two": Heavy(30, waiting=1)}, {"one": 1.0, "two": 1.0})
        assert both.memory(CPU, 5) == RewardMemory(weights=130, conversation=10, waiting=8)
        (setting, smaller), *others = both.smaller().items()
        assert setting == "init_args.rewards.one.init_args.reward.init_args.weights=5"
        assert smaller.memory(CPU, 5).weights == 35
        assert not others

    def test_a_judge_is_counted(self) -> None:
        from sppo_lightning.rewards import FunctionJudge

        class Big(FunctionJudge):
            def memory(self, device: torch.device, tokens: int) -> RewardMemory:
                return RewardMemory(weights=tokens)

        assert PairwiseReward(Big(lambda *_: 0.5)).memory(CPU, 5).weights == 5
        assert PairwiseReward(FunctionJudge(lambda *_: 0.5)).memory(CPU, 5) == RewardMemory()

    def test_a_reward_model_waits_in_the_memory_of_a_cpu(self) -> None:
        found = phases(reward=Heavy(100, waiting=70))
        assert found["scoring"]["reward model"] == 100
        assert found["scoring"]["one conversation"] == 10
        assert "waiting reward model" not in found["scoring"]
        assert {found[name]["waiting reward model"] for name in ("sampling", "reference", "training")} == {70}


# ------------------------------------------------------------------- advice


def test_the_table_says_what_people_ask() -> None:
    lines = ESTIMATOR.estimate(workload(device=CUDA)).table().splitlines()
    assert lines[0].split() == ["GiB", "sampling", "scoring", "reference", "training"]
    assert [line.split("  ")[0] for line in lines[-6:]][:3] == ["allocator", "CUDA context", "total"]
    assert "CUDA context" + 3 * " " in lines[-5]
    assert lines[-5].split()[2:] == ["0.70"] * 4
    assert lines[-3] == "1.00 GiB available: fits"
    assert re.fullmatch(r"responses of the greatest length that grow at once: \d+", lines[-2])
    assert lines[-1] == "activations: SharedForward, run on fake tensors"


def test_a_paged_optimizer_is_told() -> None:
    import bitsandbytes

    estimate = ESTIMATOR.estimate(workload(device=CUDA, optimizer=bitsandbytes.optim.PagedAdamW8bit))
    assert "optimizer" not in estimate.phases[3].parts
    assert estimate.table().endswith(
        "optimizer: paged, so that its states move to host memory where the device is full"
    )


def diagnosed(available: int, **changes: Any) -> str | None:
    run = workload(**changes)
    estimator = replace(ESTIMATOR, available=available)
    return diagnosis(estimator, run, estimator.estimate(run))


def suggested(available: int, **changes: Any) -> str:
    """What a run that does not fit is told to do."""
    message = diagnosed(available, **changes)
    assert message is not None
    return message.split(": ", 1)[1]


def need(**changes: Any) -> int:
    return ESTIMATOR.estimate(workload(**changes)).fullest.total


def totals(run: Workload) -> list[int]:
    return [phase.total for phase in ESTIMATOR.estimate(run).phases]


def with_settings(run: Workload, message: str) -> list[Workload]:
    """A run with the settings that a message names, one more each time."""
    found, named = [], message.removeprefix("set ").split(" and ")
    while named:
        run, taken = next(
            (change.workload, len(change.settings))
            for change in changes(run)
            if [f"{key}={value}" for key, value in change.settings.items()] == named[: len(change.settings)]
        )
        found.append(run)
        named = named[taken:]
    return found


def test_a_run_that_fits_needs_no_words() -> None:
    assert diagnosed(need()) is None


def test_what_changes_least_is_proposed_first() -> None:
    message = diagnosed(need() - 1)
    assert message == "training needs about 0.0 GiB, but cpu has 0.0 GiB: set data.batch_size=1"
    run = {"batch_size": 1, "pairs_per_step": 1}
    assert suggested(need(**run) - 1, **run) == "set model.policy.gradient_checkpointing=true"


@pytest.mark.parametrize(
    "share",
    [0.99, 0.9, 0.8, 0.7, 0.5, 0.3, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.2, 0.1))],
)
def test_settings_that_are_proposed_suffice(share: float) -> None:
    """One or several; without the last one the run does not fit."""
    run = {"pairs_per_step": 12, "batch_size": 12}
    available = int(share * need(**run))
    message = suggested(available, **run)
    if share == 0.99:
        assert message == "set data.batch_size=6"  # no smaller one
    if message.startswith("no settings suffice"):
        assert share == 0.1
        return
    *others, last = with_settings(workload(**run), message)
    assert max(totals(last)) <= available
    assert all(max(totals(other)) > available for other in others)


@pytest.mark.slow
def test_every_setting_makes_a_run_smaller() -> None:
    run = workload(
        policy=PolicyConfig("x", lora=LoRAConfig(rank=64, alpha=128)),
        answered=256,
        generator=HFGenerator(max_new_tokens=256, temperature=1.0),
        pairs_per_step=12,
        batch_size=4,
        reward=Heavy(1000, lighter=Heavy(1)),
    )
    found = list(changes(run))
    assert [change.settings for change in found] == [
        {"data.batch_size": 2},
        {"data.batch_size": 1},
        {"model.policy.gradient_checkpointing": "true"},
        {
            "model.pair_forward": "sppo_lightning.pair_forward.AutoForward",
            "model.pair_forward.init_args.chunk": 256,
        },
        {"data.reward.init_args.weights": "5"},
        {"model.optimizer": "bitsandbytes.optim.PagedAdamW8bit"},
        {"model.policy.quantization": "nf4"},
        {"model.policy.lora.rank": 16, "model.policy.lora.alpha": "32"},
        {"data.generator.init_args.max_new_tokens": 128},
        {"data.max_prompt_tokens": 128},
    ]
    before = sum(totals(run))
    for change in found:
        assert sum(totals(change.workload)) < before, change.settings


def test_full_fine_tuning_may_become_an_adapter() -> None:
    (found,) = adapters(workload())
    assert found.settings == {"model.policy.lora.rank": 16, "model.policy.lora.alpha": "32"}
    assert found.workload.policy.lora == LoRAConfig(rank=16, alpha=32.0)


def test_the_rank_keeps_its_scale() -> None:
    stabilised = LoRAConfig(rank=64, alpha=16, rslora=True)
    (found,) = smaller_ranks(workload(policy=PolicyConfig("x", lora=stabilised)))
    assert found.settings == {"model.policy.lora.rank": 16, "model.policy.lora.alpha": "8"}
    assert not list(smaller_ranks(workload(policy=PolicyConfig("x", lora=LORA))))


@pytest.mark.slow
def test_settings_that_do_not_suffice_alone_are_put_together() -> None:
    run: dict[str, Any] = {"policy": PolicyConfig("x", lora=LORA), "pairs_per_step": 6, "batch_size": 6}
    least = PolicyConfig("x", lora=LORA, gradient_checkpointing=True)
    message = suggested(need(policy=least, pairs_per_step=6, batch_size=1), **run)
    assert message == "set data.batch_size=1 and model.policy.gradient_checkpointing=true"


def test_settings_that_others_make_needless_are_left_out() -> None:
    """Smaller batches would help too, but recomputing is enough for training, and nothing but less for the reward."""
    run: dict[str, Any] = {"policy": PolicyConfig("x", lora=LORA), "pairs_per_step": 2, "batch_size": 2}
    recomputed = PolicyConfig("x", lora=LORA, gradient_checkpointing=True)
    available = need(**{**run, "policy": recomputed})
    assert available < need(**{**run, "batch_size": 1}) < need(**run)
    message = suggested(available, **run, reward=Heavy(2 * available, lighter=Heavy(5)))
    assert message == "set data.reward.init_args.weights=5 and model.policy.gradient_checkpointing=true"


@pytest.mark.slow
def test_settings_that_need_each_other_stay_together() -> None:
    """A server samples for policies that are sharded only; of these two neither is left out."""
    deep = tiny_config(vocab_size=64, hidden_size=64, num_hidden_layers=24)
    run: dict[str, Any] = {"model_config": deep, "policy": PolicyConfig("x", gradient_checkpointing=True)}
    run |= {"batch_size": 1, "pairs_per_step": 8, "processes": 8, "answered": 4}
    server = OpenAIServerGenerator("http://localhost:1/v1", OffPolicy(), model="m", **SAMPLING)
    enough = need(**run, sharded=True, generator=server)
    message = suggested(enough, **run)
    assert message.startswith("set trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy and ")
    assert " and data.generator=sppo_lightning.generation.OpenAIServerGenerator with a server" in message


def test_settings_that_bring_a_run_no_nearer_are_left_out() -> None:
    """Smaller batches and recomputing help training, but scoring is what does not fit."""
    run: dict[str, Any] = {"policy": PolicyConfig("x", lora=LORA), "pairs_per_step": 2, "batch_size": 2}
    enough = need(**run)
    parts = {name: Heavy(2 * enough, lighter=Heavy(5)) for name in ("one", "two")}
    message = suggested(enough, **run, reward=CombinedReward(parts, {"one": 1.0, "two": 1.0}))
    assert message == (
        "set data.reward.init_args.rewards.one.init_args.weights=5 and "
        "data.reward.init_args.rewards.two.init_args.weights=5"
    )


def test_shorter_prompts_are_shorter_to_train_on_too() -> None:
    (found,) = shorter_prompts(workload(answered=300, trained=200))
    assert found.workload.prompts == PromptLengths(answered=150, trained=150)
    (found,) = shorter_prompts(workload(answered=300, trained=40))
    assert found.workload.prompts == PromptLengths(answered=150, trained=40)


def test_batches_divide_a_step() -> None:
    found = [change.settings for change in smaller_batches(workload(pairs_per_step=9, batch_size=9))]
    assert found == [{"data.batch_size": 1}]  # neither 4 nor 2
    assert not list(smaller_batches(workload(pairs_per_step=9, batch_size=9, processes=2)))


def test_a_reward_model_that_is_too_large_is_made_smaller() -> None:
    big = need() + 1000
    message = diagnosed(big, reward=Heavy(2 * big, lighter=Heavy(5)))
    assert message is not None
    assert message.startswith("scoring needs about ")
    assert message.endswith(": set data.reward.init_args.weights=5")


def test_a_run_that_nothing_helps_is_told_how_near_it_came() -> None:
    assert re.search(
        r"^no settings suffice: with .*quantization=nf4.* still needs about 0\.0 GiB; use a smaller model or a larger "
        r"device$",
        suggested(10),
    )


def test_what_no_setting_changes_is_said() -> None:
    message = suggested(need(), reward=Heavy(10**12))
    assert message == "no setting changes that; use a smaller model or a larger device"


def test_engines_that_cannot_take_a_setting_are_left_alone() -> None:
    policy = PolicyConfig("x", lora=LORA)
    served = partial(OpenAIServerGenerator, "http://localhost:1/v1", model="m", **SAMPLING)
    assert list(quantization(workload(policy=policy)))
    assert list(quantization(workload(policy=policy, generator=served(OffPolicy()))))
    assert not list(quantization(workload(policy=policy, generator=VLLMGenerator(**SAMPLING))))


def test_memory_that_can_be_had_is_asked_for() -> None:
    assert available_bytes(CPU) > 2**20
    assert PhaseNeed("sampling", {"a": 1, "b": 2}).total == 3
