"""Chat with a model in the terminal, or let a base model continue a text.

    python -m scripts.chat_cli                      # the fine-tuned model, or the base model while there is none
    python -m scripts.chat_cli -p "Why is the sky blue?"

Type `clear` for a new conversation, `quit` or Ctrl-D to end. Ctrl-C stops an answer. Answers go to stdout, remarks to
stderr. A base model knows no conversation: each input is a text of its own, which it continues.
"""
import contextlib
import sys
from dataclasses import dataclass

from nanochat.checkpoint_manager import CheckpointSettings, build_model
from nanochat.cli import command, flag, non_negative_float, non_negative_int, parse_settings
from nanochat.common import autodetect_device_type, compute_init
from nanochat.engine import Engine, TextStream

MAX_ANSWER = 256  # tokens


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_answer(engine: Engine, prompt: list[int], max_tokens: int, temperature: float, top_k: int) -> list[int]:
    """Prints an answer as it is generated and returns its tokens; Ctrl-C cuts it short."""
    text, answer = TextStream(engine.tokenizer), []
    brackets = {engine.python_start: "[calculate: ", engine.python_end: "]", engine.output_start: "[= ", engine.output_end: "]"}
    try:
        for (token,), _ in engine.generate(prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k):
            if engine.is_terminal(token):
                break
            answer.append(token)
            print(text.flush() + brackets[token] if token in brackets else text.push(token), end="", flush=True)
    except KeyboardInterrupt:
        note(" (stopped)")
    print(text.flush(), flush=True)
    return answer


class Chat:
    """A conversation with a chat model. Where the context gets too short, the oldest turns are forgotten."""

    def __init__(self, engine: Engine, base: bool):
        self.engine, self.base = engine, base
        self.turns: list[list[int]] = []  # tokens of a message and its answer

    def _render(self, message: str) -> list[int]:
        tokenizer = self.engine.tokenizer
        if self.base:
            return tokenizer.encode(message)
        return [tokenizer.encode_special("<|user_start|>"), *tokenizer.encode(message), tokenizer.encode_special("<|user_end|>"),
                tokenizer.encode_special("<|assistant_start|>")]

    def say(self, message: str, temperature: float, top_k: int) -> None:
        """Prints the answer to a message and remembers both."""
        turn, context = self._render(message), self.engine.model.config.sequence_len
        if 1 + len(turn) >= context:
            note(f"That message has {len(turn)} tokens, the model's context only {context}: please shorten it.")
            return
        room = context - min(MAX_ANSWER, context // 4) - 1 - len(turn)  # for earlier turns
        while self.turns and sum(map(len, self.turns)) > room:
            self.turns.pop(0)
            note("(The oldest message and its answer no longer fit into the context and are forgotten.)")
        prompt = [self.engine.bos, *(token for earlier in self.turns for token in earlier), *turn]
        answer = print_answer(self.engine, prompt, min(MAX_ANSWER, context - len(prompt)), temperature, top_k)
        if not self.base:
            self.turns.append([*turn, *answer, self.engine.assistant_end])


@dataclass
class Settings(CheckpointSettings):
    prompt: str = flag("", "Message to answer before the command ends (default: ask for messages)", short="-p")
    temperature: float = flag(0.6, "How freely answers are sampled; 0 always takes the likeliest token", type=non_negative_float, short="-t")
    top_k: int = flag(50, "Number of likeliest tokens to sample among; 0: all tokens", type=non_negative_int, short="-k")
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, __doc__.splitlines()[0])

    *_, device = compute_init(settings.device_type or autodetect_device_type())
    source, folder, step = settings.find()
    model, tokenizer, _ = build_model(folder, step, device, phase="eval")
    note(f"{source} model {folder.name} of step {step}: {sum(p.numel() for p in model.parameters()):,} parameters, "
         f"context of {model.config.sequence_len} tokens, on {device}")
    engine, base = Engine(model, tokenizer), source == "base"

    chat = Chat(engine, base)
    if settings.prompt:
        chat.say(settings.prompt, settings.temperature, settings.top_k)
        return
    note("A base model: it continues what you write." if base else "Type clear for a new conversation, quit to end.")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
    while True:
        try:
            message = input("\nText: " if base else "\nUser: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if message.lower() in ("quit", "exit"):
            return
        if message.lower() == "clear":
            chat = Chat(engine, base)
            note("A new conversation.")
        elif message:
            if not base:
                print("\nAssistant: ", end="", flush=True)
            chat.say(message, settings.temperature, settings.top_k)


if __name__ == "__main__":
    sys.exit(main())
