"""What may look on while the engine works: told of requests and of the parts of a step."""

from __future__ import annotations


class StepWatch:
    """Is told what the engine does, as it does it. This one takes no notice, which costs four
    empty calls a step; subclasses of it do.

    The parts of a step, in order: "schedule"; "launch", which is the whole step where a runner
    cannot run ahead; "wait" for the ids of the step that is due; "process" them. The last two come
    earlier, or twice, where a step's ids must be known before the next is scheduled, and the first
    two are left out, or all of them, where there is nothing to do.
    """

    def request_added(self, request_id: str) -> None:
        """A request was queued."""

    def request_finished(self, request_id: str) -> None:
        """A request has ended, or was aborted."""

    def part(self, name: str) -> None:
        """A part of a step starts, and with it ends the one before."""

    def end_step(self) -> None:
        """The step is over, or has failed."""
