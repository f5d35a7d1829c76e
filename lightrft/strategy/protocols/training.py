"""What a backend does to models and optimizers: contracts and laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeVar, overload

import attrs

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader, Dataset

__all__ = [
    "Backward",
    "CreateOptimizer",
    "InitModelContext",
    "MemoryReport",
    "MovingAverage",
    "NamedTensors",
    "Offload",
    "OptimizerStep",
    "Prepare",
    "PrepareModelsAndOptimizers",
    "PrepareRewardModel",
    "Prepared",
    "Reload",
    "ReportMemory",
    "SetupDataloader",
    "StepResult",
    "Trainable",
    "Training",
    "Triple",
    "UnwrapModel",
]

_Sample = TypeVar("_Sample")


class Trainable(NamedTuple):
    """A model with what trains it; unpacks as `model, optimizer, scheduler`.

    Attributes:
        model: the prepared model.
        optimizer: its optimizer, which also carries the position inside the accumulation window.
        scheduler: its learning-rate schedule, stepped once an optimizer step; None keeps the rate.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None


Triple: TypeAlias = "tuple[nn.Module, Optimizer, LRScheduler | None]"
"""What `Prepare` takes for a model that is trained; a `Trainable` is one."""

Prepared: TypeAlias = "nn.Module | Trainable"
"""What `Prepare` returns for one argument: a model for a model, a `Trainable` for a triple."""


@attrs.frozen(kw_only=True)
class StepResult:
    """What one call of `optimizer_step` did.

    Attributes:
        stepped: whether parameters, optimizer and schedule moved.
        grad_norm: global L2 norm of the gradient before clipping; None inside an accumulation window.
        learning_rate: rate of the first parameter group that the step used, or that the next one will use.
        skipped_reason: why a complete window did not step; None otherwise.
    """

    stepped: bool
    grad_norm: float | None
    learning_rate: float
    skipped_reason: str | None


@attrs.frozen(kw_only=True)
class MemoryReport:
    """Memory of this process, in bytes.

    Attributes:
        label: what the caller called this moment.
        resident: resident set of the process.
        allocated: device memory in tensors; 0 on a CPU.
        peak_allocated: its peak since the process began; 0 on a CPU.
    """

    label: str
    resident: int
    allocated: int
    peak_allocated: int


class CreateOptimizer(Protocol):
    """Makes the optimizer of a model."""

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> Optimizer:
        """Return AdamW over the parameters that ask for gradients.

        Laws: frozen parameters get no state; weight decay leaves norms and biases (parameters of fewer than two dims)
        alone; tied parameters are stepped once.

        Args:
            model: the model, not yet prepared.
            lr: peak learning rate.
            betas: coefficients of the running averages.
            weight_decay: decoupled weight decay of matrices.
            eps: added to the denominator.

        Raises:
            ConfigError: no parameter of the model asks for gradients.
        """
        ...


class InitModelContext(Protocol):
    """Where models are built."""

    def __call__(self, *, meta_init: bool = False) -> AbstractContextManager[None]:
        """Return a context inside which models are built as the backend wants them.

        Args:
            meta_init: build without memory, for weights that are loaded later.
        """
        ...


class Prepare(Protocol):
    """Places, shards and wraps models for the backend."""

    @overload
    def __call__(self, model: nn.Module, /, *, is_rlhf: bool = False) -> nn.Module: ...
    @overload
    def __call__(self, triple: Triple, /, *, is_rlhf: bool = False) -> Trainable: ...
    @overload
    def __call__(
        self, first: nn.Module | Triple, second: nn.Module | Triple, /, *rest: nn.Module | Triple, is_rlhf: bool = False
    ) -> list[Prepared]: ...
    def __call__(self, *models_or_triples: nn.Module | Triple, is_rlhf: bool = False) -> Prepared | list[Prepared]:
        """Return what was passed, ready for the backend: one thing for one argument, a list for several.

        Preparing what is prepared already changes nothing.

        Args:
            models_or_triples: models, and (model, optimizer, scheduler) triples for those that are trained.
            is_rlhf: models without an optimizer are reference or reward models; freeze them and put them into
                evaluation mode.
        """
        ...


