"""Significance tests: is one model, or one recipe, better than another on the same images?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convlens.evaluation.metrics import Z95


@dataclass(frozen=True)
class McNemarResult:
    """The paired comparison of two models A and B on ``n`` images."""

    n: int
    only_a: int  # images that only A classifies correctly
    only_b: int

    @property
    def difference(self) -> float:
        """Accuracy of B minus accuracy of A, -1..1."""
        return (self.only_b - self.only_a) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference: Wald interval for paired proportions with 0.5 added (Agresti & Min 2005)."""
        b, a, n = self.only_b + 0.5, self.only_a + 0.5, self.n + 2
        center = (b - a) / n
        margin = Z95 * math.sqrt(max(b + a - (b - a) ** 2 / n, 0.0)) / n
        return max(center - margin, -1.0), min(center + margin, 1.0)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the exact McNemar test.

        Twice the smaller tail of a binomial distribution of ``only_a + only_b`` fair coins, at most 1.
        """
        total, smaller = self.only_a + self.only_b, min(self.only_a, self.only_b)
        tail = sum(math.comb(total, k) for k in range(smaller + 1))
        return min(2 * tail / (1 << total), 1.0)

    def verdict(self, a: str, b: str, level: float = 0.05) -> str:
        """Return a sentence that names the better model, in percentage points, or finds no difference."""
        low, high = (100 * end for end in self.interval)
        points = f"{100 * self.difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}"
        significant, excludes_zero = self.p_value < level, low > 0 or high < 0
        if (significant or excludes_zero) and self.difference < 0:  # the better model comes first, with a plus sign
            return McNemarResult(self.n, self.only_b, self.only_a).verdict(b, a, level)
        if significant and excludes_zero:
            return f"{b} is better than {a}: {points}"
        if significant or excludes_zero:  # the interval and the test are different approximations
            return f"{b} may be better than {a}: {points}"
        return f"no difference between {a} and {b} that these {self.n:,} images show: {points}"


@dataclass(frozen=True, eq=False)
class SeedComparison:
    """Two recipes A and B, each trained with the same seeds and tested on the same images."""

    correct_a: NDArray[np.bool_]  # (seeds, images)
    correct_b: NDArray[np.bool_]

    @property
    def differences(self) -> NDArray[np.float64]:
        """(seeds, images): 1 where only B is correct, -1 where only A is."""
        return self.correct_b.astype(np.float64) - self.correct_a.astype(np.float64)

    @property
    def difference(self) -> float:
        """Mean accuracy of B minus mean accuracy of A, -1..1."""
        return float(self.differences.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the difference for new seeds and new images: Student's t with seeds - 1 degrees of freedom.

        The variance of the mean over seeds and that over images are added. The interaction of seeds and images counts
        twice, so the interval is conservative.
        """
        differences = self.differences
        seeds, images = differences.shape
        variance = differences.mean(axis=1).var(ddof=1) / seeds + differences.mean(axis=0).var(ddof=1) / images
        from scipy.stats import t as student  # importing it takes a second

        margin = float(student.ppf(0.975, seeds - 1)) * math.sqrt(variance)
        return max(self.difference - margin, -1.0), min(self.difference + margin, 1.0)

    def verdict(self, a: str, b: str) -> str:
        """Return a sentence that names the better recipe, in percentage points, or says that it may be chance."""
        low, high = (100 * end for end in self.interval)
        if high < 0:  # the better recipe comes first, with a plus sign
            return SeedComparison(self.correct_b, self.correct_a).verdict(b, a)
        seeds, images = self.differences.shape
        points = f"{100 * self.difference:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}"
        points += f" ({seeds} fresh seeds each, {images:,} test images)"
        return f"{b} is better than {a}: {points}" if low > 0 else f"may be chance: {b} against {a} {points}"
