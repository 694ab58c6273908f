"""``metier runs``: what has been run here, and how two runs differ."""

import json as jsonlib
from pathlib import Path
from typing import Any

import typer

app = typer.Typer()


@app.command()
def runs(
    which: list[Path] = typer.Argument(None, help="Two run folders to compare; default: list all under --root."),
    root: list[Path] = typer.Option([Path("runs"), Path("comparisons")], "--root", help="Where to look."),
    json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """List runs and comparisons; with two folders, show how their settings and results differ."""
    from metier.cli.output import emit_json, table
    from metier.core.errors import UsageError

    if which:
        if len(which) != 2:
            raise UsageError("name two run folders, or none to list them")
        rows = _difference(_flat(_record(which[0])), _flat(_record(which[1])))
        if json:
            return emit_json([{"key": k, "first": a, "second": b} for k, a, b in rows])
        return table(["key", which[0].name, which[1].name], rows)
    found = [f for r in root for f in _listed(r)]
    if json:
        return emit_json(found)
    if not found:
        print(f"no runs under {', '.join(map(str, root))}")
        return None
    return table(
        ["folder", "what", "status", "step", "result"],
        [[f[k] for k in ("folder", "what", "status", "step", "result")] for f in found],
    )


def _listed(root: Path) -> list[dict[str, Any]]:
    out = []
    for path in sorted(root.glob("*/run.json")):
        record = _record(path.parent)
        metrics = record.get("metrics") or {}
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if v is not None and (k == "loss" or k.startswith("eval_")))
        out.append({
            "folder": str(path.parent), "what": "run", "status": record.get("status"),
            "step": f"{record.get('step', 0)}/{record.get('steps', '?')}", "result": shown,
        })  # fmt: skip
    for path in sorted(root.glob("*/comparison.json")):
        try:
            kept = jsonlib.loads(path.read_text(encoding="utf-8"))
            done = {"status": "done", "step": f"{len(kept['runs'])} runs", "result": ", ".join(a["name"] for a in kept["arms"])}
        except (ValueError, KeyError, TypeError):
            done = {"status": "unreadable", "step": "", "result": ""}
        out.append({"folder": str(path.parent), "what": "comparison", **done})
    return out


def _record(folder: Path) -> dict[str, Any]:
    from metier.core.errors import UsageError

    try:
        return jsonlib.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a run folder: it has no run.json") from None
    except ValueError as e:
        raise UsageError(f"{folder / 'run.json'} cannot be read: {e}") from None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _difference(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(k, a.get(k, "–"), b.get(k, "–")) for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
