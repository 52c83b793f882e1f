"""The script from flags to files, on a tiny model, and where its CORE data comes from."""
import io
import shutil
import urllib.request
import zipfile

import pytest
import torch

from nanochat import core_eval, eval_bundle, evaluations, kernel_choice
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.cli import UsageError
from nanochat.evals import results
from nanochat.evals.results import Row
from scripts import base_eval
from tests.golden.fixtures import HERE, build_model, load, tokenizer_512

CONFIG = dict(sequence_len=32, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")


@pytest.fixture
def trained(base_dir):
    """A base directory with tokenizer, shards, CORE data and the model `d2` at step 7."""
    tokenizer_512().save(str(base_dir / "tokenizer"))
    torch.save(torch.tensor(load("bits_per_byte")["token_bytes"], dtype=torch.int32), base_dir / "tokenizer" / "token_bytes.pt")
    shutil.copytree(HERE / "shards", base_dir / "base_data_climbmix")
    shutil.copytree(HERE / "core_bundle", base_dir / "eval_bundle")
    save_checkpoint(base_dir / "base_checkpoints" / "d2", 7, build_model(CONFIG, seed=3).state_dict(), None, {"step": 7, "model_config": CONFIG})
    return base_dir


def run(*flags):
    return base_eval.main(["--device-type=cpu", *flags])


def test_everything(trained, capsys):
    assert run("--device-batch-size=2", "--split-tokens=640", "--max-per-task=6") == 0
    out = capsys.readouterr().out
    assert "train bpb: " in out and "val bpb: " in out and "4 of 22 tasks" in out
    assert all(f"[sample {i}] {prompt}" in out for i, prompt in enumerate(evaluations.PROMPTS))
    assert "[unconditioned 7]" in out

    lines = (trained / "base_eval" / "base_model_000007.csv").read_text().splitlines()
    assert lines[0] == "Task                               , Accuracy  , Centered  "
    assert [line.split(", ")[0].strip() for line in lines[1:]] == ["toy_choices", "toy_choices_zero", "toy_schema", "toy_cloze", "CORE"]
    assert lines[-1].startswith("CORE                               ,           , ")
    centered = [float(line.split(",")[2]) for line in lines[1:]]
    assert centered[-1] == pytest.approx(sum(centered[:-1]) / 4, abs=1e-6)

    report = (trained / "report" / "base-model-evaluation.md").read_text()
    assert "d2 (step 7)" in report and f"{centered[-1]:.4f}" in report
    assert all(name in report for name in ("train bpb", "val bpb", "toy_schema", "sample 6", "unconditioned 7"))


def test_same_numbers_twice(trained, capsys):
    scores = []
    for _ in range(2):
        assert run("--eval=bpb", "--device-batch-size=2", "--split-tokens=640") == 0
        scores.append([line for line in capsys.readouterr().out.splitlines() if "bpb" in line])
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_only_what_is_asked_for(trained, capsys):
    assert run("--eval=core", "--max-per-task=6", "--model_tag=d2", "--step=7") == 0
    out = capsys.readouterr().out
    assert "CORE metric" in out and "bpb" not in out and "[sample" not in out
    assert "toy_cloze (1-shot, type: language_modeling)... accuracy: " in out


def test_progress_of_a_long_run(trained, capsys, monkeypatch):
    monkeypatch.setattr(core_eval, "PROGRESS_SECONDS", 0)
    assert run("--eval=core") == 0
    out = capsys.readouterr().out
    assert "100% (all of CORE: 100%, eta 0.0m) accuracy" in out


@pytest.mark.parametrize("flags, message", [
    (["--eval=core,riddle"], "unknown evaluation 'riddle'"),
    (["--eval="], "is not a list"),
    (["--eval=core:none"], "is not a whole number above 0"),
    (["--eval=text:100,core,text"], "'text:100,core,text' asks for text 2 times"),
    (["--step=some"], "'some' is no step"),
    (["--max-per-task=0"], "max-per-task"),
    (["--device-batch-size=none"], "device-batch-size"),
])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--model-tag=d9"], "d9"),
    (["--step=8"], "8"),
    (["--eval=bpb", "--device-batch-size=2", "--split-tokens=63"], "less than one batch of 64 tokens"),
    (["--eval=core", "--max-per-task=2"], "use at least 3 rows"),
    (["--eval=core:2"], "use at least 3 rows"),
    (["--eval=core", "--core-tasks=riddle"], "no task riddle"),
    (["--eval=core", "--eval-bundle=/nowhere"], "holds no core.yaml"),
    (["--eval=blimp"], "give --blimp=FILE or FOLDER"),
    (["--eval=blimp", "--blimp=/nowhere"], "no file or folder /nowhere"),
    (["--eval=text"], "give --text=FILE"),
    (["--eval=text", "--text=/nowhere"], "no file /nowhere"),
])
def test_what_cannot_be_evaluated_ends_with_one_line(trained, flags, message, capsys):
    assert run(*flags) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and message in err


