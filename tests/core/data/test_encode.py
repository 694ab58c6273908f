"""Oracle of core/data/encode: the exact text that carries loss, decoded; what is cut, dropped and counted (F19, P10).

Bugs it is meant to catch: masks shifted by one, the end token without loss, prompts with loss, a begin token lost or doubled,
truncation that leaves nothing to predict from, drops that nobody hears of.
"""

import json

import numpy as np
import pytest
import templates as t

from metier.core.data.encode import Encoder, Item, chunks
from metier.core.data.formats import Chat, Completion, Judged, Labelled, Message, Preference, Ranked, Text
from metier.core.errors import UsageError

GSM = Completion(
    "Natalia sold 48 clips in April and half as many in May. How many altogether?",
    "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72", id="gsm8k:1",
)  # fmt: skip
ASKED = (Message("user", "one two"),)


def encoder(template=t.TEMPLATE, *, begin=False, max_length=1000, truncate="error", on_empty="error", labels=None):
    return Encoder(t.tokenizer(template, begin=begin), max_length=max_length, truncate=truncate, on_empty=on_empty, labels=labels)


def learnt(tokenizer, item):
    """Decoded targets: of the prompt, then of each answer."""
    first = item.prompt_loss.copy()
    first[:1] = False
    parts = [(item.prompt, first), *zip(item.answers, item.answer_loss, strict=True)]
    return [tokenizer.decode(ids[loss]) for ids, loss in parts]


def whole(tokenizer, item):
    return [tokenizer.decode(ids) for ids in (item.prompt, *item.answers)]


def test_gsm8k_with_a_template():
    encode = encoder()
    item = encode(GSM)
    assert learnt(encode.tokenizer, item) == [GSM.completion + "<|im_end|>"]
    assert whole(encode.tokenizer, item) == [
        f"<|im_start|>user\n{GSM.prompt}<|im_end|>\n<|im_start|>assistant\n{GSM.completion}<|im_end|>"
    ]
    assert item.id == "gsm8k:1"
    assert item.targets == len(encode.tokenizer(GSM.completion)["input_ids"]) + 1
    assert (item.prompt.dtype, item.prompt_loss.dtype) == (np.int32, bool)


def test_gsm8k_without_a_template():
    encode = encoder(None)
    item = encode(GSM)
    assert learnt(encode.tokenizer, item) == [GSM.completion + "<|end|>"]
    assert whole(encode.tokenizer, item) == [GSM.prompt + GSM.completion + "<|end|>"]


