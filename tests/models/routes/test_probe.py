"""What the probe compares: tokens, lengths beyond a model's limits, gradients, neighbours."""

from typing import Any

import pytest
import torch
from torch import nn

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.routes.choose import RouteNeeds, make_policy
from kto_lightning.models.routes.probe import SHORT, Probe, long_example
from tests.support.factories import make_model

VOCABULARY = 97


def model_of(architecture: str, **overrides: Any) -> Any:
    return make_model(architecture, vocab_size=VOCABULARY, **overrides)


@pytest.mark.parametrize(
    ("longest", "prompt"), [(31, None), (32, None), (33, 26), (60, 48), (None, 48)]
)
def test_one_example_crosses_the_limits_that_sequences_can_cross(longest, prompt) -> None:
    model = model_of("mistral", sliding_window=32)
    lengths = long_example(model, longest)
    if prompt is None:
        assert not lengths
    else:
        assert lengths[1] == (prompt, 4, 7)
        assert 32 < prompt + 7 <= (longest or 55)


def test_no_token_of_a_probe_is_padding_or_an_image() -> None:
    model = model_of("llama", pad_token_id=0)
    model.config.image_token_id = 5
    probe = Probe.of(model, [(300, 300, 300)])
    drawn = {int(i) for i in probe.first_sequence} | set(probe.others[0].tolist())
    assert drawn.isdisjoint({0, 5})
    assert len(drawn) > VOCABULARY - 5


def wrong_beyond_the_window(model: Any) -> Any:
    """A model that computes something else in packed runs of sequences longer than its window."""

    def scale(layer: nn.Module, arguments: tuple, options: dict[str, Any]) -> Any:
        is_packed = "kto_packed" in str(model.config._attn_implementation)
        if is_packed and int(options["position_ids"].max()) >= 32:
            return (1.1 * arguments[0], *arguments[1:]), options
        return None

    model.model.layers[0].register_forward_pre_hook(scale, with_kwargs=True)
    return model


def test_a_wrong_window_is_found_where_sequences_can_be_longer() -> None:
    model = wrong_beyond_the_window(model_of("mistral", sliding_window=32))
    assert make_policy(model, needs=RouteNeeds(longest=32))[0].route == "packed"
    model = wrong_beyond_the_window(model_of("mistral", sliding_window=32))
    policy, obstacles = make_policy(model, needs=RouteNeeds(longest=64))
    assert policy.route == "cached"
    assert obstacles == {"packed": "its packed log-probs differ from those of its own forward"}


class Stopped(torch.autograd.Function):
    """The identity, with half a gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] / 2


def losing_gradients(model: Any) -> Any:
    """A model that loses gradient in calls of several sequences in one row."""

    def lose(layer: nn.Module, arguments: tuple, options: dict[str, Any], output: Any) -> Any:
        positions = options.get("position_ids")
        restarts = positions is not None and bool((positions.diff() < 0).any())
        return Stopped.apply(output) if restarts else output

    model.model.layers[0].register_forward_hook(lose, with_kwargs=True)
    return model


def test_a_lost_gradient_is_found() -> None:
    policy, obstacles = make_policy(losing_gradients(model_of("llama")))
    assert obstacles == {"packed": "its packed gradients differ from those of its own forward"}
    assert policy.route == "cached"


def test_rows_that_see_each_other_are_no_route() -> None:
    model = model_of("llama")

    def mix_rows(layer: nn.Module, arguments: tuple) -> tuple:
        hidden, *others = arguments
        mixed = hidden + hidden.roll(1, dims=0) if len(hidden) > 1 else hidden
        return (mixed, *others)

    def mix_tokens(layer: nn.Module, arguments: tuple) -> tuple:
        hidden, *others = arguments
        before = nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return (hidden + before, *others)

    for mix in (mix_rows, mix_tokens):  # the second, so that it does not run packed
        model.model.layers[0].register_forward_pre_hook(mix)
    with pytest.raises(ModelError, match="log-probs"):
        make_policy(model)


@pytest.mark.parametrize("route", ["packed", "cached", "padded"])
def test_a_route_can_be_forced(route) -> None:
    policy, obstacles = make_policy(model_of("llama").train(), needs=RouteNeeds(route=route))
    assert policy.route == route
    assert policy.model.training
    probe = Probe.of(policy.causal_lm, SHORT)
    with policy.use_original_attention() as plain:
        probe.run_own_forward(plain)
    assert probe.difference(policy) is None
    assert not obstacles


def test_a_forced_route_that_is_not_exact_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--model\.route packed: MambaForCausalLM does not run"):
        make_policy(model_of("mamba"), needs=RouteNeeds(route="packed"))


def test_sharded_ranks_must_run_the_same_layers() -> None:
    model = model_of("xglm", layerdrop=0.5)
    sharded = RouteNeeds(sharded=True)
    assert make_policy(model, needs=sharded)[0].route == "cached"
    with pytest.raises(ConfigError, match=r"--model\.dropout true: XGLM\w+ then skips layers"):
        make_policy(model, random=True, needs=sharded)
