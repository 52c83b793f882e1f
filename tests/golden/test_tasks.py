"""Examples, slices, mixtures and judgements of nanochat's tasks on toy data."""
import hashlib

import pyarrow as pa
import pytest

from tasks.arc import ARC
from tasks.common import HubDataset, Task, TaskMixture, TaskSequence, render_mc
from tasks.gsm8k import GSM8K, extract_answer
from tasks.humaneval import HumanEval, extract_imports, extract_program
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tests.golden import task_data
from tests.golden.fixtures import load

GOLDEN = load("tasks")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    task_data.place(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        yield {"gsm8k": GSM8K("main", "train"), "mmlu": MMLU("all", "test"), "arc": ARC("ARC-Easy", "test"), "smoltalk": SmolTalk("train"),
               "humaneval": HumanEval()}


def digest(text: str) -> dict:
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}


@pytest.mark.parametrize("name", GOLDEN["examples"])
def test_examples(tasks, name):
    for index, expected in enumerate(GOLDEN["examples"][name]):
        example = tasks[name][index]
        if name in ("mmlu", "arc"):
            example["messages"][0]["content"] = digest(example["messages"][0]["content"])
        assert example == expected
    assert len(tasks[name]) == len(GOLDEN["rows"][name])


def test_eval_types(tasks):
    for name, expected in GOLDEN["eval_types"].items():
        if isinstance(expected, str):
            assert tasks[name].eval_type == expected
        else:
            with pytest.raises(NotImplementedError):
                _ = tasks[name].eval_type


@pytest.mark.parametrize("case", GOLDEN["slices"], ids=lambda case: str(case["arguments"]))
def test_slices(tasks, case):
    task = MMLU("all", "test", **case["arguments"])
    assert len(task) == case["length"]
    rows = GOLDEN["rows"]["mmlu"]
    shown = [rows[number] for number in case["row_numbers"]]
    assert [task[i]["subject"] for i in range(len(shown))] == [row["subject"] for row in shown]
    assert all(row["question"] in task[i]["messages"][0]["content"] for i, row in enumerate(shown))


@pytest.mark.parametrize("case", GOLDEN["refused"])
def test_refused(tasks, case):
    call = {
        "negative_start": lambda: MMLU("all", "test", start=-1), "stop_before_start": lambda: MMLU("all", "test", start=3, stop=2),
        "step_zero": lambda: MMLU("all", "test", step=0), "bad_subset": lambda: GSM8K("other", "train"), "bad_split": lambda: GSM8K("main", "validation"),
        "arc_subset": lambda: ARC("ARC-Hard", "test"), "index_type": lambda: tasks["mmlu"]["0"],
        "mmlu_bad_letter": lambda: tasks["mmlu"].evaluate(tasks["mmlu"][0], "E"), "gsm8k_not_text": lambda: tasks["gsm8k"].evaluate(tasks["gsm8k"][0], 5),
    }[case]
    assert GOLDEN["refused"][case] == "AssertionError"
    with pytest.raises(AssertionError):
        call()


class Toy(Task):
    def __init__(self, size, tag):
        super().__init__()
        self.size, self.tag = size, tag

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return [self.tag, index]


@pytest.mark.parametrize("case", GOLDEN["mixtures"], ids=lambda case: str(case["lengths"]))
def test_mixtures_and_sequences(case):
    toys = [Toy(length, tag) for tag, length in enumerate(case["lengths"])]
    assert list(TaskMixture(toys)) == case["mixture"]
    assert list(TaskSequence(toys)) == case["sequence"]
    assert list(TaskMixture(toys, start=1, stop=4)) == case["sliced"]


def test_shuffles_of_hub_data():
    for size, by_seed in GOLDEN["hub_shuffle"].items():
        rows = HubDataset(pa.table({"row": list(range(int(size)))}))
        for seed, order in by_seed.items():
            shuffled = rows.shuffle(seed=int(seed))
            assert [shuffled[i]["row"] for i in range(len(shuffled))] == order
            again = shuffled.shuffle(seed=int(seed))
            assert [again[i]["row"] for i in range(len(again))] == order, "a shuffle is one of the raw table"


def test_answers_and_programs(tasks):
    assert [[text, extract_answer(text)] for text, _ in GOLDEN["gsm_answers"]] == GOLDEN["gsm_answers"]
    assert [[text, extract_program(text)] for text, _ in GOLDEN["extract_program"]] == GOLDEN["extract_program"]
    assert [[text, extract_imports(text)] for text, _ in GOLDEN["extract_imports"]] == GOLDEN["extract_imports"]


def test_judgements(tasks):
    gsm8k, mmlu = tasks["gsm8k"], tasks["mmlu"]
    for index, text, correct, reward in GOLDEN["gsm_evaluations"]:
        assert (gsm8k.evaluate(gsm8k[index], text), gsm8k.reward(gsm8k[index], text)) == (correct, reward), text
    for index, letter, correct in GOLDEN["categorical_evaluations"]:
        assert mmlu.evaluate(mmlu[index], letter) is correct


@pytest.mark.parametrize("case", GOLDEN["humaneval_evaluations"], ids=lambda case: f"{case[0]}-{case[1]}")
def test_programs_are_run(tasks, case):
    index, _, completion, correct = case
    assert tasks["humaneval"].evaluate(tasks["humaneval"][index], completion) is correct


@pytest.mark.parametrize("case", GOLDEN["render_mc"], ids=lambda case: repr(case["question"]))
def test_multiple_choice_text(case):
    assert digest(render_mc(case["question"], case["letters"], case["choices"])) == {key: case[key] for key in ("sha256", "characters")}
