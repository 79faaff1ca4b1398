"""Made-up exports in the structure that the tools write, and what importing them gives."""

import itertools
import json
from typing import Any

from kto_lightning.data.importers import IMPORTERS
from kto_lightning.data.rows import BadRecord, Row, SkippedRow

Outcome = Row | BadRecord | SkippedRow


def read(tool: str, *values: object) -> list[Any]:
    """What a tool's importer makes of the rows of an export, in file `f` from line 1."""
    rows = (Row(file="f", line=line, value=value) for line, value in enumerate(values, start=1))
    return list(IMPORTERS[tool].records(rows))


def texts(outcome: Outcome) -> tuple[list[str], str, bool]:
    """The texts of the prompt, the answer, and the label of a row in our own form."""
    assert isinstance(outcome, Row), outcome
    value = outcome.value
    assert isinstance(value, dict)
    (answer,) = value["completion"]
    assert answer["role"] == "assistant"
    return [message["content"] for message in value["prompt"]], answer["content"], value["label"]


def message_of(outcome: Outcome) -> str:
    assert isinstance(outcome, BadRecord), outcome
    return outcome.message


def webui_message(key: str, parent: str | None, **more: Any) -> dict[str, Any]:
    """A message of an Open WebUI chat; ids that begin with `a` are the assistant's."""
    role = "assistant" if key.startswith("a") else "user"
    message = {"id": key, "parentId": parent, "childrenIds": [], "role": role, "timestamp": 1}
    return message | {"content": f"text of {key}"} | more


def webui_chat(*messages: dict[str, Any], **chat: Any) -> dict[str, Any]:
    history = {"messages": {item["id"]: item for item in messages}, "currentId": "a1"}
    return {"title": "t", "models": ["m"], "params": {}, "history": history, "tags": []} | chat


def webui_feedback(chat: dict[str, Any], judged: str, rating: Any = 1) -> dict[str, Any]:
    data = {"rating": rating, "model_id": "m", "reason": "clear", "comment": "", "tags": ["x"]}
    return {
        "id": "f",
        "user_id": "u",
        "version": 0,
        "type": "rating",
        "data": data | {"sibling_model_ids": None, "details": {"rating": 7}},
        "meta": {"model_id": "m", "message_id": judged, "chat_id": "c", "message_index": 1},
        "snapshot": {"chat": {"id": "c", "title": "t", "chat": chat, "meta": {}}},
        "created_at": 1,
        "updated_at": 1,
    }


LIBRECHAT_ROOT = "00000000-0000-0000-0000-000000000000"


def libre_message(key: str, parent: str = LIBRECHAT_ROOT, **more: Any) -> dict[str, Any]:
    """A message of a LibreChat conversation; ids that begin with `a` are the assistant's."""
    message = {"messageId": key, "conversationId": "c", "parentMessageId": parent}
    more = {"isCreatedByUser": not key.startswith("a"), "text": f"text of {key}"} | more
    return message | {"error": False, "unfinished": False, "createdAt": "2026-01-01"} | more


def up(**more: Any) -> dict[str, Any]:
    return {"feedback": {"rating": "thumbsUp", "tag": "accurate_reliable", "text": "ok"} | more}


def down() -> dict[str, Any]:
    return up(rating="thumbsDown", tag="inaccurate")


def libre_conversation(*messages: Any, **more: Any) -> dict[str, Any]:
    head = {"conversationId": "c", "endpoint": "openAI", "title": "t", "exportAt": "now"}
    return head | {"branches": True, "recursive": False, "messages": list(messages)} | more


LIBRE_BRANCHES = (
    libre_message("u1"),
    libre_message("a1", "u1", **down()),
    libre_message("u2", "a1"),
    libre_message("a2", "u2"),
    libre_message("a3", "u2", **up()),
    libre_message("u3", "u0-edited", text="elsewhere"),
)


def chat_log(conversation: object, index: object, value: str | None = "Like") -> dict[str, Any]:
    """A row of a Gradio chat's log, as it is read from the CSV file."""
    cells = {"conversation": json.dumps(conversation), "index": json.dumps(index)}
    return cells | {"value": value, "timestamp": "2026-01-01 00:00:00.000000"}


def gradio_message(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "metadata": None, "content": text, "options": None} | more


GRADIO_CHAT = [
    gradio_message("user", "q1"),
    gradio_message("assistant", "a1"),
    gradio_message("user", "q2"),
    gradio_message("assistant", "Hm.", metadata={"title": "Thinking"}),
    gradio_message("assistant", "a2"),
    gradio_message("user", "q3"),
]


