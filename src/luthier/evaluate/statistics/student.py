"""Student's t for any degrees of freedom, fractions included, without a library of distributions."""

from __future__ import annotations

from functools import lru_cache
from math import atan, pi, sqrt, tan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEPS = 20_000
NORMAL = 10_000.0
"""From here on Student's t is the normal distribution to four digits."""


def quantile(level: float, freedom: float) -> float:
    """The t below which `level` (0.5 or more) of Student's distribution lies; to four digits from 1 degree up."""
    import numpy as np

    freedom = min(freedom, NORMAL)
    angle = float(np.interp(2.0 * level - 1.0, _shares(freedom), _angles()))
    return sqrt(freedom) * tan(angle)


def tail(t: float, freedom: float) -> float:
    """The share of Student's distribution beyond `t` on both sides: a two-sided p."""
    import numpy as np

    freedom = min(freedom, NORMAL)
    return float(1.0 - np.interp(atan(abs(t) / sqrt(freedom)), _angles(), _shares(freedom)))


def _angles() -> NDArray[np.float64]:
    import numpy as np

    return np.linspace(0.0, pi / 2.0, STEPS + 1)


@lru_cache(maxsize=8)
def _shares(freedom: float) -> NDArray[np.float64]:
    """The share within ±t at each angle: t = sqrt(freedom) tan(angle) turns the density into cos(angle)^(freedom - 1)
    (Abramowitz & Stegun 1964, section 26.7)."""
    import numpy as np

    angles = _angles()
    middles = (angles[1:] + angles[:-1]) / 2.0
    area = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1.0))])
    shares: NDArray[np.float64] = area / area[-1]
    return shares
