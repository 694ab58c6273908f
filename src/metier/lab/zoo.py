"""Small models of the field's families, built from transformers' configurations with random weights.

The names say family and size; all have the lab's 2048-entry vocabulary and 1024 positions.
"""

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
    "bert-1m": ("BertConfig", {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}),
}


def names() -> list[str]:
    """Names of the lab models, with their prefix."""
    return [f"lab/{n}" for n in SIZES]


def check(name: str) -> None:
    """Raise ``UsageError`` unless the lab has this model."""
    if name.removeprefix("lab/") not in SIZES:
        raise unknown("lab model", name, names())


def config(name: str) -> Any:
    """The transformers configuration of a lab model."""
    import transformers

    from metier.lab.tokenizer import VOCABULARY, lab_tokenizer

    check(name)
    kind, sizes = SIZES[name.removeprefix("lab/")]
    tokenizer = lab_tokenizer()
    common = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": False,
    }
    if kind != "GPT2Config":
        common["max_position_embeddings"] = POSITIONS
    if kind == _LLAMA:
        common["tie_word_embeddings"] = True
    return getattr(transformers, kind)(**common, **sizes)
