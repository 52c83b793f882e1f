"""Golden values that are not kept on purpose, with the reason: (fixture, case) -> why."""
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("calculator", "()"): "an empty tuple is no number: refused",
    ("decode", "two_chunk_second"): "a later chunk's first position is smeared too, so that chunks equal the full pass",
    ("decode", "beyond_capacity"): "a ValueError that names the capacity, instead of PyTorch's RuntimeError about shapes",
}
