"""The API over real connections: every route, what is refused, and nothing lost under load."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import pytest

from t5x_lite.decode.greedy import greedy
from t5x_lite.decode.prompts import pad_left
from t5x_lite.serving import app
from t5x_lite.serving.hosting import BASE, Host
from t5x_lite.serving.serve import open_all
from t5x_lite.serving.worker import Worker
from tests import folders
from tests.serving.common import EchoEngine, OneDevice, running, wait_for

WORDS = ("alpha", "beta", "gamma", "delta", "zeta")
PROMPTS = [" ".join(WORDS[k : k + length]) for length in (2, 3, 5) for k in range(6 - length)]
PROMPT = PROMPTS[0]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@contextlib.contextmanager
def serving(host, engines, places=40, **limits):
    """A client, and the worker behind its server."""
    worker = Worker(engines, places)
    try:
        with running(app.build(host, worker, app.Limits(**limits))) as client:
            yield client, worker
    finally:
        worker.close()


@pytest.fixture(scope="module")
def gpt2(scratch):
    """A decoder, with an adapter called `tuned`."""
    folder = folders.hugging_face("peft/gpt2/base", scratch)
    adapter = folders.FIXTURES / "peft" / "gpt2" / "adapter"
    models = open_all(str(folder), {"tuned": str(adapter)}, None, OneDevice())
    return Host("small", models)


@pytest.fixture(scope="module")
def decoder(gpt2):
    with serving(gpt2, gpt2.engines(slots=8)) as (client, _):
        yield client


@pytest.fixture(scope="module")
def encoder(scratch):
    folder = folders.hugging_face("bert_mlm", scratch)
    host = Host("masked", open_all(str(folder), {}, None, OneDevice()))
    with serving(host, host.engines(slots=2)) as (client, _):
        yield client


@pytest.fixture
def echo(gpt2):
    """A decoder's server whose engine is under the test's command, with three places."""
    engine = EchoEngine(slots=1)
    with serving(gpt2, {BASE: engine, "tuned": engine}, places=3, body_bytes=1000) as served:
        yield *served, engine
        engine.held.clear()


def post(client, route, **fields):
    return client.post(f"/api/{route}", json=fields)


def lines(response):
    return [json.loads(line) for line in response.iter_lines()]


def refused(response, status, message):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert message in response.json()["error"]


@pytest.fixture(scope="module")
def direct(gpt2):
    """By adapter and prompt, greedy continuations without a server."""
    encoded = {text: gpt2._modes[BASE]["generate"].encode({"inputs": text}).ids for text in PROMPTS}
    batch = pad_left(list(encoded.values()), gpt2.input_tokens)

    def texts(name):
        loaded = gpt2._models[name or BASE]
        program = functools.partial(
            greedy,
            loaded.model,
            max_tokens=gpt2.new_tokens,
            eos_id=loaded.vocabulary.eos_id,
            pad_id=loaded.vocabulary.pad_id,
        )
        made = np.asarray(jax.jit(program)(loaded.params, batch))
        return dict(zip(encoded, map(loaded.text, made), strict=True))

    return {name: texts(name) for name in (None, "tuned")}


# What is answered


def test_the_model_says_what_it_can_do(decoder, encoder):
    about = decoder.get("/api/model").json()
    assert about["family"] == "decoder"
    assert about["modes"][:1] == ["generate"]
    assert about["adapters"] == ["tuned"]
    assert about["limits"] == {
        "input_tokens": 8,
        "max_tokens": 8,
        "body_bytes": 65536,
        "seconds": 300.0,
    }
    about = encoder.get("/api/model").json()
    assert about["family"] == "encoder"
    assert "fill_mask" in about["modes"]
    assert "generate" not in about["modes"]
    assert about["adapters"] == []
    assert encoder.get("/health").json() == {"status": "ok", "requests": 0}


def test_the_page_asks_nobody_else(decoder):
    page = decoder.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "innerHTML" not in page.text


def test_streamed_or_whole_a_text_is_the_greedy_one(decoder, direct):
    expected = direct[None][PROMPT]
    whole = post(decoder, "generate", prompt=PROMPT).json()
    assert whole["text"] == expected
    with decoder.stream(
        "POST", "/api/generate", json={"prompt": PROMPT, "stream": True}
    ) as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        *pieces, last = lines(response)
    assert last == whole
    assert "".join(piece["piece"] for piece in pieces) == expected
    assert len(pieces) > 1


def test_an_adapter_is_switched_on_by_its_name(decoder, direct):
    texts = {
        name: post(decoder, "generate", prompt=PROMPT, adapter=name).json()["text"]
        for name in (None, "tuned")
    }
    assert texts == {name: direct[name][PROMPT] for name in texts}
    assert texts["tuned"] != texts[None]


def test_adapters_share_the_arrays_of_their_base(gpt2):
    base, tuned = (
        {id(leaf) for leaf in jax.tree.leaves(gpt2._models[name].params)}
        for name in (BASE, "tuned")
    )
    assert base < tuned


def test_length_stops_and_seeds_are_heeded(decoder):
    asked = {"prompt": PROMPT, "strategy": "sampling", "temperature": 3.0}
    first = post(decoder, "generate", **asked, seed=1).json()
    assert post(decoder, "generate", **asked, seed=1).json() == first
    assert post(decoder, "generate", **asked, seed=2).json() != first
    greedy_text = post(decoder, "generate", prompt=PROMPT).json()["text"]
    short = post(decoder, "generate", prompt=PROMPT, max_tokens=2).json()
    assert (short["tokens"], short["finished"]) == (2, "length")
    assert greedy_text.startswith(short["text"])
    words = greedy_text.split()
    stop = next(word for word in words if word != words[0])
    stopped = post(decoder, "generate", prompt=PROMPT, stop=[stop, "never"]).json()
    assert stopped["text"] == greedy_text[: greedy_text.index(stop)]
    assert stopped["finished"] == "stop"


def test_gaps_are_filled(decoder):
    filled = post(decoder, "infill", prompt="alpha <mask> beta", max_tokens=3).json()
    (middle,) = filled["filled"]
    assert filled["text"].split() == ["alpha", *middle.split(), "beta"]


def test_masks_get_candidates_with_probabilities(encoder):
    found = post(encoder, "fill_mask", text="alpha <mask> beta <mask>", candidates=3).json()
    assert len(found["masks"]) == 2
    for mask in found["masks"]:
        shares = [candidate["probability"] for candidate in mask]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
    assert found["text"].startswith("alpha")
    # The same in a row of another length, and of as many candidates as may be.
    more = post(encoder, "fill_mask", text="alpha <mask>", candidates=20).json()["masks"][0]
    assert len(more) == 20


def test_texts_get_vectors_and_their_cosines(encoder):
    found = post(encoder, "embed", texts=["alpha beta", "gamma", "alpha beta"]).json()
    vectors, cosines = np.array(found["vectors"]), np.array(found["cosines"])
    assert vectors.shape[0] == 3
    np.testing.assert_allclose(np.diag(cosines), 1.0, atol=1e-5)
    np.testing.assert_allclose(cosines[0, 2], 1.0, atol=1e-5)
    assert cosines[0, 1] < 0.999
    alone = post(encoder, "embed", texts=["gamma"]).json()["vectors"]
    np.testing.assert_allclose(alone, vectors[1:2], rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_answers(scratch):
    folder = folders.hugging_face("peft/t5/base", scratch)
    host = Host("both", open_all(str(folder), {}, None, OneDevice()), new_tokens=5)
    with serving(host, host.engines(slots=8)) as (client, _):
        assert client.get("/api/model").json()["family"] == "encoder-decoder"
        found = post(client, "generate", prompt=PROMPT).json()
        assert 1 <= found["tokens"] <= 5


# What is refused


@pytest.mark.parametrize(
    ("route", "fields", "message"),
    [
        ("generate", {"prompt": "  "}, "the text is empty"),
        ("generate", {"prompt": "alpha " * 8}, "9 tokens"),
        ("generate", {"prompt": PROMPT, "max_tokens": 9}, "makes at most 8"),
        ("generate", {"prompt": PROMPT, "adapter": "no"}, "no adapter 'no' here; served are: 't"),
        ("generate", {"prompt": PROMPT, "beams": 4}, "'beams' is unknown"),
        ("generate", {"prompt": PROMPT, "strategy": "sampling", "top_p": 2}, "top_p=2.0"),
        ("infill", {"prompt": PROMPT}, "0 times <mask>"),
        ("infill", {"prompt": "a <mask>", "stream": True}, "leave stream and stop out"),
        ("fill_mask", {"text": "a <mask>"}, "can't fill_mask: it does generate"),
    ],
)
def test_what_cannot_be_asked_of_a_decoder_is_said(decoder, route, fields, message):
    refused(post(decoder, route, **fields), 422, message)


@pytest.mark.parametrize(
    ("route", "fields", "message"),
    [
        ("generate", {"prompt": "a"}, "can't generate: it does"),
        ("fill_mask", {"text": "alpha"}, "0 times <mask>"),
        ("fill_mask", {"text": "<mask>", "candidates": 21}, "candidates=21: expected 1 to 20"),
        ("fill_mask", {"text": "<mask> " * 20}, "tokens"),
        ("embed", {"texts": ["alpha", ""]}, "the text is empty"),
    ],
)
def test_what_cannot_be_asked_of_an_encoder_is_said(encoder, route, fields, message):
    refused(post(encoder, route, **fields), 422, message)


def test_bodies_and_routes_that_are_wrong(echo):
    client, worker, _ = echo
    refused(client.get("/api/nothing"), 404, "nothing at /api/nothing")
    refused(client.get("/api/generate"), 405, "doesn't take GET")
    assert client.get("/api/generate").headers["allow"] == "POST"
    refused(client.post("/"), 405, "doesn't take POST")
    kind = {"content-type": "text/plain"}
    refused(client.post("/api/generate", content="{}", headers=kind), 415, "'text/plain'")
    kind = {"content-type": "application/json; charset=utf-8"}
    refused(client.post("/api/generate", content="{", headers=kind), 400, "not JSON")
    refused(client.post("/api/generate", content=b" " * 1001, headers=kind), 413, "over 1000")
    chunks = iter([b" " * 600] * 5)  # a length that nobody says
    refused(client.post("/api/generate", content=chunks, headers=kind), 413, "over 1000")
    huge = b" " * 5_000_000
    refused(client.post("/api/generate", content=huge, headers=kind), 413, "over 1000")
    assert post(client, "generate", prompt=PROMPT).status_code == 200
    assert worker.held == 0


def test_a_body_that_does_not_arrive_is_given_up(echo, monkeypatch):
    client, _, _ = echo
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
        connection.sendall(
            b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_another_hosts_name_is_refused(gpt2):
    worker = Worker({BASE: EchoEngine()}, 3)
    with running(app.build(gpt2, worker, hosts=("127.0.0.1",))) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"host": "elsewhere.example"}).status_code == 400
    worker.close()


def test_a_full_queue_says_when_to_come_again(echo):
    client, worker, engine = echo
    engine.held.set()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(post, client, "generate", prompt=PROMPT) for _ in range(3)]
        wait_for(lambda: worker.held == 3)
        for stream in (False, True):
            response = post(client, "generate", prompt=PROMPT, stream=stream)
            refused(response, 503, "3 requests wait or run")
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/health").json() == {"status": "ok", "requests": 3}
        engine.held.clear()
        assert [one.result().status_code for one in asked] == [200] * 3
    assert post(client, "generate", prompt=PROMPT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(echo, stream):
    client, worker, engine = echo
    engine.held.set()
    body = json.dumps({"prompt": PROMPT, "stream": stream}).encode()
    head = (
        "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connections = []
    for number in range(2):  # one runs, one waits
        connections.append(socket.create_connection(("127.0.0.1", client.base_url.port)))
        connections[-1].sendall(head.encode() + body)
        wait_for(lambda number=number: worker.held == number + 1)
    wait_for(lambda: len(engine.running) == 1 and len(engine.waiting) == 1)
    for connection in connections:
        connection.close()
    wait_for(lambda: worker.held == 0)
    assert len(engine.cancelled) == 2
    assert engine.pending == 0
    engine.held.clear()
    assert post(client, "generate", prompt=PROMPT).status_code == 200


def test_a_stop_string_frees_the_place_before_the_engine_is_done(echo):
    client, worker, _ = echo
    found = post(client, "generate", prompt="alpha beta gamma", stop=["beta"]).json()
    assert (found["text"], found["finished"]) == ("<unk> alpha ", "stop")
    wait_for(lambda: worker.held == 0)


def test_out_of_time_is_said_and_frees_the_place(gpt2):
    engine = EchoEngine()
    engine.held.set()
    with serving(gpt2, {BASE: engine}, seconds=0.05) as (client, worker):
        refused(post(client, "generate", prompt=PROMPT), 504, "no answer in time")
        with client.stream(
            "POST", "/api/generate", json={"prompt": PROMPT, "stream": True}
        ) as response:
            (record,) = lines(response)
        assert "no answer in time" in record["error"]
        wait_for(lambda: worker.held == 0)


def test_a_model_that_fails_is_said_to_everyone(gpt2):
    engine = EchoEngine()
    engine.fails = True
    with serving(gpt2, {BASE: engine}) as (client, _):
        refused(post(client, "generate", prompt=PROMPT), 503, "restart it")
        assert client.get("/health").status_code == 503
        refused(post(client, "generate", prompt=PROMPT), 503, "restart it")


def test_an_error_nobody_foresaw_keeps_its_details_to_itself(gpt2, caplog):
    host = Host("small", gpt2._models)
    host.generate = lambda asked: 1 / 0
    with serving(host, {BASE: EchoEngine()}) as (client, _):
        refused(post(client, "generate", prompt=PROMPT), 500, "its log says how")


# Under load


def test_two_hundred_requests_from_sixteen_clients_lose_nothing(decoder, direct):
    rng = random.Random(0)
    asked = [
        {"prompt": rng.choice(PROMPTS), "adapter": name, "stream": rng.random() < 0.5}
        for name in rng.choices((None, "tuned"), k=200)
    ]
    local = threading.local()

    def ask(fields):
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=decoder.base_url, timeout=60)
        response = post(local.client, "generate", **fields)
        assert response.status_code == 200, response.text
        return lines(response)[-1]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, asked))
    assert len(found) == 200
    assert [one["text"] for one in found] == [
        direct[fields["adapter"]][fields["prompt"]] for fields in asked
    ]
    assert collections.Counter(one["finished"] for one in found)["stop"] == 0
    assert decoder.get("/health").json() == {"status": "ok", "requests": 0}
