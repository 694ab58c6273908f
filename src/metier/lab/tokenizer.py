"""The lab's tokenizer: byte-level BPE trained once on the lab corpus and cached; ChatML turns with generation marks."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = 2048
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<|mask|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE_BYTES = 1_500_000


@cache
def lab_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` with 2048 entries; trained in seconds the first time, then read from the cache."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(_trained()), eos_token="<|end|>", pad_token="<|pad|>", mask_token="<|mask|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def _trained() -> Path:
    from filelock import FileLock

    from metier.core.cache import cache_folder
    from metier.lab.corpus import documents

    texts = [d["text"] for d in documents("lab/pydoc")]
    texts = [t for t, end in zip(texts, _running_total(texts), strict=True) if end <= SAMPLE_BYTES]
    key = hashlib.sha256(f"{VOCABULARY}{SPECIAL}1".encode() + "\0".join(texts).encode()).hexdigest()[:16]
    path = cache_folder() / "lab" / f"tokenizer-{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _train(texts, path)
    return path


def _running_total(texts: list[str]) -> list[int]:
    import itertools

    return list(itertools.accumulate(len(t) for t in texts))


def _train(texts: list[str], path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    aside = path.with_suffix(".tmp")
    tokenizer.save(str(aside))
    aside.replace(path)
