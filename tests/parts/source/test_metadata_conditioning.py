"""Oracle of source/metadata-conditioning: what a document becomes, and when.

Bugs it is meant to catch: the cooldown at the wrong end, metadata kept in the text (with loss), metadata lost
from the example, the domain of a URL cut wrongly, an order that depends on progress.
"""

import numpy as np
import pytest

from metier.core import part
from metier.core.data.formats import Chat, Message, Text
from metier.core.errors import UsageError
from metier.testing import check_part

DOCS = {
    "web": [Text(text=f"document {i}", id=f"web:{i}", meta={"url": f"https://en.wiki{i}.org/x?y", "n": i}) for i in range(20)]
}


def built(**options):
    return part.build("source", {"metadata-conditioning": {"field": "url", **options}}).obj


def stream(source, progress, docs=DOCS):
    return list(source.stream(docs, epoch=0, rng=np.random.default_rng(0), progress=progress))


def test_contract():
    check_part("source/metadata-conditioning")


def test_a_document_goes_behind_its_metadata():
    got = built(show="domain").condition(DOCS["web"][3])
    assert got == Text("document 3", "URL: en.wiki3.org\n\n", id="web:3", meta={"url": "https://en.wiki3.org/x?y", "n": 3})


def test_nine_tenths_then_nothing():
    got = []
    for e in built().stream(DOCS, epoch=0, rng=np.random.default_rng(0), progress=lambda: len(got) / 20):
        got.append(e)
    assert [bool(e.context) for e in got] == [True] * 18 + [False] * 2
    assert sorted(e.id for e in got) == sorted(e.id for e in DOCS["web"])


def test_order_does_not_depend_on_progress():
    early, late = (stream(built(), lambda p=p: p) for p in (0.0, 1.0))
    assert [e.id for e in early] == [e.id for e in late]
    assert all(e.context for e in early)
    assert not any(e.context for e in late)
    assert [e.text for e in early] == [e.text for e in late]


@pytest.mark.parametrize(
    ("value", "domain"),
    [("https://en.wikipedia.org:443/wiki/A?b#c", "en.wikipedia.org"), ("//Host.com/a", "host.com"),
     ("lib/json/x.py", "lib"),
     ("/usr/lib", "usr"), ("plain", "plain")],
)  # fmt: skip
def test_domain(value, domain):
    text = Text(text="t", id="a:0", meta={"url": value})
    assert built(show="domain", template="{}|").condition(text).context == f"{domain}|"


def test_long_metadata_are_cut_and_braces_are_harmless():
    text = Text(text="t", id="a:0", meta={"url": "{0}" * 50})
    assert built(max_chars=5, template="<{}>").condition(text).context == "<{0}{0>"


def test_missing_metadata():
    bare = Text(text="t", id="a:7", meta={"link": "x"})
    with pytest.raises(UsageError, match="a:7"):
        built().condition(bare)
    assert built(missing="plain").condition(bare) is bare


def test_refusals():
    with pytest.raises(UsageError, match="once"):
        built(template="URL")
    with pytest.raises(UsageError, match="Chat"):
        built().condition(Chat((Message("user", "a"), Message("assistant", "b")), id="c:0"))


def test_tokens_of_the_metadata_carry_no_loss():
    """Through the encoder: only the document's own tokens are targets."""
    from metier.core.data.encode import Encoder
    from metier.lab.tokenizer import lab_tokenizer

    tokenizer = lab_tokenizer()
    plain = DOCS["web"][0]
    encode = Encoder(tokenizer, max_length=100, truncate="error", on_empty="error")
    first, second = (encode(e) for e in (built().condition(plain), plain))
    assert tokenizer.decode(first.prompt[first.prompt_loss]) == tokenizer.decode(second.prompt[second.prompt_loss])
    assert tokenizer.decode(first.prompt).startswith("URL: https://en.wiki0.org/x?y\n\n")
