"""Every task by name: what it is evaluated and trained on, and what guessing would reach. A new task is a file beside this one and a line here."""
import os
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.cli import UsageError
from nanochat.tokenizer import get_tokenizer
from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee


@dataclass(frozen=True)
class Entry:
    """What a task is for. Tasks are built when they are asked for, since most have to be fetched."""

    test: Callable[[], Task]  # for chat_eval
    guessing: float | None = None  # accuracy of guessing, of the tasks of ChatCORE
    problems: Callable[[], tuple[Task, Task]] | None = None  # training and test problems for RL, which asks the task for a `reward`


TASKS = {
    "ARC-Easy": Entry(lambda: ARC("ARC-Easy", "test"), guessing=0.25),
    "ARC-Challenge": Entry(lambda: ARC("ARC-Challenge", "test"), guessing=0.25),
    "MMLU": Entry(lambda: MMLU("all", "test"), guessing=0.25),
    "GSM8K": Entry(lambda: GSM8K("main", "test"), guessing=0.0, problems=lambda: (GSM8K("main", "train"), GSM8K("main", "test"))),
    "HumanEval": Entry(HumanEval, guessing=0.0),
    "SpellingBee": Entry(lambda: SpellingBee(256, "test"), problems=lambda: (SpellingBee(80_000), SpellingBee(400, "test"))),
    "SpellingBee-Long": Entry(lambda: SpellingBee(256, "long")),
    "SimpleSpelling": Entry(lambda: SimpleSpelling(256, "test")),
}
CHATCORE = {name: entry.guessing for name, entry in TASKS.items() if entry.guessing is not None}


def chatcore(accuracies: dict[str, float]) -> float:
    """Mean over the tasks of (accuracy - b) / (1 - b), with b the accuracy of guessing."""
    return sum((accuracy - CHATCORE[name]) / (1 - CHATCORE[name]) for name, accuracy in accuracies.items()) / len(accuracies)


# -----------------------------------------------------------------------------
# Fine-tuning


def parts(text: str) -> str:
    """A list as people write it, with blanks after its commas."""
    return ",".join(part.strip() for part in text.split(",") if part.strip())


def first(task: Task, count: int) -> Task:
    """The same task, cut to its first `count` examples if it has more."""
    task.stop = min(count, task.num_examples())
    return task


def spelling() -> tuple[list[Task], list[Task]]:
    tokenizer = get_tokenizer()
    return ([SimpleSpelling(200_000, tokenizer=tokenizer), SpellingBee(80_000, tokenizer=tokenizer)], [SimpleSpelling(1000, "test"), SpellingBee(1000, "test")])


# By name (training, validation) conversations; the arguments are passes over MMLU and GSM8K in one over the mixture
PARTS: dict[str, Callable[[int, int], tuple[list[Task], list[Task]]]] = {
    "smoltalk": lambda mmlu, gsm8k: ([SmolTalk("train")], [SmolTalk("test")]),
    "mmlu": lambda mmlu, gsm8k: ([MMLU("all", "auxiliary_train")] * mmlu, [first(MMLU("all", "test"), 5200)]),
    "gsm8k": lambda mmlu, gsm8k: ([GSM8K("main", "train")] * gsm8k, [first(GSM8K("main", "test"), 420)]),
    "spelling": lambda mmlu, gsm8k: spelling(),
}


def build_mixture(mixture: str, mmlu_epochs: int, gsm8k_epochs: int) -> tuple[TaskMixture, TaskMixture]:
    """(training, validation) conversations. A file of conversations has no validation part. Raises UsageError for data that cannot be had."""
    train: list[Task] = []
    val: list[Task] = []
    for name in mixture.split(","):
        if name in PARTS:
            more = PARTS[name](mmlu_epochs, gsm8k_epochs)
            train, val = train + more[0], val + more[1]
        elif name.lower().endswith(CustomJSON.suffixes):
            train.append(CustomJSON(os.path.expanduser(name)))
        else:
            raise UsageError(f"--mixture: unknown part {name!r}; use {', '.join(PARTS)} or a .jsonl file, joined by commas")
    return TaskMixture(train), TaskMixture(val)
