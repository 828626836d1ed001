"""`hf://` against a small hub of our own, over HTTP: in processes of their own, since the library reads its address
and cache folder when it is imported."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

ROOT = Path(__file__).parent.parent.parent
COMMIT = "c" * 40
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with the data sets `someone/poems`, the same as `gated/poems`, and `broken/poems`, which breaks off."""
    folder = tmp_path_factory.mktemp("hub")
    for name, column in (("a", ["one", "two"]), ("b", ["three"])):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / f"{name}.parquet")
    files = {f"data/{name}.parquet": (folder / f"{name}.parquet").read_bytes() for name in ("a", "b")}
    files |= {"more.jsonl": b'{"text": "four"}\n', "README.md": b"# Poems", ".gitattributes": b"x", "image.png": b"x"}
    sizes = {name: len(raw) for name, raw in files.items()}
    info = {"sha": COMMIT, "siblings": [{"rfilename": name, "size": sizes[name]} for name in files]}
    tree = [{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in files]

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            for owner in ("someone", "gated", "broken"):
                data_set = f"{owner}/poems"
                if path.startswith(f"/api/datasets/{data_set}"):
                    answer = tree if "/tree/" in path else {"id": data_set, "tags": [], "private": False} | info
                    return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
                name = path.removeprefix(f"/datasets/{data_set}/resolve/{COMMIT}/")
                if name in files and owner == "gated":
                    return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="no")
                if name in files and owner == "broken" and name.endswith("b.parquet"):
                    return self.answer(418)
                if name in files:
                    etag = hashlib.sha1(files[name]).hexdigest()
                    return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="no")

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = """
import sys
from collections import Counter
from gptjax.config import DataConfig
from gptjax.data.sources import read_documents, source_files, source_fingerprint
from gptjax.errors import UserError
data = DataConfig(path=tuple(sys.argv[1:]))
try:
    print([document.text for document in read_documents(data, Counter())])
    print([file.name for file in source_files(data)])
    print(source_fingerprint(data))
except UserError as error:
    print(error)
"""


def read(endpoint: str, cache: Path, entry: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", READ, entry]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_data_set_is_downloaded_and_then_needs_no_network(hub, tmp_path):
    """What matches the glob; the commit is part of the names, and so of the fingerprint. With the server gone, the
    cache gives the same."""
    texts, names, fingerprint = read(hub, tmp_path, "hf://someone/poems/data/*.parquet")
    assert texts == "['one', 'two', 'three']"
    assert names == f"['someone/poems@{COMMIT}/data/a.parquet', 'someone/poems@{COMMIT}/data/b.parquet']"
    offline = read(NOWHERE, tmp_path, "hf://someone/poems/data/*.parquet")
    assert offline == [texts, names, fingerprint]


def test_without_a_glob_parquet_and_jsonl_are_read(hub, tmp_path):
    """And nothing else: a README is about the data."""
    texts, names, fingerprint = read(hub, tmp_path, "hf://someone/poems")
    assert texts == "['one', 'two', 'three', 'four']"
    assert read(NOWHERE, tmp_path, "hf://someone/poems") == [texts, names, fingerprint]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("hf://someone", "is no data set; write hf://OWNER/NAME"),
        ("hf://someone/poems/*.csv", "none of the 6 files there match *.csv; they are .gitattributes, README.md"),
        ("hf://someone/nothing", "the Hub has no such data set"),
        ("hf://gated/poems", "is gated: accept its terms"),
    ],
)
def test_what_the_hub_lacks_is_one_line(hub, tmp_path, entry, expected):
    (line,) = read(hub, tmp_path, entry)
    assert expected in line


def test_part_of_a_data_set_is_never_taken_for_the_whole(hub, tmp_path):
    """A download that breaks off is an error, and so is its part in the cache, when the network is gone as well."""
    (line,) = read(hub, tmp_path, "hf://broken/poems")
    assert "was not downloaded whole" in line
    assert list(tmp_path.rglob("a.parquet"))
    assert not list(tmp_path.rglob("b.parquet"))
    (line,) = read(NOWHERE, tmp_path, "hf://broken/poems")
    assert "its cache has no whole copy" in line


def test_without_network_and_cache_local_files_are_named_as_the_way(tmp_path):
    (line,) = read(NOWHERE, tmp_path, "hf://someone/poems")
    assert "the Hub cannot be reached" in line
    assert "give local files as data.path" in line
