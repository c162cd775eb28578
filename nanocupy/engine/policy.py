"""Who goes first: small pure functions from a request to a number, the lower the sooner.

Two requests are compared by their keys at one moment. A key of the policy "priority" is measured in
steps of waiting: with all weights at 1, a level counts as much as LEVEL_STEPS steps, and so on.

Nobody starves. A key is arrival_step * ageing plus terms that all lie within `key_span(weights)`,
so a request that arrives more than `passing_window(weights)` = span / ageing steps after another is
behind it, whatever either is. The scheduler admits strictly in this order, and every step computes
at least one token of a request that runs. So whoever waits does so for at most

    the sum of (1 + max_preemptions) * max_total_tokens

steps over the requests that are there or arrive within that window: a bound that later arrivals do
not change. With ageing at 0 there is none. (A request whose prefix another one is computing is left
out while that goes on: it is served by it. Priority never lets a newcomer pass.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nanocupy.engine.request import MAX_LEVEL, Request
from nanocupy.errors import ConfigError

PolicyName = Literal["fcfs", "priority"]

# What each term counts at weight 1, in steps of waiting.
LEVEL_STEPS = 4000.0
VIP_STEPS = 2000.0
DEADLINE_STEPS = 2000.0
SHORT_PROMPT_STEPS = 200.0

DEADLINE_HALF_S = 10.0  # a deadline this far away counts half
SHORT_PROMPT_HALF_TOKENS = 1024.0  # a rest of the prompt this long counts half
# A request that waits takes the place of one that runs only where it is this much ahead: to change
# places for less would cost more than it brings.
PREEMPTION_MARGIN_STEPS = 500.0


@dataclass(frozen=True)
class PolicyWeights:
    """What counts how much under "priority"; factors on the steps above, 0 = not at all."""

    level: float = 1.0
    vip: float = 1.0
    deadline: float = 1.0
    shortest_first: float = 1.0
    ageing: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"policy weight {name} is {value!r}; it must be 0 or more")


def fcfs_key(request: Request, now: float, weights: PolicyWeights) -> float:
    """First come, first served."""
    return float(request.arrival_number)


def priority_key(request: Request, now: float, weights: PolicyWeights) -> float:
    """By level, VIP, deadline, rest of the prompt and waiting; `now` in seconds on the clock of
    request.arrival_time. It changes with `now` only for a request with a deadline."""
    priority = request.priority
    key = weights.ageing * request.arrival_step + weights.level * LEVEL_STEPS * priority.level
    if not priority.vip:
        key += weights.vip * VIP_STEPS
    slack = math.inf
    if priority.deadline is not None:
        slack = max(request.arrival_time + priority.deadline - now, 0.0)
    # Between 0, overdue, and 1, no deadline; earliest first at any distance.
    key += weights.deadline * DEADLINE_STEPS * _saturated(slack, DEADLINE_HALF_S)
    rest = max(request.num_prompt_tokens - request.num_computed_tokens, 0)
    short = _saturated(rest, SHORT_PROMPT_HALF_TOKENS)
    return key + weights.shortest_first * SHORT_PROMPT_STEPS * short


def key_span(weights: PolicyWeights) -> float:
    """The most that two keys of one arrival step can differ under "priority"."""
    return (
        weights.level * LEVEL_STEPS * MAX_LEVEL
        + weights.vip * VIP_STEPS
        + weights.deadline * DEADLINE_STEPS
        + weights.shortest_first * SHORT_PROMPT_STEPS
    )


def passing_window(weights: PolicyWeights) -> float:
    """Steps after its arrival in which newcomers may still go before a request."""
    return key_span(weights) / weights.ageing if weights.ageing else math.inf


@dataclass(frozen=True)
class Policy:
    """A key with its weights. preempts: whether one that waits may take the place of one that runs
    while there are blocks enough."""

    key_of: Callable[[Request, float, PolicyWeights], float]
    weights: PolicyWeights
    preempts: bool

    def key(self, request: Request, now: float) -> tuple[float, int]:
        """To be compared with others of this moment; no two are equal."""
        return self.key_of(request, now, self.weights), request.arrival_number

    def band(self, request: Request, now: float) -> int:
        """Requests of one band count as equally urgent: those that decode go before prompts."""
        width = self.weights.level * LEVEL_STEPS
        if not self.preempts or not width:
            return 0
        return int(self.key_of(request, now, self.weights) // width)

    def changes_with_time(self, request: Request) -> bool:
        return self.preempts and request.priority.deadline is not None


def make_policy(name: PolicyName, weights: PolicyWeights | None = None) -> Policy:
    """The policy called `name`."""
    weights = weights or PolicyWeights()
    if name == "fcfs":
        return Policy(fcfs_key, weights, preempts=False)
    if name == "priority":
        return Policy(priority_key, weights, preempts=True)
    raise ConfigError(f"policy is {name!r}; it must be fcfs or priority")


def _saturated(value: float, half: float) -> float:
    """0 at 0, 1/2 at `half`, 1 at infinity."""
    return 1.0 if math.isinf(value) else value / (value + half)
