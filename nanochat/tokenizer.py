"""BPE tokenizer in the style of GPT-4: rustbpe trains it, tiktoken runs it.

* Digits are split in groups of at most two (GPT-4: three), which wastes fewer tokens of a small vocabulary.
* Nine special tokens follow the merges. Text never produces them: only `encode_special`, `prepend`, `append` and
  the rendering of conversations do.
* `tokenizer.pkl` is a pickle of a `tiktoken.Encoding`, as nanochat writes it; loading admits that one class only.
"""
import hashlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import rustbpe
import tiktoken
import torch

from nanochat.cli import UsageError
from nanochat.common import get_base_dir
from nanochat.files import atomic_path

SPECIAL_TOKENS = [
    "<|bos|>",  # begins every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the assistant calls the calculator
    "<|output_start|>", "<|output_end|>",  # and reads what it answers
]

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


MOST_BLANKS = 100_000  # in one piece of text: at about a million in a row the splitting regular expression gives up, and panics
FEW_CHARS = 100_000  # of a list take 15 ms; with threads that must first begin it is twice that on 2 CPUs


def pieces(text: str) -> list[str]:
    """`text`, cut only where there are more blanks in a row than the tokenizer can take."""
    return re.split(rf"(\s{{{MOST_BLANKS}}})", text) if len(text) > MOST_BLANKS else [text]


