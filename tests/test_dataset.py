import gzip
import json
import logging
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import data_hub, data_local, dataset
from nanochat.cli import UsageError
from nanochat.data_local import cut
from nanochat.data_shards import shard_files, text_bytes
from nanochat.dataset import MAX_SHARD, index_to_filename, list_parquet_files, main, parquets_iter_batched
from tests.tiny import ROOT

VALIDATION = index_to_filename(MAX_SHARD)


def write(path, texts, row_group_size=4, name="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: texts}), path, row_group_size=row_group_size)


def texts_of(path):
    return pq.read_table(path)["text"].to_pylist()


def read(split):
    return [text for group in parquets_iter_batched(split) for text in group]


@pytest.fixture
def folder(base_dir):
    return base_dir / "base_data_climbmix"


@pytest.fixture
def two_shards(folder):
    write(folder / "shard_00000.parquet", [f"train {i}" for i in range(10)])
    write(folder / "shard_00001.parquet", [f"val {i}" for i in range(5)])
    return folder


# -----------------------------------------------------------------------------
# Reading


def test_the_last_shard_is_validation(two_shards):
    write(two_shards / "shard_06542.parquet", ["last"])
    assert len(read("train")) == 15
    assert read("val") == ["last"]


def test_row_groups_are_shared_out(two_shards):
    assert [len(group) for group in parquets_iter_batched("train")] == [4, 4, 2]
    assert list(parquets_iter_batched("train", start=1, step=2)) == [["train 4", "train 5", "train 6", "train 7"]]
    assert list(parquets_iter_batched("train", start=3, step=4)) == []


def test_the_data_directory_follows_the_environment(base_dir, monkeypatch, tmp_path_factory):
    assert dataset.DATA_DIR == str(base_dir / "base_data_climbmix")
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    assert dataset.DATA_DIR == str(other / "base_data_climbmix")


def test_listing(base_dir, two_shards, caplog):
    (two_shards / ".shard_00002.parquet.x.tmp").write_bytes(b"in flight")
    (two_shards / "._shard_00000.parquet").write_bytes(b"what macOS leaves beside a file")
    assert [os.path.basename(path) for path in list_parquet_files()] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert list_parquet_files(base_dir / "nowhere") == []


def test_legacy_directory(base_dir, caplog):
    write(base_dir / "base_data" / "shard_00000.parquet", ["old"])
    with caplog.at_level(logging.WARNING):
        assert list_parquet_files() == [str(base_dir / "base_data" / "shard_00000.parquet")]
        assert not caplog.messages
        list_parquet_files(warn_on_legacy=True)
    assert "FineWeb-Edu" in caplog.text


def test_no_data(base_dir):
    with pytest.raises(UsageError, match=r"no training data.*--source=stdlib.*-n 8"):
        read("train")


def test_one_shard_is_validation_only(folder):
    write(folder / "shard_00000.parquet", ["a"])
    assert read("val") == ["a"]
    with pytest.raises(UsageError, match=r"only .*shard_00000.parquet.*validation"):
        read("train")


def damage_empty(path):
    path.write_bytes(b"")


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage_no_parquet(path):
    path.write_text("text,more text\n" * 100)


def damage_footer(path):
    path.write_bytes(b"x" * 100 + b"PAR1")


def damage_column_name(path):
    write(path, ["a"], name="content")


def damage_column_type(path):
    write(path, [1, 2])


def damage_twice(path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, ["text", "id", "text"]), path)


def damage_bytes(path):
    pq.write_table(pa.table({"text": pa.array([b"\xff\xfe"], pa.binary())}), path)


def damage_utf8(path):
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0")
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff\xfe"))}), path)


def damage_pages(path):
    content = bytearray(path.read_bytes())
    content[4:40] = b"\0" * 36
    path.write_bytes(content)


