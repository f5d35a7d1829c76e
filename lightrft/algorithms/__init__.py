"""Pure tensor functions of reinforcement learning: each depends on its arguments and on nothing else.

Rewards become advantages (`advantages`, after `reward_shaping` and `filtering`), advantages and log-probabilities
become losses per token (`losses`, `kl`, `entropy`, corrected by `importance`), and `aggregation` adds those up to the
loss of the global batch.
"""

from lightrft.algorithms.advantages import (
    ADVANTAGES,
    GroupAdvantage,
    dr_grpo,
    gae,
    grpo,
    reinforce_plus_plus_baseline,
    rloo,
)
from lightrft.algorithms.aggregation import AGGREGATION_MODES, AggregationMode, normaliser_share, token_weights
from lightrft.algorithms.clipping import clip_fraction
from lightrft.algorithms.entropy import entropy_from_logits
from lightrft.algorithms.filtering import informative_groups
from lightrft.algorithms.importance import (
    IMPORTANCE_CORRECTIONS,
    ImportanceCorrection,
    masked_importance,
    truncated_importance,
)
from lightrft.algorithms.kl import KL_ESTIMATORS, KLEstimator, k1, k2, k3
from lightrft.algorithms.losses import LOSSES, TOKENWISE_LOSSES, PolicyLoss, cispo, gspo, ppo_clip, value_loss
from lightrft.algorithms.masking import masked_mean, masked_sum, masked_whiten
from lightrft.algorithms.reward_shaping import (
    RunningStatistics,
    clip_rewards,
    merge_statistics,
    normalise,
    overlong_penalty,
    update_statistics,
)
from lightrft.algorithms.shapes import select

__all__ = [
    "ADVANTAGES",
    "AGGREGATION_MODES",
    "IMPORTANCE_CORRECTIONS",
    "KL_ESTIMATORS",
    "LOSSES",
    "TOKENWISE_LOSSES",
    "AggregationMode",
    "GroupAdvantage",
    "ImportanceCorrection",
    "KLEstimator",
    "PolicyLoss",
    "RunningStatistics",
    "cispo",
    "clip_fraction",
    "clip_rewards",
    "dr_grpo",
    "entropy_from_logits",
    "gae",
    "grpo",
    "gspo",
    "informative_groups",
    "k1",
    "k2",
    "k3",
    "masked_importance",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "merge_statistics",
    "normalise",
    "normaliser_share",
    "overlong_penalty",
    "ppo_clip",
    "reinforce_plus_plus_baseline",
    "rloo",
    "select",
    "token_weights",
    "truncated_importance",
    "update_statistics",
    "value_loss",
]
