"""The form in which a chat template takes content and tool arguments."""

import json
from typing import Any

import pytest

from kto_lightning.data.token_ids import token_ids
from tests.support.factories import make_tokenizer, tool_records, trl_chat_template

TEXTS = ["The first part.", "The second one."]
CALLS_AS_TEXT = (
    "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name + ' ' + call.function.arguments }}</call>"
    "{% endfor %}{% endfor %}"
)
CALLS_IN_ANY_FORM = CALLS_AS_TEXT.replace(
    "call.function.arguments }}",
    "(call.function.arguments if call.function.arguments is string "
    "else call.function.arguments | tojson) }}",
)
PRINTS_PYTHON = CALLS_AS_TEXT.replace("' ' +", "' ' ~")


def parts(texts: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, **more} for text in texts]


def rendered(template: str, *, tools: Any = None, **messages: Any) -> str:
    """The text of a record's tokens; messages by role."""
    turns = [{"role": role, "content": content} for role, content in messages.items()]
    return text_of(template, turns[:-1], turns[-1:], tools)


def text_of(template: str, prompt: list, completion: list, tools: Any = None) -> str:
    tokenizer = make_tokenizer(chat_template=template, bos=True)
    record = {"prompt": prompt, "completion": completion, "tools": tools}
    return str(tokenizer.decode(token_ids(record, tokenizer)[1]))


@pytest.mark.parametrize("template", ["llama3", "gemma", "qwen2_5", "qwen3", "phi3", "gptoss"])
def test_parts_are_joined_where_a_template_takes_text(template: str) -> None:
    as_text = rendered(template, user="".join(TEXTS), assistant="".join(TEXTS))
    assert rendered(template, user=parts(TEXTS), assistant=parts(TEXTS)) == as_text
    assert as_text.count("The first part.The second one.") == 2


def test_parts_stay_where_a_template_iterates_over_them() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}{% for part in m.content %}"
        "{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}{% endfor %}"
    )
    text = rendered(template, user=parts(TEXTS), assistant=parts(["Yes."]))
    assert text == "user[The first part.][The second one.]assistant[Yes.]"
    # OpenAI's other interface names them otherwise, and some tools do not name them at all.
    named = [{"type": "input_text", "text": TEXTS[0]}, {"text": TEXTS[1]}]
    assert rendered(template, user=named, assistant=parts(["Yes."])) == text


def test_a_text_becomes_a_part_where_a_template_would_leave_it_out() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
        "{% endfor %};{% endfor %}"
    )
    for content in (TEXTS[0], parts(TEXTS[:1])):
        messages = [{"role": role, "content": content} for role in ("system", "user")]
        answer = [{"role": "assistant", "content": content}]
        text = text_of(template, messages, answer)
        assert text == "".join(f"{role}:{TEXTS[0]};" for role in ("system", "user", "assistant"))


def test_each_role_has_its_own_form() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}"
        "{% if m.role == 'user' %}{% for part in m.content %}[{{ part.text }}]{% endfor %}"
        "{% elif m.role == 'system' %}{{ m.content[0].text }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    text = rendered(template, system=parts(TEXTS), user=parts(TEXTS), assistant=parts(TEXTS))
    both = "".join(TEXTS)
    assert text == f"system{both}user[{TEXTS[0]}][{TEXTS[1]}]assistant{both}"


def call_of(arguments: Any) -> list[dict[str, Any]]:
    calls = [{"type": "function", "function": {"name": "sky", "arguments": arguments}}]
    return [{"role": "assistant", "content": "", "tool_calls": calls}]


ARGUMENTS = {"city": 'the "Île"', "days": 3}
AS_TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)


@pytest.mark.parametrize("arguments", [ARGUMENTS, AS_TEXT])
@pytest.mark.parametrize(
    "template", ["qwen2_5", "llama3_1", "qwen3", CALLS_AS_TEXT, CALLS_IN_ANY_FORM, PRINTS_PYTHON]
)
def test_arguments_are_encoded_once(template: str, arguments: Any) -> None:
    text = text_of(template, [{"role": "user", "content": "?"}], call_of(arguments))
    assert AS_TEXT in text


def test_arguments_that_are_no_object_are_left_alone() -> None:
    text = text_of("qwen2_5", [{"role": "user", "content": "?"}], call_of("not JSON"))
    assert '"arguments": "not JSON"' in text


def test_calls_without_the_object_function_are_converted_too() -> None:
    completion = call_of(AS_TEXT)
    completion[0]["tool_calls"] = [completion[0]["tool_calls"][0]["function"]]
    text = text_of("qwen2_5", [{"role": "user", "content": "?"}], completion)
    assert f'"arguments": {AS_TEXT}}}' in text


def test_the_record_is_not_changed() -> None:
    (record, *_) = tool_records(1)
    record["completion"][0]["content"] = parts(TEXTS)
    before = json.dumps(record)
    tokenizer = make_tokenizer(chat_template="qwen2_5")
    token_ids(record, tokenizer)
    assert json.dumps(record) == before


def test_a_template_for_tools_is_asked_by_itself() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = {"default": PRINTS_PYTHON, "tool_use": trl_chat_template("qwen2_5")}
    prompt = [{"role": "user", "content": "?"}]
    tool = {"type": "function", "function": {"name": "sky", "description": "", "parameters": {}}}
    for tools, expected in ((None, f"<call>sky {AS_TEXT}</call>"), ([tool], f": {AS_TEXT}}}")):
        for arguments in (ARGUMENTS, AS_TEXT):
            record = {"prompt": prompt, "completion": call_of(arguments), "tools": tools}
            assert expected in str(tokenizer.decode(token_ids(record, tokenizer)[1]))
