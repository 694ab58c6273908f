"""Loss and metrics of a model, a run file or a finished run on held-out data."""

import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metier.core import config, models, part
from metier.core.answers import as_judge, ask, at_start, judged, ranking, report
from metier.core.batch import Pairs
from metier.core.config import Run
from metier.core.data.encode import Encoder
from metier.core.errors import UsageError
from metier.core.intervals import wilson
from metier.core.scores import evaluating
from metier.core.yamlfile import Document


@dataclass(frozen=True)
class Generate:
    """How held-out prompts are answered."""

    reward: Any = None
    """A reward part, as a run file names it."""
    prompts: int = 64
    answers: int = 4
    max_new_tokens: int = 64


OBJECTIVES = {"Labelled": "classify", "Preference": "dpo"}
"""What a bare model is evaluated with, by the type of the examples; everything else with next-token loss."""


def evaluate(
    target: str | Path, overrides: Iterable[str] = (), *, data: str | None = None, format: str = "auto",
    limit: int | None = None, objective: str | None = None, generate: Generate | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run folder (as it ended), a run file (as it starts), or a model.

    Pairs are also ranked (accuracy with interval, margins, length bias). ``generate`` lets the model answer the held-out
    prompts: distance to the reference, length, and with a reward part its mean and the win rate against the reference.

    ``data`` names other held-out data; a bare model needs it. Returns ``{"target", "step", "examples", "units", …metrics}``.
    Nothing is written.
    """
    from metier.core import checkpoint
    from metier.core.loop import Loop
    from metier.core.session import open_session

    folder = Path(target) if (Path(target) / "run.json").is_file() else None
    bare = folder is None and not str(target).endswith((".yaml", ".yml"))
    run, document = _settings(target, folder, overrides, data, format, limit, objective)
    with (
        tempfile.TemporaryDirectory() as aside,
        open_session(run, document, Path(aside) / "eval", quiet=True, handle_signals=False) as session,
    ):
        if bare and "reference" in session.resolved.needs and run.reference is None:
            raise UsageError(
                f"{session.resolved.objective.built.id} compares with a reference, and {target} alone would be its own",
                hint="Give reference=MODEL, or evaluate a run.",
            )
        step = checkpoint.resume(session, folder, data=data is None) if folder else None
        if folder and step is None:
            raise UsageError(f"{folder} holds no complete checkpoint")
        if not session.eval_layouts:
            raise UsageError("the run has no held-out data", hint="Give --data FILE.")
        measured = Loop(session).evaluate()
        more = _ranked(session) if session.resolved.reads is Pairs else {}
        if generate is not None:
            more |= _answered(session, generate)
        examples = sum(len(layout.ids) for layout in session.eval_layouts)
        units = sum(layout.target.numel() for layout in session.eval_layouts)
        kind = session.resolved.reads.__name__
    metrics = {k.removeprefix("eval_"): v for k, v in measured.items()}
    return {
        "target": str(target),
        "step": step,
        "examples": examples,
        "tokens with loss": units,
        **_extended(metrics, kind, examples),
        **more,
    }


def _ranked(session: Any) -> dict[str, Any]:
    """How the model ranks the held-out pairs. Margins are in nats: the objective's ``margin`` is of its own rewards."""
    ctx = session.context
    module = getattr(ctx.module, "module", ctx.module)
    with torch.no_grad(), evaluating(ctx.model), ctx.engine.autocast():
        found = ranking([module.score(x.to(ctx.engine.device)) for x in session.eval_layouts])
    return {k.replace("margin", "pair margin"): v for k, v in found.items()}


def _answered(session: Any, given: Generate) -> dict[str, Any]:
    """What the model answers to the held-out prompts. Raises ``UsageError`` for data without prompts."""
    ctx, found = session.context, session.held_out
    if not found or not hasattr(found[0], "prompt"):
        raise UsageError("the held-out data have no prompts to answer", hint="Use preference, prompt-completion or ranked data.")
    encoder = Encoder(ctx.bundle.tokenizer, max_length=ctx.run.data.max_length, truncate="error", on_empty="error")
    asked = ask(
        encoder, found, limit=given.prompts, number=given.answers, max_new_tokens=given.max_new_tokens, seed=ctx.run.train.seed
    )
    reference, start, switched = at_start(ctx)
    judge = others = None
    if given.reward is not None:
        judge = as_judge(part.build("reward", given.reward).obj)
        with switched():
            others = judged(start, asked, judge)
    measured = report(ctx.bundle, asked, reference=reference, judge=judge, others=others)
    return {f"answer {k.replace('_', ' ')}": v for k, v in measured.items()}


def _extended(metrics: dict[str, float], kind: str, examples: int) -> dict[str, Any]:
    """Perplexity for token losses; a 95 % Wilson interval for accuracies over examples."""
    out: dict[str, Any] = dict(metrics)
    if kind == "Tokens":
        out["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    if "accuracy" in metrics and kind in ("Labels", "Pairs", "Rewards"):
        out["accuracy 95 %"] = list(wilson(metrics["accuracy"] * examples, examples))
    return out


def _settings(
    target: str | Path, folder: Path | None, overrides: Iterable[str], data: str | None, format: str, limit: int | None,
    objective: str | None,
) -> tuple[Run, Document]:  # fmt: skip
    held = {"eval": data, "train": data, "format": format, "eval_fraction": 0.0} if data else {}
    if limit is not None:
        held["eval_limit"] = limit
    if folder is not None:
        from metier.core.trained import read_record

        record = read_record(folder)["run"]
        return config.load({**record, "data": {**record["data"], **held}}, overrides)
    if str(target).endswith((".yaml", ".yml")):
        return config.load(target, [*(f"data.{k}={v}" for k, v in held.items()), *overrides])
    models.check(str(target))
    if data is None:
        known = str(target).startswith("lab/") or str(target) in models.SHORT or Path(target).is_dir()
        what = (
            f"evaluating the model {target}" if known else f"{target} is no run folder and no run file; evaluating it as a model"
        )
        raise UsageError(f"{what} needs data", hint=f"metier eval {target} --data FILE")
    if objective is None:
        objective = _objective(str(target), data, format)
    run = {"model": str(target), "data": {"eval_limit": None, **held}, "objective": objective, "train": {"steps": 1}}
    return config.load(run, overrides)


def _objective(model: str, data: str, format: str) -> str:
    from metier.core.data.formats import examples
    from metier.core.data.rows import open_rows

    kind = type(examples(open_rows(data, limit=20), format)[0]).__name__
    if kind == "Preference" and _scores_texts(Path(model)):
        return "bradley-terry"
    return OBJECTIVES.get(kind, "lm")


def _scores_texts(folder: Path) -> bool:
    """Whether a model folder holds a classifier or reward model."""
    config = folder / "config.json"
    names = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    return bool(names) and names[0].endswith("ForSequenceClassification")


def harness(target: str, tasks: list[str], limit: int | None = None) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness on a model or run (``metier[eval]``). Raises ``UsageError`` without the extra."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UsageError("tasks need lm-evaluation-harness", hint="pip install 'metier[eval]'") from None
    from metier.core.trained import open_run

    bundle = open_run(target).bundle if (Path(target) / "run.json").is_file() else models.load(target)
    wrapped = HFLM(pretrained=bundle.model, tokenizer=bundle.tokenizer)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, limit=limit)
    return {
        "target": target,
        "tasks": {k: {m: v for m, v in r.items() if isinstance(v, int | float)} for k, r in found["results"].items()},
    }
