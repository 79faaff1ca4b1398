"""Instructions made by code: every kind can be followed, and held out means unseen."""

import random

from kto_lightning.demo import instructions
from kto_lightning.demo.answers import Answer
from kto_lightning.demo.instructions import (
    HELD_OUT_KINDS,
    TRAINED_KINDS,
    draw_held_out,
    draw_instructions,
)
from tests.support.instructions import WRONG, follow


def test_every_kind_can_be_followed_and_not_followed():
    rng = random.Random(0)
    drawn = draw_instructions(rng, 300) + draw_held_out(rng, 60, kinds=HELD_OUT_KINDS)
    assert {each.kind for each in drawn} == {*TRAINED_KINDS, *HELD_OUT_KINDS}
    assert len(TRAINED_KINDS) >= 8
    for each in drawn:
        assert each.accepts(f" {follow(each)}\n"), each
        assert not each.accepts(""), each
        assert not each.accepts(WRONG), each


def test_an_answer_that_was_cut_is_bad():
    [instruction] = draw_instructions(random.Random(0), 1)
    text = follow(instruction)
    assert Answer(problem=instruction, completion=text).is_good
    assert not Answer(problem=instruction, completion=text, is_whole=False).is_good


def test_held_out_instructions_are_never_trained_on():
    rng = random.Random(0)
    held_out = draw_held_out(rng, 200)
    assert len({each.prompt for each in held_out}) == 200
    assert {each.kind for each in held_out} == set(TRAINED_KINDS)
    assert not {*instructions.TOPICS} & {*instructions.HELD_OUT_TOPICS}
    seen = frozenset(each.prompt for each in held_out)
    trained = draw_instructions(rng, 1000, exclude=seen)
    assert not seen & {each.prompt for each in trained}
    assert not {each.kind for each in trained} & {*HELD_OUT_KINDS}


def test_kinds_come_in_turn_and_the_seed_decides():
    first, again, other = (draw_instructions(random.Random(seed), 40) for seed in (1, 1, 2))
    assert first == again != other
    assert [each.kind for each in first] == [*TRAINED_KINDS] * 4


def test_a_record_is_a_chat_or_a_text():
    [instruction] = draw_instructions(random.Random(0), 1)
    answer = Answer(problem=instruction, completion="Hm.")
    assert answer.as_record(is_chat=False) == {
        "prompt": instruction.prompt,
        "completion": "Hm.",
        "label": answer.is_good,
    }
    chat = answer.as_record(is_chat=True)
    assert chat["prompt"] == [{"role": "user", "content": instruction.prompt}]
    assert chat["completion"] == [{"role": "assistant", "content": "Hm."}]
