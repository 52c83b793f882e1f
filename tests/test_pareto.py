"""The study of rank and depth: fronts, rates that the reported seeds have no say in, table and picture."""
import json
import math
import random

import pytest

from analysis import arms, pareto, runner
from analysis.trial import Result
from nanochat.run_log import FILENAME
from tests import fake_runs, tiny

SWEEP = """
[fixed]
device-type = "cpu"
target-flops = 100
eval-every = 1
seed = 41
[grid]
matrix-lr = [1, 2, 4]
[[together]]
depth = [2, 4]
rank = [0, 8]
"""


@pytest.mark.parametrize("values", [2, 5, 1000], ids=["many ties", "ties", "few ties"])
def test_nothing_on_the_front_is_dominated_and_all_else_is(values):
    rng = random.Random(values)
    for size in (1, 2, 40):
        for dimensions in (2, 3):
            points = [tuple(rng.randrange(values) for _ in range(dimensions)) for _ in range(size)]
            on = pareto.front(points)

            def dominated(i):
                return any(all(a <= b for a, b in zip(other, points[i])) and any(a < b for a, b in zip(other, points[i])) for other in points)
            assert on and [i for i in range(size) if not dominated(i)] == on


def test_the_way_to_a_loss():
    result = Result({}, [0, 1, 2, 3], [3.0, 2.0, 1.0, 1.5], [0.0, 100.0, 300.0, 400.0], 1.0, 7)
    assert [pareto.cost_until(result, bpb, result.flops) for bpb in (3.5, 2.5, 1.5, 1.0, 0.9)] == [0.0, 50.0, 200.0, 300.0, None]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "rank.toml"
    path.write_text(SWEEP)
    return path


def test_rates_are_chosen_by_the_seed_of_the_tuning_alone(config, monkeypatch):
    """Seed 41 likes 8 best, beyond the grid, the others 1; more budget moves what it likes."""
    asked = []

    def run_trials(base_dir, trials, jobs, places):
        asked.extend(trial.flags for trial in trials)

        def loss(flags):
            liked = 1 if flags["seed"] != 41 else 8 if flags["target-flops"] <= 100 else 2
            return abs(flags["matrix-lr"] - liked)
        return [Result(trial.flags, [1], [loss(trial.flags)], [100.0], 1.0, 7) for trial in trials]

    monkeypatch.setattr(arms, "run_trials", run_trials)
    found = arms.configurations(config)
    assert [one.name for one in found] == ["depth=2 rank=0", "depth=4 rank=8"]
    seeds = arms.reported_seeds(found, 2)
    runs = arms.run_arms(found, [1, 5], seeds, 2)
    assert seeds == [42, 43] and {key: rate for key, (rate, _) in runs.items()} == {(0, 1): 8, (1, 1): 8, (0, 5): 2, (1, 5): 2}
    assert {flags["seed"] for flags in asked} == {41, 42, 43} and len(asked) == 2 * (3 + 2) + 2 * 3 + 2 * 2 * 2, "8 and 16 were tried too"
    assert {(flags["target-flops"], flags["eval-every"]) for flags in asked} == {(50, 1), (100, 1), (250, 2), (500, 5)}, "half a budget for the rates"
    for key, (rate, results) in runs.items():
        assert [(result.flags["seed"], result.flags["matrix-lr"], result.flags["depth"]) for result in results] == [(seed, rate, 2 + 2 * key[0]) for seed in seeds]


def test_flops_are_the_budget_s_only_where_one_is_given():
    assert pareto.budget({"target-flops": 100}) == 100 and pareto.budget({"num-iterations": -1, "target-flops": 100.0}) == 100
    assert pareto.budget({"num-iterations": 5, "target-flops": 100}) == pareto.budget({"target-flops": -1}) == pareto.budget({}) == 0


def test_a_reported_seed_is_never_the_one_of_the_tuning(config):
    config.write_text(SWEEP.replace("41", "43"))
    assert arms.reported_seeds(arms.configurations(config), 3) == [42, 44, 45]


def test_tokens_per_parameter_of_each_model_s_own(config):
    (one, _) = arms.configurations(config, "--target-flops=-1 --target-param-data-ratio=1")
    flags = one.trial(5).flags
    assert flags["target-flops"] == -1 and flags["target-param-data-ratio"] == 5


@pytest.mark.parametrize("before, after, message", [
    ("seed = 41\n", "", "the one `seed` of the tuning"), ("seed = 41\n", "seed = 1\n[search]\nmethod = 'random'\nruns = 2\nflags.head-dim = [8, 16]\n", "without [search]"),
    ("target-flops = 100\n", "", "give a positive num-iterations, target-flops or"), ("eval-every = 1\n", "", "and eval-every"), ("eval-every = 1\n", "eval-every = -1\n", "and eval-every"),
    ("matrix-lr = [1, 2, 4]", "matrix-lr = ['1', '2']", "without quotes"), ("seed = 41", "seed = '41'", "without quotes"), ("[fixed]", "ranks = 2\n[fixed]", "leave `ranks` to analysis.sweep"),
    ("seed = 41", "objective = 'mlm'\nseed = 41", "--objective=next-token: rank has mlm"),
    ("matrix-lr", "embedding-lr", "needs a matrix-lr"), ("depth = [2, 4]", "depth = [2]", "equally long"), ("rank = [0, 8]", "n-layer = [0, 8]", "no flag --n-layer")])
