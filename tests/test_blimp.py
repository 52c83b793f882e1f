"""Minimal pairs: the same decisions in batches as one sentence at a time, ties half, no two sets mixed."""
import gzip
import json
import random

import pytest
import torch

from nanochat.cli import UsageError
from nanochat.evals import blimp, scoring
from nanochat.evals.results import read_results
from tests.test_base_eval import CONFIG, run, trained  # noqa: F401
from tests.test_core_eval import CPU, model, tokenizer

WORDS = ["ka", "ro", "miten", "lu", "shaporel", "42", "vi,", "two"]


def pairs(uid, count=8, **fields):
    """Sentences that differ in a word in the middle, at the end, or by an end."""
    draw = random.Random(uid)
    rows = []
    for i in range(count):
        words = draw.choices(WORDS, k=draw.randrange(3, 12))
        other = list(words)
        if i % 4 == 3:
            other.append("end")
        else:
            other[draw.randrange(len(words))] = "other"
        good, bad = draw.sample([" ".join(words), " ".join(other)], 2)
        rows.append({"sentence_good": good, "sentence_bad": bad, "UID": uid, **fields})
    return rows


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "small.jsonl.gz", [
        *pairs("island", field="syntax", linguistics_term="island_effects"),
        *pairs("binding", field="syntax/semantics", linguistics_term="binding"),
        *pairs("domain", field="syntax_semantics", linguistics_term="binding"),
        *pairs("animate", field="syntax", linguistics_term="s-selection"),
        *pairs("passive", field="syntax", linguistics_term="argument_structure")])


