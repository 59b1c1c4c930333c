"""Mixtures that are worth more time: further iterations, and the mean of several fits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cnf.bases import GaussianMixture
from cnf.estimators.budget import Budget
from cnf.estimators.mixtures import (
    FIRST,
    ITERATIONS,
    ROWS,
    ROWS_PER_COMPONENT,
    TOLERANCE,
    Candidate,
    enough_rows,
    first_fit,
    log_prob,
    some_rows,
)

__all__ = ["converge", "pool"]

PROMISE = 0.3  # nats, that the first further iterations may gain
MEMBERS, MOST_MEMBERS = 3, 12  # of a mean: without a limit of time, and with one
GAIN = 3e-4  # nats, by which a member must lower the validation
FAILURES = 2  # members in a row without a gain, after which no more are fitted
Report = Callable[[Candidate], None]


def converge(fitted: list[Candidate], budget: Budget, seconds: float, seed: int, report: Report) -> None:
    """Go on with the mixtures that promise most, in place, until none gains or the time is up.

    A mixture promises what it has, and the gain of its latest iterations once more: large ones converge slowly.

    Args:
        fitted: candidates, of which the promising ones are replaced.
        budget: the clock of the search.
        seconds: when to stop, by that clock.
        seed: of the choice of rows.
        report: called for every better candidate.
    """
    promise = [made.validation - PROMISE for made in fitted]
    pace = 0.0  # seconds of an iteration, for each row and component
    while budget.spent < seconds and (least := min(promise)) < math.inf:
        at = promise.index(least)
        made = fitted[at]
        count, total = made.base.components, len(made.table.train)
        rows = total if not pace else min(total, int((seconds - budget.spent) / (pace * FIRST * count)))
        if rows < min(total, ROWS * count):
            return
        began, base = budget.spent, copy.deepcopy(made.base)
        base.improve(some_rows(made.table.train, rows, seed), FIRST, tolerance=TOLERANCE / FIRST, min_variance=made.min_variance)
        pace = (budget.spent - began) / (FIRST * rows * count)
        new = replace(made, base=base, validation=made.table.nll(log_prob(base, made.table.validation)))
        gain = made.validation - new.validation
        if gain > 0:
            fitted[at] = new
            report(new)
        promise[at] = new.validation - gain if gain > TOLERANCE else math.inf


def pool(fitted: Sequence[Candidate], components: Sequence[int], budget: Budget, seconds: float, seed: int, report: Report) -> Candidate:
    """Return the mean of several fits of the best mixture, from other initialisations, as far as it gains on validation.

    A mean of densities is no worse than the mean of their log-likelihoods, and the errors of several fits cancel: four
    fits of 150 Gaussians to 30,000 rows in 8 columns score 9.06 nats, each alone 9.31. Every second member has the next
    larger number of components, which a single fit could not afford.

    Args:
        fitted: candidates, the best of which is the first member.
        components: numbers of components that were offered.
        budget: the clock of the search.
        seconds: when to stop, by that clock.
        seed: of the initialisations and of the choice of rows.
        report: called for every better candidate.
    """
    best = min(fitted, key=lambda made: made.validation)
    table, count = best.table, best.base.components
    larger = [k for k in components if k > count and k * ROWS_PER_COMPONENT <= len(table.train)][:1] if count > 1 else []
    sizes = [count, *larger]
    members, scores, failures, skipped = [best.base], log_prob(best.base, table.validation), 0, 0
    most = MOST_MEMBERS if budget.limited else MEMBERS
    pace = 0.0
    while count > 1 and len(members) < most and failures < FAILURES:
        number = len(members) + failures + skipped
        size = sizes[number % len(sizes)]
        rows = enough_rows(len(table.train), size, seconds) if budget.limited else len(table.train)
        began = budget.spent
        if budget.limited and began + pace * rows * size >= seconds:
            break
        z = some_rows(table.train, rows, seed + number)
        base = first_fit(z, size, best.base.covariance, best.min_variance, seed + number)
        done = 0
        while done < ITERATIONS and (not budget.limited or budget.spent < seconds):
            done += len(course := base.improve(z, FIRST, tolerance=TOLERANCE, min_variance=best.min_variance))
            if len(course) < FIRST:
                break
        pace = (budget.spent - began) / (rows * size)
        own = log_prob(base, table.validation)
        pooled = torch.logaddexp(scores + math.log(len(members)), own) - math.log(len(members) + 1)
        value = table.nll(pooled)
        if value < best.validation - GAIN:
            members, scores, failures = [*members, base], pooled, 0
            best = replace(best, base=GaussianMixture.mean_of(members), validation=value, members=len(members))
            report(best)
        elif size > count:  # overfits
            sizes, skipped = [count], skipped + 1
        else:
            failures += 1
    return best
