"""The loss against numbers worked by hand, float64 autograd, and Liger's KTO loss as third opinion.

By hand: σ(−u) = 1 / (1 + e^u) with e = 2.718281828, e^0.5 = 1.648721271, e^1.5 = 4.481689070, and
σ(u) = 1 − σ(−u).

Liger (liger_kernel.chunked_loss) is right where it and we define the same thing: the mean over the
batch of unweighted losses, with a z0 that is given. Where it is not, so that it is no opinion:

- Class weights: it has no place for λ_D and λ_U. Wrapped in a trainer, they are dropped.
- It computes 1 − σ(u), which in float32 is exactly 0, gradient too, from u = 17 on.
- Beside the loss it returns sums of rewards and log-probs over a class, not means.
- Given `average_log_prob`, log-probs are means over tokens, which is not the paper's log π(y|x).
"""

import pytest
import torch
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction, LigerFusedLinearKTOLoss

from kto_kernels import linear_logps
from kto_kernels.linear_logps import eager
from kto_lightning.loss import kto_loss, reference_point
from tests.support.tolerances import EPS, RELATIVE, assert_errs_like_plain

# log_ratio, desirable, z0, beta, weight, loss
BY_HAND = [
    (10.0, True, 0.0, 0.1, 1.0, 0.26894142),  # σ(−1)
    (10.0, False, 0.0, 0.1, 1.0, 0.73105858),  # σ(1)
    (-10.0, True, 0.0, 0.1, 1.0, 0.73105858),
    (-10.0, False, 0.0, 0.1, 1.0, 0.26894142),
    (0.0, True, 0.0, 0.1, 1.0, 0.5),
    (0.0, False, 0.0, 0.1, 1.0, 0.5),
    (10.0, True, 5.0, 0.1, 1.0, 0.37754067),  # σ(−0.5)
    (10.0, False, 5.0, 0.1, 1.0, 0.62245933),  # σ(0.5)
    (-10.0, True, 5.0, 0.1, 1.0, 0.81757448),  # σ(1.5)
    (-10.0, False, 5.0, 0.1, 1.0, 0.18242552),  # σ(−1.5)
    (2.0, True, 4.0, 0.5, 1.0, 0.73105858),  # σ(1)
    (2.0, False, 4.0, 0.5, 1.0, 0.26894142),  # σ(−1)
    (10.0, True, 10.0, 0.1, 1.0, 0.5),  # a gain equal to the reference point is no gain
    (10.0, False, 0.0, 0.1, 2.94, 2.14931223),  # 2.94 · σ(1)
    (10.0, True, 5.0, 0.1, 1.33, 0.50212909),  # 1.33 · σ(−0.5)
    (10.0, True, 0.0, 0.1, 0.0, 0.0),
]


@pytest.mark.parametrize(("log_ratio", "desirable", "z0", "beta", "weight", "expected"), BY_HAND)
def test_one_example(log_ratio, desirable, z0, beta, weight, expected):
    loss = kto_loss(
        torch.tensor([log_ratio]),
        torch.tensor([desirable]),
        torch.tensor(z0),
        beta=beta,
        weight=torch.tensor([weight]),
    )
    assert loss.item() == pytest.approx(expected, rel=3e-7, abs=1e-12)


def test_batch_mean_with_class_weights():
    # (0.26894142 + 0.73105858 + 2 · 0.73105858 + 2 · 0.26894142) / 4 = 3 / 4
    loss = kto_loss(
        torch.tensor([10.0, -10.0, 10.0, -10.0]),
        torch.tensor([True, True, False, False]),
        torch.tensor(0.0),
        beta=0.1,
        weight=torch.tensor([1.0, 1.0, 2.0, 2.0]),
    )
    assert loss.mean().item() == pytest.approx(0.75, rel=2e-7)


def test_apo_zero_is_the_loss_without_reference_point():
    # arXiv:2408.06266: 1 − σ(β r) for the desirable, σ(β r) for the undesirable.
    log_ratio = torch.tensor([-30.0, 4.0, 7.0, -2.0])
    desirable = torch.tensor([True, True, False, False])
    ours = kto_loss(log_ratio, desirable, torch.zeros(()), beta=0.1)
    theirs = torch.where(
        desirable, 1 - torch.sigmoid(0.1 * log_ratio), torch.sigmoid(0.1 * log_ratio)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("log_ratios", "expected"),
    [([3.0, -1.0, 4.0], 2.0), ([-3.0, 1.0, -4.0], 0.0), ([-5.0, 5.5], 0.25), ([0.0], 0.0)],
)
def test_reference_point_is_averaged_then_clamped(log_ratios, expected):
    # The second and third rows are not means of clamped parts: those would be 1/3 and 2.75.
    mismatched = torch.tensor(log_ratios, requires_grad=True)
    z0 = reference_point(mismatched.sum(), len(log_ratios))
    assert z0.item() == expected
    assert not z0.requires_grad


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("z0", [0.0, 1e4])
@pytest.mark.parametrize("beta", [0.01, 0.1, 10.0])
def test_finite_at_extremes(desirable, log_ratio, z0, beta):
    ratio = torch.tensor([log_ratio], requires_grad=True)
    loss = kto_loss(ratio, torch.tensor([desirable]), torch.tensor(z0), beta=beta)
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    assert 0.0 <= loss.item() <= 1.0


