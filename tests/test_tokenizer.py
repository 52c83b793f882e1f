import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer, encoding, get_token_bytes, get_tokenizer
from scripts import tok_eval, tok_train
from tests import tiny

# Corpus, ids and conversation of the interface specification, section 20.5
TEXTS = 3 * ["aaabdaaabac abab 1234 5678 the cat sat on the mat, the end."] + ["naïve café\n\n  x = 12345\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(TEXTS, 277)


def test_known_merges_and_ids(tokenizer):
    merges = [tokenizer.decode_single_token_bytes(i).decode() for i in range(256, 268)]
    assert merges == ["aa", "ab", " t", "at", "he", " the", "aaab", " c", "12", "34", " e", " m"]
    assert tokenizer.encode("the cat abab 12345") == [116, 260, 263, 259, 32, 257, 257, 32, 264, 265, 53]
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(268, 277))


def test_known_conversation(tokenizer):
    parts = [("text", "a"), ("python", "1+1"), ("python_output", "2"), ("text", "b")]
    conversation = {"messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in parts]},
    ]}
    ids, mask = tokenizer.render_conversation(conversation)
    assert ids == [268, 269, 83, 10, 10, 104, 105, 270, 271, 97, 273, 49, 43, 49, 274, 275, 50, 276, 98, 272]
    assert mask == [0] * 9 + [1] * 6 + [0] * 3 + [1, 1]
    assert tokenizer.render_for_completion(conversation) == ids[:9]
    assert tokenizer.render_conversation(conversation, max_tokens=12) == (ids[:12], mask[:12])


def test_completion_of_a_long_prompt_ends_in_the_assistant_start(tokenizer):
    conversation = {"messages": [{"role": "user", "content": "x " * 3000}, {"role": "assistant", "content": "y"}]}
    assert tokenizer.render_for_completion(conversation)[-1] == tokenizer.encode_special("<|assistant_start|>")


@given(st.text())
def test_round_trip_without_specials(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 268


def test_special_names_in_a_text_are_text(tokenizer):
    for name in SPECIAL_TOKENS:
        assert tokenizer.encode(name) == list(name.encode())


def test_prepend_and_append(tokenizer):
    assert tokenizer.encode("ab", prepend="<|bos|>", append=7) == [268, 257, 7]
    assert tokenizer.encode(["ab", ""], prepend=268, append="<|user_end|>") == [[268, 257, 270], [268, 270]]
    with pytest.raises(KeyError):
        tokenizer.encode("ab", prepend="ab")  # a plain token is no special
    with pytest.raises(ValueError, match="NoneType"):
        tokenizer.encode(None)


def test_lone_surrogates(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode(["\udfff", "ab"])[1] == [257]
    trained = RustBPETokenizer.train_from_iterator(["ab\ud800 ab", "\ud83d\ude00 ab"], 268)
    assert trained.decode_single_token_bytes(256) == b"ab"


def test_training_text_too_small_for_the_vocabulary():
    assert RustBPETokenizer.train_from_iterator(["ab"], 1000).get_vocab_size() == 256 + 1 + 9
    assert RustBPETokenizer.train_from_iterator([], 1000).get_vocab_size() == 256 + 9


def test_errors_of_the_text_source_come_through():
    def broken():
        yield "ab"
        raise UsageError("the data are damaged")
    with pytest.raises(UsageError, match="the data are damaged"):
        RustBPETokenizer.train_from_iterator(broken(), 300)


# -----------------------------------------------------------------------------
# Files


def byte_encoding(name, specials=("<|endoftext|>",)):
    ranks = {bytes([i]): i for i in range(256)}
    special_ids = {special: 256 + i for i, special in enumerate(specials)}
    return tiktoken.Encoding(name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = RustBPETokenizer.from_directory(tmp_path)
    assert loaded.encode("the cat abab 12345") == tokenizer.encode("the cat abab 12345")
    assert loaded.get_bos_token_id() == 268
    assert os.listdir(tmp_path) == ["tokenizer.pkl"]  # no temporary file is left


def test_nanochats_own_pickle_loads(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(byte_encoding("rustbpe", SPECIAL_TOKENS)))
    assert RustBPETokenizer.from_directory(tmp_path).encode("é", prepend="<|bos|>") == [256, 195, 169]


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UsageError, match=r"tokenizer.pkl is not a tokenizer.*mkdir"):
        RustBPETokenizer.from_directory(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"merges": []}), None], ids=["empty", "text", "dict", "truncated"])
def test_damaged_tokenizer(base_dir, tokenizer, content):
    tokenizer.save(base_dir / "tokenizer")
    path = base_dir / "tokenizer" / "tokenizer.pkl"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UsageError, match=r"tokenizer/tokenizer.pkl .*scripts.tok_train"):
        get_tokenizer()


@pytest.mark.parametrize("damage, reason", [(lambda ranks: ranks | {b"xyz": 7}, "two tokens have one id"),
                                            (lambda ranks: {token: id for token, id in ranks.items() if token != b"\x80"}, "the byte 128 is no token")])
def test_tables_that_tiktoken_panics_at(tmp_path, damage, reason):
    """Now or at the first text; and a panic is no Exception, so that it would pass whoever expects errors."""
    enc = byte_encoding("like", ["<|bos|>"])
    with pytest.raises(ValueError, match=reason):
        encoding(damage(enc._mergeable_ranks), {"<|bos|>": 256})
    enc._mergeable_ranks = damage(enc._mergeable_ranks)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(enc))
    with pytest.raises(UsageError, match="tokenizer.pkl is not a tokenizer"):
        RustBPETokenizer.from_directory(tmp_path)


def test_an_encoding_without_our_specials_is_refused(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(byte_encoding("other")))
    with pytest.raises(UsageError, match="bos"):
        RustBPETokenizer.from_directory(tmp_path)


