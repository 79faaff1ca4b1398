"""Conversations in the form that a tokenizer's chat template takes.

Two things are written in two ways, of which a template may take only one: content, as text or as a
list of text parts, and the arguments of a tool call, as an object or as its JSON text. Rendered in
the other form, a list is printed as Python prints it, and JSON text is encoded twice. Which form a
template takes is found out by rendering an example of each; where it takes both, a record keeps its
own, so that the token ids are TRL's.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from kto_lightning.data.strict_json import parse_json_or_text
from kto_lightning.data.template_limits import TemplateLimitError

Message = dict[str, Any]  # Any: values of JSON
_ContentForm = Callable[[list[str]], str | list[Message]]

_QUESTION = {"role": "user", "content": "kto question"}
_TEXTS = ["kto part one.", "kto part two."]
_PRINTED_LIST = re.compile(r"""[\"']text[\"']\s*:""")
"""A list of parts as Python or JSON prints it."""
_KEY, _VALUE = "kto_key", "kto value"
_PARAMETERS = {"type": "object", "properties": {}, "required": []}
_TOOL = {
    "type": "function",
    "function": {"name": "kto_tool", "description": "kto tool", "parameters": _PARAMETERS},
}
_CALL_ID = "kto000001"
"""Nine letters or digits, as Mistral's templates want it."""
_SYSTEM_ROLES = ("system", "developer")


class MessageForms:
    """The forms of content and tool arguments that a tokenizer's chat template takes.

    They are found out with and without tools, because a tokenizer may have a template for each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._content_forms: dict[tuple[str, bool], _ContentForm] = {}  # by role
        self._takes_parts: dict[tuple[str, bool], bool] = {}  # likewise
        self._argument_forms: dict[bool, set[type]] = {}

    def convert(self, messages: list[Message], *, with_tools: bool) -> list[Message]:
        """The messages, with content and arguments in the form that the template takes."""
        return [self._convert(message, with_tools) for message in messages]

    def _convert(self, message: Message, with_tools: bool) -> Message:
        content, calls = message.get("content"), message.get("tool_calls")
        role = str(message.get("role"))
        if isinstance(content, list):
            write = self._content_form(role, with_tools)
            message = {**message, "content": write([part["text"] for part in content])}
        elif isinstance(content, str) and content and self._takes_parts_only(role, with_tools):
            message = {**message, "content": _as_one_part([content])}
        if isinstance(calls, list) and calls:
            converted = [self._convert_call(call, with_tools) for call in calls]
            message = {**message, "tool_calls": converted}
        return message

    def _convert_call(self, call: Any, with_tools: bool) -> Any:  # Any: JSON, of any type
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        arguments = self._convert_arguments(function["arguments"], with_tools)
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    def _convert_arguments(self, arguments: Any, with_tools: bool) -> Any:  # Any: JSON
        if not isinstance(arguments, str | dict):
            return arguments
        if with_tools not in self._argument_forms:
            self._argument_forms[with_tools] = self._find_argument_forms(with_tools)
        forms = self._argument_forms[with_tools]
        if not forms or type(arguments) in forms:
            return arguments
        if isinstance(arguments, dict):
            return json.dumps(arguments, ensure_ascii=False)
        parsed = parse_json_or_text(arguments)
        return parsed if isinstance(parsed, dict) else arguments

    def _content_form(self, role: str, with_tools: bool) -> _ContentForm:
        """How to write several texts: as parts, as one text, or as one part, if only that works."""
        key = role, with_tools
        if key not in self._content_forms:
            forms = (_as_parts, "".join, _as_one_part)
            works = (
                form for form in forms if self._shows(_example(role, form(_TEXTS)), with_tools)
            )
            self._content_forms[key] = next(works, "".join)
        return self._content_forms[key]

    def _takes_parts_only(self, role: str, with_tools: bool) -> bool:
        """Whether content that is a text would be left out, as templates of some image-text models
        do, and a list of one part is not."""
        key = role, with_tools
        if key not in self._takes_parts:
            text, parts = (
                self._shows(_example(role, form(_TEXTS)), with_tools)
                for form in ("".join, _as_one_part)
            )
            self._takes_parts[key] = parts and not text
        return self._takes_parts[key]

    def _shows(self, messages: list[Message], with_tools: bool) -> bool:
        rendered = self._render(messages, with_tools) or ""
        return all(text in rendered for text in _TEXTS) and not _PRINTED_LIST.search(rendered)

    def _find_argument_forms(self, with_tools: bool) -> set[type]:
        """`str` and `dict`, as far as the template renders them, and once."""
        # Some templates want a call's content to be text, others none.
        found = [self._forms_rendered(content, with_tools) for content in ("", None)]
        complete, any_form = ([forms[i] for forms in found if forms[i]] for i in (0, 1))
        return next(iter(complete + any_form), set())

    def _forms_rendered(self, content: str | None, with_tools: bool) -> tuple[set[type], set[type]]:
        """The forms of arguments that are rendered completely and once, and those rendered."""
        rendered = {
            type(arguments): self._render([_QUESTION, _call(arguments, content)], with_tools)
            for arguments in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE}))
        }
        texts = {form: text for form, text in rendered.items() if text is not None}
        return {form for form, text in texts.items() if _shows_once(text)}, set(texts)

    def _render(self, messages: list[Message], with_tools: bool) -> str | None:
        tools: list[Any] | None = [_TOOL] if with_tools else None  # Any: annotated as plain dicts
        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except TemplateLimitError:
            raise
        except Exception:  # a template is a program and can raise anything
            return None


def _shows_once(text: str) -> bool:
    """Whether a text has the arguments, not in escaped quotes, nor as Python prints an object."""
    shown = _KEY in text and _VALUE in text
    return shown and f'\\"{_KEY}' not in text and f"{{'{_KEY}'" not in text


def _as_parts(texts: list[str]) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


def _as_one_part(texts: list[str]) -> list[Message]:
    return _as_parts(["".join(texts)])


def _example(role: str, content: str | list[Message]) -> list[Message]:
    """A conversation with that content in a message of that role."""
    message = {"role": role, "content": content}
    if role == "user":
        return [message]
    if role in _SYSTEM_ROLES:
        return [message, _QUESTION]
    if role == "tool":
        answer = {**message, "name": "kto_tool", "tool_call_id": _CALL_ID}
        return [_QUESTION, _call({_KEY: _VALUE}, ""), answer]
    return [_QUESTION, message]


def _call(arguments: dict | str, content: str | None) -> Message:
    function = {"name": "kto_tool", "arguments": arguments}
    calls = [{"type": "function", "id": _CALL_ID, "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}
