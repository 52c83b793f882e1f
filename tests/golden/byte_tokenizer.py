"""A tokenizer for engine tests: token = UTF-8 byte, special tokens above."""


class ByteTokenizer:
    def __init__(self, special: dict[str, int]):
        self.special = special

    def encode_special(self, text: str) -> int:
        return self.special[text]

    def get_bos_token_id(self) -> int:
        return self.special["<|bos|>"]

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""
