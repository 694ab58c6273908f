"""``metier check PART``: is the implementation sound, and does the paper's claim hold here?"""

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def check(
    part: str | None = typer.Argument(None, help="A part, such as optimizer/muon, or a study, such as study/soap."),
    all_parts: bool = typer.Option(False, "--all", help="Every part with a study, stalest finding first."),
    minutes: float = typer.Option(30.0, "--minutes", min=0.1, help="With --all: start no study that would end later."),
    contract: bool = typer.Option(False, "--contract", help="Only the contract suite of the part's kind; no study."),
    seeds: int | None = typer.Option(None, "--seeds", min=1, help="Other seeds than designed: a trial, kept out of findings/."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder of the comparison."),
    quick: bool = typer.Option(False, "--quick", help="A study at tiny sizes, kept out of findings/: does it run?"),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> int:
    """Run a part's contract suite, then its study; or one study. Exit code 3 when the claim did not hold."""
    from metier.cli.output import emit_json
    from metier.compare.check import Checked, check, check_all
    from metier.core.errors import MetierError, UsageError

    def tell(c: Checked) -> None:
        if not json:
            _say(c)

    if all_parts == (part is not None):
        raise UsageError("name one part, or give --all")
    if part is not None and part.startswith("study/"):
        return _study(part.removeprefix("study/"), quick, out, json)
    try:
        done = (
            check_all(minutes, each=tell) if part is None else [check(part, seeds=seeds, study=not contract, out=out, quiet=json)]
        )
    except AssertionError as e:
        raise MetierError(str(e)) from e
    if part is not None:
        tell(done[0])
    if json:
        emit_json([_plain(c) for c in done])
    return 3 if any(c.verdict is not None and c.word != "holds" for c in done) else 0


def _study(name: str, quick: bool, out: Path | None, json: bool) -> int:
    from dataclasses import asdict

    from metier.cli.output import emit_json
    from metier.compare import study

    outcome, place = study.run(name, quick=quick, folder=out, quiet=json)
    if json:
        emit_json(
            {"study": name, "verdict": outcome.verdict, "checks": [asdict(c) for c in outcome.checks], "finding": str(place)}
        )
    else:
        print(f"study/{name}: {outcome.verdict}. {outcome.text}")
        for c in outcome.checks:
            print(f"  {'✓' if c.holds else '✗'} {c.text}: expected {c.expected}, seen {c.observed}")
        print(f"  finding: {place}")
    return 0 if outcome.verdict == "holds" else 3


def _say(c) -> None:
    print(f"{c.name}: {len(c.contract)} contract checks passed")
    if c.verdict is None:
        print("  no study: nothing is claimed that this kind can test here" if not c.claim else f"  claim not tested: {c.claim}")
        return
    print(f"  claim: {c.claim}\n  {c.word}: {c.verdict.text}\n  finding: {c.finding}\n  report: {c.report}")


def _plain(c) -> dict:
    from dataclasses import asdict

    return {
        "part": c.name, "contract": list(c.contract), "claim": c.claim, "verdict": asdict(c.verdict) if c.verdict else None,
        "word": c.word, "finding": str(c.finding) if c.finding else None,
    }  # fmt: skip
