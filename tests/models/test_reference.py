"""References keep the initial policy's log-probs; scoring with them does not change the policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kto_lightning.batches.types import PackedBatch
from kto_lightning.models.loading import LoadedModel, load_model
from kto_lightning.models.lora import REFERENCE_ADAPTER, LoRA
from kto_lightning.models.packed_run import CHECKPOINTING
from kto_lightning.models.policy import Policy
from kto_lightning.models.reference import AdapterReference, FrozenReference, Reference
from kto_lightning.models.routes.choose import make_policy
from tests.support.factories import make_tokenizer, save_adapter, save_model
from tests.support.plain_forwards import Plain, make_triples, pack_triples
from tests.support.tolerances import assert_same_logps

VOCABULARY = 300
KINDS = ("frozen copy", "adapter off", "frozen adapter")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and an adapter on it that changes its log-probs."""
    root = tmp_path_factory.mktemp("models")
    model = save_model(root / "model", "llama", make_tokenizer(vocab_size=VOCABULARY))
    return {"model": model, "adapter": save_adapter(root / "adapter", model)}


def load(kind: str, directories: dict[str, Path], *, dropout: float = 0.0) -> LoadedModel:
    if kind == "frozen copy":
        return load_model(str(directories["model"]))
    if kind == "adapter off":
        return load_model(str(directories["model"]), lora=LoRA(r=4, alpha=8.0, dropout=dropout))
    return load_model(str(directories["adapter"]), dropout=dropout > 0)


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, directories: dict[str, Path]) -> tuple[Policy, Reference]:
    return make_pair(load(request.param, directories), request.param)


def make_pair(loaded: LoadedModel, kind: str) -> tuple[Policy, Reference]:
    policy, obstacles = make_policy(loaded.model)
    assert not obstacles
    if kind == "frozen copy":
        return policy, FrozenReference.copy_of(policy)
    return policy, AdapterReference(policy, frozen_adapter=kind == "frozen adapter")


def batch() -> PackedBatch:
    lengths = [(7, 9, 5), (1, 20, 3), (11, 6, 30)]
    return pack_triples(make_triples(lengths, vocab_size=VOCABULARY))


