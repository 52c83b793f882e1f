"""CORE scoring: batching changes nothing, spans are never empty, bad bundles are named by file and line."""
import functools
import json
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import core_eval, eval_bundle
from nanochat.cli import UsageError
from nanochat.core_eval import evaluate_example, evaluate_task, prepare_example, score_task
from nanochat.eval_bundle import load_bundle
from nanochat.evals import scoring
from nanochat.evals.scoring import Example
from tests.golden.fixtures import HERE, build_model, tokenizer_512

CPU = torch.device("cpu")
META = {
    "multiple_choice": dict(task_type="multiple_choice", num_fewshot=2, continuation_delimiter="\nAnswer: "),
    "schema": dict(task_type="schema", num_fewshot=0, continuation_delimiter=" "),
    "language_modeling": dict(task_type="language_modeling", num_fewshot=1, continuation_delimiter=" "),
}


@functools.cache
def model():
    return build_model(dict(sequence_len=128, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL"), seed=5)


@functools.cache
def tokenizer():
    return tokenizer_512()


@functools.cache
def rows(task_type, count=30):
    draw = random.Random(task_type)

    def text(words):
        return " ".join(draw.choice(["ka", "ro", "miten", "lu", "shaporel", "42", "vi,"]) for _ in range(words))

    def row():
        gold, options = draw.randrange(3), [f"{text(draw.randrange(1, 6))} {i}" for i in range(3)]
        match task_type:
            case "multiple_choice":
                return dict(query=text(draw.randrange(1, 30)), choices=options, gold=gold)
            case "schema":
                return dict(context_options=options, continuation=text(draw.randrange(1, 9)), gold=gold)
            case "language_modeling":
                return dict(context=text(draw.randrange(1, 30)), continuation=text(1))
    return [row() for _ in range(count)]


# -----------------------------------------------------------------------------
# Scoring


@pytest.mark.parametrize("task_type", META)
@pytest.mark.parametrize("budget", [1, 200, 10**6])
def test_batching_changes_no_result(task_type, budget, monkeypatch):
    data, meta = rows(task_type), META[task_type]
    one_by_one = [evaluate_example(i, model(), tokenizer(), data, CPU, meta) for i in range(len(data))]
    monkeypatch.setitem(scoring.TOKENS_PER_FORWARD, "cpu", budget)
    monkeypatch.setattr(scoring, "EXAMPLES_SORTED", 7)
    fractions = []
    assert evaluate_task(model(), tokenizer(), data, CPU, meta, fractions.append) == sum(one_by_one) / len(data)
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_language_models_can_be_right():
    """Ask for what the model says anyway."""
    data = []
    for row in rows("language_modeling", 8):
        prompt = tokenizer()(f"{row['context']} ka".strip(), prepend=tokenizer().get_bos_token_id())
        said = int(model()(torch.tensor([prompt]))[0, -2].argmax())
        data.append(Example([prompt[:-1] + [said]], [len(prompt) - 1], [len(prompt)], None))
        data.append(Example([prompt[:-1] + [said + 1]], [len(prompt) - 1], [len(prompt)], None))
    assert core_eval.score_examples(model(), data, CPU) == [True, False] * 8


def test_forward_passes_stay_within_the_budget_and_lose_nothing():
    examples = [Example([[choice] * width for choice in range(choices)], [1] * choices, [width] * choices, 0) for width in (3, 50, 7, 9, 50, 200) for choices in (1, 4)]
    batches = list(scoring.batches_by_length(examples, 256))
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, examples))
    for batch in batches:
        padded = sum(len(example.sequences) for example in batch) * max(example.width for example in batch)
        assert padded <= 256 or len(batch) == 1
    assert len(batches) < len(examples)


def test_one_token_can_be_all_that_there_is_to_read():
    (nats,), = scoring.token_nats(model(), [scoring.Example([[1, 2]], [1], [2])], CPU)
    assert nats.shape == (1,) and nats.item() > 0


def test_choices_of_one_token_are_read_once():
    """A model reads up to the last scored token, so their inputs are one; a longer choice is read by itself."""
    example = Example([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6, 7]], [3, 3, 3], [4, 4, 5], 0)
    seen = []
    hook = model().transformer.wte.register_forward_hook(lambda module, args, output: seen.append(args[0].tolist()))
    logits, targets, lengths = scoring.scored_logits(model(), [example, example], CPU)
    hook.remove()
    assert seen == [[[1, 2, 3, 0], [1, 2, 3, 6]] * 2]
    assert targets.tolist() == [4, 5, 6, 7] * 2 and lengths == [1, 1, 2] * 2
    alone = torch.cat([model()(torch.tensor([sequence]))[0, 2:end - 1] for sequence, end in zip(example.sequences, example.ends)])
    torch.testing.assert_close(logits, alone.repeat(2, 1), rtol=0, atol=1e-5)


