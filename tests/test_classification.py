"""Texts told apart: what the probe and the fine-tuned head learn can be learnt, rows that cannot be used are counted, ranks share the work."""
import gzip
import json
import random

import pytest
import torch

from nanochat.cli import UsageError
from nanochat.evals import classification, nli, superglue
from nanochat.evals.classification import FineTuneSettings, Item, encode, features, finetune, predict, probe, trainable_copy
from nanochat.evals.results import read_results
from tests.golden.fixtures import build_model
from tests.test_base_eval import run, trained  # noqa: F401
from tests.test_core_eval import CPU, model, tokenizer

SETTINGS = FineTuneSettings(finetune_epochs=4, finetune_lr=3e-3, finetune_batch=8)


def write(path, rows, pack=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if pack else text)


def texts(count, answers=0):
    """The class is the last word, behind words of no meaning; with answers the right one ends with `ro`."""
    draw = random.Random(3)
    noise = lambda: " ".join(draw.choices(["lu", "vi", "42"], k=draw.randrange(1, 9)))
    items = []
    for _ in range(count):
        label = draw.randrange(answers or 3)
        ends = [f"{noise()} {'ro' if i == label else 'ka'}" for i in range(answers)] if answers else [f"{noise()} {['ka', 'ro', 'miten'][label]}"]
        items.append(Item(tuple(encode(tokenizer(), end, 128) for end in ends), label))
    return items


# -----------------------------------------------------------------------------
# States, probe, head


def test_states_are_what_the_head_reads_at_the_last_token(monkeypatch):
    sequences = [item.texts[0] for item in texts(9)]
    monkeypatch.setitem(classification.TOKENS_PER_PASS, "cpu", 30)
    got = features(model(), sequences, CPU)
    for one, sequence in zip(got, sequences):
        logits = model()(torch.tensor([sequence]))[0, -1]
        mine = 15 * torch.tanh(model().lm_head(one)[:512] / 15)
        assert torch.allclose(mine, logits, atol=1e-4)


def test_a_long_text_keeps_its_end():
    ids = encode(tokenizer(), "ka ro " * 50 + "miten", 16)
    assert len(ids) == 16 and ids[0] == tokenizer().get_bos_token_id() and ids[1:] == tokenizer()("ka ro " * 50 + "miten")[-15:]


def test_the_probe_learns_what_can_be_read_off():
    items = texts(200)
    x, y = features(model(), [item.texts[0] for item in items], CPU), torch.tensor([item.label for item in items])
    assert (probe(x[:150], y[:150], x[150:], 3) == y[150:]).float().mean() > 0.9
    noise = y[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert (probe(x[:150], noise[:150], x[150:], 3) == noise[150:]).float().mean() < 0.6


def test_a_copy_computes_the_same_and_has_its_own_weights():
    inner = build_model(dict(sequence_len=32, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"), seed=3)
    inner.cast_for_inference()
    copy, ids = trainable_copy(inner), torch.arange(20)[None]
    assert torch.equal(copy(ids), inner(ids)) and all(p.dtype == torch.float32 for p in copy.parameters())
    before = inner(ids)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1.0)
    assert torch.equal(inner(ids), before)


@pytest.mark.parametrize("answers", [0, 2])
def test_fine_tuning_learns_and_leaves_the_model_and_the_random_stream_alone(answers):
    items = texts(160, answers)
    weights, stream = {name: value.clone() for name, value in model().state_dict().items()}, torch.get_rng_state()
    classifier = finetune(model(), items[:120], 3, SETTINGS, "toy")
    right = (predict(classifier, items[120:]) == torch.tensor([item.label for item in items[120:]])).float().mean()
    assert right > 0.9
    assert all(torch.equal(value, weights[name]) for name, value in model().state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    again = finetune(model(), items[:120], 3, SETTINGS, "toy")
    assert all(torch.equal(a, b) for a, b in zip(classifier.state_dict().values(), again.state_dict().values()))


def test_every_item_is_trained_on_once_an_epoch():
    items = texts(50)
    batches = classification._batches(items, 8, random.Random(1))
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, items)) and max(map(len, batches)) == 8


def test_ranks_share_the_jobs_in_their_order(monkeypatch):
    jobs = [lambda i=i: {f"job {i}": i} for i in range(5)]
    whole = classification.share_jobs(jobs)
    assert list(whole) == [f"job {i}" for i in range(5)]
    done = {}
    for rank in range(2):
        monkeypatch.setattr(classification, "rank_and_world", lambda rank=rank: (rank, 2))

        def gather(mine, group, rank=rank):
            done[rank] = mine
            return [[{f"job {i}": i} for i in range(r, 5, 2)] for r in range(2)]
        monkeypatch.setattr(classification, "of_all_ranks", gather)
        assert classification.share_jobs(jobs) == whole
    assert [len(done[0]), len(done[1])] == [3, 2]


# -----------------------------------------------------------------------------
# NLI


def nli_rows(count):
    ends = dict(entailment="ka", neutral="ro", contradiction="miten")
    return [dict(premise=f"lu vi {i}", hypothesis=f"42 {ends[label]}", label=label) for i, label in zip(range(count), list(ends) * count)]


def test_three_ways_of_inference(trained, tmp_path, capsys):  # noqa: F811
    for name in "snli", "mnli":
        write(tmp_path / "sets" / f"{name}_train.jsonl.gz", [*nli_rows(60), dict(premise="a", hypothesis="b", label="-")], pack=True)
        write(tmp_path / "sets" / f"{name}_test.jsonl", [*nli_rows(30), dict(premise="a", hypothesis="b", label="-")])
    flags = [f"--nli={tmp_path / 'sets'}", "--finetune-lr=0.003", "--finetune-epochs=6", "--finetune-batch=8"]
    assert run("--eval=nli-prompt:20,nli-probe,nli-finetune", *flags) == 0
    rows = read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]
    assert rows.keys() == {f"{way}/{name}" for way in ("nli-prompt:20", "nli-probe", "nli-finetune") for name in ("snli", "mnli")}
    assert all(row["baseline"] == pytest.approx(1 / 3) and row["counts"]["not usable"] == 1 for row in rows.values())
    assert rows["nli-prompt:20/snli"]["n"] == 20 and rows["nli-probe/snli"]["n"] == 30
    assert rows["nli-probe/snli"]["value"] > 0.8 and rows["nli-finetune/mnli"]["value"] > 0.8
    out = capsys.readouterr().out
    assert "snli_test.jsonl, line 31: 'label' is '-'" in out and "| BUS, 64M (drafts) | 41.6 | 38.6 |" in out
    assert "| HyperCloning, 64M (drafts) | 40.9 | 36.1 |" in (trained / "report" / "base-model-evaluation.md").read_text()


