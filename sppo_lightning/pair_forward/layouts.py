"""How the pairs of a micro-batch are laid out for the model.

Shapes: B pairs; their 2B responses are the B chosen ones, then the B rejected ones. P and R tokens of the longest
prompt and of the longest response, N tokens of all responses. S rows of T tokens go through the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

Tokens = Sequence[int]


class SharedPrompts(NamedTuple):
    """Where the tokens of a packed row stand: B prompts, then 2B responses, end to end."""

    lengths: tuple[int, ...]  # tokens of each of the 3B segments
    prompt_lengths: Tensor  # [B] long
    padded: (
        Tensor | None
    )  # [B * P + 2B * R] long, the token at each place of the padded segments; None: no padding
    places: Tensor | None  # [T] long, the place of each token among the padded segments
    query_starts: Tensor  # [3B + 1] int32, first token of each segment
    key_starts: Tensor  # [3B + 1] int32, the same where a response comes with its prompt's tokens before it

    @property
    def prompts(self) -> tuple[int, int]:
        """B and P."""
        count = len(self.lengths) // 3
        return count, max(self.lengths[:count])

    @property
    def responses(self) -> tuple[int, int]:
        """2B and R."""
        lengths = self.lengths[len(self.lengths) // 3 :]
        return len(lengths), max(lengths)


class PairRows(NamedTuple):
    """A micro-batch's tokens, and where the log-probs of the responses are read."""

    input_ids: Tensor  # [S, T] long
    position_ids: Tensor  # [S, T] long
    predicting: Tensor  # [N] long, place in S * T whose hidden state predicts the response token
    targets: Tensor  # [N] long, the response tokens
    places: Tensor  # [N] long, place of each response token in 2B * R
    responses: int  # 2B
    longest_response: int  # R
    shared: SharedPrompts | None


class PairLayout(ABC):
    """Turns the token ids of pairs into the rows that a model reads."""

    @abstractmethod
    def rows(
        self, prompts: Sequence[Tokens], chosen: Sequence[Tokens], rejected: Sequence[Tokens]
    ) -> PairRows:
        """Return the rows of B pairs.

        Args:
            prompts: token ids, at least one each.
            chosen: token ids of the chosen responses.
            rejected: token ids of the rejected responses.

        Raises:
            ValueError: if a prompt is empty, so that nothing predicts the first token.
        """


class PlainLayout(PairLayout):
    """Each response in a row of its own with its prompt before it; rows are padded on the right.

    A causal model needs no mask for that: no token sees what comes after it.

    Args:
        pad_token_id: fills the rows.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def rows(
        self, prompts: Sequence[Tokens], chosen: Sequence[Tokens], rejected: Sequence[Tokens]
    ) -> PairRows:
        """Return 2B rows: the chosen ones, then the rejected ones."""
        prompt_lengths = _lengths(prompts, at_least=1).repeat(2)
        responses = [*chosen, *rejected]
        response_lengths = _lengths(responses)
        lengths = prompt_lengths + response_lengths
        width = int(lengths.max())
        input_ids = torch.full((len(responses), width), self.pad_token_id)
        real = torch.arange(width) < lengths[:, None]
        tokens = chain.from_iterable((*p, *r) for p, r in zip([*prompts, *prompts], responses, strict=True))
        input_ids[real] = torch.tensor(list(tokens), dtype=torch.long)
        row, offset = _segments(response_lengths)
        longest = int(response_lengths.max())
        return PairRows(
            input_ids=input_ids,
            # a loader pins what it holds once only
            position_ids=torch.arange(width).repeat(len(input_ids), 1),
            predicting=row * width + prompt_lengths[row] + offset - 1,
            targets=torch.tensor(list(chain.from_iterable(responses)), dtype=torch.long),
            places=row * longest + offset,
            responses=len(responses),
            longest_response=longest,
            shared=None,
        )


class SharedLayout(PairLayout):
    """All pairs in one row without padding, each prompt once: all prompts, then all responses.

    Positions continue after the prompt for either of its responses.
    """

    def rows(
        self, prompts: Sequence[Tokens], chosen: Sequence[Tokens], rejected: Sequence[Tokens]
    ) -> PairRows:
        """Return one row."""
        count, responses = len(prompts), [*chosen, *rejected]
        prompt_lengths, response_lengths = _lengths(prompts, at_least=1), _lengths(responses)
        lengths = torch.cat([prompt_lengths, response_lengths])
        starts = _starts(lengths)
        segment, offset = _segments(lengths)
        in_prompts = int(starts[count])
        response, in_response = segment[in_prompts:] - count, offset[in_prompts:]
        prompt = response % count
        input_ids = torch.tensor(list(chain.from_iterable([*prompts, *responses])), dtype=torch.long)
        tokens = torch.arange(len(input_ids))
        longest = int(response_lengths.max())
        widths = torch.tensor([int(prompt_lengths.max())] * count + [longest] * len(responses))
        padded = places = None
        if (lengths != widths).any():
            places = _starts(widths)[segment] + offset
            padded = torch.zeros(int(widths.sum()), dtype=torch.long).index_copy_(0, places, tokens)
        return PairRows(
            input_ids=input_ids[None],
            position_ids=torch.cat([offset[:in_prompts], prompt_lengths[prompt] + in_response])[None],
            predicting=torch.where(in_response == 0, starts[prompt + 1], tokens[in_prompts:]) - 1,
            targets=input_ids[in_prompts:],
            places=response * longest + in_response,
            responses=len(responses),
            longest_response=longest,
            shared=SharedPrompts(
                lengths=tuple(lengths.tolist()),
                prompt_lengths=prompt_lengths,
                padded=padded,
                places=places,
                query_starts=starts.int(),
                key_starts=_starts(
                    lengths + torch.cat([torch.zeros(count).long(), prompt_lengths.repeat(2)])
                ).int(),
            ),
        )


def _lengths(sequences: Sequence[Tokens], *, at_least: int = 0) -> Tensor:
    """Return the number of tokens of each sequence, ``[sequences]``."""
    lengths = [len(sequence) for sequence in sequences]
    if min(lengths) < at_least:
        raise ValueError(f"prompt {lengths.index(0)} of the micro-batch has no tokens: drop it")
    return torch.tensor(lengths)


def _starts(lengths: Tensor) -> Tensor:
    """Return where each of the segments that lie end to end begins, and where the last one ends."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _segments(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the segment of each token of segments that lie end to end, and its offset in there."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return segment, torch.arange(len(segment)) - _starts(lengths)[segment]
