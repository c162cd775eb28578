"""The errors nanocupy raises on purpose.

Every one of them is a single line that says what is wrong, where, the value that was met and how to
mend it. The command line prints that line and exits with `exit_code`: 2 where the user can mend it,
1 where the fault is ours or the machine's.
"""

from __future__ import annotations


class NanocupyError(Exception):
    """Base of all errors that nanocupy raises on purpose."""

    exit_code = 2


class ConfigError(NanocupyError):
    """A model or runtime setting that cannot be used."""


class CheckpointError(NanocupyError):
    """A checkpoint that is broken, hostile, or of a kind nanocupy does not run."""


class TokenizerError(NanocupyError):
    """A tokenizer or chat template that is broken, or text it cannot encode."""


class RequestError(NanocupyError):
    """One request that cannot be served: its prompt or its parameters are out of bounds."""


class CapacityError(NanocupyError):
    """Not enough memory (host, device or KV blocks) for what was asked."""


class DownloadError(NanocupyError):
    """A model that could not be fetched or did not verify."""


class DeviceError(NanocupyError):
    """The device that was asked for is missing or unusable."""


class CudaError(NanocupyError):
    """A CUDA call or kernel that failed; names the call and the kernel."""

    exit_code = 1


def beyond_float16(name: str) -> ConfigError:
    """What is raised where the tensor `name`, to be kept in float16, has larger values."""
    from nanocupy.config import EMBEDDING, HEAD_NORM, LM_HEAD

    owns = {
        EMBEDDING: "embed_dtype bfloat16, and lm_head_dtype too where the LM head is the embedding",
        LM_HEAD: "lm_head_dtype bfloat16",
        HEAD_NORM: "lm_head_dtype bfloat16",
    }
    mend = owns.get(name, "dtype bfloat16")
    return ConfigError(f"tensor {name} has values beyond float16 (65504); take {mend}")
