"""The command line: one file per verb, imported only when the verb is used.

Exit codes: 0 ok, 1 failed, 2 bad usage, 3 the claim did not hold, 130/143 interrupted after a saved checkpoint.
"""

import importlib
import os
import sys
from typing import Any

from metier.cli.verbs import VERBS


def build():
    """The root command. Verbs are loaded when they are looked up."""
    import typer
    from typer.core import TyperGroup

    class Lazy(TyperGroup):
        def list_commands(self, ctx):
            return list(VERBS)

        def get_command(self, ctx, cmd_name):
            if cmd_name not in VERBS:
                return None
            return load(cmd_name)

        def resolve_command(self, ctx, args):
            from metier.core.errors import unknown

            if args and not args[0].startswith("-") and args[0] not in VERBS:
                raise unknown("verb", args[0], VERBS, more="See: metier --help")
            return super().resolve_command(ctx, args)

        def format_commands(self, ctx, formatter):
            with formatter.section("Verbs"):
                formatter.write_dl(list(VERBS.items()))

    app = typer.Typer(
        cls=Lazy, name="metier", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip

    def show_version(wanted: bool) -> None:
        if wanted:
            from importlib.metadata import version as installed

            print(installed("metier"))
            raise typer.Exit

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=show_version, help="Print the version."),
    ) -> None:
        """The tricks and trade of training LLMs: train with them, put them to a fair test, consult them."""

    return typer.main.get_command(app)


def load(verb: str):
    """The click command of one verb: ``app`` of ``metier.cli.<verb>``."""
    import typer

    module = importlib.import_module(f"metier.cli.{verb}_" if verb == "list" else f"metier.cli.{verb}")
    module.app._add_completion = False  # the root command has it
    module.app.rich_markup_mode = None
    command = typer.main.get_command(module.app)
    command.name = verb
    return command


def main(argv: list[str] | None = None) -> None:
    """Entry point: errors become one message and an exit code."""
    from metier.core.errors import MetierError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = build().main(args=argv, prog_name="metier", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except MetierError as e:
        print(f"metier: {e}", file=sys.stderr)
        code = e.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as e:
        code = _click_error(e)
    sys.exit(code)


def _click_error(e: Any) -> int:
    """Usage errors of the argument parser end in 2 with one line; anything else is a defect and shows its trace."""
    if hasattr(e, "format_message") and hasattr(e, "exit_code"):
        is_help = type(e).__name__ == "NoArgsIsHelpError"
        print(f"{'' if is_help else 'metier: '}{e.format_message()}", file=sys.stderr)
        return 2
    if type(e).__name__ in ("Exit", "Abort"):
        return getattr(e, "exit_code", 1)
    raise e
