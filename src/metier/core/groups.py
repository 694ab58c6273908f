"""Parameter groups: which parameters of a model share a rule, a learning rate and a weight decay."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from metier.core.errors import UsageError, nearest, unknown

ROLES = ("matrices", "embeddings", "head", "tensors", "rest")
KEYS = ("lr", "lr_scale", "weight_decay")
Overrides = Mapping[str, Mapping[str, float]]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, without the prefix that ``torch.compile`` adds to names."""
    return {n.replace("_orig_mod.", ""): p for n, p in model.named_parameters() if p.requires_grad}


def roles(model: nn.Module) -> dict[str, str]:
    """The role of every trainable parameter.

    ``embeddings``: tables of ``nn.Embedding`` (a head tied to one counts as the table); ``head``: the output
    layer; ``matrices``: every other 2-D tensor, among them the factors of an adapter; ``tensors``: three and
    more dimensions; ``rest``: gains, biases and scalars.
    """
    tables, heads = _tables(model), _heads(model)

    def role(p: Tensor) -> str:
        if p.ndim < 2:
            return "rest"
        if id(p) in tables:
            return "embeddings"
        if id(p) in heads:
            return "head"
        return "matrices" if p.ndim == 2 else "tensors"

    return {name: role(p) for name, p in trainable(model).items()}


def _tables(model: nn.Module) -> set[int]:
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return {id(m.weight) for m in [*modules, _ask(model, "get_input_embeddings")] if hasattr(m, "weight")}


def _heads(model: nn.Module) -> set[int]:
    """Weights of the output layer; for classifiers, the linear layers beside the backbone that give the
    scores.
    """
    found = [_ask(model, "get_output_embeddings")]
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(backbone, nn.Module) and backbone is not model:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        for child in model.children():
            if child is not backbone:
                found += [m for m in child.modules() if type(m) is nn.Linear and (m is child or m.out_features == labels)]
    return {id(m.weight) for m in found if hasattr(m, "weight")}


def _ask(model: nn.Module, method: str) -> Any:
    """The module that a transformers-like model reports, or ``None``."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None


def overrides(groups: Overrides | None, role_of: Mapping[str, str]) -> dict[str, str]:
    """The key of ``groups`` that covers each parameter: a glob on names, or a role.

    Raises ``UsageError`` for an unknown setting, a key without a parameter, and two keys for one parameter.
    """
    chosen: dict[str, str] = {}
    for glob, settings in (groups or {}).items():
        _check_settings(glob, settings)
        matched = [n for n, role in role_of.items() if glob == role or fnmatchcase(n, glob)]
        if not matched:
            close = nearest(glob, [*role_of, *ROLES])
            raise UsageError(
                "no trainable parameter matches", where=f"groups.{glob}",
                hint=f"The nearest name is {close!r}." if close else "Give a glob on parameter names.",
            )  # fmt: skip
        for name in matched:
            if name in chosen:
                raise UsageError(f"{name} is matched by {chosen[name]!r} and {glob!r}", where="optimizer groups")
            chosen[name] = glob
    return chosen


def _check_settings(glob: str, settings: Mapping[str, float]) -> None:
    for key, value in settings.items():
        if key not in KEYS:
            raise unknown("setting of a parameter group", key, KEYS, where=f"groups.{glob}")
        if not value >= 0:
            raise UsageError(f"{key} = {value!r}: must be at least 0", where=f"groups.{glob}")
    if "lr" in settings and "lr_scale" in settings:
        raise UsageError("give lr or lr_scale, not both", where=f"groups.{glob}")


def split(model: nn.Module, *, lr: Mapping[str, float], weight_decay: float, groups: Overrides | None) -> list[dict[str, Any]]:
    """Parameter groups with named parameters, one for each role and override, in the order of :data:`ROLES`.

    ``lr`` is the peak learning rate of every role. ``rest`` has no weight decay unless an override gives one.
    """
    role_of = roles(model)
    covered = overrides(groups, role_of)
    made: dict[tuple[int, str], dict[str, Any]] = {}
    for name, p in trainable(model).items():
        role, glob = role_of[name], covered.get(name, "")
        key = (ROLES.index(role), glob)
        if key not in made:
            settings = (groups or {}).get(glob, {})
            made[key] = {
                "params": [], "role": role,
                "lr": settings.get("lr", lr[role] * settings.get("lr_scale", 1.0)),
                "weight_decay": settings.get("weight_decay", 0.0 if role == "rest" else weight_decay),
            }  # fmt: skip
        made[key]["params"].append((name, p))
    return [made[key] for key in sorted(made)]