@pytest.mark.parametrize("damage, message", [
    (damage_empty, "damaged"), (damage_truncated, "damaged"), (damage_no_parquet, "not parquet"), (damage_footer, "damaged"),
    (damage_column_name, "no column 'text' but content"), (damage_column_type, "holds int64"), (damage_utf8, "row group 0.*not UTF-8"),
    (damage_pages, "row group 0 of"), (damage_twice, "has 2 columns 'text'"), (damage_bytes, "row group 0.*not UTF-8"),
])
def test_bad_shards(two_shards, damage, message):
    path = two_shards / "shard_00000.parquet"
    damage(path)
    with pytest.raises(UsageError, match=message) as error:
        read("train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_texts_of_any_type(two_shards, kind):
    texts = ["é", None, "", "b", "é"]
    column = pa.array([text and text.encode() for text in texts], kind) if "binary" in str(kind) else pa.array(texts).cast(kind)
    pq.write_table(pa.table({"text": column}), two_shards / "shard_00000.parquet")
    assert read("train") == ["é", "", "b", "é"]


def test_a_damaged_footer_is_said_to_be(two_shards):
    """It may still end as a parquet file does."""
    path = shard_files(two_shards)[0]
    data = bytearray(path.read_bytes())
    data[-40:-8] = b"x" * 32
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"{path.name} is damaged"):
        text_bytes("train")


def test_a_truncated_shard_shows_at_once(two_shards):
    write(two_shards / "shard_00002.parquet", ["val"])
    damage_truncated(two_shards / "shard_00001.parquet")
    with pytest.raises(UsageError, match="shard_00001.parquet is damaged"):
        next(parquets_iter_batched("train"))


def test_null_rows_are_left_out_and_empty_texts_are_kept(two_shards, caplog):
    write(two_shards / "shard_00000.parquet", ["a", None, "", None, "b", None])
    with caplog.at_level(logging.WARNING):
        assert read("train") == ["a", "", "b"]
    assert len(caplog.messages) == 1 and "2 null rows in row group 0" in caplog.text


