"""``metier chat RUN [PROMPT …]``."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def chat(
    run: Path = typer.Argument(..., help="The run folder."),
    prompts: list[str] = typer.Argument(None, metavar="[PROMPT]...", help="Prompts; without any, lines of standard input."),
    max_new_tokens: int = typer.Option(128, "--max-new-tokens", min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, "--temperature", min=0.0, help="0 is greedy."),
    seed: int = typer.Option(0, "--seed", help="Seed of sampling; base and tuned draw alike."),
    decode: list[str] = typer.Option([], "--decode", help="Decoding part: NAME, or 'NAME: {option: value}'; may be repeated."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Talk to the base and the tuned model side by side. Every prompt starts anew."""
    from metier.core import part
    from metier.core.trained import answer, open_run
    from metier.core.yamlfile import parse_value

    bound = [part.build("decode", parse_value(d)).obj for d in decode]
    trained = open_run(run)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "decode": bound}
    tokenizer = trained.bundle.tokenizer
    said: list[dict[str, Any]] = []
    for prompt in prompts or _lines():
        with trained.base() as model:
            base = answer(model, tokenizer, prompt, **settings)
        tuned = answer(trained.bundle.model, tokenizer, prompt, **settings)
        said.append({"prompt": prompt, "base": base, "tuned": tuned})
        if not json:
            _show(said[-1], echo=bool(prompts) or not sys.stdin.isatty())
    if json:
        from metier.cli.output import emit_json

        emit_json(said)


def _lines() -> Iterator[str]:
    """Prompts from a terminal (until an empty line or Ctrl-D), or every line that is not empty from a
    pipe."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    print("An empty line ends.", file=sys.stderr)
    while True:
        try:
            line = input("you    > ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _show(turn: dict[str, Any], *, echo: bool) -> None:
    if echo:
        print(f"prompt | {turn['prompt']}")
    for side in ("base", "tuned"):
        first, *more = turn[side].strip().splitlines() or [""]
        print(f"{side:<6} | {first}", *more, sep="\n       | ")
    print(flush=True)
