"""Is the new version better than the old? A bet on every labelled disagreement, valid whenever it is looked at. Pure.

Old and new answer the same inputs. Where they agree a label tells nothing of which is better, so only disagreements
are asked about: a *win* where the new version is right and the old one wrong, a *loss* the other way round. Were the
new one no better, a decided disagreement would be a win with probability p <= 1/2 at most.

The bet is the likelihood ratio of p against 1/2, averaged over p uniform in (1/2, 1). Its expectation is at most 1 for
any p <= 1/2, after any number of labels, so it ever reaches 1 / alpha with probability alpha at most (Ville 1939): one
may look after each label, stop when one likes, and go on later. All comparisons of a service's life share one error
budget: see `level`.

Called by `release` and `healing`; knows nothing of replicas or labels' ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

MAX_DECIDED = 5_000  # labelled disagreements that are counted; two versions that differ are told apart long before
HARM_ALPHA = 0.05  # chance that a version no worse than the old one is taken back by labels: that costs a heal, no harm


class Bet(StrEnum):
    """What labelled disagreements say so far."""

    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class PairedTest:
    """A new version against the one that it replaces.

    Attributes:
        digest: the new version.
        against: the old one.
        alpha: chance, at most, that a version which is no better is ever called better.
        wins: labelled disagreements in which the new version is right and the old one wrong.
        losses: the other way round. Disagreements in which both are wrong decide nothing and are not counted.
    """

    digest: str
    against: str
    alpha: float
    wins: int = 0
    losses: int = 0

    @property
    def outcome(self) -> Bet:
        """What the labels say, now or at any other time."""
        if evidence(self.wins, self.losses) >= 1.0 / self.alpha:
            return Bet.BETTER
        if evidence(self.losses, self.wins) >= 1.0 / HARM_ALPHA:
            return Bet.WORSE
        return Bet.UNDECIDED

    @property
    def full(self) -> bool:
        """True when no further label is counted: versions this alike are not told apart."""
        return self.wins + self.losses >= MAX_DECIDED

    def inequality(self) -> str:
        """The figures behind `outcome` in words."""
        counts = f"{self.wins} wins, {self.losses} losses in labelled disagreements"
        if self.outcome is Bet.WORSE:
            return f"{counts}: evidence of harm {evidence(self.losses, self.wins):.3g} >= {1.0 / HARM_ALPHA:.3g}"
        sign = ">=" if self.outcome is Bet.BETTER else "<"
        return f"{counts}: evidence of gain {evidence(self.wins, self.losses):.3g} {sign} {1.0 / self.alpha:.4g}"


@lru_cache(maxsize=4096)
def evidence(wins: int, losses: int) -> float:
    """The e-value of p > 1/2: the mean over p in (1/2, 1) of (2p)^wins (2 (1 - p))^losses; >= 0, 1 without labels.

    With n = wins + losses it is the sum of C(n + 1, i) over i <= wins, over (n + 1) C(n, wins): in whole numbers.

    Raises:
        ValueError: a negative count.

    Source: Robbins 1970, Statistical methods related to the law of the iterated logarithm (mixtures of bets);
        Ramdas et al. 2023, Game-theoretic statistics and safe anytime-valid inference.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"wins and losses must be >= 0; got {wins} and {losses}")
    num = wins + losses
    term = total = 1
    for i in range(1, wins + 1):
        term = term * (num + 2 - i) // i
        total += term
    numerator, denominator = total, (num + 1) * math.comb(num, wins)
    shift = max(numerator.bit_length() - denominator.bit_length() - 1000, 0)  # of what no float can hold
    return (numerator >> shift) / denominator if shift else numerator / denominator


def level(alpha: float, number: int, earlier_gains: int) -> float:
    """Alpha of a service's n-th comparison, so that false gains stay a small share of all gains it ever reports.

    alpha_n = alpha (1 + earlier gains) / n^2: the first has `alpha` itself; it falls as 1 / n in a service whose heals
    prove themselves, as 1 / n^2 in one whose heals do not. The false discovery rate over the whole life stays below
    alpha pi^2 / 6, however the comparisons depend on each other.

    Args:
        alpha: of the first comparison, in (0, 1).
        number: of this comparison, from 1.
        earlier_gains: how many of the earlier ones ended as better.

    Source: Xu & Ramdas 2024, Online multiple testing with e-values (e-LOND).
    """
    return alpha * (1 + earlier_gains) / number**2
