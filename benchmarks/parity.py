"""How far the strategies of many processes are from "single": 20 AdamW steps of the demo's model in float32 on the CPU.

The model of examples/demo.toml begins with random weights and learns from 48 sequences of random tokens, of unequal
lengths, 12 in a step, with the demo's rate, betas and schedule, weight decay 0.1, and clipping in every step. "single"
takes the sequences of a step in one batch; every other row splits them over its ranks, into micro-batches of two,
weighed by tokens.

A row shows the largest difference from "single" at any step, on any rank:

- loss, norm: |a - b| / |b|, of the mean loss over the step's tokens and of the gradient's norm before clipping.
- parameters: |a - b| / max |b|, of every parameter tensor, by its own largest element.
- element by element: |a - b| / max(|b|, 1e-3), of every element. The floor is the peak learning rate: AdamW moves an
  element by about that much in a step, so what is smaller is about to change its sign, and has no relative error.

The target is 1e-5 for the first three. The first row is the control: "single" against itself, with the same split in
one process. It shows what another order of summation does in float32, and no strategy can be expected to be nearer.
AdamW divides a gradient by its own size: where that is near the optimizer's epsilon (1e-8), the 1e-10 or so that
rounding left of large terms which cancelled becomes some percent of a step. So the gradient is clipped to 0.1, and
what rounding leaves is small beside epsilon. With 0.5 the control is at 8e-6, and "deepspeed" on 3 ranks at 2e-5: it
multiplies the loss by the number of ranks before the backward pass and divides gradients by it afterwards, which is
exact for 2 and 4 and rounds every product anew for 3. "single" with those two operations is at 2e-5 as well.

    python benchmarks/parity.py --steps 20 --world-sizes 1 2 3 4 --write
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import attrs
import torch
from paired import describe_machine, format_table, write_results
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightrft.config.load import load_config
from lightrft.data.padding import TokenBatch, pad_sequences
from lightrft.loops.ranks import shares
from lightrft.loops.train_step import train_step
from lightrft.models.build import build_model_and_tokenizer
from lightrft.strategy import Strategy, Trainable
from lightrft.testing.ranks.here import run_here
from lightrft.testing.ranks.processes import processes
from lightrft.testing.subject import Rank, subject_of

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "demo.toml"
TARGET = 1e-5
SEQUENCES = 12  # of a step; divisible by 1, 2, 3 and 4
STEPS_OF_EPOCH = 4  # then the same sequences come again, so that there is something to learn
MAX_NORM = 0.1  # below the norm of every step's gradient
WEIGHT_DECAY = 0.1
TIMEOUT = 600.0  # seconds of one row, on a machine that has much else to do
VARIANTS = (("fsdp2", "fsdp2", 0), *((f"deepspeed stage {stage}", "deepspeed", stage) for stage in range(4)))
"""The rows of every world size: name, strategy, stage."""


@attrs.frozen(kw_only=True)
class Case:
    """A training.

    Attributes:
        strategy: registry key.
        zero_stage: of the strategy "deepspeed".
        steps: how many.
        micro_batch_size: sequences of a micro-batch.
        directory: where the parameters of the reference are after every step.
        losses: of the reference; nothing makes this training the reference.
        norms: of the reference.
    """

    strategy: str
    zero_stage: int = 0
    steps: int
    micro_batch_size: int = 2
    directory: str
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()


@attrs.frozen(kw_only=True)
class Trained:
    """What was seen on a rank.

    Attributes:
        losses: mean over the tokens of all ranks, by step.
        norms: of the gradient, by step.
        parameters: largest difference at any step, relative to the tensor.
        elements: largest difference at any step, element by element.
        worst: parameter and step of the largest difference relative to the tensor.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    parameters: float
    elements: float
    worst: str


def sequences_of(step: int, vocabulary: int) -> list[list[int]]:
    """Return the sequences of a step: 6 to 17 tokens, none of them a special one."""
    generator = torch.Generator().manual_seed(step % STEPS_OF_EPOCH)
    lengths = torch.randint(6, 18, (SEQUENCES,), generator=generator).tolist()
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def micro_batches_of(sequences: list[list[int]], part: range, size: int) -> list[TokenBatch]:
    """Return a rank's part of the sequences, `size` at a time; each is a prompt of two tokens and what follows."""
    mine = [sequences[index] for index in part]
    starts = range(0, len(mine), size)
    batches = [mine[start : start + size] for start in starts]
    return [pad_sequences([one[:2] for one in batch], [one[2:] for one in batch]) for batch in batches]


