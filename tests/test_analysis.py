"""The studies of analysis/, with trials that need no training."""
import json
import math
from types import SimpleNamespace

import pytest

from analysis import (
    growth,
    growth_bound,
    growth_cause,
    growth_drafts,
    growth_family,
    growth_few_data,
    low_rank,
    mixing,
    normalized,
    operators,
    runner,
    small_english,
    spectra,
    study,
    width_transfer,
)
from analysis.study import cost_with
from analysis.trial import Growth, Result, Trial, folder_of, read
from nanochat.cli import UsageError
from nanochat.dataset import parquets_iter_batched
from nanochat.run_log import FILENAME, RunLog
from nanochat.tokenizer import get_tokenizer
from scripts import base_train
from tests import fake_runs, tiny


@pytest.mark.parametrize("one, flags, runs", [
    (low_rank, ["--seeds=2", "--only", "both, equal tokens"], 4), (normalized, ["--seeds=2"], 16), (width_transfer, ["--widths", "64", "128"], 6),
    (growth, ["--seeds=2"], 34)], ids=["low_rank", "normalized", "width_transfer", "growth"])
def test_table_numbers_and_picture(one, flags, runs, tmp_path, base_dir, monkeypatch, capsys):
    trained = []

    def run_trials(directory, asked, jobs, places=None):
        assert directory == str(base_dir) and jobs == 2
        trained.extend(trial.flags if isinstance(trial, Trial) else trial for trial in asked)
        return [Result(trial, [0, 100 + i], [3.0, 2.0 - i / 100], [0.0, 1e9 * (i + 1)], 1.0 + i, 1000) for i, trial in enumerate(trained)]

    monkeypatch.setattr(study, "run_trials", run_trials)
    monkeypatch.setattr(one, "run_trials", run_trials, raising=False)
    monkeypatch.setattr(study, "get_tokenizer", lambda: SimpleNamespace(get_vocab_size=lambda: 2048))
    monkeypatch.setattr(one, "nats_per_bpb", lambda: 2.0, raising=False)
    assert one.main([*flags, f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert len(trained) == runs and all(trial["depth"] == 4 for trial in trained)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert "nan" not in "".join(table)
    assert list(dict.fromkeys(line.split(" | ")[0].removeprefix("| ") for line in table[1:])) == list(rows)
    assert "bpb" in json.dumps(rows) and (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_dense_and_low_rank_layers_decay_alike(monkeypatch):
    """base_train scales a decay with the model."""
    monkeypatch.setattr(low_rank, "dense_flops", lambda: 1e12)
    runs = [base_train.parse(trial.arguments()) for trial in low_rank.plan(list(low_rank.CONTESTANTS), 1).values()]
    assert {run.weight_decay for run in runs} == {0.0}


@pytest.mark.parametrize("one", [width_transfer, spectra], ids=lambda one: one.__name__)
def test_widths_that_no_model_has_are_refused(one, base_dir, capsys):
    assert pytest.raises(SystemExit, one.main, ["--widths", "64", "100"]).value.code == 2
    assert "100 is no multiple of 32, the width of a head" in capsys.readouterr().err


@pytest.mark.parametrize("one", [mixing, growth_family, growth_cause, growth_few_data, operators], ids=lambda one: one.__name__)
def test_studies_of_branches(one, tmp_path, base_dir, monkeypatch, capsys):
    """From their plans to their tables and pictures, with losses that fall as those of a trunk do."""
    def run_trials(directory, wanted, jobs, places):
        def result(trial):
            last = trial.step + sum(trial.flags.get(name, 0) for name in ("num-iterations", "steady-steps", "warmdown-steps"))
            steps = list(range(trial.step or 256, last, 256)) + [last]
            losses = [3 - 0.2 * math.log(step) - 0.001 * len(trial.name.strip("0123456789")) for step in steps]
            return Result(trial.flags, steps, losses, [1e9 * step for step in steps], 1.0, 1000, begin=1e9 * trial.step, growths=[Growth(1e9, 1.0, 2.0, 2.1)])
        return [result(trial) for trial in wanted]

    monkeypatch.setattr(study, "run_trials", run_trials)
    monkeypatch.setattr(one, "nats_per_bpb", lambda: 100.0)
    if one is growth_few_data:
        monkeypatch.setattr(one, "steps_of", lambda epochs: {count: 100.0 * count for count in epochs})
    flags = [f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}", "--seeds=2"]
    assert one.main(flags) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) > 5 and len({line.count(" | ") for line in rows}) <= 3 and "nan" not in out
    assert "bpb" in (tmp_path / "numbers.json").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("broken, status", [("random", 0), ("lossless", 2)])
def test_an_operator_that_diverges_is_said_to_and_costs_no_other(broken, status, tmp_path, base_dir, monkeypatch, capsys):
    """Unless it is the one that all others are compared with."""
    plan, diverged = operators.plan, set()

    def planned(seed, follow):
        found = plan(seed, follow)
        diverged.update(trial for name, trial in found.items() if seed == 43 and (name == f"4x64, {broken}" or name.startswith(f"4x64, {broken}, decayed")))
        return found

    def run_trials(directory, wanted, jobs, places):
        steps = [256 * i for i in range(1, 30)]
        return [Result(trial.flags, [], [], [], 0.0, 0) if any(trial is one for one in diverged) else
                Result(trial.flags, steps, [3.0 - 0.01 * i for i in range(29)], [1e9 * step for step in steps], 1.0, 1000, growths=[Growth(1e9, 1.0, 2.0, 2.1)]) for trial in wanted]

    monkeypatch.setattr(Trial, "__hash__", lambda trial: hash(trial.name))
    monkeypatch.setattr(operators, "plan", planned)
    monkeypatch.setattr(study, "run_trials", run_trials)
    monkeypatch.setattr(operators, "nats_per_bpb", lambda: 100.0)
    assert operators.main([f"--plot={tmp_path / 'picture.png'}", "--seeds=2"]) == status
    out, err = capsys.readouterr()
    if status:
        assert "the run '4x64, lossless' diverged" in err
    else:
        assert "4x64, random: diverged" in out and "| 4x64 | random |" not in out and "| 1x128 | random |" in out and "| 4x64 | clones |" in out and "nan" not in out


def test_an_epoch_is_what_the_loader_makes_of_the_text(base_dir, monkeypatch):
    """It drops the ends of documents that no row has room for, so a pass takes fewer steps than the text has tokens for."""
    tiny.prepare(base_dir)
    tokens = sum(len(get_tokenizer().encode(text)) + 1 for texts in parquets_iter_batched("train") for text in texts)
    monkeypatch.setitem(study.LARGE, "max-seq-len", 64)
    few, many = (steps * 4096 / tokens / count for count, steps in growth_few_data.steps_of([200, 100]).items())
    assert 0.1 < many < few < 0.9, "long documents wait until there is nothing else"
    monkeypatch.setitem(study.LARGE, "max-seq-len", 4096)
    assert growth_few_data.steps_of([20])[20] * 4096 / tokens / 20 == pytest.approx(1, abs=0.15), "rows that hold nearly all as a whole"


@pytest.mark.parametrize("follow", [1, 2, 3])
@pytest.mark.parametrize("start", operators.GOES_ON)
def test_a_small_model_goes_on_for_the_flops_of_the_grown_ones(start, follow):
    """Its steps and the shorter cost of its decay counted: rounding to whole tokens per parameter once gave it a fifth less."""
    found, share = operators.plan(42, follow), operators.SHARES[start]
    goes_on = found[f"{start}, goes on"]
    length = goes_on.step + goes_on.flags["steady-steps"] + goes_on.flags["warmdown-steps"]
    grown = study.steps_of(operators.TRUNK) * share + study.steps_of(follow) + operators.DECAY
    assert length * share == pytest.approx(grown, rel=0.002) and goes_on.flags["warmdown-steps"] == operators.DECAY


def test_cost_with_a_loss_is_interpolated_over_its_logarithm():
    assert cost_with(2.5, [1, 4], [3, 2]) == pytest.approx(2)
    assert cost_with(1.5, [16, 1, 4], [1, 3, 2]) == pytest.approx(8)
    assert cost_with(0.5, [16, 1, 4], [1, 3, 2]) == pytest.approx(32)  # beyond the last run
    assert cost_with(0.85, [1, 2, 4], [1.0, 0.9, 0.91]) == pytest.approx(2 * 2 ** 0.5), "a dearer run that is worse says nothing"
    assert math.isnan(cost_with(1.0, [1, 2], [1.5, 1.5]))


def test_grown_and_other_contestants_get_the_same_flops(monkeypatch):
    monkeypatch.setattr(study, "get_tokenizer", lambda: SimpleNamespace(get_vocab_size=lambda: 2048))
    grown, scratch = (growth.plan(42)[name].flags for name in ("width at 0.6, 0.6", "from scratch, 0.6"))
    assert study.dense_flops() == 7_865_040 * 4096 * study.STEPS == grown["num-iterations"] * 4096 * study.flops_per_token(study.SHAPE, 2048)
    assert scratch["target-flops"] == grown["grow-budget"] * study.dense_flops()
    assert "num-iterations" not in scratch and grown["seed"] == scratch["seed"] == 42


def test_growth_can_save_much_of_a_run_that_is_short_for_its_size_and_nothing_of_a_long_one():
    ideal, single, size = zip(*(growth_bound.shares(1e9, tokens) for tokens in (0.3, 1, 5, 20, 100, 1000)))
    assert ideal == tuple(sorted(ideal)) and single == tuple(sorted(single)) and size == tuple(sorted(size))
    assert all(i <= s + 1e-3 for i, s in zip(ideal, single))
    assert ideal[0] < 0.3 and ideal[-1] == pytest.approx(1, abs=0.02) and (single[-1], size[-1]) == pytest.approx((1, 1))
    with pytest.raises(SystemExit, match="2"):
        growth_bound.main(["--params=0"])


@pytest.mark.slow
def test_a_trial_is_trained_once_and_one_that_died_again(base_dir, monkeypatch):
    """What it writes needs no encoding. One that diverged has a result, infinite; one that was killed has none."""
    monkeypatch.setattr(runner, "train", fake_runs.train)
    fine, refused, killed = Trial({"seed": 9}), Trial({"seed": fake_runs.REFUSED}), Trial({"seed": fake_runs.KILLED})
    for _ in range(2):
        first, second = study.run_trials(str(base_dir), [fine, refused])
    assert first.bpb == [3.0, 2.0] and second.final == float("inf")
    assert [fake_runs.times(base_dir, trial) for trial in (fine, refused)] == [1, 1]
    for _ in range(2):
        with pytest.raises(UsageError, match="1 of 1 trials died, see .*out.txt"):
            study.run_trials(str(base_dir), [killed])
    assert fake_runs.times(base_dir, killed) == 2


def test_what_failed_but_did_not_diverge_is_tried_again(base_dir, monkeypatch):
    """A full disk ends with the same status as what the flags lead to. Branches of a trial that failed are not begun; those of one that diverges end as it does."""
    monkeypatch.setattr(runner, "train", fake_runs.train)
    diverged, killed = Trial({"seed": fake_runs.REFUSED}), Trial({"seed": fake_runs.KILLED})
    assert [found.final for found in study.run_trials(str(base_dir), [diverged, diverged.branch(1, seed=9)])] == [float("inf")] * 2
    branch = killed.branch(1, seed=9)
    with pytest.raises(UsageError, match=f"1 of 1 trials died, see .*{killed.name}"):
        study.run_trials(str(base_dir), [branch])
    assert not (folder_of(str(base_dir), branch) / "out.txt").exists()
    full = folder_of(str(base_dir), diverged) / "out.txt"
    full.write_text(full.read_text(encoding="utf-8").replace("training diverged", "the disk is full"), encoding="utf-8")
    assert read(str(base_dir), diverged) is None


def test_runs_that_are_not_compiled_are_others(monkeypatch):
    trial = Trial({"seed": 1})
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    compiled = trial.name, trial.branch(1).name
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert len({*compiled, trial.name, trial.branch(1).name}) == 4


def test_a_tag_stands_for_one_set_of_flags(base_dir, monkeypatch):
    monkeypatch.setattr(runner, "train", fake_runs.train)
    study.run_trials(str(base_dir), [Trial({"seed": 9}, tag="mine")])
    with pytest.raises(UsageError, match="mine was trained with other flags"):
        study.run_trials(str(base_dir), [Trial({"seed": 8}, tag="mine")])


def test_a_result_tells_all_growths_and_the_time_of_each_validation(base_dir):
    trial = Trial({"seed": 9})
    folder = folder_of(str(base_dir), trial)
    log = RunLog(folder / FILENAME)
    log.log("start", 0, counts={"total": 7})
    for step, loss in enumerate((3.0, 2.0, 1.5)):
        log.log("eval", step, val_bpb=loss, flops=10 * step, time=1.0 * step)
        log.log("grow", step, loss_before=loss - 0.1, loss_after=loss + 0.1, flops=10 * step, time=1.0 * step)
    (folder / "done.json").write_text('{"status": 0, "flags": {"seed": 9}}')
    with pytest.raises(UsageError, match="the last validation is missing"):
        read(str(base_dir), trial)
    log.log("end", 2)
    result = read(str(base_dir), trial)
    assert result.times == [0.0, 1.0, 2.0] and result.growths[1] == Growth(10, 1.0, 1.9, 2.1) and result.grown == (1.4, 1.6)


@pytest.mark.slow
def test_branches_begin_where_their_parents_stand(base_dir, monkeypatch):
    """Parents come first, whatever the order, keep what branches begin with and nothing else, and are trained again when it is missing."""
    tiny.prepare(base_dir)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    flags = dict(flag.removeprefix("--").split("=") for flag in (*tiny.FLAGS, "--warmdown-ratio=0", "--save-every=2"))
    trunk = Trial(flags)
    grown = trunk.branch(4, grow_to="3x128", steady_steps=4, save_every=2)
    decayed = grown.branch(6, warmdown_steps=2)
    first, last = study.run_trials(str(base_dir), [decayed, trunk], jobs=1)
    assert last.steps[-1] == 8 and first.steps[-1] == 8 and first.params > last.params and first.flops[-1] > last.flops[-1]
    left = lambda trial: sorted(path.name for path in folder_of(str(base_dir), trial).glob("model_*.pt"))
    assert (left(trunk), left(grown), left(decayed)) == (["model_000004.pt"], ["model_000006.pt"], [])
    times = lambda trial: (folder_of(str(base_dir), trial) / "done.json").stat().st_mtime_ns
    before = times(trunk), times(grown)
    assert study.run_trials(str(base_dir), [decayed], jobs=1)[0].bpb == first.bpb
    other = study.run_trials(str(base_dir), [grown.branch(8, warmdown_steps=1)], jobs=1)[0]
    assert other.steps[-1] == 9 and times(trunk) == before[0] and times(grown) != before[1], "only the parent that lacked the step was trained again"
    early = study.run_trials(str(base_dir), [trunk.branch(2, warmdown_steps=1)], jobs=1)[0]
    assert early.steps[-1] == 3 and left(trunk) == ["model_000002.pt", "model_000004.pt"], "from its beginning, where the step comes before those that it has"


def test_what_a_small_models_token_is_worth():
    """Read off the trunk's own curve: 1 if the grown model has the trunk's loss of all tokens, 0 if that of the large ones alone."""
    loss = lambda units: 1 - 0.2 * math.log(units)
    curve = mixing.Curve(range(2, 31), [loss(units) for units in range(2, 31)])
    shares = {0: 1.0, 4: 0.5, 10: 0.0}  # by tokens per parameter since the growth
    grown = Result({}, [mixing.UNIT * (16 + units) for units in shares], [loss(16 * share + units) for units, share in shares.items()], [], 1.0, 1)
    since, rho = mixing.rho_of(grown, curve, 16)
    assert list(since) == [0, 4, 10] and list(rho) == pytest.approx([1, 0.5, 0], abs=0.02)
    plans = mixing.plan(42)
    assert all(trial.parent is None or trial.step % mixing.UNIT == 0 for trial in plans.values()), "there are checkpoints at whole units only"


def test_small_english_compares_at_equal_tokens_and_at_equal_flops(tmp_path, base_dir, monkeypatch, capsys):
    """The table tells which paradigms' differences are no chance; learning rates are chosen without BLiMP."""
    wanted = []

    def run_trials(directory, asked, jobs, places=None):
        def result(trial):
            steps, looped = trial.flags["num-iterations"], "loops" in trial.flags
            assert ("eval-tasks" in trial.flags) == (trial.flags["seed"] != 41)
            values = {f"blimp/pairs/paradigm/p{i}": {"value": 0.5 + i / 100 + 0.02 * looped, "label": ""} for i in range(20)}
            whole = {f"{key}/pairs": {"value": 0.6 + 0.02 * looped, "se": 0.01, "label": "BLiMP"} for key in ("blimp", "blimp-pll:20")}
            best = 2.0 + abs(math.log2(trial.flags["matrix-lr"] / 0.96)) if trial.flags["seed"] == 41 else 2.0
            return Result(trial.flags, [0, steps], [3.0, best], [0.0, 1e9 * steps * (2 if looped else 1)], 1.0, 1000, rows=whole | values)
        wanted.extend(asked)
        return [result(trial) for trial in asked]

    monkeypatch.setattr(study, "run_trials", run_trials)
    monkeypatch.setattr(small_english, "run_trials", run_trials)
    monkeypatch.setattr(small_english, "get_tokenizer", lambda: SimpleNamespace(get_vocab_size=lambda: 8192))
    assert small_english.main(["--seeds=2", "--steps=100", f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    rows = dict(line.removeprefix("| ").split(" | ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert "62.00 ± 1.00 | 62.00, 62.00 |  | +2.00 | 0.000 |" in rows["looped"] and "60.0 | +0.00 | 1.000 |" in rows["mixed"] and len(rows) == 1 + 5 + 3
    assert [trial.flags["num-iterations"] for trial in wanted[:5]] == [100, 100, 100, 100, 216]
    assert json.loads((tmp_path / "numbers.json").read_text())["looped"][0]["rows"] and (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert small_english.main(["--tune"]) == 0
    assert len(wanted) == 10 + 12 and "| looped and mixed | 3.0000 | **2.0000** | 3.0000 |" in capsys.readouterr().out
    assert small_english.main(["--seeds=1", "--arms", "mixed"]) == 0
    assert ["objective" in trial.flags for trial in wanted[22:]] == [False, True]


# -----------------------------------------------------------------------------
# The growth drafts

DRAFTS_FINAL = {"hyperclone": 2.02, "bus": 1.98, "lossless": 1.96}  # bits per byte of grown runs; standard: 2.00


def drafts_run(trial):
    """A run whose loss falls from 8 as a power of its tokens; those that grow end as their mode says, and small ones lower than all."""
    flags = trial.flags
    steps, small, mode = flags["num-iterations"], flags["aspect-ratio"] < 16, flags.get("grow-mode")
    final = DRAFTS_FINAL[mode] if mode else 1.9 if small else 2.0 + 0.5 * (360 / steps - 1) ** 0.5
    final += 0.001 * (flags["seed"] - 42) * (2 if mode == "bus" else 1)
    if flags["seed"] == 41:  # that of the tuning
        final += abs(math.log2(flags["matrix-lr"] / (1.6 if small else 0.8)))
    at = list(range(0, steps, max(1, steps // 4))) + [steps]
    bpb = [8.0 if step == 0 else final + 0.8 * (1 - step / steps) for step in at]
    rows = {}
    if "eval-tasks" in flags:
        value = {"hyperclone": 0.30, "bus": 0.50, "lossless": 0.40}.get(mode, 0.40)
        rows = {f"{task}/{name}": {"value": value, "se": 0.01, "n": 1000, "label": "x"} for task in ("nli-prompt", "nli-probe") for name in ("snli", "mnli")}
    growths = [Growth(1.6e8 * (i + 1), 2.0 * (i + 1), 2.5, 2.6) for i in range(flags.get("grow-path", "").count(","))]
    return Result(flags, at, bpb, [1e6 * step * (0.35 if small else 1) for step in at], 9.0, 1000, growths=growths, rows=rows, times=[step / 100 for step in at])


@pytest.fixture
def drafts(base_dir, monkeypatch):
    """The study with such runs; the list of the trials that it asked for, call by call."""
    asked = []

    def run_trials(directory, trials, jobs, places):
        trials = [trial if isinstance(trial, Trial) else Trial(trial) for trial in trials]
        asked.append(trials)
        return [drafts_run(trial) for trial in trials]

    monkeypatch.setattr(growth_drafts, "run_trials", run_trials)
    monkeypatch.setattr(study, "run_trials", run_trials)
    monkeypatch.setattr(growth_drafts, "nats_per_bpb", lambda: 2.0)
    monkeypatch.setattr(growth_drafts, "get_tokenizer", lambda: SimpleNamespace(get_vocab_size=lambda: 2048))
    return asked


def write_nli(folder):
    folder.mkdir()
    for name in ("snli", "mnli"):
        for part in ("train", "test"):
            (folder / f"{name}_{part}.jsonl").write_text(json.dumps({"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}) + "\n")


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_drafts_claims_get_the_verdicts_that_the_numbers_give(drafts, base_dir, tmp_path, capsys):
    write_nli(base_dir / "nli")
    assert growth_drafts.main(["--seeds=3", f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    out = capsys.readouterr().out
    tables = [[line for line in part.splitlines() if line.startswith("| ")] for part in out[out.index("parameters; kappa"):].split("\n\n")[1:]]
    losses, nli, gains, claims = ({cells(line)[0]: cells(line)[1:] for line in table[1:]} for table in tables)
    assert list(losses) == ["standard", "small alone", "middle alone", *growth_drafts.GROWN] and "No NLI" not in out and "nan" not in out
    # +0.04, and no difference between the seeds; -0.04, growing by 0.002 from seed to seed: sd 0.002, t 4.30, so ± 0.002 * 4.30 / sqrt(3)
    assert losses["HyperCloning, in one step"][4:6] == ["+0.0400 ± 0.0000", "+0.0400, +0.0400, +0.0400"]
    assert losses["BUS, by fractions"][4:6] == ["-0.0380 ± 0.0050", "-0.0400, -0.0380, -0.0360"]
    assert losses["BUS, by fractions"][-1] == "44%: 2.500 → 2.600, 89%: 2.500 → 2.600"
    assert float(losses["standard"][-2]) == 1.0 and float(losses["BUS, in one step"][-2]) < 1 < float(losses["HyperCloning, in one step"][-2])
    assert nli["BUS, by fractions"] == ["50.0 ± 2.0"] * 4 and nli["BUS, 64M (drafts; how is not known)"] == ["41.6", "38.6"] * 2
    verdict = {claim: row[-1] for claim, row in claims.items()}
    assert verdict["BUS, by fractions, ends below standard (nats per token)"] == "confirmed (p < 0.01)", "0.038 ± 0.0115 for 99 %"
    assert verdict["HyperCloning, in one step, ends below standard (nats per token)"] == "opposite (p < 0.01)"
    assert verdict["BUS, in one step, ends below HyperCloning, in one step (nats per token)"] == "confirmed (p < 0.01)"
    assert not [claim for claim in verdict if "fractions" in claim and "in one step" in claim], "what is large from early on is not compared with what grows late"
    assert verdict["lossless, by fractions, ends below small alone (nats per token)"] == "opposite (p < 0.01)"
    assert claims["BUS, by fractions, is better than standard on snli by probe (points)"] == ["+10.0 ± 2.8", "+1.2", "confirmed (p < 0.01)"]
    assert claims["HyperCloning, in one step, is better than standard on snli by prompt (points)"] == ["-10.0 ± 2.8", "+0.5", "opposite (p < 0.01)"]
    assert claims["HyperCloning, in one step, is worse than standard on mnli by prompt (points)"] == ["-10.0 ± 2.8", "-1.5", "confirmed (p < 0.01)"]
    kept = json.loads((tmp_path / "numbers.json").read_text())
    assert [len(runs) for runs in kept["runs"]] == [13, 13, 13] and len(kept["claims"]) == len(claims)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_the_gain_is_read_off_the_run_and_off_shorter_runs(drafts, capsys):
    assert growth_drafts.main(["--seeds=2"]) == 0
    out = capsys.readouterr().out
    rows = {cells(line)[0]: cells(line)[1:] for line in out.splitlines() if line.startswith(("| inside", "| runs that end"))}
    # inside: 8 → 2.6 at a quarter of the run, the first validation, of 8 → 2; alone: 8 → 2 + 0.5 sqrt(1 / share - 1)
    assert all(cell.startswith("90.0 ±") for cell in rows["inside the run"][:4])
    alone = [float(cell.split()[0]) for cell in rows["runs that end there"][:5]]
    exact = [100 - 100 * 0.5 * (1 / share - 1) ** 0.5 / 6 for share in (0.05, 0.1, 0.2, 0.4)]
    assert [alone[i] for i in (0, 1, 3, 4)] == pytest.approx(exact, abs=0.1) and alone[1] < alone[2] < alone[3]
    assert float(rows["runs that end there"][-2].removesuffix(" %")) == pytest.approx(100 / (1 + 2.4 ** 2), abs=0.5) and rows["inside the run"][-2] == "≤ 25.0 %"
    verdict = {cells(line)[0]: cells(line)[-1].removesuffix(" (p < 0.01)") for line in out.splitlines() if " of the gain or more" in line}
    assert verdict["15% of the tokens bring 80% of the gain or more, runs that end there (points above 80)"] == "opposite"
    assert verdict["15% of the tokens bring 80% of the gain or more, inside the run (points above 80)"] == "confirmed"
    assert verdict["20% of the tokens bring 90% of the gain or more, runs that end there (points above 90)"] == "opposite"
    assert "No NLI in this study" in out and "nli" not in out.split("No NLI")[1].split("\n\n", 1)[1], "no data, no columns"


def test_one_seed_gives_no_verdict_on_losses(drafts, capsys):
    assert growth_drafts.main([]) == 0
    out = capsys.readouterr().out
    assert "| BUS, by fractions, ends below standard (nats per token) | -0.0400 |  | not confirmed (one seed) |" in out and "inf" not in out


@pytest.mark.parametrize("name", growth_drafts.SIZES)
def test_the_drafts_arms_have_equal_flops_and_flags_that_base_train_takes(name, tmp_path):
    size = growth_drafts.SIZES[name]
    rates = dict.fromkeys(("standard", "small alone", "middle alone"), 0.1)
    first, grown, last = growth_drafts.plan(size, size.steps, rates, 0.15, {"eval-tasks": "nli-prompt,nli-probe", "nli": str(tmp_path)}, 42)
    alone = {**first, **last}
    for arm, share in size.shares().items():
        assert share < 1 and alone[arm].flags["num-iterations"] * share == pytest.approx(size.steps, rel=1e-3)
    settings = {arm: base_train.parse(trial.arguments()) for arm, trial in {**alone, **grown}.items()}
    stages = {arm: [shape.width for shape in one.path()] for arm, one in settings.items() if arm in grown}
    assert stages["BUS, by fractions"] == stages["lossless, by fractions"] == list(size.widths)
    assert stages["BUS, in one step"] == stages["HyperCloning, in one step"] == stages["lossless, in one step"] == [size.widths[0], size.widths[-1]]
    assert {one.block for one in settings.values()} == {"ngpt"} and {one.weight_decay for one in settings.values()} == {0.0}
    assert {one.grow_budget for one in settings.values()} == {1.0} and {one.total_batch_size for one in settings.values()} == {size.flags["total-batch-size"]}
    assert all(width % size.flags["head-dim"] == 0 for width in size.widths) and len({trial.name for trial in [*alone.values(), *grown.values()]}) == 12


def test_the_drafts_runs_that_kappa_learns_from_come_first(drafts):
    assert growth_drafts.main(["--seeds=2"]) == 0
    first, second, third = drafts[-3:]
    assert len(first) == 14 and not any("kappa" in trial.flags for trial in first)
    assert len(second) == 10 and all("kappa" in trial.flags for trial in second)
    assert [trial.flags["aspect-ratio"] for trial in third] == [12, 12], "of which kappa would know how the middle stage ends"


def test_the_drafts_study_says_what_it_lacks(drafts, base_dir, monkeypatch, capsys):
    refused = lambda *flags: growth_drafts.main(list(flags)) == 2 and capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "a run needs 1 GPU with CUDA, and 0 are to be seen" in refused("--size=64m")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert "--size=64m is meant for a vocabulary of 12,288, and the tokenizer in" in refused("--size=64m")
    assert "has no file NAME_test.jsonl" in refused(f"--nli={base_dir / 'nothing'}")
    assert not drafts
    monkeypatch.setattr(growth_drafts, "run_trials", lambda directory, trials, jobs, places: [Result({}, [], [], [], 0.0, 0) for _ in trials])
    assert "standard: the training diverges at every rate of 0.00625, " in refused()


def test_the_drafts_rates_are_tried_on_a_seed_of_their_own(drafts, capsys):
    assert growth_drafts.main(["--steps=100"]) == 0
    tried = [trial for call in drafts[:-3] for trial in call]
    assert {trial.flags["seed"] for trial in tried} == {41} and {trial.flags["num-iterations"] < 200 for trial in tried} == {True}
    others = [trial for call in drafts[-3:] for trial in call]
    assert 41 not in {trial.flags["seed"] for trial in others}
    assert [trial.flags["aspect-ratio"] for trial in others if trial.flags["matrix-lr"] == 1.6] == [8, 12], "the smaller models alone have their own rates"
    assert {trial.flags["matrix-lr"] for trial in others} == {0.8, 1.6} and "| small alone | " in capsys.readouterr().out