def arena_state(*texts: Any, **more: Any) -> dict[str, Any]:
    """The state of a FastChat conversation, with the user's and the assistant's texts in turn."""
    messages = [[("USER", "ASSISTANT")[index % 2], text] for index, text in enumerate(texts)]
    state = {"template_name": "vicuna_v1.1", "system_message": "", "roles": ["USER", "ASSISTANT"]}
    state |= {"messages": messages, "offset": 0, "conv_id": "c", "model_name": "m"}
    return state | more


def arena_vote(vote: str, *states: dict[str, Any]) -> dict[str, Any]:
    one = {"model": "m", "state": states[0]}
    two = {"models": ["m", "n"], "states": list(states)}
    return {"tstamp": 1.5, "type": vote, "ip": "0"} | (one if len(states) == 1 else two)


def chainlit_step(key: str, kind: str, parent: str | None = None, **more: Any) -> dict[str, Any]:
    step = {"id": key, "threadId": "t", "parentId": parent, "type": kind, "name": "n", "input": ""}
    step |= {"output": f"text of {key}", "isError": False, "streaming": False, "feedback": None}
    return step | {"createdAt": f"2026-01-01T00:00:{key[1:]}"} | more


def judged(value: object, comment: str | None = None) -> dict[str, Any]:
    return {"feedback": {"forId": "s", "id": "f", "value": value, "comment": comment}}


CHAINLIT_STEPS = [
    chainlit_step("s01", "run", None, name="on_chat_start", output=""),
    chainlit_step("s02", "user_message"),
    chainlit_step("s03", "run", "s02", name="on_message", **judged(1, "fine")),
    chainlit_step("s04", "tool", "s03"),
    chainlit_step("s05", "assistant_message", "s03"),
    chainlit_step("s06", "user_message"),
    chainlit_step("s07", "assistant_message", "s06", **judged(0)),
    chainlit_step("s08", "user_message"),
]


def chainlit_thread(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    thread = {"id": "t", "createdAt": "2026-01-01", "name": "n", "userId": "u", "tags": None}
    return thread | {"metadata": {}, "steps": list(steps), "elements": []} | more


_PARTS = ("prompt", "question", "answer", "text", "input", "output", "messages", "label", "id")
OTHER_ROWS: tuple[dict[str, Any], ...] = (
    *({name: "x"} for name in _PARTS),
    {"prompt": "p", "completion": "c", "label": True},
    {"prompt": [{"role": "user", "content": "p"}], "completion": "c", "label": 0, "weight": 2},
    {"messages": [{"role": "user", "content": "p"}], "label": True},
    {"messages": [{"role": "user", "content": "p"}], "feedback": {"rating": "thumbsUp"}},
    {"conversations": [{"from": "human", "value": "p"}], "kto_tag": True},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"instruction": "i", "input": "", "output": "o", "kto_tag": "true"},
    {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []},
    {"id": "t", "timestamp": "", "input": {"messages": []}, "output": {}, "user-feedback": [1]},
    {"id": "s", "traceId": "t", "name": "user-feedback", "dataType": "BOOLEAN", "value": 1},
    {"id": "0", "fields": {"prompt": "p"}, "responses": {"label": [{"value": "good"}]}},
    {"id": 0, "data": {"prompt": "p"}, "annotations": [{"result": []}], "meta": {}},
    {"prompt": "p", "id": 0, "quality": "Good", "annotator": 1, "annotation_id": 1},
    {"user_query": "q", "ai_response": "a", "feedback_rating": "👍", "message_id": "m"},
    {"Question": "q", "Answer": "a", "flag": "Good", "timestamp": "2026-01-01"},
    {"prompt": "p", "generation": "g", "rating": 5, "model_id": "m", "comment": "c"},
    {"type": "upvote", "state": "Ohio"},
    {"threadId": "t", "input": "q", "output": "a", "value": 1},
    {"conversation": [{"role": "user", "content": "q"}], "label": True},
    {"conversation": "[]", "flag": True, "timestamp": "2026-01-01"},
    {"id": "t", "steps": [{"input": "q", "output": "a"}]},
    {"conversation_a": [], "conversation_b": [], "winner": "model_a", "models": ["m", "n"]},
    {"id": "c", "chat": {"messages": []}, "rating": 1},
)
"""Rows of other tools and of our own form."""


def mixed(rows: tuple[dict[str, Any], ...]) -> list[list[object]]:
    """Each row alone, and all of them beside each other."""
    return [*([row] for row in rows), list(itertools.chain(rows))]
