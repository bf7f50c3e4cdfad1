"""The gateway's door and its own routes, as curl would use them."""

import contextlib
import json
import resource
import socket

import httpx
import pytest

from mii_hpc.deployments import credentials
from mii_hpc.gateway import server
from mii_hpc.gateway.http import MAX_BODY_BYTES
from mii_hpc.gateway.server import TOKEN_SECONDS
from tests.waiting import PATIENCE, eventually

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/chat"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/nothing"),
    ("GET", "//v1/models"),
    ("GET", "/health/../v1/models"),
]
BEGUN = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer TOKEN\r\nContent-Length: 99\r\n\r\n{"
"""A request whose body does not come."""


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Basic {token}", "{token}", "Bearer {token}x"])
def test_without_the_token_every_route_but_health_refuses(face, key):
    headers = {} if key is None else {"authorization": key.format(token=face.token)}
    with httpx.Client(base_url=face.url, headers=headers, timeout=PATIENCE) as http:
        for method, path in ROUTES:
            answer = http.request(method, f"{face.url}{path}")
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200


def test_other_tokens_of_the_deployment_open_nothing(face):
    run = face.threaded.deployment.run
    for file in (run.rank_token, run.guest_token):
        headers = {"authorization": f"Bearer {credentials.read_token(file)}"}
        assert face.get("/v1/models", headers=headers).status_code == 401


def test_a_rotated_token_opens_nothing_soon(face):
    old = {"authorization": f"Bearer {face.token}"}
    assert face.get("/v1/models", headers=old).status_code == 200
    face.threaded.do(face.threaded.deployment.client().rotate_token())
    eventually(lambda: face.get("/v1/models", headers=old).status_code == 401, TOKEN_SECONDS + PATIENCE)
    with face.http() as http:
        assert http.get("/v1/models").status_code == 200
        assert http.post("/v1/completions", json={"model": "chat", "prompt": "a", "max_tokens": 1}).status_code == 200


def test_slashes_more_than_needed_are_tolerated(face):
    with face.http() as http:
        assert http.get(f"{face.url}//v1//models/").json() == http.get("/v1/models").json()


def test_what_is_not_there_and_what_is_no_json(face):
    with face.http() as http:
        assert http.get("/nothing").status_code == 404
        assert http.get("/v1/completions").status_code == 405
        for body in (b"", b"{", b"[]", b'{"model": "chat"}', b"\xff"):
            answer = http.post("/v1/completions", content=body)
            assert answer.status_code == 400, body
            assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_beyond_the_bound_is_refused(face):
    with face.http() as http:
        answer = http.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert answer.status_code == 413


def test_tokens_and_back(start):
    face = start(max_length=100)
    with face.http() as http:
        answer = http.post("/tokenize", json={"prompt": "to be", "return_token_strs": True}).json()
        assert (answer["count"], answer["token_strs"], answer["max_model_len"]) == (2, ["to ", "be "], 100)
        assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "to be "}
        assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
        messages = [{"role": "user", "content": "hi"}]
        assert http.post("/tokenize", json={"model": "chat", "messages": messages}).json()["count"] == 2
        assert http.post("/tokenize", json={"messages": messages, "prompt": "a"}).status_code == 400
        assert http.post("/tokenize", json={"model": "gpt", "prompt": "a"}).status_code == 404
        assert http.get("/tokenizer_info").json()["tokenizer_class"] == "words"
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 100


def test_deepspeed_miis_own_route(face):
    body = {"prompts": ["to be", "or"], "max_new_tokens": 3}
    with face.http() as http:
        answer = http.post("/mii/chat", json=body)
        assert answer.json() == [
            {"generated_text": "to be to ", "prompt_length": 2, "generated_length": 3, "finish_reason": "length"},
            {"generated_text": "or or or ", "prompt_length": 1, "generated_length": 3, "finish_reason": "length"},
        ]
        assert http.post("/mii/chat-mii-deployment", json=body).json() == answer.json()
        assert http.post("/mii/other", json=body).status_code == 404
        for wrong in ({}, {"prompts": "a", "temperatur": 1}, {"prompts": "a", "streaming_fn": "f"}, []):
            assert http.post("/mii/chat", json=wrong).status_code == 400


def test_the_bytes_of_a_stream(face):
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 1}
    with face.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = answer.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [delta["delta"] for delta in deltas] == [{"role": "assistant", "content": ""}, {"content": "user: "}, {}]
    assert [delta["finish_reason"] for delta in deltas] == [None, None, "length"]


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_request(start, stream):
    face = start(echo_delay=0.01)
    deployment = face.threaded.deployment
    body = {"model": "chat", "prompt": "a", "max_tokens": 10**6, "stream": stream}
    with face.http(timeout=httpx.Timeout(PATIENCE, read=None if stream else 0.5)) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()  # which, once forgotten, hangs up
                next(lines)
                eventually(lambda: not deployment.is_idle())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body)
    eventually(deployment.is_idle)


def test_small_pieces_are_not_held_back(face):
    with face.http() as http:
        assert http.get("/v1/models").status_code == 200
        (connection,) = face.server.server_state.connections
        taken = connection.transport.get_extra_info("socket")
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.fixture
def many_files():
    """Let this process, which has both ends of each connection, open as many files as it may."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", BEGUN], ids=["no", "head", "body"]
)
def test_a_thousand_slow_connections_do_not_stop_it(face, many_files, sent):
    host, port = face.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as slow:
        for _ in range(1000):
            connection = slow.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            connection.sendall(sent.replace(b"TOKEN", face.token.encode()))
        with face.openai() as api:
            assert api.completions.create(model="chat", prompt="a", max_tokens=1).choices[0].text == "a "
            stream = api.completions.create(model="chat", prompt="a b", max_tokens=3, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == "a b a "


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/comp", HEALTH], ids=["nothing", "a part of a line", "a request before"]
)
def test_a_connection_without_a_request_is_closed_however_much_it_says(face, monkeypatch, sent):
    """Nobody without the token has a connection for long."""
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    host, port = face.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(sent)

        def is_closed():
            with contextlib.suppress(BlockingIOError):
                try:
                    connection.send(b"x")
                    return connection.recv(4096, socket.MSG_DONTWAIT) == b""
                except (BrokenPipeError, ConnectionResetError):
                    return True
            return False

        eventually(is_closed, PATIENCE, "it is closed", pause=0.05)


def test_it_follows_the_name_to_another_run(start, deploy_in_thread):
    face = start()
    with face.openai() as api:
        assert api.completions.create(model="chat", prompt="a", max_tokens=1).choices[0].text == "a "
    face.threaded.do(face.threaded.deployment.stop())
    eventually(lambda: face.get("/health").status_code == 503)
    again = deploy_in_thread(replica_num=1)
    token = credentials.read_token(again.deployment.run.owner_token)
    eventually(lambda: face.get("/health").status_code == 200)
    headers = {"authorization": f"Bearer {token}"}
    body = {"model": "chat", "prompt": "b", "max_tokens": 1}
    eventually(lambda: face.get("/v1/models", headers=headers).status_code == 200)
    answer = httpx.post(f"{face.url}/v1/completions", headers=headers, json=body, timeout=PATIENCE)
    assert answer.json()["choices"][0]["text"] == "b "
