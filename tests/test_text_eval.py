"""Perplexity of a text file: every token is told once, from at least half of a context."""
import gzip
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.evals.results import read_results
from nanochat.evals.text import evaluate_text, windows
from tests.test_base_eval import run, trained  # noqa: F401
from tests.test_core_eval import CPU, model, tokenizer

TEXT = "ka ro miten lu shaporel 42 vi, and so on; ünder the sea.\n" * 30


@given(st.integers(1, 90), st.integers(2, 30), st.integers(1, 29))
def test_every_token_is_scored_once_with_a_full_view(count, context, stride):
    stride = min(stride, context - 1)
    tokens, told = list(range(count)), []
    for i, example in enumerate(windows(tokens, -7, context, stride)):
        (sequence,), (start,), (end,) = example.sequences, example.starts, example.ends
        assert sequence[0] == -7 and end == len(sequence) <= context and start >= 1
        assert i == 0 or start >= context - stride  # what is seen before the first that is scored, BOS included
        told += sequence[start:end]
    assert told == tokens


def test_against_one_window_after_another(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    rows = evaluate_text(model(), tokenizer(), path, CPU, stride=50)
    ids, bos, context = tokenizer()(TEXT), tokenizer().get_bos_token_id(), 128
    nats = 0.0
    done = 0
    while done < len(ids):
        end = min(len(ids), context - 1 if done == 0 else done + 50)
        begin = max(0, end - context + 1)
        window = torch.tensor([[bos, *ids[begin:end]]])
        losses = -model()(window)[0, :-1].double().log_softmax(-1).gather(1, window[0, 1:, None])[:, 0]
        nats += losses[done - begin:].sum().item()
        done = end
    assert rows["bpb"].value == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5) and rows["bpb"].n == len(TEXT.encode())
    assert rows["perplexity"].value == pytest.approx(math.exp(nats / len(ids)), rel=1e-5) and rows["perplexity"].n == len(ids)
    assert rows["word-perplexity"].value == pytest.approx(math.exp(nats / len(TEXT.split())), rel=1e-5)
    assert rows["bpb"].se < 0.1 * rows["bpb"].value
    assert rows["perplexity"].se == pytest.approx(rows["perplexity"].value * nats / len(ids) * rows["bpb"].se / rows["bpb"].value)


def test_a_longer_view_does_not_hurt(tmp_path):
    """Of a text that repeats itself all strides tell about the same: no window is left without its tokens."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    values = [evaluate_text(model(), tokenizer(), path, CPU, stride=stride)["bpb"].value for stride in (1, 64, 127)]
    assert max(values) < 1.1 * min(values)


def test_what_cannot_be_told(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"ka ro" * 100)[:20])
    for name, message in ("empty.txt", "is empty"), ("bytes.txt", "UTF-8"), ("torn.txt.gz", "cannot read"), ("none.txt", "No such file"):
        with pytest.raises(UsageError, match=message):
            evaluate_text(model(), tokenizer(), tmp_path / name, CPU)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UsageError, match="--text-stride=128 leaves nothing"):
        evaluate_text(model(), tokenizer(), tmp_path / "text.txt", CPU, stride=128)


def test_the_command(trained, tmp_path, capsys):  # noqa: F811
    (tmp_path / "wiki.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert run("--eval=text:100", f"--text={tmp_path / 'wiki.txt.gz'}") == 0
    rows = read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]
    assert rows.keys() == {"text:100/wiki.txt.gz/bpb", "text:100/wiki.txt.gz/perplexity", "text:100/wiki.txt.gz/word-perplexity"}
    assert rows["text:100/wiki.txt.gz/perplexity"]["n"] == 100
    assert "wiki.txt.gz: bits per byte: " in capsys.readouterr().out
