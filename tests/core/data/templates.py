"""Tokenizers for the data tests: the lab's, with other templates and with a begin-of-text token."""

import copy
from typing import Any

from metier.lab.tokenizer import TEMPLATE, lab_tokenizer

PLAIN_MARKS = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The lab's template without generation marks."""
OUTSIDE = TEMPLATE.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}", 1)
"""Its generation marks leave the end-of-turn token out."""
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""No end-of-turn token at all."""
REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Drops the reasoning of earlier turns, as reasoning models do."""
ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN_MARKS
)
DEFAULT_SYSTEM = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}" + PLAIN_MARKS
"""Puts a system message of its own first."""


def tokenizer(template: str | None = TEMPLATE, *, begin: bool = False) -> Any:
    """The lab's tokenizer with ``template``; with ``begin`` it puts ``<|mask|>`` before each text."""
    found = copy.deepcopy(lab_tokenizer())
    found.chat_template = template
    if begin:
        from tokenizers.processors import TemplateProcessing

        found.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|mask|> $A", pair="<|mask|> $A $B:1", special_tokens=[("<|mask|>", found.mask_token_id)]
        )
    return found
