"""What is asked, field by field."""

from __future__ import annotations

import json

import pytest

from t5x_lite.decode.sampling import Greedy, Sampling
from t5x_lite.serving import requests
from t5x_lite.types import InputError


def test_a_prompt_alone_is_enough():
    asked = requests.Generate.read(b'{"prompt": "a"}')
    assert asked == requests.Generate("a")
    assert asked.how == Greedy()


def test_settings_become_a_strategy():
    body = {"prompt": "a", "strategy": "sampling", "temperature": 2, "top_k": 3, "top_p": 0.5}
    asked = requests.Generate.read(json.dumps({**body, "stop": ["\n"]}).encode())
    assert asked.how == Sampling(temperature=2.0, top_k=3, top_p=0.5)
    assert asked.stop == ("\n",)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"prompt": NaN}', b"[" * 40_000, b"9" * 5_000],
)
def test_what_is_no_json_object_is_malformed(body):
    with pytest.raises(requests.Malformed):
        requests.Generate.read(body)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "'prompt' is null: expected a text"),
        ({"prompt": 3}, "'prompt' is 3: expected a text"),
        ({"prompt": "\ud800"}, "'prompt' is not Unicode text at character 0"),
        ({"promt": "a"}, "'promt' is unknown; known are: prompt,"),
        ({"seed": True}, "'seed' is true: expected a whole number"),
        ({"seed": 1.0}, "'seed' is 1.0: expected a whole number"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
        ({"seed": 2**31}, "'seed' is 2147483648"),
        ({"max_tokens": 0}, "max_tokens=0: expected at least 1"),
        ({"stream": 1}, "'stream' is 1: expected true or false"),
        ({"stop": "a"}, "'stop' is \"a\": expected a list of texts"),
        ({"stop": [1]}, "'stop' is 1: expected a text"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"strategy": "beam"}, "strategy='beam' is not served: expected greedy or sampling"),
        ({"temperature": 0.5}, "temperature is for strategy='sampling'"),
        ({"strategy": "sampling", "top_k": 10**400}, "'top_k' is 1000"),
        ({"repetition_penalty": 10**400}, "'repetition_penalty' is 1000"),
    ],
)
def test_a_field_that_is_wrong_is_named(fields, message):
    body = json.dumps({"prompt": "a", **fields}).encode()
    with pytest.raises(InputError) as caught:
        requests.Generate.read(body)
    assert message in str(caught.value)
    assert not isinstance(caught.value, requests.Malformed)


def test_settings_out_of_range_are_refused():
    asked = requests.Generate("a", strategy="sampling", temperature=0.0)
    with pytest.raises(InputError, match="temperature"):
        _ = asked.how


def test_texts_to_embed_are_some_and_not_too_many():
    assert requests.Embed.read(b'{"texts": ["a", "b"]}').texts == ("a", "b")
    for texts in ([], ["a"] * 65):
        with pytest.raises(InputError, match="expected 1 to 64"):
            requests.Embed.read(json.dumps({"texts": texts}).encode())
    with pytest.raises(InputError, match="'texts' is missing"):
        requests.Embed.read(b"{}")
