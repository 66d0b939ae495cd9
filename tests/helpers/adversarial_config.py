"""The golden config with a reward that learns: the embedded detector, from the embedded reference pictures."""

from ml_collections import ConfigDict

from realgen_configs import flux_grpo
from tests.helpers import golden_config
from tests.helpers.goldens import ROOT


def get_config() -> ConfigDict:
    c = golden_config.get_config().unlock()
    a = flux_grpo.adversary()
    a.schedule, a.patience, a.min_rise = "plateau", 2, 0.5  # in epochs 0, 1, 3, 5, ...
    a.learning_rate = 1e-3
    a.batch_size, a.history_batch_size, a.history_size = 8, 4, 24
    a.max_passes = 2
    c.reward.adversarial = ConfigDict({"embedded_detector": a})
    c.reward.references.path = str(
        ROOT / "reward_bridge" / "embedded" / "references" / "photographs"
    )
    return c.lock()
