"""The study of singular values: a measure that knows shapes and not scales, paired comparisons, table and picture."""
import json

import pytest
import torch

from analysis import spectra, study
from analysis.trial import Result
from nanochat.gpt import GPTConfig
from nanochat.layered_gpt import build_gpt
from scripts import base_train


def model_of(width, seed, rank=None):
    """Of four layers of random matrices, or of such a rank."""
    torch.manual_seed(seed)
    model = build_gpt(GPTConfig(sequence_len=32, vocab_size=64, n_layer=4, n_head=2, n_kv_head=2, n_embd=width, window_pattern="L"))
    model.init_weights()
    for block in model.transformer.h:
        for kind in spectra.KINDS:
            weight = block.get_submodule(kind).weight
            rows, columns = weight.shape
            weight.data = torch.randn(rows, columns) if rank is None else torch.randn(rows, rank) @ torch.randn(rank, columns)
    return model


def test_a_spectrum_is_a_shape_at_any_scale_and_size():
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    assert spectra.spectrum(weight) == pytest.approx(spectra.spectrum(-7 * weight.T))
    assert all(spectra.spectrum(scale * torch.eye(size)) == pytest.approx([1.0] * 64) for scale, size in ((1, 16), (2, 128)))
    half = torch.zeros(64, 64)
    half[:34, :34] = torch.eye(34)  # four are no part of the bulk, of the others half are 0, so the rest is at the root of 2
    assert spectra.spectrum(half)[[0, 63]] == pytest.approx([2 ** 0.5, 0])
    halves, ones = ({"0.mlp.c_fc": spectra.spectrum(weight)} for weight in (half, torch.eye(64)))
    assert spectra.noisy_distance(halves, ones) == spectra.distance(((halves, halves), (ones, ones))) == pytest.approx((2 - 2 ** 0.5) ** 0.5, abs=0.02)


def test_a_few_large_values_tell_no_widths_apart():
    """Two outliers, of one size over the bulk, at any width: they count as the largest values, and not by what share of a width they are."""
    plain, pulled = ({width: torch.diag(torch.cat((torch.full((2,), top), torch.linspace(1.5, 0.5, width - 2)))) for width in (64, 256)} for top in (1.5, 6.0))
    between = lambda found: spectra.noisy_distance(*({"0.mlp.c_fc": spectra.spectrum(weight)} for weight in found.values()))
    assert between(pulled) == pytest.approx(between(plain), abs=1e-6) and between(plain) < 0.02
    tops = [spectra.singular_values(weight)[0][0] for weight in pulled.values()]
    assert tops == pytest.approx([6 / (1 + 1 / 12) ** 0.5] * 2, rel=0.05)


def test_random_matrices_agree_across_widths_and_those_of_low_rank_do_not_agree_with_them():
    """Also where the noise of the small ones is several times as large as what is left of it."""
    small, large, thin = ([spectra.spectra_of(model_of(width, seed, rank)) for seed in range(12)] for width, rank in ((32, None), (64, None), (64, 8)))
    pairs = lambda a, b: [((a[i], a[i + 1]), (b[i], b[i + 1])) for i in range(0, 12, 2)]
    noise = spectra.noisy_distance(*small[:2])
    assert abs(spectra.distance(*pairs(small, large))) < noise / 3 and noise > 0.03
    assert spectra.distance(*pairs(large, thin)) > 0.5 and abs(spectra.distance(*(pair for i in range(0, 12, 2) for pair in spectra.layer_pairs((large[i], large[i + 1]))))) < 0.01


def test_all_are_trained_without_weight_decay():
    """base_train would make another one for each width, and it shrinks what is compared."""
    runs = {name: base_train.parse(trial.arguments()) for name, trial in spectra.trials([64, 128, 256], 250, 1).items()}
    assert len(runs) == 6 and {run.weight_decay for run in runs.values()} == {0.0}


def test_claims_are_about_pairs_of_seeds():
    rows = {"across widths": [0.1, 0.2, 0.3], "a quarter of the rate": [0.2, 0.3, 0.4], "half of the steps": [0.1, 0.2, 0.301],
            "two layers of a model": [0.2, 0.2, 0.2], "trained and random": [0.11, 0.22, 0.33]}
    found = dict(line.split("|")[1::2][:2] for line in spectra.claims(rows).splitlines()[2:])
    assert {name.strip(): verdict.strip() for name, verdict in found.items()} == {
        "a quarter of the rate": "confirmed (p < 0.01)", "half of the steps": "not confirmed", "two layers of a model": "not confirmed", "trained and random": "not confirmed"}


@pytest.mark.slow
def test_the_study(base_dir, tmp_path, monkeypatch, capsys):
    """Trained models are random ones here; what is grown from the small one is grown."""
    def width(trial):
        return 4 * trial.flags["aspect-ratio"]

    monkeypatch.setattr(study, "run_trials", lambda base_dir, trials, jobs, places: [Result(trial.flags, [1], [2.0], [1.0], 1.0, 7) for trial in trials])
    monkeypatch.setattr(spectra, "load", lambda trial: model_of(width(trial), trial.flags["seed"] + trial.flags["num-iterations"], 8 if "slow" in trial.tag else None))
    assert spectra.main(["--widths", "64", "32", "--steps=4", f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    kept = json.loads((tmp_path / "numbers.json").read_text())["distances"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(kept) + 1 + 4 + 1 + 5 and all(len(values) == 3 for values in kept.values())
    assert min(kept["a quarter of the rate"]) > 0.5 > 0.1 > max(map(abs, kept["across widths"])) and "4x32 grown to 4x64, hyperclone, untrained" in kept
    assert any(row.startswith("| a quarter of the rate | +1.") and "| confirmed" in row for row in rows)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    for flags in (["--seeds=2"], ["--widths", "64"], ["--widths", "64", "64"]):
        assert spectra.main(flags) == 2 and "--seeds=3" in capsys.readouterr().err


def test_a_run_that_diverged(base_dir, monkeypatch, capsys):
    monkeypatch.setattr(study, "run_trials", lambda base_dir, trials, jobs, places: [Result(trial.flags, [], [], [], 0.0, 0) for trial in trials])
    assert spectra.main([]) == 2 and "'4x64' of seed 42 diverged" in capsys.readouterr().err
