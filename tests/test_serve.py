"""`pi-attention serve`: transformers' server with one model of ours, by its routes and as a process."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from benchmarks.serving import CONTEXT, NEW, SIZES, Server, load, random_model
from pi_attention.cli.serve import Serve
from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.models.continuous import need_known_version
from pi_attention.serving.needs import PACKAGES
from pi_attention.serving.requests import Limits

for package in PACKAGES:
    pytest.importorskip(package, reason="the extra serve is not installed")
try:
    need_known_version()
except NotImplementedError as error:
    pytest.skip(str(error), allow_module_level=True)

from starlette.applications import Starlette  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from pi_attention.serving.app import build_app  # noqa: E402
from pi_attention.serving.engine import Engine  # noqa: E402
from pi_attention.serving.handlers import read_template  # noqa: E402
from pi_attention.serving.server import _Server, is_local, listen  # noqa: E402

ROOT = Path(__file__).parents[1]
TEMPLATE = """{% for message in messages %}
{%- if message.role == 'villain' %}{{ raise_exception('no villains') }}{% endif %}
{{- message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
LIMITS = Limits(prompt_tokens=300, new_tokens=NEW, context=CONTEXT, open_requests=6)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Beside the manager's own thread, more of PyTorch's only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(kind, folder):
    random_model(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    made = Engine(random_model("pi").eval(), tokenizer, "mine", LIMITS, requests=4, batch_tokens=32)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(build_app(engine, ["testserver"]), raise_server_exceptions=False) as made:
        yield made


def wanted(engine, prompt, tokens):
    ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
    out = engine.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return engine.tokenizer.decode(out, skip_special_tokens=True)


def streamed(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_completion_is_generates_whole_or_streamed(engine, client):
    body = {"model": "mine", "prompt": "To be, or not to be " * 5, "max_tokens": 20}
    want = wanted(engine, body["prompt"], 20)
    whole = client.post("/v1/completions", json=body).json()
    assert whole["choices"][0]["text"] == want and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"] == {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    parts = streamed(client.post("/v1/completions", json=body | {"stream": True}))
    assert len(parts) > 2 and "".join(part["choices"][0]["text"] for part in parts) == want
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"][0]["finish_reason"] == "length"
    assert not engine.open


def test_a_chat_is_the_completion_of_its_template(engine, client):
    body = {"messages": [{"role": "user", "content": "Who is there?"}], "max_completion_tokens": 12}
    want = wanted(engine, "user: Who is there?\nassistant:", 12)
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["content"] == want
    parts = streamed(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == want
    refused = client.post("/v1/chat/completions", json={"messages": [{"role": "villain", "content": "ha"}]})
    assert refused.status_code == 400 and "no villains" in refused.json()["error"]["message"]


def test_an_answer_ends_at_a_stop_at_the_context_or_at_the_limit(engine, client):
    prompt = "Whether 'tis nobler"
    want = wanted(engine, prompt, NEW)
    stop = want[5:7]
    for stream in (False, True):
        body = {"prompt": prompt, "stop": [stop, "never there"], "stream": stream}
        response = client.post("/v1/completions", json=body)
        parts = streamed(response) if stream else [response.json()]
        assert "".join(part["choices"][0]["text"] for part in parts) == want[: want.index(stop)]
        assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert client.post("/v1/completions", json={"prompt": prompt}).json()["usage"]["completion_tokens"] == NEW
    assert not engine.open


def test_sampled_requests_have_settings_and_seeds_of_their_own(engine, client):
    """Side by side: transformers' own server takes the settings of the first request for all."""
    bodies = [{"prompt": "Alas", "max_tokens": 15, "temperature": 1.0, "seed": seed} for seed in (1, 2, 1)]
    bodies.append({"prompt": "Alas", "max_tokens": 15})
    texts = [""] * len(bodies)

    def ask(number):
        response = client.post("/v1/completions", json=bodies[number])
        texts[number] = response.json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts[0] == texts[2] != texts[1] and texts[3] == wanted(engine, "Alas", 15)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", b"{", 400, "no valid JSON"),
        ("completions", b"[" * 100_000, 400, "no valid JSON"),
        ("completions", b"[]", 400, "must be a JSON object"),
        ("completions", b"\xff", 400, "no valid JSON"),
        ("completions", {}, 400, "prompt must be one text"),
        ("completions", {"prompt": ""}, 400, "a prompt is empty"),
        ("completions", {"prompt": "a" * 301}, 400, "has 301 tokens, and the limit is 300"),
        ("completions", {"prompt": "a" * 2_000_000}, 413, "longer than"),
        ("completions", {"prompt": "a", "max_tokens": NEW + 1}, 400, f"from 1 to {NEW}"),
        ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "'gpt-4' is not served here"),
        ("completions", {"prompt": "a", "model": "../../etc"}, 404, "not served here"),
        ("completions", {"prompt": "a", "n": 3}, 400, "n is not supported"),
        ("completions", {"prompt": "a", "stop": ["x" * 250_000] * 4}, 400, "stop must have at most 1,000 characters"),
        ("completions", {"prompt": "a", "messages": []}, 400, "no field of this request"),
        ("chat/completions", {}, 400, "messages must be a list"),
        ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "must be a text"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 400}]}, 400, "the limit is 300"),
        ("chat/completions", {"messages": [], "chat_template": "{{ 1 }}"}, 400, "no field of this request"),
        ("responses", {"input": "a"}, 404, "Not Found"),
        ("../load_model", {"model": "gpt-4"}, 404, "Not Found"),
        ("../reset", {}, 404, "Not Found"),
    ],
)
def test_a_bad_request_is_refused_with_a_message(engine, client, path, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status and words in response.json()["error"]["message"]
    assert not engine.open


def test_another_kind_of_body_host_or_method_is_refused(client):
    assert client.post("/v1/completions", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400  # a page of the web, rebound


def test_models_and_health(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "mine" and client.get("/v1/models/mine").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok", "open": 0, "running": 0}


def test_too_many_requests_are_told_to_come_again(engine, client):
    engine.open.update(dict.fromkeys(range(6)))
    try:
        response = client.post("/v1/completions", json={"prompt": "a"})
    finally:
        engine.open.clear()
    assert response.status_code == 429 and "6 requests run or wait" in response.json()["error"]["message"]


class Watched:
    """A tokenizer that tells of its calls."""

    def __init__(self, tokenizer, called):
        self._tokenizer, self._called = tokenizer, called

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        self._called()
        return self._tokenizer(*args, **kwargs)


def test_nothing_is_tokenized_for_a_request_that_is_refused(engine, client, monkeypatch):
    calls = []
    monkeypatch.setattr(engine, "tokenizer", Watched(engine.tokenizer, lambda: calls.append(1)))
    monkeypatch.setattr(engine, "open", dict.fromkeys(range(6)))
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 429
    monkeypatch.setattr(engine, "open", {})
    assert client.post("/v1/completions", json={"prompt": "a", "top_p": 7}).status_code == 400 and not calls
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200 and calls


def test_others_are_answered_while_a_prompt_is_tokenized(engine, client, monkeypatch):
    begun, answered, seen = threading.Event(), threading.Event(), []

    def wait():
        begun.set()
        seen.append(answered.wait(10))

    monkeypatch.setattr(engine, "tokenizer", Watched(engine.tokenizer, wait))
    body = {"prompt": "a", "max_tokens": 1}
    asking = threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": body})
    asking.start()
    assert begun.wait(10) and client.get("/health").status_code == 200
    answered.set()
    asking.join()
    assert seen == [True]


def test_settings_that_generation_config_leaves_out_are_those_of_transformers():
    model = random_model("pi").eval()
    model.generation_config.update(do_sample=True, temperature=None, top_k=64, top_p=None)
    made = Engine(model, byte_tokenizer(), "mine", LIMITS, requests=2)
    made.close()
    assert (made.defaults.temperature, made.defaults.top_k, made.defaults.top_p) == (1.0, 64, 1.0)
    model.generation_config.update(temperature=0.7, top_k=None, top_p=0.95)
    made = Engine(model, byte_tokenizer(), "mine", LIMITS, requests=2)
    made.close()
    assert (made.defaults.temperature, made.defaults.top_k, made.defaults.top_p) == (0.7, 50, 0.95)


def test_special_tokens_are_added_to_a_prompt_and_not_to_a_template(engine, client):
    backend = engine.tokenizer.backend_tokenizer
    before = backend.post_processor
    end = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 256)])
    try:
        asked = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1})
        messages = [{"role": "user", "content": "a"}]
        chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    finally:
        backend.post_processor = before
    assert asked.json()["usage"]["prompt_tokens"] == 4
    assert chat.json()["usage"]["prompt_tokens"] == len("user: a\nassistant:")


