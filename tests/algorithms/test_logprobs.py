"""`token_logprobs` against log_softmax and gather over all logits, and its cost in memory."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightrft.algorithms import chunked_head
from lightrft.algorithms.logprobs import token_logprobs
from lightrft.errors import ConfigError, DataError, UnsupportedError

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


def reference(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """By way of all logits, in torch alone."""
    log_p_NV = ((hidden_NH @ weight_VH.t()) / temperature).log_softmax(-1)
    return log_p_NV.gather(1, ids_N[:, None]).squeeze(1), -(log_p_NV.exp() * log_p_NV).sum(-1)


def mixed(logprobs_N: Tensor, entropy_N: Tensor) -> Tensor:
    """A scalar in which every token has another weight."""
    weights_N = torch.linspace(-1, 2, logprobs_N.shape[0], dtype=logprobs_N.dtype)
    return (weights_N * logprobs_N).sum() + (weights_N.flip(0) * entropy_N).sum()


@settings(deadline=None, max_examples=30)
@given(
    num_tokens=st.integers(0, 19),
    hidden_size=st.integers(1, 5),
    vocabulary_size=st.integers(1, 12),
    temperature=st.floats(0.2, 4.0),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_log_softmax_for_any_shape(
    num_tokens: int, hidden_size: int, vocabulary_size: int, temperature: float, seed: int
) -> None:
    """In float64, logprobs, entropies and both gradients equal those by way of all logits, for any chunking."""
    hidden_NH, weight_VH, ids_N = build(num_tokens, hidden_size, vocabulary_size, seed=seed)
    expected_N, expected_entropy_N = reference(hidden_NH, weight_VH, ids_N, temperature)
    expected_grads = torch.autograd.grad(mixed(expected_N, expected_entropy_N), (hidden_NH, weight_VH))
    with pytest.MonkeyPatch.context() as patch:
        shrink_chunks(patch)
        result = token_logprobs(hidden_NH, weight_VH, ids_N, temperature=temperature, with_entropy=True)
        assert result.entropy_N is not None
        grads = torch.autograd.grad(mixed(result.logprobs_N, result.entropy_N), (hidden_NH, weight_VH))
    torch.testing.assert_close(result.logprobs_N, expected_N, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.entropy_N, expected_entropy_N, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_float32_agrees_with_float64() -> None:
    """In float32 the results differ from those in float64 by rounding: logits of 20 have errors of 1e-6."""
    hidden_NH, weight_VH, ids_N = build(300, 16, 500, torch.float32)
    result = token_logprobs(hidden_NH, weight_VH, ids_N, with_entropy=True)
    assert result.entropy_N is not None
    grads = torch.autograd.grad(mixed(result.logprobs_N, result.entropy_N), (hidden_NH, weight_VH))
    hidden64_NH, weight64_VH = (
        hidden_NH.detach().double().requires_grad_(),
        weight_VH.detach().double().requires_grad_(),
    )
    expected_N, expected_entropy_N = reference(hidden64_NH, weight64_VH, ids_N, 1.0)
    expected_grads = torch.autograd.grad(mixed(expected_N, expected_entropy_N), (hidden64_NH, weight64_VH))
    torch.testing.assert_close(result.logprobs_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy_N.double(), expected_entropy_N, rtol=1e-5, atol=1e-5)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert (grad - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_sixteen_bit_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Results are float32 and equal log_softmax in float64 of the rounded logits; gradients have the inputs' dtype."""
    hidden_NH, weight_VH, ids_N = build(11, 8, 300, dtype)
    result = token_logprobs(hidden_NH, weight_VH, ids_N)
    logits_NV = (hidden_NH @ weight_VH.t()).detach().double()
    expected_N = logits_NV.log_softmax(-1).gather(1, ids_N[:, None]).squeeze(1)
    assert result.logprobs_N.dtype == torch.float32
    torch.testing.assert_close(result.logprobs_N.double(), expected_N, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(result.logprobs_N.sum(), (hidden_NH, weight_VH))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    expected_grads = torch.autograd.grad(reference(*wide, ids_N, 1.0)[0].sum(), wide)
    unit = torch.finfo(dtype).eps  # the operands of each product are rounded to it once
    for tensor, grad, expected in zip((hidden_NH, weight_VH), grads, expected_grads, strict=True):
        assert grad.dtype == tensor.dtype == dtype
        assert (grad - expected).norm() / expected.norm() < 2 * unit


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 5, 8, 9])
@pytest.mark.usefixtures("small_chunks")
def test_any_number_of_tokens_around_a_chunk(num_tokens: int) -> None:
    """Nothing changes at the boundaries of a chunk of 4, without gradient and with int32 ids as well."""
    hidden_NH, weight_VH, ids_N = build(num_tokens, 3, 7)
    with torch.no_grad():
        result = token_logprobs(hidden_NH, weight_VH, ids_N.int(), temperature=0.7)
        expected_N, _ = reference(hidden_NH, weight_VH, ids_N, 0.7)
    assert result.entropy_N is None
    assert not result.logprobs_N.requires_grad
    torch.testing.assert_close(result.logprobs_N, expected_N, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck() -> None:
    """The gradients of logprobs and entropies agree with finite differences."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 6)

    def both(hidden_NH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        result = token_logprobs(hidden_NH, weight_VH, ids_N, temperature=0.8, with_entropy=True)
        assert result.entropy_N is not None
        return result.logprobs_N, result.entropy_N

    assert torch.autograd.gradcheck(both, (hidden_NH, weight_VH))


@pytest.mark.usefixtures("small_chunks")
def test_gradient_of_the_entropy_alone() -> None:
    """A loss of the entropies alone has their gradient."""
    hidden_NH, weight_VH, ids_N = build(6, 3, 5)
    result = token_logprobs(hidden_NH, weight_VH, ids_N, with_entropy=True)
    assert result.entropy_N is not None
    (grad,) = torch.autograd.grad(result.entropy_N.sum(), hidden_NH)
    (expected,) = torch.autograd.grad(reference(hidden_NH, weight_VH, ids_N, 1.0)[1].sum(), hidden_NH)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("small_chunks")
def test_backward_twice_through_one_graph() -> None:
    """With retain_graph a second backward gives the same gradients, as for any other operation."""
    hidden_NH, weight_VH, ids_N = build(6, 3, 5)
    loss = token_logprobs(hidden_NH, weight_VH, ids_N).logprobs_N.sum()
    first = torch.autograd.grad(loss, (hidden_NH, weight_VH), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden_NH, weight_VH))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_large_logits_stay_finite() -> None:
    """Logits whose exponentials overflow and underflow give exact logprobs and finite gradients."""
    weight_VH = torch.tensor([[1000.0], [0.0], [-1000.0]], requires_grad=True)
    hidden_NH = torch.ones(3, 1, requires_grad=True)
    result = token_logprobs(hidden_NH, weight_VH, torch.arange(3), with_entropy=True)
    assert result.entropy_N is not None
    assert result.logprobs_N.tolist() == [0.0, -1000.0, -2000.0]
    assert result.entropy_N.tolist() == [0.0, 0.0, 0.0]
    (result.logprobs_N + result.entropy_N).sum().backward()
    assert hidden_NH.grad is not None
    assert hidden_NH.grad.flatten().tolist() == [0.0, -1000.0, -2000.0]


@attrs.define
class Largest:
    """What a run allocated at most in one tensor, and how many matrix products it made."""

    numel: int = 0
    products: int = 0


class Watch(TorchDispatchMode):
    """Looks at every operation below autograd; torch demands the subclass."""

    def __init__(self, seen: Largest) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.seen.numel = max(self.seen.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.seen.products += func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
        return result


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    """Forward and backward over 60 tokens allocate no tensor beyond one chunk of 4 rows; the naive way shows 60."""
    hidden_NH, weight_VH, ids_N = build(60, 3, 700, torch.float32)
    seen, naive = Largest(), Largest()
    with Watch(seen):
        token_logprobs(hidden_NH, weight_VH, ids_N, with_entropy=True).logprobs_N.sum().backward()
    with Watch(naive), torch.no_grad():
        reference(hidden_NH, weight_VH, ids_N, 1.0)
    assert seen.numel == 4 * 700
    assert naive.numel == 60 * 700


@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns", "products"),
    [(False, False, 1), (True, False, 3), (False, True, 3), (True, True, 4)],
)
def test_only_the_gradients_that_are_asked_for_are_computed(
    hidden_learns: bool, weight_learns: bool, products: int
) -> None:
    """A frozen head or frozen hidden states save their matrix product; without any gradient one product is all."""
    hidden_NH, weight_VH, ids_N = build(5, 3, 7)
    hidden_NH.requires_grad_(hidden_learns)
    weight_VH.requires_grad_(weight_learns)
    seen = Largest()
    with Watch(seen):
        logprobs_N = token_logprobs(hidden_NH, weight_VH, ids_N).logprobs_N
        if logprobs_N.requires_grad:
            logprobs_N.sum().backward()
    assert seen.products == products
    assert logprobs_N.requires_grad == (hidden_learns or weight_learns)
    assert (hidden_NH.grad is not None, weight_VH.grad is not None) == (hidden_learns, weight_learns)


def test_double_backward_is_refused() -> None:
    """A second derivative, which is not implemented, raises and is not silently zero."""
    hidden_NH, weight_VH, ids_N = build(5, 3, 7)
    logprobs_N = token_logprobs(hidden_NH, weight_VH, ids_N).logprobs_N
    with pytest.raises(UnsupportedError, match="create_graph=True"):
        torch.autograd.grad(logprobs_N.sum(), hidden_NH, create_graph=True)


def test_chunks_cover_all_tokens_evenly() -> None:
    """Chunks follow one another without gap, and their lengths differ by at most one."""
    inputs = chunked_head.check_head_inputs(torch.ones(1001, 1), torch.ones(60_000, 1), torch.zeros(1001).long(), 1.0)
    chunks = list(chunked_head.chunk_rows(inputs))
    assert [row for rows in chunks for row in range(rows.start, rows.stop)] == list(range(1001))
    assert {rows.stop - rows.start for rows in chunks} == {125, 126}


def test_an_accelerator_gets_wider_chunks_and_whole_blocks() -> None:
    """Off the CPU a chunk may take 512 MiB and its softmax is not cut into blocks."""
    hidden_NH, weight_VH = torch.ones(4096, 1, device="meta"), torch.ones(2**17, 1, device="meta")
    inputs = chunked_head.HeadInputs(
        hidden_NH=hidden_NH, weight_VH=weight_VH, token_ids_N=torch.zeros(4096, device="meta").long(), temperature=1.0
    )
    assert [rows.stop - rows.start for rows in chunked_head.chunk_rows(inputs)] == [1024] * 4
    workspace = chunked_head.build_workspace(inputs)
    logits_CV = chunked_head.fill_logits(inputs, workspace, slice(0, 1024))
    seen = Largest()
    with Watch(seen):
        statistics = chunked_head.exponentiate_(logits_CV, inputs.token_ids_N[:1024], with_entropy=True)
    assert statistics.entropy_C.shape == (1024,)
    assert seen.numel == 1024 * 2**17


@pytest.mark.parametrize(
    ("hidden", "weight", "ids", "temperature", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2).long(), 1.0, r"hidden.shape=\(2, 3, 4\)"),
        (torch.ones(2, 3), torch.ones(5, 4), torch.zeros(2).long(), 1.0, r"weight.shape=\(5, 4\)"),
        (torch.ones(2, 4), torch.ones(4), torch.zeros(2).long(), 1.0, r"weight.shape=\(4,\)"),
        (
            torch.ones(2, 4),
            torch.ones(5, 4),
            torch.zeros(3).long(),
            1.0,
            r"token_ids.shape=\(3,\) is not one id for each of 2 ",
        ),
        (torch.ones(2, 4), torch.ones(5, 4).double(), torch.zeros(2).long(), 1.0, "weight=torch.float64"),
        (torch.ones(2, 4).long(), torch.ones(5, 4).long(), torch.zeros(2).long(), 1.0, "floating-point"),
        (torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2), 1.0, "token_ids=torch.float32"),
        (torch.ones(2, 4), torch.ones(5, 4, device="meta"), torch.zeros(2).long(), 1.0, "weight=meta"),
        (torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2).long(), 0.0, "temperature=0.0"),
        (torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2).long(), float("nan"), "temperature=nan"),
    ],
)
def test_inputs_without_meaning_are_refused(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, message: str
) -> None:
    """Each input that does not fit is named with its value."""
    with pytest.raises(ConfigError, match=message):
        token_logprobs(hidden, weight, ids, temperature=temperature)


@pytest.mark.parametrize("bad", [-100, -1, 5])
def test_an_id_outside_of_the_vocabulary_is_named(bad: int) -> None:
    """An id below 0 or from the vocabulary size on is an error with its position, also the -100 of masked labels."""
    with pytest.raises(DataError, match=rf"token_ids\[1\]={bad} is outside of the vocabulary of 5"):
        token_logprobs(torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, bad, bad]))


@pytest.mark.usefixtures("small_chunks")
def test_everything_stays_on_the_device_of_the_inputs() -> None:
    """Logprobs, entropies and gradients lie where the hidden states do, whatever torch's default device is."""
    hidden_NH, weight_VH, ids_N = build(9, 3, 7, torch.bfloat16)
    with torch.device("meta"):
        result = token_logprobs(hidden_NH, weight_VH, ids_N, with_entropy=True)
        assert result.entropy_N is not None
        loss = result.logprobs_N.sum() + result.entropy_N.sum()
        grads = torch.autograd.grad(loss, (hidden_NH, weight_VH))
    for tensor in (result.logprobs_N, result.entropy_N, *grads):
        assert tensor.device == hidden_NH.device


def test_softmax_blocks_fill_the_budget_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a block takes as many rows as the budget holds, at least one; elsewhere one block takes all rows."""
    matrix_CV = torch.empty(5, 3, dtype=DOUBLE)  # 24 bytes a row

    def lengths(budget: int, matrix: Tensor) -> list[int]:
        monkeypatch.setattr(chunked_head, "_CPU_BLOCK_BYTES", budget)
        rows = [row for block in chunked_head._blocks(matrix) for row in range(matrix.shape[0])[block]]
        assert rows == list(range(matrix.shape[0]))
        return [len(range(matrix.shape[0])[block]) for block in chunked_head._blocks(matrix)]

    assert lengths(1, matrix_CV) == [1, 1, 1, 1, 1]
    assert lengths(50, matrix_CV) == [2, 2, 1]
    assert lengths(1, matrix_CV.to("meta")) == [5]
    assert lengths(50, matrix_CV[:0]) == lengths(50, matrix_CV[:0].to("meta")) == []


@pytest.mark.parametrize(("dtype", "is_shared"), [(torch.float32, True), (DOUBLE, True), (torch.bfloat16, False)])
def test_a_workspace_is_one_buffer_where_the_dtype_is_wide_already(dtype: torch.dtype, is_shared: bool) -> None:
    """Only 16-bit logits need a second buffer for what is computed in float32."""
    inputs = chunked_head.check_head_inputs(*(tensor.detach() for tensor in build(3, 2, 5, dtype)), 1.0)
    workspace = chunked_head.build_workspace(inputs)
    assert (workspace.wide_CV is workspace.narrow_CV) == is_shared
    assert (workspace.narrow_CV.dtype, workspace.wide_CV.dtype) == (dtype, chunked_head.wide_dtype(dtype))


def test_entropies_are_empty_unless_asked_for() -> None:
    """Without with_entropy the statistics of a chunk hold none."""
    statistics = chunked_head.exponentiate_(torch.randn(4, 6), torch.zeros(4).long(), with_entropy=False)
    assert statistics.entropy_C.shape == (0,)
