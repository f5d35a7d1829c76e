"""Log-probabilities and policy loss over a large vocabulary, against this machine's matrix-product rate and peers.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/logprob.py --tokens 2048 --hidden 128 512 --vocabulary 32768

Two tasks: the PPO-clip loss of N tokens with its gradients to hidden states and head (at least three products of
N * H * V), and log-probabilities without gradient (one product). "of the limit" is the time of those products at the
best rate that any of the three products reached in the same run, in any of the chunk widths tried, divided by the time
of the variant. "extra" is the peak of resident memory beyond inputs, results and the gradients that anybody has to
return, in a fresh process. Every variant must give the loss and the gradients of the naive one, to float32 rounding, or
the run fails.

Rows of packages that are not installed say how to install them. See paired.py for the method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import attrs
import torch
from paired import (
    check_control,
    control_error,
    describe_machine,
    format_table,
    interleave,
    median,
    peak_bytes_above_now,
    peak_memory,
    write_results,
)
from torch import Tensor
from torch.nn import functional

from lightrft.algorithms.fused_loss import fused_policy_loss
from lightrft.algorithms.logprobs import token_logprobs

FUSED, CONTROL, NO_GRAD = "ours, fused loss", "ours, fused loss (A/A)", "ours, no gradient"
SCALING_TOKENS = (1024, 2048, 4096, 8192)
GEMM_ROWS = (228, 512)  # what the fused loss uses for 2048 tokens and V = 32k, and a width without memory bounds
MIB = 2**20


class AbsentError(Exception):
    """A variant that cannot run here; the message says why and how it could."""


@attrs.frozen(kw_only=True, eq=False)
class Problem:
    """N tokens, their hidden states of size H, a head of V rows, and what PPO knows of each token."""

    hidden_NH: Tensor
    weight_VH: Tensor
    ids_N: Tensor
    old_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor


class Build(Protocol):
    """Binds a problem: returns the function that computes its loss, or its logprobs where no gradient is asked for."""

    def __call__(self, problem: Problem) -> Callable[[], Tensor]:
        """Return it, or raise AbsentError."""
        ...


def build_problem(tokens: int, hidden: int, vocabulary: int) -> Problem:
    """Return a problem whose logits have unit variance and whose ratios lie on both sides of the clip."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(tokens, hidden, generator=generator)
    weight_VH = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    ids_N = torch.randint(0, vocabulary, (tokens,), generator=generator)
    with torch.no_grad():
        now_N = token_logprobs(hidden_NH, weight_VH, ids_N).logprobs_N
    return Problem(
        hidden_NH=hidden_NH.requires_grad_(),
        weight_VH=weight_VH.requires_grad_(),
        ids_N=ids_N,
        old_N=now_N + 0.3 * torch.randn(tokens, generator=generator),
        advantages_N=torch.randn(tokens, generator=generator),
        weights_N=torch.full((tokens,), 1.0 / tokens),
    )


def ppo_clip(logprobs_N: Tensor, per_token_N: Mapping[str, Tensor]) -> Tensor:
    """Return the weighted PPO-clip loss of each token."""
    ratio_N, advantages_N = (logprobs_N - per_token_N["old"]).exp(), per_token_N["advantages"]
    return -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(0.8, 1.2) * advantages_N) * per_token_N["weights"]


def per_token(problem: Problem) -> dict[str, Tensor]:
    """Return what `ppo_clip` needs besides the logprobs."""
    return {"old": problem.old_N, "advantages": problem.advantages_N, "weights": problem.weights_N}


def naive_logprobs(hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor) -> Tensor:
    """Return the logprobs by way of all logits."""
    return (hidden_NH @ weight_VH.t()).log_softmax(-1).gather(1, ids_N[:, None]).squeeze(1)


def build_naive(problem: Problem) -> Callable[[], Tensor]:
    """Bind the loss by way of all logits."""

    def run() -> Tensor:
        logprobs_N = naive_logprobs(problem.hidden_NH, problem.weight_VH, problem.ids_N)
        return ppo_clip(logprobs_N, per_token(problem)).sum()

    return run


