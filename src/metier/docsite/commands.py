"""The command-line page, read from the verbs themselves."""

import importlib.util
from typing import Any

from metier.docsite.text import escape, table

HIDDEN = {"help", "install_completion", "show_completion"}
EXIT = {
    "0": "done", "1": "failed, or a check found something", "2": "the command, a file or an option is wrong",
    "3": "the claim did not hold", "130, 143": "stopped by Ctrl-C or SIGTERM after a complete checkpoint",
}  # fmt: skip
COMPLETION = """## Completion in the shell

`metier --install-completion` adds completion of verbs and options for bash, zsh, fish or PowerShell to your
shell's start file; open a new shell afterwards. `metier --show-completion` prints the script instead:

```sh
metier --show-completion > ~/.metier-completion.bash && echo 'source ~/.metier-completion.bash' >> ~/.bashrc
```
"""


def page() -> str:
    """``commands.md``."""
    out = [
        "# Command line",
        "Every verb has `--help`; most have `--json`. After a run file or a design, `key=value` changes a setting.",
        table(["verb", "what it does"], [[f"[{v}](#{v})", escape(text)] for v, text in written().items()]),
        "## Exit codes",
        table(["code", "meaning"], [[k, v] for k, v in EXIT.items()]),
        COMPLETION.strip(),
    ]
    for verb in written():
        out += _verb(verb)
    return "\n\n".join(out) + "\n"


def written() -> dict[str, str]:
    """Verbs whose file exists, with their summaries."""
    from metier.cli import VERBS

    return {v: t for v, t in VERBS.items() if importlib.util.find_spec(f"metier.cli.{v}_" if v == "list" else f"metier.cli.{v}")}


def _verb(verb: str) -> list[str]:
    from metier.cli import load

    command = load(verb)
    subs: dict[str, Any] = getattr(command, "commands", {})
    out = [f"## {verb}", escape(_help(command))]
    if not subs:
        return [*out, *_usage(command, f"metier {verb}")]
    for name, sub in subs.items():
        out += [f"### {verb} {name}", escape(_help(sub)), *_usage(sub, f"metier {verb} {name}")]
    return out


def _help(command: Any) -> str:
    return " ".join((command.help or "").split())


def _usage(command: Any, path: str) -> list[str]:
    import typer

    context = typer.Context(command, info_name=path)
    shown = [p for p in command.params if p.name not in HIDDEN]
    words = [_place(p) for p in shown if p.param_type_name == "argument"]
    usage = " ".join([path, "[options]" if len(words) < len(shown) else "", *words]).replace("  ", " ")
    rows = [[f"`{_name(p)}`", escape(p.help or ""), _default(p, context)] for p in shown]
    return [
        f"```text\n{usage.strip()}\n```",
        *([table(["argument or option", "meaning", "default"], rows)] if rows else []),
    ]


def _place(param: Any) -> str:
    name = (param.metavar or param.name).strip("[].").upper()
    many = "…" if param.nargs == -1 else ""
    return f"{name}{many}" if param.required else f"[{name}{many}]"


def _name(param: Any) -> str:
    return _place(param).strip("[]") if param.param_type_name == "argument" else ", ".join(param.opts)


def _default(param: Any, context: Any) -> str:
    value = param.get_default(context, call=True)
    if param.required:
        return "required"
    if value is None or value is False or value in ((), []):
        return ""
    values = value if isinstance(value, list | tuple) else [value]
    return ", ".join(f"`{v}`" for v in values)