def scores(scorer: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logps = scorer(batch())
    return logps.matched, logps.mismatched


def train(policy: Policy, *, scoring_with: Reference | None = None, steps: int = 3) -> None:
    """Gradient ascent on the matched log-probs; scores with the reference between forward and
    backward, as a training step does."""
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        logps = policy(batch()).matched
        if scoring_with is not None:
            scoring_with.logps(batch())
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_log_probs_stay_those_of_the_initial_policy(pair: tuple[Policy, Reference]) -> None:
    policy, reference = pair
    before = scores(policy)
    for found, expected in zip(scores(reference.logps), before, strict=True):
        assert_same_logps(found, expected)
    train(policy)
    after = scores(policy)
    assert all((new - old).abs().min() > 0.01 for new, old in zip(after, before, strict=True))
    for found, expected in zip(scores(reference.logps), before, strict=True):
        assert_same_logps(found, expected)


def test_scoring_does_not_change_the_policy(pair: tuple[Policy, Reference]) -> None:
    policy, reference = pair
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for training in (True, False):
        policy.train(training)
        modes = [module.training for module in policy.modules()]
        logps = reference.logps(batch())
        assert not logps.matched.requires_grad
        assert [module.training for module in policy.modules()] == modes
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
    assert any(flags.values())
    for name, p in policy.named_parameters():
        assert torch.equal(p, weights[name])
        assert p.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_scoring_does_not_change_training(
    kind: str, checkpointing: bool, directories: dict[str, Path]
) -> None:
    weights = []
    for is_scoring in (False, True):
        policy, reference = make_pair(load(kind, directories), kind)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _randomise_new_adapter(policy)
        if checkpointing:
            policy.causal_lm.gradient_checkpointing_enable(CHECKPOINTING)
        train(policy.train(), scoring_with=reference if is_scoring else None)
        weights.append(dict(policy.named_parameters()))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _randomise_new_adapter(policy: Policy) -> None:
    """peft draws other weights each time."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("asked", [{"matched": False}, {"mismatched": False}])
def test_scores_only_the_completions_asked_for(
    pair: tuple[Policy, Reference], asked: dict[str, bool]
) -> None:
    _, reference = pair
    some, both = reference.logps(batch(), **asked), reference.logps(batch())
    for name in ("matched", "mismatched"):
        if asked.get(name, True):
            assert_same_logps(getattr(some, name), getattr(both, name))
        else:
            assert getattr(some, name) is None


@pytest.mark.parametrize("kind", ["adapter off", "frozen adapter"])
def test_scoring_is_without_the_dropout_of_the_adapter(
    kind: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load(kind, directories, dropout=0.5)
    dropouts = [m for m in loaded.model.modules() if isinstance(m, torch.nn.Dropout)]
    if kind == "frozen adapter":  # saved without any
        for layers in (
            m.lora_dropout for m in loaded.model.modules() if hasattr(m, "lora_dropout")
        ):
            layers.update({name: torch.nn.Dropout(0.5) for name in layers})
    else:
        assert any(m.p == 0.5 for m in dropouts)
    policy, reference = make_pair(loaded, kind)
    _randomise_new_adapter(policy)
    policy.train()
    assert not torch.equal(scores(policy)[0], scores(policy)[0])
    first = scores(reference.logps)
    assert torch.equal(first[0], scores(reference.logps)[0])
    expected, _ = make_pair(load(kind, directories), kind)
    assert_same_logps(first[0], scores(expected)[0])


def test_the_given_adapter_is_trained_and_its_copy_is_frozen(
    directories: dict[str, Path],
) -> None:
    loaded = load("frozen adapter", directories)
    policy, reference = make_pair(loaded, "frozen adapter")
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    copied = {n: p.clone() for n, p in policy.named_parameters() if f".{REFERENCE_ADAPTER}." in n}
    assert len(copied) == len(trained)
    train(policy, scoring_with=reference)
    assert all(torch.equal(dict(policy.named_parameters())[name], copied[name]) for name in copied)
    assert policy.model.active_adapter == "default"


def test_an_error_while_scoring_does_not_change_the_policy(
    pair: tuple[Policy, Reference],
) -> None:
    policy, reference = pair
    before = scores(policy.train())
    flags = [p.requires_grad for p in policy.parameters()]
    wrong = batch()
    wrong.matched.input_ids = wrong.matched.input_ids + VOCABULARY
    with pytest.raises(IndexError):
        reference.logps(wrong)
    assert policy.training
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(scores(policy), before, strict=True))


def test_a_frozen_copy_shares_no_weight_and_has_no_gradient(
    directories: dict[str, Path],
) -> None:
    policy, reference = make_pair(load("frozen copy", directories), "frozen copy")
    assert isinstance(reference, FrozenReference)
    addresses = {p.data_ptr() for p in policy.parameters()}
    assert all(p.data_ptr() not in addresses for p in reference.policy.parameters())
    assert not any(p.requires_grad for p in reference.policy.parameters())
    assert not reference.policy.training
    reference.to(torch.device("meta"))
    assert {p.device.type for p in reference.policy.parameters()} == {"meta"}
    assert {p.device.type for p in policy.parameters()} == {"cpu"}


def test_log_probs_equal_those_of_the_plain_model(directories: dict[str, Path]) -> None:
    """Against the base's own forward, without our code or peft's."""
    triples = make_triples([(7, 9, 5), (1, 20, 3), (11, 6, 30)], vocab_size=VOCABULARY)
    plain = Plain(load_model(str(directories["model"])).model.eval(), triples)
    for kind in ("frozen copy", "adapter off"):
        _, reference = make_pair(load(kind, directories), kind)
        plain.assert_logps(reference.logps(batch()))