# -----------------------------------------------------------------------------
# Cutting


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2, 40))
def test_cut_loses_nothing(text, size):
    pieces = cut(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    assert all(len(piece) >= size // 2 for piece in pieces[:-1])


def test_cut_prefers_top_level_blank_lines():
    text = "def a():\n    x = 1\n\n    return x\n\ndef b():\n    pass\n\n    return 2\n"
    assert cut(text, 45) == ["def a():\n    x = 1\n\n    return x\n\n", "def b():\n    pass\n\n    return 2\n"]
    assert cut("word " * 10, 12) == ["word word "] * 5


# -----------------------------------------------------------------------------
# Local sources


def test_stdlib(folder, capsys):
    assert main(["--source=stdlib"]) == 0
    train, val = read("train"), read("val")
    assert sum(map(len, train)) > 8e6
    assert 0.005 < len(val) / len(train) < 0.1
    assert not set(train) & set(val)
    for path in list_parquet_files():
        assert pq.ParquetFile(path).num_row_groups >= 64
    assert any("class Counter(dict)" in text for text in train + val)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["--source=stdlib"]) == 0  # a second time there is nothing to do
    assert "already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert json.loads((folder / "source.json").read_text()) == {"source": "stdlib", "shards": 2}


def test_what_is_taken_of_the_stdlib(monkeypatch, tmp_path):
    for name, content in {"b.py": b"b = 1", "a.py": b"a = 1", "same.py": b"a = 1", "latin.py": b"# caf\xe9", "readme.txt": b"no",
                          "pkg/c.py": b"c = 1", "pkg/test/t.py": b"t = 1", "site-packages/s.py": b"s = 1"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "sitecustomize.py").symlink_to("/nowhere/sitecustomize.py")  # Debian's, where /etc is another
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(data_local.stdlib_groups()) == [["a = 1"], ["b = 1"], ["c = 1"]]


@pytest.fixture
def corpus(tmp_path_factory):
    """A folder with one file of each kind and 60 documents."""
    path = tmp_path_factory.mktemp("corpus")
    (path / "a.txt").write_text("<|endoftext|>".join(f"marked {i}\n\nsecond paragraph" for i in range(20)), encoding="utf-8-sig")
    (path / "deep").mkdir()
    (path / "deep" / "b.jsonl").write_text("".join(json.dumps({"id": i, "text": f"line {i} é"}) + "\n" for i in range(20)) + "\n")
    write(path / "deep" / "c.parquet", [f"row {i}" for i in range(19)] + [None])
    (path / "readme.md").write_text("not taken")
    return path


def test_folder(folder, corpus):
    assert main([f"--source={corpus}"]) == 0
    train, val = read("train"), read("val")
    assert sorted(train + val) == sorted([f"marked {i}\n\nsecond paragraph" for i in range(20)]
                                         + [f"line {i} é" for i in range(20)] + [f"row {i}" for i in range(19)])
    marked = [text for text in train if text.startswith("marked")]
    assert marked != sorted(marked, key=lambda text: int(text.split()[1]))  # shuffled within the file too
    assert val
    assert json.loads((folder / "source.json").read_text()) == {"source": str(corpus), "shards": 2}


def test_files_of_windows(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("windows")
    (path / "A.TXT").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (path / "B.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "three"}\r\n')
    assert main([f"--source={path}"]) == 0
    assert sorted(read("train") + read("val")) == ["one\ntwo", "three"]


def test_folder_gives_the_same_shards_each_time(folder, corpus):
    contents = []
    for _ in range(2):
        assert main([f"--source={corpus}", "--force"]) == 0
        contents.append([texts_of(path) for path in list_parquet_files()])
    assert contents[0] == contents[1]


def test_plain_text_is_cut_into_documents(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    paragraphs = [f"Paragraph {i}. " + "word " * 200 for i in range(200)]
    path.write_text("\n\n".join(paragraphs))
    assert main([f"--source={path}"]) == 0
    documents = read("train") + read("val")
    assert all(text.startswith("Paragraph ") and len(text) <= data_local.DOCUMENT_CHARS for text in documents)
    assert sorted("".join(documents).replace("\n", "")) == sorted("".join(paragraphs))


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl", "book.parquet", "marked.txt"])
def test_every_local_source_is_cut_alike(base_dir, tmp_path_factory, name):
    """A row of the loader takes no more than its length of a document."""
    path = tmp_path_factory.mktemp("books") / name
    books = [f"{number}. " + "word " * 4000 for number in range(3)]
    if name.endswith("parquet"):
        write(path, books)
    else:
        path.write_text("\n".join(json.dumps({"text": book}) for book in books) if "jsonl" in name else ("<|endoftext|>" if "marked" in name else "").join(books))
    assert main([f"--source={path}"]) == 0
    documents = read("train") + read("val")
    assert max(map(len, documents)) <= data_local.DOCUMENT_CHARS and sorted("".join(documents)) == sorted("".join(books))


def test_packed_files_and_what_is_left_out(folder, tmp_path_factory, capsys):
    path = tmp_path_factory.mktemp("packed")
    line, codec = lambda text: json.dumps({"text": text}).encode() + b"\n", pa.Codec("zstd")
    (path / "a.jsonl.gz").write_bytes(gzip.compress(line("one")) + gzip.compress(line("two")))  # two members in one file
    (path / "b.JSONL.ZST").write_bytes(codec.compress(line("three")).to_pybytes())
    (path / "c.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbffour"))
    for name in ("d.md", "e.json", "f.parquet.gz", "g"):
        (path / name).write_text("text")
    for name in (".hidden/x.txt", "._a.jsonl", ".DS_Store"):  # neither taken nor named
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"\0\xff")
    (path / "elsewhere").symlink_to(path.parent)
    assert main([f"--source={path}"]) == 0
    assert sorted(read("train") + read("val")) == ["four", "one", "three", "two"]
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("Left out")]
    assert said.endswith(": d.md, e.json, elsewhere, f.parquet.gz, g")


def test_files_that_a_pattern_matches(folder, tmp_path_factory, capsys):
    """Any text, in hidden folders too; equal files once, what is no text left out with a count, and the same shards each time."""
    source = tmp_path_factory.mktemp("tree")
    (source / ".hidden" / "deep").mkdir(parents=True)
    for i in range(40):
        (source / f"module{i}.py").write_text(f"value = {i}\n")
    (source / ".hidden" / "deep" / "one.py").write_text("value = 'hidden'\n")
    (source / "copy.py").write_text("value = 7\n")
    (source / "notes.md").write_text("not asked for\n")
    (source / "binary.py").write_bytes(b"\xff\xfe\x00")
    pattern = f"--source={source}/**/*.py"
    assert main([pattern]) == 0
    out = capsys.readouterr().out
    assert "Left out, as unreadable or not UTF-8: 1 of 43 files" in out and "41 documents" in out
    texts = read("train") + read("val")
    assert sorted(texts) == sorted([f"value = {i}\n" for i in range(40)] + ["value = 'hidden'\n"])
    assert read("train") != sorted(read("train")), "in random order"
    before = read("train")
    assert main([pattern]) == 0 and "already in" in capsys.readouterr().out
    assert main([pattern, "--force"]) == 0 and read("train") == before
    assert main([f"--source={source}/**/*.rs", "--force"]) == 2
    assert "no file matches" in capsys.readouterr().err and read("train") == before
    if sys.version_info < (3, 13):  # which takes it for a *
        assert main([f"--source={source}/**.py", "--force"]) == 2
        assert "write PATH/**/*.py" in capsys.readouterr().err and read("train") == before


def test_null_in_json_is_left_out(base_dir, tmp_path_factory, caplog):
    path = tmp_path_factory.mktemp("null") / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    assert main([f"--source={path}"]) == 0
    assert sorted(read("train") + read("val")) == ["a", "b"] and '1 lines whose "text" is null' in caplog.text


def test_text_longer_than_a_read_block(tmp_path):
    path = tmp_path / "long.txt"
    block = 1 << 24
    path.write_text("<|endoftext|>".join(["a" * 100, "b" * (block - 120), "c" * block]))  # the second mark lies across a block's end
    assert [text[:1] + str(len(text)) for text in data_local._txt_documents(path)] == ["a100", f"b{block - 120}", f"c{block}"]


def test_lone_surrogates_in_json(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n{"text": "c"}\n')
    assert main([f"--source={path}"]) == 0
    assert sorted(read("train") + read("val")) == ["a \ufffd b", "c"]


def test_several_shards_and_small_row_groups(base_dir, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(data_local, "SHARD_CHARS", 20_000)
    path = tmp_path_factory.mktemp("many") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:05d} " * 20}) + "\n" for i in range(1000)))
    assert main([f"--source={path}"]) == 0
    *train, val = list_parquet_files()
    assert len(train) == 6 and os.path.basename(val) == VALIDATION
    assert all(pq.ParquetFile(file).num_row_groups >= 64 for file in train[:-1])
    assert 20 <= len(texts_of(val)) <= 80


def test_two_documents_are_enough_and_one_is_not(base_dir, tmp_path_factory, capsys):
    path = tmp_path_factory.mktemp("tiny") / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "  "}\n')
    assert main([f"--source={path}"]) == 2
    assert "found 1 document" in capsys.readouterr().err
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert main([f"--source={path}"]) == 0
    assert len(read("train")) == len(read("val")) == 1


def test_a_folder_in_this_layout_keeps_its_split(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    write(path / "shard_00000.parquet", ["a", "b"])
    write(path / "shard_00001.parquet", ["c"])
    assert main([f"--source={path}"]) == 0
    assert (read("train"), read("val")) == (["a", "b"], ["c"])


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of"), ("a.jsonl", b'{"body": "a"}\n', "KeyError"),
    ("a.jsonl", b"[1]\n", "line 1 of"), ("a.jsonl", b'{"text": 5}\n', "is a int"), ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    ("a.txt", b"caf\xe9 " * 9, "not UTF-8.*iconv"),
    ("a.parquet", b"PAR1", "not parquet"), ("a.md", b"text", "found no .txt"), ("._a.txt", b"text", "found no .txt"),
    ("a.jsonl", b'{"text": ' + b"[" * 100_000, "nested too deep"), ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz is damaged"),
    ("a.txt.gz", gzip.compress(random.Random(0).randbytes(10_000), mtime=0)[:5_000], "a.txt.gz is (damaged|not UTF-8)"),
])
def test_bad_input_changes_nothing(two_shards, tmp_path_factory, capsys, name, content, message):
    path = tmp_path_factory.mktemp("bad")
    (path / name).write_bytes(content)
    before = sorted(two_shards.iterdir())
    assert main([f"--source={path}", "--force"]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    assert re.search(message, error)
    assert sorted(two_shards.iterdir()) == before
    assert len(read("train")) == 10


def test_other_data_are_kept_without_force(two_shards, corpus, capsys):
    assert main([f"--source={corpus}"]) == 2  # shards without source.json are nanochat's ClimbMix
    assert "holds data of climbmix; add --force" in capsys.readouterr().err
    assert main([f"--source={corpus}", "--force"]) == 0
    assert main(["--source=stdlib"]) == 2
    assert f"holds data of {corpus}" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--source="], "--source is empty"), (["--source=nowhere"], "neither a path that exists nor one of climbmix"), (["--source=stdlib", "-n", "3"], "leave it out"),
    (["-n", "0"], "or -1 for off"), (["-w", "0"], "above 0"),
])
def test_bad_flags(base_dir, capsys, flags, message):
    try:
        status = main(flags)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_data_directory_is_no_source(base_dir, two_shards, capsys):
    for path in (base_dir, two_shards):
        assert main([f"--source={path}", "--force"]) == 2
        assert "contains the data directory" in capsys.readouterr().err


