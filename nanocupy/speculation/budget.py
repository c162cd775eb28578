"""What drafts may lose, so that nobody is much slower with them than without.

Counted in steps without drafts of the batch that runs, as seconds of different batches do not
compare: a step with drafts loses what it takes longer, and gains a B-th of a step of B sequences
for each draft that is right. Where more was lost than gained there is a debt, and as time passes it
is forgiven, slowly; where more was gained there is a credit, up to a most. With a debt no more than
a little may be lost; without one, anything that is worth a try. So in N steps no more is lost than
the share of N that is forgiven, what one try loses, or that little, and the credit that there was.
What is told is what was lost: the policy leaves out what it takes for a capture or a disturbance.
Pure Python.
"""

from __future__ import annotations


class DraftBudget:
    """debt: in steps without drafts; below zero it is a credit, what drafts have brought lately."""

    FORGIVEN = 0.0075  # of the time that passes
    MOST_DEBT = 0.7  # up to which a try may go
    # What was brought long ago is not lost again; but drafts that pay in the long run are right by
    # chance, and may be wrong a few times in a row.
    MOST_CREDIT = 5.0  # of one sequence; the more there are, the less is chance
    LEAST_CREDIT = 1.0

    def __init__(self) -> None:
        self.debt = 0.0
        self._most_credit = self.MOST_CREDIT

    @property
    def is_open(self) -> bool:
        """Whether any try may be made."""
        return self.debt < self.MOST_DEBT

    def allows(self, num_steps: float) -> bool:
        """Whether so much may be lost now."""
        return self.debt <= 0.0 or self.debt + num_steps <= self.MOST_DEBT

    def limit_credit(self, num_seqs: int) -> None:
        """So many sequences run now."""
        self._most_credit = max(self.LEAST_CREDIT, self.MOST_CREDIT / num_seqs**0.5)

    def passed(self) -> None:
        """A step of decodes has passed, with drafts or without."""
        if self.debt > 0.0:
            self.debt = max(0.0, self.debt - self.FORGIVEN)

    def lost(self, num_steps: float) -> None:
        """Something took so much longer than without drafts."""
        self.debt = max(-self._most_credit, self.debt + num_steps)

    def gained(self, num_steps: float) -> None:
        """Drafts have made so many steps needless."""
        self.debt = max(-self._most_credit, self.debt - num_steps)

    def halve_credit(self) -> None:
        """Drafts are no longer expected to pay: what they brought is not for tries that fail."""
        self.debt = max(self.debt, self.debt / 2)
