"""The terminal chat and the inference benchmark as their users run them, on a model whose answers are known."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.lowrank import DECODE_ROWS, LowRankLinear
from scripts import chat_cli, infer_bench
from tests.golden.fixtures import tokenizer_512

CONFIG: dict = dict(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="L")
ROOT = Path(__file__).parent.parent
TOKENIZER = tokenizer_512()


def chain_model(*tokens):
    """Greedily continues each token of the chain with the next one: all blocks are the identity, the head maps embedding to successor."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**CONFIG))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        embeddings = model.transformer.wte.weight
        model.lm_head.weight.zero_()
        for token, successor in zip(tokens, tokens[1:], strict=False):
            model.lm_head.weight[successor] = embeddings[token]
    return model


def special(name: str) -> int:
    return TOKENIZER.encode_special(f"<|{name}|>")


def save(base_dir, kind: str, tag: str, *tokens: int, step: int = 20) -> None:
    TOKENIZER.save(base_dir / "tokenizer")
    save_checkpoint(base_dir / f"{kind}_checkpoints" / tag, step, chain_model(*tokens).state_dict(), None, {"model_config": CONFIG})


def letters(text: str) -> list[int]:
    return [TOKENIZER.encode(letter)[0] for letter in text]


@pytest.fixture
def chat(base_dir, capsys, monkeypatch):
    """Runs the command with what is typed; returns (status, stdout, stderr)."""
    def run(*flags: str, typed: str | bytes = ""):
        data = typed if isinstance(typed, bytes) else typed.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        status = chat_cli.main(["-t", "0", "--device-type", "cpu", *flags])
        return (status, *capsys.readouterr())
    return run


def test_a_conversation(base_dir, chat):
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("Hi, you!"), special("assistant_end"))
    status, out, err = chat(typed="Hello\n\nclear\nOnce more\nQUIT\nnot read\n")
    assert status == 0 and out.endswith("\nUser: \nAssistant: Hi, you!\n\nUser: \nUser: \nUser: \nAssistant: Hi, you!\n\nUser: ")
    assert err.count("sft model d2 of step 20: ") == 1


@pytest.mark.slow
def test_a_conversation_through_pipes(base_dir):
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("Hi, you!"), special("assistant_end"))
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}
    run = subprocess.run([sys.executable, "-m", "scripts.chat_cli", "--temperature=0", "--device_type=cpu"], input="Hello\n\nclear\nOnce more\nQUIT\nnot read\n",
                         capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "\nUser: \nAssistant: Hi, you!\n\nUser: \nUser: \nUser: \nAssistant: Hi, you!\n\nUser: "
    parameters = sum(p.numel() for p in chain_model(1, 2).parameters())
    assert run.stderr.count(f"sft model d2 of step 20: {parameters:,} parameters") == 1


def test_end_of_input_ends_the_chat(base_dir, chat):
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("ok"), special("assistant_end"))
    status, out, _ = chat(typed="Hello")
    assert status == 0 and out.endswith("Assistant: ok\n\nUser: \n")


def test_tool_calls_are_readable(base_dir, chat):
    save(base_dir, "chatsft", "d2", special("assistant_start"), special("python_start"), *letters("3*5"), special("python_end"))
    status, out, _ = chat("-p", "What is it?")
    assert status == 0
    assert out.startswith("[calculate: 3*5][= 15]") and "<|" not in out.split("]", 2)[0]


def test_an_unfinished_character_is_shown(base_dir, chat):
    first_byte = TOKENIZER.encode("é")[:1] if len(TOKENIZER.encode("é")) > 1 else [0xC3]
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("a"), *first_byte, special("assistant_end"))
    assert chat("-p", "x")[:2] == (0, "a\ufffd\n")


def test_a_base_model_continues_the_text(base_dir, chat):
    save(base_dir, "base", "d2", *letters("abcdefg"), special("bos"))
    status, out, err = chat("-p", "c")
    assert (status, out) == (0, "defg\n") and "base model d2 of step 20" in err
    status, out, _ = chat(typed="b\nd\n")
    assert out == "\nText: cdefg\n\nText: efg\n\nText: \n"


