"""The golden config with a reward that learns: the embedded detector, from reference pictures."""

from ml_collections import ConfigDict

from realgen_jax.config import adversary
from tests.helpers import golden_config
from tests.helpers.goldens import ROOT


def get_config() -> ConfigDict:
    detector = adversary()
    detector.schedule = "plateau"  # with these two values: in epochs 0, 3, 6, ...
    detector.patience = 2
    detector.min_rise = 0.5
    detector.learning_rate = 1e-3
    detector.batch_size = 8
    detector.history_batch_size = 4
    detector.history_size = 24
    detector.max_passes = 2

    c = golden_config.get_config()
    c.reward.adversarial = ConfigDict({"embedded_detector": detector})
    photographs = ROOT / "reward_bridge" / "embedded" / "references" / "photographs"
    c.reward.references.path = str(photographs)
    return c.lock()
