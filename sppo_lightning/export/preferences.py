"""A run's pairs as a preference data set that TRL's trainers read, and any that take ``prompt, chosen, rejected``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sppo_lightning.export.conversations import Conversation, ConversationFinder
from sppo_lightning.export.exporter import DataExporter
from sppo_lightning.export.stored_run import StoredRun
from sppo_lightning.prompts.chat_template import template_token_ids, turn_end
from sppo_lightning.system.durable import replacing
from sppo_lightning.types import Message, PreferencePair, UserError

PARQUET, JSONL = "train.parquet", "train.jsonl"
SIDES = ("chosen", "rejected")


class PreferenceData(DataExporter):
    """Prompt, chosen and rejected response of each pair, as messages where the policy has a chat template, else texts.

    A prompt is what the run's prompt file says, after ``data.system_prompt`` if there is one. The file is read again;
    the chat template must make of it the token ids that the policy was asked.

    Args:
        prompts: prompt file(s) to look into, where the run's own ``data.prompts`` has moved.
    """

    name = "preferences"
    holds = "preference pairs"
    front_matter: ClassVar[Mapping[str, Any]] = {
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "trl", "sppo-lightning"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": PARQUET}]}],
    }

    def __init__(self, prompts: str | list[str] | None = None) -> None:
        self.prompts = prompts

    def write(self, run: StoredRun, iterations: Sequence[int], folder: Path) -> Iterator[str]:
        """Write Parquet and JSON lines, and say what is in them."""
        import datasets

        tokenizer = run.load_tokenizer()
        conversational = tokenizer.chat_template is not None
        finder = ConversationFinder(run, tokenizer, self.prompts)
        conversations = finder.find(iterations)
        arguments = dict(finder.arguments)
        offers_tools = any(each.tools for each in conversations.values())
        ends = {tokenizer.eos_token_id, turn_end(tokenizer)}
        counts: Counter[str] = Counter()
        rows = []
        for number in iterations:
            for pair in run.folder.iteration(number).read_pairs():
                asked = conversations[pair.prompt_id]
                row = _row(pair, asked, conversational=conversational)
                row |= {"prompt_id": pair.prompt_id, "iteration": number}
                row |= {"chosen_reward": pair.chosen_reward, "rejected_reward": pair.rejected_reward}
                if offers_tools:
                    row["tools"] = None if asked.tools is None else json.dumps(asked.tools)
                if arguments:
                    row["chat_template_kwargs"] = arguments
                rows.append(row)
                for side in SIDES:
                    sampled: tuple[int, ...] = getattr(pair, f"{side}_token_ids")
                    read = _read_again(asked, getattr(pair, side), tokenizer, arguments, conversational)
                    start = len(pair.prompt_token_ids)
                    same = tuple(read[: start + len(sampled)]) == pair.prompt_token_ids + sampled
                    counts["same"] += same
                    counts["ended"] += sampled[-1] in ends
        if not rows:
            raise UserError(f"iteration {', '.join(map(str, iterations))} of {run.folder.root} has no pairs")
        with replacing(folder / JSONL) as file:
            file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows)
        datasets.disable_progress_bars()
        # JSON where the fields differ from row to row, as a tool call's arguments do
        table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
        with replacing(folder / PARQUET) as file:
            table.to_parquet(file)
        yield from _contents(rows, conversational=conversational)
        yield from _remarks(counts, 2 * len(rows))


def _row(pair: PreferencePair, asked: Conversation, *, conversational: bool) -> dict[str, Any]:
    if not conversational:
        return {"prompt": asked.messages[0]["content"], **{side: getattr(pair, side) for side in SIDES}}
    said = {side: [{"role": "assistant", "content": getattr(pair, side)}] for side in SIDES}
    return {"prompt": [dict(message) for message in asked.messages], **said}


def _read_again(
    asked: Conversation,
    response: str,
    tokenizer: Any,
    arguments: Mapping[str, Any],
    conversational: bool,
) -> list[int]:
    """Return the token ids that a trainer makes of a prompt and a response in text; none where it cannot."""
    messages = (*asked.messages, Message(role="assistant", content=response))
    if not conversational:
        messages = (Message(role="user", content=asked.messages[0]["content"] + response),)
    try:
        return template_token_ids(
            tokenizer, messages, add_generation_prompt=False, tools=asked.tools, arguments=arguments
        )
    except UserError:  # a template that refuses an answer, e.g. an empty one
        return []


def _contents(rows: Sequence[Mapping[str, Any]], *, conversational: bool) -> Iterator[str]:
    kind = "lists of messages" if conversational else "texts"
    yield (
        f"{len(rows)} pairs, the same in `{PARQUET}` and `{JSONL}`. `prompt`, `chosen` and `rejected` are {kind}; "
        "`chosen_reward` and `rejected_reward` are what ranked the two; `prompt_id` is the prompt's id in its file, "
        "`iteration` the self-play iteration, from 0."
    )
    yield (
        "```python\nfrom datasets import load_dataset\n\n"
        'train = load_dataset("path/to/this/folder", split="train")  # TRL: DPOTrainer(train_dataset=train, …)\n```'
    )


def _remarks(counts: Mapping[str, int], responses: int) -> Iterator[str]:
    yield (
        f"A trainer tokenises these texts anew. With the policy's own tokenizer that gives the sampled token ids for "
        f"{counts['same']} of {responses} responses."
    )
    cut = responses - counts["ended"]
    if cut:
        yield (
            f"{cut} of {responses} responses do not end in an end token: a length limit or a stop string ended them. A "
            "trainer that puts an end token behind every response teaches the policy to stop there."
        )
