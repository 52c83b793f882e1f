"""CORE prompts, tokens, spans, decisions and accuracies against the reference."""
import functools
import shutil

import pytest
import torch

from nanochat import core_eval
from tests.golden import fixtures, inputs
from tests.golden.exceptions import EXCEPTIONS

CORE = fixtures.load("core_eval")
CPU = torch.device("cpu")
SHORT = {"multiple_choice": "mc", "schema": "schema", "language_modeling": "lm"}


@functools.cache
def tokenizer():
    return fixtures.tokenizer_512()


@functools.cache
def model(name):
    if name == "gpt":
        return fixtures.build_model(CORE["gpt_config"], CORE["gpt_seed"])
    table = inputs.table(CORE["table_seed"], 512, [tuple(pair) for pair in CORE["boost_pairs"]], CORE["boost"])
    return fixtures.TableModel(table, 40 if name == "table, max_seq_len 40" else None)


def task_meta(run):
    return {key: run[key] for key in ("task_type", "num_fewshot", "continuation_delimiter")}


RUN = {run["name"]: run for run in CORE["runs"]}
KEPT = [run for name, run in RUN.items() if ("core_eval", name) not in EXCEPTIONS]
RUNS = pytest.mark.parametrize("run", KEPT, ids=lambda run: run["name"])


@RUNS
def test_accuracy_of_a_task(run):
    accuracy = core_eval.evaluate_task(model(run["model"]), tokenizer(), CORE["items"][run["items"]], CPU, task_meta(run))
    assert accuracy == pytest.approx(run["accuracy"], abs=1e-6)


@RUNS
def test_examples_one_by_one(run):
    data, meta = CORE["items"][run["items"]], task_meta(run)
    for want in run["examples"]:
        assert core_eval.evaluate_example(want["index"], model(run["model"]), tokenizer(), data, CPU, meta) == want["correct"]
        assert_prompts_and_spans(run, want)


def assert_prompts_and_spans(run, want):
    data, short = CORE["items"][run["items"]], SHORT[run["task_type"]]
    shots = [data[i] for i in want["few_shot"]]
    prompts = getattr(core_eval, f"render_prompts_{short}")(data[want["index"]], run["continuation_delimiter"], shots)
    tokens, starts, ends = getattr(core_eval, f"batch_sequences_{short}")(tokenizer(), prompts)
    assert (starts, ends) == (want["starts"], want["ends"])
    if "prompts" in want:
        assert (prompts, tokens) == (want["prompts"], want["tokens"])


@pytest.mark.parametrize("run", [run for run in KEPT if "mean_losses" in run["examples"][0]], ids=lambda run: run["name"])
def test_mean_losses(run):
    max_seq_len = getattr(model(run["model"]), "max_seq_len", None)
    for want in run["examples"]:
        example = core_eval.prepare_example(want["index"], tokenizer(), CORE["items"][run["items"]], task_meta(run), max_seq_len)
        losses, _ = core_eval.forward_model(model(run["model"]), core_eval.stack_sequences(example.sequences, 0))
        means = [losses[i, start - 1:end - 1].mean().item() for i, (start, end) in enumerate(zip(example.starts, example.ends, strict=True))]
        assert means == pytest.approx(want["mean_losses"], abs=1e-4)


def test_a_choice_that_is_a_prefix_of_all_others_is_scored():
    """The reference has NaN for it, which wins in first place and never elsewhere. Here the order of the choices has no effect."""
    run, items = RUN["mc_table_prefix_choice"], CORE["items"]["prefix_choices"]
    for index, item in enumerate(items):
        example = core_eval.prepare_example(index, tokenizer(), items, task_meta(run))
        assert len(set(example.starts)) == 1 and all(end > example.starts[0] for end in example.ends)
        correct = core_eval.evaluate_example(index, model("table"), tokenizer(), items, CPU, task_meta(run))
        assert correct == (item["choices"][item["gold"]] == "mi lu")


@pytest.mark.parametrize("case", CORE["helpers"], ids=lambda case: str(case["sequences"]))
def test_helpers(case):
    assert core_eval.find_common_length(case["sequences"], direction="left") == case["left"]
    assert core_eval.find_common_length(case["sequences"], direction="right") == case["right"]
    assert core_eval.stack_sequences(case["sequences"], CORE["pad_for_helpers"]).tolist() == case["stacked"]


def test_forward_model():
    want = CORE["forward_model"]
    losses, predictions = core_eval.forward_model(model("table"), torch.tensor(want["input"]))
    assert predictions.tolist() == want["predictions"]
    assert losses[:, -1].isnan().all()
    assert losses[:, :-1].numpy() == pytest.approx(torch.tensor([row[:-1] for row in want["losses"]]).numpy(), abs=1e-4)


@pytest.mark.parametrize("case", CORE["lm_edges"], ids=lambda case: repr(case["prompts"][1]))
def test_language_modeling_edges(case):
    prompts = core_eval.render_prompts_lm(dict(context=case["context"], continuation=case["continuation"]), case["delimiter"])
    assert prompts == case["prompts"]
    if case["raises"]:
        with pytest.raises(AssertionError):
            core_eval.batch_sequences_lm(tokenizer(), prompts)
    else:
        assert core_eval.batch_sequences_lm(tokenizer(), prompts) == (case["tokens"], case["start"], case["end"])


@pytest.mark.parametrize("case", CORE["centering"], ids=lambda case: f"{case['accuracy']}-{case['baseline_percent']}")
def test_centering(case):
    task = core_eval.CoreTask("label", {}, case["baseline_percent"], [])
    assert task.centered(case["accuracy"]) == pytest.approx(case["centered"], abs=1e-12)


@pytest.mark.parametrize("want", CORE["whole_benchmark"], ids=lambda want: f"max{want['max_per_task']}")
def test_whole_benchmark(want, base_dir, capsys):
    from nanochat.core_eval import evaluate_core
    shutil.copytree(fixtures.HERE / "core_bundle", base_dir / "eval_bundle")
    got = evaluate_core(model("table"), tokenizer(), CPU, max_per_task=want["max_per_task"])
    assert got["results"] == pytest.approx(want["results"], abs=1e-6)
    assert got["centered_results"] == pytest.approx(want["centered_results"], abs=1e-6)
    assert got["core_metric"] == pytest.approx(want["core_metric"], abs=1e-6)
    assert "4 of 22 tasks" in capsys.readouterr().out