def build_compiled(problem: Problem) -> Callable[[], Tensor]:
    """Bind the loss by way of all logits, compiled; absent where there is no compiler."""
    run = torch.compile(build_naive(problem), dynamic=False)
    try:
        run()
    except Exception as error:  # whatever the compiler of this machine says is the row
        raise AbsentError(f"torch.compile failed: {str(error).strip().splitlines()[0][:60]}") from error
    return run


def build_torch_chunked(problem: Problem) -> Callable[[], Tensor]:
    """Bind torch's own chunked cross entropy."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise AbsentError("absent before torch 2.13: pip install 'torch>=2.13'")
    options = torch.nn.LinearCrossEntropyOptions()

    def run() -> Tensor:
        return functional.linear_cross_entropy(problem.hidden_NH, problem.weight_VH, problem.ids_N, options=options)

    return run


def trl_logprobs(problem: Problem) -> Callable[[], Tensor]:
    """Bind TRL's kernel alone; absent where it is not installed."""
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils
    except ImportError as error:
        raise AbsentError("not installed: pip install 'trl==1.16.0'") from error
    width = int(getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192))

    def run() -> Tensor:
        outputs: tuple[str, ...] = ()  # no entropy, though its trainer asks for it: the least it can do
        arguments = (problem.hidden_NH, problem.weight_VH, None, problem.ids_N, 1.0, width, None, 1.0, outputs)
        logprobs_N: Tensor = ChunkedLogProbFunction.apply(*arguments)[0]
        return logprobs_N

    return run


def build_trl(problem: Problem) -> Callable[[], Tensor]:
    """Bind the loss on TRL's kernel."""
    logprobs_of = trl_logprobs(problem)

    def run() -> Tensor:
        return ppo_clip(logprobs_of(), per_token(problem)).sum()

    return run


def build_recompute(problem: Problem) -> Callable[[], Tensor]:
    """Bind the loss on `token_logprobs`."""

    def run() -> Tensor:
        logprobs_N = token_logprobs(problem.hidden_NH, problem.weight_VH, problem.ids_N).logprobs_N
        return ppo_clip(logprobs_N, per_token(problem)).sum()

    return run


def build_fused(problem: Problem) -> Callable[[], Tensor]:
    """Bind `fused_policy_loss`."""

    def run() -> Tensor:
        return fused_policy_loss(problem.hidden_NH, problem.weight_VH, problem.ids_N, ppo_clip, per_token(problem)).loss

    return run


def build_naive_no_grad(problem: Problem) -> Callable[[], Tensor]:
    """Bind the logprobs by way of all logits."""

    def run() -> Tensor:
        return naive_logprobs(problem.hidden_NH, problem.weight_VH, problem.ids_N)

    return run


def build_no_grad(problem: Problem) -> Callable[[], Tensor]:
    """Bind `token_logprobs`."""

    def run() -> Tensor:
        return token_logprobs(problem.hidden_NH, problem.weight_VH, problem.ids_N).logprobs_N

    return run


WITH_GRADIENT: dict[str, Build] = {
    "naive": build_naive,
    "naive, torch.compile": build_compiled,
    "torch linear_cross_entropy*": build_torch_chunked,
    "TRL kernel": build_trl,
    "ours, recompute": build_recompute,
    FUSED: build_fused,
    CONTROL: build_fused,
}
WITHOUT_GRADIENT: dict[str, Build] = {
    "naive, no gradient": build_naive_no_grad,
    "TRL kernel, no gradient": trl_logprobs,
    NO_GRAD: build_no_grad,
}
BUILDS: dict[str, Build] = {**WITH_GRADIENT, **WITHOUT_GRADIENT}


def bind(name: str, problem: Problem) -> Callable[[], Tensor]:
    """Return the whole work of a variant: the loss and its backward, or the logprobs without gradient."""
    compute = BUILDS[name](problem)

    def with_gradient() -> Tensor:
        problem.hidden_NH.grad = problem.weight_VH.grad = None
        loss = compute()
        loss.backward()
        return loss.detach()

    def without_gradient() -> Tensor:
        with torch.no_grad():
            return compute()

    return with_gradient if name in WITH_GRADIENT else without_gradient