def test_a_further_evaluation_is_a_line_in_the_registry(trained, capsys, monkeypatch):
    count = evaluations.Evaluation(lambda subject, limit: ({"": Row(subject.model.config.n_layer, limit or 1, label="layers")}, []))
    monkeypatch.setitem(evaluations.EVALUATIONS, "layers", count)
    assert run("--eval=layers:5,bpb", "--device-batch-size=2", "--split-tokens=640") == 0
    report = (trained / "report" / "base-model-evaluation.md").read_text()
    assert "- layers: 2\n" in report and report.index("val bpb") < report.index("layers: 2")
    rows = results.read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]
    assert set(rows) == {"bpb:640/train", "bpb:640/val", "layers:5"} and rows["layers:5"]["n"] == 5
    assert [one.name for one in evaluations.choose(None, build_model(CONFIG, seed=3))] == ["sample", "bpb", "core"]


@pytest.mark.parametrize("names", ["pll", "bpb,pll"])
def test_what_does_not_suit_the_model_is_refused(trained, capsys, names):
    assert run(f"--eval={names}") == 2
    assert "--eval=pll is for a model of hidden tokens" in capsys.readouterr().err


def test_bad_core_data_shows_before_anything_is_evaluated(trained, capsys):
    (trained / "eval_bundle" / "eval_data" / "b" / "cloze.jsonl").write_text("[]\n")
    assert run("--max-per-task=6") == 2
    captured = capsys.readouterr()
    assert "cloze.jsonl, line 1" in captured.err and "[sample" not in captured.out


def test_bad_rows_are_left_out_and_counted(trained, capsys):
    path = trained / "eval_bundle" / "eval_data" / "b" / "cloze.jsonl"
    path.write_text(path.read_text() + '{"context": "a"}\n' * 5)
    assert run("--eval=core") == 0
    out = capsys.readouterr().out
    assert out.count("toy_cloze: left out: ") == 3 and "toy_cloze: 5 rows are left out in all, 20 are used" in out
    row = results.read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]["core/toy_cloze"]
    assert row["n"] == 20 and row["counts"]["not usable"] == 5


# -----------------------------------------------------------------------------
# Results


def test_results_with_standard_errors_lie_beside_the_checkpoint(trained):
    assert run("--eval=core:6") == 0
    assert run("--eval=core", "--core-tasks=toy_schema") == 0
    content = results.read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")
    rows = content["rows"]
    assert content["step"] == 7 and {"core:6", "core:6/toy_schema", "core:6/toy_cloze", "core/toy_schema"} <= rows.keys()
    assert "core/toy_cloze" not in rows and rows["core:6/toy_schema"]["n"] == 6 and rows["core/toy_schema"]["n"] == 20
    p = rows["core/toy_schema"]["value"]
    assert rows["core/toy_schema"]["se"] == pytest.approx((p * (1 - p) / 19) ** 0.5)
    assert rows["core/toy_schema"]["baseline"] == pytest.approx(0.5)
    assert rows["core:6"]["se"] > 0 and "core" not in rows, "a mean of some tasks is not CORE"


def test_a_part_never_takes_the_place_of_the_whole(trained):
    """Also where nanochat's flags make it one."""
    assert run("--eval=core") == 0
    read = lambda: results.read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"]
    whole = read()
    assert run("--eval=core,bpb", "--max-per-task=6", "--device-batch-size=2", "--split-tokens=640") == 0
    rows = read()
    assert {key: rows[key] for key in whole} == whole and rows["core:6/toy_schema"]["n"] == 6
    assert {"bpb:640/train", "bpb:640/val"} <= rows.keys() and not {"bpb/train", "bpb/val"} & rows.keys()


