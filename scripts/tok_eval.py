"""Compares the tokenizer with those of GPT-2 and GPT-4: bytes per token on several kinds of text.

    python -m scripts.tok_eval

tiktoken downloads the two vocabularies once; without a network only our own numbers are shown.
"""
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat.cli import ArgumentParser, command
from nanochat.dataset import data_source, parquets_iter_batched
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

NEWS = """
The harbour town of Elmsworth reopened its old ferry pier on Tuesday, eleven years after a winter storm tore away
most of the decking. "We had nearly given up," said Marta Lindqvist, 61, who runs the ticket office her grandfather
built in 1938. The repair cost $4.7 million, about a fifth more than planned, and took 14 months. Crews found that
dozens of the oak piles below the waterline were sound and could stay; the rest were replaced with recycled steel.
Two boats a day will cross to the island until October. Councillors, who voted 9-2 for the project, expect 60,000
passengers in the first season, though critics doubt that the small car park can cope with half as many.
""".strip()

KOREAN = """
지난 주말 강릉의 작은 도서관에서 어린이를 위한 과학 교실이 열렸다. 아이들은 돋보기로 나뭇잎의 결을 살펴보고, 물방울이 왜
둥근지 직접 실험했다. 열두 살 지우는 “책에서 읽을 때보다 훨씬 재미있다”며 웃었다. 도서관은 2026년부터 매달 두 번씩 같은
행사를 열 계획이며, 참가비는 무료다. 다만 자리가 30명뿐이라 미리 신청해야 한다.
""".strip()

CODE = """
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Inventory:
    \"\"\"Counts items and refuses to go below zero.\"\"\"
    stock: Counter = field(default_factory=Counter)

    def move(self, name: str, amount: int = 1) -> int:
        if self.stock[name] + amount < 0:
            raise ValueError(f"only {self.stock[name]} x {name!r} left, cannot take {-amount}")
        self.stock[name] += amount
        return self.stock[name]


if __name__ == "__main__":
    shelf = Inventory()
    for item, count in [("bolt", 120), ("nut", 64), ("bolt", -20)]:
        print(f"{item:<8}{shelf.move(item, count):>6,}")
""".strip()

MATH = r"""
\begin{lemma}
Let $A \in \mathbb{R}^{m \times n}$ have singular values $\sigma_1 \ge \dots \ge \sigma_n > 0$. Then for every $x \neq 0$
\[ \sigma_n \le \frac{\lVert A x \rVert_2}{\lVert x \rVert_2} \le \sigma_1 . \]
\end{lemma}
\begin{proof}
Write $A = U \Sigma V^\top$ and $y = V^\top x$. Since $U$ and $V$ are orthogonal, $\lVert A x \rVert_2^2 = \sum_{i=1}^{n} \sigma_i^2 y_i^2$
and $\lVert x \rVert_2^2 = \sum_{i=1}^{n} y_i^2$, so the quotient is a weighted mean of the $\sigma_i^2$.
\end{proof}
""".strip()

SCIENCE = """
Mantle rock is solid, yet over millions of years it creeps like a very stiff fluid: its viscosity is of the order of
10^21 Pa s. Heat from the core and from the decay of uranium, thorium and potassium-40 makes deep rock a little less
dense than the rock above it, and so it rises at a few centimetres per year, cools below the lithosphere and sinks
again. Where two plates part, pressure falls faster than temperature; peridotite begins to melt at about 1,300 degrees
Celsius, and the basalt that wells up forms new ocean floor, recording the direction of the magnetic field as it cools.
""".strip()

GREEN, RED, OFF = "\033[92m", "\033[91m", "\033[0m"


def sample_texts() -> dict[str, str]:
    """Fixed texts of several kinds, and the first row group of each split."""
    texts = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}
    name = Path(data_source() or "climbmix").name
    for split in ("train", "val"):
        if text := "\n".join(next(parquets_iter_batched(split), [])):
            texts[f"{name}-{split}"] = text
    return texts


def count_tokens(tokenizer: RustBPETokenizer, texts: dict[str, str]) -> dict[str, int]:
    counts = {}
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, f"{name} does not survive encoding and decoding"
        counts[name] = len(ids)
    return counts


@command
def main(argv: Sequence[str] | None = None) -> None:
    ArgumentParser(description="Compare the tokenizer with GPT-2's and GPT-4's").parse_args(argv)
    report = get_report()
    texts = sample_texts()
    size = {name: len(text.encode()) for name, text in texts.items()}
    tokenizers = {"Ours": get_tokenizer()}
    for name, encoding in (("GPT-2", "gpt2"), ("GPT-4", "cl100k_base")):
        try:
            tokenizers[name] = RustBPETokenizer.from_pretrained(encoding)
        except (OSError, ValueError) as error:  # the latter where something else comes than was asked for
            print(f"{name} is left out: its vocabulary cannot be downloaded ({type(error).__name__})")
    print("Vocabulary sizes: " + ", ".join(f"{name} {tokenizer.get_vocab_size():,}" for name, tokenizer in tokenizers.items()))
    counts = {name: count_tokens(tokenizer, texts) for name, tokenizer in tokenizers.items()}
    ours = counts.pop("Ours")

    lines = []
    if not counts:
        print(f"\n{'Text':<16}{'Bytes':>10}{'Tokens':>10}{'Ratio':>8}")
        lines += ["| Text Type | Bytes | Ours Tokens | Ours Ratio |", "|---|---:|---:|---:|"]
        for name in texts:
            ratio = size[name] / ours[name]
            print(f"{name:<16}{size[name]:>10,}{ours[name]:>10,}{ratio:>8.2f}")
            lines.append(f"| {name} | {size[name]} | {ours[name]} | {ratio:.2f} |")
    for baseline, theirs in counts.items():
        print(f"\nAgainst {baseline}:")
        print(f"{'Text':<16}{'Bytes':>10}{baseline:>10}{'Ratio':>8}{'Ours':>10}{'Ratio':>8}{'Fewer tokens':>14}  Better")
        lines += [f"### Comparison with {baseline}", "",
                  f"| Text Type | Bytes | {baseline} Tokens | {baseline} Ratio | Ours Tokens | Ours Ratio | Relative Diff % |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        for name in texts:
            a, b = theirs[name], ours[name]
            ratio_a, ratio_b, fewer = size[name] / a, size[name] / b, 100 * (a - b) / a
            better = f"{GREEN}Ours{OFF}" if fewer > 0 else f"{RED}{baseline}{OFF}" if fewer < 0 else "equal"
            print(f"{name:<16}{size[name]:>10,}{a:>10,}{ratio_a:>8.2f}{b:>10,}{ratio_b:>8.2f}{fewer:>+13.1f}%  {better}")
            lines.append(f"| {name} | {size[name]} | {a} | {ratio_a:.2f} | {b} | {ratio_b:.2f} | {fewer:+.1f}% |")
        lines.append("")
    report.log(section="Tokenizer evaluation", data=["\n".join(lines)])


if __name__ == "__main__":
    sys.exit(main())
