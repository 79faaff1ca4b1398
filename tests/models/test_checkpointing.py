"""Activation checkpointing is read off a model's layers, whatever transformers calls it."""

from kto_lightning.models.checkpointing import checkpoints_activations
from tests.support.factories import add_adapter, make_model


def test_it_is_seen_in_a_model_and_under_an_adapter():
    model = make_model("llama", vocab_size=64)
    assert not checkpoints_activations(model)
    assert not checkpoints_activations(model.lm_head)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert checkpoints_activations(model)
    assert checkpoints_activations(add_adapter(model, target_modules=["q_proj"]))
    model.gradient_checkpointing_disable()
    assert not checkpoints_activations(model)