class PrepareModelsAndOptimizers(Protocol):
    """Prepares all models of a reinforcement run."""

    def __call__(
        self,
        actor: nn.Module,
        critic: nn.Module | None,
        reward_models: nn.Module | Sequence[nn.Module] | None,
        initial_model: nn.Module | None,
        args: object = None,
        max_steps: int = 1,
    ) -> tuple[Trainable, Trainable | None, list[nn.Module], nn.Module | None]:
        """Return (actor, critic, reward_models, initial_model), prepared; trained ones with optimizer and schedule.

        Args:
            actor: the policy.
            critic: the value model, or None.
            reward_models: one, several or no reward models.
            initial_model: the frozen reference policy, or None.
            args: settings of the optimizers (learning rates, betas, l2, schedule), anything that
                `StrategyConfig.from_args` takes; None takes the strategy's own config.
            max_steps: optimizer steps of the whole run, the length of the schedules.
        """
        ...


class PrepareRewardModel(Protocol):
    """Prepares a model that only scores."""

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return the model placed, frozen and in evaluation mode.

        Args:
            model: the reward model.
        """
        ...


class Backward(Protocol):
    """Adds one micro-batch's gradient to the window."""

    def __call__(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float | None = None,
        is_boundary: bool | None = None,
    ) -> None:
        """Accumulate the gradient of `weight * loss`; over ranks, gradients are summed.

        Laws: k micro-batches and one batch of all their samples give the same step; with weights that are shares of the
        whole (tokens of the micro-batch over tokens of the window), the step is the same for any partition of the
        samples over micro-batches and ranks. What `is_boundary` says changes no step, only when ranks exchange
        gradients.

        All ranks call it equally often in a window; one with fewer micro-batches repeats one with a weight of 0.

        Args:
            loss: 0-d, the mean over the micro-batch.
            model: the prepared model.
            optimizer: its optimizer.
            weight: the micro-batch's share of the window of all ranks; None means equal shares,
                micro_train_batch_size / train_batch_size.
            is_boundary: False promises that more micro-batches of the window follow, True that this is the last one on
                this rank; None promises nothing. The `optimizer_step` that follows is held to it.

        Raises:
            StepError: the loss is not 0-d or has no gradient, or the weight is not finite.
        """
        ...


class OptimizerStep(Protocol):
    """Ends a micro-batch, and the window when it is complete."""

    def __call__(
        self, optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None, *, is_boundary: bool | None = None
    ) -> StepResult:
        """Step optimizer and schedule once if the window is complete, and clear the gradients.

        Laws: before the window is complete no parameter, optimizer state or learning rate changes by a bit; when it is,
        all of them step exactly once. Clipping uses one global norm over all parameters; max_norm=0 means no clipping.
        A gradient that is not finite on any rank skips the step on all ranks, and leaves parameters and optimizer state
        untouched. Two optimizers of one strategy do not influence one another.

        Args:
            optimizer: the optimizer.
            model: its prepared model.
            scheduler: its schedule, or None.
            is_boundary: whether the window is complete; None counts micro-batches.

        Raises:
            StepError: no `backward` came before, or it was told otherwise about the window's end. Nothing has changed
                then: the call may be made again.
        """
        ...


