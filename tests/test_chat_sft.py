"""Packing of conversations, and fine-tuning of tiny models: exact resume, ranks, layered models, settings, errors."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import checkpoint_manager as checkpoints
from nanochat import train_loop
from nanochat.cli import UsageError, parse_settings, settings_parser
from nanochat.run_log import read_run_log
from scripts import base_train, chat_cli, chat_eval, chat_sft
from tasks import spellingbee
from tasks.common import Task
from tests import tiny
from tests.examples import examples
from tests.golden.fixtures import tokenizer_512

FLAGS = ["--device-type=cpu", "--mixture=spelling", "--num-iterations=16", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=512",
         "--eval-every=4", "--eval-tokens=512", "--chatcore-every=-1", "--save-every=2"]  # 8 steps of two batches


def tune(*flags: str) -> int:
    spellingbee._all_words.cache_clear()
    return chat_sft.main([*FLAGS, *flags])


def start(base_dir, *flags: str, ranks: int = 0, script: str = "chat_sft") -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen([sys.executable, *launcher, "-m", f"scripts.{script}", *flags], cwd=tiny.ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, **tiny.ENV, "NANOCHAT_BASE_DIR": str(base_dir)})


def run(*args, **kwargs) -> str:
    process = start(*args, **kwargs)
    out, err = tiny.ended(process)
    assert process.returncode == 0, err
    return out


def folder(base_dir, kind: str = "chatsft", tag: str = "d3"):
    return base_dir / f"{kind}_checkpoints" / tag


def losses(base_dir, kind: str = "chatsft") -> list:
    timings = {"dt", "time", "tok_per_sec", "mfu", "total_training_time"}
    return [{key: value for key, value in record.items() if key not in timings} for record in read_run_log(folder(base_dir, kind) / "log.jsonl")
            if record["kind"] not in ("start", "end")]


def assert_same(one, other, step: int = 8, ranks: int = 1, kind: str = "chatsft") -> None:
    """Equal logs, weights, optimizers, data positions and random states."""
    assert losses(one, kind) == losses(other, kind)
    names = [f"model_{step:06d}.pt", *(f"{part}_{step:06d}_rank{rank}.pt" for part in ("optim", "state") for rank in range(ranks))]
    for name in names:
        assert tiny.identical(*(torch.load(folder(base, kind) / name, weights_only=True) for base in (one, other))), name


@pytest.fixture
def base(finished_run, base_dir):
    """A copy of a finished pretraining run."""
    shutil.copytree(finished_run, base_dir, dirs_exist_ok=True)
    return base_dir


@pytest.fixture(scope="session")
def tuned_run(finished_run, tmp_path_factory):
    """A fine-tuning that nobody interrupted; not to be written to."""
    directory = tmp_path_factory.mktemp("tuned")
    shutil.copytree(finished_run, directory, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        assert tune() == 0
    return directory


# -- packing


class Conversations(Task):
    """Lengths in tokens of question and answer."""

    def __init__(self, lengths):
        super().__init__()
        self.lengths = lengths

    def num_examples(self):
        return len(self.lengths)

    def get_example(self, index):
        question, answer = self.lengths[index]
        return {"messages": [{"role": "user", "content": "!" * question}, {"role": "assistant", "content": "?" * answer}]}


TOKENIZER = tokenizer_512()
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=examples(60))
@given(lengths, st.integers(8, 40), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_every_row_learns_and_positions_continue_exactly(lengths, T, B, buffer_size, cut):
    def loader(**kwargs):
        return chat_sft.pack_conversations(Conversations(lengths), TOKENIZER, B, T, "cpu", buffer_size=buffer_size, **kwargs)
    batches = loader()
    try:
        expected = [next(batches) for _ in range(cut + 3)]
    except UsageError as error:
        assert "no conversation has an answer" in str(error)
        assert all(TOKENIZER.render_conversation(example)[1].index(1) > T for example in Conversations(lengths)), "no row reaches an answer"
        return
    for inputs, targets, _ in expected:
        assert inputs.shape == targets.shape == (B, T)
        assert (targets >= 0).any(dim=1).all()
        learned = targets >= 0
        assert torch.equal(targets[:, :-1][learned[:, :-1]], inputs[:, 1:][learned[:, :-1]].long()), "a target is the next input"
        assert (inputs[:, 0] == TOKENIZER.get_bos_token_id()).all()
    assert [state["progress"] for *_, state in expected] == sorted(state["progress"] for *_, state in expected)
    state = json.loads(json.dumps(expected[cut - 1][2]))
    resumed = loader(resume_state=state)
    for want in expected[cut:]:
        assert tiny.identical(list(next(resumed)), list(want))


def test_conversations_are_whole_and_all_are_used():
    conversations = Conversations([(1 + i % 5, 1 + i % 7) for i in range(40)])
    rendered = [TOKENIZER.render_conversation(example)[0] for example in conversations]
    bos, seen = TOKENIZER.get_bos_token_id(), []
    for inputs, _, state in chat_sft.pack_conversations(conversations, TOKENIZER, 2, 64, "cpu", buffer_size=10):
        for row in inputs.tolist():
            for piece in " ".join(map(str, row)).split(str(bos))[1:]:
                if piece.strip():
                    seen.append([bos, *map(int, piece.split())])
        if state["last"]:
            break
    whole = [ids for ids in seen if ids in rendered]
    assert len(whole) >= len(seen) - 2 * state["iteration"], "at most the last of a row lost its last token, which is no input"
    assert len(seen) >= 40


def test_long_conversations_do_not_block_the_packer():
    """Nine of ten are longer than a row, which nanochat would pad for ever."""
    conversations = Conversations([(1, 100)] * 9 + [(2, 3)])
    loader = chat_sft.pack_conversations(conversations, TOKENIZER, 1, 32, "cpu", buffer_size=5)
    used = [(targets >= 0).float().mean().item() for _, targets, _ in (next(loader) for _ in range(40))]
    assert sum(used) / len(used) > 0.5


def test_changed_conversations_are_noticed():
    loader = chat_sft.pack_conversations(Conversations([(3, 3)] * 9), TOKENIZER, 1, 32, "cpu", buffer_size=4)
    state = next(loader)[2]
    with pytest.raises(UsageError, match="changed since"):
        next(chat_sft.pack_conversations(Conversations([(3, 4)] * 9), TOKENIZER, 1, 32, "cpu", resume_state=state))


def test_more_ranks_than_conversations(monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="too few"):
        next(chat_sft.pack_conversations(Conversations([(1, 1)] * 2), TOKENIZER, 1, 32, "cpu"))


# -- training


def test_it_learns_and_logs(tuned_run):
    records = read_run_log(folder(tuned_run) / "log.jsonl")
    bpb = [record["val_bpb"] for record in records if record["kind"] == "eval"]
    assert len(bpb) == 3 and bpb[-1] < bpb[0]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(8)), "as in base_train, the step that begins"
    assert train[0]["lrm"] == 1 and train[-1]["lrm"] == 0 and train[-1]["progress"] > 1 - 1e-9
    assert train[0]["loss"] == pytest.approx(train[0]["raw_loss"]), "the average over one step is that step"
    assert checkpoints.list_steps(folder(tuned_run)) == [2, 4, 6, 8]
    assert "Chat SFT" in (tuned_run / "report" / "chat-sft.md").read_text()


@pytest.mark.slow
def test_kill_9_and_resume(base, tuned_run):
    process = start(base, *FLAGS)
    for line in process.stdout:
        if line.startswith("step 00005"):
            break
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and checkpoints.list_steps(folder(base))[:2] == [2, 4] and not checkpoints.list_steps(folder(base))[3:], "it was killed before its end"
    assert tune("--resume") == 0
    assert_same(base, tuned_run)


@pytest.mark.parametrize("step", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_resume_from_any_step(tuned_run, base_dir, step):
    shutil.copytree(tuned_run, base_dir, dirs_exist_ok=True)
    assert tune(f"--resume-from-step={step}") == 0
    assert_same(base_dir, tuned_run)


def test_resuming_a_finished_run_changes_nothing(tuned_run, base_dir):
    shutil.copytree(tuned_run, base_dir, dirs_exist_ok=True)
    times = {path: path.stat().st_mtime_ns for path in folder(base_dir).glob("*.pt")}
    assert tune("--resume") == 0
    assert times == {path: path.stat().st_mtime_ns for path in folder(base_dir).glob("*.pt")}


def test_resume_survives_a_longer_base_run(tuned_run, base_dir):
    """The chat model goes on from the base checkpoint it came from."""
    shutil.copytree(tuned_run, base_dir, dirs_exist_ok=True)
    base_folder = tiny.folder(base_dir)
    for path in base_folder.glob("*_000008*"):
        shutil.copy(path, str(path).replace("000008", "000009"))
    assert tune("--resume-from-step=4") == 0
    assert json.loads((folder(base_dir) / "meta_000008.json").read_text())["base_step"] == 8
    assert_same(base_dir, tuned_run)


@pytest.mark.parametrize("flags, message", [
    (["--mixture=spelling,mine.jsonl"], "mixture spelling -> "), (["--max-seq-len=64"], "max_seq_len 128 -> 64"),
])
def test_resume_with_other_settings_is_refused(tuned_run, base_dir, monkeypatch, capsys, flags, message):
    shutil.copytree(tuned_run, base_dir, dirs_exist_ok=True)
    monkeypatch.chdir(base_dir)
    (base_dir / "mine.jsonl").write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    assert tune("--resume", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_and_their_resume(base, tmp_path_factory):
    flags = [*FLAGS, "--total-batch-size=1024", "--num-iterations=8"]  # 4 steps of two batches on each rank
    run(base, *flags, ranks=2)  # the base model's optimizer is of one rank
    state = torch.load(folder(base) / "optim_000004_rank1.pt", weights_only=True)["state"]
    assert state[0]["step"] == torch.load(folder(base, "base") / "optim_000008_rank0.pt", weights_only=True)["state"][0]["step"] + 4
    other = tmp_path_factory.mktemp("ranks")
    shutil.copytree(base, other, dirs_exist_ok=True)
    for path in folder(other).glob("*_000004*"):
        path.unlink()
    run(other, *flags, "--resume", ranks=2)
    assert_same(base, other, step=4, ranks=2)


@pytest.mark.slow
def test_layered_models(base_dir):
    """Low-rank layers: fine-tuning, resuming and evaluating are the same commands."""
    tiny.prepare(base_dir)
    assert tiny.train("--rank=8", "--num-iterations=2", "--save-every=-1") == 0
    assert tune("--num-iterations=8") == 0
    weights = torch.load(folder(base_dir) / "model_000004.pt", weights_only=True)
    for path in folder(base_dir).glob("*_000004*"):
        path.unlink()
    assert tune("--num-iterations=8", "--resume") == 0
    assert tiny.identical(weights, torch.load(folder(base_dir) / "model_000004.pt", weights_only=True))
    assert "layers" in json.loads((folder(base_dir) / "meta_000004.json").read_text())["model_config"]
    assert chat_eval.main(["-i", "sft", "-a", "SimpleSpelling", "-x", "2", "-m", "4", "--device-type=cpu"]) == 0


def test_the_whole_mixture_once(base, monkeypatch):
    """Without a number of iterations the run ends when all conversations were used; a file of one's own has no validation."""
    path = base / "mine.jsonl"
    path.write_text("".join(json.dumps([{"role": "user", "content": f"n{i}"}, {"role": "assistant", "content": "yes"}]) + "\n" for i in range(30)))
    assert chat_sft.main(["--device-type=cpu", f"--mixture={path}", "--device-batch-size=2", "--max-seq-len=32", "--total-batch-size=64",
                          "--chatcore-every=-1"]) == 0
    records = read_run_log(folder(base) / "log.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert train[-1]["progress"] >= 1 > train[-2]["progress"]
    assert not [record for record in records if record["kind"] == "eval"]
    meta = json.loads((folder(base) / f"meta_{train[-1]['step'] + 1:06d}.json").read_text())
    assert meta["model_config"]["sequence_len"] == 32


def conversations(base, count: int, name: str = "mine.jsonl"):
    path = base / name
    path.write_text("".join(json.dumps([{"role": "user", "content": f"n{i}"}, {"role": "assistant", "content": "yes"}]) + "\n" for i in range(count)))
    return path


@pytest.mark.parametrize("flags", [["--num-iterations=1"], []], ids=["one batch", "fewer conversations than a batch holds"])
def test_one_step_at_least(base, flags):
    """And not with the learning rate that a run ends with, which is 0."""
    path = conversations(base, 3)
    assert chat_sft.main(["--device-type=cpu", f"--mixture={path}", "--device-batch-size=2", "--max-seq-len=64", "--total-batch-size=128", "--chatcore-every=-1",
                          *flags]) == 0
    (train,) = [record for record in read_run_log(folder(base) / "log.jsonl") if record["kind"] == "train"]
    assert train["lrm"] == 1 and checkpoints.list_steps(folder(base)) == [1]
    before, after = (torch.load(path, weights_only=True) for path in (tiny.folder(base) / "model_000008.pt", folder(base) / "model_000001.pt"))
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def parsed(*flags: str) -> chat_sft.Settings:
    return parse_settings(chat_sft.Settings, flags, "")


def test_the_mixture_as_people_write_it(base):
    a, b = conversations(base, 5, "a.jsonl"), conversations(base, 7, "b.jsonl")
    args = parsed(f"--mixture={a}, {b},")
    train, val = chat_sft.build_mixture(args.mixture, 1, 1)
    assert (len(train), len(val)) == (12, 0)


@pytest.mark.slow
def test_the_weights_come_before_the_evaluations(base, tuned_run, monkeypatch):
    calls = []

    def interrupted(*args, function=train_loop.evaluate_bpb):
        calls.append(1)
        if len(calls) == 3:  # at steps 0, 4 and 8
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "evaluate_bpb", interrupted)
        assert tune() == 130
    assert checkpoints.list_steps(folder(base)) == [2, 4, 6, 8] and checkpoints.load_meta(folder(base), 8)["val_bpb"] is None
    assert tune("--resume") == 0
    assert_same(base, tuned_run)
    assert checkpoints.load_meta(folder(base), 8)["val_bpb"] == checkpoints.load_meta(folder(tuned_run), 8)["val_bpb"] is not None


