"""What each format writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.models import byte_tokenizer

from sppo_lightning.predictions import (
    AlpacaEval,
    ArenaHard,
    JSONLines,
    MTBench,
    Prediction,
    PredictionFormat,
)
from sppo_lightning.predictions.formats import FORMATS, markdown_counts
from sppo_lightning.types import Message, Prompt, Response, UserError

TOO_LONG = Response((), "", "failed", "prompt_too_long")


def prompt(number: int, **metadata: Any) -> Prompt:
    text = f"Question {number}?"
    return Prompt(f"p{number}", text, (Message(role="user", content=text),), metadata=metadata)


def answered(number: int, *texts: str, **metadata: Any) -> Prediction:
    return Prediction(prompt(number, **metadata), tuple(Response((7, 1), text, "stop") for text in texts))


def records(format: PredictionFormat, *predictions: Prediction) -> list[Any]:
    found = format.records(predictions, model="mine", tokenizer=byte_tokenizer())
    return json.loads(json.dumps(found))


def test_short_names_are_class_paths() -> None:
    assert FORMATS == {
        "jsonl": "sppo_lightning.predictions.JSONLines",
        "alpaca_eval": "sppo_lightning.predictions.AlpacaEval",
        "arena_hard": "sppo_lightning.predictions.ArenaHard",
        "mt_bench": "sppo_lightning.predictions.MTBench",
    }


def test_json_lines_hold_each_prompt_once() -> None:
    again = answered(0, "Yes.")
    unanswered = Prediction(prompt(1), (TOO_LONG,))
    found = records(JSONLines(), again, unanswered, again)
    assert found == [
        {"id": "p0", "prompt": "Question 0?", "response": "Yes.", "finish_reason": "stop"},
        {"id": "p1", "prompt": "Question 1?", "response": "", "finish_reason": "failed"},
    ]
    assert JSONLines().file_name == "predictions.jsonl"
    assert JSONLines().content(found).count("\n") == 2


def test_alpaca_eval_has_a_row_for_each_record_in_order() -> None:
    """A prompt that stands twice, and one that was too long: what comes after them keeps its number."""
    again = answered(0, "Yes.", dataset="helpful_base", datasplit="eval")
    found = records(AlpacaEval(), again, Prediction(prompt(1), (TOO_LONG,)), again, answered(2, "Nó."))
    assert found == [
        {
            "dataset": "helpful_base",
            "instruction": "Question 0?",
            "output": "Yes.",
            "generator": "mine",
        },
        {"instruction": "Question 1?", "output": "", "generator": "mine"},
        {
            "dataset": "helpful_base",
            "instruction": "Question 0?",
            "output": "Yes.",
            "generator": "mine",
        },
        {"instruction": "Question 2?", "output": "Nó.", "generator": "mine"},
    ]
    assert AlpacaEval().file_name == "predictions-alpaca_eval.json"
    assert json.loads(AlpacaEval().content(found)) == found


def test_arena_hard() -> None:
    (found,) = records(
        ArenaHard(), answered(0, "# Yes\n1. **so**", uid="abc"), Prediction(prompt(1, uid="def"), (TOO_LONG,))
    )
    assert found.pop("tstamp") > 0
    assert len(found.pop("ans_id")) == 32
    assert found == {
        "uid": "abc",
        "model": "mine",
        "messages": [
            {"role": "user", "content": "Question 0?"},
            {"role": "assistant", "content": {"answer": "# Yes\n1. **so**"}},
        ],
        "metadata": {
            "token_len": 15,
            "header_count": {"h1": 1, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
            "list_count": {"ordered": 1, "unordered": 0},
            "bold_count": {"**": 1, "__": 0},
        },
    }
    assert ArenaHard().file_name == "predictions-arena_hard.jsonl"


def test_ids_of_answers_are_those_of_the_same_answers() -> None:
    first, again, other = (
        records(ArenaHard(), answered(0, text, question_id="q"))[0] for text in ("a", "a", "b")
    )
    assert first["uid"] == "q"
    assert first["ans_id"] == again["ans_id"] != other["ans_id"]


MARKDOWN = """\
# One
## Two
##Not
 # Not at a line's start
###### Six
####### Seven are none
1. first
  2. indented
10.not
- item
  * item
+ item
-not
**bold** and **more** __under__ **not
closed** ** odd**
```python
# comment
- item
**bold**
```
after `# not` ```inline # code``` # Not
"""


def test_markdown_by_hand() -> None:
    """Code between fences does not count; what Arena-Hard's own code counts here, line by line.

    Header levels 1, 2 and 6 once each; ordered items "1.", "  2."; unordered "- item", "  * item" and "+ item"; bold
    "**bold**", "**more**" and "** odd**", and "__under__".
    """
    found = markdown_counts(MARKDOWN)
    assert found == {
        "header_count": {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 1},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 3, "__": 1},
    }


def test_mt_bench() -> None:
    turns = ["Question 0?", "And then?"]
    cut = Prediction(prompt(1, question_id=82), (Response((7,), "One.", "stop"), TOO_LONG))
    first, second = records(MTBench(), answered(0, "Yes.", "No.", question_id=81, turns=turns), cut)
    assert first.pop("tstamp") > 0
    assert len(first.pop("answer_id")) == 32
    assert first == {
        "question_id": 81,
        "model_id": "mine",
        "choices": [{"index": 0, "turns": ["Yes.", "No."]}],
    }
    assert second["choices"] == [{"index": 0, "turns": ["One.", ""]}]
    assert MTBench().follow_ups(prompt(0, turns=turns)) == ["And then?"]
    assert MTBench().file_name == "predictions-mt_bench.jsonl"


@pytest.mark.parametrize(
    ("format", "metadata", "said"),
    [
        (MTBench(), {"turns": ["a", "b"]}, "has no 'question_id', which predict --format mt_bench needs"),
        (MTBench(), {"question_id": 1}, "has no 'turns' of two texts"),
        (MTBench(), {"question_id": 1, "turns": ["a"]}, "has no 'turns' of two texts"),
        (
            MTBench(),
            {"question_id": 1, "turns": [{"content": "a"}, {"content": "b"}]},
            "'turns' of two texts",
        ),
        (MTBench(), {"question_id": 1, "turns": "ab"}, "has no 'turns' of two texts"),
        (ArenaHard(), {}, "has no 'uid' or 'question_id', which predict --format arena_hard needs"),
    ],
)
def test_a_column_that_is_not_there(format: PredictionFormat, metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        format.check_prompts([prompt(0, **metadata)])
    assert "\n" not in str(refused.value)


def test_questions_that_have_what_is_needed() -> None:
    MTBench().check_prompts([prompt(0, question_id=0, turns=["a", "b"])])
    ArenaHard().check_prompts([prompt(0, uid="x"), prompt(1, question_id="y")])
    for format in (JSONLines(), AlpacaEval()):
        format.check_prompts([prompt(0)])
