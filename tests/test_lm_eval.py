"""Our models in the lm-evaluation-harness, on tasks from local files."""
import json
import math
import sys

import datasets.config
import lm_eval
import pytest
import torch
import torch.nn.functional as F
import yaml
from lm_eval.api.instance import Instance

from nanochat.checkpoint_manager import build_model
from nanochat.cli import UsageError
from nanochat.engine import Engine
from nanochat.lm_eval_model import NanochatLM
from scripts import lm_eval as script
from tests import exported

TEXTS = ["the cat sat on the mat, the end.", "naïve café\n" * 12, "a", "the mat " * 40]  # the last ones exceed the context of 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with two models, and a folder of tasks."""
    directory = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "datasets")
        exported.prepare(directory, {kind: exported.KINDS[kind] for kind in ("stock", "masked")})
        write_tasks(directory / "tasks")
        yield directory


def write_tasks(folder) -> None:
    folder.mkdir()
    rows = {"choices": [{"question": f"The cat number {i} is", "choices": ["blue", "a green mat", "the end"], "gold": i % 3} for i in range(6)],
            "texts": [{"text": text} for text in TEXTS]}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    task = lambda name, data, **more: (folder / f"{name}.yaml").write_text(yaml.safe_dump(
        {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / data)}}, "test_split": "test", **more}))
    task("choices", "choices.jsonl", output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}",
         metric_list=[{"metric": "acc"}])
    task("texts", "texts.jsonl", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}])
    task("goes_on", "texts.jsonl", output_type="generate_until", doc_to_text="{{text[:9]}}", doc_to_target="x", generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
         metric_list=[{"metric": "exact_match"}])
    task("no_data", "nowhere.jsonl", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "bits_per_byte"}])


