"""FastChat: the log of its web server, with votes on single answers and side by side.

Where: `LOGDIR` (by default the folder in which the server was started) has a file for each day,
`YYYY-MM-DD-conv.json`, a JSON object on every line: `{tstamp, type, model, state, ip}`, or
`{tstamp, type, models, states, ip}` for two models. `type` is `chat` after every answer, and
`upvote`, `downvote`, `flag`, `leftvote`, `rightvote`, `tievote` or `bothbad_vote` for a vote on the
last answer. A state has `roles`, `messages [[role, text]]`, `offset` and `system_message` (older
versions: `system`).

The winner of a vote between two answers is desirable, the other one is not; each has its own
conversation. The first `offset` messages are examples of the template that the user has not seen;
they are left out, as FastChat's own data sets leave them out. Conversations that may hold images
are refused: the log has only their text.

Source: github.com/lm-sys/FastChat, fastchat/serve/gradio_web_server.py,
fastchat/serve/gradio_block_arena_anony.py, fastchat/conversation.py, fastchat/constants.py,
fastchat/serve/monitor/clean_chat_data.py.
"""

from collections.abc import Iterator, Sequence

from kto_lightning.data.importers.importer import (
    NO_JUDGEMENT,
    Importer,
    Judged,
    make_record,
    most,
    read_each,
    refusal,
)
from kto_lightning.data.rows import BadRecord, Row, SkippedRow
from kto_lightning.data.strict_json import RecordError, quote

VOTES: dict[str, tuple[bool, ...]] = {
    "upvote": (True,),
    "downvote": (False,),
    "leftvote": (True, False),
    "rightvote": (False, True),
    "bothbad_vote": (False, False),
}
"""The labels of the last answers in `state` or in the two `states`."""
UNDECIDED = {"flag": NO_JUDGEMENT, "tievote": "with a tie"}
ROLES = ("user", "assistant")
ERRORS = (
    "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**",
    "$MODERATION$ YOUR INPUT VIOLATES OUR CONTENT MODERATION GUIDELINES.",
    "**API REQUEST ERROR**",
)
"""How messages begin that the server has written in place of a text."""


def matches(rows: Sequence[object]) -> bool:
    """Whether the rows are entries of the log."""
    return most(rows, _is_entry)


def records(rows: Iterator[Row | BadRecord]) -> Iterator[Row | BadRecord | SkippedRow]:
    """A row for every vote on an answer, two for a vote between two answers."""
    return read_each(rows, _judge)


def _is_entry(row: dict) -> bool:
    states = _states(row)
    return isinstance(row.get("type"), str) and bool(states) and all(map(_is_state, states))


def _states(row: dict) -> list:
    states = row["states"] if "states" in row else [row.get("state")]
    return states if isinstance(states, list) else []


def _is_state(state: object) -> bool:
    return isinstance(state, dict) and {"roles", "messages", "offset"} <= state.keys()


def _judge(value: object) -> Iterator[Judged]:
    if not isinstance(value, dict) or not _is_entry(value):
        yield RecordError(
            f"an entry of the log must have 'type' and 'state' or 'states', got {quote(value)}. "
            "Remove it.",
            kind="an entry of the log must have 'type' and 'state'",
        )
        return
    vote, states = value["type"], _states(value)
    labels = VOTES.get(vote)
    if labels is None:  # `chat` and others: no vote
        if vote in UNDECIDED:
            yield UNDECIDED[vote]
    elif len(states) != len(labels):
        yield RecordError(
            f"a '{vote}' needs {len(labels)} conversations, got {len(states)}. Remove it."
        )
    else:
        for state, label in zip(states, labels, strict=True):
            try:
                model = state.get("model_name") or value.get("model")
                yield make_record(_messages(state), label, _system(state), model=model, vote=vote)
            except RecordError as problem:
                yield problem


def _system(state: dict) -> object:
    return state.get("system_message") or state.get("system")


def _messages(state: dict) -> list[dict]:
    """Raises RecordError for messages that are not text, or errors of the server."""
    offset, messages, roles = (state[key] for key in ("offset", "messages", "roles"))
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise RecordError(f"'offset' must be a number of messages, got {quote(offset)}. Fix it.")
    if not isinstance(messages, list) or not isinstance(roles, list) or len(roles) != 2:
        raise RecordError(
            f"'messages' must be a list, and 'roles' two names, got {quote(roles)}. "
            "Remove the vote."
        )
    if not messages[offset:]:
        raise RecordError("the conversation has no messages. Remove the vote.")
    if "has_csam_image" in state:  # only states of the vision arena have the key
        raise RecordError("the conversation may hold images, which the log lacks. Remove the vote.")
    return [_message(index, item, roles) for index, item in enumerate(messages[offset:])]


def _message(index: int, item: object, roles: list) -> dict:
    if not isinstance(item, list) or len(item) != 2 or item[0] != roles[index % 2]:
        expected = f"[{quote(roles[index % 2])}, text]"
        raise refusal(index + 1, f"must be {expected}, got {quote(item)}")
    text = item[1]
    if isinstance(text, list) and len(text) == 2 and not text[1]:  # a text and no images
        text = text[0]
    if not isinstance(text, str) or not text.strip():
        raise refusal(index + 1, f"must be text, got {quote(text)}")
    if text.startswith(ERRORS):
        raise refusal(index + 1, f"is an error of the server, got {quote(text)}")
    return {"role": ROLES[index % 2], "content": text}


IMPORTER = Importer(
    what="a FastChat conversation log",
    matches=matches,
    records=records,
    nothing_found="the file is a log of FastChat without a vote, only with `chat` entries. Votes "
    "are in the logs of the same name that users of the web server have written.",
)
