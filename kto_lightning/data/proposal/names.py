"""Names that columns of feedback have: how well a path's name fits a field of a record."""

import re


def word_set(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_a-zA-Z]+|[A-Z]")
GENERIC = word_set("value values text content body string raw data items list fields record")
"""Last parts of a path that say nothing of what it holds; the part before them is its name."""
EXACT = 4.0
"""For a column that is named as the field."""

NAMES: dict[str, dict[str, float]] = {
    "prompt": {
        **dict.fromkeys(("prompt", "question", "query", "instruction", "instructions"), 3.0),
        **dict.fromkeys(("input", "inputs", "problem", "request", "ask", "q"), 2.0),
        **dict.fromkeys(("user", "human", "utterance", "task", "post", "source", "history"), 1.5),
        **dict.fromkeys(("context", "article", "document", "passage", "dialogue", "dialog"), 1.0),
        **dict.fromkeys(("conversation", "message", "messages", "chat"), 1.5),
    },
    "completion": {
        **dict.fromkeys(("completion", "response", "responses", "answer", "answers"), 3.0),
        **dict.fromkeys(("output", "outputs", "reply", "generation", "generated"), 3.0),
        **dict.fromkeys(("prediction", "choices", "solution"), 2.0),
        **dict.fromkeys(("bot", "assistant", "ai", "llm", "gpt", "model", "result"), 1.5),
        **dict.fromkeys(("target", "summary", "translation", "candidate", "choice"), 1.5),
        **dict.fromkeys(("agent", "code", "message"), 1.0),
    },
    "messages": {
        **dict.fromkeys(("messages", "conversation", "conversations", "dialogue", "dialog"), 3.0),
        **dict.fromkeys(("chat", "thread", "trace", "turns", "history", "transcript"), 2.0),
    },
    "label": {
        **dict.fromkeys(
            ("label", "labels", "rating", "ratings", "feedback", "thumbs", "vote"), 3.0
        ),
        **dict.fromkeys(("thumb", "votes", "verdict", "judgment", "judgement", "judgments"), 3.0),
        **dict.fromkeys(
            ("desirable", "liked", "like", "helpful", "reaction", "stars", "star"), 3.0
        ),
        **dict.fromkeys(
            ("score", "scores", "flag", "quality", "grade", "reward", "csat", "nps"), 2.5
        ),
        **dict.fromkeys(("helpfulness", "correct", "good", "accepted", "approved", "tag"), 2.0),
        **dict.fromkeys(("sentiment", "evaluation", "satisfaction", "satisfied", "overall"), 2.0),
        **dict.fromkeys(("annotation", "annotations", "preference", "review", "assessment"), 2.0),
        **dict.fromkeys(("correctness", "useful", "relevant", "acceptable", "pass", "passed"), 2.0),
        **dict.fromkeys(("rate", "rated", "accept", "toxic", "unsafe", "harmful"), 2.0),
        **dict.fromkeys(("choices", "choice", "class", "result", "opinion", "upvoted"), 1.0),
    },
    "system": {
        **dict.fromkeys(("system", "systemprompt", "systemmessage", "systeminstruction"), 3.0),
        **dict.fromkeys(("sysprompt", "persona", "preprompt"), 2.0),
    },
    "weight": {"weight": 3.0, "weights": 3.0, "sampleweight": 3.0},
    "chosen": {
        **dict.fromkeys(("chosen", "preferred", "preferredoutput", "chosenresponse"), 3.0),
        **dict.fromkeys(("better", "betterresponse", "winner", "win", "winning", "best"), 2.0),
        **dict.fromkeys(("accepted", "positive", "responsechosen", "acceptedresponse"), 2.0),
    },
    "rejected": {
        **dict.fromkeys(("rejected", "rejectedresponse", "rejectedmessages", "dispreferred"), 3.0),
        **dict.fromkeys(("nonpreferred", "nonpreferredoutput", "unpreferred", "notpreferred"), 3.0),
        **dict.fromkeys(("worse", "worseresponse", "loser", "lose", "losing", "worst"), 2.0),
        **dict.fromkeys(("negative", "responserejected"), 2.0),
    },
}
"""Words of names, and whole names without separators, by how much they speak for a field."""

OTHERS: dict[str, frozenset[str]] = {
    "text": word_set(
        "id ids uuid hash time timestamp date created updated type category topic title name url "
        "link lang language version comment comments reason reasons explanation rationale critique "
        "note notes feedback rating score status tags tag metadata meta reference expected gold "
        "truth template annotator suggestion suggestions email session latency error system "
        "chosen rejected principle justification review labelling labeling judge grader rubric "
        "count tokens length"
    ),
    "label": word_set(
        "id ids uuid hash index time timestamp date created updated lead duration latency cost "
        "tokens token length count num number version annotated completed confidence weight "
        "temperature seed page split lang language category type status role position rank line "
        "age year price source name has public comment comments reason "
        "bookmarked cancelled truth release level difficulty suggestion suggestions prediction "
        "predictions metadata meta probability logprob perplexity toxicity option options"
    ),
}
"""Words of names that speak against a text to train on, and against a label."""
PENALTY = 3.0


def parts_of(path: str) -> tuple[list[str], list[str]]:
    """The words of a path's own name, and those of what it stands in, in lower case."""
    names = [part for part in path.split(".") if part != "*" and not part.isdigit()]
    own = next((i for i in reversed(range(len(names))) if names[i].lower() not in GENERIC), None)
    own = len(names) - 1 if own is None else own
    split = [[word.lower() for word in TOKEN.findall(name)] for name in names]
    return (split[own] if split else []), [word for part in split[: max(own, 0)] for word in part]


def name_score(path: str, role: str) -> float:
    """How well a path's name fits a field of a record: from below 0 to `EXACT`."""
    own, above = parts_of(path)
    table = NAMES[role]
    if "".join(own) in (role, f"{role}s"):
        score = EXACT
    else:
        matches = sorted((table[word] for word in own if word in table), reverse=True)
        matches += [table["".join(own)]] if "".join(own) in table else []
        score = max(matches, default=0.0) + 0.2 * max(len(matches) - 1, 0)
        score += (0.6 if role == "label" else 0.4) * max(
            (table.get(word, 0.0) for word in above), default=0.0
        )
    if role in ("chosen", "rejected", "system", "weight"):
        return score
    others = OTHERS["label" if role == "label" else "text"]
    against = any(word in others and word not in table for word in own)
    against_above = any(word in others and word not in table for word in above)
    return score - PENALTY * against - 0.5 * PENALTY * against_above
