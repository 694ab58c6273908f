"""Small models of the field's families, built from transformers' configurations with random weights.

The names say family and size; all have the lab's 2048-entry vocabulary and 1024 positions, except those of the word
language (``metier.lab.words``), whose tokens are its 230 words. Names in ``TRAINED`` bring weights.
"""

from pathlib import Path
from typing import Any

from metier.core.errors import unknown

POSITIONS = 1024
_LLAMA = "LlamaConfig"
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-50k": (
        _LLAMA,
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "llama-300k": (
        _LLAMA,
        {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "llama-1m": (
        _LLAMA,
        {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "llama-6m": (
        _LLAMA,
        {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "qwen2-1m": (
        "Qwen2Config",
        {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "gemma-1m": (
        "GemmaConfig",
        {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
    ),
    "gpt2-1m": (
        "GPT2Config",
        {
            "n_embd": 128,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": POSITIONS,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "words-120k": (
        _LLAMA,
        {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    "bert-1m": ("BertConfig", {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}),
}


TRAINED = {"words-sft": "words-120k"}
"""Models with weights of their own -> the entry they were trained from."""


def names() -> list[str]:
    """Names of the lab models, with their prefix."""
    return [f"lab/{n}" for n in (*SIZES, *TRAINED)]


def check(name: str) -> None:
    """Raise ``UsageError`` unless the lab has this model."""
    if name not in names() and f"lab/{name}" not in names():
        raise unknown("lab model", name, names())


def _entry(name: str) -> str:
    short = name.removeprefix("lab/")
    return TRAINED.get(short, short)


def tokenizer(name: str) -> Any:
    """The tokenizer of a lab model."""
    if _entry(name).startswith("words-"):
        from metier.lab.wordmodel import word_tokenizer

        return word_tokenizer()
    from metier.lab.tokenizer import lab_tokenizer

    return lab_tokenizer()


def weights(name: str) -> Path | None:
    """The safetensors file of a model in ``TRAINED``, made when it is not in the cache; ``None`` for random weights."""
    if name.removeprefix("lab/") not in TRAINED:
        return None
    from metier.lab.wordmodel import trained

    return trained()


def config(name: str) -> Any:
    """The transformers configuration of a lab model."""
    import transformers

    check(name)
    kind, sizes = SIZES[_entry(name)]
    reads = tokenizer(name)
    common = {
        "vocab_size": len(reads),
        "bos_token_id": None,
        "eos_token_id": reads.eos_token_id,
        "pad_token_id": reads.pad_token_id,
        "use_cache": False,
    }
    if kind != "GPT2Config":
        common["max_position_embeddings"] = POSITIONS
    if kind == _LLAMA:
        common["tie_word_embeddings"] = True
    return getattr(transformers, kind)(**common, **sizes)
