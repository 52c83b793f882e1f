"""Spelling words and counting their letters: what tokens hide from a model, and small enough to be learned on a CPU.

* `SimpleSpelling` spells a word, `SpellingBee` counts a letter in it, by hand and then with the calculator.
* The words are those of `words_alpha.txt` in the base directory (`python -m tasks.spellingbee` fetches that English list), else
  words that the pretraining data use: no network needed.
* Split `test`: a tenth of the words, chosen by their checksum, that are never trained on. Split `long`: nor are those of more than
  10 letters, which ask whether the model counts further than it has learned to.
* To spell a new word, a model must know the letters of its tokens, of which many are in hardly a word of `train`. With a tokenizer
  the training examples use as many made-up words again, joined from the letters of tokens.
* In a fifth of the training examples the count by hand breaks off before the word ends. So the model learns to go on from there, and to
  believe the calculator: by hand it counts no further than the longest word that it was trained on.
"""
import functools
import itertools
import random
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from nanochat.cli import ArgumentParser, UsageError, command
from nanochat.common import download_file_with_lock, get_base_dir
from nanochat.dataset import parquets_iter_batched
from tasks.common import Task
from tasks.gsm8k import same_answer

WORD_LIST_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST, LONGEST_OF_ALL = 3, 10, 15  # letters; beyond the second only in the split long
TEXT_TO_READ = 20_000_000  # characters of the pretraining data
TEST_RANDOM_SEED_OFFSET = 10_000_000

QUESTIONS = [
    # English
    "How many {letter} are in {word}", "How many {letter} are there in {word}", "How many {letter} does {word} have", "How many {letter} can you find in {word}",
    "How many times does {letter} occur in {word}", "How many times does {letter} appear in {word}", "How many times is {letter} used in {word}",
    "How often does {letter} occur in {word}", "How often does {letter} appear in {word}", "How often do you see {letter} in {word}",
    "How often is {letter} written in {word}", "How many letters of {word} are {letter}", "How many of the letters in {word} are {letter}",
    "Count {letter} in {word}", "Count the letter {letter} in {word}", "Count every {letter} in {word}", "Please count {letter} in {word}",
    "Please count the {letter} in the word {word}", "Can you count {letter} in {word}", "Can you tell me how many {letter} are in {word}",
    "Could you count how often {letter} occurs in {word}", "Tell me how many {letter} {word} has", "Tell me the number of {letter} in {word}",
    "What is the number of {letter} in {word}", "What is the count of {letter} in {word}", "Number of {letter} in {word}",
    "In {word}, how many {letter} are there", "In the word {word}, how often does {letter} occur", "The word {word} has how many {letter}",
    "I want to know how many {letter} are in {word}",
    # Spanish
    "¿Cuántas {letter} hay en {word}", "¿Cuántas veces aparece {letter} en {word}", "Cuenta las {letter} en {word}", "¿Cuántas letras {letter} tiene {word}",
    # Chinese
    "{word}里有几个{letter}", "{word}中有多少个{letter}", "请数一数{word}里的{letter}", "{letter}在{word}中出现几次",
    # Korean
    "{word}에는 {letter}가 몇 개 있나요", "{word}에서 {letter}는 몇 번 나오나요", "{word}의 {letter} 개수를 세어 주세요", "{word}에 {letter}가 몇 번 들어 있어요",
    # French
    "Combien de {letter} y a-t-il dans {word}", "Combien de fois {letter} apparaît dans {word}", "Compte les {letter} dans {word}",
    # German
    "Wie viele {letter} sind in {word}", "Wie oft kommt {letter} in {word} vor", "Zähle die {letter} in {word}",
    # Japanese
    "{word}に{letter}はいくつありますか", "{word}の中に{letter}は何回出てきますか", "{word}にある{letter}を数えてください",
]


@functools.lru_cache(maxsize=1)
def _all_words(base_dir: str) -> list[str]:
    word_list = Path(base_dir, "words_alpha.txt")
    if word_list.exists():
        words = set(word_list.read_text(encoding="utf-8", errors="replace").split())  # what is no UTF-8 is no word of these letters
    else:
        counts: Counter[str] = Counter()
        read = 0
        try:
            for documents in parquets_iter_batched("train"):
                for text in documents:
                    counts.update(map(str.lower, re.findall("[A-Z]?[a-z]+", text)))
                    read += len(text)
                if read > TEXT_TO_READ:
                    break
        except UsageError as error:
            raise UsageError(f"no words to spell: {error}; or fetch a list of English words with: python -m tasks.spellingbee") from error
        words = {word for word, count in counts.items() if count > 1}
    return sorted(word for word in words if set(word) <= set(LETTERS) and SHORTEST <= len(word) <= LONGEST_OF_ALL)


def _split_of(word: str) -> str:
    return "long" if len(word) > LONGEST else "test" if zlib.crc32(word.encode()) % 10 == 0 else "train"


