"""The checks find what they are for: wrong log-probs, gradients and exports."""

from typing import Any

import pytest

from kto_lightning.models import policy as policy_module
from tests.architectures import checks, exports, loading

SLIGHTLY_WRONG = 1 + 2e-5
"""Less than the probe tells from rounding."""


def wrong_logps(patch: pytest.MonkeyPatch) -> None:
    right = policy_module.linear_logps

    def wrong(*arguments: Any, **options: Any) -> Any:
        return SLIGHTLY_WRONG * right(*arguments, **options)

    patch.setattr(policy_module, "linear_logps", wrong)


def wrong_gradients(patch: pytest.MonkeyPatch) -> None:
    right = loading.build_models

    def wrong(*arguments: Any, **options: Any) -> Any:
        built = right(*arguments, **options)
        *_, last = (p for p in built.policy.parameters() if p.requires_grad)
        last.register_hook(lambda gradient: SLIGHTLY_WRONG * gradient)
        return built

    patch.setattr(loading, "build_models", wrong)


def wrong_export(patch: pytest.MonkeyPatch) -> None:
    right = exports.save_policy

    def wrong(policy: Any, *arguments: Any, **options: Any) -> Any:
        next(policy.causal_lm.parameters()).data[0, 0] += 1e-6
        return right(policy, *arguments, **options)

    patch.setattr(exports, "save_policy", wrong)


@pytest.mark.parametrize("damage", [wrong_logps, wrong_gradients, wrong_export])
def test_what_is_wrong_is_found(damage, tmp_path, monkeypatch) -> None:
    damage(monkeypatch)
    with pytest.raises(AssertionError):
        checks.check_family("llama", tmp_path, checkpointing=False)
