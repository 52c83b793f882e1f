"""How well a chat model does on a task: multiple choice by the likeliest letter, all others by answers that the task checks."""
from collections.abc import Callable, Iterator

import torch

from nanochat.batching import BatchedEngine, Request
from nanochat.cli import UsageError
from nanochat.common import get_dist_info, print0, with_progress
from nanochat.distributed import sum_over_ranks
from nanochat.engine import Engine
from nanochat.evals.scoring import logits_at, max_positions, stack_sequences
from nanochat.sampling import Sampling
from tasks.common import Task
from tasks.registry import TASKS


def _share(passed: int, total: int) -> float:
    """passed / total over all ranks."""
    passed, total = sum_over_ranks(torch.tensor([passed, total])).tolist()
    return passed / max(total, 1)


def _limit(task: Task, max_problems: int | None) -> int:
    return len(task) if max_problems is None else min(len(task), max_problems)


def fitting(model, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The prompts with the first token and the last others, so many that an answer has room behind them. Raises UsageError where none has."""
    room = (max_positions(model) or 2 ** 62) - max_new_tokens
    if room < 2:
        raise UsageError(f"answers of {max_new_tokens} tokens do not fit into the {max_positions(model)} positions of this model; ask for shorter ones")
    if long := sum(len(prompt) > room for prompt in prompts):
        print0(f"{long} of {len(prompts)} prompts are longer than the {room} positions that this model has for them: their beginnings are left out")
    return [prompt if len(prompt) <= room else [prompt[0], *prompt[1 - room:]] for prompt in prompts]


def greedy_answers(model, tokenizer, prompts: list[list[int]], slots: int, max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its likeliest answer), in the order in which they end: up to `slots` prompts share each decoding step."""
    if not prompts:  # a rank may have none
        return
    prompts = fitting(model, prompts, max_new_tokens)
    context = max(map(len, prompts)) + max_new_tokens
    engine = BatchedEngine(model, tokenizer, min(slots, len(prompts)), max_waiting=len(prompts), context=context, patient=True)
    answers: list[list[int]] = [[] for _ in prompts]
    ended: list[tuple[int, str]] = []

    def listener(number: int) -> Callable:
        return lambda token, reason, _: ended.append((number, reason)) if token is None else answers[number].append(token)

    for number, prompt in enumerate(prompts):
        engine.submit(Request(prompt, max_new_tokens, listener(number), Sampling(temperature=0)))
    while engine.waiting or engine.running:
        engine.step()
        for number, reason in ended:
            if reason == "error":
                raise RuntimeError(f"problem {number} could not be answered: the lines above say why") from engine.fault
            yield number, answers[number]
        ended.clear()


def run_generative_eval(task_object: Task, tokenizer, model, engine: Engine, num_samples: int, max_new_tokens: int, temperature: float,
                        top_k: int | None, max_problems: int | None = None, batch_size: int = 1) -> float:
    """Share of the problems that at least one of `num_samples` answers solves. Problems are dealt to the ranks in turn.

    Likeliest answers are decoded for `batch_size` problems at a time; drawn ones for a problem at a time, with all its samples.
    """
    _, rank, _, world_size = get_dist_info()
    problems = [task_object[index] for index in range(rank, _limit(task_object, max_problems), world_size)]
    prompts = [tokenizer.render_for_completion(problem) for problem in problems]

    def drawn() -> Iterator[tuple[int, list[list[int]]]]:
        for number, prompt in enumerate(fitting(model, prompts, max_new_tokens)):
            samples, _ = engine.generate_batch(prompt, num_samples=num_samples, max_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
            yield number, [sample[len(prompt):] for sample in samples]

    def likeliest() -> Iterator[tuple[int, list[list[int]]]]:
        for number, answer in greedy_answers(model, tokenizer, prompts, batch_size, max_new_tokens):
            yield number, [answer]

    passed = 0
    for number, answers in with_progress(drawn() if temperature > 0 else likeliest(), len(prompts), type(task_object).__name__):
        passed += any(task_object.evaluate(problems[number], tokenizer.decode(answer)) for answer in answers)
    return _share(passed, len(prompts))


@torch.inference_mode()
def run_categorical_eval(task_object: Task, tokenizer, model, batch_size: int, max_problems: int | None = None) -> float:
    """Share of the problems where the right letter is the most likely among the problem's letters. Batches are dealt to the ranks in turn."""
    _, rank, _, world_size = get_dist_info()
    device, bos = model.get_device(), tokenizer.get_bos_token_id()
    size = _limit(task_object, max_problems)
    mine = range(rank * batch_size, size, world_size * batch_size)
    passed = total = 0
    for first in with_progress(mine, len(mine), type(task_object).__name__):
        problems = [task_object[index] for index in range(first, min(first + batch_size, size))]
        prompts = fitting(model, [tokenizer.render_for_completion(problem) for problem in problems], 0)
        ids = stack_sequences(prompts, bos).to(device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        logits = logits_at(model, ids, torch.arange(len(prompts), device=device), last).cpu()
        for problem, row in zip(problems, logits, strict=True):
            letter_ids = [tokenizer.encode(letter) for letter in problem["letters"]]
            assert all(len(letter_id) == 1 for letter_id in letter_ids), "every letter must be one token"
            choice = int(row[[letter_id[0] for letter_id in letter_ids]].argmax())
            passed += int(task_object.evaluate(problem, problem["letters"][choice]))
            total += 1
    return _share(passed, total)


def evaluate(task_object: Task, model, tokenizer, engine: Engine, batch_size: int = 1, num_samples: int = 1, max_new_tokens: int = 512,
             temperature: float = 0.0, top_k: int | None = 50, max_problems: int | None = None) -> float:
    """Accuracy on a task, the same on all ranks, which all must call it."""
    if task_object.eval_type == "generative":
        return run_generative_eval(task_object, tokenizer, model, engine, num_samples, max_new_tokens, temperature, top_k, max_problems,
                                   batch_size)
    return run_categorical_eval(task_object, tokenizer, model, batch_size, max_problems)


def run_chat_eval(task_name: str, model, tokenizer, engine: Engine, **kwargs) -> float:
    """`evaluate` on a task given by its name."""
    return evaluate(TASKS[task_name].test(), model, tokenizer, engine, **kwargs)
