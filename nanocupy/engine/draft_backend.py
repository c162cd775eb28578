"""Builds what guesses for an engine: prompt lookup, or a draft model on the device of the model."""

from __future__ import annotations

from typing import Any

from nanocupy.checkpoint.base import Checkpoint
from nanocupy.config import ModelConfig
from nanocupy.engine import backend
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.runner import Runner
from nanocupy.errors import CapacityError
from nanocupy.progress import human_bytes, say
from nanocupy.speculation.draft_model import DraftModelProposer
from nanocupy.speculation.ngram import NgramProposer
from nanocupy.speculation.policy import AdaptiveDrafts
from nanocupy.speculation.proposer import Proposer
from nanocupy.speculation.speculator import Speculator

_LEAST_SHARE = 0.01  # as the setting cpu_cache_share has it


def make_speculator(
    config: EngineConfig, runner: Runner, draft: Checkpoint | None, *, progress: bool = False
) -> Speculator | None:
    """What `config` says, for an engine on `runner`; None where nothing guesses. draft: the draft
    model, if it is to be one. Raises as `backend.make_runner`."""
    proposer: Proposer
    if config.proposer == "off":
        return None
    if config.proposer == "ngram":
        proposer = NgramProposer()
    else:
        assert draft is not None, "a draft model is named, and was not opened"
        draft_runner = make_draft_runner(draft, config, runner, progress=progress)
        proposer = DraftModelProposer(draft_runner, runner.config.vocab_size)
    return Speculator(proposer, make_policy(proposer, config.draft_tokens, runner))


def make_policy(proposer: Proposer, max_drafts: int, runner: Runner) -> AdaptiveDrafts:
    """How many of a proposer's drafts an engine on `runner` asks for."""
    # On a GPU a step of several drafts takes about as long as one of few; a draft model does not.
    is_free = runner.can_run_ahead and proposer.name != DraftModelProposer.name
    return AdaptiveDrafts(max_drafts, runner.limits.max_draft_rows, try_all_alone=is_free)


def make_draft_runner(
    draft: Checkpoint, config: EngineConfig, runner: Runner, *, progress: bool = False
) -> Runner:
    """A runner of a draft model beside `runner`, on the same device, for as many sequences."""
    limits = runner.limits
    device: Any = getattr(runner, "clock", None)
    if device is None:  # the CPU
        of_draft = config.with_(speculate="off", draft_model=None, preemption="recompute")
        memory = backend._machine_memory()
        of_draft = cpu_shares(of_draft, runner.config, draft.config, memory)[1]
        context = min(limits.max_context, draft.config.max_context)
        return backend.cpu_runner(draft, of_draft, context, progress)
    from nanocupy.engine.device_plan import draft_limits

    draft, settings, notes = backend.device_model(draft, config, device.traits)
    for note in notes:
        say(f"draft model: {note}", progress)
    # `plan_limits` has left room for it.
    own = draft_limits(limits, draft.config)
    return backend.filled_runner(draft, device.second_stream(), own, settings, progress)


def cpu_shares(
    config: EngineConfig, model: ModelConfig, draft: ModelConfig, machine_bytes: int
) -> tuple[EngineConfig, EngineConfig]:
    """`config` for a model and for its draft model, who share the cache's part of the machine's
    memory as their tokens take it. Raises CapacityError where their weights alone are too large."""
    weights = 4 * (model.num_parameters + draft.num_parameters)
    if weights > machine_bytes:
        raise CapacityError(
            f"the weights of both models take {human_bytes(weights)} in float32, of which "
            f"{human_bytes(4 * draft.num_parameters)} for the draft model; this machine has "
            f"{human_bytes(machine_bytes)}: take a smaller one, or leave draft_model out"
        )
    sizes = [c.kv_bytes_per_token("float32") for c in (model, draft)]
    one, other = (max(_LEAST_SHARE, config.cpu_cache_share * n / sum(sizes)) for n in sizes)
    return config.with_(cpu_cache_share=one), config.with_(cpu_cache_share=other)