@pytest.mark.parametrize("weight", [1.0, 2.94])
@pytest.mark.parametrize("z0", [0.0, 12.5])
def test_float64_truth_with_autograd(z0, weight):
    # The truth is the paper's own form, λ (1 − σ(u)), where float64 still carries it. A relative
    # rounding error of the argument u is |u| times as large in e^u. The gradient β λ s (1 − s) has
    # an s that float32 cannot tell from 1 nearer than eps / 2: hence its absolute part.
    eps32, eps64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    log_ratio = torch.linspace(-200.0, 200.0, 401)
    for label in (True, False):
        desirable = torch.full_like(log_ratio, label, dtype=torch.bool)
        ratio = log_ratio.clone().requires_grad_()
        loss = kto_loss(ratio, desirable, torch.tensor(z0), beta=0.1, weight=weight)
        (gradient,) = torch.autograd.grad(loss.sum(), ratio)

        true_ratio = log_ratio.double().requires_grad_()
        argument = (0.1 if label else -0.1) * (true_ratio - z0)
        truth = weight * (1.0 - torch.sigmoid(argument))
        (true_gradient,) = torch.autograd.grad(truth.sum(), true_ratio)

        relative = 4 * eps32 * (1.0 + argument.detach().abs())
        error, allowed = (loss - truth).abs(), relative * truth + 4 * eps64 * weight
        assert (error <= allowed).all()
        error = (gradient - true_gradient).abs()
        allowed = relative * true_gradient.abs() + 0.1 * weight * eps32
        assert (error <= allowed).all()


def _liger_loss(log_ratio, desirable, z0, *, beta):
    loss, *_ = LigerFusedLinearKTOFunction.preference_loss_fn(
        log_ratio, desirable, torch.empty(len(log_ratio), 1), torch.zeros(()), beta=beta, kl=z0
    )
    return loss


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("z0", [0.0, 3.25])
def test_liger_agrees_on_the_unweighted_mean(beta, z0):
    log_ratio = torch.linspace(-12.0, 12.0, 25, requires_grad=True)
    desirable = torch.arange(25) % 3 > 0
    reference = torch.tensor(z0)
    ours = kto_loss(log_ratio, desirable, reference, beta=beta).mean()
    theirs = _liger_loss(log_ratio, desirable, reference, beta=beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
    (our_gradient,) = torch.autograd.grad(ours, log_ratio)
    (their_gradient,) = torch.autograd.grad(theirs, log_ratio)
    # Liger's sigmoid' is σ(1 − σ), of which eps remains where σ is almost 1.
    atol = EPS * beta / len(log_ratio)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=RELATIVE, atol=atol)


def test_where_liger_is_no_opinion():
    # u = 20: the truth is e^−20 / (1 + e^−20) = 2.0611536e-9, Liger says 0 and stops learning.
    log_ratio = torch.tensor([200.0], requires_grad=True)
    desirable = torch.tensor([True])
    ours = kto_loss(log_ratio, desirable, torch.zeros(()), beta=0.1).mean()
    theirs = _liger_loss(log_ratio, desirable, torch.zeros(()), beta=0.1)
    assert ours.item() == pytest.approx(2.0611536e-9, rel=1e-5)
    assert theirs.item() == 0.0
    assert torch.autograd.grad(ours, log_ratio)[0].item() < 0.0
    assert torch.autograd.grad(theirs, log_ratio)[0].item() == 0.0


def test_liger_agrees_from_hidden_states_on():
    # The same from the last hidden states: log-probs, loss and both gradients.
    batch, length, hidden_size, vocab = 6, 9, 16, 40
    states = torch.randn(2, batch, length, hidden_size)  # the policy's and the reference's
    matrices = torch.randn(2, vocab, hidden_size)
    targets = torch.randint(vocab, (batch, length))
    scored = torch.arange(length) >= torch.tensor([[0], [2], [5], [8], [1], [3]])
    desirable = torch.tensor([True, False, True, True, False, False])
    z0 = torch.tensor(0.7)

    def with_gradients(function, dtype):
        policy, reference = (
            (hidden.to(dtype, copy=True), weight.to(dtype, copy=True))
            for hidden, weight in zip(states, matrices, strict=True)
        )
        leaves = [leaf.requires_grad_() for leaf in policy]
        new, old = (
            function(hidden.flatten(0, 1), weight, targets.flatten()).view(batch, length)
            for hidden, weight in (policy, reference)
        )
        log_ratio = ((new - old.detach()) * scored).sum(1)
        loss = kto_loss(log_ratio, desirable, z0.to(dtype), beta=0.1).mean()
        return loss, *torch.autograd.grad(loss, leaves)

    ours = with_gradients(linear_logps, torch.float32)
    truth = with_gradients(eager.linear_logps, torch.float64)

    liger = LigerFusedLinearKTOLoss(beta=0.1, compiled=False, use_ref_model=True, chunk_size=2)
    hidden, weight = states[0].clone().requires_grad_(), matrices[0].clone().requires_grad_()
    loss, _ = liger(
        hidden,
        weight,
        targets.masked_fill(~scored, -100),
        preference_labels=desirable,
        ref_input=states[1],
        ref_weight=matrices[1],
        kl=z0,
    )
    torch.testing.assert_close(ours[0], loss, rtol=RELATIVE, atol=0.0)
    their_gradients = torch.autograd.grad(loss, (hidden, weight))
    for values in zip(ours[1:], their_gradients, truth[1:], strict=True):
        assert_errs_like_plain(*values)
