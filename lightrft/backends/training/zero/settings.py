"""DeepSpeed's JSON, made of the typed settings: a key that is not written here cannot get in."""

from __future__ import annotations

from lightrft.strategy.config import StrategyConfig

__all__ = ["clips_itself", "zero_settings"]


def zero_settings(
    config: StrategyConfig, *, stage: int, num_elements: int, world_size: int, on_cpu: bool, is_trained: bool
) -> dict[str, object]:
    """Return what DeepSpeed is told.

    Args:
        config: the strategy's settings, those whose names begin with `zero_`.
        stage: ZeRO stage.
        num_elements: elements of the model's parameters; no buffer need hold more.
        world_size: number of ranks.
        on_cpu: whether the process computes on a CPU, where nothing can be offloaded or overlapped.
        is_trained: whether the model comes with an optimizer.
    """
    return {
        # the window is counted here, and each micro-batch comes with its share of it
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "managed_gradient_accumulation": False,
        # parameters, gradients and sums are float32; a layer computes in bfloat16 by autocast, as under "single"
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        # the bound is of a call, and DeepSpeed's own with offloading
        "gradient_clipping": config.max_norm if clips_itself(config, stage=stage, on_cpu=on_cpu) else 0.0,
        # any optimizer that steps element by element will do
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(config, stage, num_elements, on_cpu=on_cpu, is_trained=is_trained),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def clips_itself(config: StrategyConfig, *, stage: int, on_cpu: bool) -> bool:
    """Return whether DeepSpeed takes the norm of the gradient and bounds it.

    Args:
        config: the strategy's settings.
        stage: ZeRO stage.
        on_cpu: whether the process computes on a CPU.
    """
    # its norm is one collective for each group of parameters, and does not tell which of them the ranks reached
    return stage > 0 and config.zero_offload_optimizer and not on_cpu


def _zero(
    config: StrategyConfig, stage: int, num_elements: int, *, on_cpu: bool, is_trained: bool
) -> dict[str, object]:
    if stage == 0:
        return {"stage": 0}
    bucket = max(2, min(config.zero_bucket_size, num_elements))
    bucket += bucket % 2  # an odd one is refused
    settings: dict[str, object] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": config.zero_overlap_comm and stage > 1 and not on_cpu,
        "contiguous_gradients": True,
        "reduce_scatter": True,
    }
    if stage < 3:
        settings["compute_grad_norm"] = clips_itself(config, stage=stage, on_cpu=on_cpu)
    else:
        settings |= {
            "stage3_param_persistence_threshold": config.zero_persistence_threshold,
            "stage3_prefetch_bucket_size": bucket,
            "zero_hpz_partition_size": config.zero_hpz,
            # else it replaces a function of torch for the whole process
            "memory_efficient_linear": False,
        }
    if config.zero_offload_optimizer and is_trained and not on_cpu:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if config.zero_offload_param and stage == 3 and not on_cpu:
        settings["offload_param"] = {"device": "cpu", "pin_memory": True}
    return settings
