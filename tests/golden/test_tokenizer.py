"""The tokenizer against nanochat's numbers: merges, ids, conversations, error classes."""
import json

import pytest

from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from tests.golden.fixtures import HERE, load, tokenizer_512, tokenizer_from

GOLDEN = load("tokenizer")
CONVERSATIONS = {case["name"]: case for case in GOLDEN["conversations"]}


@pytest.fixture(scope="module")
def corpus():
    return json.loads((HERE / GOLDEN["corpus_file"]).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_512()


def merges(tokenizer) -> list[str]:
    return [tokenizer.decode_single_token_bytes(i).hex() for i in range(tokenizer.get_vocab_size() - len(SPECIAL_TOKENS))]


def outcome(function, *args, **kwargs):
    """(result, None) or (None, name of the exception)."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        return None, type(error).__name__


def test_training(corpus):
    tokenizer = RustBPETokenizer.train_from_iterator(iter(corpus), GOLDEN["vocab_size"])
    assert merges(tokenizer) == GOLDEN["ranks_hex"]
    assert tokenizer.enc.name == GOLDEN["api"]["encoding_name"]


def test_training_on_cut_documents(corpus):
    golden = GOLDEN["capped_training"]
    texts = [text[:golden["doc_cap"]] for text in corpus[:golden["documents_used"]]]
    tokenizer = RustBPETokenizer.train_from_iterator(texts, golden["vocab_size"])
    assert merges(tokenizer)[256:] == golden["ranks_hex_from_256"]


def test_ids_and_bytes(tokenizer):
    api = GOLDEN["api"]
    assert tokenizer.get_vocab_size() == api["vocab_size"]
    assert tokenizer.get_bos_token_id() == api["bos"]
    assert sorted(tokenizer.get_special_tokens()) == api["specials_sorted"]
    assert {name: tokenizer.encode_special(name) for name in api["special_ids"]} == api["special_ids"]
    assert {key: tokenizer.decode_single_token_bytes(int(key)).hex() for key in api["bytes_of"]} == api["bytes_of"]
    assert {key: tokenizer.id_to_token(int(key)) for key in api["id_to_token"]} == api["id_to_token"]


@pytest.mark.parametrize("case", GOLDEN["encodings"], ids=lambda case: ascii(case["text"])[:20])
def test_encoding(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer([case["text"]]) == [case["ids"]]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("case", GOLDEN["decodings"], ids=lambda case: str(case["ids"])[:20])
def test_decoding(tokenizer, case):
    assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation(tokenizer, name):
    case = CONVERSATIONS[name]
    before = json.dumps(case["conversation"])
    result, raised = outcome(tokenizer.render_conversation, case["conversation"])
    assert raised == case["raises"]
    if not raised:
        assert list(result) == [case["ids"], case["mask"]]
        for max_tokens, expected in case["cut"].items():
            assert list(tokenizer.render_conversation(case["conversation"], max_tokens=int(max_tokens))) == expected
    ids, raised = outcome(tokenizer.render_for_completion, case["conversation"])
    assert raised == case["completion_raises"]
    if not raised:
        assert ids == case["completion_ids"]
    assert json.dumps(case["conversation"]) == before  # the input is left as it was


def test_visualization(tokenizer):
    golden = GOLDEN["visual"]
    case = CONVERSATIONS[golden["name"]]
    assert tokenizer.visualize_tokenization(case["ids"], case["mask"]) == golden["plain"]
    assert tokenizer.visualize_tokenization(case["ids"], case["mask"], with_token_id=True) == golden["with_ids"]


def test_dataloader_tokenizer_trains_on_the_shards():
    """The shards' own tokenizer: documents in file order, as tok_train reads them."""
    import pyarrow.parquet as pq
    golden = load("dataloader")
    texts = [text for name in golden["shards"][:-1] for text in pq.read_table(HERE / "shards" / name)["text"].to_pylist()]
    tokenizer = RustBPETokenizer.train_from_iterator(texts, golden["vocab_size"])
    assert merges(tokenizer) == golden["ranks_hex"] == merges(tokenizer_from(golden["ranks_hex"]))