ANCHOR = {"start_anchor": "assistant:"}
CONTENT = ANCHOR | {"fields": {"content": {"close": "<eos>", "content": "text"}}}
NEVER = ANCHOR | {"fields": {"content": {"open": "<never>", "close": "</never>", "optional": False}}}


@pytest.mark.parametrize("template", [CONTENT, NEVER])
def test_a_parsed_chat_ends_at_a_stop(engine, client, monkeypatch, template):
    monkeypatch.setattr(engine.tokenizer, "response_template", template, raising=False)
    body = {"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 20}
    want = wanted(engine, "user: Who is there?\nassistant:", 20)
    stop = want[5:7]
    for stops, text in ((None, want), (stop, want[: want.index(stop)])):
        whole = client.post("/v1/chat/completions", json=body | {"stop": stops})
        assert whole.status_code == 200 and whole.json()["choices"][0]["message"]["content"] == text
        parts = streamed(client.post("/v1/chat/completions", json=body | {"stop": stops, "stream": True}))
        got = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)
        assert got == (text if template is CONTENT else "")


def test_a_chat_that_cannot_be_parsed_in_a_stream_ends_with_an_error(engine, client, monkeypatch):
    want = wanted(engine, "user: Who is there?\nassistant:", 20)
    template = ANCHOR | {"fields": {"content": {"close": want[5:7], "content": "json"}}}
    monkeypatch.setattr(engine.tokenizer, "response_template", template, raising=False)
    body = {"messages": [{"role": "user", "content": "Who is there?"}], "max_tokens": 20, "stream": True}
    *_, last = streamed(client.post("/v1/chat/completions", json=body))
    assert "response_template cannot parse the answer" in last["error"]["message"]
    assert not engine.open