def test_a_fine_tuning_that_was_stopped_at_once_is_no_model(base, monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_loop, "evaluate_bpb", stop)
    assert tune() == 130
    assert (folder(base) / "log.jsonl").exists() and checkpoints.list_models(folder(base).parent) == []
    assert chat_cli.main(["-p", "a", "-t", "0", "--device-type=cpu"]) == 0
    assert "base model d3 of step 8" in capsys.readouterr().err


def test_settings_come_from_the_base_model(base):
    args = chat_sft.inherit(parsed("--matrix-lr=0.5"), checkpoints.load_meta(tiny.folder(base), 8))
    assert (args.max_seq_len, args.device_batch_size, args.total_batch_size) == (64, 2, 256)
    assert (args.embedding_lr, args.unembedding_lr, args.matrix_lr) == (0.3, 0.008, 0.5)
    args = chat_sft.inherit(parsed(), {})
    assert (args.max_seq_len, args.device_batch_size, args.total_batch_size) == (2048, 32, 524288)
    assert (args.embedding_lr, args.unembedding_lr, args.matrix_lr) == (0.3, 0.004, 0.02)


def test_a_new_context_gets_its_own_windows(base):
    """A model is trained with the attention windows that it is later used with."""
    model, *_ = checkpoints.build_model(tiny.folder(base), 8, torch.device("cpu"), "train")
    assert chat_sft.with_context(model, 64) is model
    longer = chat_sft.with_context(model, 1024)
    assert longer.window_sizes == [(256, 0), (1024, 0), (1024, 0)] and longer.config.sequence_len == 1024
    assert tiny.identical(model.state_dict(), longer.state_dict())


