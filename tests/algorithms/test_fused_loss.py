"""`fused_policy_loss` against the same loss by way of all logits, and its contract with the loss function."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightrft.algorithms import chunked_head
from lightrft.algorithms.fused_loss import FusedLoss, fused_policy_loss
from lightrft.algorithms.logprobs import token_logprobs
from lightrft.errors import ConfigError, DataError, StepError, UnsupportedError

DOUBLE = torch.float64


def shrink_chunks(patch: pytest.MonkeyPatch) -> None:
    """Chunks of at most 4 tokens and softmax blocks of one, so that small inputs cross many boundaries."""
    patch.setattr(chunked_head, "_MIN_CHUNK_ROWS", 4)
    patch.setattr(chunked_head, "_CPU_CHUNK_BYTES", 1)
    patch.setattr(chunked_head, "_CPU_BLOCK_BYTES", 1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_chunks(monkeypatch)


def build(
    num_tokens: int, hidden_size: int, vocabulary_size: int, dtype: torch.dtype = DOUBLE, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_tokens, hidden_size, generator=generator, dtype=DOUBLE).to(dtype)
    weight_VH = torch.randn(vocabulary_size, hidden_size, generator=generator, dtype=DOUBLE).to(dtype)
    ids_N = torch.randint(0, vocabulary_size, (num_tokens,), generator=generator)
    return hidden_NH.requires_grad_(), weight_VH.requires_grad_(), ids_N


def build_per_token(logprobs_N: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Old logprobs on both sides of the clip, advantages, and the weights of a mean over unmasked tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = logprobs_N.shape, logprobs_N.dtype
    mask_N = (torch.rand(shape, generator=generator) < 0.8).to(dtype)
    return {
        "old": logprobs_N.detach() + 0.4 * torch.randn(shape, generator=generator, dtype=dtype),
        "reference": logprobs_N.detach() + 0.4 * torch.randn(shape, generator=generator, dtype=dtype),
        "advantages": torch.randn(shape, generator=generator, dtype=dtype),
        "weights": mask_N / mask_N.sum().clamp(min=1),
    }


def ppo_with_kl(logprobs_N: Tensor, per_token_N: Mapping[str, Tensor]) -> Tensor:
    ratio_N, advantages_N = (logprobs_N - per_token_N["old"]).exp(), per_token_N["advantages"]
    clipped_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(0.8, 1.2) * advantages_N)
    log_ratio_N = per_token_N["reference"] - logprobs_N
    return (clipped_N + 0.1 * (log_ratio_N.exp() - log_ratio_N - 1)) * per_token_N["weights"]


def naive(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """By way of all logits, in torch alone."""
    log_p_NV = ((hidden_NH @ weight_VH.t()) / temperature).log_softmax(-1)
    return log_p_NV.gather(1, ids_N[:, None]).squeeze(1), -(log_p_NV.exp() * log_p_NV).sum(-1)


@settings(deadline=None, max_examples=30)
@given(
    num_tokens=st.integers(0, 19),
    hidden_size=st.integers(1, 5),
    vocabulary_size=st.integers(1, 12),
    temperature=st.floats(0.2, 4.0),
    has_bonus=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_equal_the_naive_ones_for_any_shape(
    num_tokens: int, hidden_size: int, vocabulary_size: int, temperature: float, has_bonus: bool, seed: int
) -> None:
    """PPO clip with KL and entropy bonus in float64: loss, logprobs, entropies and both gradients agree to 1e-10."""
    hidden_NH, weight_VH, ids_N = build(num_tokens, hidden_size, vocabulary_size, seed=seed)
    logprobs_N, entropy_N = naive(hidden_NH, weight_VH, ids_N, temperature)
    per_token_N = build_per_token(logprobs_N, seed)
    bonus_N = 0.3 * per_token_N["weights"] if has_bonus else None
    expected = ppo_with_kl(logprobs_N, per_token_N).sum() - (0 if bonus_N is None else (bonus_N * entropy_N).sum())
    expected_grads = torch.autograd.grad(expected, (hidden_NH, weight_VH))
    with pytest.MonkeyPatch.context() as patch:
        shrink_chunks(patch)
        fused = fused_policy_loss(
            hidden_NH,
            weight_VH,
            ids_N,
            ppo_with_kl,
            per_token_N,
            temperature=temperature,
            with_entropy=True,
            entropy_weights_N=bonus_N,
        )
    grads = torch.autograd.grad(fused.loss, (hidden_NH, weight_VH))
    torch.testing.assert_close(fused.loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.logprobs_N, logprobs_N.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.entropy_N, entropy_N.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("small_chunks")
def test_gradients_agree_with_finite_differences() -> None:
    """Central differences of the loss itself give the gradients that the forward pass formed."""
    hidden_NH, weight_VH, ids_N = build(6, 2, 5)
    per_token_N = build_per_token(naive(hidden_NH, weight_VH, ids_N)[0])

    def loss_at(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        bonus_N = per_token_N["weights"]
        return fused_policy_loss(hidden_NH, weight_VH, ids_N, ppo_with_kl, per_token_N, entropy_weights_N=bonus_N).loss

    grads = torch.autograd.grad(loss_at(hidden_NH, weight_VH), (hidden_NH, weight_VH))
    points = [hidden_NH.detach(), weight_VH.detach()]
    for index, grad in enumerate(grads):
        for position in range(points[index].numel()):
            step = torch.zeros(points[index].numel(), dtype=DOUBLE)
            step[position] = 1e-6
            step = step.view_as(points[index])
            up, down = list(points), list(points)
            up[index], down[index] = points[index] + step, points[index] - step
            slope = (loss_at(*up) - loss_at(*down)) / 2e-6
            torch.testing.assert_close(grad.flatten()[position], slope, rtol=1e-6, atol=1e-8)


def test_float32_agrees_with_float64() -> None:
    """In float32 the loss and its gradients differ from those in float64 by rounding: logits have errors of 1e-6."""
    hidden_NH, weight_VH, ids_N = build(300, 16, 500, torch.float32)
    per_token_N = build_per_token(naive(hidden_NH, weight_VH, ids_N)[0])
    fused = fused_policy_loss(hidden_NH, weight_VH, ids_N, ppo_with_kl, per_token_N)
    grads = torch.autograd.grad(fused.loss, (hidden_NH, weight_VH))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    expected = ppo_with_kl(
        naive(*wide, ids_N)[0], {name: tensor.double() for name, tensor in per_token_N.items()}
    ).sum()
    expected_grads = torch.autograd.grad(expected, wide)
    assert fused.loss.dtype == torch.float32
    torch.testing.assert_close(fused.loss.double(), expected, rtol=1e-4, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() / expected_grad.norm() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_sixteen_bit_gradients_are_summed_over_chunks_in_float32(dtype: torch.dtype) -> None:
    """Over 500 chunks the head's gradient is right to the rounding of the operands, which a 16-bit sum misses."""
    hidden_NH, weight_VH, ids_N = build(2000, 4, 5, dtype)
    with torch.no_grad():
        hidden_NH.abs_()
    ones_N = {"weights": torch.ones(2000)}
    fused = fused_policy_loss(hidden_NH, weight_VH, ids_N * 0, weighted, ones_N)
    grads = torch.autograd.grad(fused.loss, (hidden_NH, weight_VH))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    expected_grads = torch.autograd.grad(-naive(*wide, ids_N * 0)[0].sum(), wide)
    assert fused.loss.dtype == torch.float32
    for tensor, grad, expected in zip((hidden_NH, weight_VH), grads, expected_grads, strict=True):
        assert grad.dtype == tensor.dtype == dtype
        assert (grad - expected).norm() / expected.norm() < 2 * torch.finfo(dtype).eps


