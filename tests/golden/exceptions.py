"""Golden values that are not kept on purpose, with the reason: (fixture, case) -> why."""
INERT = "letters are counted in words such as file and import too: text in quotes does nothing"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("calculator", "()"): "an empty tuple is no number: refused",
    ("calculator", "'a'.count('import')"): INERT,
    ("calculator", "'open'.count('o')"): INERT,
    ("calculator", "'fileo'.count('o')"): INERT,
    ("calculator", "'Direct'.count('i')"): INERT,
    ("calculator", "'vars'.count('a')"): INERT,
    ("calculator", "'EVAL'.count('E')"): INERT,
    ("calculator", "'profile'.count('f')"): INERT,
    ("decode", "two_chunk_second"): "a later chunk's first position is smeared too, so that chunks equal the full pass",
    ("decode", "beyond_capacity"): "a ValueError that names the capacity, instead of PyTorch's RuntimeError about shapes",
    ("gpt_parts", "empty window_pattern"): "refused like any other bad pattern, instead of a division by zero",
    ("core_eval", "mc_table_prefix_choice"): "a choice that is a prefix of all others is scored too, instead of NaN winning in first place only",
    ("fp8", "after"): "FP8 layers count as matmul parameters and FLOPs like any others",
    ("fp8", "rowwise_raises"): "the recipe rowwise works",
    ("small", "NVIDIA L40"): "its own data sheet's numbers, not the L4's",
    ("small", "NVIDIA A4000"): "not taken for an A40: unknown, like every card without an entry of its own",
    ("sft_packing", "too_long_only"): "an error instead of padding for ever; conversations that are longer than a row are cut before they block the packer",
    ("scripts_trace", "chat_sft loss"): "the average of the logged loss is debiased by the number of steps it is over",
    ("scripts_trace", "chat_sft windows"): "with another --max-seq-len the model is trained with the windows that it will be used with",
    ("rl", "saved"): "with step, settings and optimizer, so that a run can be resumed",
}
