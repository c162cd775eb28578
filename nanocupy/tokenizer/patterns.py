"""How families of byte-level tokenizers cut text into words before merging, and their specials.

Owns the split patterns (in the syntax that tiktoken's and Hugging Face's engines share) and the
tables of control tokens that files without them leave to the family. Knows no files.
"""

from __future__ import annotations

# Sources: the published tokenizers of GPT-2, Qwen 2/2.5/3 and LLaMA 3. An expression says which
# stretches of text are merged on their own; none of the four leaves a character out.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Digits are split off first and GPT-2's pattern then sees the rest in pieces, so that white space
# before a digit is at the end of its piece: the look-ahead must take a digit for an end.
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
DIGIT_RUNS = SMOLLM.replace(r"|\p{N}|", r"|\p{N}+|")
WHOLE = r"[\s\S]+"

COVERING = frozenset({GPT2, QWEN2, LLAMA3, SMOLLM, DIGIT_RUNS, WHOLE})
MAX_PATTERN_CHARS = 4096


def covering(pattern: str) -> str:
    """`pattern`, with the stretches that it does not match as pieces too, as `Split` keeps them."""
    if pattern in COVERING:
        return pattern
    return f"(?:{pattern})|(?:(?!{pattern})[\\s\\S])+"


# tokenizer.ggml.pre → (pattern, NFC, ignore_merges, add_bos unless the file says otherwise)
GGUF_PRE: dict[str, tuple[str, bool, bool, bool]] = {
    **dict.fromkeys(
        ("default", "gpt-2", "gpt2", "phi-2", "mpt", "olmo"), (GPT2, False, False, False)
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell"), (SMOLLM, False, False, False)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2, True, False, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (LLAMA3, False, True, True)),
    "smaug-bpe": (LLAMA3, False, True, False),
}

QWEN_NUM_RANKS = 151_643
# Those of Qwen 2.5 and 3; the first three are all that Qwen 1 and 2 share with them. The boolean:
# a control token, rather than a string matched in any text.
QWEN_ADDED: tuple[tuple[str, bool], ...] = (
    *(
        (f"<|{name}|>", True)
        for name in (
            *("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end"),
            *("box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end"),
            *("vision_pad", "image_pad", "video_pad"),
        )
    ),
    ("<tool_call>", False),
    ("</tool_call>", False),
    *(
        (f"<|{name}|>", False)
        for name in (
            *("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"),
        )
    ),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
)

LLAMA3_NUM_RANKS = 128_000
_LLAMA3_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    5: "step_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
    11: "image",
}


def llama3_specials(num_specials: int = 256) -> tuple[str, ...]:
    """LLaMA 3's control tokens in id order; unnamed ones are `<|reserved_special_token_N|>`."""
    names: list[str] = []
    reserved = 0
    for index in range(num_specials):
        name = _LLAMA3_NAMED.get(index)
        if name is None:
            name = f"reserved_special_token_{reserved}"
            reserved += 1
        names.append(f"<|{name}|>")
    return tuple(names)
