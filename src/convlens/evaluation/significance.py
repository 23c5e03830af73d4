"""Which of two nets, or of two recipes, is better, from what is said of the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convlens.evaluation.metrics import Z95


@dataclass(frozen=True)
class McNemarResult:
    """Two nets A and B on ``n`` images: each was right alone on some; on the others both were right, or both wrong."""

    n: int
    only_a: int  # images that A alone has right
    only_b: int

    @property
    def difference(self) -> float:
        """Accuracy of B minus that of A, -1..1."""
        return (self.only_b - self.only_a) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference: Wald's for pairs, half a pair added to each cell (Agresti, Min 2005)."""
        b, a, n = self.only_b + 0.5, self.only_a + 0.5, self.n + 2
        middle = (b - a) / n
        spread = Z95 * math.sqrt(max(b + a - (b - a) ** 2 / n, 0.0)) / n
        return max(middle - spread, -1.0), min(middle + spread, 1.0)

    @property
    def p_value(self) -> float:
        """Exact McNemar test: how probable is so uneven a share of the images that one alone has right, by chance?

        Twice the smaller tail of a binomial of ``only_a + only_b`` fair coins, at most 1.
        """
        total, fewer = self.only_a + self.only_b, min(self.only_a, self.only_b)
        tail = sum(math.comb(total, k) for k in range(fewer + 1))
        return min(2 * tail / (1 << total), 1.0)

    def verdict(self, a: str, b: str, level: float = 0.05) -> str:
        """Return the sentence that says which is better, in points of accuracy, or that these images cannot tell."""
        low, high = (100 * end for end in self.interval)
        points = f"{100 * self.difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}"
        proven, apart = self.p_value < level, low > 0 or high < 0
        if (proven or apart) and self.difference < 0:  # named first, and with a plus, is the better one
            return McNemarResult(self.n, self.only_b, self.only_a).verdict(b, a, level)
        if proven and apart:
            return f"{b} is better than {a}: {points}"
        if proven or apart:  # interval and test are two approximations
            return f"{b} may be better than {a}: {points}"
        return f"no difference between {a} and {b} that these {self.n:,} images show: {points}"


@dataclass(frozen=True, eq=False)
class SeedComparison:
    """Two recipes A and B, each trained with the same seeds and tested on the same images."""

    right_a: NDArray[np.bool_]  # (seeds, images)
    right_b: NDArray[np.bool_]

    @property
    def differences(self) -> NDArray[np.float64]:
        """(seeds, images): 1 where B alone is right, -1 where A alone is."""
        return self.right_b.astype(np.float64) - self.right_a.astype(np.float64)

    @property
    def difference(self) -> float:
        """Mean accuracy of B minus that of A, -1..1."""
        return float(self.differences.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference for other seeds and other images of the kind: Student's t, seeds - 1 degrees.

        The variance over seeds and the variance over images are added, each divided by its own number: what images
        make seeds differ by is counted twice, so the interval is rather too wide than too narrow.
        """
        found = self.differences
        seeds, images = found.shape
        variance = found.mean(axis=1).var(ddof=1) / seeds + found.mean(axis=0).var(ddof=1) / images
        from scipy.stats import t as student  # its import takes a second

        spread = float(student.ppf(0.975, seeds - 1)) * math.sqrt(variance)
        return max(self.difference - spread, -1.0), min(self.difference + spread, 1.0)

    def verdict(self, a: str, b: str) -> str:
        """Return the sentence that says which is better, in points of accuracy, or that it may be chance."""
        low, high = (100 * end for end in self.interval)
        if high < 0:  # named first, and with a plus, is the better one
            return SeedComparison(self.right_b, self.right_a).verdict(b, a)
        seeds, images = self.differences.shape
        told = f"{100 * self.difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}"
        told += f" ({seeds} fresh seeds each, {images:,} test images)"
        return f"{b} is better than {a}: {told}" if low > 0 else f"may be chance: {b} against {a} {told}"
