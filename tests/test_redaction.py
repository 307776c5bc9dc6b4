"""What counts as a secret in a setting, and what is left of it."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import PUBLIC

from sppo_lightning.redaction import MASK, masked, masked_keys, names_secret, without_passwords
from sppo_lightning.store.identity import parameters

SECRETS = """
    key api_key apikey api-key apiKey API_KEY openai_key access_key aws_secret_access_key x-api-key api_keys
    token hf_token auth_token accessToken HF_TOKEN api_tokens
    password db_password passphrase secret client_secret credentials auth Authorization
"""
OTHERS = """
    api_key_env token_file key_path secret_name max_tokens batch_tokens max_new_tokens tokens eos_token pad_token
    bos_token_id stop_token token_ids tokenizer answer_key sort_key keys keyboard author authors monkey turkey_count
    passes compass secretary 7 init_args class_path base_url pretrained cost_per_token num_per_key monitor prompt_format
"""


@pytest.mark.parametrize("name", SECRETS.split())
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize("name", ["", *OTHERS.split()])
def test_names_of_other_things(name: str) -> None:
    assert not names_secret(name)


@pytest.mark.parametrize("place", PUBLIC)
def test_no_setting_of_our_own_is_a_secret(place: str) -> None:
    """They would be masked, and so never compared between two runs of a folder."""
    module = pkgutil.resolve_name(place)
    for name in PUBLIC[place].split():
        owner = getattr(module, name)
        if inspect.isclass(owner):
            assert [taken for taken in parameters(owner) if names_secret(taken)] == [], name


def test_masked_golden() -> None:
    given = {
        "class_path": "mine.Judge",
        "init_args": {
            "api_key": "sk-1",
            "password": 1234,
            "api_key_env": "MY_KEY",
            "max_tokens": 7,
            "eos_token": "<eos>",
            "token": None,
            "hf_token": ["a", "b"],
            "headers": {"Authorization": "Basic abc", "accept": "json", "x": "Bearer abc"},
            "credentials": {"user": "me", "nested": {"a": "b"}, "use": True},
            "url": "https://me:pw@host/v1?x=1",
            "server_url": "https://host/?write_token=abc&page=2",
            "weights": {"key": {"class_path": "mine.Reward", "init_args": {"scale": 2.0, "secret": "x"}}},
        },
    }
    assert masked(given) == {
        "class_path": "mine.Judge",
        "init_args": {
            "api_key": MASK,
            "password": MASK,
            "api_key_env": "MY_KEY",
            "max_tokens": 7,
            "eos_token": "<eos>",
            "token": None,
            "hf_token": [MASK, MASK],
            "headers": {"Authorization": MASK, "accept": "json", "x": f"Bearer {MASK}"},
            "credentials": {"user": MASK, "nested": {"a": MASK}, "use": True},
            "url": f"https://me:{MASK}@host/v1?x=1",
            "server_url": f"https://host/?write_token={MASK}&page=2",
            "weights": {"key": {"class_path": "mine.Reward", "init_args": {"scale": 2.0, "secret": MASK}}},
        },
    }
    assert given["init_args"]["api_key"] == "sk-1"  # type: ignore[index]
    assert list(masked_keys(masked(given))) == [
        *("init_args.api_key", "init_args.password", "init_args.hf_token[0]", "init_args.hf_token[1]"),
        *("init_args.headers.Authorization", "init_args.headers.x", "init_args.credentials.user"),
        *("init_args.credentials.nested.a", "init_args.url", "init_args.server_url"),
        "init_args.weights.key.init_args.secret",
    ]
    assert list(masked_keys(given)) == []


def test_masked_by_the_name_of_a_single_setting() -> None:
    assert masked("sk-1", "api_key") == MASK
    assert masked("sk-1", "model") == "sk-1"


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["api_key", "token", "a", "url"]), inner),
)


@given(TREES)
def test_masking_once_is_enough(value: Any) -> None:
    """Both sides of a comparison are masked, of which one may be masked already."""
    assert masked(masked(value)) == masked(value)


def test_a_text_without_passwords() -> None:
    text = "see https://me:pw@host/v1, Bearer abc.d and bearer  x"
    assert without_passwords(text) == "see https://me:…@host/v1, Bearer … and bearer …"