@pytest.fixture(scope="module")
def lm(base):
    model, tokenizer, _ = build_model(base / "base_checkpoints" / "stock", exported.STEP, "cpu", "train")
    return NanochatLM(model.eval(), tokenizer, rows=3)


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@torch.no_grad()
def by_hand(lm, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token, each pair alone. Blanks between the two belong to the continuation, as everywhere in the harness."""
    context, continuation = context.rstrip(), context[len(context.rstrip()):] + continuation
    ids = [lm.prefix_token_id, *lm.tok_encode(context + continuation)]
    start = 1 + len(lm.tok_encode(context))
    nats, greedy = 0.0, True
    for place in range(start, len(ids)):
        row = ids[max(0, place - lm.max_length):place]
        logits = lm.model(torch.tensor([row, row] if len(row) > 1 else [row + [0]]))[0, len(row) - 1]
        nats += F.log_softmax(logits, dim=-1)[ids[place]].item()
        greedy &= int(logits.argmax()) == ids[place]
    return nats, greedy


def test_likelihoods(lm):
    """Of continuations of unequal length in one batch; <|bos|> stands before every text, and alone where there is no context."""
    pairs = [("the cat sat", " on the mat"), ("", "the cat"), ("a", "b"), ("x\n", "  y"), ("the", " end of the mat and the cat")]
    for (nats, greedy), pair in zip(lm.loglikelihood(requests("loglikelihood", *pairs)), pairs):
        expected = by_hand(lm, *pair)
        assert nats == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_what_greedy_decoding_writes_is_greedy(lm):
    prompt = [lm.prefix_token_id, *lm.tok_encode("the cat")]
    (row,), _ = Engine(lm.model, lm.encoder).generate_batch(prompt, max_tokens=6, temperature=0.0)
    written, other = row[len(prompt):], [*row[len(prompt):-1], (row[-1] + 1) % 256]
    (_, greedy), (_, not_greedy) = lm._loglikelihood_tokens([(("", ""), prompt[1:], written), (("", ""), prompt[1:], other)])
    assert greedy and not not_greedy


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    long = ("the mat " * 60).strip()
    ids = [lm.prefix_token_id, *lm.tok_encode(long + " the end")]
    ((nats, _),) = lm.loglikelihood(requests("loglikelihood", (long, " the end")))
    inputs, count = torch.tensor([ids[-65:-1]]), len(ids) - len(lm.tok_encode(long)) - 1
    logits = lm.model(inputs)[0, -count:]
    assert nats == pytest.approx(F.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids[-count:])[:, None]).sum().item(), abs=1e-4)
    with pytest.raises(UsageError, match="does not fit"):
        lm.loglikelihood(requests("loglikelihood", ("a", "xyz" * 100)))


def test_whole_texts(lm):
    """Short ones by the chain rule; of long ones each token once, behind no more than the context holds."""
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS)))
    for text, nats in zip(TEXTS, found):
        if len(lm.tok_encode(text)) <= lm.max_length:
            assert nats == pytest.approx(by_hand(lm, "", text)[0], abs=1e-3)
    scored = []
    lm.score, original = lambda pairs, label: scored.extend(pairs) or original(pairs, label), lm.score
    try:
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXTS[-1],)))
    finally:
        del lm.score
    assert [token for _, targets in scored for token in targets] == lm.tok_encode(TEXTS[-1]) and len(scored) > 1
    assert scored[0][0] == [lm.prefix_token_id] and all(len(given) + len(targets) <= lm.max_length + 1 for given, targets in scored)


def test_texts_that_are_written(lm):
    prompt = [lm.prefix_token_id, *lm.tok_encode("the cat")]
    (row,), _ = Engine(lm.model, lm.encoder).generate_batch(prompt, max_tokens=12, temperature=0.0)
    whole = lm.encoder.decode(row[len(prompt):])
    stop = whole[len(whole) // 2]
    write = lambda **options: lm.generate_until(requests("generate_until", ("the cat", options)))[0]
    assert write(until=[], max_gen_toks=12) == whole
    assert write(until=[stop, "never in it"], max_gen_toks=12) == write(until=stop, max_gen_toks=12) == whole[:whole.index(stop)]
    assert write(until=[], max_gen_toks=12, do_sample=False, temperature=0.8) == whole
    assert write(until=[], max_gen_toks=12, do_sample=True, temperature=5.0) != whole
    assert isinstance(lm.write("the mat " * 100, max_gen_toks=5), str)
    again = requests("generate_until", *[("the cat", dict(until=[], max_gen_toks=12, do_sample=True, temperature=5.0))] * 3)
    assert len(set(lm.generate_until(again))) == 3 and lm.generate_until(again) == lm.generate_until(again), "drawn anew, and the same in every call"
    for options, reason in ((dict(top_p=0.5), "'top_p' is not supported"), (dict(max_gen_toks=64), "leaves no room")):
        with pytest.raises(UsageError, match=reason):
            write(**options)


@pytest.mark.parametrize("arguments, reason", [("pretrained=x", "'pretrained'"), ("source=hub", "unknown source"), ("model_tag=nope", "no model 'nope'")])
def test_by_its_name(base, arguments, reason):
    made = lm_eval.api.registry.get_model("nanochat").create_from_arg_string("model_tag=stock,step=7", {"batch_size": 2, "device": "cpu"})
    assert isinstance(made, NanochatLM) and made.rows == 2 and made.max_length == 64
    assert lm_eval.api.registry.get_model("dummy"), "the harness's own models are there beside it"
    with pytest.raises(UsageError, match=reason):
        NanochatLM.create_from_arg_string(arguments, {"device": "cpu"})


@pytest.mark.slow
def test_the_script(base, lm, capsys):
    """Three kinds of task; the numbers in the file are those of the requests, and a second call adds to it."""
    run = lambda *flags: script.main(["-g", "stock", "--device-type=cpu", f"--include-path={base / 'tasks'}", *flags])
    assert run("--tasks=choices,goes_on") == 0
    assert run("--tasks=texts", "--limit=2") == 0
    assert "|choices|" in capsys.readouterr().out
    results = json.loads((base / "lm_eval" / "base_stock_000007.json").read_text())
    right = 0
    for i in range(6):
        answers = [by_hand(lm, f"The cat number {i} is", f" {choice}")[0] for choice in ("blue", "a green mat", "the end")]
        right += answers.index(max(answers)) == i % 3
    assert results["choices"]["acc,none"] == pytest.approx(right / 6) and "exact_match,none" in results["goes_on"]
    nats = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS[:2])))
    assert results["texts:2"]["bits_per_byte,none"] == pytest.approx(-sum(nats) / math.log(2) / sum(len(text.encode()) for text in TEXTS[:2]), abs=1e-4)
    assert results["texts:2"]["limit"] == 2 and results["choices"]["limit"] is None and "texts" not in results
    assert results["choices"]["num_fewshot"] == 0, "as many as there were"


@pytest.mark.parametrize("flags, reason", [
    (["--tasks=texts", "-g", "masked"], "looks both ways"), (["--tasks=no_data", "-g", "stock"], "cannot be loaded"),
    (["--tasks=texts", "-g", "nope"], "no model 'nope'"), (["--tasks=texts", "-g", "stock", "-s", "3"], "there is step 7"),
])
def test_bad_flags(base, capsys, flags, reason):
    assert script.main([*flags, "--device-type=cpu", f"--include-path={base / 'tasks'}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert reason in error and error.startswith("error: ")


def test_without_the_harness(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert script.main(["--tasks=texts", "-g", "stock"]) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


def test_other_results_are_kept(base, capsys):
    path = base / "lm_eval" / "base_masked_000007.json"
    for content in ("[1]", "{"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        assert script.main(["--tasks=texts", "-g", "masked", "--device-type=cpu", f"--include-path={base / 'tasks'}"]) == 2
        assert f"{path} is not a file of results" in capsys.readouterr().err and path.read_text() == content
    path.unlink()


def test_no_such_folder_of_tasks(base, capsys):
    assert script.main(["--tasks=texts", "-g", "stock", "--device-type=cpu", "--include-path=nowhere"]) == 2
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_no_such_task(base, capsys):
    assert script.main(["--tasks=not_a_task", "-g", "stock", "--device-type=cpu"]) == 2
    assert "no task 'not_a_task'" in capsys.readouterr().err
