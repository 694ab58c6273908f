"""What every optimizer part must satisfy, whatever its method."""

import copy
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from metier.core import part
from metier.core.errors import UsageError
from metier.core.optim import Optimizer, Rule, Step, build, default_lr

SHAPES = {
    "scalar": (),
    "vector": (5,),
    "matrix": (4, 6),
    "twin": (4, 6),
    "wide": (3, 9),
    "cube": (2, 3, 4),
    "conv": (2, 3, 2, 2),
}

BEYOND = ((Gt, "gt", (0, -1)), (Ge, "ge", (-1,)), (Lt, "lt", (0, 1)), (Le, "le", (1,)))


def check(id: str) -> list[str]:
    """Run every check on the part ``id`` with its default options. Returns their names.

    Raises ``AssertionError`` (or what the part raises) at the first that fails.
    """
    kind, _, name = id.partition("/")
    built = part.build(kind, name)
    assert isinstance(built.obj, Rule), f"{id} does not derive from metier.core.optim.Rule"
    for run in CHECKS:
        run(id, built.obj)
    return [run.__name__.removeprefix("_") for run in CHECKS]


# --- material ---------------------------------------------------------------------------------------


def _params(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    source = torch.Generator().manual_seed(1)
    return {n: nn.Parameter(torch.randn(s, generator=source).to(dtype)) for n, s in SHAPES.items()}


def _optimizer(rule: Rule, params: dict[str, nn.Parameter], **options: Any) -> Optimizer:
    optimizer = Optimizer(list(params.items()), rule, **{"lr": default_lr(rule), "weight_decay": 0.1, **options})
    # Stands for gradients on labels drawn from a model: any function of the weights that differs from the gradient.
    optimizer.sampler = lambda: (4, {id(p): p.detach().float().sin() for p in params.values()})
    return optimizer


def _step(rule: Rule, t: int, sampled: list[Tensor]) -> Step:
    wanted = rule.sample_every > 0 and (t - 1) % rule.sample_every == 0
    return Step(
        t=t, lr=1e-2, weight_decay=0.1, peak=2e-2, names=tuple(f"layer.{i}" for i in range(len(sampled))),
        loss=2.0, progress=t / 10, sampled=tuple(sampled) if wanted else None, samples=4,
    )  # fmt: skip


def _loss(params: dict[str, nn.Parameter]) -> Tensor:
    """A convex quadratic with its minimum at 3 and curvatures between 1 and 2."""
    total = torch.zeros(())
    for p in params.values():
        curvature = torch.linspace(1, 2, max(1, p.numel())).reshape(p.shape)
        total = total + (curvature * (p.float() - 3).square()).sum() / 2
    return total


def _closure(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> Callable[..., Tensor]:
    def closure(backward: bool = True) -> Tensor:
        optimizer.zero_grad()
        loss = _loss(params)
        if backward:
            loss.backward()
        return loss

    return closure


def _train(optimizer: Optimizer, params: dict[str, nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.step(_closure(optimizer, params))


def _same(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


# --- checks -----------------------------------------------------------------------------------------


def _ranges(id: str, rule: Rule) -> None:
    """Values outside the declared range of an option are refused."""
    kind, _, name = id.partition("/")
    for option in part.options(type(rule)).values():
        for value in _outside(option.annotation):
            try:
                part.build(kind, {name: {option.name: value}})
            except UsageError:
                continue
            raise AssertionError(f"{id} accepts {option.name} = {value}")


def _outside(annotation: Any) -> list[float]:
    if get_origin(annotation) is not Annotated:
        return [v for a in get_args(annotation) if get_origin(a) is Annotated for v in _outside(a)]
    out: list[float] = []
    for bound in annotation.__metadata__:
        for kind, name, offsets in BEYOND:
            if isinstance(bound, kind):
                out += [getattr(bound, name) + offset for offset in offsets]
    return out


def _shapes(id: str, rule: Rule) -> None:
    """Tensors of zero to four dimensions move, stay finite, and none depends on another."""
    params = _params()
    before = copy.deepcopy(params)
    _train(_optimizer(rule, params, weight_decay=0.0), params, 3)
    for name, p in params.items():
        assert torch.isfinite(p).all(), f"{name} is not finite"
        assert not torch.equal(p, before[name]), f"{name} does not move"
    if not hasattr(rule, "step"):
        for name in SHAPES:
            alone = {name: nn.Parameter(before[name].detach().clone())}
            _train(_optimizer(rule, alone, weight_decay=0.0), alone, 3)
            torch.testing.assert_close(alone[name], params[name], msg=f"{name} moves differently when alone")


def _missing_gradients(id: str, rule: Rule) -> None:
    """A parameter without a gradient stays, without state, and its count starts when it first moves."""
    if hasattr(rule, "step"):
        return
    params = _params()
    late, moving = {"twin": params.pop("twin")}, params
    optimizer = _optimizer(rule, {**moving, **late})
    before = late["twin"].detach().clone()
    _loss(moving).backward()
    optimizer.step()
    assert torch.equal(late["twin"], before), "a parameter without a gradient has moved"
    assert late["twin"] not in optimizer.state, "a parameter without a gradient has state"
    optimizer.zero_grad()
    _loss({**moving, **late}).backward()
    optimizer.step()
    assert optimizer.state[late["twin"]]["step"] == 1
    assert optimizer.state[moving["matrix"]]["step"] == 2


def _fused_is_plain(id: str, rule: Rule) -> None:
    """The implementation for whole lists (fused, foreach, stacked) gives what one tensor at a time gives."""
    if hasattr(rule, "step"):
        return
    source = torch.Generator().manual_seed(2)
    shapes = [s for s in SHAPES.values() if len(s) == 2 or not rule.matrices]
    fast = [torch.randn(s, generator=source) for s in shapes]
    plain = [p.clone() for p in fast]
    states, others = [rule.init(p) for p in fast], [rule.init(p) for p in plain]
    for t in range(1, 6):
        grads = [torch.randn(s, generator=source) for s in shapes]
        step = _step(rule, t, [g.sin() for g in grads])
        rule.apply(fast, [g.clone() for g in grads], states, step)
        rule.plain(plain, grads, others, step)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states, others, rtol=1e-5, atol=1e-6)


def _low_precision(id: str, rule: Rule) -> None:
    """bfloat16 parameters keep float32 state, and move as float32 ones rounded once."""
    params = _params(torch.bfloat16)
    wide = {n: nn.Parameter(p.detach().float()) for n, p in params.items()}
    optimizer, reference = _optimizer(rule, params), _optimizer(rule, wide)
    if hasattr(rule, "step"):
        return _train(optimizer, params, 1)
    for p, q in zip(params.values(), wide.values(), strict=True):
        p.grad = (p.detach().float() - 3).bfloat16()
        q.grad = p.grad.float()
    optimizer.step()
    reference.step()
    for name, p in params.items():
        assert torch.equal(p, wide[name].bfloat16()), f"{name}: computed in lower precision than float32"
        for key, value in optimizer.state[p].items():
            assert key == "step" or value.dtype != torch.bfloat16, f"state {key} is bfloat16"
    return None


def _resume(id: str, rule: Rule) -> None:
    """5 steps, saving, loading and 5 more are 10 steps, to the last bit, by either way of saving."""
    for dtype in (None, "bf16"):
        whole, first = _params(), _params()
        _train(_optimizer(rule, whole, state_dtype=dtype), whole, 10)
        optimizer = _optimizer(rule, first, state_dtype=dtype)
        _train(optimizer, first, 5)
        for way in ("state_dict", "full_state_dict"):
            copied = copy.deepcopy(first)
            fresh = _optimizer(rule, copied, state_dtype=dtype)
            getattr(fresh, f"load_{way}")(copy.deepcopy(getattr(optimizer, way)()))
            _train(fresh, copied, 5)
            _same(whole, copied)


def _groups(id: str, rule: Rule) -> None:
    """Every group keeps its own learning rate and weight decay, and ``build`` covers every parameter once."""
    if hasattr(rule, "step"):
        return
    lr = default_lr(rule)
    two = [{"params": [nn.Parameter(torch.ones(4, 6))], "lr": x, "weight_decay": w} for x, w in ((lr, 0.0), (0.0, 0.5))]
    optimizer = Optimizer(two, rule, lr=1.0)
    optimizer.sampler = lambda: (4, {})
    for _ in range(2):  # a rule may use its first gradient for its state only
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(4, 6)
        optimizer.step()
    assert not torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(4, 6)), "lr of a group has no effect"
    assert torch.equal(optimizer.param_groups[1]["params"][0], torch.ones(4, 6)), "a group with lr 0 moves"
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    built = part.build(*id.split("/"))
    optimizer = build(model, built, weight_decay=0.1)
    assert {id_ for g in optimizer.param_groups for id_ in g["param_names"]} == {n for n, _ in model.named_parameters()}
    assert all(g["initial_lr"] == g["lr"] for g in optimizer.param_groups)


def _descends(id: str, rule: Rule) -> None:
    """30 steps at the default learning rate lower a convex quadratic."""
    params = _params()
    before = _loss(params).item()
    _train(_optimizer(rule, params, weight_decay=0.0), params, 30)
    assert _loss(params).item() < before, "a convex quadratic has not fallen"


def _aliasing(id: str, rule: Rule) -> None:
    """A step leaves gradients as they were; neither they nor parameters share memory with the state."""
    if hasattr(rule, "step"):
        return
    params = _params()
    optimizer = _optimizer(rule, params)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(params).backward()
        grads = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
        optimizer.step()
        for name, p in params.items():
            assert p.grad is not None
            assert torch.equal(p.grad, grads[name]), f"the gradient of {name} has changed"
            taken = {p.grad.untyped_storage().data_ptr(), p.untyped_storage().data_ptr()}
            for key, value in optimizer.state[p].items():
                shared = isinstance(value, Tensor) and value.untyped_storage().data_ptr() in taken
                assert not shared, f"state {key} of {name} shares memory"


def _state(id: str, rule: Rule) -> None:
    """State holds tensors and numbers only; its size is reported and can be dropped; bf16 storage is no
    larger.
    """
    params = _params()
    optimizer = _optimizer(rule, params)
    _train(optimizer, params, 1)
    values = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    assert all(isinstance(v, Tensor | int | float) for v in values), "state holds more than tensors and numbers"
    assert optimizer.state_bytes() == sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    halved = _params()
    small = _optimizer(rule, halved, state_dtype="bf16")
    _train(small, halved, 1)
    assert small.state_bytes() <= optimizer.state_bytes()
    optimizer.drop_state(params.values())
    assert optimizer.state_bytes() == 0


CHECKS = (
    _ranges, _shapes, _missing_gradients, _fused_is_plain, _low_precision, _resume,
    _groups, _descends, _aliasing, _state,
)  # fmt: skip
