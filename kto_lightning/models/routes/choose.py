"""The fastest route on which a model computes what its own forward does; checks of its head."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kto_lightning.errors import ConfigError, ModelError
from kto_lightning.models.architecture import language_model, logit_settings, mixing_layer_types
from kto_lightning.models.attention import UnsupportedAttentionError
from kto_lightning.models.loading_errors import explain_loading
from kto_lightning.models.policy import Policy
from kto_lightning.models.routes.probe import SHORT, Probe, close, long_example, own_token_logps
from kto_lightning.models.routes.prompt_cache import UnsupportedCacheError
from kto_lightning.models.routes.runner import ROUTES, RouteName

RouteSetting = Literal["auto", RouteName]
ROUTE_SETTINGS: tuple[RouteSetting, ...] = get_args(RouteSetting)
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_FAILURES = TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError
"""Of a model's code on inputs that it is not written for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteNeeds:
    """What a run asks of a model's route."""

    route: RouteSetting = "auto"
    """auto: the fastest; another: that one or an error."""
    longest: int | None = 0
    """The most tokens of a sequence; None: unlimited."""
    sharded: bool = False
    """Whether the weights are sharded over ranks, which then call the decoder in step."""


ANY_RUN = RouteNeeds()


def make_policy(
    model: nn.Module, *, random: bool = False, needs: RouteNeeds = ANY_RUN
) -> tuple[Policy, dict[RouteName, str]]:
    """Wrap a model as a policy on the fastest route that is exact.

    Args:
        model: see `Policy`, as `random`.
        needs: what the run asks of the route.

    Returns:
        the policy, and why it does not take each faster route.

    Raises:
        ModelError: if the model's log-probs are not those of a linear head on its last hidden
            state, or would no longer be in training, or depend on later tokens. Then all routes
            would be wrong.
        ConfigError: if the route that is asked for is not exact, or sharded ranks would not run the
            same layers.
    """
    policy = Policy(model, route="padded", random=random, single_group=needs.sharded)
    if random and needs.sharded and _skips_layers(policy.causal_lm):
        raise ConfigError(
            f"--model.dropout true: {type(policy.causal_lm).__name__} then skips layers at random, "
            "each rank others, and the ranks gather sharded weights together. Use "
            "--trainer.strategy ddp, or remove --model.dropout."
        )
    _check_head_kind(policy.causal_lm)
    training = model.training
    policy.eval()
    try:
        short = Probe.of(policy.causal_lm, SHORT)
        _check_causal(policy.causal_lm, short)
        short.run_own_forward(policy.causal_lm)
        _check_head(policy, short)
        obstacles = _obstacles(policy, short, needs)
    finally:
        policy.train(training)
    return policy, obstacles


def explain_obstacles(obstacles: dict[RouteName, str]) -> str:
    """Why a model does not take the faster routes, for a line of the summary."""
    return "; ".join(f"not {route}: {obstacle}" for route, obstacle in obstacles.items())


def _obstacles(policy: Policy, short: Probe, needs: RouteNeeds) -> dict[RouteName, str]:
    """Switch a policy to its route; returns why it does not take each faster one."""
    probes = [short]
    lengths = long_example(policy.causal_lm, needs.longest)
    if lengths:
        long = Probe.of(policy.causal_lm, lengths)
        name = type(policy.causal_lm).__name__
        what = f"the model {name} cannot run on a sequence of {sum(lengths[1][::2])} tokens"
        with explain_loading(name, what):
            long.run_one_by_one(policy)
        probes.append(long)
    obstacles: dict[RouteName, str] = {}
    for route in ROUTES[:-1]:
        if needs.route not in ("auto", route):
            continue
        obstacle = _obstacle(policy, route, probes, needs)
        if obstacle is None:
            policy.use_route(route)
            return obstacles
        if needs.route == route:
            raise ConfigError(
                f"--model.route {route}: {type(policy.causal_lm).__name__} does not run so: "
                f"{obstacle}. Remove it, and the fastest route that does is taken."
            )
        obstacles[route] = obstacle
    wrong = _obstacle(policy, "padded", probes, needs)
    if wrong is not None:
        raise ModelError(
            f"{type(policy.causal_lm).__name__}: {wrong}, although that only puts sequences of "
            "different lengths into the rows of a batch. Train another model."
        )
    return obstacles


