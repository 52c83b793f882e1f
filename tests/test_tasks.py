"""Data sets from local files and from the hub, bad rows, spelling words, your own conversations."""
import gzip
import json
import re
import sys
import types
from collections import Counter
from contextlib import nullcontext

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.engine import use_calculator
from tasks import spellingbee
from tasks.arc import ARC
from tasks.common import HubDataset, TaskMixture, TaskSequence, load_hub_dataset
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import LETTERS, QUESTIONS, SimpleSpelling, SpellingBee, get_words, made_up_words, spell
from tests.golden.fixtures import tokenizer_512


def put(base_dir, *place: str, rows: list[dict], name: str = "rows.jsonl") -> None:
    folder = base_dir.joinpath("task_data", *place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))


@pytest.fixture
def words(base_dir):
    """A word list of all letters in all lengths."""
    listed = [LETTERS[i] * (length - 2) + LETTERS[j] + "z" for length in range(2, 18) for i in range(26) for j in range(26)]
    (base_dir / "words_alpha.txt").write_text("\n".join([*listed, "Upper", "don't", "naïve"]))
    spellingbee._all_words.cache_clear()
    yield base_dir
    spellingbee._all_words.cache_clear()


# -- where data come from


def test_local_jsonl_and_parquet_in_order_of_names(base_dir):
    put(base_dir, "a--b", "default", "train", rows=[{"x": 1}, {"x": 2}])
    pq.write_table(pa.table({"x": [3, 4]}), base_dir / "task_data" / "a--b" / "default" / "train" / "z.parquet")
    rows = load_hub_dataset("a/b")
    assert [rows[i] for i in range(len(rows))] == [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}]


def test_hub_data_through_the_datasets_library(base_dir, monkeypatch):
    asked = []

    class Dataset:
        def with_format(self, kind):
            return {"arrow": self}[kind]

        def __getitem__(self, rows):
            assert rows == slice(None)
            return pa.table({"x": [1, 2, 3]})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *args, **kwargs: asked.append((args, kwargs)) or Dataset()))
    assert len(load_hub_dataset("a/b")) == 3
    assert load_hub_dataset("a/b", "c", "test", columns={"x": None})[1] == {"x": 2}
    assert asked == [(("a/b", None), {"split": "train"}), (("a/b", "c"), {"split": "test"})]


