"""The same GRPO work by TRL's GRPOTrainer and by lightrft: one process, step by step in turn.

Both train the same randomly initialised Qwen2 on the same number of prompts, samples and tokens a step, with fused
AdamW in float32 on one thread; completions have a fixed length, so that both generate and learn from exactly as many
tokens. TRL runs its own `train()`; a callback at the end of each of its steps takes two steps of ours (the A/A
control), so that drift of the machine hits all alike. Memory is the peak resident set of a fresh process that runs one
of them alone.

TRL's kernels for GPUs are off on a CPU: this compares what both do here, not what they do on a GPU.

    make bench        builds an environment with TRL in .venv-trl, and runs this and the other benchmarks
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import attrs
import torch
from paired import (
    check_control,
    control_error,
    describe_machine,
    format_table,
    last_line_of,
    median,
    paired_ratio,
    peak_bytes,
    print_table,
    write_results,
)

NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS = 2, 8, 32
LEARNING_RATE = 1e-6
CONTROL = ("lightrft", "lightrft again")


@attrs.frozen(kw_only=True)
class Case:
    """One size of the work.

    Attributes:
        hidden: width of the model.
        layers: its layers.
        vocabulary: its tokens.
        completion: tokens of a completion.
        rounds: measured steps.
        speed: goal for TRL's seconds over ours.
        memory: goal for our peak memory over TRL's; None where there is none.
    """

    hidden: int
    layers: int
    vocabulary: int
    completion: int
    rounds: int
    speed: float
    memory: float | None = None


CASES = {
    "hidden 128, V 512": Case(hidden=128, layers=2, vocabulary=512, completion=64, rounds=30, speed=1.8),
    "hidden 128, V 32768": Case(
        hidden=128, layers=2, vocabulary=32768, completion=32, rounds=12, speed=2.2, memory=0.6
    ),
    "65 M parameters": Case(hidden=512, layers=8, vocabulary=32768, completion=32, rounds=6, speed=1.45),
}


def build_model(case: Case) -> torch.nn.Module:
    """Return the model of a case, the same weights at every call."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=case.hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def texts() -> list[str]:
    """Return prompts of PROMPT_TOKENS characters, which are as many tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(letters[(i * 7 + j * (i + 1)) % 26] for j in range(PROMPT_TOKENS)) for i in range(32)]


def build_tokenizer() -> object:
    """Return a tokenizer with a token for each character."""
    from lightrft.models.tokenizer import build_character_tokenizer

    return build_character_tokenizer()


def reward(prompt: str, completion: str, answer: str, /) -> float:
    """Return a score that differs over completions and costs nothing."""
    del prompt, answer
    return len(set(completion)) / 10


def our_step(case: Case) -> Callable[[], None]:
    """Return one step of lightrft: collect, learn, sync."""
    from lightrft.algorithms.advantages import ADVANTAGES
    from lightrft.config.sections import AlgorithmConfig, EngineConfig
    from lightrft.data.prompts import Problem
    from lightrft.data.sampler import ResumableSampler
    from lightrft.loops.collect import collect, sampling_params
    from lightrft.loops.learn import learn
    from lightrft.strategy import get_strategy
    from lightrft.strategy.config import StrategyConfig

    batch = NUM_PROMPTS * NUM_SAMPLES
    config = StrategyConfig(
        strategy="single",
        train_batch_size=batch,
        micro_train_batch_size=batch,
        actor_learning_rate=LEARNING_RATE,
        lr_scheduler="linear",
        lr_warmup_ratio=0.0,
        adam_betas=(0.9, 0.999),
    )
    strategy = get_strategy(config)
    engine_config = EngineConfig(max_new_tokens=case.completion, min_new_tokens=case.completion)
    algorithm = AlgorithmConfig(num_samples=NUM_SAMPLES, prompts_per_step=NUM_PROMPTS)
    tokenizer = build_tokenizer()
    actor, *_ = strategy.prepare_models_and_optimizers(build_model(case), None, None, None, None, 10_000)
    engine = strategy.setup_inference_engine(engine_config, actor=actor.model, tokenizer=tokenizer)
    problems = [Problem(question=text, answer="") for text in texts()]
    sampler = ResumableSampler(size=len(problems))
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        sampling = sampling_params(engine_config, tokenizer, num_samples=NUM_SAMPLES, seed=steps)
        chosen = [problems[index] for index in sampler.take(NUM_PROMPTS)]
        scored = collect(strategy, engine, chosen, tokenizer=tokenizer, reward=reward, sampling=sampling)
        assert all(len(completion.token_ids) == case.completion for completion in scored.completions)
        learned = learn(
            strategy,
            actor,
            scored.completions,
            ADVANTAGES["grpo"](scored.rewards_B, group_size=NUM_SAMPLES),
            algorithm=algorithm,
            temperature=1.0,
            max_new_tokens=case.completion,
            train_batch_size=batch,
            micro_train_batch_size=batch,
        )
        assert learned.steps[0].stepped
        strategy.update_engine_weights(engine, actor.model)

    return step


def run_trl(case: Case, rounds: int, between: Callable[[], None]) -> list[float]:
    """Run TRL's own training loop and return the CPU seconds of its steps, without those of `between`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds: list[float] = []

    class Watch(TrainerCallback):
        """Takes the time between the ends of two steps; transformers asks for a subclass."""

        started = time.process_time()

        def on_step_end(self, *_arguments: object, **_keywords: object) -> None:
            seconds.append(time.process_time() - self.started)
            between()
            self.started = time.process_time()

    def trl_reward(completions: list[str], **columns: object) -> list[float]:
        lengths.extend(len(ids) for ids in columns["completion_ids"])
        return [reward("", completion, "") for completion in completions]

    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
            num_generations=NUM_SAMPLES,
            max_completion_length=case.completion,
            generation_kwargs={"min_new_tokens": case.completion},
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            learning_rate=LEARNING_RATE,
            optim="adamw_torch_fused",
            max_steps=rounds + 1,
            logging_steps=10_000,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=build_model(case),
            reward_funcs=trl_reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts() * 8}),
            processing_class=build_tokenizer(),
            callbacks=[Watch()],
        )
        trainer.train()
    assert set(lengths) == {case.completion}, "TRL generated another number of tokens"
    return seconds[1:]  # the first step holds set-up