def get_words(split: str) -> list[str]:
    """The words of split `train`, `test` (3 to 10 letters) or `long` (11 to 15), sorted. Raises UsageError where there are none."""
    assert split in ("train", "test", "long"), f"there is no split {split!r}"
    words = [word for word in _all_words(get_base_dir()) if _split_of(word) == split]
    if not words:
        raise UsageError(f"the pretraining data hold no words to spell for the split {split}; fetch a list of English words with: "
                         "python -m tasks.spellingbee")
    return words


def made_up_words(tokenizer, real: list[str]) -> list[str]:
    """As many words as the real ones, with 3 to 10 letters, joined from tokens; none of them is a word of another split.

    Every token of lower-case letters, with or without a space before it, begins as many of them as any other, as far as the tokenizer
    does use it there and as it is short enough to be continued.
    """
    tokens = [tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size() - len(tokenizer.get_special_tokens()))]
    beginnings = [(token, text) for token, text in enumerate(tokens) if text.strip(" ") and set(text.strip(" ")) <= set(LETTERS)]
    pieces = sorted({text.strip(" ") for _, text in beginnings})
    that_fit = {room: [piece for piece in pieces if len(piece) <= room] for room in range(LONGEST)}
    rng, taken, made = random.Random(42), set(real), []
    for token, text in itertools.islice(itertools.cycle(beginnings), 10 * len(real)):  # most are taken if the tokens are few
        word, space = text.strip(" "), " " if text.startswith(" ") else ""
        length = rng.randint(max(SHORTEST, len(word) + 1), LONGEST) if len(word) < LONGEST else 0
        while len(word) < length:
            word += rng.choice(that_fit[LONGEST - len(word)])
        if _split_of(word) == "train" and word not in taken and tokenizer.encode(space + word)[0] == token:
            taken.add(word)
            made.append(word)
            if len(made) == len(real):
                break
    return made


def _practice_words(split: str, tokenizer) -> list[str]:
    words = get_words(split)
    return words if tokenizer is None else words + made_up_words(tokenizer, words)


def spell(word: str) -> str:
    return f"{word}:{','.join(word)}"


class SpellingBee(Task):
    """`size` questions for the number of times that a letter occurs in a word. Example i depends on i and the words only.

    With a `tokenizer`, half of the words are made up.
    """

    eval_type = "generative"

    def __init__(self, size: int = 1000, split: str = "train", tokenizer=None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.split, self.words = size, split, _practice_words(split, tokenizer)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        rng = random.Random(index + (0 if self.split == "train" else TEST_RANDOM_SEED_OFFSET))
        word = rng.choice(self.words)
        letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(LETTERS)
        question = rng.choice(QUESTIONS)
        if rng.random() < 0.3:
            question = question.lower()
        quotes = [rng.choice(["", "'", '"']) for _ in range(2)]
        question = question.format(letter=f"{quotes[0]}{letter}{quotes[0]}", word=f"{quotes[1]}{word}{quotes[1]}")
        if rng.random() < 0.5:
            question += "?"

        # between double quotes a word has the tokens that it also has in its spelling; after ' an s, t, d or m would be taken for a contraction
        sentence = f'We count "{letter}" in "{word}":'
        broken_off = self.split == "train" and rng.random() < 0.2
        read = word[:rng.randrange(1, len(word))] if broken_off else word
        count, lines = 0, []
        for position, char in enumerate(read, 1):
            count += char == letter
            lines.append(f"{position}:{char}" + (f" hit! count={count}" if char == letter else ""))
        by_hand = "\n".join(lines)
        answer = word.count(letter)
        parts = [
            {"type": "text", "text": f"{sentence}\n\n{word}:{','.join(read)}\n\n{by_hand}\n\nBy hand: {count}\n\n"},
            {"type": "text", "text": "By Python:\n\n"},
            {"type": "python", "text": f'"{word}".count("{letter}")'},
            {"type": "python_output", "text": str(answer)},
            {"type": "text", "text": f"\n\n#### {answer}"},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def evaluate(self, problem: dict, completion: str) -> int:
        return same_answer(problem, completion)


class SimpleSpelling(Task):
    """`size` requests to spell a word, each word once before any comes again. With a `tokenizer`, half of the words are made up."""

    eval_type = "generative"

    def __init__(self, size: int = 1000, split: str = "train", tokenizer=None, **kwargs):
        super().__init__(**kwargs)
        self.size, self.words = size, _practice_words(split, tokenizer)
        random.Random(42).shuffle(self.words)

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        word = self.words[index % len(self.words)]
        return {"messages": [{"role": "user", "content": f"Spell the word: {word}"}, {"role": "assistant", "content": spell(word)}]}

    def evaluate(self, problem: dict, completion: str) -> bool:
        return completion.strip() == problem["messages"][-1]["content"]


@command
def main(argv=None) -> None:
    ArgumentParser(description="Fetches a list of 370,000 English words, from which the spelling tasks then choose").parse_args(argv)
    print(f"The word list is {download_file_with_lock(WORD_LIST_URL, 'words_alpha.txt')}")


if __name__ == "__main__":
    sys.exit(main())
