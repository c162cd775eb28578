"""Chat templates: messages to the text, or the ids, that a model was trained to see.

Owns rendering and the rule that a control token is one only where the template wrote it. The
environment is in `chat_sandbox`, the marking of users' text in `chat_guard`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from nanocupy.errors import TokenizerError
from nanocupy.tokenizer.base import Tokenizer
from nanocupy.tokenizer.chat_guard import Guard, plain
from nanocupy.tokenizer.pieces import AddedToken, PieceTokenizer

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 25


class ChatTemplate:
    """A Jinja2 chat template as Hugging Face writes them, for one tokenizer.

    Raises TokenizerError, in one line, where the template is broken; `render` and `encode` where
    it fails on these messages, refuses them (`raise_exception`) or does too much. `where` is what
    errors call the template: the file, and that it is its template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, where: str = "chat template") -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(
                f"{where} has {len(source)} characters, at most {MAX_SOURCE_CHARS}"
            )
        self.source = source
        self.where = where
        self.tokenizer = tokenizer
        self._guard = Guard(tokenizer.special_tokens, tokenizer.added_tokens)

    @cached_property
    def _template(self) -> Any:
        from nanocupy.tokenizer.chat_sandbox import ChatEnvironment, start_budget

        start_budget()  # constants are computed when a template is compiled
        try:
            return ChatEnvironment().from_string(self.source)
        except (Exception, RecursionError) as exc:
            raise _failure(f"{self.where} cannot be compiled", exc) from None

    @cached_property
    def _token_names(self) -> dict[str, str]:
        names = {}
        for name, token_id in (
            ("bos_token", self.tokenizer.bos_id),
            ("eos_token", self.tokenizer.eos_id),
        ):
            if token_id is not None:
                names[name] = self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return names

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that the template makes of `messages` (dicts with "role" and "content").

        `variables` go to the template (tools, documents, enable_thinking, …). The text alone does
        not tell a token that the template wrote from one that a user spelled: feed `encode`'s ids.
        """
        messages = _checked(messages)
        return self._render(
            [plain(message) for message in messages], plain(variables), add_generation_prompt
        )

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Ids of the rendered messages, bos included only where the template writes it.

        Control tokens spelled in messages or variables are encoded as plain text.
        """
        marked, guarded, mark = self._guard.protect(list(_checked(messages)), variables)
        text = self._render(marked, guarded, add_generation_prompt)
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, PieceTokenizer):
            raise TokenizerError(f"a {type(tokenizer).__name__} cannot encode chats")
        parts: list[str | AddedToken] = [
            part if isinstance(part, AddedToken) else part.replace(mark, "")
            for part in tokenizer.split(text, parse_special=True)
        ]
        return tokenizer.encode_parts(parts)

    def _render(self, messages: list[Any], variables: Any, add_generation_prompt: bool) -> str:
        from nanocupy.tokenizer.chat_sandbox import start_budget

        values = {"tools": None, "documents": None, **self._token_names, **variables}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        template = self._template
        start_budget()
        chunks: list[str] = []
        size = 0
        try:
            for chunk in template.generate(values):
                size += len(chunk)
                if size > MAX_OUTPUT_CHARS:
                    raise TokenizerError(
                        f"{self.where}: it writes more than {MAX_OUTPUT_CHARS} characters"
                    )
                chunks.append(chunk)
        except TokenizerError:
            raise
        except (Exception, RecursionError) as exc:
            raise _failure(f"{self.where} failed", exc) from None
        return "".join(chunks)


def _checked(messages: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise TokenizerError(f"chat: messages are a {type(messages).__name__}, not a list")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"chat: message {index} is no object with a role")
        if "content" not in message and message["role"] in ("system", "user"):
            raise TokenizerError(f"chat: message {index} ({message['role']}) has no content")
    if not messages:
        raise TokenizerError("chat: there are no messages; give one at least")
    return messages


def _failure(what: str, exc: BaseException) -> TokenizerError:
    reason = " ".join(str(exc).split()) or type(exc).__name__
    if isinstance(exc, RecursionError):
        reason = "it is nested too deeply"
    line = getattr(exc, "lineno", None)
    where = f" (line {line})" if line else ""
    return TokenizerError(f"{what}{where}: {reason[:300]}")