def test_logits_only_where_asked():
    ids = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([4, 19, 7])
    seen = []
    hook = model().lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    got = scoring.logits_at(model(), ids, rows, columns)
    want = model()(ids)[rows, columns]
    hook.remove()
    assert torch.allclose(got, want, atol=1e-5)
    assert seen == [3, 60]  # the second call shows that the model is back to normal


@given(st.integers(2, 40), st.integers(0, 39), st.integers(0, 39))
def test_few_shot_examples_are_those_of_the_reference(count, idx, shots):
    """The reference samples from the list of all other indices."""
    idx, shots = idx % count, shots % count
    data = [dict(context=f"ka{i}", continuation="ro") for i in range(count)]
    rendered = []
    fake = SimpleNamespace(get_bos_token_id=lambda: 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(core_eval._RENDER, "language_modeling", lambda item, delimiter, examples: rendered.extend(examples))
        patch.setitem(core_eval._BATCH, "language_modeling", lambda tokenizer, prompts: ([[0, 1]], [1], [2]))
        prepare_example(idx, fake, data, dict(META["language_modeling"], num_fewshot=shots))
    others = [i for i in range(count) if i != idx]
    assert rendered == [data[i] for i in random.Random(1234 + idx).sample(others, shots)]


words = st.lists(st.sampled_from(["ka", "ro", " ", "mi", "ten", "1", "2", "\n"]), min_size=1, max_size=4).map("".join)


@given(words, st.lists(words, min_size=1, max_size=4), st.sampled_from(["", " ", "\n"]))
def test_every_choice_and_every_context_has_something_to_score(text, options, delimiter):
    mc = core_eval.render_prompts_mc(dict(query=text, choices=options), delimiter)
    schema = core_eval.render_prompts_schema(dict(context_options=options, continuation=text), delimiter)
    for batch, prompts in (core_eval.batch_sequences_mc, mc), (core_eval.batch_sequences_schema, schema):
        tokens, starts, ends = batch(tokenizer(), prompts)
        for row, start, end in zip(tokens, starts, ends, strict=True):
            assert 1 <= start < end == len(row)
    assert len({end - start for start, end in zip(starts, ends, strict=True)}) == 1  # one continuation after several contexts


@given(st.integers(2, 60))
def test_long_prompts_are_cut_on_the_left(max_seq_len):
    data = rows("multiple_choice")
    full = prepare_example(3, tokenizer(), data, META["multiple_choice"])
    cut = prepare_example(3, tokenizer(), data, META["multiple_choice"], max_seq_len)
    for i, sequence in enumerate(cut.sequences):
        assert len(sequence) <= max_seq_len and sequence == full.sequences[i][-len(sequence):]
        scored = sequence[cut.starts[i]:cut.ends[i]]
        assert scored and scored == full.sequences[i][full.starts[i]:][-len(scored):]


def test_a_prompt_beyond_the_rotary_table_is_cut_too():
    short = build_model(dict(sequence_len=4, vocab_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"), seed=5)
    data, meta = rows("multiple_choice"), META["multiple_choice"]
    assert prepare_example(0, tokenizer(), data, meta).width > short.rotary_seq_len
    assert 0 <= evaluate_task(short, tokenizer(), data, CPU, meta) <= 1


def test_what_a_reader_should_know_is_counted():
    short = build_model(dict(sequence_len=8, vocab_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"), seed=5)
    data = [dict(query="ka", choices=["ro", "ro mi"], gold=0), dict(query="ka", choices=["ro", "mi"], gold=0), dict(query="ka " * 200, choices=["ro", "mi"], gold=0)]
    scores, counts = score_task(short, tokenizer(), data, CPU, dict(META["multiple_choice"], num_fewshot=0))
    assert len(scores) == 3 and not scores.isnan().any()
    assert counts["with a choice that is the beginning of all others"] == 1 and counts["cut to what the model takes"] == 1
    assert counts["longer than the training context"] >= 1

    merged = [dict(context="1", continuation="2"), *rows("language_modeling", 3)]
    scores, _ = score_task(short, tokenizer(), merged, CPU, dict(META["language_modeling"], num_fewshot=0, continuation_delimiter=""))
    assert scores[0].isnan() and not scores[1:].isnan().all()


def test_unknown_task_type():
    with pytest.raises(ValueError, match="riddle"):
        evaluate_example(0, model(), tokenizer(), rows("schema"), CPU, dict(META["schema"], task_type="riddle"))


def test_a_continuation_that_merges_with_its_context_is_a_usage_error():
    data = [dict(context="1", continuation="2"), dict(context="1", continuation="2")]
    with pytest.raises(UsageError, match="shares a token"):
        evaluate_example(0, model(), tokenizer(), data, CPU, dict(META["language_modeling"], continuation_delimiter=""))


# -----------------------------------------------------------------------------
# Bundle


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(HERE / "core_bundle", tmp_path / "eval_bundle")


def test_rows_are_shuffled_alike_before_they_are_cut(bundle):
    whole, missing = load_bundle(bundle)
    few, _ = load_bundle(bundle, max_per_task=6)
    assert not missing and [task.label for task in whole] == ["toy_choices", "toy_choices_zero", "toy_schema", "toy_cloze"]
    assert [task.data[:6] for task in whole] == [task.data for task in few]
    assert whole[0].data == whole[1].data != [json.loads(line) for line in (bundle / "eval_data/a/choices.jsonl").read_text().splitlines()]
    assert whole[0].baseline == 33.3 and whole[0].meta == dict(task_type="multiple_choice", num_fewshot=2, continuation_delimiter="\nAnswer: ")


def test_work_grows_with_shots():
    data = rows("multiple_choice")
    one, three = (core_eval._work(core_eval.CoreTask("", dict(META["multiple_choice"], num_fewshot=shots), 0, data)) for shots in (0, 2))
    assert three == 3 * one > 0


def test_tasks_without_data_are_left_out(bundle):
    (bundle / "eval_data/b/cloze.jsonl").unlink()
    tasks, missing = load_bundle(bundle)
    assert missing == ["toy_cloze"] and len(tasks) == 3
    shutil.rmtree(bundle / "eval_data")
    with pytest.raises(UsageError, match="no data for any task"):
        load_bundle(bundle)


@pytest.mark.parametrize("file, line, message", [
    ("a/choices.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "'gold' is 2"),
    ("a/choices.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": true}', "'gold' is True"),
    ("a/choices.jsonl", '{"query": "a", "choices": ["b", "c"]}', "'gold' is None"),
    ("a/choices.jsonl", '{"query": "a", "choices": ["b", ""], "gold": 0}', "'choices' is not a list of texts"),
    ("a/choices.jsonl", '{"choices": ["b", "c"], "gold": 0}', "'query' is missing"),
    ("b/schema.jsonl", '{"context_options": [], "continuation": "a", "gold": 0}', "'context_options' is not"),
    ("b/cloze.jsonl", '{"context": "a", "continuation": ""}', "'continuation' is empty"),
    ("b/cloze.jsonl", '{"context": 3, "continuation": "a"}', "'context' is missing or is not text"),
    ("b/cloze.jsonl", '{"context": "a", ', "not JSON"),
    ("b/cloze.jsonl", '["a"]', "not a JSON object"),
])
def test_bad_rows_are_left_out_and_named_by_file_and_line(bundle, file, line, message, capsys):
    path = bundle / "eval_data" / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "", line, *lines[4:]]))
    tasks, _ = load_bundle(bundle)
    assert [len(task.data) for task in tasks] == [20] * 4
    for task in tasks:
        assert [bool(re.search(f"{file}, line 6.*{re.escape(message)}", bad)) for bad in task.bad] == [True] * len(task.bad)
    assert sum(bool(task.bad) for task in tasks) == (2 if file == "a/choices.jsonl" else 1)
    eval_bundle.tell_left_out(tasks)
    assert capsys.readouterr().out.count("left out: ") == 1


def test_a_file_without_a_row_that_can_be_used(bundle):
    (bundle / "eval_data" / "b" / "cloze.jsonl").write_text('["a"]\n{"context": "a"}\n')
    with pytest.raises(UsageError, match="cloze.jsonl, line 1: not a JSON object; no row of that file can be used"):
        load_bundle(bundle)


def test_tasks_by_label(bundle):
    assert [task.label for task in load_bundle(bundle, labels=["toy_cloze", "toy_choices"])[0]] == ["toy_choices", "toy_cloze"]
    with pytest.raises(UsageError, match="no task toy_riddle in .*; there is toy_choices, "):
        load_bundle(bundle, labels=["toy_riddle"])


@pytest.mark.parametrize("file, old, new, message", [
    ("core.yaml", "icl_tasks:", "tasks:", "icl_tasks"),
    ("core.yaml", "icl_tasks:", "{", "core.yaml is not a list of CORE tasks"),
    ("core.yaml", "label: toy_schema", "name: toy_schema", "needs label"),
    ("core.yaml", "icl_task_type: schema", "icl_task_type: riddle", "'riddle'"),
    ("core.yaml", "label: toy_schema", "label: 7", "must be texts"),
    ("core.yaml", "icl_task_type: schema", "icl_task_type: [schema]", "must be texts"),
    ("core.yaml", "- 2\n", "- two\n", "num_fewshot 'two'"),
    ("core.yaml", "- 2\n", "- 20\n", "has only 20 rows"),
    ("eval_meta_data.csv", "toy_schema", "toy_scheme", "no row for the task toy_schema"),
    ("eval_meta_data.csv", "33.3", "many", "Random baseline"),
    ("eval_meta_data.csv", "33.3", "100", "100.0"),
    ("eval_meta_data.csv", "Random baseline", "Baseline", "Random baseline"),
])
def test_bad_task_lists(bundle, file, old, new, message):
    path = bundle / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        load_bundle(bundle)


def test_missing_files_of_the_bundle(bundle):
    (bundle / "core.yaml").unlink()
    with pytest.raises(UsageError, match="core.yaml"):
        load_bundle(bundle)
