import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from gptjax.config import DataConfig
from gptjax.data.sources import read_documents, source_files, source_fingerprint
from gptjax.errors import UserError


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Some text, and beside it everything that a folder may hold and that is no text."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "corpus/b.txt": "second",
        "corpus/a.md": "first\r\n",
        "corpus/sub/c.py": "third = '中'",
        "corpus/sub/lines.jsonl": '{"text": "fourth"}\n\n{"text": "fifth", "id": 1}\n',
        "corpus/empty.txt": "",
        "corpus/picture.png": "no text",
        "corpus/.hidden/d.txt": "hidden",
        "corpus/.hidden.txt": "hidden",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return tmp_path / "corpus"


def read(*paths: str, **settings) -> tuple[list, dict]:
    skipped = Counter()
    documents = list(read_documents(DataConfig(path=paths, **settings), skipped))
    return documents, dict(skipped)


def test_a_folder_gives_its_text_sorted_without_hidden_files(corpus):
    documents, skipped = read("corpus")
    assert [d.text for d in documents] == ["first\r\n", "second", "third = '中'", "fourth", "fifth"]
    assert [d.origin for d in documents][-1] == os.path.join("corpus", "sub", "lines.jsonl") + ":3"
    assert skipped == {"empty files": 1, "files of other kinds": 1}


