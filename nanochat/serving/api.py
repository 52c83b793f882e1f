"""What a request to the server may hold: its JSON is checked field by field and becomes a `Query`.

Notable:
* whatever makes no sense is a 4xx that says why; counts are looked at before contents, so that no body takes long to refuse
* every known field is asked for by its name. Others are refused by name, as what would change the answer must not be ignored silently; but clients
  like to spell out settings that change nothing (`NEUTRAL`) or that concern only the one who runs the server (`IGNORED`), and null means unset
* a base model knows no conversation: the messages are one text, which it continues
* tool calls stand in the text as the names of their special tokens; in an assistant's message these become the tokens again, so that
  a client may send back what it got. In nobody else's message do they mean anything.
* an answer that was given can be sent back: an assistant's message may be empty, and as long as the context

Nothing here waits or needs the event loop: the server calls it on other threads.
"""
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from nanochat.sampling import Sampling
from nanochat.tokenizer import replace_surrogates

MAX_MESSAGES_PER_REQUEST = 500
MAX_MESSAGE_LENGTH = 8000  # characters of a user's message, at nanochat's own endpoint
MAX_TOTAL_CONVERSATION_LENGTH = 32000  # of all of them
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.0, 2.0
MIN_TOP_K, MAX_TOP_K = 0, 200
MIN_MAX_TOKENS, MAX_MAX_TOKENS = 1, 4096
MAX_BODY = 2**20  # bytes
MAX_CHOICES = 16  # answers to a prompt
MAX_PROMPTS = 128  # of a request; also answers of a request
MAX_STOPS, MAX_STOP_LENGTH = 1000, 200
MAX_STOP_CHARACTERS = 4000  # of all stops: the text of every token is searched for them
MAX_LOGPROBS = 20
MAX_ECHOED = 600_000  # log-probabilities of prompts in an answer: 128 prompts of a context of 2,048 with one alternative; some 80 MB

NEUTRAL: dict[str, tuple] = {  # values that change nothing
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "suffix": ("",), "best_of": (1,), "reasoning_effort": ("none",), "use_beam_search": (False,), "ignore_eos": (False,)}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}


