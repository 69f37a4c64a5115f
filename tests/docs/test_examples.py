"""Every example runs as a user runs it: by its path, in a process of its own."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvsim.profiles import load
from kvtraces import Chat, Poisson, generate, write

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments, folder, code=0, error=""):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert error in done.stderr
    return done.stdout


def test_every_example_is_tested():
    tested = {"tune_a_log.py", "run_under_load.py", "what_if.py", "validate_a_prediction.py", "calibrate_a_server.py"}
    kvsim = {path.name for path in EXAMPLES.glob("*.py") if "import kvsim\n" in path.read_text()}
    assert kvsim == tested


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl.gz"
    write(generate(Chat(requests=300, seed=4, arrivals=Poisson(sessions_per_s=1.0))), path)
    return path


@pytest.mark.parametrize("given", [False, True])
def test_tune_a_log(tmp_path, log, given):
    printed = run("tune_a_log.py", *([log] if given else []), folder=tmp_path)
    assert ("300 requests" if given else "2,000 requests") in printed
    assert "recommended: chunks of" in printed


def test_a_log_that_reuses_nothing_has_nothing_recommended(tmp_path):
    row = {"timestamp": 0, "input_length": 128, "output_length": 5, "block_size": 64}
    rows = [{**row, "hash_ids": [2 * i, 2 * i + 1]} for i in range(20)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run("tune_a_log.py", "log.jsonl", folder=tmp_path)
    assert "nothing is recommended: reuse cannot pay" in printed
    assert "recommended: chunks" not in printed


@pytest.mark.parametrize("given", [False, True])
def test_run_under_load(tmp_path, log, given):
    printed = run("run_under_load.py", *([log] if given else []), folder=tmp_path)
    assert "requests/s" in printed
    assert "ms on average" in printed
    assert "hit tokens: {'l0':" in printed


@pytest.mark.parametrize("given", [False, True])
def test_what_if(tmp_path, log, given):
    printed = run("what_if.py", *([log] if given else []), folder=tmp_path)
    rows = dict(re.findall(r"^(.{26}) (TTFT.*)$", printed, re.MULTILINE))
    assert printed.count("GPU busy") == len(rows) == 7
    assert "within 0.5 s" in printed
    if not given:  # it is made up so that every question has another answer
        times = [row.partition(", GPU")[0] for row in rows.values()]
        assert len(set(times)) == 7


def test_a_log_that_fits_no_model_is_told(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"timestamp": 0, "input_length": 64_000, "output_length": 5, "hash_ids": list(range(100)), "block_size": 640}
    path.write_text(json.dumps(row) + "\n")
    for name, word in (("run_under_load.py", "every request is refused, all 1"), ("what_if.py", "nothing served")):
        assert word in run(name, path, folder=tmp_path, code=1)


def test_validate_a_prediction(tmp_path):
    printed = run("validate_a_prediction.py", folder=tmp_path)
    assert printed.count("predicted") >= 7
    assert "mostly in prefill" in printed
    assert "by prompt length: True" in printed


def test_a_log_that_cannot_be_validated_is_told_in_one_line(tmp_path, log):
    (tmp_path / "bad.jsonl").write_text("hello\n")
    for path, error in (
        (log, "error: the log has no ttft_ms column: there is nothing to compare with\n"),
        ("bad.jsonl", "error: bad.jsonl:1: row: is not JSON"),
    ):
        assert run("validate_a_prediction.py", path, folder=tmp_path, code=1, error=error) == ""


class Engine(http.server.BaseHTTPRequestHandler):
    """Streams a token every 2 ms."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "served", "max_model_len": 2048}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        for number in range(body["max_tokens"]):
            time.sleep(0.002)
            message = {"choices": [{"text": "x"}], "usage": {"completion_tokens": number + 1}}
            self.wfile.write(b"data: " + json.dumps(message).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")


def test_calibrate_a_server(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        printed = run("calibrate_a_server.py", url, "qwen3-8b", "h100", "mine.json", folder=tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert "mine.json: h100-qwen3-8b" in printed
    assert load(tmp_path / "mine.json").max_model_len == 2048
