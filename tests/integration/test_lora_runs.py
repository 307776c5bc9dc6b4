"""Runs that train an adapter: what they start from, what they are held to, and on what."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from support.models import byte_tokenizer, tiny_config
from support.runs import cli_arguments
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sppo_lightning.__main__ import main
from sppo_lightning.policy.snapshot import PolicySnapshot
from sppo_lightning.policy.trained import TrainedPolicy

WritePrompts = Callable[..., Path]
LORA = {"model__policy__lora__rank": 4, "model__policy__lora__alpha": 8}


def fit(policy: Path, prompts: Path, root: Path, **changes: Any) -> Path:
    main(["fit", *cli_arguments(policy, prompts, root, **changes)])
    return root


def manifest(run: Path, iteration: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / f"iterations/{iteration}/manifest.json").read_text())
    return content


def logp(model: Any, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + n, token]) for n, token in enumerate(response))


@pytest.fixture(scope="module")
def first_run(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter other runs start from."""
    folder = tmp_path_factory.mktemp("first")
    lines = [json.dumps({"id": f"p{n}", "prompt": f"Count to {n}"}) for n in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return fit(tiny_policy, folder / "prompts.jsonl", folder / "run", data__iterations=1, **LORA)


@pytest.mark.parametrize(
    "engine", ["HFGenerator", pytest.param("ContinuousBatchingGenerator", marks=pytest.mark.slow)]
)
def test_an_adapter_on_the_embedding(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, engine: str
) -> None:
    run = fit(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        data__iterations=1,
        data__generator=f"sppo_lightning.generation.{engine}",
        model__policy__lora__target_modules="[q_proj,embed_tokens]",
        **LORA,
    )
    trained = load_file(run / "policy/adapter_model.safetensors")
    assert any("embed_tokens" in name and weight.count_nonzero() for name, weight in trained.items())


@pytest.mark.parametrize("reference", ["initial", "previous_iteration"])
def test_a_run_starts_from_an_adapter_and_may_be_held_to_it(
    tiny_policy: Path, first_run: Path, write_prompts: WritePrompts, tmp_path: Path, reference: str
) -> None:
    """Held to the adapter, not to the base without it."""
    run = fit(
        tiny_policy,
        write_prompts(),
        tmp_path / "run",
        model__policy__lora__adapter=first_run / "policy",
        model__reference=reference,
        data__eval_prompts=write_prompts("eval.jsonl", count=4, start=50),
    )
    started = AutoPeftModelForCausalLM.from_pretrained(first_run / "policy").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()
    for iteration, held_to in (("000", True), ("001", reference == "initial")):
        pair = pq.read_table(run / f"iterations/{iteration}/pairs.parquet").to_pylist()[0]
        ids = pair["prompt_token_ids"], pair["chosen_token_ids"]
        assert abs(logp(base, *ids) - logp(started, *ids)) > 1e-3
        assert (abs(pair["reference_chosen_logp"] - logp(started, *ids)) < 1e-4) is held_to
    first, second = manifest(run, "000"), manifest(run, "001")
    assert first["reference_fingerprint"] == first["policy_fingerprint"]
    initial = reference == "initial"
    assert (second["reference_fingerprint"] == first["reference_fingerprint"]) is initial
    assert (second["reference_fingerprint"] == second["policy_fingerprint"]) is not initial
    trained = load_file(run / "policy/adapter_model.safetensors")
    before = load_file(first_run / "policy/adapter_model.safetensors")
    assert trained.keys() == before.keys()
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())


