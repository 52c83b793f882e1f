"""The tokenizer for Hugging Face `tokenizers` and back: equal ids for every text, and the conversations' format as a Jinja template.

* tiktoken joins any two neighbours whose bytes together are a token, the lowest id first. `tokenizers` wants the pairs listed, so all ways to cut a token in
  two tokens are, in the order of ids. Both take a piece of text that is a token as that token, whatever the pairs say (`ignore_merges`).
* Names of special tokens in a text become those tokens there, as is the custom and as the template needs it. For text from outside that should not:
  `tokenizer(text, split_special_tokens=True)`.
* A text begins with <|bos|>, as in training (`add_special_tokens=False` leaves it out).
* In one respect alone the ids can differ: nanochat cuts more than 100,000 blanks in a row.
"""
import json
from pathlib import Path
from typing import Any

from nanochat.cli import UsageError
from nanochat.export.exported import optional_packages
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer, encoding

# Whitespace control ({%- -%}) keeps line breaks between the tags out. {% generation %} marks what the assistant learns, as `render_conversation`'s mask does.
CHAT_TEMPLATE = """\
<|bos|>
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages|length < 2 or messages[1]['role'] != 'user' -%}{{- raise_exception('a system message must be followed by a user message') -}}{%- endif -%}
    {%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('roles must alternate: user, assistant, ...; message ' ~ loop.index0 ~ ' is from ' ~ message['role']) -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|user_start|>' ~ (system if loop.first else '') ~ message['content'] ~ '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}
        {%- for part in parts -%}
            {%- if part['type'] == 'text' -%}
                {%- generation -%}{{- part['text'] -}}{%- endgeneration -%}
            {%- elif part['type'] == 'python' -%}
                {%- generation -%}{{- '<|python_start|>' ~ part['text'] ~ '<|python_end|>' -}}{%- endgeneration -%}
            {%- elif part['type'] == 'python_output' -%}
                {{- '<|output_start|>' ~ part['text'] ~ '<|output_end|>' -}}
            {%- else -%}
                {{- raise_exception('unknown part type ' ~ part['type'] ~ ': use text, python or python_output') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- generation -%}{{- '<|assistant_end|>' -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


def byte_names() -> dict[int, str]:
    """The character that stands for each byte where tokens are written as text (byte-level BPE, GPT-2): itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def to_hf(tokenizer: RustBPETokenizer) -> Any:
    """The same as a `tokenizers.Tokenizer`. Raises UsageError where that package is missing."""
    with optional_packages():
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    names, special = byte_names(), sorted(tokenizer.get_special_tokens(), key=tokenizer.encode_special)
    ranks = {tokenizer.decode_single_token_bytes(id): id for id in range(tokenizer.get_vocab_size() - len(special))}
    written = {token: "".join(names[byte] for byte in token) for token in ranks}
    pairs = [(token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    pairs.sort(key=lambda pair: (ranks[pair[0] + pair[1]], ranks[pair[0]]))
    hf = Tokenizer(models.BPE(vocab={written[token]: id for token, id in ranks.items()},
                              merges=[(written[left], written[right]) for left, right in pairs], ignore_merges=True))
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    bos = SPECIAL_TOKENS[0]
    hf.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.encode_special(bos))])
    return hf


def from_hf(path: Path) -> RustBPETokenizer:
    """The tokenizer of a tokenizer.json that `to_hf` has made. Raises UsageError for a file that is missing, damaged or of another kind."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        bytes_of = {character: byte for byte, character in byte_names().items()}
        ranks = {bytes(bytes_of[character] for character in token): id for token, id in data["model"]["vocab"].items()}
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        return RustBPETokenizer(encoding(ranks, special), SPECIAL_TOKENS[0])
    except FileNotFoundError as error:
        raise UsageError(f"there is no {path}; export the model again") from error
    except Exception as error:  # a damaged file can be wrong in a hundred ways
        raise UsageError(f"{path} is damaged or no tokenizer of nanochat ({type(error).__name__}: {error}); export the model again") from error
