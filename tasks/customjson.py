"""Your own conversations, one a line: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]

What others publish is read too, as lines (.jsonl, .jsonl.gz, .jsonl.zst) or as one list (.json):

* an object with these as its `messages`
* ShareGPT's layout: an object with `conversations` of {"from": "human" or "gpt", "value": "..."}. Answers before the first question and a
  last question without an answer, of which such files have many, are left out
* Alpaca's layout: {"instruction": "...", "input": "...", "output": "..."}, a question and its answer
"""
import os
from typing import Any

from nanochat.cli import UsageError
from nanochat.common import print0
from nanochat.files import open_text, parse_json
from tasks.common import JSON_LINES, Task, check_messages, read_jsonl

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # that ShareGPT's and its relatives' turns are from


class CustomJSON(Task):
    suffixes = (*JSON_LINES, ".json")

    def __init__(self, filepath: str | os.PathLike, **kwargs):
        """Raises UsageError for a file that holds anything but conversations."""
        super().__init__(**kwargs)
        self.conversations, layouts, empty = [], set(), 0
        for number, value in enumerate(_values(filepath), 1):
            layout, messages = _messages(value)
            layouts.add(layout)
            if layout and not messages:
                empty += 1
            else:
                self.conversations.append(check_messages(messages, f"{filepath}, conversation {number}"))
        if not self.conversations:
            raise UsageError(f"{filepath} holds no conversation")
        if others := sorted(layouts - {""}):
            print0(f"{filepath}: {len(self.conversations):,} conversations, in the layout of {' and '.join(others)}"
                   + (f"; {empty:,} without question and answer are left out" if empty else ""))

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> dict:
        return {"messages": self.conversations[index]}


def _values(path: str | os.PathLike):
    if not os.fspath(path).lower().endswith(".json"):
        return read_jsonl(path)
    try:
        with open_text(path) as f:
            values = parse_json(f.read())
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}") from error
    except ValueError as error:  # also of bytes that are not UTF-8
        raise UsageError(f"{path} is not JSON ({error}); lines of JSON belong into a file .jsonl") from error
    if not isinstance(values, list):
        raise UsageError(f"{path} is not a list of conversations")
    return values


def _messages(value: Any) -> tuple[str, Any]:
    """(layout that is not our own, messages with role and content as far as there are any)."""
    if not isinstance(value, dict):
        return "", value
    if "instruction" in value and "output" in value:
        question = f"{value['instruction']}\n\n{value['input']}" if value.get("input") else value["instruction"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": value["output"]}]
        return "Alpaca", ([{"role": "system", "content": value["system"]}] if value.get("system") else []) + messages
    said = value.get("messages", value.get("conversations"))
    if not isinstance(said, list) or not all(isinstance(turn, dict) and isinstance(turn.get("from"), str) for turn in said):
        return "", said
    turns = [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in said]
    system, turns = (turns[:1], turns[1:]) if turns and turns[0]["role"] == "system" else ([], turns)
    while turns and turns[0]["role"] == "assistant":
        turns.pop(0)
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    return "ShareGPT", system + turns if turns else []
