"""Conversations kept as trees: every message names its parent, and an edit starts a new branch."""

from kto_lightning.data.strict_json import RecordError, quote


def branch_to(messages: dict[str, dict], last: str, parent_key: str, root: object = None) -> list:
    """The messages from the first one of a conversation down to `last`.

    Args:
        messages: by id.
        parent_key: the key of a message that holds its parent's id.
        root: the parent that the tool gives a first message; no text and "" mean the same.

    Raises:
        RecordError: if a message of the branch is missing, or it has no beginning.
    """
    branch, seen, current = [], set(), last
    while True:
        if current in seen:
            raise RecordError(
                f"the message {quote(current)} is its own ancestor, so its conversation has no "
                "beginning. Export the conversation again."
            )
        if current not in messages:
            raise RecordError(
                f"the message {quote(current)} is missing in the conversation. Export the whole "
                "conversation, its messages in one piece.",
                kind="a message is missing in the conversation",
            )
        seen.add(current)
        branch.append(messages[current])
        parent = messages[current].get(parent_key)
        if not isinstance(parent, str) or parent in ("", root):
            if parent not in (None, "", root):
                raise RecordError(
                    f"'{parent_key}' of the message {quote(current)} must be a message's id, got "
                    f"{quote(parent)}. Export the conversation again."
                )
            return branch[::-1]
        current = parent
