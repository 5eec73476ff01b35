"""Downloads against a loopback server that stalls, cuts off, corrupts and ignores Range; and files placed whole."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanods.data.download import data_dir, download, write_atomic
from nanods.errors import UserError

BODY = bytes(range(256)) * 1000  # 256,000 bytes
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The path says how to behave; `server.requests` keeps (path, Range)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        behaviour, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.requests.append((behaviour, asked))
        start = (
            int(asked.removeprefix("bytes=").rstrip("-")) if asked and behaviour != "norange" else 0
        )
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


def only(path):
    """The folder holds the finished file and nothing else."""
    return path.read_bytes() == BODY and list(path.parent.iterdir()) == [path]


def test_plain_download(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    assert get(server, path, "ok") == path and only(path)


def test_a_right_file_in_place_needs_no_network(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(BODY)
    assert get(server, path, "ok") == path and server.requests == []


def test_another_file_in_place_is_named_and_kept(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"file\.bin is not the expected file.*move it away"):
        get(server, path, "ok")
    assert path.read_bytes() == b"mine" and server.requests == []


def test_the_part_of_an_earlier_run_is_continued(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:70_000])
    get(server, path, "ok")
    assert only(path) and server.requests == [("ok", "bytes=70000-")]


def test_a_whole_part_that_was_not_renamed_is_taken(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY)
    get(server, path, "ok")
    assert only(path) and server.requests == []


@pytest.mark.parametrize("part", [b"wrong" * 100, BODY + b"too long"], ids=["wrong", "long"])
def test_a_spoilt_part_is_thrown_away(server, tmp_path, part):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(part)
    get(server, path, "ok")
    assert only(path) and [asked for _, asked in server.requests] == [f"bytes={len(part)}-", None]


@pytest.mark.parametrize("behaviour", ["ok", "norange", "cut"])
@pytest.mark.parametrize(
    "part", [b"", BODY[:70_000], BODY[:-1], b"rubbish", b"x" * 300_000], ids=len
)
def test_whatever_lies_in_the_part_the_result_is_right(server, tmp_path, part, behaviour):
    (tmp_path / "file.bin.part").write_bytes(part)
    get(server, tmp_path / "file.bin", behaviour)
    assert only(tmp_path / "file.bin")


def test_a_server_that_ignores_range_starts_over(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:70_000])
    get(server, path, "norange")
    assert only(path) and len(server.requests) == 1


def test_a_server_that_cuts_off_is_asked_for_the_rest(server, tmp_path):
    path = tmp_path / "file.bin"
    get(server, path, "cut")
    assert only(path) and [asked for _, asked in server.requests] == [
        None,
        "bytes=100000-",
        "bytes=200000-",
    ]


@pytest.mark.parametrize("bad", ["missing", "dead", "corrupt"])
def test_the_next_mirror_is_tried(server, tmp_path, bad):
    path = tmp_path / "file.bin"
    get(server, path, bad, "ok")
    assert only(path) and [behaviour for behaviour, _ in server.requests] == [bad, "ok"]


def test_what_came_before_a_stall_is_kept_for_the_next_mirror(server, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:254_500])
    get(
        server, path, "stall", "ok"
    )  # 1,000 bytes and a stall; the rest is shorter, and comes whole before the stall
    assert only(path)
    assert [asked for _, asked in server.requests] == ["bytes=254500-", "bytes=255500-"]


def test_when_all_fail_the_message_tells_each_reason_and_how_to_mend(server, tmp_path):
    path = tmp_path / "file.bin"
    (tmp_path / "file.bin.part").write_bytes(BODY[:500])
    closed = "http://127.0.0.1:9/"
    with pytest.raises(UserError) as caught:
        download([server.url("missing"), server.url("dead"), closed], path, SHA256, timeout=0.2)
    message = str(caught.value)
    assert "404" in message and "timed out" in message and "refused" in message
    assert f"put the file at {path} yourself" in message and SHA256 in message
    assert not path.exists() and (tmp_path / "file.bin.part").read_bytes() == BODY[:500]


def test_wrong_bytes_everywhere_leave_nothing_in_place(server, tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(UserError, match="sha256 differs"):
        get(server, path, "corrupt", "corrupt")
    assert not path.exists()


def test_two_downloads_at_once_share_one(server, tmp_path):
    path = tmp_path / "file.bin"
    threads = [threading.Thread(target=get, args=(server, path, "cut")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert only(path) and len(server.requests) == 3


def test_a_folder_that_is_a_file_is_a_user_error(server, tmp_path):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(UserError, match="NANODS_DATA"):
        get(server, tmp_path / "data" / "file.bin", "ok")
    with pytest.raises(UserError, match="NANODS_DATA"):
        write_atomic(tmp_path / "data" / "file.bin", lambda file: file.write(b"x"))


def test_place_leaves_the_old_file_when_writing_fails(tmp_path):
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
