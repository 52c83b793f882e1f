"""The study of letter counting: its labels, its alphabet, its growth and its verdicts."""
import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import claims, letter_counting, letters
from analysis.letters import ARMS, SYMBOLS, Run, Text, Training
from nanochat.cli import UsageError
from nanochat.growth import grow, grown_config
from tests import tiny
from tests.golden.fixtures import HERE

TOY = ["--seeds=2", "--strings=16", "--epochs=5", "--rates=0.02", "--moments=0.4,1", "--jobs=1"]


@pytest.fixture
def text(base_dir, monkeypatch):
    """A base directory with a little text, of which a few strings are tested on, for runs that are tuned on one seed."""
    shutil.copytree(HERE / "shards", base_dir / "base_data_climbmix")
    monkeypatch.setattr(letters, "TEST", 20)
    monkeypatch.setattr(letter_counting, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    found = Text.of_base_dir()
    letters.use(found)
    return found


@given(st.lists(st.text("ab ", min_size=6, max_size=6), min_size=1, max_size=4))
def test_labels_are_how_often_a_letter_came_before(strings):
    classes = letters.seen_before(np.array([[SYMBOLS.index(letter) for letter in string] for string in strings]))
    for string, row in zip(strings, classes):
        so_far: Counter = Counter()
        for letter, found in zip(string, row):
            assert found == min(so_far[letter], 2)
            so_far[letter] += 1


def test_digits_are_spelled_out_and_all_else_is_one_space():
    assert letters.in_letters("Born in 1905, at 7 o'clock.") == "born in one nine zero five at seven o clock "
    assert letters.in_letters("Été — no") == " t no"


@given(st.lists(st.text(max_size=30), max_size=5), st.integers(1, 50))
def test_any_text_becomes_letters(texts, most):
    codes = letters.letters_of(texts, most)
    assert len(codes) <= most and set(codes) <= set(range(27))
    assert "  " not in "".join(SYMBOLS[code] for code in codes)


def test_targets_are_classes_or_next_letters(text):
    inputs, classes = letters.examples("counting", text.test)
    also, following = letters.examples("language", text.test)
    assert torch.equal(inputs, also) and torch.equal(inputs[:, 1:], following[:, :-1])
    assert inputs.shape == classes.shape == (20, letters.LENGTH) and set(classes.flatten().tolist()) == {0, 1, 2}
    drawn = text.draw(30, np.random.default_rng(0))
    everything = "".join(SYMBOLS[code] for code in text.train)
    assert drawn.shape == (30, 21) and all("".join(SYMBOLS[code] for code in string) in everything for string in drawn)


def trained(text: Text, *seeds: int, epochs: int = 3) -> Training:
    runs = [Run("counting", text.name, "plain", 32, 0.02, seed, 64, epochs, epochs) for seed in seeds or (0,)]
    return Training.new(runs, 32, 1).through(text, range(epochs))


def test_what_another_process_trains_is_waited_for(text, monkeypatch):
    """Of two pieces of work one is another's, which ends while this one looks away."""
    pieces = [Run("counting", text.name, "plain", width, 0.02, 0, 64, 3, 3) for width in (32, 64)]
    result = lambda run: letters.Outcome(run, 50.0, 1.0, 2.0)
    begun, slept = [], []
    monkeypatch.setattr(letter_counting, "finish", lambda runs: begun.extend(runs) or map(result, runs))
    other = claims.take(letter_counting.path_of(letter_counting.piece_of(pieces[0])).with_suffix(".claims"))

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            letter_counting.path_of(pieces[0]).write_text(json.dumps(dataclasses.asdict(result(pieces[0]))))
            other.release()
    monkeypatch.setattr(letter_counting.time, "sleep", sleep)
    assert [outcome.run for outcome in letter_counting.outcomes(pieces, text, 1, "x")] == pieces
    assert begun == pieces[1:] and len(slept) == 2
    assert letter_counting.outcomes(pieces, text, 1, "x") and len(begun) == 1, "what is done is not done again"


def test_a_piece_is_another_s_whichever_of_its_seeds_are_asked_for(text, monkeypatch):
    """One process wants three of five seeds and another all: who comes second finds the piece taken, then trains what is left."""
    runs = [Run("counting", text.name, "plain", 32, 0.02, letter_counting.FIRST_SEED + i, 64, 3, 3) for i in range(7)]
    begun = []
    monkeypatch.setattr(letter_counting, "finish", lambda runs: begun.append(list(runs)) or [letters.Outcome(run, 50.0, 1.0, 2.0) for run in runs])
    monkeypatch.setattr(letters, "_text", text, raising=False)

    def meanwhile(asked):
        begun.append(list(asked))
        monkeypatch.setattr(letter_counting, "finish", lambda runs: begun.append("too early"))
        letter_counting.finish_and_keep(runs[2:5])
        return [letters.Outcome(run, 50.0, 1.0, 2.0) for run in asked]

    later = letter_counting.finish
    monkeypatch.setattr(letter_counting, "finish", meanwhile)
    letter_counting.finish_and_keep(runs[:3])
    monkeypatch.setattr(letter_counting, "finish", later)
    for piece in letter_counting.side_by_side(runs):
        letter_counting.finish_and_keep(piece)
    assert begun == [runs[:3], runs[3:5], runs[5:]]


def test_a_long_training_s_claim_is_kept(text, monkeypatch):
    """By its beats: after many of them it is younger than the training."""
    run = Run("counting", text.name, "plain", 32, 0.02, 0, 64, 3, 3)
    monkeypatch.setattr(letter_counting, "BEAT", 0.0)
    beaten = threading.Event()
    real = claims.Claim.beat
    monkeypatch.setattr(claims.Claim, "beat", lambda claim: real(claim) and (beaten.set() or True))
    monkeypatch.setattr(letter_counting, "finish", lambda runs: [letters.Outcome(run, 50.0, 1.0, float(beaten.wait(60))) for run in runs])
    letter_counting.finish_and_keep([run])
    assert letter_counting.read(run).flops == 1.0 and not claims.holder(letter_counting.path_of(letter_counting.piece_of(run)).with_suffix(".claims"))


def killed(runs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_ends_the_study_with_a_line(text, monkeypatch):
    runs = [Run("counting", text.name, "plain", 32, 0.02, seed, 64, 3, 3) for seed in range(2)]
    monkeypatch.setattr(letter_counting, "finish_and_keep", killed)
    with pytest.raises(UsageError, match="was killed, perhaps for want of memory"):
        letter_counting.outcomes(runs, text, 2, "x")


def pauses(runs):
    Path(os.environ["NANOCHAT_BASE_DIR"], f"begun-{os.getpid()}").touch()
    signal.pause()


def two_pieces(text) -> list[Run]:
    return [Run("counting", text.name, "plain", width, 0.02, 0, 64, 3, 3) for width in (32, 64)]


def begun(base_dir, count: int) -> list[int]:
    """Process numbers, once there are so many."""
    while len(found := list(Path(base_dir).glob("begun-*"))) < count:
        time.sleep(0.05)
    return [int(path.name.removeprefix("begun-")) for path in found]


def test_an_interrupted_study_ends_its_processes_at_once(text, monkeypatch):
    others = multiprocessing.active_children()

    def interrupted(*_):
        begun(os.environ["NANOCHAT_BASE_DIR"], 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(letter_counting, "finish_and_keep", pauses)
    monkeypatch.setattr(letter_counting, "with_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        letter_counting.outcomes(two_pieces(text), text, 2, "x")
    assert multiprocessing.active_children() == others


@pytest.mark.slow
def test_no_process_outlives_a_study_that_is_killed(text):
    base_dir = os.environ["NANOCHAT_BASE_DIR"]
    Path(base_dir, "text.pickle").write_bytes(pickle.dumps(text))
    script = (f"import pickle\nfrom pathlib import Path\nfrom analysis import letter_counting\nfrom tests.test_letter_counting import pauses, two_pieces\n"
              f"if __name__ == '__main__':\n    letter_counting.finish_and_keep = pauses\n    text = pickle.loads(Path({base_dir!r}, 'text.pickle').read_bytes())\n"
              f"    letter_counting.outcomes(two_pieces(text), text, 2, 'x')\n")
    Path(base_dir, "study.py").write_text(script)
    study = subprocess.Popen([sys.executable, str(Path(base_dir, "study.py"))], env={**os.environ, "PYTHONPATH": str(tiny.ROOT)})
    workers = [psutil.Process(number) for number in begun(base_dir, 2)]
    study.kill()
    study.wait()
    assert not psutil.wait_procs(workers, timeout=600)[1]


def test_models_side_by_side_are_what_each_would_be_alone(text):
    """By the project's own forward pass, attention and loss; after a growth too, and with their optimizer's state."""
    together = trained(text, 5, 6)
    grown = together.grown(64, "lossless").through(text, range(3, 4))
    inputs, targets = letters.examples("counting", text.test)
    for seed, logits, after in zip((5, 6), together.models.logits(inputs), grown.models.logits(inputs)):
        alone, reference = trained(text, seed), letters.new_model(32, 1, seed)
        optimizer = letters.optimizer_of(reference, 0.02)
        for epoch in range(3):
            for start in range(0, 64, letters.BATCH):
                strings = text.draw(64, np.random.default_rng([seed, epoch]))[start:start + letters.BATCH]
                reference(*letters.examples("counting", strings)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert torch.allclose(logits, alone.models.logits(inputs)[0], atol=0.02) and torch.allclose(logits, reference(inputs), atol=0.02)
        assert torch.allclose(after, alone.grown(64, "lossless").through(text, range(3, 4)).models.logits(inputs)[0], atol=0.05)
    assert (together.models.logits(inputs)[0] - together.models.logits(inputs)[1]).abs().max() > 0.5


def test_lossless_growth_leaves_the_score_as_it_was(text):
    small = trained(text, 0, 1)
    grown = small.grown(64, "lossless")
    assert grown.scores(text.test) == pytest.approx(small.scores(text.test), abs=0.003)
    assert (grown.models.module.config.n_embd, grown.models.module.config.n_head) == (64, 2) and grown.flops == small.flops
    assert grown.through(text, range(1)).flops - small.flops == grown.models.module.estimate_flops() * 64 * letters.LENGTH > small.flops / 3
    assert grown.scores(text.test) != small.scores(text.test)


def test_at_a_doubling_tiles_are_hypercloning():
    model = letters.new_model(32, 1, 0)
    bus, clones = (grow(model, grown_config(model.config, n_embd=64), mode=mode)[0].state_dict() for mode in ("bus", "hyperclone"))
    assert all(torch.allclose(bus[name], clones[name]) for name in clones)


def test_a_model_learns_to_count(text):
    _, classes = letters.examples("counting", text.test)
    most_frequent = classes.flatten().bincount().max().item() / classes.numel()
    assert trained(text, epochs=12).scores(text.test)[0] > most_frequent + 0.03


def test_matrices_of_the_control_begin_as_identities():
    model = letters.new_model(64, 2, 0, identity=True)
    block = model.transformer.h[0]
    assert torch.equal(block.attn.c_q.weight, torch.eye(64))
    assert torch.equal(block.mlp.c_fc.weight, torch.eye(64).repeat(2, 1)) and torch.equal(block.mlp.c_proj.weight, torch.eye(64).repeat(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("task, flags, arms", [("counting", [], list(ARMS)), ("language", ["--arms", "lossless"], ["plain", "lossless"])])
def test_every_arm_from_the_text_to_the_verdicts(task, flags, arms, text, tmp_path, monkeypatch, capsys):
    flags = [*TOY, f"--task={task}", "--widths=64", *flags, f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]
    assert letter_counting.main(flags) == 0
    out, _ = capsys.readouterr()
    assert [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| 64 |") and "better" not in line] == arms
    claims = [line for line in out.splitlines() if " is better than " in line]
    assert len(claims) == (11 if task == "counting" else 1) and "nan" not in out
    assert all(line.split(" | ")[4] in ("confirmed", "opposite", "not confirmed") for line in claims)
    assert ("81.4" in out) == (task == "counting") and "The best moment is after" in out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert len(numbers["comparisons"]) == len(claims) and len(numbers["outcomes"]) >= 2 * len(arms)
    grown = [outcome for outcome in numbers["outcomes"] if outcome["run"]["arm"] == "lossless"]
    assert all(outcome["begin"] == pytest.approx(outcome["grown"], abs=0.003) for outcome in grown)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(letter_counting, "finish", lambda runs: pytest.fail("they were finished before"))
    assert letter_counting.main(flags) == 0 and capsys.readouterr().out == out


def test_an_interrupted_study_goes_on(text, monkeypatch):
    trained, again = [], []

    def interrupted(runs):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(runs)
        return letters.finish(runs)

    flags = [*TOY, "--widths=64", "--arms", "plain-2-heads"]
    monkeypatch.setattr(letter_counting, "finish", interrupted)
    assert letter_counting.main(flags) == 130
    monkeypatch.setattr(letter_counting, "finish", lambda runs: again.append(runs) or letters.finish(runs))
    assert letter_counting.main(flags) == 0
    assert [len(runs) for runs in again] == [1, 2, 2] and not any(runs in trained for runs in again), "one rate of an arm, then two seeds of each arm"


@pytest.mark.parametrize("task, best", [("counting", 0.04), ("language", 0.01)])
def test_the_rate_of_the_better_score_is_taken(task, best, text, monkeypatch):
    """Of accuracies the highest, of bits per character the lowest; by the seeds of the tuning alone, and beyond the grid."""
    def outcomes(runs, text, jobs, label):
        liked = best if runs and runs[0].seed in letter_counting.TUNING_SEEDS else 0.02
        sign = 1 if task == "counting" else -1
        return [letters.Outcome(run, 0.5 - sign * abs(np.log2(run.rate / liked)) / 10, 0.5, 1.0) for run in runs]
    monkeypatch.setattr(letter_counting, "outcomes", outcomes)
    study = letter_counting.Study(task, [64], ["plain", "bus"], 2, 16, 5, [0.015, 0.02, 0.04] if task == "counting" else [0.02, 0.04], [1.0], 1, text)
    assert study.rates == {(64, "plain"): best, (64, "bus"): best}


def test_whole_seeds_are_trained_first(monkeypatch):
    monkeypatch.setattr(letter_counting, "TOGETHER", 2)
    runs = [Run("counting", "", arm, 64, 0.02, seed, 1, 5, 2) for arm in ("plain", "bus") for seed in range(3)]
    assert [[(run.arm, run.seed) for run in piece] for piece in letter_counting.side_by_side(runs + runs)] == [
        [("plain", 0), ("plain", 1)], [("bus", 0), ("bus", 1)], [("plain", 2)], [("bus", 2)]]


def test_intervals_and_verdicts_tell_an_effect_from_noise():
    noise = np.random.default_rng(1).normal(size=(2, 40))
    middle, low, high = letter_counting.interval(letter_counting.gain, noise[0], noise[0] + 1 + 0.1 * noise[1])
    assert low < middle < high and middle == pytest.approx(1, abs=0.1) and letter_counting.verdict(low, high) == "confirmed"
    middle, low, high = letter_counting.interval(letter_counting.variance_ratio, noise[0], 3 * noise[1])
    assert 0.03 < low < middle < high < 0.5 and letter_counting.verdict(low, high, 1.0) == "opposite"
    assert letter_counting.verdict(-1, 1) == letter_counting.verdict(0.5, 2, 1.0) == "not confirmed"


@pytest.mark.parametrize("flags, message", [(["--widths=64,50"], "50"), (["--widths=32"], "48"), (["--seeds=1"], "two seeds"), (["--epochs=4"], "five epochs"),
                                            (["--moments=0.5,2"], "after 2 of all"), ([], "training data")])
def test_one_line_says_what_is_wrong(flags, message, base_dir, capsys):
    assert letter_counting.main(flags) == 2
    assert message in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_too_little_text_is_said(text, monkeypatch, capsys):
    monkeypatch.setattr(letters, "TEST", 10 ** 6)
    assert letter_counting.main([]) == 2
    assert "too few" in capsys.readouterr().err
