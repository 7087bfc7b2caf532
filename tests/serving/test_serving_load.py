"""Requests under load are counted, timed and lost as they are; servers are started and stopped."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shared_bert.evaluation.serving_load import load_table, load_test, served

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

HTTPServer((sys.argv[2], int(sys.argv[4])), Health).serve_forever()
"""


class Completions(BaseHTTPRequestHandler):
    """Answers the first hundred prompts with five tokens, but not every tenth; keeps the prompts."""

    prompts: list[str] = []
    answers = 100

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.prompts.append(request["prompt"])
        is_fifth = int(request["prompt"].split()[0]) % 10 == 5
        fails = is_fifth or request["model"] != "fox" or len(self.prompts) > self.answers
        usage = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
        choice = {"index": 0, "text": "owl", "finish_reason": "length", "logprobs": None}
        answer = {"id": "1", "object": "text_completion", "created": 0, "model": "fox", "choices": [choice]}
        body = json.dumps({"error": "none"} if fails else answer | {"usage": usage}).encode()
        self.send_response(500 if fails else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Completions.prompts = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_lost_requests_are_counted(url):
    row = load_test(url, "fox", clients=4, requests=40, prompt_words=3, new_tokens=5)
    assert row["lost"] == 4
    assert 0 < row["seconds_median"] <= row["seconds_95th"]
    assert row["tokens_per_second"] > 0
    assert len(Completions.prompts) == len(set(Completions.prompts)) == 41
    assert {len(prompt.split()) for prompt in Completions.prompts} == {4}
    table = load_table([{"server": "mine", "model": "fox", **row}])
    assert "| mine | `fox` | 40 | 4 |" in table


def test_a_server_that_loses_all_but_the_first_has_no_times(url, monkeypatch):
    monkeypatch.setattr(Completions, "answers", 1)
    row = load_test(url, "fox", clients=2, requests=3)
    assert row["lost"] == 3
    assert load_table([{"server": "mine", "model": "fox", **row}]).endswith("| mine | `fox` | 3 | 3 | – | – | 0 |\n")


def test_a_wrong_name_is_said_before_the_load(url):
    with pytest.raises(ValueError, match="no completion of the model dog"):
        load_test(url, "dog", requests=40)
    assert len(Completions.prompts) == 1


def test_a_server_is_started_and_stopped(tmp_path):
    with served([sys.executable, "-c", SERVER], tmp_path / "log") as url:
        assert url.startswith("http://127.0.0.1:")
    assert '"GET /health HTTP/1.1" 200' in (tmp_path / "log").read_text()


def test_a_server_that_ends_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no model here')"]
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*no model here"), served(command, tmp_path / "log"):
        pass