class StopInSecondIteration(pl.Callback):
    """Ends the run once iteration 1 has its data."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise InterruptedError


def test_the_adapter_that_a_run_is_held_to_must_stay_what_it_was(
    tiny_policy: Path,
    first_run: Path,
    write_prompts: WritePrompts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, prompts = tmp_path / "adapter", write_prompts()
    shutil.copytree(first_run / "policy", adapter)
    settings = {
        "model__policy__lora__adapter": adapter,
        "model__reference": "initial",
        "trainer__callbacks": f'[{{"class_path": "{__name__}.StopInSecondIteration"}}]',
    }
    with pytest.raises(InterruptedError):
        fit(tiny_policy, prompts, tmp_path / "run", **settings)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run/iterations/001")
    with pytest.raises(SystemExit):
        fit(tiny_policy, prompts, tmp_path / "run", **settings)
    assert re.search(
        r"the policy that the run started from has fingerprint \w+, but iteration 0 was trained against \w+: put back "
        r"the model \(model\.policy\.pretrained, or lora\.adapter\)",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "run/iterations/001/pairs.parquet").exists()


@pytest.mark.parametrize(
    ("quantization", "precision", "tolerance"),
    [
        ("none", "32-true", 1e-5),
        pytest.param("nf4", "32-true", 1e-5, marks=pytest.mark.slow),
        pytest.param("nf4", "bf16-mixed", 0.02, marks=pytest.mark.slow),
        ("int8", "bf16-mixed", 0.02),
    ],
)
def test_log_ratios_are_zero_at_an_iterations_start(
    write_prompts: WritePrompts, tmp_path: Path, quantization: str, precision: str, tolerance: float
) -> None:
    """On quantised weights too: the reference pass and the first step read the same policy, in other batches.

    Tolerances are of a response's sum, nats; its tokens are at most 8.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path / "policy")
    byte_tokenizer().save_pretrained(tmp_path / "policy")
    run = fit(
        tmp_path / "policy",
        write_prompts(),
        tmp_path / "run",
        model__policy__quantization=quantization,
        model__policy__gradient_checkpointing=True,
        trainer__precision=precision,
        **LORA,
    )
    with (run / "metrics.csv").open(newline="") as file:
        first = next(row for row in csv.DictReader(file) if row["train/loss"])
    assert float(first["train/loss"]) == pytest.approx(math.log(2), abs=tolerance)
    for side in ("chosen", "rejected"):
        assert abs(float(first[f"train/logratios/{side}"])) < tolerance


@pytest.mark.slow
def test_probing_the_reference_leaves_the_run_as_it_is(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, settings = write_prompts(), {"model__reference": "initial", "data__iterations": 1, **LORA}
    probed = fit(tiny_policy, prompts, tmp_path / "probed", **settings)
    monkeypatch.setattr("sppo_lightning.training.reference.check_reference_is_frozen", lambda *_: None)
    not_probed = fit(tiny_policy, prompts, tmp_path / "not", **settings)
    weights = [load_file(run / "policy/adapter_model.safetensors") for run in (probed, not_probed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_reference_that_moves_with_the_adapter_ends_the_run(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a wrong reference would be: the adapter left on."""

    @contextmanager
    def left_on(self: TrainedPolicy) -> Iterator[PolicySnapshot]:
        yield self.current()

    monkeypatch.setattr(TrainedPolicy, "initial", left_on)
    with pytest.raises(
        RuntimeError, match=r"log-probs moved by up to .* nat when the adapter did: it is not frozen"
    ):
        fit(tiny_policy, write_prompts(), tmp_path / "run", model__reference="initial", **LORA)
    assert not (tmp_path / "run/iterations").exists()


def test_a_policy_without_a_chat_template(
    tiny_policy: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    """Plain text, or a template of the user's own, which the export keeps."""
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    for path in policy.glob("chat_template*"):
        path.unlink()
    byte_tokenizer(chat_template=None).save_pretrained(policy)
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}Q: {{ messages[0]['content'] }} A:")
    seen = {}
    for name, given in (("plain", "plain"), ("own", str(template))):
        run = fit(
            policy,
            write_prompts(),
            tmp_path / name,
            data__iterations=1,
            model__policy__chat_template=given,
        )
        row = pq.read_table(run / "iterations/000/pairs.parquet").to_pylist()[0]
        seen[name] = byte_tokenizer().decode(row["prompt_token_ids"])
    assert seen["plain"].startswith("Say ")
    assert seen["own"].startswith("<bos>Q: Say ")
    assert seen["own"].endswith(" A:")
    assert (tmp_path / "own/policy/chat_template.jinja").read_text() == template.read_text()
    assert not (tmp_path / "plain/policy/chat_template.jinja").exists()