def test_decoding_speed_bears_the_name_of_the_machine(trained, capsys):
    assert run("--eval=decode:4") == 0
    ((key, row),) = results.read_results(trained / "base_checkpoints" / "d2" / "eval_000007.json")["rows"].items()
    assert key == f"decode:4/{kernel_choice.machine()}" and "/" not in kernel_choice.machine()
    assert row["value"] > 0 and row["n"] == 5 and row["metric"] == "tokens/s"
    assert f"({kernel_choice.machine()})" in capsys.readouterr().out


def test_all_checkpoints_of_all_models(trained, capsys):
    for tag, step in ("d2", 9), ("other", 3):
        save_checkpoint(trained / "base_checkpoints" / tag, step, build_model(CONFIG, seed=4).state_dict(), None, {"step": step, "model_config": CONFIG})
    assert run("--eval=core:6", "--model-tag=d2", "--step=all") == 0
    assert sorted(results.all_results(trained / "base_checkpoints" / "d2")) == [7, 9]
    assert not results.all_results(trained / "base_checkpoints" / "other")
    assert run("--eval=core:6", "--model-tag=all") == 0
    assert sorted(results.all_results(trained / "base_checkpoints" / "other")) == [3]
    report = (trained / "report" / "base-model-evaluation.md").read_text()
    assert "d2 (step 9)" in report and "other (step 3)" in report


def test_a_broken_file_of_results_shows_before_anything_is_evaluated(trained, capsys):
    (trained / "base_checkpoints" / "d2" / "eval_000007.json").write_text('{"rows": {"core": 3}}')
    assert run("--eval=core") == 2
    captured = capsys.readouterr()
    assert "eval_000007.json is not a file of results" in captured.err and "Evaluating" not in captured.out


# -----------------------------------------------------------------------------
# Bundle


def zipped(*names, root="eval_bundle"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted((HERE / "core_bundle").rglob("*")):
            if path.is_file():
                archive.write(path, f"{root}/{path.relative_to(HERE / 'core_bundle')}")
        for name in names:
            archive.writestr(name, "x")
    return content.getvalue()


def test_the_bundle_is_downloaded_once(base_dir, monkeypatch):
    asked = []

    def urlopen(url, *args, **kwargs):
        asked.append(url)
        return io.BytesIO(zipped())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):
        bundle = eval_bundle.find_eval_bundle()
        assert (bundle / "core.yaml").read_text() == (HERE / "core_bundle" / "core.yaml").read_text()
    assert asked == [eval_bundle.EVAL_BUNDLE_URL]
    assert {path.name for path in base_dir.iterdir() if not path.name.endswith(".lock")} == {"eval_bundle", "eval_bundle.zip"}


def test_a_zip_left_by_an_interrupted_run_is_used(base_dir):
    (base_dir / "eval_bundle.zip").write_bytes(zipped())
    assert (eval_bundle.find_eval_bundle() / "eval_data").is_dir()


def test_without_network_the_error_says_where_to_put_it(base_dir, monkeypatch):
    def urlopen(url, *args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UsageError) as error:
        eval_bundle.find_eval_bundle()
    assert str(base_dir / "eval_bundle.zip") in str(error.value) and f"{base_dir / 'eval_bundle'}" in str(error.value)


@pytest.mark.parametrize("content, message", [
    (b"not a zip", "not an intact zip"),
    (zipped()[:-200], "not an intact zip"),
    (zipped().replace(b"label: toy", b"label: joy", 1), "not an intact zip"),
    (zipped("../outside.txt"), "outside"),
    (zipped("/tmp/outside.txt"), "outside"),
    (zipped(root="another"), "no folder eval_bundle"),
], ids=["no zip", "cut", "changed", "above", "elsewhere", "another folder"])  # they hold the time, which two workers do not share
def test_bad_zips_leave_nothing_behind(base_dir, content, message):
    (base_dir / "inner").mkdir()
    path = base_dir / "inner" / "bad.zip"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        eval_bundle.place_eval_bundle(path)
    assert [entry.name for entry in base_dir.iterdir()] == ["inner"]


@pytest.mark.parametrize("name", ["report", "base_eval"])
def test_results_that_could_not_be_written_are_not_computed(trained, capsys, monkeypatch, name):
    (trained / name).write_text("a file")
    monkeypatch.setattr(evaluations, "sample_prompts", lambda *args: pytest.fail("computed"))
    assert run() == 2
    assert f"cannot write to {trained / name}" in capsys.readouterr().err
