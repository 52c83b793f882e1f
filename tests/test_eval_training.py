"""Evaluations in the course of a training: on disk, in the log and in the report; the training itself is the same with and without them."""
import shutil

import pytest
import torch

from nanochat import report
from nanochat.eval_report import EvalReport
from nanochat.evals import results
from nanochat.evals.results import Row, all_results, write_results
from nanochat.run_log import read_run_log
from tests import tiny
from tests.golden.fixtures import HERE
from tests.test_blimp import pairs, write
from tests.test_classification import nli_rows
from tests.test_classification import write as write_rows


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    shutil.copytree(HERE / "core_bundle", base_dir / "bundle")
    write(base_dir / "blimp" / "pairs.jsonl", [*pairs("island", field="syntax"), *pairs("binding", field="semantics")])
    for split in "train", "test":
        write_rows(base_dir / "nli" / f"snli_{split}.jsonl", nli_rows(12))
    return base_dir


MEAN = "core:6/mean of toy_choices, toy_schema"  # of a part of the tasks


@pytest.mark.slow
def test_a_training_is_evaluated_and_not_disturbed(base, finished_run, monkeypatch):
    monkeypatch.chdir(base)  # the report writes copies there
    assert tiny.train("--eval-tasks=blimp:5,core:6,nli-finetune,sample", "--eval-tasks-every=4", f"--eval-bundle={base / 'bundle'}", "--core-tasks=toy_schema,toy_choices",
                      "--finetune-epochs=1") == 0
    assert tiny.losses(base) == tiny.losses(finished_run) and tiny.same_checkpoint(base, finished_run)
    known = all_results(tiny.folder(base))
    assert list(known) == [4, 8]
    for step, content in known.items():
        assert {"blimp:5/blimp", "blimp:5/blimp/paradigm/island", MEAN, "core:6/toy_schema", "nli-finetune/snli"} <= content["rows"].keys()
        assert "core:6/toy_cloze" not in content["rows"] and content["tokens"] == 256 * step
    records = [record for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "evals"]
    assert [record["step"] for record in records] == [4, 8]
    assert records[1]["rows"][MEAN]["value"] == known[8]["rows"][MEAN]["value"] and records[1]["flops"] == known[8]["flops"]

    assert report.main([]) == 0
    text = (base / "report" / "report.md").read_text()
    assert "### Evaluations" in text and "| core:6/toy_schema |" in text and (base / "report" / "report_evals.png").read_bytes().startswith(b"\x89PNG")
    assert EvalReport(tiny.folder(base)).curves().keys() == {"blimp:5/blimp", MEAN, "nli-finetune/snli"}

    # a resumed run goes on knowing what was before it, a new one begins with nothing
    assert tiny.train("--resume-from-step=4", "--eval-tasks=blimp:5", "--eval-tasks-every=-1") == 0
    assert list(all_results(tiny.folder(base))) == [4]
    assert tiny.train("--num-iterations=1") == 0
    assert not all_results(tiny.folder(base))


def test_an_evaluation_that_does_not_fit_into_memory_is_left_out(base, finished_run, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("nanochat.evaluations.evaluate", full)
    assert tiny.train("--eval-tasks=blimp:5", "--eval-tasks-every=4") == 2, "at the end it is said, and nothing is lost"
    assert capsys.readouterr().out.count("Out of memory in an evaluation") == 1
    assert tiny.same_checkpoint(base, finished_run)


def test_core_of_a_training_is_kept_too(base):
    assert tiny.train("--core-metric-every=8", f"--eval-bundle={base / 'bundle'}", "--core-metric-max-per-task=6", "--save-every=-1") == 0
    rows = all_results(tiny.folder(base))[8]["rows"]
    core, = (record for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "core")
    assert rows["core:6"]["value"] == core["core_metric"] and rows["core:6/toy_cloze"]["value"] == core["results"]["toy_cloze"]


@pytest.mark.parametrize("flags, message", [
    (["--eval-tasks=core"], "holds no core.yaml"),
    (["--eval-tasks=blimp", "--blimp=nowhere"], "no file or folder nowhere"),
    (["--eval-tasks=pll"], "hidden tokens"),
    (["--eval-tasks=nli-finetune", "--nli=nowhere"], "no file NAME_test.jsonl"),
])
def test_what_cannot_be_evaluated_shows_before_the_first_step(base, capsys, flags, message):
    assert tiny.train("--eval-bundle=nowhere", *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "step 0000" not in captured.out


def test_evaluations_are_named_at_the_edge(base, capsys):
    with pytest.raises(SystemExit):
        tiny.train("--eval-tasks=riddle")
    assert "unknown evaluation 'riddle'" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# The file and the picture


def test_rows_are_merged_key_by_key(tmp_path):
    write_results(tmp_path, 3, {"a": Row(0.5, 10, 0.1), "b": Row(0.25, 4)}, tokens=7, flops=None)
    write_results(tmp_path, 3, {"b": Row(0.75, 8, counts={"ties": 2}), "c": Row(float("inf"), 1, metric="perplexity")}, flops=9.0)
    content = results.read_results(tmp_path / "eval_000003.json")
    assert (content["step"], content["tokens"], content["flops"]) == (3, 7, 9.0)
    values = {key: (row["value"], row["n"], row.get("se"), row.get("counts")) for key, row in content["rows"].items()}
    assert values == {"a": (0.5, 10, 0.1, None), "b": (0.75, 8, None, {"ties": 2}), "c": (None, 1, None, None)}
    assert "| c | n/a |" in results.table(content["rows"].items()) and [path.name for path in tmp_path.glob("*.json")] == ["eval_000003.json"]


def test_earlier_runs_stand_beside(tmp_path, monkeypatch):
    for tag, value in ("one", 0.4), ("two", 0.6):
        write_results(tmp_path / tag, 5, {"core/easy": Row(value, 10, 0.1, baseline=0.25), "text/a/bpb": Row(1.2, 5, metric="bits per byte")})
    mine = EvalReport(tmp_path / "two")
    assert mine.bars().keys() == {"core/easy"} and [run.folder.name for run in mine._earlier()] == ["one"]
    assert not EvalReport(tmp_path / "none") and mine.picture() and mine.curves() == {}
    only_text = EvalReport(tmp_path / "three")
    write_results(tmp_path / "three", 5, {"text/a/bpb": Row(1.2, 5, metric="bits per byte")})
    assert EvalReport(tmp_path / "three").picture() is None and not only_text


def test_too_many_bars_leave_out_the_finest(tmp_path):
    write_results(tmp_path, 5, {f"blimp/b/{kind}/{i}": Row(0.5, 10, 0.1, baseline=0.5) for kind in ("paradigm", "term", "field") for i in range(15)})
    assert len(EvalReport(tmp_path).bars()) == 30 and not any("paradigm" in key for key in EvalReport(tmp_path).bars())