class ApiError(HTTPException):
    """What the client has to know. `code` is OpenAI's name of the problem, where it has one."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers: dict | None = None):
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def wrong_type(name: str, wanted: str) -> ApiError:
    return ApiError(422, f"{name}: should be {wanted}", param=name)


class Fields:
    """A JSON object while it is read. Whatever reads a field raises ApiError: 422 for a wrong type, 400 for a value that makes no sense."""

    def __init__(self, body: Any):
        if not isinstance(body, dict):
            raise wrong_type("body", "a JSON object")
        self.left = body

    def take(self, name: str) -> Any:
        """The value of a field; None where there is none."""
        return self.left.pop(name, None)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise wrong_type(name, "a number")
        if not low <= value <= high:  # so that NaN is refused
            raise ApiError(400, f"{name} must be a number from {low} to {high}", param=name)
        return value

    def whole(self, name: str, low: int, high: int, default: int | None, note: str = "") -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise wrong_type(name, "a whole number")
        if not low <= value <= high:
            raise ApiError(400, f"{name} must be a whole number from {low} to {high}{note}", param=name)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and type(value) is not bool:
            raise wrong_type(name, "true or false")
        return bool(value)

    def finish(self) -> None:
        """Refuses whatever is left."""
        for name, value in self.left.items():
            if value is None or name in IGNORED or any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(name, ())):
                continue
            raise ApiError(400, f"{name[:100]} is not supported here; leave it out", "unsupported_parameter", name[:100])


def read_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # also of half a character
        raise ApiError(422, f"the body is not JSON that can be read ({type(error).__name__}: {error})"[:300]) from None


# -----------------------------------------------------------------------------
# Queries


@dataclass
class Defaults:
    """What holds where a request says nothing."""
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512


@dataclass
class Query:
    """A request that makes sense."""
    prompts: list[list[int]]
    sampling: Sampling
    max_tokens: int | None  # None: as many as fit
    n: int = 1  # answers to each prompt
    stops: list[str] = field(default_factory=list)
    logprobs: int | None = None  # this many alternatives
    echo: bool = False
    hidden: list[int] = field(default_factory=list)  # of each prompt, how many tokens the client did not write
    stream: bool = False
    with_usage: bool = False


def check_sampling(temperature: float, top_k: int, max_tokens: int) -> None:
    read_sampling(Fields({"temperature": temperature, "top_k": top_k}), Defaults())
    Fields({"max_tokens": max_tokens}).whole("max_tokens", MIN_MAX_TOKENS, MAX_MAX_TOKENS, None)


def read_sampling(fields: Fields, defaults: Defaults, vocab_size: int = 0) -> Sampling:
    """How to draw tokens. Without a seed a random one. Raises ApiError."""
    seed = fields.whole("seed", -2**63, 2**63 - MAX_CHOICES, None)
    bias = fields.take("logit_bias")
    bias = {} if bias is None else bias
    if not isinstance(bias, dict):
        raise wrong_type("logit_bias", "an object of token ids and numbers")
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size and type(value) in (int, float) and -100 <= value <= 100):
            raise ApiError(400, f"logit_bias takes token ids below {vocab_size} with numbers from -100 to 100", param="logit_bias")
    top_k = fields.whole("top_k", MIN_TOP_K, MAX_TOP_K, defaults.top_k, "; 0 keeps all tokens")
    return Sampling(
        temperature=fields.number("temperature", MIN_TEMPERATURE, MAX_TEMPERATURE, defaults.temperature), top_k=top_k,
        top_p=fields.number("top_p", 0, 1, 1), min_p=fields.number("min_p", 0, 1, 0),
        repetition_penalty=fields.number("repetition_penalty", 0.1, 10, 1),
        frequency_penalty=fields.number("frequency_penalty", -2, 2, 0), presence_penalty=fields.number("presence_penalty", -2, 2, 0),
        logit_bias={int(token): value for token, value in bias.items()}, seed=random.randrange(2**31) if seed is None else seed)


def read_stops(fields: Fields) -> list[str]:
    """The texts that end an answer. Raises ApiError."""
    stops = fields.take("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list):
        raise wrong_type("stop", "a text or a list of texts")
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ApiError(400, f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters", param="stop")
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise ApiError(400, f"stop takes up to {MAX_STOP_CHARACTERS} characters in all its texts", param="stop")
    return stops


def read_max_tokens(fields: Fields, name: str, default: int, least: int = 1) -> int | None:
    """OpenAI's: null takes the default, -1 as many as fit. Raises ApiError."""
    limit = fields.whole(name, -1, 2**31, default)
    if limit == -1:
        return None
    if limit is not None and limit < least:
        raise ApiError(400, f"max_tokens must be a whole number of at least {least}, or -1 for as many as fit", param="max_tokens")
    return limit


def read_own_chat(body: bytes, tokenizer, base: bool, defaults: Defaults) -> Query:
    """nanochat's own `/chat/completions`."""
    fields = Fields(read_json(body))
    messages = read_messages(fields, ("user", "assistant"))
    limit_messages(messages)
    sampling = read_sampling(fields, defaults, tokenizer.get_vocab_size())
    max_tokens = fields.whole("max_tokens", MIN_MAX_TOKENS, MAX_MAX_TOKENS, defaults.max_tokens)
    fields.take("model")  # there is but one
    go_on = fields.flag("continue_final_message")
    if fields.take("stream") is False:
        raise ApiError(400, "this endpoint always streams; /v1/chat/completions can answer in one piece", param="stream")
    fields.finish()
    return Query([chat_prompt(tokenizer, messages, base, go_on)], sampling, max_tokens)


def read_chat(body: bytes, tokenizer, base: bool, defaults: Defaults, model_name: str) -> Query:
    """OpenAI's `/v1/chat/completions`."""
    fields = Fields(read_json(body))
    query = read_openai(fields, tokenizer, defaults, model_name)
    messages = read_messages(fields, ("system", "developer", "user", "assistant"))
    both = [read_max_tokens(fields, name, defaults.max_tokens) for name in ("max_completion_tokens", "max_tokens") if fields.left.get(name) is not None]
    query.max_tokens = both[0] if both else defaults.max_tokens
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_LOGPROBS, None)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    query.logprobs = (top or 0) if wanted else None
    if fields.left.get("echo") is False:
        fields.take("echo")
    fields.finish()
    query.prompts = [chat_prompt(tokenizer, messages, base)]
    return query


