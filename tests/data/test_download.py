"""Downloads from a local server that stalls, cuts off, corrupts or ignores Range; atomic writes."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanods.data.download import data_dir, download, write_atomic
from nanods.errors import UserError

BODY = bytes(range(256)) * 1000  # 256,000 bytes
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The URL's path names the behaviour. `server.requests` records (behaviour, Range header)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        behaviour, requested_range = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((behaviour, requested_range))
        start = 0
        if requested_range and behaviour != "norange":
            start = int(requested_range.removeprefix("bytes=").rstrip("-"))
        if behaviour == "missing":
            return self.send_error(404)
        if start >= len(BODY):
            return self.send_error(416)
        body = BODY[start:]
        if behaviour == "corrupt":
            body = body[:-1] + b"!"
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.close_connection = True
        if behaviour == "stall":
            self.wfile.write(body[:1000])
            self.server.release.wait(10)
        elif behaviour == "dead":
            self.server.release.wait(10)
        elif behaviour == "cut":
            self.wfile.write(body[:100_000])
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.release = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = lambda behaviour: f"http://127.0.0.1:{server.server_port}/{behaviour}"
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def get(server, path, *behaviours):
    return download([server.url(behaviour) for behaviour in behaviours], path, SHA256, timeout=0.3)


def ranges(server):
    """Return the Range headers of the requests."""
    return [requested_range for _, requested_range in server.requests]


def is_only_file(path):
    """Return whether the file is complete, and the only one in its folder."""
    return path.read_bytes() == BODY and list(path.parent.iterdir()) == [path]


def test_download(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    assert get(server, path, "ok") == path and is_only_file(path)


def test_a_correct_file_needs_no_network(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(BODY)
    assert get(server, path, "ok") == path and server.requests == []


def test_another_file_at_the_path_is_refused_and_kept(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"file\.bin is not the expected file.*move it away"):
        get(server, path, "ok")
    assert path.read_bytes() == b"mine" and server.requests == []


def test_the_part_of_an_earlier_run_is_continued(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:70_000])
    get(server, path, "ok")
    assert is_only_file(path) and server.requests == [("ok", "bytes=70000-")]


def test_a_complete_part_that_was_not_renamed_is_used(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY)
    get(server, path, "ok")
    assert is_only_file(path) and server.requests == []


@pytest.mark.parametrize("part", [b"wrong" * 100, BODY + b"too long"], ids=["wrong", "long"])
def test_a_wrong_part_is_discarded(server, tmp_path, part):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(part)
    get(server, path, "ok")
    assert is_only_file(path) and ranges(server) == [f"bytes={len(part)}-", None]


@pytest.mark.parametrize("behaviour", ["ok", "norange", "cut"])
@pytest.mark.parametrize(
    "part", [b"", BODY[:70_000], BODY[:-1], b"rubbish", b"x" * 300_000], ids=len
)
def test_the_result_is_right_whatever_the_part_contains(server, tmp_path, part, behaviour):
    (tmp_path / "file.bin.part").write_bytes(part)
    get(server, tmp_path / "file.bin", behaviour)
    assert is_only_file(tmp_path / "file.bin")


def test_a_server_that_ignores_range_sends_the_file_from_the_start(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:70_000])
    get(server, path, "norange")
    assert is_only_file(path) and len(server.requests) == 1


def test_the_rest_is_requested_from_a_server_that_cuts_off(server, tmp_path):
    path = tmp_path / "file.bin"
    get(server, path, "cut")
    assert is_only_file(path) and ranges(server) == [None, "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize("bad", ["missing", "dead", "corrupt"])
def test_the_next_mirror_is_tried(server, tmp_path, bad):
    path = tmp_path / "file.bin"
    get(server, path, bad, "ok")
    assert is_only_file(path) and [behaviour for behaviour, _ in server.requests] == [bad, "ok"]


def test_the_next_mirror_continues_after_a_stall(server, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:254_500])
    # "stall" sends 1,000 bytes and stalls. The 500 bytes that remain arrive before the next stall.
    get(server, path, "stall", "ok")
    assert is_only_file(path)
    assert ranges(server) == ["bytes=254500-", "bytes=255500-"]


def test_the_error_gives_the_reason_of_each_mirror_and_the_fix(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:500])
    closed = "http://127.0.0.1:9/"
    with pytest.raises(UserError) as error_info:
        download([server.url("missing"), server.url("dead"), closed], path, SHA256, timeout=0.2)
    message = str(error_info.value)
    assert "404" in message and "timed out" in message and "refused" in message
    assert f"put the file at {path} yourself" in message and SHA256 in message
    assert not path.exists() and (tmp_path / "file.bin.part").read_bytes() == BODY[:500]


def test_wrong_bytes_from_every_mirror_leave_no_file(server, tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(UserError, match="sha256 differs"):
        get(server, path, "corrupt", "corrupt")
    assert not path.exists()


def test_downloads_at_the_same_time_share_one_download(server, tmp_path):
    path = tmp_path / "file.bin"
    threads = [threading.Thread(target=get, args=(server, path, "cut")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_only_file(path) and len(server.requests) == 3


def test_a_folder_that_is_a_file_is_a_user_error(server, tmp_path):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(UserError, match="NANODS_DATA"):
        get(server, tmp_path / "data" / "file.bin", "ok")
    with pytest.raises(UserError, match="NANODS_DATA"):
        write_atomic(tmp_path / "data" / "file.bin", lambda file: file.write(b"x"))


def test_write_atomic_keeps_the_old_file_if_writing_fails(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the n")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NANODS_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.delenv("NANODS_DATA")
    assert str(data_dir()) == "data"