def test_autocast_changes_nothing() -> None:
    """Inside of an autocast region the products stay in the dtype of the inputs, and so do loss and gradients."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 7, torch.float32)
    per_token_N = {"weights": torch.linspace(0, 1, 9)}
    outside = fused_policy_loss(hidden_NH, weight_VH, ids_N, weighted, per_token_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_policy_loss(hidden_NH, weight_VH, ids_N, weighted, per_token_N)
    torch.testing.assert_close(inside.loss, outside.loss, rtol=0, atol=0)
    inputs = (hidden_NH, weight_VH)
    torch.testing.assert_close(
        torch.autograd.grad(inside.loss, inputs), torch.autograd.grad(outside.loss, inputs), rtol=0, atol=0
    )


def weighted(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
    return -logprobs_C * per_token_C["weights"]


def fuse(num_tokens: int = 9, **changes: object) -> FusedLoss:
    """A small valid call with some of its arguments replaced."""
    hidden_NH, weight_VH, ids_N = build(num_tokens, 3, 7)
    arguments = {
        "hidden_NH": hidden_NH,
        "weight_VH": weight_VH,
        "token_ids_N": ids_N,
        "loss_fn": weighted,
        "per_token_N": {"weights": torch.linspace(0, 1, num_tokens, dtype=DOUBLE)},
    }
    return fused_policy_loss(**{**arguments, **changes})  # type: ignore[arg-type]  # wrong ones are the point


@pytest.mark.usefixtures("small_chunks")
def test_an_upstream_factor_scales_the_gradients() -> None:
    """A loss that is scaled before its backward has gradients scaled alike, as gradient accumulation needs."""
    hidden_NH, weight_VH, _ = build(9, 3, 7)
    once = torch.autograd.grad(fuse(hidden_NH=hidden_NH, weight_VH=weight_VH).loss, (hidden_NH, weight_VH))
    scaled = torch.autograd.grad(-3 * fuse(hidden_NH=hidden_NH, weight_VH=weight_VH).loss, (hidden_NH, weight_VH))
    torch.testing.assert_close(scaled, tuple(-3 * grad for grad in once), rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("small_chunks")
def test_gradients_accumulate_over_calls() -> None:
    """Two losses of halves of the tokens leave the gradient of the loss of all of them."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 7)
    weights_N = torch.linspace(0, 1, 9, dtype=DOUBLE)
    fuse(weight_VH=weight_VH).loss.backward()
    assert weight_VH.grad is not None
    whole, weight_VH.grad = weight_VH.grad, None
    for rows in (slice(0, 5), slice(5, 9)):
        fused_policy_loss(
            hidden_NH[rows], weight_VH, ids_N[rows], weighted, {"weights": weights_N[rows]}
        ).loss.backward()
    torch.testing.assert_close(weight_VH.grad, whole, rtol=1e-12, atol=1e-12)


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place and handed out once; a second backward raises and doesn't scale them again."""
    loss = fuse().loss
    loss.backward(retain_graph=True)
    with pytest.raises(StepError, match="call fused_policy_loss again"):
        loss.backward()