def read_completion(body: bytes, tokenizer, defaults: Defaults, model_name: str, context: int) -> Query:
    """OpenAI's `/v1/completions`."""
    fields = Fields(read_json(body))
    query = read_openai(fields, tokenizer, defaults, model_name)
    prompt = fields.take("prompt")
    query.echo = fields.flag("echo")
    query.max_tokens = read_max_tokens(fields, "max_tokens", defaults.max_tokens, least=0 if query.echo else 1)
    if fields.left.get("logprobs") is False:
        fields.take("logprobs")
    query.logprobs = fields.whole("logprobs", 0, MAX_LOGPROBS, None)
    fields.finish()
    query.prompts, query.hidden = completion_prompts(tokenizer, prompt, context)
    if len(query.prompts) * query.n > MAX_PROMPTS:
        raise ApiError(400, f"n must be such that there are at most {MAX_PROMPTS} answers to all prompts together", param="n")
    if query.echo and query.logprobs is not None and query.n * sum(map(len, query.prompts)) * (1 + query.logprobs) > MAX_ECHOED:
        raise ApiError(400, f"echo with logprobs gives at most {MAX_ECHOED} of them for all prompts together; send fewer prompts at a time", param="logprobs")
    return query


def read_openai(fields: Fields, tokenizer, defaults: Defaults, model_name: str) -> Query:
    """What both endpoints take."""
    model = fields.take("model")
    if not isinstance(model, str):
        raise wrong_type("model", f"a text: {model_name!r}")
    if model != model_name:
        raise ApiError(404, f"there is no model {model[:100]!r} here, only {model_name!r}", "model_not_found", "model")
    sampling, stops = read_sampling(fields, defaults, tokenizer.get_vocab_size()), read_stops(fields)
    stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is not None and not isinstance(options, dict):
        raise wrong_type("stream_options", "an object")
    options = Fields(options or {})
    with_usage = options.flag("include_usage")
    options.finish()
    n = fields.whole("n", 1, MAX_CHOICES, 1)
    assert n is not None
    return Query([], sampling, None, n, stops, stream=stream, with_usage=with_usage)


# -----------------------------------------------------------------------------
# Messages and prompts

TOOL_TOKEN = re.compile(r"(<\|(?:python|output)_(?:start|end)\|>)")