def test_files_that_are_no_such_study(before, after, message, config, base_dir, capsys):
    assert before in SWEEP
    config.write_text(SWEEP.replace(before, after))
    assert pareto.main([str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_what_cannot_be_read(tmp_path, base_dir, capsys):
    assert pareto.main([str(tmp_path / "nowhere.toml")]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.slow
def test_fronts_table_and_picture(config, tmp_path, base_dir, monkeypatch, capsys):
    """With runs of no time, whose last loss is their rate."""
    config.write_text(SWEEP.replace("[1, 2, 4]", "[1]"))
    monkeypatch.setattr(runner, "train", fake_runs.train)
    monkeypatch.setattr(pareto, "nats_per_bpb", lambda: 2.0)
    command = [str(config), "--seeds=1", "--units", "1", "5", "--threshold", str(math.exp(4.0)), f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'fronts.png'}"]
    assert pareto.main(command) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert [(point["number"], point["unit"], point["rate"]) for point in found["points"]] == [(1, 1, 1), (1, 5, 1), (2, 1, 1), (2, 5, 1)]
    assert all(point["perplexity"] == pytest.approx(math.exp(2.0)) and (point["memory"], point["params"], point["seconds"]) == (5.0, 7, 2.0) for point in found["points"])
    assert all((point["flops_to_threshold"], point["seconds_to_threshold"]) == (50.0, 1.0) for point in found["points"]), "from 3 bits to 1, half of the way"
    out = capsys.readouterr().out
    lines = [line for line in out[out.index("| #"):].splitlines() if line.startswith("| ")]
    assert len(lines) == 5 and "depth=4 rank=8" in lines[2] and lines[2].endswith("| flops, params, memory, seconds |")
    assert (tmp_path / "fronts.png").read_bytes().startswith(b"\x89PNG")
    logs = sorted(base_dir.glob(f"base_checkpoints/*/{FILENAME}"))
    assert len(logs) == 2 * 2 * 2 and pareto.main(command) == 0
    assert all((log.parent / "out.txt").read_text(encoding="utf-8").count("begun") == 1 for log in logs), "what is done is not done again"


def test_the_difference_to_the_first_configuration_is_that_of_pairs_of_seeds(config):
    """Seeds are 1 bit apart, which would hide all: the second configuration ends 0.1 and 0.2 bits above the first, the third 0.3 below; the fourth has no pair."""
    found = [one for one in arms.configurations(config) for _ in range(2)]
    run = lambda *bpb: Result({}, [1], list(bpb), [100.0], 1.0, 7, times=[1.0])
    runs = {(i, 1.0): (1, [run(*one) for one in each]) for i, each in enumerate(([[1.0], [2.0]], [[1.1], [2.2]], [[0.7], [1.7]], [[], [2.0]]))}
    points, threshold = pareto.points_of(found, runs, 2.0, None)
    second, third, fourth = points[1:]
    assert (second.above.value, third.above.value) == (pytest.approx(0.3), pytest.approx(-0.6)) and fourth.above is None
    assert (points[0].above.value, second.above.loss_verdict, third.above.loss_verdict) == (0, "not told apart", "better (p < 0.01)")
    rows = pareto.table(points, threshold).splitlines()
    assert "FLOPs to 22.1 |" in rows[0]
    _, none = pareto.points_of(found, {**runs, (0, 1.0): (1, [run(), run(1.0)])}, 2.0, None)
    assert none is None and "FLOPs to the threshold |" in pareto.table(points, none)
    assert "| -0.6000 ± 0.0000: better (p < 0.01) |" in rows[4] and "± 1.2710: not told apart |" in rows[3] and "told" not in rows[2]


def point(number, unit=1.0, perplexity=2.0, **costs):
    return pareto.Point(number, "", unit, 1, perplexity, [], None, **{"flops": 1.0, "tokens": 1.0, "blocks": 1, "params": 1, "memory": 1.0, "seconds": 1.0, **costs},
                        flops_to_threshold=None, seconds_to_threshold=None, curve=[])


def test_budgets_share_the_fronts_of_what_they_differ_in():
    points = [point(1, params=10, perplexity=5.0), point(2, params=5, perplexity=6.0), point(3, params=20, perplexity=5.5),
              point(1, unit=5.0, flops=5.0, seconds=5.0, params=10, perplexity=4.0), point(2, unit=5.0, flops=5.0, seconds=7.0, params=5, perplexity=4.5),
              point(4, perplexity=None)]
    found = {cost: [[(one.number, one.unit) for one in front] for front in fronts] for cost, fronts in pareto.fronts(points).items()}
    assert found["flops"] == found["seconds"] == [[(1, 1), (1, 5)]]
    assert found["params"] == [[(2, 1), (1, 1)], [(2, 5), (1, 5)]] and found["memory"] == [[(1, 1)], [(1, 5)]]


@pytest.mark.slow
def test_a_study_of_tiny_models(tmp_path, base_dir, capsys):
    tiny.prepare(base_dir)
    config = tmp_path / "tiny.toml"
    config.write_text("[fixed]\ndevice-type = 'cpu'\naspect-ratio = 32\nhead-dim = 32\nmax-seq-len = 64\nwindow-pattern = 'L'\ndevice-batch-size = 2\ntotal-batch-size = 128\ntarget-flops = 1e9\n"
                      "eval-every = 2\neval-tokens = 128\nseed = 41\n[grid]\nmatrix-lr = [0.02]\n[[together]]\ndepth = [1, 1]\nattn-rank = [0, 4]\n")
    assert pareto.main([str(config), "--seeds=1", "--threshold=1e9", f"--out={tmp_path / 'numbers.json'}"]) == 0
    dense, low_rank = json.loads((tmp_path / "numbers.json").read_text())["points"]
    assert 0.9 < dense["flops"] / low_rank["flops"] < 1.1 and low_rank["tokens"] > dense["tokens"] > 0 and low_rank["blocks"] < dense["blocks"]
    assert low_rank["memory"] > 0 and low_rank["flops_to_threshold"] == 0
