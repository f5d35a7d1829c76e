"""The flat record, from the four parts that it is made of."""

from __future__ import annotations

from lightrft.strategy.protocols.capabilities import Capabilities
from lightrft.strategy.protocols.checkpointing import Checkpointing
from lightrft.strategy.protocols.collectives import Collectives
from lightrft.strategy.protocols.rollout import Rollout
from lightrft.strategy.protocols.training import Training
from lightrft.strategy.record import Strategy

__all__ = ["assemble"]


def assemble(
    *,
    collectives: Collectives,
    training: Training,
    checkpointing: Checkpointing,
    rollout: Rollout,
    capabilities: Capabilities,
) -> Strategy:
    """Return the strategy that has the functions of the four parts; a whole strategy may stand for any part.

    Args:
        collectives: what ranks do together.
        training: what is done to models and optimizers.
        checkpointing: what is kept on disk.
        rollout: how completions are made.
        capabilities: what the whole can do.
    """
    return Strategy(
        capabilities=capabilities,
        setup_distributed=collectives.setup_distributed,
        teardown=collectives.teardown,
        all_reduce=collectives.all_reduce,
        all_gather=collectives.all_gather,
        broadcast=collectives.broadcast,
        barrier=collectives.barrier,
        get_rank=collectives.get_rank,
        is_rank_0=collectives.is_rank_0,
        print=collectives.print,
        create_optimizer=training.create_optimizer,
        init_model_context=training.init_model_context,
        prepare=training.prepare,
        prepare_models_and_optimizers=training.prepare_models_and_optimizers,
        prepare_reward_model=training.prepare_reward_model,
        backward=training.backward,
        optimizer_step=training.optimizer_step,
        named_tensors=training.named_tensors,
        unwrap_model=training.unwrap_model,
        moving_average=training.moving_average,
        setup_dataloader=training.setup_dataloader,
        offload=training.offload,
        reload=training.reload,
        report_memory=training.report_memory,
        save_ckpt=checkpointing.save_ckpt,
        load_ckpt=checkpointing.load_ckpt,
        latest_ckpt=checkpointing.latest_ckpt,
        save_model=checkpointing.save_model,
        load_model=checkpointing.load_model,
        setup_inference_engine=rollout.setup_inference_engine,
        engine_generate_local=rollout.engine_generate_local,
        gather_and_generate=rollout.gather_and_generate,
        update_engine_weights=rollout.update_engine_weights,
        maybe_sleep_inference_engine=rollout.maybe_sleep_inference_engine,
        wakeup_inference_engine=rollout.wakeup_inference_engine,
    )
