"""SmolTalk (Allal et al., 2502.02737), its smaller version: general conversations, 460 thousand to train on and 24 thousand to test."""
from tasks.common import Task, check_messages, load_hub_dataset


class SmolTalk(Task):
    def __init__(self, split: str, **kwargs):
        super().__init__(**kwargs)
        assert split in ("train", "test"), f"there is no SmolTalk split {split!r}"
        self.ds = load_hub_dataset("HuggingFaceTB/smol-smoltalk", "default", split, {"messages": None}).shuffle(seed=42)

    def num_examples(self) -> int:
        return len(self.ds)

    def get_example(self, index: int) -> dict:
        return {"messages": check_messages(self.ds[index]["messages"], f"SmolTalk example {index}")}