def test_links_in_a_folder_are_followed_once(corpus, tmp_path):
    """To files and to folders; not round in circles, and not twice to one folder. One to nothing is told or counted."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far away")
    (tmp_path / "elsewhere" / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "compressed"}\n'))
    (corpus / "z").symlink_to(tmp_path / "elsewhere")
    (corpus / "zz").symlink_to(tmp_path / "elsewhere")
    (corpus / "sub" / "up").symlink_to(corpus)
    (corpus / "linked.txt").symlink_to(tmp_path / "elsewhere" / "far.txt")
    documents, _ = read("corpus")
    assert sorted(d.text for d in documents)[:2] == ["compressed", "far away"]
    assert len(documents) == 5 + 3
    source_fingerprint(DataConfig(path=("corpus",)))
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for path in ("corpus", "corpus/*.txt"):
        with pytest.raises(UserError, match=r"gone.txt cannot be read: it is a link to .*nowhere.txt, which does not"):
            read(path)
        assert read(path, on_error="skip")[1]["unreadable files"] == 1
    before = source_fingerprint(DataConfig(path=("corpus",)))
    (tmp_path / "nowhere.txt").write_text("here now")
    assert source_fingerprint(DataConfig(path=("corpus",))) != before


def test_a_pipe_is_called_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/null"):
        with pytest.raises(UserError, match="is a pipe or a device, which gives its text only once"):
            read(path)


def test_entries_keep_their_order_and_may_be_files_or_globs(corpus):
    assert [d.text for d in read("corpus/b.txt", "corpus/*.md")[0]] == ["second", "first\r\n"]
    assert [d.text for d in read("corpus/**/*.py")[0]] == ["third = '中'"]
    assert [d.text for d in read("corpus/picture.png")[0]] == ["no text"], "a named file is read whatever its suffix"


def test_documents_are_lazy(corpus):
    (corpus / "z.txt").write_bytes(b"\xff")
    stream = read_documents(DataConfig(path=("corpus",)), Counter())
    assert next(stream).text == "first\r\n"


def test_byte_order_mark_is_no_text(corpus):
    (corpus / "b.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert read("corpus/b.txt")[0][0].text == "marked"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("corpis", r"corpis does not exist; did you mean corpus\?"),
        ("corpus/bb.txt", r"did you mean corpus.b.txt\?"),
        ("corpus/none/x/y.txt", "does not exist"),
        ("corpus/*.csv", "matches no file"),
        ("corpus/empty.txt", "empty.txt is empty"),
        ("pictures", r"pictures has no text; files that end in .*\.txt .* would be read"),
    ],
)
def test_missing_and_empty_sources_are_refused(corpus, path, message):
    (corpus.parent / "pictures").mkdir()
    (corpus.parent / "pictures" / "a.png").write_text("x")
    with pytest.raises(UserError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b'{"text": "a"', r"x.jsonl:2 is not JSON: ", "broken lines"),
        (b'["a"]', r"x.jsonl:2 holds a JSON list, not an object", "broken lines"),
        (b'{"body": "a", "id": 1}', r"x.jsonl:2 has no field 'text', but body, id \(", None),
        (b'{"text": 3}', r"x.jsonl:2: field 'text' is a int, not a text", "lines without text"),
        (b'{"text": "\\ud800"}', r"x.jsonl:2: field 'text' holds half a surrogate pair", "broken lines"),
        (b'{"text": "\xe4"}', r"x.jsonl:2 is not UTF-8: byte 10 is 0xe4", "undecodable lines"),
    ],
)
def test_a_broken_line_stops_by_number_or_is_counted(tmp_path, line, message, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(UserError, match=message):
        read(str(path))
    documents, skipped = read(str(path), on_error="skip")
    assert [d.text for d in documents] == ["one", "three"]
    assert skipped == {reason or "lines without text field": 1}


def refusal(*paths: str, **options) -> str:
    with pytest.raises(UserError) as error:
        list(read_documents(DataConfig(path=paths), Counter(), **options))
    return str(error.value)


def test_what_is_suggested_works(corpus):
    """Skipping is named where something may be left; another field where the field is missing; and only options that
    the command at hand has."""
    (corpus / "x.jsonl").write_text('{"body": "a"}\n')
    field, skip = "--data.text-field NAME reads another", "--data.on-error skip leaves such out"
    assert refusal("corpus/x.jsonl").endswith(f"({field}; {skip})")
    evaluating = {"text_field_option": "--text-field", "can_skip": False}
    assert refusal("corpus/x.jsonl", **evaluating).endswith("(--text-field NAME reads another)")
    assert refusal("corpus/empty.txt").endswith("empty.txt is empty"), "nothing would be left"
    assert refusal("corpus/empty.txt", "corpus/b.txt").endswith(f"empty.txt is empty ({skip})")
    assert refusal("corpus/b.txt", "corpus/empty.txt").endswith(f"empty.txt is empty ({skip})")
    assert refusal("corpus/b.txt", "corpus/empty.txt", **evaluating).endswith("empty.txt is empty")
    (corpus / "y.txt").write_bytes(b"\xff")
    assert refusal("corpus/y.txt").endswith("is 0xff")


def test_text_field_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}))
    assert [d.text for d in read(str(path), text_field="answer")[0]] == ["a"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_undecodable_bytes_stop_by_position_or_are_counted(corpus, mark):
    (corpus / "b.txt").write_bytes(mark + b"ab\xffc")
    with pytest.raises(UserError, match=rf"b.txt is not UTF-8: byte {2 + len(mark)} is 0xff .*--data.on-error skip"):
        read("corpus")
    documents, skipped = read("corpus", on_error="skip")
    assert len(documents) == 4
    assert skipped == {"undecodable files": 1, "empty files": 1, "files of other kinds": 1}


def test_fingerprint_changes_with_files_and_settings_only(corpus):
    data = DataConfig(path=("corpus",))
    before = source_fingerprint(data)
    assert source_fingerprint(data) == before
    variants = [DataConfig(path=("corpus",), text_field="body"), DataConfig(path=("corpus",), on_error="skip")]
    seen = {before, *(source_fingerprint(v) for v in variants)}
    (corpus / "b.txt").write_text("longer than before")
    seen.add(source_fingerprint(data))
    os.utime(corpus / "b.txt", ns=(1, 1))
    seen.add(source_fingerprint(data))
    (corpus / "b.txt").rename(corpus / "bb.txt")
    seen.add(source_fingerprint(data))
    assert len(seen) == 6


def test_the_standard_library_is_its_source_without_tests(tmp_path):
    files = source_files(DataConfig())
    names = [f.name for f in files]
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    assert not [n for n in names if not n.endswith(".py")]
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages"} & set(n.split("/"))]
    assert 5e6 < sum(f.path.stat().st_size for f in files) < 30e6
    assert all(a.path < b.path or a.path.parent != b.path.parent for a, b in pairwise(files))
    assert len(source_fingerprint(DataConfig())) == 64


def test_undecodable_files_of_the_standard_library_are_always_skipped(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    documents, skipped = read("stdlib://")
    assert [d.text for d in documents] == ["a = 1"]
    assert skipped == {"undecodable files": 1}
    (tmp_path / "a.py").unlink()
    (tmp_path / "latin.py").unlink()
    with pytest.raises(UserError, match=r"no library source .* give data.path"):
        read("stdlib://")


def test_text_and_data_load_without_jax_and_grain():
    code = (
        "import sys; sys.modules['jax'] = sys.modules['grain'] = None;"
        "import gptjax.text.tokenizer, gptjax.data.sources, gptjax.data.shards, gptjax.data.prepare"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
