"""How many tokens are computed at once: by the size of the model and the memory of the device."""

from typing import Any


def activation_bytes(config: Any) -> int:
    """Bytes that one token's activations take for the backward pass: about 18 D + 6 F values per block, in fp32."""
    width = getattr(config, "hidden_size", 768)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    return 4 * getattr(config, "num_hidden_layers", 12) * (18 * width + 6 * inner)


def spare_tokens(model: Any, device: str) -> int:
    """Tokens whose computation takes as long as starting one more pass: many for a tiny model, none for a large one.

    A pass costs about 10 ms before it computes anything, and a token 6 FLOPs per parameter, at 100 GFLOP/s or on an
    accelerator a hundred times that.
    """
    flops = 1e9 if device == "cpu" else 1e11
    return int(flops / (6 * sum(p.numel() for p in model.parameters())))


def token_budget(config: Any, device: str) -> int:
    """Tokens per micro-batch: what 1 GiB of activations holds on a CPU, 40 % of the free memory on a GPU."""
    per_token = activation_bytes(config)
    if device == "cuda":
        import torch

        return max(1024, int(0.4 * torch.cuda.mem_get_info()[0]) // per_token)
    return min(16384, max(512, 2**30 // per_token))