def test_fresh_optimizer(base):
    assert tune("--load-optimizer=0", "--num-iterations=2", "--eval-every=-1") == 0
    optimizer = torch.load(folder(base) / "optim_000001_rank0.pt", weights_only=True)
    assert optimizer["state"][0]["step"] == 1
    assert tune("--num-iterations=2", "--eval-every=-1") == 0
    optimizer = torch.load(folder(base) / "optim_000001_rank0.pt", weights_only=True)
    assert optimizer["state"][0]["step"] == 9, "8 of the base model and 1 of its own"


@pytest.mark.parametrize("flags, message", [
    (["--mixture=spelling,poems"], "unknown part 'poems'"), (["--mixture=absent.jsonl"], "no file absent.jsonl"),
    (["--total-batch-size=500"], "cannot be made of passes"), (["--eval-tokens=10"], "less than one batch"),
    (["--model-tag=d99"], "no model 'd99'"), (["--resume-from-step=3"], "no checkpoint of step 3"),
])
def test_bad_settings(base, capsys, flags, message):
    assert tune(*flags) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in err and err.startswith("error: ")


def test_without_a_base_model(base_dir, capsys):
    (base_dir / "words_alpha.txt").write_text("\n".join(a + b + "zz" for a in spellingbee.LETTERS for b in spellingbee.LETTERS) + "\nimpossibilities")
    assert tune() == 2
    assert "base_train" in capsys.readouterr().err


@pytest.mark.slow
def test_no_network_no_mixture_and_no_chatcore(base, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr("datasets.load_dataset", fail)
    assert chat_sft.main(["--device-type=cpu"]) == 2
    assert "no network" in capsys.readouterr().err
    spellingbee._all_words.cache_clear()
    path = base / "mine.jsonl"
    path.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    assert tune(f"--mixture=spelling,{path}", "--num-iterations=2", "--chatcore-every=1", "--chatcore-max-sample=2") == 0
    assert "No ChatCORE in this run: cannot get allenai/ai2_arc" in capsys.readouterr().out
    (record,) = [record for record in read_run_log(folder(base) / "log.jsonl") if record["kind"] == "chatcore"]
    assert "SpellingBee" in record and "chatcore_metric" not in record


def test_base_train_and_chat_sft_take_the_same_resume_flags():
    base, sft = (settings_parser(script.Settings, "").format_help() for script in (base_train, chat_sft))
    assert all(flag in base and flag in sft for flag in ("--resume", "--resume-from-step", "--save-every"))
