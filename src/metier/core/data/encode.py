"""Examples to token ids with a loss mask: one ``Item`` type for plain text, chats, pairs, lists and labelled texts."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metier.core.data import formats
from metier.core.data.formats import Message
from metier.core.data.template import Segment, render, segments
from metier.core.errors import UsageError, unknown

SHOWN = 3
"""Examples named beside a count."""
UNENDED = "whose answers do not end with an end-of-turn token, so the model does not learn to stop"
NO_LOSS = np.zeros(0, dtype=bool)


@dataclass(frozen=True)
class Item:
    """One encoded example. Lengths in tokens; a plain text or chat stands wholly in ``prompt``."""

    prompt: np.ndarray
    """int32 ids of branch 0."""
    prompt_loss: np.ndarray
    """bool: is this token a target?"""
    answers: tuple[np.ndarray, ...] = ()
    """int32 ids of branches 1, 2, …: each continues the prompt on its own."""
    answer_loss: tuple[np.ndarray, ...] = ()
    id: str = ""
    label: Any = None
    """Class index, desirability, margin, or scores per answer."""
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """Further inputs per token of prompt and answers, concatenated."""

    @property
    def length(self) -> int:
        """All tokens, of the prompt and of every answer."""
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def targets(self) -> int:
        """Tokens that carry loss; the first token of a sequence has nothing that predicts it."""
        return int(self.prompt_loss[1:].sum()) + sum(int(m.sum()) for m in self.answer_loss)


class Encoder:
    """Encodes examples for one tokenizer; what is cut or dropped is counted and can be said."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        truncate: str,
        on_empty: str,
        labels: dict[Any, int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        self.on_empty = on_empty
        self.labels = labels
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        """The first examples of each count."""
        self._unended = False
        self._special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
        self.begin = _begin(tokenizer)

    def __call__(self, example: Any) -> Item | None:
        """The item, or ``None`` when the options say that the example is dropped.

        Raises ``UsageError`` with the example's place for one that cannot be encoded.
        """
        self._unended = False
        try:
            encoded = self._encode(example)
            if self._unended:
                self._note(UNENDED, encoded.id if encoded else "")
            item = self._fit(encoded)
        except UsageError as e:
            raise e if e.where else UsageError(e.what, where=example.id or None, hint=e.hint) from None
        if item is not None and item.targets == 0 and not isinstance(example, formats.Labelled):
            if self.on_empty == "error":
                raise UsageError("no token of this example carries loss", where=example.id)
            self._note("dropped: no token carries loss", getattr(example, "id", ""))
            return None
        return item

    def _note(self, what: str, id: str) -> None:
        self.counts[what] += 1
        if id and len(self.places.setdefault(what, [])) < SHOWN:
            self.places[what].append(id)

    def all(self, examples: Iterable[Any]) -> list[Item]:
        """Encode many. Raises ``UsageError`` when nothing is left."""
        items = [i for i in map(self, examples) if i is not None]
        if not items:
            reasons = ", ".join(f"{n} {why}{self._where(why, n)}" for why, n in self.counts.items())
            raise UsageError(
                f"no example is left to train on ({reasons or 'there were none'})",
                hint="See: metier data check, data.max_length",
            )
        return items

    def summary(self) -> str | None:
        """What was dropped, cut or strange, in one line, with the first places."""
        return ", ".join(f"{n} examples {why}{self._where(why, n)}" for why, n in sorted(self.counts.items())) or None

    def _where(self, what: str, number: int) -> str:
        shown = self.places.get(what, [])
        return f" ({', '.join(shown)}{', …' if number > len(shown) else ''})" if shown else ""

    def prompt(self, prompt: formats.Prompt) -> np.ndarray:
        """Token ids of a prompt as it stands before an answer."""
        return self._prompt(prompt)[0]

    # --- by type -------------------------------------------------------------------------------------------------

    def _encode(self, e: Any) -> Item | None:
        match e:
            case formats.Text():
                return self.text(e)
            case formats.Chat():
                return self._plain(segments(self.tokenizer, e.messages), e.id)
            case formats.Completion():
                prompt, opened = self._prompt(e.prompt)
                answer = self._answer(e.prompt, e.completion, opened)
                return Item(_join(prompt, answer), _mask(len(prompt), len(answer)), id=e.id)
            case formats.Preference():
                return self._distinct(self._branches(e, (e.chosen, e.rejected, *e.samples), e.margin))
            case formats.Judged():
                return self._branches(e, (e.completion,), e.label)
            case formats.Ranked():
                return self._branches(e, e.completions, e.scores, e.unfinished)
            case formats.Crossed():
                return self._crossed(e)
            case formats.Labelled():
                return self._labelled(e)
        raise TypeError(f"cannot encode {type(e).__name__}")

    def text(self, e: formats.Text) -> Item:
        """A plain text with its end-of-text token; its context, if any, stands before it and carries no loss."""
        context = _array([*self.begin, *(self._ids(e.context) if e.context else ())])
        own = _array([*self._ids(e.text), self._end(e)])
        return Item(_join(context, own), _mask(len(context), len(own)), id=e.id)

    def _plain(self, parts: list[Segment], id: str) -> Item:
        encoded = [(self._ids(s.text), s.loss) for s in parts]
        ids = [i for piece, _ in encoded for i in piece]
        mask = [loss for piece, loss in encoded for _ in piece]
        return Item(_array(ids), np.array(mask, bool), id=id)

    def _branches(self, e: Any, answers: tuple[str, ...], label: Any, unfinished: tuple[bool, ...] = ()) -> Item:
        prompt, opened = self._prompt(e.prompt)
        ended = [self._answer(e.prompt, a, opened) for a in answers]
        marks = unfinished or (False,) * len(ended)
        ids = tuple(a[:-1] if cut and a[-1] in self._special else a for a, cut in zip(ended, marks, strict=True))
        unpredicted = int(len(prompt) == 0)  # nothing stands before the first token then
        loss = tuple(np.arange(len(a)) >= unpredicted for a in ids)
        return Item(prompt, np.zeros(len(prompt), bool), ids, loss, e.id, label)

    def _distinct(self, item: Item) -> Item:
        """A pair. Raises ``UsageError`` when both answers have the same tokens."""
        if np.array_equal(item.answers[0], item.answers[1]):
            raise UsageError("both answers have the same tokens", where=item.id)
        return item

    def _crossed(self, e: formats.Crossed) -> Item | None:
        """Every prompt followed by every answer, C² sequences row by row; only the answers carry loss.

        What is too long is dropped, never cut: an answer would end at different places under different prompts.
        """
        ids, loss = [], []
        for prompt in e.prompts:
            for completion in e.completions:
                encoded, opened = self._prompt(prompt)
                answer = self._answer(prompt, completion, opened)
                ids.append(_join(encoded, answer))
                loss.append(_mask(max(1, len(encoded)), len(answer) - (len(encoded) == 0)))
        if (longest := max(map(len, ids))) > self.max_length:
            if self.truncate == "error":
                self._cuts(longest, e.id)
            self._note(f"dropped: longer than {self.max_length} tokens", e.id)
            return None
        label = tuple(float(i == j) for i in range(len(e.prompts)) for j in range(len(e.prompts)))
        return Item(_array(()), NO_LOSS, tuple(ids), tuple(loss), e.id, label)

    def _labelled(self, e: formats.Labelled) -> Item | None:
        """A text or pair with its special tokens; the tokenizer cuts, so that these stay."""
        label = e.label if self.labels is None else self._class(e)
        encoded = self.tokenizer(e.text, e.pair, verbose=False, return_token_type_ids=True)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            if not self._cuts(length, e.id):
                return None
            encoded = self.tokenizer(e.text, e.pair, truncation=True, max_length=self.max_length, return_token_type_ids=True)
        ids = _array(encoded["input_ids"])
        extra = {} if e.pair is None else {"token_type_ids": np.array(encoded["token_type_ids"], np.int64)}
        return Item(ids, np.zeros(len(ids), bool), id=e.id, label=label, extra=extra)

    def _class(self, e: formats.Labelled) -> int:
        assert self.labels is not None
        if e.label not in self.labels:
            raise unknown("label", str(e.label), map(str, self.labels), where=e.id)
        return self.labels[e.label]

    def _prompt(self, prompt: str | tuple[Message, ...]) -> tuple[np.ndarray, str]:
        """Prompt ids, and the rendered prompt when there is a template."""
        if not self.tokenizer.chat_template and not isinstance(prompt, str):
            segments(self.tokenizer, prompt)
        if not self.tokenizer.chat_template:
            return _array([*self.begin, *self._ids(str(prompt))]), ""
        text = render(self.tokenizer, _turns(prompt), generation=True)
        return _array(self._ids(text)), text

    def _answer(self, prompt: str | tuple[Message, ...], answer: str, opened: str) -> np.ndarray:
        """What the model should write after the prompt, its end-of-turn token included."""
        if not opened:
            return _array([*self._ids(answer), self._end(prompt)])
        *_, last = (
            s for s in segments(self.tokenizer, (*_turns(prompt), Message("assistant", answer)), last_only=True) if s.loss
        )
        ids = self._ids(last.text)
        self._unended |= not ids or ids[-1] not in self._special
        return _array(ids)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _end(self, where: Any) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UsageError("the tokenizer has no end-of-text token", where=getattr(where, "id", None))
        return self.tokenizer.eos_token_id

    # --- length ----------------------------------------------------------------------------------------------------

    def _fit(self, item: Item | None) -> Item | None:
        if item is None:
            return None
        longest = len(item.prompt) + max(map(len, item.answers), default=0)
        if longest <= self.max_length:
            return item
        if not self._cuts(longest, item.id):
            return None
        if self.truncate == "right":
            cut = _cut_right(item, self.max_length)
        else:
            kept = len(self.begin) if item.prompt[: len(self.begin)].tolist() == self.begin else 0
            cut = _cut_prompt(item, self.max_length, kept)
        if len(cut.answers) > 1 and len(cut.answers[0]) and np.array_equal(cut.answers[0], cut.answers[1]):
            self._note("dropped: after cutting both answers are the same", item.id)
            return None
        return cut

    def _cuts(self, length: int, id: str) -> bool:
        """Whether an example of this length is to be cut (else dropped). Counts it; raises when neither is allowed."""
        if self.truncate == "error":
            raise UsageError(
                f"{length} tokens are more than data.max_length = {self.max_length}", where=id,
                hint="Raise data.max_length, or say what to do with data.truncate: drop | right | left-prompt.",
            )  # fmt: skip
        cuts = self.truncate != "drop"
        self._note(f"cut to {self.max_length} tokens" if cuts else f"dropped: longer than {self.max_length} tokens", id)
        return cuts


def _begin(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return full[:at]


def _turns(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _cut_right(item: Item, limit: int) -> Item:
    room = max(0, limit - len(item.prompt))
    return replace(
        item, prompt=item.prompt[:limit], prompt_loss=item.prompt_loss[:limit],
        answers=tuple(a[:room] for a in item.answers), answer_loss=tuple(m[:room] for m in item.answer_loss),
    )  # fmt: skip


def _cut_prompt(item: Item, limit: int, kept: int = 0) -> Item:
    """Cut from the left what comes before the first target, except ``kept`` beginning tokens; then, if need be, the end.

    One token before the first target always stays: the one that predicts it.
    """
    over = len(item.prompt) + max(map(len, item.answers), default=0) - limit
    first = int(np.argmax(item.prompt_loss)) if item.prompt_loss.any() else len(item.prompt)
    stop = kept + max(0, min(over, first - kept - (kept == 0)))
    ids, loss = (np.delete(a, np.s_[kept:stop]) for a in (item.prompt, item.prompt_loss))
    return _cut_right(replace(item, prompt=ids, prompt_loss=loss), limit)


def _array(ids: Iterable[int]) -> np.ndarray:
    return np.fromiter(ids, dtype=np.int32)


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([a, b])


def _mask(off: int, on: int) -> np.ndarray:
    return np.arange(off + on) >= off


def chunks(encoder: Encoder, examples: Iterable[Any], length: int) -> Iterator[Item]:
    """Texts concatenated, each with its end-of-text token, and cut into blocks of ``length``; what remains is left out.

    A block without a target (all of it context) is left out and counted.
    """
    ids, mask = np.zeros(0, np.int32), NO_LOSS
    number = 0
    for e in examples:
        text = encoder.text(e)
        ids, mask = np.concatenate([ids, text.prompt]), np.concatenate([mask, text.prompt_loss])
        for begin in range(0, len(ids) - length + 1, length):
            part = slice(begin, begin + length)
            block = Item(ids[part], mask[part], id=f"{e.id} block {number}")
            number += 1
            if block.targets:
                yield block
            else:
                encoder.counts["dropped: no token carries loss"] += 1
        cut = len(ids) // length * length
        ids, mask = ids[cut:], mask[cut:]
