"""Your own conversations, one a line: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]"""
import os

from nanochat.cli import UsageError
from tasks.common import Task, check_messages, read_jsonl


class CustomJSON(Task):
    def __init__(self, filepath: str | os.PathLike, **kwargs):
        """A line may also be an object with these as its `messages`. Raises UsageError for a file that holds anything else."""
        super().__init__(**kwargs)
        self.conversations = []
        for number, value in enumerate(read_jsonl(filepath), 1):
            messages = value.get("messages") if isinstance(value, dict) else value
            self.conversations.append(check_messages(messages, f"{filepath}, conversation {number}"))
        if not self.conversations:
            raise UsageError(f"{filepath} holds no conversation")

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> dict:
        return {"messages": self.conversations[index]}