def test_a_response_template_that_does_not_serve_is_told_before_any_token(engine, client, monkeypatch):
    body = {"messages": [{"role": "user", "content": "a"}]}
    monkeypatch.setattr(engine.tokenizer, "response_template", {"fields": {"content": {}}}, raising=False)
    for stream in (False, True):
        failed = client.post("/v1/chat/completions", json=body | {"stream": stream})
        assert failed.status_code == 500 and "response_template does not serve" in failed.json()["error"]["message"]


def test_a_chat_template_that_fails_refuses_the_messages(engine, client, monkeypatch):
    body = {"messages": [{"role": "user", "content": "a"}]}
    for template in ("{{ messages[0].content + 1 }}", "{{ 1 // 0 }}"):
        monkeypatch.setattr(engine.tokenizer, "chat_template", template)
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"


def test_a_file_of_a_chat_template_is_read_or_refused_by_its_name(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_bytes(
        b"\xef\xbb\xbf{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert read_template(file).startswith("{% for")
    for content, words in ((b"a\n{% if", "chat.jinja' is no Jinja template, line 2"), (b"\xff", "is not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"chat_template=.*{words}"):
            read_template(file)


def test_texts_beyond_the_pretrained_context_are_those_of_generate():
    model = random_model("converted").eval()
    model.config.text_config.max_position_embeddings = 40
    engine = Engine(model, byte_tokenizer(), "converted", LIMITS, requests=4, batch_tokens=32)
    try:
        with TestClient(build_app(engine, ["testserver"])) as client:
            for prompt in ("To be, or not to be", "To be, or not to be: that is the question. " * 4):
                got = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 30})
                assert got.json()["choices"][0]["text"] == wanted(engine, prompt, 30)
    finally:
        engine.close()


def test_texts_of_layers_that_see_everything_end_at_the_context():
    model = PiForCausalLM(
        PiConfig(**SIZES | {"max_position_embeddings": 60}, window=8, layer_patterns=["local", "dense"])
    ).eval()
    assert not Serve(max_prompt_tokens=61).limits(model.config).ends_at_context
    engine = Engine(model, byte_tokenizer(), "hybrid", Serve().limits(model.config), requests=2)
    try:
        with TestClient(build_app(engine, ["testserver"])) as client:
            cut = client.post("/v1/completions", json={"prompt": "a" * 50, "max_tokens": 30}).json()
            assert cut["usage"]["completion_tokens"] == 10 and cut["choices"][0]["finish_reason"] == "length"
            refused = client.post("/v1/completions", json={"prompt": "a" * 60})
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
            assert "leaves no room for a text in the model's context of 60" in refused.json()["error"]["message"]
    finally:
        engine.close()


def test_an_unforeseen_error_is_json_and_tells_nothing_of_the_inside(engine, client, monkeypatch):
    def broken(*args):
        raise RuntimeError("the inside")

    monkeypatch.setattr(engine.model, "check_request", broken)
    failed = client.post("/v1/completions", json={"prompt": "a"})
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "inside" not in failed.text and not engine.open


def answer_to(app, *parts):
    """What the application sends where a body comes in these parts, and then nothing."""
    left, sent = list(parts), []

    async def receive():
        if not left:
            await asyncio.sleep(60)
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope["headers"] = [(b"host", b"testserver"), (b"content-type", b"application/json")]
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    return sent


def test_a_body_that_is_never_whole_is_given_up(engine, monkeypatch):
    monkeypatch.setattr("pi_attention.serving.app.SILENCE", 0.05)
    app, part = build_app(engine, ["testserver"]), {"type": "http.request", "body": b'{"prompt', "more_body": True}
    assert answer_to(app, part, {"type": "http.disconnect"})[0]["status"] == 499
    start, body = answer_to(app, part)
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]
    assert "nothing of the body came" in json.loads(body["body"])["error"]["message"]


def test_a_model_that_has_failed_is_told():
    class Broken(Exception):
        pass

    def broken(*args, **kwargs):
        raise Broken("the products are gone")

    model = random_model("pi").eval()
    made = Engine(model, byte_tokenizer(), "mine", LIMITS, requests=2)
    model.forward = broken
    with TestClient(build_app(made, ["*"])) as client:
        for stream in (True, False):
            told = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
            error = streamed(told)[-1]["error"] if stream else told.json()["error"]
            assert error["type"] == "server_error" and told.status_code == (200 if stream else 503)
            assert stream == ("products are gone" in error["message"])
        assert client.get("/health").status_code == 503
    made.close()


def test_what_cannot_be_served_is_refused_before_it_runs(engine):
    with pytest.raises(ValueError, match=r"requests=60000 does not fit into the memory"):
        Engine(engine.model, engine.tokenizer, "mine", Limits(10**6, 10**6, 10**6, 1), requests=60000)
    more = byte_tokenizer()
    more.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="the tokenizer has 258 tokens, and the model 257"):
        Engine(engine.model, more, "mine", LIMITS)


def test_addresses():
    assert is_local("127.0.0.1") and is_local("::1") and is_local("localhost") and not is_local("0.0.0.0")
    with pytest.raises(ValueError, match=r"host='example\.org' is no IP address"):
        is_local("example.org")
    with listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match=r"cannot be taken: Address already in use"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_texts_at_once(sig):
    ended = []

    async def signals():
        server = _Server(Starlette(), lambda: ended.append(1))
        server.handle_exit(sig, None)
        await asyncio.sleep(0)
        assert server.should_exit and not ended
        server.handle_exit(sig, None)
        await asyncio.sleep(0)
        assert ended == [1] and not server.force_exit

    asyncio.run(signals())


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def gone_in_the_middle(port, body):
    """A client that is killed after the first bytes of a stream, or while it waits."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        content = json.dumps(body).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        if body.get("stream"):
            assert connection.recv(20).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(0.5)


def curls(port):
    """The commands of the documentation, on another port and for the model that is served here."""
    page = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    found = [block for block in blocks if block.startswith("curl")]
    assert len(found) >= 3
    return [block.replace("8000", str(port)) for block in found]


def test_a_process_serves_frees_and_ends(tmp_path):
    """As documented: curl, a client program, clients that go away, SIGTERM with a request in flight."""
    folder = tmp_path / "book"  # as of a run
    saved("pi", folder / "model")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    server = Server(
        folder, "--max-new-tokens", "100000", "--max-prompt-tokens", "300", "--chat-template", tmp_path / "chat.jinja"
    )
    try:
        assert "serves 'book': PiForCausalLM" in server.told and "bytes a request" in server.told
        assert "layers 0 to 2: the last 8 tokens" in server.told and "32 requests at once" in server.told
        for command in curls(server.port):
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
            assert '"error"' not in done.stdout and (
                "text" in done.stdout or "status" in done.stdout or "id" in done.stdout
            )
        example = [
            sys.executable,
            str(ROOT / "examples" / "ask_server.py"),
            "--url",
            f"http://127.0.0.1:{server.port}/v1",
        ]
        told = subprocess.run([*example, "--prompt", "It was", "--tokens", "9"], capture_output=True, text=True)
        assert told.returncode == 0 and "9 tokens" in told.stdout, told.stderr
        for stream in (True, False):
            gone_in_the_middle(server.port, {"prompt": "for ever", "max_tokens": 100_000, "stream": stream})
        until(lambda: server.health() == {"status": "ok", "open": 0, "running": 0})
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps({"prompt": "the last", "max_tokens": 40}),
            {"Content-Type": "application/json"},
        )
        until(lambda: server.health()["running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] == 40
        assert server.process.wait(timeout=60) == 0
    finally:
        server.process.kill()


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path):
    folder = saved("pi", tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "pi_attention.cli", "serve", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: port=") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pi", "converted"])
def test_many_clients_get_generates_texts_in_flat_memory(kind, tmp_path):
    row = load(saved(kind, tmp_path / kind), seconds=60, clients=64, requests=16)
    assert row["wrong"] == row["failed"] == row["left running"] == row["exit code"] == 0
    assert row["right"] > 64 and row["abandoned"] > 0
    *_, third, fourth = row["MiB in each quarter"]
    assert fourth < 1.01 * third