def test_fine_tuned_before_base_unless_asked_otherwise(base_dir, chat):
    save(base_dir, "base", "d2", *letters("ab"), special("bos"))
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("c"), special("assistant_end"))
    assert chat("-p", "a")[1] == "c\n"
    assert chat("-p", "a", "-i", "base")[1] == "b\n"


def test_steps_and_tags_can_be_chosen(base_dir, chat):
    save(base_dir, "base", "d2", *letters("ax"), special("bos"), step=5)
    save(base_dir, "base", "d2", *letters("ay"), special("bos"), step=7)
    save(base_dir, "base", "d1", *letters("az"), special("bos"))
    assert [chat("-p", "a", *flags)[1] for flags in ([], ["-s", "5"], ["-g", "d1"])] == ["y\n", "x\n", "z\n"]


def test_a_long_conversation_forgets_its_oldest_turns(base_dir, chat, monkeypatch):
    prompts = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, tokens, **kwargs: prompts.append(tokens) or generate(self, tokens, **kwargs))
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("ok"), special("assistant_end"))
    messages = ["one " * 3, "two " * 3, "three " * 3, "four " * 3]
    status, out, err = chat(typed="\n".join(messages) + "\n" + "long " * 100 + "\nend\n")
    assert status == 0 and out.count("Assistant: ok") == 5
    assert "forgotten" in err and "please shorten it" in err
    assert all(prompt[0] == special("bos") and len(prompt) < CONFIG["sequence_len"] for prompt in prompts)
    assert all(message.strip() in TOKENIZER.decode(prompt) for message, prompt in zip(messages, prompts, strict=False))
    turns = TOKENIZER.decode(prompts[1])
    assert turns == ("<|bos|><|user_start|>one one one<|user_end|><|assistant_start|>ok<|assistant_end|>"
                     "<|user_start|>two two two<|user_end|><|assistant_start|>")
    assert "one" not in TOKENIZER.decode(prompts[-1])


def test_ctrl_c_stops_the_answer_only(base_dir, chat, monkeypatch):
    def interrupted(self, tokens, **kwargs):
        yield [letters("a")[0]], [1]
        raise KeyboardInterrupt
    monkeypatch.setattr(Engine, "generate", interrupted)
    save(base_dir, "chatsft", "d2", 1, 2)
    status, out, err = chat(typed="Hello\nAgain\n")
    assert status == 0 and out.count("Assistant: a\n") == 2 and err.count("stopped") == 2


def test_input_in_another_encoding_is_survived(base_dir, chat):
    save(base_dir, "chatsft", "d2", special("assistant_start"), *letters("ok"), special("assistant_end"))
    status, out, _ = chat(typed=b"caf\xe9\n")
    assert status == 0 and "Assistant: ok" in out


@pytest.mark.parametrize("flags, message", [
    ([], "no model in"), (["-i", "rl"], "no model in"), (["-g", "d9"], "no model 'd9'"), (["--device-type", "tpu"], "unknown device type")])
def test_what_cannot_be_run_is_one_line(base_dir, chat, flags, message):
    status, out, err = chat("-p", "hi", *flags)
    errors = [line for line in err.splitlines() if "error:" in line]
    assert status == 2 and out == "" and len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("flag", ["--temperature=-1", "--temperature=nan", "--top-k=-5", "--step=x", "--source=nothing"])
def test_bad_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        chat_cli.main([flag])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# -----------------------------------------------------------------------------
# infer_bench


