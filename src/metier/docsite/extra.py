"""Home, recipes, leaderboards and findings."""

import json
from collections import Counter
from pathlib import Path

from metier.core.part import KINDS
from metier.docsite.facts import Facts, read_result
from metier.docsite.rowpages import counts
from metier.docsite.text import bullets, escape, link_parts, table


def home(facts: Facts) -> str:
    """``index.md``: the README's opening, then what there is."""
    kinds = Counter(p.kind for p in facts.parts)
    listed = ", ".join(f"{kinds[k]} [{k}](parts/index.md#{k})" for k in KINDS if kinds[k])
    return "\n\n".join([
        "# metier",
        opening(facts.root / "README.md"),
        "## Start",
        bullets([
            "**Try it**: the [tour](tour.md), ten minutes, no download beyond the installation.",
            "**Train**: take a [recipe](recipes.md) and put your model and data in it.",
            "**Look something up**: the [parts](parts/index.md) with their options and formulas, the "
            "[reading list](rows/index.md) with each paper's claim.",
            "**Command line**: [every verb and option](commands.md).",
            "**Know its limits**: [what metier does not do](limits.md).",
        ]),
        "## What there is",
        f"{len(facts.parts)} parts: {listed}.",
        f"{counts(facts.statuses)} — see the [reading list](rows/index.md).",
        f"{len(facts.findings)} findings — see [findings](findings.md).",
        "## What a comparison ends with",
        "![A report: verdict, interval and costs](images/report.png){ width=560 }",
    ]) + "\n"  # fmt: skip


def opening(readme: Path) -> str:
    """The paragraphs of a README between its title and its first heading, without pictures."""
    body = readme.read_text(encoding="utf-8").split("\n## ")[0].split("\n", 1)[1]
    return "\n\n".join(p.strip() for p in body.split("\n\n") if p.strip() and not p.strip().startswith("!["))


def recipes(facts: Facts) -> str:
    """``recipes.md``: every recipe whole; its leading comment lines say what it is."""
    out = [
        "# Recipes",
        "Run files and designs in `recipes/`, ready to use. Every value can be changed on the command line: `key=value`.",
    ]
    for path in sorted((facts.root / "recipes").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        n = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        comment = [line.lstrip("# ") for line in lines[:n]]
        words = [c for c in comment if not c.startswith("metier ")]
        orders = "\n".join(c for c in comment if c.startswith("metier "))
        out += [f"## {path.stem}", escape(" ".join(words))]
        out += [f"```sh\n{orders}\n```"] if orders else []
        out.append(f'```yaml title="recipes/{path.name}"\n' + "\n".join(lines[n:]) + "\n```")
    return "\n\n".join(out) + "\n"


def leaderboards(facts: Facts) -> str:
    """``leaderboards.md``: comparisons of all parts of a kind, ranked."""
    from metier.compare import leaderboard

    out = [
        "# Leaderboards",
        "Every part of a kind on the same lab model and data, each with its own search by the same rule. Tiny models and short "
        "runs: a ranking here says what is sound and roughly where it stands, not what wins at scale. Times were taken with "
        "two runs side by side and are rough.",
    ]
    for path in sorted((facts.root / "findings" / "leaderboard").glob("*.json")):
        result = read_result(json.loads(path.read_bytes()))
        out += [
            f"## {path.stem} {{ #{path.stem} }}",
            escape(result.question),
            leaderboard.markdown(result),
            escape(leaderboard.caption(result)),
            bullets(
                [
                    f"{result.budget.amount:,.0f} {result.budget.kind} per run, seeds {', '.join(map(str, result.seeds))}, "
                    f"made {result.created[:10]}.",
                    *(escape(n) for n in result.notes),
                ]
            ),
        ]
    return "\n\n".join(out) + "\n"


def findings(facts: Facts) -> str:
    """``findings.md``: every committed result, whatever it says."""
    out = [
        "# Findings",
        "Results of comparisons that were run with this code. Negative and inconclusive ones are listed like "
        "the others. The word is read off the 95 % interval of the paired difference: **holds** (beyond the "
        "smallest effect that counts), **direction** (better, but not by that much), **unclear** (the "
        "interval holds no difference), **against** (worse). A study of several predictions says **partly** when "
        "some of them held.",
    ]
    if not facts.findings:
        out.append("None is committed yet.")
    for f in facts.findings:
        parts = ", ".join(f"`{p}`" for p in f.parts)
        rows = [[escape(k), escape(v)] for k, v in f.facts] + ([["parts", link_parts(parts, facts.ids, "")]] if parts else [])
        anchor = f.name.replace("/", "-")
        out += [
            f"## {escape(f.name)} {{ #{anchor} }}",
            escape(f.question),
            bullets(f.sentences),
            table(["", ""], rows) if rows else "",
        ]
    return "\n\n".join(b for b in out if b) + "\n"
