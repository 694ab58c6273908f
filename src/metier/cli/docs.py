"""``metier docs build`` and ``metier docs serve``: the documentation site."""

from pathlib import Path

import typer

OUT = typer.Option("site", "--out", "-o", help="Where to write.")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Build the documentation site, or show it.",
)


@app.command()
def build(
    out: Path = OUT,
    markdown: bool = typer.Option(False, "--markdown", help="Only the generated Markdown; needs no extra package."),
) -> None:
    """Write the site from docstrings, the catalogue and the findings. It can be opened from disk, offline."""
    from metier import docsite
    from metier.core.errors import UsageError

    if markdown:
        if out.exists() and any(out.iterdir()):
            raise UsageError(f"{out} is not empty", hint="Name a new folder with --out.")
        docsite.write(out)
        print(out)
        return
    n = docsite.build(out)
    print(f"{n} pages: {out / 'index.html'}")


@app.command()
def serve(
    port: int = typer.Option(8000, "--port", "-p", min=1, max=65535, help="Port on this machine."),
) -> None:
    """Build the site into a temporary folder and show it at http://localhost:PORT until Ctrl-C."""
    import functools
    import http.server
    import tempfile

    from metier import docsite
    from metier.core.errors import UsageError

    with tempfile.TemporaryDirectory() as folder:
        docsite.build(Path(folder) / "site")
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=f"{folder}/site")
        try:
            server = http.server.ThreadingHTTPServer(("localhost", port), handler)
        except OSError as e:
            raise UsageError(f"port {port} cannot be used: {e.strerror}", hint="Choose another with --port.") from None
        with server:
            print(f"http://localhost:{port}", flush=True)
            server.serve_forever()
