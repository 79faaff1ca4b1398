"""Models that are sent without the values of their parameters."""

import torch

from kto_lightning.models.lora import LoRA
from kto_lightning.models.lora_layers import add_adapter
from kto_lightning.models.policy import Policy
from kto_lightning.models.routes.choose import make_policy
from kto_lightning.models.skeleton import dump_skeleton, load_skeleton
from tests.support.factories import make_model
from tests.support.steps import step_batch


def fill(skeleton: Policy, policy: Policy) -> None:
    skeleton.load_state_dict(policy.state_dict(), assign=True)


def test_a_filled_skeleton_computes_what_its_model_does() -> None:
    policy, _ = make_policy(make_model("gemma2", vocab_size=97))
    skeleton = load_skeleton(dump_skeleton(policy))
    assert all(p.is_meta for p in skeleton.parameters())
    names = [name for name, _ in policy.named_parameters(remove_duplicate=False)]
    assert [n for n, _ in skeleton.named_parameters(remove_duplicate=False)] == names
    fill(skeleton, policy)
    batch = step_batch().micro_batches[0]
    found, expected = skeleton(batch), policy(batch)
    assert torch.equal(found.matched, expected.matched)
    assert torch.equal(found.mismatched, expected.mismatched)


def test_ties_and_frozen_weights_stay() -> None:
    model = make_model("llama", vocab_size=97, tie_word_embeddings=True)
    policy = Policy(add_adapter(model, LoRA(r=2)))
    skeleton = load_skeleton(dump_skeleton(policy))
    head = skeleton.causal_lm.get_output_embeddings()
    assert head.weight is skeleton.causal_lm.get_input_embeddings().weight
    trains = [name for name, p in skeleton.named_parameters() if p.requires_grad]
    assert trains == [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trains


def test_router_logits_are_captured_again() -> None:
    """transformers installs its hooks on first use, as the probe is."""
    policy, _ = make_policy(make_model("mixtral", vocab_size=97))
    skeleton = load_skeleton(dump_skeleton(policy))
    fill(skeleton, policy)
    batch = step_batch().micro_batches[0]
    expected = policy(batch).auxiliary_loss
    assert expected is not None
    assert torch.equal(skeleton(batch).auxiliary_loss, expected)
