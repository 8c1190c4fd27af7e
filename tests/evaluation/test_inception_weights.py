"""The weights are found, downloaded once and whole, or the error says where to put them."""

import functools
import hashlib
import http.server
import threading

import pytest

from paddle_dit.errors import ConfigError
from paddle_dit.evaluation import inception_weights
from paddle_dit.evaluation.inception_weights import FILE, SHA256, cached_weights, find_weights

CONTENT = bytes(range(256)) * 5000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PADDLE_DIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / FILE


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder, and have the weights' address point to it."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / FILE).write_bytes(CONTENT)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(arguments)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(inception_weights, "URL", f"http://127.0.0.1:{server.server_port}/{FILE}")
        monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(CONTENT).hexdigest())
        yield folder / FILE, asked
        server.shutdown()


def test_the_address_names_the_hash():
    assert SHA256[:8] == FILE.removesuffix(".pth")[-8:]


def test_weights_are_downloaded_once(cache, server):
    told = []
    assert find_weights(report=told.append) == (cache, hashlib.sha256(CONTENT).hexdigest())
    assert cache.read_bytes() == CONTENT
    assert len(told) == 1
    assert str(cache) in told[0]
    assert find_weights(report=told.append) == (cache, hashlib.sha256(CONTENT).hexdigest())
    assert len(told) == len(server[1]) == 1


def test_what_does_not_come_whole_is_not_kept(cache, server):
    server[0].write_bytes(CONTENT[:-1])
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(what came has the SHA-256"):
        find_weights(report=str)
    assert not cache.exists()


def test_without_a_network_the_error_says_which_file_goes_where(cache, monkeypatch):
    monkeypatch.setattr(inception_weights, "URL", f"http://127.0.0.1:9/{FILE}")
    with pytest.raises(ConfigError, match=rf"refused\): place http://127.0.0.1:9/{FILE} at {cache}, or name it with"):
        find_weights(report=str)


def test_a_missing_address_and_a_cache_that_cannot_be_made_are_one_line(cache, server):
    server[0].unlink()
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(.*(not found|404)"):
        find_weights(report=str)
    cache.parent.rmdir()
    cache.parent.write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot be downloaded \(.*exists"):
        find_weights(report=str)


def test_another_file_in_the_cache_is_refused(cache):
    cache.parent.mkdir()
    cache.write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"is not the public Inception .* remove it"):
        find_weights()


def test_a_file_of_ones_own_is_taken_and_named_by_its_hash(tmp_path, cache):
    path = tmp_path / "mine.safetensors"
    with pytest.raises(ConfigError, match=f"no Inception weights at {path}; get https://"):
        find_weights(path)
    path.write_bytes(b"weights")
    assert find_weights(path) == (path, hashlib.sha256(b"weights").hexdigest())
    assert cached_weights() == cache
