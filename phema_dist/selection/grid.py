"""Which lengths to try: a grid of sigma_rels, then points that close in on the best one.

Pure: nothing here measures anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from phema_dist.errors import ProfileError
from phema_dist.profile import sigma_rel_to_gamma

_GOLDEN = (3 - math.sqrt(5)) / 2  # where golden-section search puts its next point
_FINE = 1.05  # neighbours this near to each other make averages that no metric tells apart
_DIGITS = (3, 6, 17)  # of a sigma_rel: as few as keep the points apart


def parse_grid(text: str) -> tuple[float, ...]:
    """Read LOW:HIGH:N, which is N sigma_rels that grow by a constant factor, or a list such as 0.05,0.1,0.2.

    Raises:
        ProfileError: it is neither, or a sigma_rel does not lie in (0, 0.28867].
    """
    try:
        if ":" not in text:
            found = [float(part) for part in text.split(",")]
        else:
            low, high, number = text.split(":")
            found = _geometric(float(low), float(high), int(number))
    except ProfileError:
        raise
    except ValueError as error:
        raise ProfileError(f"a grid must be LOW:HIGH:N or numbers with commas between them; got {text}.") from error
    return checked_grid(found)


def checked_grid(sigma_rels: list[float]) -> tuple[float, ...]:
    """The same, each once. Raises ProfileError where one does not exist, or there is none."""
    for sigma_rel in sigma_rels:
        sigma_rel_to_gamma(sigma_rel)
    if not sigma_rels:
        raise ProfileError("a grid must have at least one sigma_rel; got none.")
    return tuple(dict.fromkeys(sigma_rels))


def _geometric(low: float, high: float, number: int) -> list[float]:
    if number < 2 or not 0 < low < high:  # noqa: PLR2004  both ends
        raise ProfileError(
            f"a grid must go from a LOW above 0 up to a HIGH, in N >= 2 steps; got {low}:{high}:{number}."
        )
    sigma_rel_to_gamma(high)
    inner = [low * (high / low) ** (i / (number - 1)) for i in range(1, number - 1)]
    grids = ([low, *(float(f"{x:.{digits}g}") for x in inner), high] for digits in _DIGITS)
    return next((grid for grid in grids if len(set(grid)) == number and grid == sorted(grid)), [low, *inner, high])


def next_sigma_rel(losses: Mapping[float, float]) -> float | None:
    """The next one to try, in the wider gap beside the lowest loss, a golden section away from it.

    Args:
        losses: sigma_rel -> loss; inf where it was tried and there is none. Gaps are compared on a logarithmic scale.

    Returns:
        None if nothing has a loss, or the gaps on both sides are below 5%.
    """
    tried = sorted(losses)
    best = min(tried, key=lambda sigma_rel: losses[sigma_rel], default=math.nan)
    if not losses.get(best, math.inf) < math.inf:
        return None
    place = tried.index(best)
    beside = [*tried[max(place - 1, 0) : place], *tried[place + 1 : place + 2]]
    far = max(beside, key=lambda other: abs(math.log(other / best)), default=best)
    if abs(math.log(far / best)) <= math.log(_FINE):
        return None
    return float(f"{best * (far / best) ** _GOLDEN:.{_DIGITS[0]}g}")