def bench(capsys, *flags: str) -> dict:
    assert infer_bench.main(["--device-type=cpu", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_the_result(base_dir, capsys):
    save(base_dir, "base", "d2", 1, 2, step=33)
    result = bench(capsys, "--prompt-tokens=2048", "--decode-tokens=16", "--batch-sizes=1,3", "--temperature=1")
    model = chain_model(1, 2)
    assert set(result) == {
        "source", "step", "model_config", "gpu", "peak_bandwidth_bytes_per_sec", "total_vram_bytes", "num_params", "param_dtypes", "weight_bytes",
        "kv_bytes_per_token", "kv_read_bytes_per_step", "context_mid", "peak_flops_per_sec", "decode_flops_per_token", "ceiling_bs1_tok_per_sec",
        "max_full_context_rows", "prompt_tokens", "decode_tokens", "temperature", "sweep", "prefill"}
    assert (result["source"], result["step"], result["model_config"]) == ("base", 33, CONFIG)
    assert (result["prompt_tokens"], result["decode_tokens"], result["context_mid"]) == (48, 16, 56)  # cut to the context of 64
    assert result["num_params"] == model.num_scaling_params()["total"] == sum(result["param_dtypes"].values())
    assert result["decode_flops_per_token"] == model.estimate_decode_flops(56)
    assert result["kv_read_bytes_per_step"] == model.kv_read_bytes(56)
    unknown = ["gpu", "total_vram_bytes", "peak_flops_per_sec", "peak_bandwidth_bytes_per_sec", "ceiling_bs1_tok_per_sec", "max_full_context_rows"]
    assert [result[key] for key in unknown] == [None] * len(unknown)
    assert [row["batch_size"] for row in result["sweep"]] == [1, 3]
    for row in result["sweep"]:
        assert set(row) == {"batch_size", "ttft_sec", "tpot_sec", "tok_per_sec", "mbu_percent", "mfu_percent", "peak_vram_bytes", "decode_steps"}
        assert row["ttft_sec"] > 0 and row["tok_per_sec"] == pytest.approx(row["batch_size"] / row["tpot_sec"], rel=0.05)
        assert 0 < row["decode_steps"] <= 15 and row["mbu_percent"] is row["mfu_percent"] is row["peak_vram_bytes"] is None
    assert set(result["prefill"]) == {"tok_per_sec", "mfu_percent", "time_sec"} and result["prefill"]["mfu_percent"] is None


def test_a_model_that_ends_at_once_has_no_steps_to_time(base_dir, capsys):
    last = infer_bench.build_prompt(TOKENIZER, 60)[-1]
    save(base_dir, "base", "d2", last, special("bos"))
    row, = bench(capsys, "--prompt-tokens=60", "--decode-tokens=4", "--batch-sizes=2")["sweep"]
    assert row["decode_steps"] == 0 and row["tpot_sec"] is None and row["ttft_sec"] > 0


def test_weight_bytes_leave_out_the_tables():
    model = chain_model(1, 2)
    counts = model.num_scaling_params()
    read = counts["lm_head"] + counts["transformer_matrices"] + counts["scalars"]
    assert infer_bench.weight_bytes(model) == 4 * read


def test_weight_bytes_of_low_rank_layers():
    """What a few rows read of a merged layer is its product, what many rows read the factors."""
    merged, factors = LowRankLinear(8, 10, 4), LowRankLinear(8, 10, 2)
    merged.merge()
    model = torch.nn.Sequential(merged, factors)
    assert infer_bench.weight_bytes(model) == infer_bench.weight_bytes(model, DECODE_ROWS) == 4 * (8 * 10 + 2 * 18)
    assert infer_bench.weight_bytes(model, DECODE_ROWS + 1) == 4 * (4 * 18 + 2 * 18)


def test_a_prompt_has_the_length_asked_for():
    for length in (1, 2, 500):
        prompt = infer_bench.build_prompt(TOKENIZER, length)
        assert len(prompt) == length and prompt[0] == special("bos")


@pytest.mark.parametrize("flag", ["--batch-sizes=1,x", "--batch-sizes=", "--batch-sizes=0", "--decode-tokens=0", "--prompt-tokens=-3", "--source=x"])
def test_bad_bench_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        infer_bench.main([flag])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags, message", [([], "leaves no room for a prompt"), (["--model-tag=d8"], "no model 'd8'")])
def test_what_cannot_be_measured_is_one_line(base_dir, capsys, flags, message):
    save(base_dir, "base", "d2", 1, 2)
    assert infer_bench.main(["--device-type=cpu", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