class NamedTensors(Protocol):
    """Streams a model's parameters."""

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, full tensor) for every parameter and persistent buffer, in one order on all ranks.

        Names are those of the plain model; a tied tensor comes once under each of its names. The tensors are read-only,
        and may be kept until the model changes: the memory of one is not used again for the next.

        Args:
            model: the prepared model.
        """
        ...


class UnwrapModel(Protocol):
    """Undoes `prepare`."""

    def __call__(self, model: nn.Module) -> nn.Module:
        """Return the plain model inside a prepared one; a plain model is returned as it is.

        Args:
            model: a prepared or plain model.
        """
        ...


class MovingAverage(Protocol):
    """Averages parameters over time."""

    def __call__(self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992) -> None:
        """Move `model_ema` in place to beta * model_ema + (1 - beta) * model, parameter by parameter.

        Args:
            model: the prepared model.
            model_ema: the average, of the same architecture.
            beta: share that stays, in [0, 1].

        Raises:
            ConfigError: beta is out of range, or the models' parameters differ in name or shape.
        """
        ...


class SetupDataloader(Protocol):
    """Makes this rank's batches."""

    def __call__(
        self,
        dataset: Dataset[_Sample],
        batch_size: int,
        *,
        shuffle: bool = True,
        collate_fn: Callable[[list[_Sample]], object] | None = None,
        drop_last: bool = True,
    ) -> DataLoader[_Sample]:
        """Return a loader of this rank's share, whose sampler's position is saved and restored.

        The loader's `sampler` is a `lightrft.data.sampler.ResumableSampler`.

        Args:
            dataset: map-style dataset with a length.
            batch_size: samples of a batch on this rank.
            shuffle: draw a new order each epoch, from the seed and the epoch.
            collate_fn: makes a batch of a list of samples; None takes torch's.
            drop_last: leave out the last batch of an epoch if it is not full.

        Raises:
            ConfigError: the dataset has no length, or fewer samples than one batch while `drop_last`.
        """
        ...


class Offload(Protocol):
    """Moves state out of device memory."""

    def __call__(self, *handles: nn.Module | Optimizer) -> None:
        """Move models and optimizers to main memory; on a CPU, and a second time, it does nothing.

        Args:
            handles: prepared models and their optimizers.
        """
        ...


class Reload(Protocol):
    """Moves state back into device memory."""

    def __call__(self, *handles: nn.Module | Optimizer) -> None:
        """Move models and optimizers back; law: offload and reload change no bit.

        Args:
            handles: what `offload` was given.
        """
        ...


class ReportMemory(Protocol):
    """Measures memory."""

    def __call__(self, label: str = "") -> MemoryReport:
        """Return the memory that this process holds now.

        Args:
            label: what to call this moment.
        """
        ...


class Training(Protocol):
    """What a backend does to models and optimizers.

    Laws: same seed, same bits; n steps under any backend and world size equal n steps under "single"; tied parameters
    stay tied, frozen parameters stay bit-equal and get no optimizer state.
    """

    @property
    def create_optimizer(self) -> CreateOptimizer: ...  # noqa: D102 (the callback protocol is the documentation)
    @property
    def init_model_context(self) -> InitModelContext: ...  # noqa: D102
    @property
    def prepare(self) -> Prepare: ...  # noqa: D102
    @property
    def prepare_models_and_optimizers(self) -> PrepareModelsAndOptimizers: ...  # noqa: D102
    @property
    def prepare_reward_model(self) -> PrepareRewardModel: ...  # noqa: D102
    @property
    def backward(self) -> Backward: ...  # noqa: D102
    @property
    def optimizer_step(self) -> OptimizerStep: ...  # noqa: D102
    @property
    def named_tensors(self) -> NamedTensors: ...  # noqa: D102
    @property
    def unwrap_model(self) -> UnwrapModel: ...  # noqa: D102
    @property
    def moving_average(self) -> MovingAverage: ...  # noqa: D102
    @property
    def setup_dataloader(self) -> SetupDataloader: ...  # noqa: D102
    @property
    def offload(self) -> Offload: ...  # noqa: D102
    @property
    def reload(self) -> Reload: ...  # noqa: D102
    @property
    def report_memory(self) -> ReportMemory: ...  # noqa: D102
