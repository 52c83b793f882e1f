import contextlib
import io
import itertools
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader
from nanochat.loss_eval import MOST_KEPT, FirstBatches
from tests.examples import examples

BOS = 0


class NumberTokenizer:
    """A text "7:3" is document 7 with 3 tokens: 7001, 7002, 7003."""

    def get_bos_token_id(self):
        return BOS

    def encode(self, texts, prepend, num_threads):
        rows = []
        for text in texts:
            number, length = map(int, text.split(":"))
            rows.append([prepend, *(1000 * number + i for i in range(1, length + 1))])
        return rows


class LetterTokenizer(NumberTokenizer):
    def encode(self, texts, prepend, num_threads):
        return [[prepend, *(ord(letter) - ord("a") + 1 for letter in text)] for text in texts]


def write_shards(base_dir, *shards, row_group_size=4):
    folder = Path(base_dir, "base_data_climbmix")
    folder.mkdir(exist_ok=True)
    for index, texts in enumerate(shards):
        table = pa.table({"text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / f"shard_{index:05d}.parquet", row_group_size=row_group_size)


def take(loader, count):
    return [(inputs, targets, state) for inputs, targets, state in itertools.islice(loader, count)]


def same(batches, others):
    return all(torch.equal(x, x2) and torch.equal(y, y2) and state == state2
               for (x, y, state), (x2, y2, state2) in zip(batches, others, strict=True))


def plain(state):
    """The state as JSON and as a checkpoint's weights_only load give it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state
    return json.loads(json.dumps(state))


# -----------------------------------------------------------------------------
# Packing


@pytest.fixture
def letters(base_dir):
    """The documents of the interface specification, section 20.4."""
    lengths = [3, 7, 2, 9, 5, 4, 12, 1, 6, 8, 3, 10]
    write_shards(base_dir, [chr(ord("a") + i) * length for i, length in enumerate(lengths)], ["zz"])


def test_known_batches(letters):
    arguments = dict(B=2, T=7, split="train", tokenizer_batch_size=2, buffer_size=4, device="cpu")
    expected = [
        ([[0, 2, 2, 2, 2, 2, 2], [0, 5, 5, 5, 5, 5, 0]], [0, 1, 1]), ([[0, 6, 6, 6, 6, 0, 8], [0, 9, 9, 9, 9, 9, 9]], [0, 2, 1]),
        ([[0, 10, 10, 10, 10, 10, 10], [0, 2, 2, 2, 2, 2, 2]], [0, 0, 2]), ([[0, 1, 1, 1, 0, 3, 3], [0, 5, 5, 5, 5, 5, 0]], [0, 1, 2]),
    ]
    batches = take(data_loader(LetterTokenizer(), **arguments), 4)
    assert [(inputs.tolist(), [state[key] for key in ("pq_idx", "rg_idx", "epoch")]) for inputs, _, state in batches] == expected
    assert batches[0][1].tolist() == [[2, 2, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 0, 3]]
    resumed = data_loader(LetterTokenizer(), resume_state_dict={"pq_idx": 0, "rg_idx": 0, "epoch": 1}, **arguments)
    inputs, _, state = next(resumed)
    assert inputs.tolist() == [[0, 5, 5, 5, 5, 5, 0], [0, 9, 9, 9, 9, 9, 9]] and state["rg_idx"] == 2


def test_shapes_and_lifetime(letters):
    loader = data_loader(LetterTokenizer(), 3, 5, "train", device=torch.device("cpu"), buffer_size=2)
    batches = take(loader, 5)
    for inputs, targets, _ in batches:
        assert inputs.shape == targets.shape == (3, 5) and inputs.dtype == targets.dtype == torch.long
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    again = take(data_loader(LetterTokenizer(), 3, 5, "train", device="cpu", buffer_size=2), 5)
    assert same(batches, again)  # the first ones were not overwritten by the later ones
    pairs = tokenizing_distributed_data_loader_bos_bestfit(LetterTokenizer(), 3, 5, "train", device="cpu", buffer_size=2)
    assert all(torch.equal(inputs, x) and torch.equal(targets, y) for (inputs, targets), (x, y, _) in zip(pairs, batches))  # noqa: B905


@contextlib.contextmanager
def base_directory():
    """A base directory for one hypothesis example."""
    before = os.environ["NANOCHAT_BASE_DIR"]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["NANOCHAT_BASE_DIR"] = directory
        try:
            yield directory
        finally:
            os.environ["NANOCHAT_BASE_DIR"] = before


lengths = st.lists(st.integers(0, 30), min_size=12, max_size=60)
shapes = st.fixed_dictionaries({
    "B": st.integers(1, 3), "T": st.integers(1, 24), "buffer_size": st.integers(1, 12), "tokenizer_batch_size": st.integers(1, 7),
})


def numbered(sizes):
    return [f"{number}:{size}" for number, size in enumerate(sizes, 1)]


def pack_naively(documents, B, T, buffer_size, slice_size, batches):
    """Best fit by going through the whole buffer, as the specification words it."""
    source, buffer, out = itertools.cycle([documents[i:i + slice_size] for i in range(0, len(documents), slice_size)]), [], []
    for _ in range(batches * B):
        row = []
        while len(row) < T + 1:
            while len(buffer) < buffer_size:
                buffer += next(source)
            room = T + 1 - len(row)
            fitting = [document for document in buffer if len(document) <= room]
            chosen = max(fitting, key=len) if fitting else min(buffer, key=len)  # max and min return the first of equals
            del buffer[next(i for i, document in enumerate(buffer) if document is chosen)]
            row += chosen[:room]
        out.append(row)
    return torch.tensor(out).view(batches, B, T + 1)


@settings(max_examples=examples(60), deadline=None)
@given(lengths, shapes)
def test_best_fit_against_a_plain_search(sizes, shape):
    with base_directory() as directory:
        write_shards(directory, numbered(sizes), ["1:1"], row_group_size=1000)
        batches = take(data_loader(NumberTokenizer(), split="train", device="cpu", **shape), 4)
        documents = NumberTokenizer().encode(numbered(sizes), BOS, 1)
        rows = pack_naively(documents, shape["B"], shape["T"], shape["buffer_size"], shape["tokenizer_batch_size"], 4)
    assert torch.equal(torch.stack([inputs for inputs, _, _ in batches]), rows[:, :, :-1])
    assert torch.equal(torch.stack([targets for _, targets, _ in batches]), rows[:, :, 1:])


@settings(max_examples=examples(60), deadline=None)
@given(lengths, shapes)
def test_only_the_ends_of_cropped_documents_are_lost(sizes, shape):
    """Each document that was read is once in a row, from its start on and whole unless the row ends, or else in the buffer."""
    with base_directory() as directory:
        write_shards(directory, numbered(sizes), ["1:1"])
        batches = take(data_loader(NumberTokenizer(), split="train", device="cpu", **shape), 10)
    begun, seen = 0, []
    for inputs, targets, state in batches:
        if state["epoch"] > 1:
            break
        for row in torch.cat([inputs, targets[:, -1:]], dim=1).tolist():
            assert row[0] == BOS
            starts = [place for place, token in enumerate(row) if token == BOS]
            begun += len(starts)
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                tokens = row[start + 1:end]
                number = tokens[0] // 1000 if tokens else None  # of an empty document, or one cut to its BOS
                assert tokens == [1000 * number + i for i in range(1, len(tokens) + 1)] if tokens else end == len(row) or 0 in sizes
                assert end == len(row) or not tokens or len(tokens) == sizes[number - 1]
                seen.append(number)
        assert begun + len(state["buffer"]) == 4 * state["rg_idx"] + state["row"]
        numbers = [number for number in seen if number] + [4 * rg_idx + row + 1 for _, rg_idx, row, _ in state["buffer"]]
        assert len(numbers) == len(set(numbers))


# -----------------------------------------------------------------------------
# Exact resume


@settings(max_examples=examples(80), deadline=None)
@given(lengths, lengths, shapes, st.integers(1, 9), st.integers(1, 3), st.data())
def test_resume_is_exact(first, second, shape, row_group_size, num_streams, data):
    split_at = data.draw(st.integers(1, 12))
    stream = data.draw(st.integers(0, num_streams - 1))
    arguments = dict(split="train", device="cpu", stream=stream, num_streams=num_streams, **shape)
    with base_directory() as directory:
        write_shards(directory, numbered(first), numbered(second), ["1:1"], row_group_size=min(row_group_size, 4))
        whole = take(data_loader(NumberTokenizer(), **arguments), split_at + 6)
        state = plain(whole[split_at - 1][2])
        resumed = take(data_loader(NumberTokenizer(), resume_state_dict=state, **arguments), 6)
    assert same(resumed, whole[split_at:])


def test_resume_over_several_epochs_and_repeatedly(base_dir):
    write_shards(base_dir, numbered([5, 9, 2, 30, 7, 1, 8, 4, 4, 6]), ["1:1"], row_group_size=3)
    arguments = dict(B=2, T=11, split="train", device="cpu", buffer_size=6, tokenizer_batch_size=2)
    whole = take(data_loader(NumberTokenizer(), **arguments), 30)
    assert whole[-1][2]["epoch"] > 3
    state = None
    for expected in whole:
        (batch,) = take(data_loader(NumberTokenizer(), resume_state_dict=state, **arguments), 1)
        assert same([batch], [expected])
        state = plain(batch[2])


def test_streams_in_one_process_give_what_ranks_give(base_dir, monkeypatch):
    write_shards(base_dir, numbered(range(1, 40)), ["1:1"])
    arguments = dict(B=1, T=9, split="train", device="cpu", buffer_size=5)
    streams = [take(data_loader(NumberTokenizer(), stream=stream, num_streams=3, **arguments), 8) for stream in range(3)]
    for rank in range(3):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        assert same(take(data_loader(NumberTokenizer(), **arguments), 8), streams[rank])


def test_a_state_of_another_stream_continues_at_the_next_row_group(base_dir):
    write_shards(base_dir, numbered(range(1, 40)), ["1:1"])
    arguments = dict(B=1, T=9, split="train", device="cpu", buffer_size=2)
    state = take(data_loader(NumberTokenizer(), **arguments), 5)[-1][2]
    nanochats = {key: state[key] for key in ("pq_idx", "rg_idx", "epoch")}
    other = dict(stream=1, num_streams=2, **arguments)
    assert same(take(data_loader(NumberTokenizer(), resume_state_dict=state, **other), 3),
                take(data_loader(NumberTokenizer(), resume_state_dict=nanochats, **other), 3))


# -----------------------------------------------------------------------------
# What cannot work


@pytest.mark.parametrize("stream", [0, 2, 3])
def test_more_streams_than_row_groups(base_dir, stream):
    write_shards(base_dir, numbered([3] * 10), numbered([3] * 12), ["1:1"])
    with pytest.raises(UsageError, match="4 processes cannot share the train data, whose files have 3 row groups at most; use 3"):
        data_loader(NumberTokenizer(), 1, 5, "train", device="cpu", stream=stream, num_streams=4)


def test_a_stream_without_documents_does_not_spin(base_dir):
    write_shards(base_dir, [*["1:1"] * 4, *[None] * 4], ["1:1"])
    with pytest.raises(UsageError, match="rank 1 of 2 hold no document"):
        next(data_loader(NumberTokenizer(), 1, 5, "train", device="cpu", stream=1, num_streams=2))


def test_no_data(base_dir):
    with pytest.raises(UsageError, match="--source=stdlib"):
        data_loader(NumberTokenizer(), 1, 5, "train", device="cpu")


def test_unknown_split(letters):
    with pytest.raises(AssertionError, match="train or val"):
        data_loader(NumberTokenizer(), 1, 5, "test", device="cpu")


ARGUMENTS = dict(B=1, T=9, split="train", device="cpu", buffer_size=5, tokenizer_batch_size=3)


@pytest.fixture
def late_state(base_dir):
    write_shards(base_dir, numbered([5] * 12), numbered([5] * 12), ["1:1"])
    end = (1, 2, 4)  # the last slice of the last training file
    states = (state for _, _, state in data_loader(NumberTokenizer(), **ARGUMENTS))
    return next(state for state in states if (state["pq_idx"], state["rg_idx"], state["row"]) == end)


@pytest.mark.parametrize("change", ["fewer files", "fewer row groups", "fewer rows", "other text", "other tokenizer"])
def test_changed_data(base_dir, late_state, change):
    tokenizer = NumberTokenizer()
    if change == "fewer files":
        (base_dir / "base_data_climbmix" / "shard_00001.parquet").unlink()
    elif change == "fewer row groups":
        write_shards(base_dir, numbered([5] * 12), numbered([5] * 8))
    elif change == "fewer rows":
        write_shards(base_dir, numbered([5] * 12), numbered([5] * 11))
    elif change == "other text":
        write_shards(base_dir, numbered([5] * 12), numbered([6] * 12))
    else:
        tokenizer.encode = lambda texts, prepend, num_threads: [[prepend, 1] for _ in texts]
    with pytest.raises(UsageError, match="changed since the checkpoint was written"):
        next(data_loader(tokenizer, resume_state_dict=late_state, **ARGUMENTS))


@pytest.mark.parametrize("damage", [{"pq_idx": None}, {"rg_idx": "x"}, {"row": None}, {"buffer": [[1]]}, {"buffer": 5}])
def test_damaged_state(base_dir, late_state, damage):
    with pytest.raises(UsageError, match="data position in the checkpoint is damaged"):
        next(data_loader(NumberTokenizer(), resume_state_dict={**late_state, **damage}, **ARGUMENTS))


def test_state_of_a_longer_file_in_nanochats_format(base_dir, late_state):
    with pytest.raises(UsageError, match="changed since"):
        next(data_loader(NumberTokenizer(), resume_state_dict={"pq_idx": 0, "rg_idx": 3, "epoch": 1}, **ARGUMENTS))


def test_only_what_a_row_needs_is_encoded(base_dir):
    """The length of a document that is far longer than a row is an estimate; it says what share of the text is used."""
    seen = []

    class Tokenizer(LetterTokenizer):
        def encode(self, texts, prepend, num_threads):
            seen.extend(map(len, texts))
            return super().encode(texts, prepend, num_threads)

    T, long = 7, 1_000_000
    write_shards(base_dir, ["a" * long, "b" * long], ["val"])
    loader = data_loader(Tokenizer(), 1, T, "train", device="cpu", buffer_size=2)
    batches = take(loader, 2)
    assert max(seen) == 128 * (T + 1)
    assert [inputs.tolist() for inputs, _, _ in batches] == [[[BOS] + 6 * [1]], [[BOS] + 6 * [2]]]
    state = plain(batches[0][2])
    assert state["used"] == T + 1 and state["read"] == pytest.approx(long, rel=0.01)
    assert same(take(data_loader(Tokenizer(), 1, T, "train", device="cpu", buffer_size=2, resume_state_dict=state), 1), batches[1:])
    state["buffer"] = [[*place, long + 1] for *place, _ in state["buffer"]]  # of a checkpoint that was written when all was encoded
    assert torch.equal(next(data_loader(Tokenizer(), 1, T, "train", device="cpu", buffer_size=2, resume_state_dict=state))[0], batches[1][0])


def test_the_share_that_is_used(base_dir):
    """Documents of 4 and 6 tokens in rows of 8: 4 + 4, and of every document of 6 but the first 2 are lost."""
    write_shards(base_dir, ["a" * 3] * 4 + ["b" * 5] * 4, ["val"])
    batches = take(data_loader(LetterTokenizer(), 1, 7, "train", device="cpu", buffer_size=8), 20)
    for number, (_, _, state) in enumerate(batches, 1):
        assert state["used"] == 8 * number
        assert state["used"] <= state["read"] <= 1.5 * state["used"]


@pytest.mark.parametrize("tokens, begun", [(15, 1), (MOST_KEPT, 4)], ids=["kept", "too many to keep"])
def test_the_first_batches_again_and_again(letters, tokens, begun):
    """A first look at some of them, then all, twice: batches that are kept need no second loader, and are the same."""
    calls = []

    def begin():
        calls.append(1)
        return data_loader(LetterTokenizer(), 3, 5, "train", device="cpu", buffer_size=2)

    expected = take(begin(), 4)
    calls.clear()
    batches = FirstBatches(begin, 4, tokens)
    next(iter(batches))
    assert same(take(batches, 2), expected[:2])
    assert same(list(batches), expected) and same(list(batches), expected)
    assert len(calls) == begun