def test_sets_that_lack_something(tmp_path):
    with pytest.raises(UsageError, match="no file NAME_test.jsonl"):
        nli.read_sets(tmp_path / "nowhere")
    write(tmp_path / "snli_test.jsonl", nli_rows(3))
    assert nli.read_sets(tmp_path, trained=False)[0].name == "snli"
    with pytest.raises(UsageError, match="no snli_train.jsonl beside"):
        nli.read_sets(tmp_path)
    write(tmp_path / "snli_train.jsonl", [dict(premise="a", hypothesis="", label="neutral")])
    with pytest.raises(UsageError, match="snli_train.jsonl, line 1: 'hypothesis' is empty; no row"):
        nli.read_sets(tmp_path)


# -----------------------------------------------------------------------------
# SuperGLUE

PUBLISHED = {
    "BoolQ": (dict(question="is it so", passage="It is.", label=True), [(("It is.\nQuestion: is it so?",), 1)]),
    "CB": (dict(premise="A man.", hypothesis="A being.", label="contradiction"), [(("A man.\nA being.",), 1)]),
    "COPA": (dict(premise="I fell.", choice1="I slept.", choice2="I tripped.", question="cause", label=1), [(("I fell because i slept.", "I fell because i tripped."), 1)]),
    "MultiRC": (dict(passage=dict(text="It is.", questions=[dict(question="What?", answers=[dict(text="It", label=1), dict(text="Us", label=0)])])),
                [(("It is.\nQuestion: What?\nAnswer: It",), 1), (("It is.\nQuestion: What?\nAnswer: Us",), 0)]),
    "RTE": (dict(premise="A man.", hypothesis="A being.", label="not_entailment"), [(("A man.\nA being.",), 1)]),
    "WiC": (dict(word="bank", sentence1="A bank.", sentence2="The bank.", label=False), [(("A bank.\nThe bank.\nThe word is: bank",), 0)]),
    "WSC": (dict(text="He met Al.", target=dict(span1_text="Al", span2_text="He", span1_index=2, span2_index=0), label=False), [(("He met Al.\nHe is Al",), 0)]),
}


@pytest.mark.parametrize("name", superglue.TASKS)
def test_rows_in_the_published_form(name):
    row, wanted = PUBLISHED[name]
    assert superglue.TASKS[name].texts(row) == wanted and superglue._complaint(superglue.TASKS[name], row) is None
    for broken in ({key: value for key, value in row.items() if key != list(row)[0]}, {**row, list(row)[0]: 3}, {**row, "label": "maybe"}):
        if name != "MultiRC" or broken.get("label") is None:
            assert superglue._complaint(superglue.TASKS[name], broken)


def test_f1_counts_what_the_definition_counts():
    predicted, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    assert superglue.f1_score(predicted, labels, (1,)) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert superglue.f1_score(predicted, labels, (0, 1)) == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert superglue.f1_score(predicted, labels, (2,)) == 0


def test_tasks_of_a_folder(trained, tmp_path, capsys):  # noqa: F811
    labels = ("entailment", "contradiction", "neutral")
    cb = [dict(premise="lu vi", hypothesis=f"42 {['ka', 'ro', 'miten'][i % 3]}", label=labels[i % 3]) for i in range(60)]
    write(tmp_path / "sg" / "CB" / "train.jsonl", cb)
    write(tmp_path / "sg" / "CB" / "val.jsonl", [*cb[:20], dict(premise="a")])
    copa = [dict(premise="lu.", choice1="vi ka", choice2="42 ro", question="cause", label=1), dict(premise="lu.", choice1="vi ro", choice2="42 ka", question="effect", label=0)]
    for split in "train", "val":
        write(tmp_path / "sg" / "COPA" / f"{split}.jsonl", copa * 20)
    assert run("--eval=superglue", f"--superglue={tmp_path / 'sg'}", "--finetune-lr=0.003", "--finetune-epochs=6", "--finetune-batch=8") == 0
    rows = read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]
    assert rows.keys() == {"superglue/CB", "superglue/CB/f1", "superglue/COPA"}
    assert rows["superglue/CB"]["n"] == 20 and rows["superglue/CB"]["counts"]["not usable"] == 1 and rows["superglue/CB"]["value"] > 0.8
    assert rows["superglue/COPA"]["baseline"] == 0.5 and rows["superglue/COPA"]["value"] > 0.8
    out = capsys.readouterr().out
    assert "BoolQ, MultiRC, RTE, WiC, WSC" in out and "CB (val): left out: " in out
    with pytest.raises(UsageError, match="has none of the folders BoolQ"):
        superglue.read_tasks(tmp_path)
