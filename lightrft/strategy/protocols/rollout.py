"""Engines that make completions, and how weights reach them: contracts and laws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias

import attrs

from lightrft.config._checks import at_least, between
from lightrft.config.sections import EngineConfig
from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.images import Image, Processor, Video

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "AbortUpdate",
    "BeginUpdate",
    "BuildEngine",
    "CloseEngine",
    "CommitUpdate",
    "Completion",
    "Engine",
    "EngineGenerateLocal",
    "EngineHandle",
    "EngineProtocol",
    "EngineSource",
    "EngineStatus",
    "FinishReason",
    "FlushCache",
    "GatherAndGenerate",
    "Generate",
    "MaybeSleepInferenceEngine",
    "Prompt",
    "PutTensors",
    "Rollout",
    "SamplingParams",
    "SetupInferenceEngine",
    "SleepEngine",
    "StartEngine",
    "StreamWeights",
    "SyncReport",
    "Tokenizer",
    "UpdateEngineWeights",
    "WakeEngine",
    "WakeupInferenceEngine",
]

EngineStatus: TypeAlias = Literal["awake", "asleep", "updating", "torn", "closed"]
"""awake: generates; asleep: holds as little memory as it can; updating: between begin and commit of new weights;
torn: an update did not end well, and only another update mends it; closed: for good."""

FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a completion ended: after a stop token, or at `max_new_tokens`."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; transformers' satisfy it."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a completion."""
        ...

    def encode(self, text: str, /, *, add_special_tokens: bool = ...) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: the text.
            add_special_tokens: whether the tokenizer's own begin and end tokens are added.
        """
        ...

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = ...) -> str:
        """Return the text of token ids.

        Args:
            token_ids: the ids.
            skip_special_tokens: whether special tokens are left out.
        """
        ...


@attrs.frozen(kw_only=True)
class Prompt:
    """One request to an engine.

    Attributes:
        token_ids: ids of the prompt's tokens, at least one; each image and each video has one, the processor's
            placeholder `image_token_id` or `video_token_id`, which the engine replaces by the tokens that the processor
            gives it.
        images: the images in the order of their placeholders.
        videos: the videos in the order of theirs.
    """

    token_ids: tuple[int, ...]
    images: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p: sample from the smallest set of tokens whose probability reaches this share of what top_k leaves; 1 is
            off.
        top_k: sample from this many most likely tokens; 0 is off.
        max_new_tokens: bound on the tokens of a completion.
        min_new_tokens: tokens before a stop token may be sampled.
        stop_token_ids: tokens that end a completion; the one that did is its last token.
        n: completions of each prompt.
        seed: seed of the draws; each (prompt, sample) of a request has a random stream of its own.
        first_prompt: number of the call's first prompt among those of the whole request; whoever splits a request
            over calls or ranks says it, so that the draws are those of one call.
    """

    temperature: float = attrs.field(default=1.0, validator=at_least(0))
    top_p: float = attrs.field(default=1.0, validator=between(0, 1, above_low=True))
    top_k: int = attrs.field(default=0, validator=at_least(0, whole=True))
    max_new_tokens: int = attrs.field(default=256, validator=at_least(1, whole=True))
    min_new_tokens: int = attrs.field(default=0, validator=at_least(0, whole=True))
    stop_token_ids: tuple[int, ...] = ()
    n: int = attrs.field(default=1, validator=at_least(1, whole=True))
    seed: int = attrs.field(default=0, validator=at_least(0, whole=True))
    first_prompt: int = attrs.field(default=0, validator=at_least(0, whole=True))


