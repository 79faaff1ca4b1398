"""Answers that follow the demo's instructions, and one that follows none."""

from kto_lightning.demo import answer_checks
from kto_lightning.demo.instructions import Instruction

WRONG = "I, Sir, cannot do that; Sorry, but neither today nor, I fear, tomorrow"
SENTENCES = {
    "French": "Elle est dans la mer.",
    "German": "Das ist nicht die See.",
    "Italian": "Il mare è nel sole.",
    "Spanish": "El mar es como el sol.",
}


def follow(instruction: Instruction) -> str:
    """An answer that does as it is told, made from the prompt's arguments."""
    given = instruction.arguments
    answers = {
        "at most n words": lambda: "Very salty.",
        "lowercase": lambda: "it is salty.",
        "JSON with keys": lambda: "{" + ", ".join(f'"{key}": "x"' for key in given["keys"]) + "}",
        "numbered list": lambda: "\n".join(f"{n}. item {n}" for n in range(1, given["count"] + 1)),
        "without a comma": lambda: "It is salty.",
        "ends with": lambda: f"Salty. {given['ending']}",
        "language": lambda: SENTENCES[given["language"]],
        "sum in words": lambda: answer_checks.NUMBERS[given["left"] + given["right"]],
        "yes or no": lambda: "Yes." if given["is_yes"] else "No.",
        "with a word": lambda: f"It has {given['word']} in it.",
        "capitals": lambda: "IT IS SALTY.",
        "begins with": lambda: f"{given['beginning']} it is salty.",
        "two sentences": lambda: "It is salty. It is white.",
    }
    return answers[instruction.kind]()
