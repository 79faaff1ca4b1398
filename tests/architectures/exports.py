"""An exported family is what was trained: its weights, or the log-probs of its merged adapter."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from kto_lightning.models.build import BuiltModels
from kto_lightning.models.export import save_policy
from kto_lightning.models.policy import Policy
from tests.architectures.loading import reopened, saved_class
from tests.architectures.shrink import PAD_ID, VOCABULARY
from tests.models.test_merge import ORIGIN
from tests.support.plain_forwards import SIDES, Plain, Triple, plain_logps
from tests.support.tolerances import FACTOR_OF_MANY, assert_errs_like_plain


@torch.no_grad()
def _disturb_trained(policy: Policy) -> None:
    """Change every weight that has a gradient, but for the padding token's row, which some classes
    set to 0 when they are loaded."""
    for module in policy.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.grad is None:
                continue
            noise = 0.1 * torch.randn_like(parameter)
            if len(parameter) == VOCABULARY:
                noise[PAD_ID] = 0.0
            parameter += noise


def check_export(
    built: BuiltModels, plain: Plain, triples: list[Triple], directory: Path, output: Path
) -> None:
    """A full export has the trained weights, each; a merged one has the adapted log-probs."""
    policy = built.policy
    with_adapter = hasattr(policy.model, "peft_config")
    if not with_adapter:
        _disturb_trained(policy)
    trained = {name: tensor.clone() for name, tensor in policy.causal_lm.state_dict().items()}
    obstacle = save_policy(policy, AutoTokenizer.from_pretrained(directory), output, origin=ORIGIN)
    if obstacle is None:
        opened = reopened(output / "model")
        assert type(opened) is saved_class(directory)
    if not with_adapter:
        found = opened.state_dict()
        assert found.keys() == trained.keys()
        differing = [name for name, tensor in trained.items() if not found[name].equal(tensor)]
        assert not differing, differing
        return
    if obstacle is None:
        expected = plain.model.merge_and_unload()  # which rounds the weights once more too
    else:
        opened = PeftModel.from_pretrained(reopened(directory), output / "adapter").eval()
        expected = plain.model
    with torch.no_grad():
        pairs = zip(plain_logps(opened, triples), plain_logps(expected, triples), strict=True)
        for side, (found, peft) in zip(SIDES, pairs, strict=True):
            assert_errs_like_plain(found, peft, plain.truth[side], name=side, factor=FACTOR_OF_MANY)
