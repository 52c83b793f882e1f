"""AI2 Reasoning Challenge (Clark et al., 1803.05457): science questions of US schools, three to five choices each."""
import pyarrow as pa

from nanochat.cli import UsageError
from tasks.common import TEXT, TEXTS, Task, load_hub_dataset, render_mc

CHOICES = pa.struct([("label", TEXTS), ("text", TEXTS)])


class ARC(Task):
    eval_type = "categorical"

    def __init__(self, subset: str, split: str, **kwargs):
        super().__init__(**kwargs)
        assert subset in ("ARC-Easy", "ARC-Challenge"), f"there is no ARC subset {subset!r}"
        assert split in ("train", "validation", "test"), f"there is no ARC split {split!r}"
        self.ds = load_hub_dataset("allenai/ai2_arc", subset, split, {"question": TEXT, "choices": CHOICES, "answerKey": TEXT}).shuffle(seed=42)

    def num_examples(self) -> int:
        return len(self.ds)

    def get_example(self, index: int) -> dict:
        row = self.ds[index]
        letters, answer = row["choices"]["label"], row["answerKey"]
        if answer not in letters:
            raise UsageError(f"ARC example {index} has the answer {answer!r}, but the choices {letters}; its data are damaged")
        messages = [
            {"role": "user", "content": render_mc(row["question"], letters, row["choices"]["text"])},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "letters": letters}

    def evaluate(self, problem: dict, completion: str) -> bool:
        assert completion in problem["letters"], f"{completion!r} is none of {problem['letters']}"
        return completion == problem["messages"][-1]["content"]