def sentence_nats(sentence):
    """The definition: the cost of a whole sentence, read alone."""
    ids = torch.tensor([tokenizer()(sentence, prepend=tokenizer().get_bos_token_id())])
    return -model()(ids)[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()


@pytest.mark.parametrize("budget", [1, 200, 10**6])
def test_batches_decide_like_single_sentences(budget, monkeypatch):
    monkeypatch.setitem(scoring.TOKENS_PER_FORWARD, "cpu", budget)
    monkeypatch.setattr(scoring, "EXAMPLES_SORTED", 7)
    rows = pairs("any", 40)
    got, ties = blimp.score_pairs(model(), tokenizer(), rows, CPU)
    want = [float(sentence_nats(row["sentence_good"]) < sentence_nats(row["sentence_bad"])) for row in rows]
    assert got.tolist() == want and not ties
    assert 0 < sum(want) < len(want)


def test_a_tie_counts_half_and_is_reported(tmp_path):
    same = {"sentence_good": "ka ro", "sentence_bad": "ka ro", "UID": "same"}
    path = write(tmp_path / "ties.jsonl", [same, *pairs("same", 1)])
    rows = blimp.evaluate_set(model(), tokenizer(), path, CPU)
    scores, ties = blimp.score_pairs(model(), tokenizer(), [same, *pairs("same", 1)], CPU)
    assert ties == [0] and scores[0] == 0.5
    assert rows["paradigm/same"].counts["ties"] == rows[""].counts["ties"] == 1
    assert rows["paradigm/same"].value == scores.mean() in (0.25, 0.75)


def test_means_are_over_paradigms_in_one_spelling(data):
    rows = blimp.evaluate_set(model(), tokenizer(), data, CPU)
    value = {key: row.value for key, row in rows.items()}
    assert {key for key in rows if key.startswith("field/")} == {"field/syntax", "field/syntax_semantics"}
    assert {key for key in rows if key.startswith("term/")} == {"term/island_effects", "term/binding", "term/argument_structure"}
    assert value["term/argument_structure"] == pytest.approx((value["paradigm/animate"] + value["paradigm/passive"]) / 2)
    paradigms = [row for key, row in rows.items() if key.startswith("paradigm/")]
    assert len(paradigms) == 5 and value[""] == pytest.approx(sum(row.value for row in paradigms) / 5)
    assert rows[""].n == 40 and rows[""].se == pytest.approx(sum(row.se ** 2 for row in paradigms) ** 0.5 / 5)


def test_a_sample_is_the_same_every_time(data):
    few = blimp.read_set(data, 3)[0]
    assert {uid: len(rows) for uid, rows in few.items()} == dict.fromkeys(["island", "binding", "domain", "animate", "passive"], 3)
    assert few == blimp.read_set(data, 3)[0] and few["island"] != blimp.read_set(data)[0]["island"][:3]


def test_a_folder_is_a_set_and_files_without_uid_are_paradigms(tmp_path):
    for name in "hypernym", "turn_taking":
        write(tmp_path / "supplement" / f"{name}.jsonl", [{key: row[key] for key in ("sentence_good", "sentence_bad")} for row in pairs(name)])
    assert list(blimp.read_set(tmp_path / "supplement")[0]) == ["hypernym", "turn_taking"]


def test_full_and_filtered_are_never_mixed(tmp_path):
    for name in "full", "filtered":
        write(tmp_path / "together" / f"{name}.jsonl", pairs("island"))
        write(tmp_path / "apart" / name / "blimp.jsonl", pairs("island"))
    with pytest.raises(UsageError, match="has the paradigm island twice, in filtered.jsonl and full.jsonl"):
        blimp.read_set(tmp_path / "together")
    with pytest.raises(UsageError, match="give the sets themselves"):
        blimp.check_sets([tmp_path / "apart"])
    with pytest.raises(UsageError, match="two sets are called full"):
        blimp.check_sets([tmp_path / "apart" / "full", tmp_path / "together" / "full.jsonl"])


@pytest.mark.parametrize("bad, complaint", [
    ({"sentence_good": "ka"}, "'sentence_bad' is missing"),
    ({"sentence_good": " ", "sentence_bad": "ka"}, "'sentence_good' is empty"),
    ({"sentence_good": "ka", "sentence_bad": "ro", "field": 3}, "'field' is missing or is not text"),
    (["ka", "ro"], "not a JSON object"),
])
def test_bad_rows_are_counted_and_named(tmp_path, capsys, bad, complaint):
    path = write(tmp_path / "some.jsonl", [*pairs("island"), bad])
    rows = blimp.evaluate_set(model(), tokenizer(), path, CPU)
    assert rows[""].n == 8 and rows[""].counts["not usable"] == 1
    assert "some.jsonl, line 9: " + complaint in capsys.readouterr().out
    with pytest.raises(UsageError, match="no row of that file can be used"):
        blimp.read_set(write(tmp_path / "none.jsonl", [bad]))


def test_the_command(trained, tmp_path, capsys):  # noqa: F811
    data = write(tmp_path / "small.jsonl.gz", pairs("island", field="syntax"))
    other = write(tmp_path / "other" / "a.jsonl", pairs("binding"))
    assert run("--eval=blimp:5", f"--blimp={data},{other.parent}") == 0
    rows = read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]
    assert {"blimp:5/small", "blimp:5/small/field/syntax", "blimp:5/small/paradigm/island", "blimp:5/other", "blimp:5/other/paradigm/binding"} == rows.keys()
    assert rows["blimp:5/small"]["n"] == 5 and "BLiMP small: 0." in capsys.readouterr().out
    assert "- BLiMP small: " in (trained / "report" / "base-model-evaluation.md").read_text()


def test_a_model_of_hidden_tokens_is_asked_for_pseudo_log_likelihoods():
    masked = model()

    class Masked:
        config = type("Config", (), dict(CONFIG, causal=False))
        rotary_seq_len = 100
        get_device = staticmethod(masked.get_device)

        def __call__(self, ids):
            return masked(ids)
    rows = pairs("any", 3)
    special = {tokenizer().encode_special(token) for token in tokenizer().get_special_tokens()}
    both = []
    for asked, hidden in (Masked(), False), (masked, True):  # the second is a causal model, which tells a hidden token at the place before it
        scores, _ = blimp.score_pairs(asked, tokenizer(), rows, CPU, hidden=hidden)
        both += scores.tolist()
    for row, score, asked in zip(rows * 2, both, [Masked()] * 3 + [masked] * 3):
        good, bad = (sum(blimp.pseudo_log_likelihoods(asked, ids, tokenizer().encode_special(blimp.MASK), special))
                     for ids in tokenizer()([row["sentence_good"], row["sentence_bad"]], prepend=tokenizer().get_bos_token_id()))
        assert score == float(good > bad)