def gradients_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the gradients that the last run left."""
    assert problem.hidden_NH.grad is not None
    assert problem.weight_VH.grad is not None
    return problem.hidden_NH.grad, problem.weight_VH.grad


def assert_equal(runs: Mapping[str, Callable[[], Tensor]], problem: Problem) -> None:
    """Hold every variant to the naive one, and torch's own, which takes no weights, to the naive mean cross entropy."""
    logprobs_N = build_naive_no_grad(problem)
    references = {"ppo": build_naive(problem), "cross entropy": lambda: -logprobs_N().mean()}
    for reference, compute in references.items():
        problem.hidden_NH.grad = problem.weight_VH.grad = None
        loss = compute()
        loss.backward()
        expected = (loss.detach(), *gradients_of(problem))
        for name in runs:
            if name in WITH_GRADIENT and (BUILDS[name] is build_torch_chunked) == (reference == "cross entropy"):
                for ours, theirs in zip((runs[name](), *gradients_of(problem)), expected, strict=True):
                    assert_close(name, ours, theirs)
    with torch.no_grad():
        expected_N = logprobs_N()
    for name in runs:
        if name in WITHOUT_GRADIENT:
            assert_close(name, runs[name](), expected_N)
    problem.hidden_NH.grad = problem.weight_VH.grad = None


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Compare by norm: sums of thousands of float32 products in another order agree to about 1e-6 of their norm."""
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < 1e-4, f"{name} is off by {error:.1e}"


def gemms(problem: Problem) -> dict[str, tuple[Callable[[], object], int]]:
    """Return each of the three products in each chunk width, with its floating-point operations."""
    hidden_NH, weight_VH = problem.hidden_NH.detach(), problem.weight_VH.detach()
    size_V, size_H = weight_VH.shape
    products: dict[str, tuple[Callable[[], object], int]] = {}
    for rows in sorted({min(rows, hidden_NH.shape[0]) for rows in GEMM_ROWS}):
        for kind, run in _products(hidden_NH[:rows], weight_VH).items():
            products[f"{kind} {rows}"] = (run, 2 * rows * size_V * size_H)
    return products


def _products(hidden_CH: Tensor, weight_VH: Tensor) -> dict[str, Callable[[], object]]:
    logits_CV = torch.zeros(hidden_CH.shape[0], weight_VH.shape[0])
    grad_CH, grad_VH = torch.zeros_like(hidden_CH), torch.zeros_like(weight_VH)

    def forward() -> object:
        return torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)

    def to_hidden() -> object:
        return torch.mm(logits_CV, weight_VH, out=grad_CH)

    def to_weight() -> object:
        return grad_VH.addmm_(logits_CV.t(), hidden_CH)

    return {"forward": forward, "to hidden": to_hidden, "to weight": to_weight}


def extra_bytes(name: str, tokens: int, hidden: int, vocabulary: int) -> int:
    """Return the peak beyond inputs and results; runs in a process of its own."""
    problem = build_problem(tokens, hidden, vocabulary)
    run = bind(name, problem)
    run()  # imports, compilation and the library's own buffers are not counted
    problem.hidden_NH.grad = problem.weight_VH.grad = None
    peak = peak_bytes_above_now(run)
    results = 4 * tokens if name in WITHOUT_GRADIENT else 4 * (problem.hidden_NH.numel() + problem.weight_VH.numel())
    return peak - results


def extra_mib(name: str, tokens: int, hidden: int, vocabulary: int) -> float:
    """Return `extra_bytes` of a fresh process, in MiB."""
    sizes = ["--tokens", str(tokens), "--hidden", str(hidden), "--vocabulary", str(vocabulary)]
    return peak_memory([sys.executable, __file__, *sizes, "--memory-of", name]) / MIB


def compare(hidden: int, options: argparse.Namespace) -> tuple[str, dict[str, list[float]]]:
    """Return the table for one hidden size, and the seconds that it was made from."""
    problem = build_problem(options.tokens, hidden, options.vocabulary)
    runs, absent = build_all(options.only or list(BUILDS), problem)
    assert_equal(runs, problem)
    products = gemms(problem)
    seconds = interleave({**runs, **{name: run for name, (run, _) in products.items()}}, options.rounds, options.seed)
    rates = {name: work / median(seconds[name]) for name, (_, work) in products.items()}
    product_seconds = 2 * options.tokens * hidden * options.vocabulary / max(rates.values())
    rows = [
        row_of(name, seconds[name], product_seconds * (3 if name in WITH_GRADIENT else 1), problem, options)
        for name in runs
    ]
    rows += [[name, "absent", "", "", reason] for name, reason in absent.items()]
    best = max(rates, key=lambda name: rates[name])
    title = (
        f"hidden {hidden}, tokens {options.tokens}, vocabulary {options.vocabulary}; "
        f"best product: {best} rows, {rates[best] / 1e9:.1f} GFLOP/s"
    )
    if {FUSED, CONTROL} <= runs.keys():
        title += f"; A/A {control_error(seconds, FUSED, CONTROL):+.2%}"
    table = format_table(["variant", "CPU s", "of the limit", "extra MiB", "note"], rows)
    return f"{title}\n\n{table}\n", seconds


def build_all(names: Sequence[str], problem: Problem) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return the variants that run here, and the reasons of the others."""
    runs: dict[str, Callable[[], Tensor]] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            runs[name] = bind(name, problem)
        except AbsentError as error:
            absent[name] = str(error)
    return runs, absent


