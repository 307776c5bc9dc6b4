"""A reward model at a real vLLM, beside the same one in the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import byte_tokenizer, tiny_config
from support.rewards import questions
from support.vllm_server import VLLMServer, vllm_server
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerBase

from sppo_lightning.rewards import SequenceClassificationReward, ServerReward, VLLMPooling
from sppo_lightning.types import UserError

pytestmark = pytest.mark.vllm

SERVED = ["--served-model-name", "reward", "--runner", "pooling"]


def save_reward_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForSequenceClassification(tiny_config(**shape, num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reward_of(server: VLLMServer) -> ServerReward:
    return ServerReward(server.url.removesuffix("/v1"), VLLMPooling("reward"), max_retries=1)


def test_pooling_gives_the_scores_of_the_model_in_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The check at a run's start waits for a server that still loads its model."""
    caplog.set_level("INFO")
    folder = save_reward_model(tmp_path / "reward", byte_tokenizer())
    own = SequenceClassificationReward(str(folder), dtype="float32")
    own.load(torch.device("cpu"))
    expected = own.score(*questions())
    own.unload()
    with vllm_server(folder, tmp_path / "log", *SERVED, wait=False) as server:
        served = reward_of(server)
        served.check()
        served.load(torch.device("cpu"))
        found = served.score(*questions())
        served.unload()
    assert "of startup_timeout=600 s" in caplog.text
    assert found.reasons == {}
    torch.testing.assert_close(torch.tensor(found.rewards), torch.tensor(expected.rewards), rtol=0, atol=1e-3)
    assert torch.tensor(expected.rewards).std() > 0.01


def test_a_reward_model_without_a_chat_template_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward", byte_tokenizer(chat_template=None))
    with (
        vllm_server(folder, tmp_path / "log", *SERVED) as server,
        pytest.raises(
            UserError, match=r"the reward model has none of its own: start the server with --chat-template"
        ),
    ):
        reward_of(server).check()