def measure_speed(case: Case, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of every step of TRL and of both of ours, round by round."""
    step = our_step(case)
    step()
    ours: dict[str, list[float]] = {name: [] for name in CONTROL}

    def between() -> None:
        for name in CONTROL:
            started = time.process_time()
            step()
            ours[name].append(time.process_time() - started)

    trl = run_trl(case, rounds, between)
    return {"TRL": trl, **{name: seconds[1:] for name, seconds in ours.items()}}


def measure_memory(case: Case, who: str) -> int:
    """Return the peak resident bytes of this process after three steps of one of them."""
    if who == "trl":
        run_trl(case, 3, lambda: None)
    else:
        step = our_step(case)
        for _ in range(4):
            step()
    return peak_bytes()


def peak_of(name: str, who: str) -> int:
    """Return the peak resident bytes of a fresh process."""
    return int(last_line_of([sys.executable, __file__, "--memory-of", who, "--case", name]))


def main() -> None:
    """Print the table, and write it to results/versus_trl.md when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES], action="append", help="run this case alone")
    parser.add_argument("--rounds", type=int, help="measured steps of each case")
    parser.add_argument("--memory-of", choices=["trl", "lightrft"], help="print peak bytes of one step and end")
    parser.add_argument("--write", action="store_true", help="write results/versus_trl.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = arguments.case or [*CASES]
    if arguments.memory_of:
        print(measure_memory(CASES[names[0]], arguments.memory_of))
        return
    rows, controls = [], []
    for name in names:
        case = CASES[name]
        samples = measure_speed(case, arguments.rounds or case.rounds)
        ratio = paired_ratio(samples, "TRL", CONTROL[0])
        trl_bytes, our_bytes = peak_of(name, "trl"), peak_of(name, "lightrft")
        memory = our_bytes / trl_bytes
        rows.append(
            [
                name,
                f"{median(samples['TRL']):.3f}",
                f"{median(samples[CONTROL[0]]):.3f}",
                f"{ratio:.2f}",
                f"{case.speed:.2f}",
                f"{trl_bytes / 2**20:.0f}",
                f"{our_bytes / 2**20:.0f}",
                f"{memory:.2f}",
                "" if case.memory is None else f"{case.memory:.2f}",
                f"{control_error(samples, *CONTROL):+.1%}",
            ]
        )
        controls.append(samples)
        print(rows[-1], file=sys.stderr)
    header = [
        f"{NUM_PROMPTS * NUM_SAMPLES} completions a step",
        "TRL s",
        "lightrft s",
        "TRL / lightrft",
        "goal",
        "TRL MiB",
        "lightrft MiB",
        "memory ratio",
        "goal",
        "A/A",
    ]
    print_table(header, rows)
    machine = describe_machine("torch", "transformers", "trl")
    print(machine)
    if arguments.write:
        text = f"# {__doc__.strip()}\n\n{format_table(header, rows)}\n\n{machine}\n"
        write_results("versus_trl", text)
    for samples in controls:
        check_control(samples, *CONTROL, tolerance=0.05)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
