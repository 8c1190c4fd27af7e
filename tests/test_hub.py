"""Models of the hub, fetched from a server on this machine that answers as the hub does, and without any."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from paddle_dit.hub import is_hub_name

from .conftest import ROOT

COMMIT, NAME = "0123456789abcdef0123456789abcdef01234567", "someone/a-model"
FETCH = """
import sys
from paddle_dit.errors import PaddleDiTError
from paddle_dit.hub import fetch
try:
    print(fetch(sys.argv[1], lambda files: [file for file in files if file in sys.argv[2:]], "config.json"))
except PaddleDiTError as error:
    print(f"error: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub; ``server.cut`` bytes into the first download, the connection breaks."""

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, whole):
        server = self.server
        server.asked.append((self.command, self.path, self.headers.get("Range")))
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:4] == ["api", "models", *NAME.split("/")]:
            siblings = [{"rfilename": file} for file in server.files]
            self.send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode(), whole)
        elif parts[-1] == server.missing:
            self.send(500, b"", whole)
        elif "/".join(parts[:2]) == NAME and "/".join(parts[4:]) in server.files:
            self.send_file(server.files["/".join(parts[4:])], whole)
        else:
            self.send(404, b"", whole, {"X-Error-Code": "RepoNotFound"})

    def send_file(self, content, whole):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, content[start:], whole, headers)

    def send(self, status, body, whole, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if whole:
            cut, self.server.cut = (self.server.cut, 0) if len(body) > 10_000 else (0, self.server.cut)
            self.wfile.write(body[:cut] if cut else body)
            self.close_connection = bool(cut)

    def log_message(self, *arguments):
        """Keep quiet."""


@pytest.fixture
def hub():
    """Return a running server of one model."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {"config.json": b"{}", "weights [1].bin": bytes(range(256)) * 400, "README.md": b"text"}
    server.asked, server.cut, server.missing = [], 0, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetch(tmp_path):
    """Return a function that fetches files in a process of its own, as the hub's address is read once."""

    def fetch(*arguments, endpoint="http://127.0.0.1:9", **environment):
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        environment |= {"PATH": "", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}
        result = subprocess.run(
            [sys.executable, "-c", FETCH, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return fetch


def address(hub):
    return f"http://127.0.0.1:{hub.server_port}"


def test_the_wanted_files_are_downloaded_once_and_found_without_network(hub, fetch):
    wanted = (NAME, "config.json", "weights [1].bin")
    folder = Path(fetch(*wanted, endpoint=address(hub)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: hub.files[name] for name in wanted[1:]}
    before = len([ask for ask in hub.asked if ask[0] == "GET" and "/resolve/" in ask[1]])
    assert Path(fetch(*wanted, endpoint=address(hub))) == folder
    assert len([ask for ask in hub.asked if ask[0] == "GET" and "/resolve/" in ask[1]]) == before == 2
    assert Path(fetch(*wanted)) == folder
    assert Path(fetch(*wanted, HF_HUB_OFFLINE="1")) == folder


def test_a_download_that_broke_off_goes_on_where_it_was(hub, fetch):
    hub.cut = 60_000
    assert "which the same command continues" in fetch(NAME, "weights [1].bin", endpoint=address(hub))
    folder = Path(fetch(NAME, "weights [1].bin", endpoint=address(hub)))
    assert (folder / "weights [1].bin").read_bytes() == hub.files["weights [1].bin"]
    ranges = [ask[2] for ask in hub.asked if ask[0] == "GET" and "/resolve/" in ask[1]]
    assert ranges == [None, "bytes=60000-"]


def test_what_came_before_a_break_is_not_taken_for_the_model(hub, fetch):
    assert Path(fetch(NAME, "config.json", endpoint=address(hub))).is_dir()
    hub.files["more.bin"] = b"1"
    hub.missing = "more.bin"
    told = fetch(NAME, "config.json", "more.bin", endpoint=address(hub))
    assert told.startswith(f"error: there is no file or folder {NAME} here, and the hub's files could not be fetched")
    hub.missing = None
    folder = Path(fetch(NAME, "config.json", "more.bin", endpoint=address(hub)))
    assert (folder / "more.bin").read_bytes() == b"1"


def test_without_network_and_cache_the_error_says_which_files_to_place_where(hub, fetch):
    told = f"error: there is no file or folder {NAME} here, and the hub cannot be reached; place config.json into"
    assert fetch(NAME).startswith(told)
    assert fetch(NAME, HF_HUB_OFFLINE="1").startswith(told)
    assert f"into a folder {NAME}, or into any other and name that" in fetch(NAME)
    assert "the hub knows no such model" in fetch("someone/else", endpoint=address(hub))
    hub.files = {}
    assert "\n" not in fetch("..a/b", endpoint=address(hub))


@pytest.mark.parametrize(
    ("name", "can_be"), [("facebook/DiT-XL-2-256", True), ("a/b/c", False), ("run", False), ("/a/b", False)]
)
def test_what_can_be_a_hub_name(name, can_be):
    assert is_hub_name(name) == can_be
