"""How many labels a canary needs, and how often chance alone promotes one: `python -m benchmarks.canary`.

Simulated requests: new right and old wrong in `--wins` of them, the other way round in `--losses`. Only disagreements
are labelled. Prints the labelled disagreements until the bet of `orchestrator.canary` says "better", for a service's
first and tenth canary; then how often canaries without any difference are called better within a horizon.
"""

from __future__ import annotations

import argparse
from fractions import Fraction

import numpy as np

from orchestrator.canary import HARM_ALPHA, evidence, level

MAX_LABELS = 600
CANARIES = 20_000
Array = np.ndarray


def boundary(alpha: float, most: int) -> Array:
    """Fewest wins among n labelled disagreements that are called better, by n = 0..most; n + 1 where none are."""
    fewest = np.empty(most + 1, dtype=np.int64)
    wins = 0
    for num in range(most + 1):
        wins = max(wins - 1, 0)
        while wins <= num and evidence(wins, num - wins) < 1.0 / alpha:
            wins += 1
        fewest[num] = wins
    return fewest


def play(p_win: float, alpha: float, most: int, canaries: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """(canaries,) labels until it was called better, and until worse; `most` + 1 where it was not in `most` labels."""
    better, worse = boundary(alpha, most), boundary(HARM_ALPHA, most)
    wins = np.cumsum(rng.random((canaries, most)) < p_win, axis=1)
    num = np.arange(1, most + 1)
    first = [_first(reached, most) for reached in (wins >= better[1:], num - wins >= worse[1:])]
    return first[0], first[1]


def _first(reached: Array, most: int) -> Array:
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, most + 1)


def upper_bound(count: int, num: int) -> float:
    """Exact one-sided 95% upper bound of a share (Clopper & Pearson 1934)."""
    from scipy.stats import beta

    return float(beta.ppf(0.95, count + 1, num - count)) if count < num else 1.0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wins", type=Fraction, default=Fraction("0.15"), help="share of requests")
    parser.add_argument("--losses", type=Fraction, default=Fraction("0.05"))
    parser.add_argument("--alpha", type=float, default=0.01, help="of the first canary")
    parser.add_argument("--canaries", type=int, default=CANARIES)
    parser.add_argument("--horizon", type=int, default=300, help="labels of a canary without difference")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, p_win = np.random.default_rng(args.seed), float(args.wins / (args.wins + args.losses))
    print(f"new right, old wrong {float(args.wins):g}; the other way round {float(args.losses):g}: wins {p_win:.2f}")
    for name, number, gains in (("first", 1, 0), ("tenth, 9 gains", 10, 9), ("tenth, no gain", 10, 0)):
        alpha = level(args.alpha, number, gains)
        better, worse = play(p_win, alpha, MAX_LABELS, args.canaries, rng)
        called = (better <= MAX_LABELS) & (better < worse)
        print(
            f"  {name} canary (alpha {alpha:.2g}): median {np.median(better):.0f}, 90% {np.quantile(better, 0.9):.0f} "
            f"labelled disagreements; called better {called.mean():.4f}, worse {(worse < better).mean():.4f}"
        )
    better, _ = play(0.5, args.alpha, args.horizon, args.canaries, rng)
    false = int((better <= args.horizon).sum())
    share, bound = false / args.canaries, upper_bound(false, args.canaries)
    print(
        f"no difference, {args.canaries} canaries of {args.horizon} labelled disagreements: called better {share:.4f}, "
        f"95% upper bound {bound:.4f} (alpha {args.alpha:g}; not stopped for harm)"
    )


if __name__ == "__main__":
    main()
