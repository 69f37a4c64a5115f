"""How the commands are run, and an engine to calibrate."""

import http.server
import json
import re
import sys
import threading
import time

import pytest

from kvsim.cli import main
from kvtraces import Chat, Poisson, generate, write


class Command:
    """Runs the command within this process."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, *arguments):
        code = main([str(argument) for argument in arguments])
        printed = self.capsys.readouterr()
        return code, printed.out, printed.err

    def shown(self, *arguments):
        """What a command prints for a person."""
        code, out, err = self(*arguments)
        assert (code, err) == (0, ""), err
        return out

    def json(self, *arguments):
        """The object that a command prints."""
        return json.loads(self.shown(*arguments, "--json"))

    def refused(self, *arguments):
        """The one line on stderr of a command that must exit with 2."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, ""), (code, out, err)
        assert re.fullmatch(r"kvsim: error: [^\n]+\n", err), err
        assert "Traceback" not in err
        return err


@pytest.fixture
def kvsim_command(capsys):
    return Command(capsys)


@pytest.fixture
def narrow(capsys, monkeypatch):
    """Stdout is a terminal of 80 columns without colours; pytest captures the test itself by another object."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda stream: stream is sys.stdout, raising=False)
    monkeypatch.setenv("TERM", "dumb")


@pytest.fixture(scope="session")
def chat_trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "chat.jsonl"
    write(generate(Chat(requests=400, seed=3, arrivals=Poisson(sessions_per_s=0.5))), path)
    return str(path)


class Served(http.server.BaseHTTPRequestHandler):
    """An engine behind HTTP: a token every 2 ms, the first after 2 ms and one for each thousand tokens of prompt."""

    protocol_version = "HTTP/1.0"
    max_model_len = 2048
    metrics = ""
    answers = None
    """How many more completions it answers before it is gone; None: all."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(self.metrics.encode())
            return
        self.wfile.write(json.dumps({"data": [{"id": "served", "max_model_len": self.max_model_len}]}).encode())

    def do_POST(self):
        kind = type(self)
        kind.asked += 1
        if kind.answers is not None and kind.asked > kind.answers:
            self.send_error(503, "gone")
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        time.sleep(0.002 + 1e-6 * len(body["prompt"]))
        for number in range(body["max_tokens"]):
            message = {"choices": [{"text": "x"}], "usage": {"completion_tokens": number + 1}}
            self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
            self.wfile.flush()
            time.sleep(0.002)
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def served():
    handler = type("Handler", (Served,), {"asked": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()