def loss_fn(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the mean cross-entropy of the completion tokens."""
    logits_BTV: Tensor = model(input_ids=batch.input_ids_BT, attention_mask=None, use_cache=False).logits
    return cross_entropy(logits_BTV[batch.mask_BT], batch.targets_N)


def num_tokens(batch: TokenBatch) -> float:
    """Return the number of completion tokens."""
    return float(batch.mask_BT.sum())


def train(rank: Rank, case: Case) -> Trained:
    """Take the steps, and hold each against the reference, or write it down if this is the reference."""
    demo = load_config(CONFIG)
    settings = attrs.evolve(
        demo.strategy,
        strategy=case.strategy,
        zero_stage=case.zero_stage,
        zero_persistence_threshold=0,  # every parameter is spread, small ones too
        max_norm=MAX_NORM,
        l2=WEIGHT_DECAY,
        lr_warmup_ratio=0.1,
        timeout=TIMEOUT,
    )
    strategy = rank.build(settings)
    strategy.setup_distributed()
    with strategy.init_model_context():
        model, tokenizer = build_model_and_tokenizer(demo.model, seed=settings.seed)
    actor, *_ = strategy.prepare_models_and_optimizers(model, None, None, None, max_steps=case.steps)
    part = shares(SEQUENCES, rank.world_size)[rank.rank]
    losses: list[float] = []
    norms: list[float] = []
    found = [(0.0, 0.0, "")]
    for step in range(case.steps):
        batches = micro_batches_of(sequences_of(step, len(tokenizer)), part, case.micro_batch_size)
        loss, norm = take_step(strategy, actor, batches)
        losses.append(loss)
        norms.append(norm)
        found += differences(strategy, actor.model, case, step, lr=settings.actor_learning_rate)
    parameters, _, worst = max(found)
    elements = max(element for _, element, _ in found)
    return Trained(losses=tuple(losses), norms=tuple(norms), parameters=parameters, elements=elements, worst=worst)


def take_step(strategy: Strategy, actor: Trainable, batches: list[TokenBatch]) -> tuple[float, float]:
    """Take a step and return its loss over the tokens of all ranks, and the norm of its gradient."""
    sums: list[float] = []

    def seen_loss(model: nn.Module, batch: TokenBatch) -> Tensor:
        loss = loss_fn(model, batch)
        sums.append(loss.item() * num_tokens(batch))
        return loss

    result = train_step(strategy, actor, batches, seen_loss, weight_fn=num_tokens)
    assert result.stepped, result.skipped_reason
    assert result.grad_norm is not None
    total = strategy.all_reduce({"loss": math.fsum(sums), "tokens": sum(map(num_tokens, batches))}, "sum")
    return total["loss"] / total["tokens"], result.grad_norm


def differences(
    strategy: Strategy, model: nn.Module, case: Case, step: int, *, lr: float
) -> list[tuple[float, float, str]]:
    """Return (relative to the tensor, element by element, where) for every parameter after a step."""
    path = Path(case.directory) / f"{step}.safetensors"
    tensors = {name: tensor.detach() for name, tensor in strategy.named_tensors(model)}
    if not case.losses:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        return []
    reference = load_file(path)
    assert list(reference) == sorted(tensors), "the strategies have other parameters"
    found: list[tuple[float, float, str]] = []
    for name, expected in reference.items():
        error, size = (tensors[name] - expected).abs(), expected.abs()
        by_element = (error / size.clamp(min=lr)).max().item()
        found.append(((error.max() / size.max()).item(), by_element, f"{name}, step {step + 1}"))
    return found


def row_of(name: str, world_size: int, case: Case, ranks: list[Trained]) -> list[str]:
    """Return a row of the table, and say on stderr where parameters differ most."""
    losses = max(relative(case.losses, one.losses) for one in ranks)
    norms = max(relative(case.norms, one.norms) for one in ranks)
    parameters, worst = max((one.parameters, one.worst) for one in ranks)
    elements = max(one.elements for one in ranks)
    print(f"{name}, {world_size} ranks: parameters differ most in {worst}", file=sys.stderr)
    is_met = max(losses, norms, parameters) <= TARGET
    figures = [f"{figure:.1e}" for figure in (losses, norms, parameters, elements)]
    return [name, str(world_size), *figures, "yes" if is_met else "NO"]


def relative(expected: tuple[float, ...], seen: tuple[float, ...]) -> float:
    """Return the largest relative difference of two lists of numbers."""
    return max(abs(a - b) / abs(b) for a, b in zip(seen, expected, strict=True))


HEADER = ["strategy", "ranks", "loss", "norm", "parameters", "element by element", "within 1e-5"]


def rows_of(world_sizes: list[int], steps: int, directory: str) -> tuple[list[list[str]], str]:
    """Return the rows of the table, and a line about the reference."""
    subject = subject_of("lightrft.strategy.build:get_strategy", "strategy")
    here = run_here(subject)
    [reference] = here(train, Case(strategy="single", steps=steps, micro_batch_size=SEQUENCES, directory=directory))
    case = Case(strategy="single", steps=steps, directory=directory, losses=reference.losses, norms=reference.norms)
    rows = [row_of("single, split (control)", 1, case, here(train, case))]
    for world_size in world_sizes:
        with processes(subject, world_size, timeout=TIMEOUT) as run_on_ranks:
            for name, strategy, stage in VARIANTS:
                one = attrs.evolve(case, strategy=strategy, zero_stage=stage)
                rows.append(row_of(name, world_size, one, run_on_ranks(train, one)))
    assert min(reference.norms) > MAX_NORM, "a step did not clip"
    said = (
        f"The reference's loss goes from {reference.losses[0]:.3f} to {reference.losses[-1]:.3f}; its norms are from "
        f"{min(reference.norms):.2f} to {max(reference.norms):.2f}, clipped to {MAX_NORM}."
    )
    return rows, said


def main() -> None:
    """Print the table, write it to results/parity.md when asked to, and exit with 1 where a row misses the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--write", action="store_true", help="write results/parity.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        rows, said = rows_of(args.world_sizes, args.steps, directory)
    text = f"{format_table(HEADER, rows)}\n\n{said}\n\n{describe_machine('torch', 'deepspeed', 'transformers')}\n"
    print(text)
    if args.write:
        write_results("parity", f"# {(__doc__ or '').strip()}\n\n{text}")
    assert all(row[-1] == "yes" for row in rows), "a row misses the target"


if __name__ == "__main__":
    import parity  # ranks find its functions by the module's name, which is not __main__

    parity.main()