def test_a_second_derivative_is_refused() -> None:
    """A backward with create_graph raises and does not treat the gradient as a constant."""
    with pytest.raises(UnsupportedError, match="create_graph=True"):
        fuse().loss.backward(create_graph=True)


def test_results_beside_the_loss_are_detached() -> None:
    """Logprobs and entropies carry no graph; entropies are there when asked for or weighed."""
    fused = fuse(with_entropy=True)
    assert fused.loss.requires_grad
    assert not fused.logprobs_N.requires_grad
    assert fused.entropy_N is not None
    assert not fused.entropy_N.requires_grad
    assert fuse().entropy_N is None
    assert fuse(entropy_weights_N=torch.ones(9)).entropy_N is not None


@attrs.define
class Seen:
    """What a run allocated at most in one tensor, and how many matrix products it made."""

    numel: int = 0
    products: int = 0


class Watch(TorchDispatchMode):
    """Looks at every operation below autograd; torch demands the subclass."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.numel = max(self.seen.numel, result.untyped_storage().nbytes() // result.element_size())
        self.seen.products += func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
        return result


@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns", "products"),
    [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)],
)
def test_three_products_at_most(hidden_learns: bool, weight_learns: bool, products: int) -> None:
    """Loss and gradients take one matrix product and one for each gradient that is asked for."""
    hidden_NH, weight_VH, _ = build(9, 3, 7)
    hidden_NH.requires_grad_(hidden_learns)
    weight_VH.requires_grad_(weight_learns)
    seen = Seen()
    with Watch(seen):
        fused = fuse(hidden_NH=hidden_NH, weight_VH=weight_VH)
        if fused.loss.requires_grad:
            fused.loss.backward()
    assert seen.products == products
    assert (hidden_NH.grad is not None, weight_VH.grad is not None) == (hidden_learns, weight_learns)


@pytest.mark.usefixtures("small_chunks")
def test_no_gradient_is_formed_where_gradients_are_disabled() -> None:
    """Under no_grad the loss is the same and costs one product per chunk."""
    seen = Seen()
    with torch.no_grad(), Watch(seen):
        fused = fuse()
    assert not fused.loss.requires_grad
    assert seen.products == 3
    torch.testing.assert_close(fused.loss, fuse().loss.detach(), rtol=0, atol=0)


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    """Loss, gradients and entropy bonus of 60 tokens allocate no tensor beyond one chunk of 4 rows."""
    hidden_NH, weight_VH, ids_N = build(60, 3, 700)
    weights_N = torch.ones(60, dtype=DOUBLE)
    seen = Seen()
    with Watch(seen):
        fused_policy_loss(
            hidden_NH, weight_VH, ids_N, weighted, {"weights": weights_N}, entropy_weights_N=weights_N
        ).loss.backward()
    assert seen.numel == 4 * 700


def test_agrees_with_the_recomputing_logprobs() -> None:
    """`token_logprobs` and the fused loss see the same logprobs, bit for bit."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 7)
    torch.testing.assert_close(
        fuse().logprobs_N, token_logprobs(hidden_NH, weight_VH, ids_N).logprobs_N.detach(), rtol=0, atol=0
    )