def test_missing_files(base_dir):
    with pytest.raises(UsageError, match="there is no tokenizer.*scripts.tok_train"):
        get_tokenizer()
    with pytest.raises(UsageError, match="scripts.tok_train"):
        get_token_bytes()


def test_damaged_token_bytes(base_dir):
    (base_dir / "tokenizer").mkdir()
    (base_dir / "tokenizer" / "token_bytes.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match="token_bytes.pt is damaged"):
        get_token_bytes()


# -----------------------------------------------------------------------------
# Scripts


@pytest.fixture
def data(base_dir):
    folder = base_dir / "base_data_climbmix"
    folder.mkdir()
    for index, texts in enumerate((TEXTS, ["the cat sat", "on the mat"])):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    return base_dir


def test_tok_train(data, capsys):
    assert tok_train.main(["--vocab_size=277"]) == 0
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == 277
    token_bytes = get_token_bytes()
    assert token_bytes.dtype == torch.int32 and token_bytes.shape == (277,)
    assert token_bytes[[0, 200, 256, 261, 262]].tolist() == [1, 1, 2, 4, 4]  # also a byte that is not a character by itself counts 1
    assert token_bytes[268:].tolist() == [0] * 9
    assert "Training time" in capsys.readouterr().out
    assert "num_special_tokens: 9" in (data / "report" / "tokenizer-training.md").read_text()


def test_tok_train_reads_what_it_was_told(data):
    assert list(tok_train.documents(max_chars=10**9, doc_cap=4)) == ["aaab"] * 3 + ["naïv"]
    assert list(tok_train.documents(max_chars=60, doc_cap=10**9)) == TEXTS[:2]  # the document that passes the limit is the last


def test_tok_train_warns_of_too_little_text(data, capsys):
    assert tok_train.main(["--vocab-size=50000"]) == 0
    assert "more text would give more" in capsys.readouterr().out
    assert len(get_token_bytes()) == get_tokenizer().get_vocab_size() < 50000


@pytest.mark.parametrize("flags, message", [
    (["--vocab-size=264"], "too small"), (["--max-chars=0"], "above 0"), (["--doc-cap=x"], "above 0"),
])
def test_tok_train_refuses_bad_flags(data, capsys, flags, message):
    try:
        status = tok_train.main(flags)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_tok_train_without_data_says_how_to_get_some(base_dir, capsys):
    assert tok_train.main([]) == 2
    assert "python -m nanochat.dataset --source=stdlib" in capsys.readouterr().err


def another_page(*args):
    raise ValueError("Hash mismatch for data downloaded")


def offline(name):
    raise ConnectionError("no network")


@pytest.mark.parametrize("answer", [offline, another_page], ids=["no network", "a login page"])
def test_tok_eval_offline_shows_our_numbers(data, capsys, monkeypatch, answer):
    monkeypatch.setattr(tiktoken, "get_encoding", answer)
    assert tok_train.main(["--vocab-size=277"]) == 0
    assert tok_eval.main([]) == 0
    out = capsys.readouterr().out
    assert "GPT-2 is left out" in out and "GPT-4 is left out" in out
    assert "climbmix-train" in out and "climbmix-val" in out and "korean" in out


def test_tok_eval_compares(data, capsys, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", byte_encoding)
    assert tok_train.main(["--vocab-size=277"]) == 0
    assert tok_eval.main([]) == 0
    report = (data / "report" / "tokenizer-evaluation.md").read_text()
    assert "### Comparison with GPT-2" in report and "### Comparison with GPT-4" in report
    size = len("the cat sat\non the mat")
    ours = len(get_tokenizer().encode("the cat sat\non the mat"))
    expected = f"| climbmix-val | {size} | {size} | 1.00 | {ours} | {size / ours:.2f} | {100 * (size - ours) / size:+.1f}% |"
    assert expected in report


def test_tok_eval_without_a_tokenizer(data, capsys):
    assert tok_eval.main([]) == 2
    assert "scripts.tok_train" in capsys.readouterr().err


def test_ctrl_c_in_the_trainer(monkeypatch):
    class Trainer:
        def train_from_iterator(self, *args, **kwargs):
            raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr("rustbpe.Tokenizer", Trainer)
    with pytest.raises(KeyboardInterrupt):
        RustBPETokenizer.train_from_iterator(["text"], 300)


@pytest.mark.parametrize("text", [" " * 1_000_000, "x" + "\u3000" * 1_000_000 + "y", "\t" * 1_000_000 + "x"], ids=["spaces", "wide", "tabs"])
def test_a_million_blanks(tokenizer, text):
    """The splitting regular expression can only go so far back."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode(["a", text]) == [tokenizer.encode("a"), ids]
    conversation = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]}
    assert tokenizer.render_conversation(conversation)[0][-1] in ids
    RustBPETokenizer.train_from_iterator([text], 270)


def test_long_texts_are_encoded_in_one_piece(tokenizer):
    text = "the cat sat on the mat, 12345  \n" * 4000
    assert tokenizer.encode(text) == tokenizer.enc.encode_ordinary(text)


def test_no_bytes_of_another_tokenizer(base_dir, monkeypatch):
    """A training that is stopped between its two files leaves none of the old pair, of which only the vocabulary would be new."""
    tiny.prepare(base_dir)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop)
        assert tok_train.main(["--vocab-size=300"]) == 130
    assert get_tokenizer().get_vocab_size() == 300
    with pytest.raises(UsageError, match="train the tokenizer"):
        get_token_bytes()


def test_a_vocabulary_that_no_number_holds(base_dir, capsys):
    assert tok_train.main(["--vocab-size=5000000000"]) == 2 and "is too large" in capsys.readouterr().err