def replace_surrogates(text: str) -> str:
    """`text` with lone surrogates, which have no UTF-8 form, replaced by U+FFFD; paired ones become their character."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _EncodingUnpickler(pickle.Unpickler):
    """A pickle can run any code on loading. This one can build a `tiktoken.Encoding` and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return tiktoken.Encoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def encoding(ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    """Of tokens and special tokens with their ids. Raises ValueError for what tiktoken panics at, which is no Exception."""
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise ValueError("two tokens have one id")
    check_bytes(ranks)
    return tiktoken.Encoding("rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def check_bytes(ranks: dict[bytes, int]) -> None:
    """Raises ValueError where a byte is no token, so that not every text can be encoded."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"the byte {missing[0]} is no token")


class RustBPETokenizer:
    """A `tiktoken.Encoding` with a begin-of-sequence token and nanochat's chat format."""

    def __init__(self, enc: tiktoken.Encoding, bos_token: str):
        self.enc = enc
        self._special_ids = {name: enc.encode_single_token(name) for name in enc.special_tokens_set}
        self.bos_token_id = self._special_ids[bos_token]

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> "RustBPETokenizer":
        """Trains on all of `text_iterator`. `vocab_size` counts the special tokens; too little text gives fewer."""
        num_merged = vocab_size - len(SPECIAL_TOKENS)
        assert num_merged >= 256, f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}: 256 bytes and the special tokens"
        trainer = rustbpe.Tokenizer()
        try:
            trainer.train_from_iterator((replace_surrogates(piece) for text in text_iterator for piece in pieces(text)), num_merged, pattern=SPLIT_PATTERN)
        except SystemError as error:  # how a Ctrl-C during its own work comes out of rustbpe
            raise error.__cause__ or error from None
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        return cls(encoding(ranks, special), SPECIAL_TOKENS[0])

    @classmethod
    def from_directory(cls, tokenizer_dir: str | os.PathLike) -> "RustBPETokenizer":
        """Loads `tokenizer.pkl`. Raises UsageError where it is missing, damaged or holds anything but a tokenizer."""
        path = os.path.join(tokenizer_dir, "tokenizer.pkl")
        try:
            with open(path, "rb") as f:
                enc = _EncodingUnpickler(f).load()
            if not isinstance(enc, tiktoken.Encoding):
                raise pickle.UnpicklingError(f"it holds a {type(enc).__name__}")
            check_bytes(enc._mergeable_ranks)
            return cls(enc, SPECIAL_TOKENS[0])
        except FileNotFoundError as error:
            raise UsageError(f"there is no tokenizer at {path}; train one with: python -m scripts.tok_train") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a damaged pickle can raise nearly anything, and tiktoken's panics are no Exceptions
            raise UsageError(f"{path} is not a tokenizer that can be loaded ({type(error).__name__}: {error}); "
                             "train a new one with: python -m scripts.tok_train") from error

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> "RustBPETokenizer":
        """One of tiktoken's own vocabularies, such as gpt2 or cl100k_base; tiktoken downloads it once."""
        return cls(tiktoken.get_encoding(tiktoken_name), "<|endoftext|>")

    def save(self, tokenizer_dir: str | os.PathLike) -> None:
        path = os.path.join(tokenizer_dir, "tokenizer.pkl")
        with atomic_path(path) as temporary, open(temporary, "wb") as f:
            pickle.dump(self.enc, f)
        print(f"Saved the tokenizer to {path}")

    # -------------------------------------------------------------------------
    # Vocabulary

    def get_vocab_size(self) -> int:
        return self.enc.n_vocab

    def get_special_tokens(self) -> set[str]:
        return self.enc.special_tokens_set

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    def encode_special(self, text: str) -> int:
        """Id of a special token given by its name; KeyError for any other text."""
        return self._special_ids[text]

    def checksum(self) -> str:
        """Equal for tokenizers whose ids mean the same."""
        tokens = [self.decode_single_token_bytes(id) for id in range(self.get_vocab_size())]
        return hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]

    def id_to_token(self, id: int) -> str:
        return self.enc.decode([id])

    def decode_single_token_bytes(self, token_id: int) -> bytes:
        return self.enc.decode_single_token_bytes(token_id)

    def token_bytes(self) -> torch.Tensor:
        """int32 (V,): bytes of each token, 0 for specials."""
        special = set(self._special_ids.values())
        return torch.tensor([0 if id in special else len(self.decode_single_token_bytes(id)) for id in range(self.get_vocab_size())], dtype=torch.int32)

    # -------------------------------------------------------------------------
    # Text

    def _ids(self, text: str) -> list[int]:
        return [token for piece in pieces(text) for token in self.enc.encode_ordinary(piece)] if len(text) > MOST_BLANKS else self.enc.encode_ordinary(text)

    @overload
    def encode(self, text: str, prepend: int | str | None = ..., append: int | str | None = ..., num_threads: int = ...) -> list[int]: ...

    @overload
    def encode(self, text: list[str], prepend: int | str | None = ..., append: int | str | None = ...,
               num_threads: int = ...) -> list[list[int]]: ...

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """Ids of a text, or of each text of a list (in parallel where there is much). `prepend` and `append`: an id or a special token's name.

        Raises ValueError for what is neither, KeyError for a name that is no special token's.
        """
        if isinstance(text, str):
            rows = [self._ids(text)]
        elif isinstance(text, list) and sum(map(len, text)) < FEW_CHARS:
            rows = [self._ids(one) for one in text]
        elif isinstance(text, list):
            with ThreadPoolExecutor(num_threads) as pool:
                rows = list(pool.map(self._ids, text))
        else:
            raise ValueError(f"cannot encode a {type(text).__name__}: give a str or a list of str")
        if prepend is not None:
            first = self.encode_special(prepend) if isinstance(prepend, str) else prepend
            for row in rows:
                row.insert(0, first)
        if append is not None:
            last = self.encode_special(append) if isinstance(append, str) else append
            for row in rows:
                row.append(last)
        return rows[0] if isinstance(text, str) else rows

    __call__ = encode

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become replacement characters."""
        return self.enc.decode(ids)

    # -------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Ids of a conversation and a mask of the same length: 1 where the assistant is to learn the token.

        `conversation["messages"]` alternates user and assistant, after an optional system message that is put in
        front of the first user text. Assistant content is a str or a list of {"type", "text"} parts: `text`,
        `python` (a tool call) and `python_output` (its answer, not learnt). Both lists are cut to `max_tokens`.
        Raises AssertionError for roles out of turn or a user's content that is no str, ValueError for other content of the assistant's, KeyError for a field that
        is missing.
        """
        ids: list[int] = []
        mask: list[int] = []

        def add(tokens: Iterable[int], learn: int) -> None:
            before = len(ids)
            ids.extend(tokens)
            mask.extend([learn] * (len(ids) - before))

        def add_text(text: str, learn: int) -> None:
            add(self._ids(text), learn)

        def add_special(name: str, learn: int) -> None:
            add([self.encode_special(name)], learn)

        add_special("<|bos|>", 0)
        for role, content in _turns(conversation["messages"]):
            if role == "user":
                assert isinstance(content, str), "the content of a user message must be a str"
                add_special("<|user_start|>", 0)
                add_text(content, 0)
                add_special("<|user_end|>", 0)
                continue
            add_special("<|assistant_start|>", 0)
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            elif not isinstance(content, list):
                raise ValueError(f"an assistant message must hold a str or a list of parts, not a {type(content).__name__}")
            for part in content:
                if part["type"] == "text":
                    add_text(part["text"], 1)
                elif part["type"] == "python":
                    add_special("<|python_start|>", 1)
                    add_text(part["text"], 1)
                    add_special("<|python_end|>", 1)
                elif part["type"] == "python_output":
                    add_special("<|output_start|>", 0)
                    add_text(part["text"], 0)
                    add_special("<|output_end|>", 0)
                else:
                    raise ValueError(f"unknown part type {part['type']!r}: use text, python or python_output")
            add_special("<|assistant_end|>", 1)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids that prime the model to write the last message, which must be the assistant's and is left out. Raises what `render_conversation` does."""
        messages = conversation["messages"]
        assert messages[-1]["role"] == "assistant", "the last message must be the assistant's"
        ids, _ = self.render_conversation({"messages": messages[:-1]})
        return ids + [self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(self, ids: list[int], mask: list[int], with_token_id: bool = False) -> str:
        """The tokens separated by bars: green where learnt, red where not, ids in gray."""
        red, green, gray, off = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
        items = []
        for token_id, learn in zip(ids, mask, strict=True):
            items.append(f"{green if learn else red}{self.decode([token_id])}{off}")
            if with_token_id:
                items.append(f"{gray}({token_id}){off}")
        return "|".join(items)


def _turns(messages: list[dict]) -> Iterator[tuple[str, object]]:
    """(role, content) in turn, with a leading system message merged into the user message after it."""
    first, rest = messages[0], messages[1:]
    if first["role"] == "system":
        assert rest[0]["role"] == "user", "a system message must be followed by a user message"
        first, rest = {"role": "user", "content": first["content"] + "\n\n" + rest[0]["content"]}, rest[1:]
    for i, message in enumerate([first, *rest]):
        expected = ("user", "assistant")[i % 2]
        assert message["role"] == expected, f"message {i} is from {message['role']!r} where {expected!r} must speak"
        yield message["role"], message["content"]


def special_ids(tokenizer) -> set[int]:
    """Of the tokens that stand for no text."""
    return {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer that `scripts.tok_train` left in the base directory. Raises UsageError if there is none."""
    return RustBPETokenizer.from_directory(os.path.join(get_base_dir(), "tokenizer"))


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """int32 (V,): bytes of each token, 0 for specials. Turns nats per token into bits per byte."""
    path = os.path.join(get_base_dir(), "tokenizer", "token_bytes.pt")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"there is no {path}; train the tokenizer with: python -m scripts.tok_train") from error
    except Exception as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}); "
                         "train the tokenizer again with: python -m scripts.tok_train") from error