def mean_over_the_chunk(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
    return -logprobs_C * per_token_C["weights"] / per_token_C["weights"].sum()


def per_chunk_length(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
    return weighted(logprobs_C, per_token_C) / logprobs_C.shape[0]


def padded(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weighted(logprobs_C, per_token_C), logprobs_C.new_zeros(130 - logprobs_C.shape[0])])


def summed(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
    return weighted(logprobs_C, per_token_C).sum()


def constant(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
    return weighted(logprobs_C.detach(), per_token_C)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (mean_over_the_chunk, "is not elementwise in tokens"),
        (per_chunk_length, "is not elementwise in tokens"),
        (padded, "is not elementwise in tokens"),
        (summed, r"loss_fn returned shape=\(\) for 130 tokens"),
        (constant, "does not depend on the logprobs"),
    ],
)
def test_a_loss_function_that_breaks_its_laws_is_refused(loss_fn: object, message: str) -> None:
    """A normaliser over the chunk, a fixed length, a sum and a constant are named."""
    with pytest.raises(ConfigError, match=message):
        fuse(130, loss_fn=loss_fn)


def test_a_loss_that_is_all_rounding_is_elementwise() -> None:
    """The KL of a policy with itself differs from 0 by rounding alone, and is not taken for a mean over the chunk."""
    hidden_NH, weight_VH, ids_N = build(1000, 3, 7, torch.float32)
    old_N = token_logprobs(hidden_NH, weight_VH, ids_N).logprobs_N.detach() + 1e-4 * torch.randn(1000)

    def kl(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
        difference_C = per_token_C["old"] - logprobs_C
        return difference_C.exp() - difference_C - 1

    assert fused_policy_loss(hidden_NH, weight_VH, ids_N, kl, {"old": old_N}).loss.abs() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token_N": {"advantages": torch.ones(8)}}, r"advantages.shape=\(8,\) has not one row for each of 9"),
        ({"per_token_N": {"advantages": torch.tensor(1.0)}}, r"advantages.shape=\(\)"),
        ({"per_token_N": {"advantages": torch.ones(9, device="meta")}}, "advantages.device='meta'"),
        ({"per_token_N": {"values": torch.ones(9, requires_grad=True)}}, "values.requires_grad=True"),
        ({"entropy_weights_N": torch.ones(3)}, "entropy_weights.shape"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    """Each per-token tensor is named with what is wrong about it."""
    with pytest.raises(ConfigError, match=message):
        fuse(**changes)


def test_an_id_outside_of_the_vocabulary_is_refused() -> None:
    """An id of -100, as labels have it for masked tokens, is an error with its position."""
    with pytest.raises(DataError, match=r"token_ids\[0\]=-100"):
        fuse(token_ids_N=torch.full((9,), -100))


@pytest.mark.usefixtures("small_chunks")
def test_everything_stays_on_the_device_of_the_inputs() -> None:
    """Loss, logprobs, entropies and gradients lie where the hidden states do, whatever torch's default device is."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 7, torch.bfloat16)
    weights_N = torch.ones(9)
    with torch.device("meta"):
        fused = fused_policy_loss(
            hidden_NH, weight_VH, ids_N, weighted, {"weights": weights_N}, entropy_weights_N=weights_N
        )
        grads = torch.autograd.grad(fused.loss, (hidden_NH, weight_VH))
    assert fused.entropy_N is not None
    for tensor in (fused.loss, fused.logprobs_N, fused.entropy_N, *grads):
        assert tensor.device == hidden_NH.device


@pytest.mark.usefixtures("small_chunks")
def test_a_narrow_loss_is_summed_in_float32() -> None:
    """Token losses in 16 bits are added up in float32: the sum differs from numpy's by no more than its rounding."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 7, torch.float32)

    def narrow(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
        return weighted(logprobs_C, per_token_C).bfloat16()

    fused = fused_policy_loss(hidden_NH, weight_VH, ids_N, narrow, {"weights": torch.linspace(1, 2, 9)})
    losses_N = narrow(fused.logprobs_N, {"weights": torch.linspace(1, 2, 9)})
    assert fused.loss.item() == pytest.approx(losses_N.double().numpy().sum(), rel=1e-6)


def test_a_loss_function_is_never_called_without_tokens() -> None:
    """A loss function that needs a token finds one in every call, also where there are few or none to compute."""
    sizes: list[int] = []

    def counted(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
        sizes.append(logprobs_C.shape[0])
        return weighted(logprobs_C, per_token_C)

    fuse(9, loss_fn=counted)
    fuse(127, loss_fn=counted)
    fuse(0, loss_fn=counted)
    assert sizes == [9, 127]


@pytest.mark.parametrize(("part", "is_elementwise"), [(1e-5, True), (1e-2, False)])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_what_counts_as_elementwise(part: float, is_elementwise: bool, scale: float) -> None:
    """A loss may depend on the other tokens by its rounding, but not by a hundredth, however small the losses are."""

    def depends_on_length(logprobs_C: Tensor, per_token_C: Mapping[str, Tensor]) -> Tensor:
        return weighted(logprobs_C, per_token_C) * scale * (1 + part * (logprobs_C.shape[0] > 64))

    if is_elementwise:
        assert fuse(130, loss_fn=depends_on_length).loss.isfinite()
    else:
        with pytest.raises(ConfigError, match="is not elementwise in tokens"):
            fuse(130, loss_fn=depends_on_length)


def test_a_loss_of_nan_is_no_other_tokens_doing() -> None:
    """A token whose loss is NaN makes the loss NaN, which a step will see; it is not blamed on the loss function."""
    weights_N = torch.ones(130, dtype=DOUBLE)
    weights_N[3] = float("nan")
    assert fuse(130, per_token_N={"weights": weights_N}).loss.isnan()