@attrs.frozen(kw_only=True)
class Completion:
    """What an engine made of one prompt, once.

    Attributes:
        prompt_ids: the prompt's token ids as the model read them: each placeholder is replaced by the tokens of its
            image or video; without any they are those that were asked for.
        token_ids: sampled ids, with the stop token if one ended it.
        logprobs: log-probability of each sampled id under the policy at the sampling temperature, before top-k and
            top-p.
        finish_reason: "stop" after a stop token, "length" at `max_new_tokens`.
        weight_version: version of the weights that made it.
        sample_index: its number among the n completions of its prompt.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int
    sample_index: int


@attrs.frozen(kw_only=True, eq=False)
class EngineSource:
    """What an engine is started from.

    Attributes:
        model: the plain model whose architecture and weights the engine begins with.
        tokenizer: its tokenizer, for engines that take or give text; None for those that do not.
        processor: its processor, for prompts with images or videos; None refuses them.
        adapted: peft's model around a copy of `model`, where its adapter is sent apart from the base; else None.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    processor: Processor | None = None
    adapted: nn.Module | None = None


@attrs.define(kw_only=True, eq=False)
class EngineHandle:
    """A running engine; the caller holds it and passes it to the functions of `Engine`.

    Attributes:
        engine: the functions of its kind.
        status: where it is in its life; set by those functions.
        weight_version: how many updates were committed.
        state: what the engine itself keeps.
        processor: what the engine reads images and videos with; None if it takes none.
        weights: streams the weights of this version again, for an engine that lost them; set by the strategy, whose
            ranks all call it together. None where nobody can.
        takes_adapter: whether it began with `EngineSource.adapted`; an update may then bring the adapter alone.
    """

    engine: Engine
    status: EngineStatus
    weight_version: int
    state: object
    processor: Processor | None = None
    weights: StreamWeights | None = None
    takes_adapter: bool = False

    def __enter__(self) -> Self:
        """Return the handle, for a `with` block that closes the engine at its end."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the engine, after an exception too."""
        self.engine.close(self)


@attrs.frozen(kw_only=True)
class SyncReport:
    """What a weight sync did.

    Attributes:
        weight_version: version that the engine has now.
        num_tensors: tensors that were written.
        num_bytes: their size in bytes.
        max_logprob_difference: largest absolute difference, in nats, between engine and trainer on the probe.
    """

    weight_version: int
    num_tensors: int
    num_bytes: int
    max_logprob_difference: float


