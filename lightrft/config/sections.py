"""The concerns of a run, one frozen record each; `Config` joins them under one root."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from lightrft.config._canonical import plain, real, real_or_none, texts
from lightrft.config._checks import (
    are_texts,
    at_least,
    between,
    is_bool,
    is_name,
    is_text,
    is_url_or_empty,
    one_of,
    optional,
    plain_table,
)
from lightrft.config.redaction import redacted
from lightrft.errors import ConfigError

__all__ = [
    "ADAPTER_NAMES",
    "ADVANTAGE_NAMES",
    "AGGREGATION_NAMES",
    "CORRECTION_NAMES",
    "KL_NAMES",
    "LOSS_NAMES",
    "PROCESS_NAMES",
    "TRANSPORT_NAMES",
    "AlgorithmConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "RunConfig",
]

# The names stand here and not beside the functions so that a configuration is checked without importing torch;
# a test holds them equal to the keys of the mappings in `lightrft.algorithms`.
ADVANTAGE_NAMES = ("grpo", "dr_grpo", "rloo", "reinforce++")
"""Values of `AlgorithmConfig.advantage`."""
LOSS_NAMES = ("ppo_clip", "gspo", "cispo")
"""Values of `AlgorithmConfig.loss`."""
AGGREGATION_NAMES = ("token", "sequence", "constant")
"""Values of `AlgorithmConfig.aggregation`."""
KL_NAMES = ("k1", "k2", "k3")
"""Values of `AlgorithmConfig.kl_estimator`."""
CORRECTION_NAMES = ("none", "truncate", "mask")
"""Values of `AlgorithmConfig.importance_correction`."""
PROCESS_NAMES = ("trainer", "own")
"""Values of `EngineConfig.process`."""
TRANSPORT_NAMES = ("memory", "collective")
"""Values of `EngineConfig.transport`."""
ADAPTER_NAMES = ("merged", "sent")
"""Values of `EngineConfig.adapters`."""

_LONGEST_CALL = 31_536_000.0  # seconds of a year: no call takes longer, and every clock can count down from it


@attrs.frozen(kw_only=True)
class EngineConfig:
    """The rollout engine and how it samples.

    Attributes:
        type: registry key of the engine: "hf", "vllm", "sglang", "scripted", or a user's own.
        temperature: divides the logits; 0 is greedy.
        top_p: sample from the smallest set of tokens whose probability reaches this share; 1 is off.
        top_k: sample from this many most likely tokens; 0 is off.
        max_new_tokens: bound on the tokens of a completion.
        min_new_tokens: tokens before a stop token may be sampled.
        batch_size: sequences that are decoded at once; bounds the memory of the key-value cache. A server is told when
            it is started, and does not look at it.
        cache_gb: GB (1e9 bytes) of the key-value cache of the engines "vllm" and "sglang", which set it aside when they
            start; its memory is taken as it is filled. Neither does a server look at this.
        script: completions of the engine "scripted", given out in turn.
        process: where the engine runs, one of `PROCESS_NAMES`: in the trainer's process, or in one of its own.
        transport: by what weights get into a process of its own, one of `TRANSPORT_NAMES`: memory that both processes
            share, or a collective of the two.
        timeout_seconds: how long a call may take in a process of its own or by a server, before it is taken to hang,
            and how long ranks that run one engine wait for one another.
        tensor_parallel_size: ranks that run one engine together, each with a shard of its weights; it divides the
            number of ranks. 1 gives every rank an engine of its own.
        adapters: how a LoRA adapter reaches the engine, one of `ADAPTER_NAMES`: merged into the weights of every sync,
            or sent as it is to an engine that keeps the weights below it. "merged" does nothing to a model without one;
            "sent" refuses it, as it does one of which more is trained than the adapter.
        url: of a running server, for the engine "sglang", such as "http://127.0.0.1:30000"; "" runs the engine here.
    """

    type: str = attrs.field(default="hf", validator=is_name)
    temperature: float = attrs.field(default=1.0, converter=real, validator=at_least(0))
    top_p: float = attrs.field(default=1.0, converter=real, validator=between(0, 1, above_low=True))
    top_k: int = attrs.field(default=0, validator=at_least(0, whole=True))
    max_new_tokens: int = attrs.field(default=64, validator=at_least(1, whole=True))
    min_new_tokens: int = attrs.field(default=0, validator=at_least(0, whole=True))
    batch_size: int = attrs.field(default=1024, validator=at_least(1, whole=True))
    cache_gb: float = attrs.field(default=1.0, converter=real, validator=at_least(0))
    script: tuple[str, ...] = attrs.field(default=(), converter=texts, validator=are_texts)
    process: str = attrs.field(default="trainer", validator=one_of(PROCESS_NAMES))
    transport: str = attrs.field(default="memory", validator=one_of(TRANSPORT_NAMES))
    timeout_seconds: float = attrs.field(
        default=1800.0, converter=real, validator=between(0, _LONGEST_CALL, above_low=True)
    )
    tensor_parallel_size: int = attrs.field(default=1, validator=at_least(1, whole=True))
    adapters: str = attrs.field(default="merged", validator=one_of(ADAPTER_NAMES))
    url: str = attrs.field(default="", validator=is_url_or_empty)

    def __attrs_post_init__(self) -> None:
        """Check what several settings say together."""
        if self.transport != "memory" and self.process == "trainer":
            raise ConfigError(
                f"transport={self.transport!r} takes weights into another process, and process={self.process!r} has "
                "the engine in this one; use process='own', or leave transport out."
            )
        if self.tensor_parallel_size > 1 and self.process == "own":
            raise ConfigError(
                f"process={self.process!r} gives every rank an engine in a process beside it, and tensor_parallel_size="
                f"{self.tensor_parallel_size!r} joins the ranks' own; use process='trainer', or tensor_parallel_size=1."
            )
        if self.tensor_parallel_size > 1 and self.adapters == "sent":
            raise ConfigError(
                f"adapters={self.adapters!r} is for an engine of one rank, and tensor_parallel_size="
                f"{self.tensor_parallel_size!r} spreads it over several; use adapters='merged'."
            )


@attrs.frozen(kw_only=True)
class AlgorithmConfig:
    """How completions and rewards become a loss.

    Attributes:
        num_samples: completions per prompt (at least 2), the group of group-relative advantages.
        prompts_per_step: prompts of one rollout.
        advantage: one of `ADVANTAGE_NAMES`.
        loss: one of `LOSS_NAMES`.
        aggregation: one of `AGGREGATION_NAMES`: mean over all tokens, mean over sequences of token means, or sum over
            tokens by the constant number of sequences times `max_new_tokens`.
        clip_low: the probability ratio is clipped below at 1 - clip_low.
        clip_high: the probability ratio is clipped above at 1 + clip_high.
        dual_clip: bound on the ratio for negative advantages; None is off.
        num_epochs: passes over a rollout.
        kl_coef: weight of the divergence from the reference model in the loss; 0 builds no reference model.
        kl_estimator: one of `KL_NAMES`.
        entropy_coef: weight of the entropy bonus; 0 is off.
        importance_correction: one of `CORRECTION_NAMES`, for the engine's logprobs against the trainer's.
        importance_cap: bound on that ratio.
        max_staleness: weight versions by which the policy may be ahead of the weights that made what it learns from: 0
            makes each rollout with the newest weights; 1 makes the next rollout while the policy learns from this one.
        reward_clip: rewards are clipped to [-reward_clip, reward_clip]; 0 is off.
        reward_running_norm: divide rewards by their running standard deviation.
        reward_running_norm_minus_mean: subtract their running mean too.
        overlong_buffer: tokens before `max_new_tokens` over which a penalty grows; 0 is off.
        overlong_penalty: the penalty at `max_new_tokens`.
        dynamic_sampling: leave out groups whose rewards are all equal, which carry no gradient.
    """

    num_samples: int = attrs.field(default=8, validator=at_least(2, whole=True))
    prompts_per_step: int = attrs.field(default=16, validator=at_least(1, whole=True))
    advantage: str = attrs.field(default="grpo", validator=one_of(ADVANTAGE_NAMES))
    loss: str = attrs.field(default="ppo_clip", validator=one_of(LOSS_NAMES))
    aggregation: str = attrs.field(default="token", validator=one_of(AGGREGATION_NAMES))
    clip_low: float = attrs.field(default=0.2, converter=real, validator=between(0, 1))
    clip_high: float = attrs.field(default=0.2, converter=real, validator=at_least(0))
    dual_clip: float | None = attrs.field(default=None, converter=real_or_none, validator=optional(at_least(1)))
    num_epochs: int = attrs.field(default=1, validator=at_least(1, whole=True))
    kl_coef: float = attrs.field(default=0.0, converter=real, validator=at_least(0))
    kl_estimator: str = attrs.field(default="k3", validator=one_of(KL_NAMES))
    entropy_coef: float = attrs.field(default=0.0, converter=real, validator=at_least(0))
    importance_correction: str = attrs.field(default="none", validator=one_of(CORRECTION_NAMES))
    importance_cap: float = attrs.field(default=2.0, converter=real, validator=at_least(1))
    max_staleness: int = attrs.field(default=0, validator=between(0, 1, whole=True))
    reward_clip: float = attrs.field(default=0.0, converter=real, validator=at_least(0))
    reward_running_norm: bool = attrs.field(default=False, validator=is_bool)
    reward_running_norm_minus_mean: bool = attrs.field(default=False, validator=is_bool)
    overlong_buffer: int = attrs.field(default=0, validator=at_least(0, whole=True))
    overlong_penalty: float = attrs.field(default=1.0, converter=real, validator=at_least(0))
    dynamic_sampling: bool = attrs.field(default=False, validator=is_bool)


@attrs.frozen(kw_only=True)
class DataConfig:
    """Where prompts come from and who scores the answers.

    Attributes:
        task: name of a reasoning-gym task; its own verifier is the default reward.
        task_options: settings of that task, by reasoning-gym's names.
        path: JSON Lines file of prompts, `{"prompt": ..., "answer": ...}` a line. Exactly one of `task` and `path` is
            set.
        heldout_path: JSON Lines file of held-out prompts; without it they are split off `path`.
        train_size: number of training problems of a task; 0 takes all lines of a file.
        heldout_size: number of held-out problems.
        template: how a problem becomes a prompt; `{question}` is replaced.
        reward: "verifier" (the task's own), "exact_match", or a function as "module:function".
        seed: seed of the problems and of the split.
    """

    task: str | None = attrs.field(default=None, validator=optional(is_name))
    task_options: Mapping[str, object] = attrs.field(
        factory=dict[str, object], converter=plain, validator=plain_table, repr=redacted
    )
    path: str | None = attrs.field(default=None, validator=optional(is_name))
    heldout_path: str | None = attrs.field(default=None, validator=optional(is_name))
    train_size: int = attrs.field(default=0, validator=at_least(0, whole=True))
    heldout_size: int = attrs.field(default=256, validator=at_least(1, whole=True))
    template: str = attrs.field(default="{question}", validator=is_text)
    reward: str | None = attrs.field(default=None, validator=optional(is_name))
    seed: int = attrs.field(default=0, validator=at_least(0, whole=True))

    def __attrs_post_init__(self) -> None:
        """Check what several settings say together."""
        if self.task is not None and self.path is not None:
            raise ConfigError(f"path={self.path!r} and task={self.task!r} are both set; keep one of them.")
        if "{question}" not in self.template:
            raise ConfigError(f"template={self.template!r} does not hold {{question}}; put it where the problem goes.")


@attrs.frozen(kw_only=True)
class ModelConfig:
    """The model that is trained.

    Attributes:
        path: directory in the Hugging Face layout, with its tokenizer. None builds a model with random weights.
        architecture: transformers' model type of a model built here, such as "qwen3" or "llama".
        hidden_size: width of a model built here.
        intermediate_size: width of its feed-forward layers; 0 means 4 * hidden_size.
        num_layers: its layers.
        num_heads: its attention heads.
        num_key_value_heads: its key-value heads; 0 means num_heads.
        max_length: its context in tokens.
        tie_embeddings: whether input and output embeddings are one matrix.
        initializer_range: standard deviation of its random weights.
        alphabet: the characters of the tokenizer built with it; empty means the printable ASCII characters.
        words: strings that are one token each, such as the constant part of every prompt.
        lowercase: whether that tokenizer reads every text in lower case.
    """

    path: str | None = attrs.field(default=None, validator=optional(is_name))
    architecture: str = attrs.field(default="qwen3", validator=is_name)
    hidden_size: int = attrs.field(default=128, validator=at_least(1, whole=True))
    intermediate_size: int = attrs.field(default=0, validator=at_least(0, whole=True))
    num_layers: int = attrs.field(default=2, validator=at_least(1, whole=True))
    num_heads: int = attrs.field(default=4, validator=at_least(1, whole=True))
    num_key_value_heads: int = attrs.field(default=0, validator=at_least(0, whole=True))
    max_length: int = attrs.field(default=512, validator=at_least(2, whole=True))
    tie_embeddings: bool = attrs.field(default=True, validator=is_bool)
    initializer_range: float = attrs.field(default=0.02, converter=real, validator=at_least(0))
    alphabet: str = attrs.field(default="", validator=is_text)
    words: tuple[str, ...] = attrs.field(default=(), converter=texts, validator=are_texts)
    lowercase: bool = attrs.field(default=False, validator=is_bool)

    def __attrs_post_init__(self) -> None:
        """Check what several settings say together."""
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not divisible by 2 * num_heads({self.num_heads}); "
                f"use {2 * self.num_heads * max(1, self.hidden_size // (2 * self.num_heads))}."
            )
        if self.num_key_value_heads and self.num_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not divisible by num_key_value_heads({self.num_key_value_heads}); "
                f"use a divisor of {self.num_heads}."
            )


@attrs.frozen(kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which ones stay.

    A checkpoint is written when any of these settings asks for one, at the end of either phase, and at a stop. The
    newest one stays in any case.

    Attributes:
        save_every: steps between checkpoints; 0 is off.
        save_minutes: minutes after the last checkpoint until the end of a step writes one, too; 0 is off.
        max_num: newest checkpoints that stay.
        max_mem: GB (1e9 bytes) of checkpoints that stay, in total; None sets no limit.
        keep_every: every checkpoint whose step is a multiple of it is written, and stays whatever the limits; 0 is off.
        keep_best: so many checkpoints with the largest held-out accuracy stay whatever the limits, of equal ones the
            newer; each evaluated step is written then. 0 is off.
        save_in_background: whether steps go on while a checkpoint is written; a process then needs main memory for a
            copy of its part of the state.
    """

    save_every: int = attrs.field(default=50, validator=at_least(0, whole=True))
    save_minutes: float = attrs.field(default=0.0, converter=real, validator=at_least(0))
    max_num: int = attrs.field(default=2, validator=at_least(1, whole=True))
    max_mem: float | None = attrs.field(default=None, converter=real_or_none, validator=optional(at_least(0)))
    keep_every: int = attrs.field(default=0, validator=at_least(0, whole=True))
    keep_best: int = attrs.field(default=0, validator=at_least(0, whole=True))
    save_in_background: bool = attrs.field(default=False, validator=is_bool)


@attrs.frozen(kw_only=True)
class RunConfig:
    """How long a run is and where it is kept.

    Attributes:
        dir: directory of metrics, samples, checkpoints and report.
        num_steps: steps of reinforcement (a step is one rollout and what is learnt from it).
        evaluate_every: steps between evaluations on held-out problems; 0 evaluates before and after alone.
        warmup_steps: optimizer steps of supervised warm-up before reinforcement; 0 is off.
        warmup_batch_size: samples of one warm-up step.
        warmup_size: training problems that the warm-up may see; 0 means all.
        warmup_learning_rate: peak learning rate of the warm-up.
        warmup_until: the warm-up ends early once greedy completions solve this share of training problems; 0 is off.
            Steps that it did not need count as done.
        offload_while_generating: whether the policy, its optimizer and the reference lie in main memory while the
            engine generates; with `strategy.enable_engine_sleep`, learning and generating take turns in device memory.
            On a CPU the two are one.
        threads: threads of one process for CPU tensor work, at most 1024 (torch crashes where the machine refuses
            more); 0 leaves torch's own choice.
    """

    dir: str = attrs.field(default="runs/default", validator=is_name)
    num_steps: int = attrs.field(default=100, validator=at_least(0, whole=True))
    evaluate_every: int = attrs.field(default=0, validator=at_least(0, whole=True))
    warmup_steps: int = attrs.field(default=0, validator=at_least(0, whole=True))
    warmup_batch_size: int = attrs.field(default=64, validator=at_least(1, whole=True))
    warmup_size: int = attrs.field(default=0, validator=at_least(0, whole=True))
    warmup_learning_rate: float = attrs.field(default=1e-3, converter=real, validator=at_least(0))
    warmup_until: float = attrs.field(default=0.0, converter=real, validator=between(0, 1))
    offload_while_generating: bool = attrs.field(default=False, validator=is_bool)
    threads: int = attrs.field(default=0, validator=between(0, 1024, whole=True))