def test_no_network_says_where_to_put_the_data(base_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(UsageError, match="no route; without network put its rows .* into .*task_data/openai--gsm8k/main/train"):
        GSM8K("main", "train")


def test_without_network_the_hubs_cache_is_asked_at_once(base_dir, monkeypatch, capsys):
    monkeypatch.setattr("tasks.common.hub_unreachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(base_dir))
    with pytest.raises(UsageError, match="cannot get openai/gsm8k"):
        GSM8K("main", "train")
    assert "huggingface.co cannot be reached" in capsys.readouterr().out and huggingface_hub.constants.is_offline_mode()


@pytest.mark.parametrize("content", ["{", "[1]\n", "\"text\"\n", '{"x": 1}\n{"x": "text"}\n'])
def test_damaged_local_data(base_dir, content):
    put(base_dir, "openai--gsm8k", "main", "train", rows=[])
    (base_dir / "task_data/openai--gsm8k/main/train/rows.jsonl").write_text(content)
    with pytest.raises(UsageError):
        GSM8K("main", "train")


@pytest.mark.parametrize("rows, reason", [
    ([{"question": "?", "answer": 4}], "answer is int64, not string"), ([{"question": ["?"], "answer": "4"}], "question is list<.*, not string")])
def test_rows_of_another_kind(base_dir, rows, reason):
    put(base_dir, "openai--gsm8k", "main", "train", rows=rows)
    with pytest.raises(UsageError, match=f"of another kind: {reason}"):
        GSM8K("main", "train")


@pytest.mark.parametrize("choices, good", [({"label": ["A"], "text": ["a"]}, True), ("a", False), (["a"], False), ({"label": ["A"]}, False), ({"label": ["A"], "text": [1]}, False)])
def test_choices_of_another_kind(base_dir, choices, good):
    put(base_dir, "allenai--ai2_arc", "ARC-Easy", "test", rows=[{"question": "?", "choices": choices, "answerKey": "A"}])
    with nullcontext() if good else pytest.raises(UsageError, match="of another kind: choices is"):
        assert len(ARC("ARC-Easy", "test")) == 1


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_texts_that_are_stored_otherwise(base_dir, kind):
    put(base_dir, "openai--gsm8k", "main", "train", rows=[])
    (base_dir / "task_data/openai--gsm8k/main/train/rows.jsonl").unlink()
    pq.write_table(pa.table({"question": pa.array(["?"]).cast(kind), "answer": pa.array(["4"]).cast(kind)}), base_dir / "task_data/openai--gsm8k/main/train/rows.parquet")
    assert GSM8K("main", "train")[0]["messages"][0]["content"] == "?"


def test_words_that_are_no_utf_8_are_none_of_the_list(base_dir):
    (base_dir / "words_alpha.txt").write_bytes("\n".join(["plain", "naïve", *(letter * 5 for letter in LETTERS)]).encode("latin-1"))
    spellingbee._all_words.cache_clear()
    words = spellingbee._all_words(str(base_dir))
    spellingbee._all_words.cache_clear()
    assert "plain" in words and len(words) == 27


def test_damaged_parquet(base_dir):
    put(base_dir, "openai--gsm8k", "main", "train", rows=[], name="x.parquet")
    with pytest.raises(UsageError, match="damaged"):
        GSM8K("main", "train")


def test_parquet_whose_middle_is_damaged(base_dir):
    put(base_dir, "openai--gsm8k", "main", "train", rows=[])
    path = base_dir / "task_data/openai--gsm8k/main/train/rows.parquet"
    pq.write_table(pa.table({"question": ["?"] * 999, "answer": [str(i) for i in range(999)]}), path)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        GSM8K("main", "train")


def test_empty_columns(base_dir):
    put(base_dir, "openai--gsm8k", "main", "train", rows=[{"question": "?", "answer": "1"}, {"question": None, "answer": "1"}])
    with pytest.raises(UsageError, match="of the 2 rows of openai/gsm8k .* 1 have no question; put those that have it"):
        GSM8K("main", "train")


def test_missing_columns(base_dir):
    put(base_dir, "openai--gsm8k", "main", "train", rows=[{"question": "?", "solution": "1"}])
    with pytest.raises(UsageError, match="have no answer, but question, solution"):
        GSM8K("main", "train")


def test_impossible_rows(base_dir):
    put(base_dir, "allenai--ai2_arc", "ARC-Easy", "test", rows=[{"question": "?", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "B"}])
    with pytest.raises(UsageError, match="ARC example 0"):
        ARC("ARC-Easy", "test")[0]
    put(base_dir, "cais--mmlu", "all", "test", rows=[{"question": "?", "choices": ["x"], "answer": 0, "subject": "s"}])
    with pytest.raises(UsageError, match="MMLU example 0"):
        MMLU("all", "test")[0]
    put(base_dir, "HuggingFaceTB--smol-smoltalk", "default", "train", rows=[{"messages": [{"role": "user", "content": "alone"}]}])
    with pytest.raises(UsageError, match="SmolTalk example 0"):
        SmolTalk("train")[0]


def test_mmlu_has_57_subjects():
    assert len(set(MMLU.groups)) == 57 and list(MMLU.groups) == sorted(MMLU.groups)


@given(st.integers(0, 60), st.integers(0, 1000))
def test_a_shuffle_is_a_permutation(size, seed):
    rows = HubDataset(pa.table({"x": list(range(size))})).shuffle(seed)
    assert sorted(rows[i]["x"] for i in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        rows[size]


# -- your own conversations


def conversation(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_custom_conversations(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(["", json.dumps(conversation("a", "b")), "", json.dumps({"messages": conversation("é", "d", "e", "f")})]), encoding="utf-8")
    task = CustomJSON(path)
    assert [len(example["messages"]) for example in task] == [2, 4] and task[1]["messages"][0]["content"] == "é"
    assert len(CustomJSON(path, stop=1)) == 1


def sharegpt(*turns: str) -> dict:
    return {"id": "x", "conversations": [dict(zip(("from", "value"), turn.split(":"))) for turn in turns]}


@pytest.mark.parametrize("line", [
    "{", "5", "[]", "{}", "[1, 2]", "[" * 100_000, json.dumps(sharegpt("human:a", "tool:b", "gpt:c")), json.dumps({"conversations": [{"from": [], "value": "a"}]}),
    json.dumps({"instruction": "a", "output": None}), json.dumps({"instruction": 5, "output": "b"}), json.dumps(conversation("a")), json.dumps(conversation("a", "b", "c")), json.dumps(conversation("a", "b")[::-1]),
    json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": ["b"]}]), json.dumps([{"role": "user"}, {"role": "assistant", "content": "b"}]),
])
def test_bad_custom_conversations(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(conversation("a", "b")) + "\n" + line)
    with pytest.raises(UsageError, match=r"mine\.jsonl"):
        CustomJSON(path)


CONVERSATION = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("value, said", [
    ({"messages": CONVERSATION}, ""), ({"conversations": CONVERSATION}, ""),
    (sharegpt("system:s", "human:a", "gpt:b"), "ShareGPT"), (sharegpt("system:s", "gpt:before", "user:a", "chatgpt:b", "human:after"), "ShareGPT"),
    ({"instruction": "a", "input": "", "output": "b", "system": "s"}, "Alpaca"), ({"instruction": "a", "output": "b", "system": "s", "text": "..."}, "Alpaca"),
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSON"])
def test_layouts_that_people_have(tmp_path, capsys, value, said, name):
    text = b"\xef\xbb\xbf" + json.dumps([value] if name == "a.JSON" else value).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert [example["messages"] for example in CustomJSON(tmp_path / name)] == [CONVERSATION]
    assert capsys.readouterr().out.endswith(f"1 conversations, in the layout of {said}\n" if said else "")


def test_layouts_in_detail(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    values = [{"instruction": "Add", "input": "1 and 2", "output": "3"}, sharegpt("gpt:only an answer"), sharegpt("human:a", "gpt:b"), CONVERSATION]
    path.write_text("\n".join(map(json.dumps, values)))
    assert [[message["content"] for message in example["messages"]] for example in CustomJSON(path)] == [["Add\n\n1 and 2", "3"], ["a", "b"], ["s", "a", "b"]]
    assert "3 conversations, in the layout of Alpaca and ShareGPT; 1 without question and answer are left out" in capsys.readouterr().out


def test_no_custom_conversations(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        CustomJSON(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="no conversation"):
        CustomJSON(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match="broken.jsonl.gz cannot be read"):
        CustomJSON(tmp_path / "broken.jsonl.gz")
    for content, message in ((b"{}", "not a list"), (b"[1", "not JSON"), (b"\xff", "not JSON"), (b"[" * 100_000, "too deep")):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            CustomJSON(tmp_path / "a.json")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        CustomJSON(tmp_path / "binary.jsonl")


# -- spelling


def test_the_splits_share_no_word(words):
    splits = {split: set(get_words(split)) for split in ("train", "test", "long")}
    assert not splits["train"] & splits["test"] and not splits["train"] & splits["long"]
    assert {len(word) for word in splits["train"] | splits["test"]} == set(range(3, 11))
    assert {len(word) for word in splits["long"]} == set(range(11, 16))
    assert 0.05 < len(splits["test"]) / len(splits["train"]) < 0.2
    assert all(set(word) <= set(LETTERS) for words in splits.values() for word in words)


def test_words_of_the_pretraining_data(base_dir):
    spellingbee._all_words.cache_clear()
    folder = base_dir / "base_data_climbmix"
    folder.mkdir()
    text = "HTTPServer.getName(alpha_beta) Alpha beta once x1y2 naïve"
    for name in ("shard_00000.parquet", "shard_00001.parquet"):
        pq.write_table(pa.table({"text": [text, "server name get alpha", "twiceword twiceword"]}), folder / name)
    assert spellingbee._all_words(str(base_dir)) == ["alpha", "beta", "get", "name", "server", "twiceword"], "what occurs twice, split at humps"
    spellingbee._all_words.cache_clear()


def test_without_words(base_dir):
    spellingbee._all_words.cache_clear()
    with pytest.raises(UsageError, match="no words to spell: .*python -m tasks.spellingbee"):
        SpellingBee()


@pytest.mark.parametrize("split", ["train", "test", "long"])
def test_the_reference_answers_are_right(words, split):
    """By hand, by the calculator and by judgement; and the same example gives the same question."""
    task, again = SpellingBee(300, split), SpellingBee(300, split)
    for i in range(len(task)):
        example = task[i]
        question, (by_hand, _, call, output, final) = example["messages"][0]["content"], example["messages"][1]["content"]
        word, letter = call["text"].split('"')[1::2]
        assert word in task.words and (word in question.lower()) and letter in question.lower()
        assert output["text"] == str(use_calculator(call["text"])) == str(word.count(letter))
        letters = re.search(f"^{word}:(.*)$", by_hand["text"], re.MULTILINE)[1].replace(",", "")
        assert letters and (word.startswith(letters) if split == "train" else word == letters)
        assert by_hand["text"].count("hit!") == letters.count(letter) and by_hand["text"].endswith(f"By hand: {letters.count(letter)}\n\n")
        assert spell(letters).split(":")[1] in by_hand["text"] and f"{len(letters)}:{letters[-1]}" in by_hand["text"]
        completion = "".join(part["text"] for part in (by_hand, call, output, final))
        assert task.evaluate(example, completion) == 1 and task.reward(example, completion) == 1.0
        assert task.evaluate(example, completion.replace("#### ", "#### 9")) == 0
        assert again[i] == example


def test_made_up_words_teach_the_tokens_and_nothing_of_other_splits(words):
    tokenizer, real = tokenizer_512(), get_words("train")
    made = made_up_words(tokenizer, real)
    assert made == made_up_words(tokenizer, real) and len(set(made)) == len(made) == len(real) and not set(made) & set(real)
    assert all(3 <= len(word) <= 10 and spellingbee._split_of(word) == "train" and set(word) <= set(LETTERS) for word in made)
    first = Counter(tokenizer.encode(space + word)[0] for word in made for space in ("", " "))
    beginnings = [token for token in range(503) if (text := tokenizer.decode([token]).strip(" ")) and set(text) <= set(LETTERS)]
    assert len(beginnings) > 100 and min(first[token] for token in beginnings) > len(made) / len(beginnings) / 2
    assert SpellingBee(tokenizer=tokenizer).words == real + made and sorted(SimpleSpelling(tokenizer=tokenizer).words) == sorted(real + made)


def test_the_count_by_hand_sometimes_breaks_off_in_training(words):
    examples = [task[i]["messages"][1]["content"] for task in [SpellingBee(1000)] for i in range(1000)]
    early = [spell(call["text"].split('"')[1]) not in by_hand["text"] for by_hand, _, call, _, _ in examples]
    wrong = [f"By hand: {output['text']}\n" not in by_hand["text"] for by_hand, _, _, output, _ in examples]
    assert 150 < sum(early) < 250 and 30 < sum(wrong) and all(a >= b for a, b in zip(early, wrong))


def test_questions_vary(words):
    assert len(set(QUESTIONS)) == 51
    questions = [task[i]["messages"][0]["content"] for task in [SpellingBee(1000)] for i in range(1000)]
    assert sum(question.endswith("?") for question in questions) == pytest.approx(500, abs=80)
    assert sum('"' in question for question in questions) > 300
    assert any("多少" in question for question in questions)


def test_letters_are_mostly_in_the_word(words):
    task = SpellingBee(1000)
    counts = [int(task[i]["messages"][1]["content"][3]["text"]) for i in range(1000)]
    assert 20 < counts.count(0) < 180, "9 of 10 letters are from the word, the others from the alphabet"


def test_simple_spelling(words):
    task = SimpleSpelling(size=10 ** 6)
    number = len(task.words)
    spelled = [task[i]["messages"][1]["content"] for i in range(number)]
    assert sorted(spelled) == sorted(map(spell, get_words("train"))), "each word once"
    assert task[number] == task[0]
    assert task.evaluate(task[0], spelled[0] + "\n") and not task.evaluate(task[0], spelled[1])


def test_mixture_of_slices(words):
    half = SimpleSpelling(100, start=50)
    mixture, sequence = TaskMixture([half, half, SpellingBee(10)]), TaskSequence([half, SpellingBee(10)])
    assert len(mixture) == 110 and len(sequence) == 60
    everything = [json.dumps(example) for example in mixture]
    assert all(everything.count(json.dumps(half[i])) == 2 for i in range(50)), "what is listed twice comes twice"
    with pytest.raises(AssertionError):
        mixture[110]
    with pytest.raises(AssertionError):
        sequence[60]