class StreamWeights(Protocol):
    """Streams the weights of a trainer."""

    def __call__(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Return (name, full tensor) of every parameter and persistent buffer, in one order on all ranks."""
        ...


class StartEngine(Protocol):
    """Starts an engine."""

    def __call__(self, source: EngineSource) -> EngineHandle:
        """Return a running engine, awake, with weights of version 0 equal to the source's.

        Args:
            source: model, tokenizer and processor.

        Raises:
            UnsupportedError: the engine cannot run this model, or the processor is of another one.
        """
        ...


class Generate(Protocol):
    """Makes completions."""

    def __call__(self, handle: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """Return n completions of each prompt, prompt by prompt, in the order of the prompts.

        Laws: order and number match the requests; logprobs agree with the trainer's own; greedy generation is
        deterministic; sampling is by the seed; a part of a request, with the number of its `first_prompt`, is given
        what the whole request would give it.

        Args:
            handle: an engine that is awake.
            prompts: any number of prompts.
            sampling: how tokens are drawn.

        Raises:
            EngineStateError: the engine is not awake.
            EngineCrashError: its process ended or hung; it is "torn", and the next update starts it again, once.
            DataError: a prompt is empty, has a token outside of the model's vocabulary, leaves no room in its context,
                or has another number of images or videos than of their placeholders; its index is named.
            ConfigError: sampling parameters that cannot be met: `min_new_tokens` exceeds `max_new_tokens`, a stop token
                is outside of the vocabulary, or prompt and `max_new_tokens` together exceed the context.
            UnsupportedError: the engine cannot do what the request asks for, such as images; see `CAPABILITIES`. An
                engine that takes them was started without a processor.
        """
        ...


class BeginUpdate(Protocol):
    """Opens a weight update."""

    def __call__(self, handle: EngineHandle) -> None:
        """Begin to write new weights; the engine is "updating" and does not generate.

        Args:
            handle: an engine that is awake or torn.

        Raises:
            EngineStateError: it is asleep, closed or in an update already.
        """
        ...


class PutTensors(Protocol):
    """Writes weights."""

    def __call__(self, handle: EngineHandle, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write a bucket of full tensors.

        Args:
            handle: an engine in an update.
            tensors: (name, tensor) with the names of the plain model.

        Raises:
            WeightSyncError: a name is unknown or was written before, or a shape differs. What else an engine refuses it
                may say in a later call of the update, in `commit` at the latest.
        """
        ...


class CommitUpdate(Protocol):
    """Closes a weight update."""

    def __call__(self, handle: EngineHandle) -> int:
        """Return the new weight version; the engine is awake, and its caches are dropped.

        Law: every parameter of the engine was written once, or the call raises and the engine is "torn".

        Args:
            handle: an engine in an update.

        Raises:
            WeightSyncError: parameters are missing; they are named.
        """
        ...


class AbortUpdate(Protocol):
    """Gives a weight update up."""

    def __call__(self, handle: EngineHandle) -> None:
        """Leave the engine "torn": it refuses to generate until an update succeeds.

        Args:
            handle: an engine in an update, or awake after a commit whose verification failed.
        """
        ...


class SleepEngine(Protocol):
    """Puts an engine to sleep."""

    def __call__(self, handle: EngineHandle) -> None:
        """Free what memory the engine can; on an engine asleep it does nothing.

        Args:
            handle: an engine that is awake or asleep.

        Raises:
            EngineStateError: it is torn, closed or in an update.
        """
        ...


class WakeEngine(Protocol):
    """Wakes an engine."""

    def __call__(self, handle: EngineHandle) -> None:
        """Make the engine ready to generate; on an engine awake it does nothing.

        Law: sleep, wake, generate equals generate.

        Args:
            handle: an engine that is asleep or awake.

        Raises:
            EngineStateError: it is torn, closed or in an update.
        """
        ...


class FlushCache(Protocol):
    """Drops caches."""

    def __call__(self, handle: EngineHandle) -> None:
        """Drop what was computed with earlier weights.

        Args:
            handle: any engine that is not closed.

        Raises:
            EngineStateError: it is closed.
        """
        ...


class CloseEngine(Protocol):
    """Ends an engine."""

    def __call__(self, handle: EngineHandle) -> None:
        """Free processes and memory; on a closed engine it does nothing.

        Args:
            handle: any engine.
        """
        ...


class EngineProtocol(Protocol):
    """What every kind of engine can do.

    Laws: outputs match the requests; sleep and wake are idempotent, legal in every order that the status allows and
    refused with a reason in the others; closing frees everything, also after an exception.
    """

    @property
    def start(self) -> StartEngine: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def generate(self) -> Generate: ...  # noqa: D102
    @property
    def begin_update(self) -> BeginUpdate: ...  # noqa: D102
    @property
    def put(self) -> PutTensors: ...  # noqa: D102
    @property
    def commit(self) -> CommitUpdate: ...  # noqa: D102
    @property
    def abort(self) -> AbortUpdate: ...  # noqa: D102
    @property
    def sleep(self) -> SleepEngine: ...  # noqa: D102
    @property
    def wake(self) -> WakeEngine: ...  # noqa: D102
    @property
    def flush_cache(self) -> FlushCache: ...  # noqa: D102
    @property
    def close(self) -> CloseEngine: ...  # noqa: D102


@attrs.frozen(kw_only=True, eq=False)
class Engine:
    """The functions of one kind of engine, the record behind `EngineProtocol`, and what it can do."""

    capabilities: Capabilities
    start: StartEngine
    generate: Generate
    begin_update: BeginUpdate
    put: PutTensors
    commit: CommitUpdate
    abort: AbortUpdate
    sleep: SleepEngine
    wake: WakeEngine
    flush_cache: FlushCache
    close: CloseEngine


class SetupInferenceEngine(Protocol):
    """Starts the rollout engine of a run."""

    def __call__(
        self,
        config: EngineConfig | None = None,
        *,
        actor: nn.Module,
        tokenizer: Tokenizer | None = None,
        processor: Processor | None = None,
    ) -> EngineHandle:
        """Return a running engine with the actor's weights.

        Args:
            config: kind and settings of the engine; None takes the strategy's `engine_type` with its defaults.
            actor: the prepared or plain model.
            tokenizer: its tokenizer, for engines that take or give text.
            processor: its processor, for prompts with images or videos.

        Raises:
            ConfigError: no engine is registered under this name.
        """
        ...


class EngineGenerateLocal(Protocol):
    """Generates on this rank alone."""

    def __call__(self, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """Return n completions of each of this rank's prompts, in order; other ranks need not call it.

        Ranks that run one engine together (`EngineConfig.tensor_parallel_size`) call it together, too.

        Args:
            engine: an engine that is awake.
            prompts: this rank's prompts, any number.
            sampling: how tokens are drawn.
        """
        ...


class GatherAndGenerate(Protocol):
    """Generates together with all ranks."""

    def __call__(self, engine: EngineHandle, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """Return n completions of each of this rank's prompts, in order.

        Every rank calls it, with any number of prompts, with images or videos or without.

        Laws: the outputs do not depend on how the prompts are split over the ranks; where the process of an engine
        ended before they were there, they are those that it would have made; what one rank cannot do is raised on all.

        Args:
            engine: an engine that is awake.
            prompts: this rank's prompts, zero included.
            sampling: how tokens are drawn.

        Raises:
            EngineCrashError: the process of an engine ended for the second time, or with weights that are lost.
        """
        ...


class UpdateEngineWeights(Protocol):
    """Brings the trainer's weights into the engine."""

    def __call__(self, engine: EngineHandle, actor: nn.Module) -> SyncReport:
        """Return what was written, after the engine's logprobs were held against the trainer's on a probe.

        Laws: afterwards the engine's logprobs equal the trainer's, and every parameter of the engine was written, or
        the call raises and the engine is "torn"; on several ranks it succeeds on all of them, or raises on all and
        names the rank that it failed on.

        Args:
            engine: an engine that is awake or torn.
            actor: the prepared model.

        Raises:
            WeightSyncError: names are missing or left over, shapes differ, or the probe disagrees.
            EngineCrashError: the process of an engine ended or hung for the second time.
        """
        ...


class MaybeSleepInferenceEngine(Protocol):
    """Puts the engine to sleep if the config wants it."""

    def __call__(self, engine: EngineHandle) -> None:
        """Sleep if `enable_engine_sleep`; otherwise leave the engine as it is.

        Args:
            engine: the engine.
        """
        ...


class WakeupInferenceEngine(Protocol):
    """Wakes the engine."""

    def __call__(self, engine: EngineHandle) -> None:
        """Wake the engine if it is asleep.

        Args:
            engine: the engine.
        """
        ...


class Rollout(Protocol):
    """How a run makes completions with the actor's weights."""

    @property
    def setup_inference_engine(self) -> SetupInferenceEngine: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def engine_generate_local(self) -> EngineGenerateLocal: ...  # noqa: D102
    @property
    def gather_and_generate(self) -> GatherAndGenerate: ...  # noqa: D102
    @property
    def update_engine_weights(self) -> UpdateEngineWeights: ...  # noqa: D102
    @property
    def maybe_sleep_inference_engine(self) -> MaybeSleepInferenceEngine: ...  # noqa: D102
    @property
    def wakeup_inference_engine(self) -> WakeupInferenceEngine: ...  # noqa: D102


class BuildEngine(Protocol):
    """Makes the functions of an engine from its settings."""

    def __call__(self, config: EngineConfig) -> Engine:
        """Return the engine's functions; nothing is started.

        Args:
            config: the settings.

        Raises:
            MissingPackageError: the package behind the engine is not installed.
        """
        ...
