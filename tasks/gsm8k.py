"""Grade School Math 8K (Cobbe et al., 2110.14168): word problems whose solutions call a calculator as <<12/60=0.2>>."""
import re

from tasks.common import TEXT, Task, load_hub_dataset

GSM_RE = re.compile(r"#### (\-?[0-9\.\,]+)")
CALL_RE = re.compile(r"(<<[^>]+>>)")


def extract_answer(completion: str) -> str | None:
    """The number behind ####, without thousands separators."""
    match = GSM_RE.search(completion)
    return match[1].strip().replace(",", "") if match else None


def same_answer(problem: dict, completion: str) -> int:
    """1 if the completion ends in the number that the reference solution ends in, else 0."""
    assert isinstance(completion, str), f"a completion is text, not a {type(completion).__name__}"
    return int(extract_answer(completion) == extract_answer(problem["messages"][-1]["content"][-1]["text"]))


class GSM8K(Task):
    eval_type = "generative"

    def __init__(self, subset: str, split: str, **kwargs):
        super().__init__(**kwargs)
        assert subset in ("main", "socratic"), f"there is no GSM8K subset {subset!r}"
        assert split in ("train", "test"), f"there is no GSM8K split {split!r}"
        self.ds = load_hub_dataset("openai/gsm8k", subset, split, {"question": TEXT, "answer": TEXT}).shuffle(seed=42)

    def num_examples(self) -> int:
        return len(self.ds)

    def get_example(self, index: int) -> dict:
        row = self.ds[index]
        parts = []
        for piece in CALL_RE.split(row["answer"]):
            if CALL_RE.fullmatch(piece):
                call, equals, result = piece[2:-2].rpartition("=")
                parts.append({"type": "python", "text": call if equals else result})
                parts.append({"type": "python_output", "text": result if equals else ""})
            else:
                parts.append({"type": "text", "text": piece})
        return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}]}

    def evaluate(self, problem: dict, completion: str) -> int:
        return same_answer(problem, completion)