def read_messages(fields: Fields, roles: tuple[str, ...]) -> list[tuple[str, str]]:
    """(role, text) of each message. Raises ApiError where they are none, too many or of no use to a model of text."""
    messages = fields.take("messages")
    if not isinstance(messages, list):
        raise wrong_type("messages", "a list of messages")
    if not messages:
        raise ApiError(400, "there are no messages; send at least one", param="messages")
    if len(messages) > MAX_MESSAGES_PER_REQUEST:
        raise ApiError(400, f"{len(messages)} messages are too many; at most {MAX_MESSAGES_PER_REQUEST} are read", param="messages")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise wrong_type(f"messages.{i}", "an object with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise wrong_type(f"messages.{i}.role", "a text")
        if role not in roles:
            raise ApiError(400, f"message {i} has the role {role[:50]!r}; use {' or '.join(roles)}", param="messages")
        if any(message.get(name) for name in ("tool_calls", "function_call", "audio")):
            raise ApiError(400, f"message {i} holds more than text, which is all the model can read", param="messages")
        if content is None and role != "assistant":
            raise wrong_type(f"messages.{i}.content", "a text")
        text = plain_text(i, content)
        if not text and role != "assistant":
            raise ApiError(400, f"message {i} has no content", param="messages")
        found.append((role, replace_surrogates(text)))
    return found


def plain_text(index: int, content: Any) -> str:
    """Of a message's content: null, a text, or a list of text parts. Raises ApiError for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong_type(f"messages.{index}.content", "a text or a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text", ""), str):
            raise ApiError(400, f"message {index} holds more than text, which is all the model can read", param="messages")
        texts.append(part.get("text", ""))
    return "".join(texts)


def limit_messages(messages: list[tuple[str, str]]) -> None:
    """Raises ApiError for more characters of users than nanochat's own endpoint takes."""
    lengths = [len(text) if role == "user" else 0 for role, text in messages]
    for i, length in enumerate(lengths):
        if length > MAX_MESSAGE_LENGTH:
            raise ApiError(400, f"message {i} has {length} characters; a message has at most {MAX_MESSAGE_LENGTH}", param="messages")
    if (total := sum(lengths)) > MAX_TOTAL_CONVERSATION_LENGTH:
        raise ApiError(400, f"the conversation has {total} characters; at most {MAX_TOTAL_CONVERSATION_LENGTH} are read", "context_length_exceeded", "messages")


def chat_prompt(tokenizer, messages: list[tuple[str, str]], base: bool, go_on: bool = False) -> list[int]:
    """Ids that make the model answer (role, text) messages; roles need not alternate, system messages open the user's next one.

    go_on: a last message of the assistant is not at its end, the model goes on with it (`continue_final_message`, as vLLM calls it).
    Raises ApiError where no user follows a system message.
    """
    prompt = [tokenizer.get_bos_token_id()]
    if base:
        return prompt + tokenizer.encode("".join(text for _, text in messages))
    instructions: list[str] = []
    for role, text in messages:
        if role == "assistant":
            body = [token for part in TOOL_TOKEN.split(text)
                    for token in ([tokenizer.encode_special(part)] if TOOL_TOKEN.fullmatch(part) else tokenizer.encode(part))]
        elif role == "user":
            body, instructions = tokenizer.encode("\n\n".join([*instructions, text])), []
        else:
            instructions.append(text)
            continue
        prompt += [tokenizer.encode_special(f"<|{role}_start|>"), *body, tokenizer.encode_special(f"<|{role}_end|>")]
    if instructions:
        raise ApiError(400, "a system message must be followed by the user's", param="messages")
    if go_on and messages[-1][0] == "assistant":
        return prompt[:-1]
    return [*prompt, tokenizer.encode_special("<|assistant_start|>")]


def encode_text(tokenizer, text: str) -> list[int]:
    """Ids of a text, which may begin with the token that begins documents, by its name; it means nothing further on."""
    bos = tokenizer.id_to_token(tokenizer.get_bos_token_id())
    begins = text.startswith(bos)
    return [tokenizer.get_bos_token_id()] * begins + tokenizer.encode(replace_surrogates(text[len(bos) * begins:]))


def completion_prompts(tokenizer, prompt: Any, context: int) -> tuple[list[list[int]], list[int]]:
    """One prompt or several, as text or as token ids; and how many tokens were put before each: bos before a text that has none."""
    vocab_size, bos = tokenizer.get_vocab_size(), tokenizer.get_bos_token_id()
    wrong = ApiError(400, f"prompt must be text, or token ids below {vocab_size}; and not an empty list", param="prompt")
    items = [prompt] if isinstance(prompt, str) or isinstance(prompt, list) and prompt and type(prompt[0]) is int else prompt
    if not isinstance(items, list) or not items:
        raise wrong
    if len(items) > MAX_PROMPTS:
        raise ApiError(400, f"{len(items)} prompts are too many; send at most {MAX_PROMPTS} at a time", param="prompt")
    prompts, hidden = [], []
    for item in items:
        if isinstance(item, str):
            ids = encode_text(tokenizer, item)
            hidden.append(int(ids[:1] != [bos]))
            prompts.append([bos] * hidden[-1] + ids)
        elif isinstance(item, list) and item:
            if len(item) > context:
                raise context_error(len(item), context, "prompt")
            if not all(type(token) is int and 0 <= token < vocab_size for token in item):
                raise wrong
            hidden.append(0)
            prompts.append(item)
        else:
            raise wrong
    return prompts, hidden


def context_error(tokens: int, context: int, what: str) -> ApiError:
    """In the words that clients look for, to shorten a conversation and try again."""
    return ApiError(400, f"This model's maximum context length is {context} tokens, the answer included. However, your {what} resulted in {tokens} tokens. "
                         f"Please reduce the length of the {what}.", "context_length_exceeded", what)