def test_data_directory_that_cannot_be_made(base_dir, corpus, capsys):
    (base_dir / "base_data_climbmix").write_text("a file")
    assert main([f"--source={corpus}"]) == 2
    assert "choose another NANOCHAT_BASE_DIR" in capsys.readouterr().err


def test_full_disk(two_shards, corpus, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pq, "write_table", full)
    assert main([f"--source={corpus}", "--force"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len(read("train")) == 10


def test_damaged_source_file(two_shards, capsys):
    (two_shards / "source.json").write_text("{")
    assert main(["--source=stdlib"]) == 2
    assert "source.json is damaged" in capsys.readouterr().err
    (two_shards / "source.json").write_text('{"source": "text8"}')
    assert main(["--source=text8"]) == 2
    assert "does not say how far text8 was streamed; use --force" in capsys.readouterr().err


def test_what_is_missing_is_read_anew(folder, corpus, capsys):
    assert main([f"--source={corpus}"]) == 0
    expected = sorted(read("train") + read("val"))
    for damage in (lambda path: path.unlink(), damage_truncated):
        damage(folder / "shard_00000.parquet")
        assert main([f"--source={corpus}"]) == 0
        assert "read anew" in capsys.readouterr().out and sorted(read("train") + read("val")) == expected
    assert main([f"--source={corpus}"]) == 0 and "already in" in capsys.readouterr().out


def test_a_kill_while_data_are_replaced(two_shards, corpus, monkeypatch, capsys):
    """Neither the old ones nor the new ones nor a mixture pass for the data, and the same command makes them whole."""
    def stop(path, *args, unlink=Path.unlink, **kwargs):
        if path.name == "shard_00001.parquet":
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        assert main([f"--source={corpus}", "--force"]) == 130
    with pytest.raises(UsageError, match="being replaced, or that was interrupted"):
        read("val")
    assert main(["--source=stdlib"]) == 2 and f"holds data of {corpus}" in capsys.readouterr().err
    assert main([f"--source={corpus}"]) == 0
    assert len(read("train") + read("val")) == 59


@pytest.mark.slow
def test_two_at_once(folder, corpus):
    """Both succeed, and all is there: the second waits, and finds the work done."""
    command = [sys.executable, "-m", "nanochat.dataset", f"--source={corpus}"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("already in" in output for output in outputs) == 1
    assert len(read("train") + read("val")) == 59 and sorted(os.listdir(folder)) == ["shard_00000.parquet", VALIDATION, "source.json"]


# -----------------------------------------------------------------------------
# Hub sources, with stand-ins for the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub of ClimbMix shards that fails for the indices in `down`. Returns (down, names asked for)."""
    import huggingface_hub
    down, asked = set(), []

    def download(repo, name, repo_type, local_dir):
        assert (repo, repo_type) == ("karpathy/climbmix-400b-shuffle", "dataset")
        asked.append(name)
        if name in map(index_to_filename, down):
            raise ConnectionError("no route to host")
        write(local_dir / name, [f"{name} {i}" for i in range(4)])
        return str(local_dir / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return down, asked


def test_climbmix(folder, hub, capsys):
    _, asked = hub
    assert main(["-n", "3"]) == 0
    assert [os.path.basename(path) for path in list_parquet_files()] == [*map(index_to_filename, range(3)), VALIDATION]
    assert asked[0] == VALIDATION
    assert main(["-n", "5", "-w", "2"]) == 0  # only what is missing
    assert sorted(asked) == [*map(index_to_filename, range(5)), VALIDATION]
    assert "min left" in capsys.readouterr().out


def test_climbmix_failures_can_be_made_up(folder, hub, capsys):
    down, _ = hub
    down.add(1)
    assert main(["-n", "3"]) == 2
    assert "1 of 4 shards could not be fetched; run the same command again" in capsys.readouterr().err
    down.clear()
    assert main(["-n", "3"]) == 0
    assert len(list_parquet_files()) == 4


def test_climbmix_gives_up_when_the_network_is_gone(folder, hub, capsys):
    down, asked = hub
    down.update(range(6000))
    assert main(["-n", "6000", "-w", "1"]) == 2
    assert "cannot be reached any more" in capsys.readouterr().err
    assert len(asked) < 6000


def test_without_a_network_nobody_waits(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr(data_hub, "hub_unreachable", lambda: True)
    for source in ("climbmix", "tinystories"):
        assert main([f"--source={source}", "-n", "1"]) == 2
        assert "huggingface.co cannot be reached" in capsys.readouterr().err
    assert not hub[1]


def test_climbmix_without_a_network_keeps_the_old_data(folder, hub, corpus, capsys):
    assert main([f"--source={corpus}"]) == 0
    hub[0].add(MAX_SHARD)
    assert main(["-n", "1", "--force"]) == 2
    assert "--source=stdlib, which needs none" in capsys.readouterr().err
    assert any("row" in text for text in read("train"))


def test_download_single_file(folder, hub):
    folder.mkdir()
    hub[0].add(7)
    assert dataset.download_single_file(7) is False
    assert dataset.download_single_file(8) is True
    assert dataset.download_single_file(8) is True
    assert hub[1] == [index_to_filename(7), index_to_filename(8)]


@pytest.fixture
def streams(monkeypatch):
    """Replaces the hub's streaming datasets by local ones. Returns a dict: split -> texts, and "fail_after" -> rows."""
    import datasets
    content = {}

    def load_dataset(repo, config=None, split=None, streaming=False, revision=None):
        assert streaming
        if content.get("script") and revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        if content.get("offline"):
            raise ConnectionError("no route to host")
        return datasets.Dataset.from_dict({"text": content[split], "id": range(len(content[split]))}).to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(data_hub, "SHARD_CHARS", 1000)

    real_take = data_hub._take

    def take(rows, *args):
        def failing():
            for row in rows:
                if content.get("fail_after") == 0:
                    raise UsageError("the connection broke")
                content["fail_after"] = content.get("fail_after", -1) - 1
                yield row
        return real_take(failing(), *args)
    monkeypatch.setattr(data_hub, "_take", take)
    return content


def numbered(name, count):
    return [f"{name} {i:04d} " + "x" * random.Random(i).randrange(100) for i in range(count)]


def test_a_repository_that_holds_a_script_is_read_from_its_conversion(folder, streams):
    streams.update(train=numbered("train", 100), script=True)
    assert main(["--source=openwebtext"]) == 0
    assert sorted(read("train") + read("val")) == streams["train"]


def test_streamed_source_with_its_own_validation_split(folder, streams):
    streams.update(train=numbered("train", 100), validation=numbered("val", 10))
    assert main(["--source=tinystories"]) == 0
    assert sorted(read("val")) == streams["validation"]
    assert sorted(read("train")) == streams["train"]
    assert len(list_parquet_files()) > 3
    streams["offline"] = True
    assert main(["--source=tinystories"]) == 0  # complete: nothing to ask the hub for


def test_streamed_source_without_one_holds_out_its_first_shard(folder, streams):
    streams["train"] = [*numbered("train", 100), "", None]
    assert main(["--source=fineweb-edu", "-n", "2"]) == 0
    assert [os.path.basename(path) for path in list_parquet_files()] == [index_to_filename(0), index_to_filename(1), VALIDATION]
    assert not set(read("train")) & set(read("val"))
    assert main(["--source=fineweb-edu"]) == 0  # the rest
    assert sorted(read("train") + read("val")) == streams["train"][:100]


@pytest.mark.parametrize("fail_after", [0, 30, 55, 99])
def test_interrupted_stream_goes_on_to_the_same_files(folder, streams, fail_after, capsys):
    streams["train"] = numbered("train", 100)
    assert main(["--source=openwebtext"]) == 0
    expected = {os.path.basename(path): texts_of(path) for path in list_parquet_files()}
    for path in folder.iterdir():
        path.unlink()
    streams["fail_after"] = fail_after
    assert main(["--source=openwebtext"]) == 2
    assert "the connection broke" in capsys.readouterr().err
    streams["fail_after"] = -1
    assert main(["--source=openwebtext"]) == 0
    assert {os.path.basename(path): texts_of(path) for path in list_parquet_files()} == expected


def test_one_huge_row_is_cut(folder, streams):
    streams.update(train=["word " * 20_000] * 3, validation=["other " * 3000] * 3)
    assert main(["--source=text8"]) == 0
    assert max(map(len, read("train") + read("val"))) <= data_local.DOCUMENT_CHARS
    assert "".join(read("train")).count("word") == 60_000


def test_stream_without_a_network(folder, streams, capsys):
    streams["offline"] = True
    assert main(["--source=tinystories"]) == 2
    assert "check the network" in capsys.readouterr().err
    assert list_parquet_files() == []