def _obstacle(
    policy: Policy, route: RouteName, probes: list[Probe], needs: RouteNeeds
) -> str | None:
    """Why a model cannot run by a route; None: it can. Leaves it on the padded one."""
    model = policy.causal_lm
    if route != "padded" and policy.random and _skips_layers(model):
        return "it skips layers at random, and prompts are read from all"
    if route == "packed":
        types = mixing_layer_types(model.config.get_text_config())
        unknown = set(types or ()) - KNOWN_LAYER_TYPES
        if unknown:
            return f"it has layers of type {', '.join(sorted(unknown))}"
        if not language_model(model)._can_set_attn_implementation():
            return "its attention cannot be replaced"
    try:
        policy.use_route(route)
        found = next(filter(None, (probe.difference(policy) for probe in probes)), None)
    except (UnsupportedAttentionError, UnsupportedCacheError) as error:
        return str(error)
    except _FAILURES as error:
        what = {"packed": "take packed sequences", "cached": "continue prompts from a cache"}
        return (
            f"it does not {what.get(route, 'run on padded rows')} ({type(error).__name__}: {error})"
        )
    finally:
        policy.use_route("padded")
    return None if found is None else f"its {route} {found} differ from those of its own forward"


def _skips_layers(model: nn.Module) -> bool:
    return any(getattr(module, "layerdrop", 0.0) > 0 for module in model.modules())


def _check_head_kind(causal_lm: PreTrainedModel) -> None:
    """Check that the head is a weight with at most a low-rank update.

    The other adapters change no log-prob before the first update, so that comparing log-probs does
    not find them.
    """
    head: Any = causal_lm.get_output_embeddings()  # or peft's layer around it
    name = type(causal_lm).__name__
    if getattr(head, "weight", None) is None:
        raise ModelError(f"{name} has no output embeddings. Train a causal language model.")
    adapters = list(getattr(head, "lora_A", {}))
    extras = {
        "DoRA or another variant of LoRA": any(a in head.lora_variant for a in adapters),
        "a LoRA bias": any(head.lora_bias[a] for a in adapters),
        "dropout": any(getattr(head.lora_dropout[a], "p", 0.0) > 0 for a in adapters),
    }
    for extra, present in extras.items():
        if present:
            raise ModelError(
                f"{name}: the adapter on its head has {extra}, which is not supported. Leave "
                "the head out of the adapter's target_modules, or make the adapter without it."
            )


def _check_causal(model: PreTrainedModel, probe: Probe) -> None:
    """Refuse encoders and prefix language models such as PaliGemma: their log-prob of a token
    depends on the tokens after it."""
    whole = probe.first_sequence
    start = whole[: len(whole) // 2]
    with torch.no_grad():
        found, expected = (own_token_logps(model, i)[: len(start) - 1] for i in (start, whole))
    if not close(found.sum(), expected.sum(), full_precision=probe.full_precision):
        raise ModelError(
            f"{type(model).__name__} is not causal: its log-probs of a token depend on the tokens "
            "after it. Train a causal language model."
        )


@torch.no_grad()
def _check_head(padded: Policy, probe: Probe) -> None:
    """Compare the padded route with the model's own forward.

    Both use the model's original attention, so that a difference can only come from the head: the
    log-prob kernel in the one, the model's own logits in the other.
    """
    name, expected = type(padded.causal_lm).__name__, probe.matched
    assert expected is not None
    batch = probe.batch(shares_prompts=False)

    def score() -> tuple[Tensor, bool]:
        matched = padded(batch, mismatched=False).matched
        assert matched is not None
        return matched, close(matched, expected, full_precision=probe.full_precision)

    with suppress(*_FAILURES):
        if score()[1]:
            return
    # Qwen2.5-Omni would count those of images too. Kosmos-2.5 counts from another number than 0.
    padded.gives_positions = True
    padded.use_route("padded")
    matched, equal = score()
    if equal:
        return
    padded.logit_scale, padded.softcap = 1.0, None
    if score()[1]:
        found = logit_settings(padded.causal_lm.config.get_text_config())
        raise ModelError(
            f"{name}: its own forward in transformers leaves out {found}, which the config of its "
            "language model has and other programs apply, so that there is not one log-prob of a "
            "token. To train what transformers computes, set it to 1 or null in text_config of its "
            "config.json."
        )
    raise ModelError(
        f"{name}: its log-probs are not those of its output embeddings over its last hidden state "
        f"(got {_listed(matched)}, its own forward gives {_listed(expected)}). Train a causal "
        "language model with a plain head."
    )


def _listed(logps: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in logps.tolist())