def row_of(
    name: str, seconds: Sequence[float], limit_seconds: float, problem: Problem, options: argparse.Namespace
) -> list[str]:
    """Return the cells of one variant."""
    tokens, hidden = problem.hidden_NH.shape
    memory = extra_mib(name, tokens, hidden, options.vocabulary)
    products = "3 products" if name in WITH_GRADIENT else "1 product"
    return [name, f"{median(seconds):.3f}", f"{limit_seconds / median(seconds):.2f}", f"{memory:.0f}", products]


def scaling(options: argparse.Namespace) -> str:
    """Return the table that shows time linear and memory flat in the number of tokens."""
    hidden, names = min(options.hidden), (FUSED, NO_GRAD)
    problems = {tokens: build_problem(tokens, hidden, options.vocabulary) for tokens in SCALING_TOKENS}
    runs = {f"{name} {tokens}": bind(name, problem) for tokens, problem in problems.items() for name in names}
    seconds = interleave(runs, max(3, options.rounds // 2), options.seed)
    rows = [
        [
            str(tokens),
            *(f"{median(seconds[f'{name} {tokens}']) / tokens * 1e6:.0f}" for name in names),
            *(f"{extra_mib(name, tokens, hidden, options.vocabulary):.0f}" for name in names),
        ]
        for tokens in SCALING_TOKENS
    ]
    header = ["tokens", *(f"{name}: us per token" for name in names), *(f"{name}: extra MiB" for name in names)]
    return f"hidden {hidden}, vocabulary {options.vocabulary}\n\n{format_table(header, rows)}\n"


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description="Log-probabilities and policy loss against limit and peers.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512], help="one table for each")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the variants")
    parser.add_argument("--only", nargs="+", choices=list(BUILDS), help="these variants, and no scaling table")
    parser.add_argument("--write", action="store_true", help="also write results/logprob.md")
    parser.add_argument("--memory-of", choices=list(BUILDS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the tables; exit with 3 if the A/A control voids the run."""
    options = parse()
    if options.memory_of:
        print(extra_bytes(options.memory_of, options.tokens, options.hidden[0], options.vocabulary))
        return
    texts = [f"{describe_machine('torch')}, {options.rounds} rounds\n"]
    print(texts[0], flush=True)
    samples: list[dict[str, list[float]]] = []
    for hidden in options.hidden:
        text, seconds = compare(hidden, options)
        samples.append(seconds)
        texts.append(text)
        print(text, flush=True)
    if not options.only:
        texts.append(scaling(options))
        print(texts[-1], flush=True)
    texts.append("* takes no weights per token: mean cross entropy, a simpler loss than that of the other rows.\n")
    print(texts[-1])
    for seconds in samples:
        if {FUSED, CONTROL} <= seconds.keys():
            check_control(seconds, FUSED, CONTROL)
    if options.write:
        print(write_results("logprob", "# Log-probabilities and policy loss\n\n" + "\n".join(texts)))


if __name__ == "__main__":
    main()
