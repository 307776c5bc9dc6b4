"""A reward model: any sequence-classification model with one logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sppo_lightning.pretrained import DTYPES, load_model_config, load_tokenizer
from sppo_lightning.prompts import template_token_ids
from sppo_lightning.rewards.protocol import Reward
from sppo_lightning.types import Message, Prompt, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "data.reward.init_args.pretrained"


class SequenceClassificationReward(Reward):
    """Scores with the logit of a ``…ForSequenceClassification`` model.

    The conversation goes through the model's own chat template; a model without one gets the text pair
    (prompt, response). A response whose conversation exceeds ``max_tokens`` scores NaN, and is dropped under
    a named reason: a truncated answer has no honest score.

    Args:
        pretrained: a HF folder or hub id.
        batch_size: conversations scored at once.
        max_tokens: longest conversation, in the reward model's tokens; ``None``: what the model and its
            tokenizer allow.
        dtype: dtype of the weights; ``auto``: bfloat16 on CUDA, float32 on CPU.
        trust_remote_code: run code that comes with the model.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int = 16,
        max_tokens: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"SequenceClassificationReward.batch_size={batch_size} must be at least 1")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"SequenceClassificationReward.max_tokens={max_tokens} must be at least 1")
        self.pretrained = pretrained
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._padding: int | None = None

    def check(self) -> None:
        """Read the model's configuration and require a single logit."""
        config = load_model_config(
            self.pretrained,
            key=KEY,
            trust_remote_code=self.trust_remote_code,
            expect="reward",
        )
        if config.num_labels != 1:
            raise UserError(
                f"{KEY}={self.pretrained!r} has {config.num_labels} logits; a reward model has one"
            )
        self._tokenizer = load_tokenizer(self.pretrained, key=KEY, trust_remote_code=self.trust_remote_code)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Require conversations that the reward model can read; each sequence of roles is tried once."""
        assert self._tokenizer is not None
        tried: set[tuple[str, ...]] = set()
        for prompt in prompts:
            roles = tuple(turn["role"] for turn in prompt.messages)
            if roles in tried:
                continue
            tried.add(roles)
            if self._tokenizer.chat_template is None and len(roles) > 1:
                raise UserError(
                    f"prompt {prompt.id!r} has several messages, but the reward model {self.pretrained!r} has no chat "
                    "template and reads one text: use single prompts, or another data.reward"
                )
            self._encode(prompt, "a")

    def load(self, device: torch.device) -> None:
        """Load model and tokenizer onto ``device``."""
        from transformers import AutoModelForSequenceClassification

        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._tokenizer = load_tokenizer(self.pretrained, key=KEY, trust_remote_code=self.trust_remote_code)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.pretrained,
            dtype=DTYPES.get(self.dtype, default),
            trust_remote_code=self.trust_remote_code,
        )
        self._padding = model.config.get_text_config().pad_token_id
        self._model = model.to(device).eval()

    def unload(self) -> None:
        """Free the model."""
        self._model = None
        self._tokenizer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the model's logit for each conversation."""
        assert self._model is not None
        assert self._tokenizer is not None
        encoded = [
            self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)
        ]
        scores = [float("nan")] * len(encoded)
        limit = self.max_tokens or self._position_limit()
        fitting = [row for row, tokens in enumerate(encoded) if len(tokens["input_ids"]) <= limit]
        fitting.sort(key=lambda row: len(encoded[row]["input_ids"]))
        for start in range(0, len(fitting), self.batch_size):
            rows = fitting[start : start + self.batch_size]
            logits = self._logits([encoded[row] for row in rows])
            for row, score in zip(rows, logits.float().tolist(), strict=True):
                scores[row] = score
        return scores

    def _logits(self, rows: Sequence[dict[str, list[int]]]) -> Tensor:
        """Return one logit a conversation, ``[len(rows)]``.

        A decoder's logit is read at the last token that is not the model's padding token. Hence that token
        pads, whatever the tokenizer would take; for a model without one, a token that ends no conversation.
        """
        assert self._model is not None
        padding = self._padding
        if padding is None:
            ends = {row["input_ids"][-1] for row in rows}
            padding = next(token for token in range(len(ends) + 1) if token not in ends)
            self._model.config.get_text_config().pad_token_id = padding
        batch = {
            name: pad_sequence(
                [torch.tensor(row[name]) for row in rows],
                batch_first=True,
                padding_value=padding if name == "input_ids" else 0,
            ).to(self._model.device)
            for name in rows[0]
        }
        logits: Tensor = self._model(**batch).logits
        return logits[:, 0]

    def _position_limit(self) -> int:
        assert self._model is not None
        assert self._tokenizer is not None
        positions = getattr(self._model.config, "max_position_embeddings", None) or 2**31
        return int(min(positions, self._tokenizer.model_max_length))

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        assert self._tokenizer is not None
        if self._tokenizer.chat_template is None:
            pair = self._tokenizer(
                [prompt.text], [response]
            )  # not in lists, an empty response would be no pair
            return {name: values[0] for name, values in pair.items()}
        answer = Message(role="assistant", content=response)
        ids = template_token_ids(self._tokenizer, (*prompt.messages, answer), add_generation_prompt=False)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