@pytest.mark.real
def test_gsm8k_row_as_it_stands(shared_data):
    row = json.loads((shared_data / "gsm8k-train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    encode = encoder()
    assert learnt(encode.tokenizer, encode(Completion(row["question"], row["answer"]))) == [row["answer"] + "<|im_end|>"]


def test_the_end_token_is_learnt_whatever_the_generation_marks_say():
    for template in (t.PLAIN_MARKS, t.OUTSIDE):
        encode = encoder(template)
        assert learnt(encode.tokenizer, encode(GSM)) == [GSM.completion + "<|im_end|>"]


def test_chat():
    chat = Chat((Message("system", "s"), *ASKED, Message("assistant", "b c"), Message("user", "d"), Message("assistant", "e")))
    encode = encoder()
    item = encode(chat)
    assert learnt(encode.tokenizer, item) == ["b c<|im_end|>e<|im_end|>"]
    assert whole(encode.tokenizer, item)[0].startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\none two<|im_end|>")
    first, second = np.flatnonzero(np.diff(item.prompt_loss.astype(int)) == 1) + 1
    assert encode.tokenizer.decode(item.prompt[first - 4 : first]).endswith("assistant\n")
    assert second > first


def test_text_and_its_context():
    encode = encoder()
    assert learnt(encode.tokenizer, encode(Text(text="a b"))) == [
        encode.tokenizer.decode(encode.tokenizer("a b")["input_ids"][1:]) + "<|end|>"
    ]
    item = encode(Text(text="a b", context="URL: x\n\n"))
    assert learnt(encode.tokenizer, item) == ["a b<|end|>"]
    assert whole(encode.tokenizer, item) == ["URL: x\n\na b<|end|>"]


def test_a_begin_token_stands_once_and_carries_no_loss():
    encode = encoder(None, begin=True)
    assert encode.begin == [encode.tokenizer.mask_token_id]
    for example, expected in (
        (Text(text="a b"), "a b<|end|>"),
        (Text(text="b", context="c "), "b<|end|>"),
        (GSM, GSM.completion + "<|end|>"),
    ):
        item = encode(example)
        assert learnt(encode.tokenizer, item) == [expected]
        assert item.prompt.tolist().count(encode.tokenizer.mask_token_id) == 1
        assert item.prompt[0] == encode.tokenizer.mask_token_id
    rendered = encoder(begin=True)(GSM)  # a template writes its own, if it wants one
    assert encode.tokenizer.mask_token_id not in rendered.prompt.tolist()


def test_preference():
    encode = encoder()
    item = encode(Preference(ASKED, "good", "very bad", 0.5, id="p:1"))
    assert whole(encode.tokenizer, item) == [
        "<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n",
        "good<|im_end|>",
        "very bad<|im_end|>",
    ]
    assert learnt(encode.tokenizer, item) == ["", "good<|im_end|>", "very bad<|im_end|>"]
    assert (item.label, item.id) == (0.5, "p:1")
    assert encode(Preference("one two", "good", "very bad")).prompt.tolist() == item.prompt.tolist()


def test_judged_and_ranked():
    encode = encoder(None)
    item = encode(Judged("q ", "a", True))
    assert (learnt(encode.tokenizer, item), item.label) == (["", "a<|end|>"], True)
    item = encode(Ranked("q ", ("a", "b", "c"), (1.0, 3.0, 2.0)))
    assert (learnt(encode.tokenizer, item), item.label) == (["", "a<|end|>", "b<|end|>", "c<|end|>"], (1.0, 3.0, 2.0))


def test_without_a_prompt_token_the_first_answer_token_is_no_target():
    item = encoder(None)._branches(Judged("", "a b", True), ("a b",), True)
    assert item.answer_loss[0].tolist()[0] is False
    assert item.answer_loss[0].tolist()[1:] == [True] * (len(item.answers[0]) - 1)


def test_messages_without_a_template_name_the_row():
    with pytest.raises(UsageError, match="rows:3") as e:
        encoder(None)(Chat((*ASKED, Message("assistant", "b")), id="rows:3"))
    assert "no chat template" in str(e.value)
    with pytest.raises(UsageError, match="rows:4"):
        encoder(None)(Completion(ASKED, "b", id="rows:4"))
    with pytest.raises(UsageError, match=r"rows:5.*System role"):
        encoder(t.ALTERNATING)(Completion((Message("system", "s"), *ASKED), "b", id="rows:5"))


# --- labels --------------------------------------------------------------------------------------------------


def test_labels():
    encode = encoder(labels={"neg": 0, "pos": 1}, begin=True)
    item = encode(Labelled("a b", None, "pos", id="l:1"))
    assert (item.label, item.targets, item.extra) == (1, 0, {})
    assert encode.tokenizer.decode(item.prompt) == "<|mask|>a b"
    with pytest.raises(UsageError, match=r"l:2.*unknown label 'positive'"):
        encode(Labelled("a", None, "positive", id="l:2"))
    assert encoder()(Labelled("a", None, "positive")).label == "positive"  # numbered by nobody


def test_a_pair_of_texts_has_segment_ids():
    item = encoder(labels={0: 0}, begin=True)(Labelled("a b", "c", 0))
    first = len(t.tokenizer()("a b")["input_ids"]) + 1
    assert item.extra["token_type_ids"].tolist() == [0] * first + [1] * (len(item.prompt) - first)


# --- length --------------------------------------------------------------------------------------------------

LONG = Completion("p " * 30, "a " * 10, id="long:1")


def cut(truncate, limit, example=LONG, **options):
    encode = encoder(None, max_length=limit, truncate=truncate, on_empty="drop", **options)
    return encode, encode(example)


def test_error():
    with pytest.raises(UsageError, match=r"long:1: \d+ tokens are more than data.max_length = 20"):
        cut("error", 20)


def test_drop_is_counted():
    encode, item = cut("drop", 20)
    assert item is None
    assert encode.summary() == "1 examples dropped: longer than 20 tokens (long:1)"
    assert cut("drop", 1000)[1] is not None


def test_right():
    encode, full = cut("right", 1000)
    limit = len(full.prompt) - 3
    encode, item = cut("right", limit)
    assert item.prompt.tolist() == full.prompt[:limit].tolist()
    assert item.prompt_loss.tolist() == full.prompt_loss[:limit].tolist()
    assert encode.summary() == f"1 examples cut to {limit} tokens (long:1)"


def test_right_that_cuts_all_targets_drops_with_both_counts():
    encode, item = cut("right", 10)
    assert item is None
    assert encode.summary() == "1 examples cut to 10 tokens (long:1), 1 examples dropped: no token carries loss (long:1)"


@pytest.mark.parametrize("begin", [False, True])
def test_left_prompt(begin):
    encode, full = cut("left-prompt", 1000, begin=begin)
    answer = full.prompt[full.prompt_loss]
    encode, item = cut("left-prompt", len(answer) + 4, begin=begin)
    kept = 4 - begin
    assert item.prompt.tolist() == [*encode.begin, *full.prompt[~full.prompt_loss][-kept:], *answer]
    assert item.targets == len(answer)
    encode, item = cut("left-prompt", 3, begin=begin)  # the answer alone is too long: one token before it, then its beginning
    before = encode.begin or [full.prompt[~full.prompt_loss][-1]]
    assert item.prompt.tolist() == [*before, *answer[:2]]
    assert item.prompt_loss.tolist() == [False, True, True]


def test_length_of_a_pair_is_that_of_its_longer_answer():
    pair = Preference("p " * 10, "a", "b " * 10)
    _, item = cut("error", 1000, pair)
    longest = len(item.prompt) + max(map(len, item.answers))
    assert item.length == len(item.prompt) + sum(map(len, item.answers)) > longest
    assert cut("error", longest, pair)[1] is not None
    with pytest.raises(UsageError):
        cut("error", longest - 1, pair)
    short = cut("left-prompt", longest - 2, pair)[1]
    assert short.prompt.tolist() == item.prompt[2:].tolist()
    assert [a.tolist() for a in short.answers] == [a.tolist() for a in item.answers]
    short = cut("right", longest - 2, pair)[1]
    assert [len(a) for a in short.answers] == [len(item.answers[0]), len(item.answers[1]) - 2]


def test_context_is_cut_before_the_text():
    example = Text(text="a b c", context="x " * 20)
    full = cut("error", 1000, example)[1]
    item = cut("left-prompt", full.targets + 2, example)[1]
    assert item.targets == full.targets
    assert item.prompt.tolist() == full.prompt[-full.targets - 2 :].tolist()


@pytest.mark.parametrize(("truncate", "length"), [("right", 5), ("left-prompt", 5), ("drop", None)])
def test_labelled_texts(truncate, length):
    example = Labelled("a " * 20, None, 0, id="l:1")
    encode, item = cut(truncate, 5, example, begin=True)
    assert (len(item.prompt) if item else None) == length
    if item:
        assert item.prompt[0] == encode.tokenizer.mask_token_id
    assert "1 examples" in encode.summary()
    exact = len(cut(truncate, 100, example, begin=True)[1].prompt)
    assert cut(truncate, exact, example, begin=True)[0].summary() is None
    with pytest.raises(UsageError, match="l:1"):
        cut("error", 5, example)


def test_nothing_with_loss():
    encode = encoder(None, on_empty="drop")
    encode.tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    barren = Item(np.array([1, 2], np.int32), np.zeros(2, bool), id="b:1")
    encode._encode = lambda e: barren
    assert encode("anything") is None
    assert encode.summary() == "1 examples dropped: no token carries loss"
    with pytest.raises(UsageError, match=r"no example is left.*2 dropped: no token carries loss"):
        encode.all(["anything"])


def test_nothing_with_loss_as_an_error():
    with pytest.raises(UsageError, match="long:1: no token of this example carries loss"):
        encoder(None, max_length=10, truncate="right", on_empty="error")(LONG)


# --- chunks --------------------------------------------------------------------------------------------------


def test_chunks_are_the_texts_end_to_end():
    encode = encoder(None)
    texts = [Text(text=x, id=f"t:{i}") for i, x in enumerate(["a b c d e f g", "h", "i j k l m n o p q r"])]
    blocks = list(chunks(encode, texts, 4))
    stream = [i for x in texts for i in [*encode.tokenizer(x.text)["input_ids"], encode.tokenizer.eos_token_id]]
    got = [i for b in blocks for i in b.prompt.tolist()]
    assert got == stream[: len(stream) // 4 * 4]
    assert all(len(b.prompt) == 4 and b.prompt_loss.all() and b.targets == 3 for b in blocks)
    assert len({b.id for b in blocks}) == len(blocks)


def test_chunks_keep_context_without_loss_and_leave_out_blocks_of_it():
    encode = encoder(None)
    text = Text(text="a b c d", context="x " * 12)
    blocks = list(chunks(encode, [text], 4))
    context = len(encode.tokenizer(text.context)["input_ids"])
    assert encode.counts["dropped: no token carries loss"] == context // 4
    assert "x" not in "".join(encode.tokenizer.decode(b.prompt[b.prompt_loss]) for b in blocks)
    assert all(b.targets for b in blocks)


def test_pairs_that_are_equal_once_cut_are_dropped():
    encode = encoder(None, max_length=4, truncate="right", on_empty="drop")
    encode.tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    assert encode(Preference("a b", "c d e f g x", "c d e f g y", id="f:3")) is None
    assert (
        encode.summary() == "1 examples cut to 4 tokens (f:3), 1 examples dropped: after cutting both answers are the same (f:3)"
    )


def test_a_template_without_end_of_turn_is_said_once_per_example():
    encode = encoder(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encode.tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    for n in range(5):
        encode(Preference("a", "b", "c", id=f"f:{n}"))
    said = "5 examples whose answers do not end with an end-of-turn token, so the model does not learn to stop (f:0, f:1, f:2, …)"
    assert encode.summary() == said


@pytest.mark.parametrize("template", [None, t.TEMPLATE])
def test_an_unfinished_answer_has_no_end_token(template):
    encode = encoder(template)
    if template is None:
        encode.tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    whole = encode(Ranked("a", ("b c", "d e"), (1.0, 0.0), id="f:1"))
    cut = encode(Ranked("a", ("b c", "d e"), (1.0, 0.0), (False, True), id="f:1"))
    np.testing.assert_array_equal(cut.answers[0], whole.answers[0])
    np.testing.assert_array_equal(cut.answers[1], whole.answers[1][:-1])
    assert len(cut.answer_loss[1]) == len(cut.answers[1])
