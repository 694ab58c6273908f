"""What every law must do: recover its own parameters from tables it made, and hold its declarations."""

from typing import Any

import numpy as np

from metier.core import laws
from metier.testing._sample import sample

ROWS = 60


def check(id: str) -> list[str]:
    """Run the suite on the law ``id``. Returns the names of the checks; raises ``AssertionError``."""
    law = sample(id).obj
    _declared(id, law)
    theta, x = typical(law), inputs(law)
    y = law.predict(theta, x)
    _prediction(id, law, theta, x, y)
    _starts(id, law, x, y)
    fitted = laws.fit(law, {**x, law.output: y}, bootstrap=0)
    refit = law.predict(fitted.theta, x)
    assert np.allclose(refit, y, rtol=1e-3), f"{id}: a table made by the law itself is not fitted: {fitted.values}"
    return ["declarations", "prediction", "starts", "fits its own table"]


def typical(law: Any) -> np.ndarray:
    """Parameter values of the law's ``typical`` attribute, else from its starts on a falling table."""
    if hasattr(law, "typical"):
        return np.array([law.typical[n] for n in law.names], dtype=float)
    x = inputs(law)
    begun = law.start(x, np.linspace(4.0, 2.0, ROWS))
    return np.asarray(begun[len(begun) // 2], dtype=float)


def inputs(law: Any) -> dict[str, np.ndarray]:
    """Random inputs over the law's ``ranges``, by default two decades."""
    rng = np.random.default_rng(0)
    ranges = getattr(law, "ranges", {})
    found = {}
    for name in law.inputs:
        low, high = ranges.get(name, (1e6, 1e9))
        found[name] = np.exp(rng.uniform(np.log(low), np.log(high), ROWS))
    return found


def _declared(id: str, law: Any) -> None:
    assert law.names, f"{id} names no parameter"
    assert set(law.bounds) == set(law.names), f"{id}: bounds are for {sorted(law.bounds)}"
    assert all(low < high for low, high in law.bounds.values()), f"{id}: an empty interval among the bounds"
    assert law.inputs, f"{id} reads no column"
    assert law.output not in law.inputs, f"{id}: the output is among the inputs"


def _prediction(id: str, law: Any, theta: np.ndarray, x: dict[str, np.ndarray], y: np.ndarray) -> None:
    assert y.shape == (ROWS,), f"{id}: predictions have shape {y.shape}"
    assert np.isfinite(y).all(), f"{id}: predictions are not finite"
    assert (y > 0).all(), f"{id}: predictions must be positive"
    few = law.predict(theta, {n: v[:3] for n, v in x.items()})
    assert np.allclose(few, y[:3], rtol=1e-12), f"{id}: a prediction depends on the other rows"
    logs = laws.log_prediction(law, theta, x)
    assert np.allclose(logs, np.log(y), atol=1e-9), f"{id}: log_predict is not the logarithm of predict"


def _starts(id: str, law: Any, x: dict[str, np.ndarray], y: np.ndarray) -> None:
    begun = law.start(x, y)
    assert len(begun), f"{id} offers no start"
    for theta in begun:
        assert len(theta) == len(law.names), f"{id}: a start has {len(theta)} values for {len(law.names)} parameters"
        assert np.isfinite(law.predict(np.asarray(theta, dtype=float), x)).all(), f"{id}: not finite at the start {theta}"
