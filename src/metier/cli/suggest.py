"""``metier suggest objective``: what to try, from what is known of the data and what was seen in training."""

import typer

app = typer.Typer()


@app.command()
def suggest(
    kind: str = typer.Argument("objective", help="What to suggest; objective is what there is."),
    data: str = typer.Option("pairs", "--data", help="pairs, lists (of scored answers) or single (answers marked good or bad)."),
    noise: float = typer.Option(0.0, "--noise", min=0.0, max=0.5, help="Share of labels thought to be wrong."),
    scores: bool = typer.Option(False, "--scores", help="Pairs come with scores."),
    no_reference: bool = typer.Option(False, "--no-reference", help="There is no memory for a reference model."),
    length_bias: bool = typer.Option(False, "--length-bias", help="Answers grow longer without growing better."),
    chosen_falling: bool = typer.Option(False, "--chosen-falling", help="The chosen answers become less likely."),
    off_policy: bool = typer.Option(False, "--off-policy", help="The pairs are not what the model would write."),
    diversity: bool = typer.Option(False, "--diversity", help="Answers should stay diverse."),
    credit: bool = typer.Option(False, "--credit", help="Tokens should be told apart."),
    untuned: bool = typer.Option(False, "--untuned", help="Training starts from a base model."),
    limit: int = typer.Option(5, "--limit", min=1, help="How many."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Suggest preference objectives, with the reason and how to see that it holds."""
    from metier.cli.output import emit_json
    from metier.core import choose
    from metier.core.errors import unknown

    if kind != "objective":
        raise unknown("kind", kind, ["objective"])
    if data not in ("pairs", "lists", "single"):
        raise unknown("kind of data", data, ["pairs", "lists", "single"], where="--data")
    found = choose.suggest(
        paired=data == "pairs", scored_list=data == "lists", noise=noise, scores=scores, reference_affordable=not no_reference,
        length_bias=length_bias, chosen_falling=chosen_falling, off_policy=off_policy, diversity=diversity, credit=credit,
        untuned=untuned, limit=limit,
    )  # fmt: skip
    if json:
        return emit_json([s._asdict() for s in found])
    for s in found:
        print(f"{s.id}\n  why    {s.reason}\n  check  {s.check}")
    return None
