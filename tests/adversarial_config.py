"""The golden config with a reward that learns: the embedded detector, from the embedded reference pictures."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

TESTS = Path(__file__).resolve().parent


def get_config() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("golden_config", TESTS / "golden_config.py")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    c = golden.get_config().unlock()
    spec = importlib.util.spec_from_file_location("flux_grpo", TESTS.parent / "configs" / "flux_grpo.py")
    configs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configs)
    a = configs.adversary()
    a.schedule, a.patience, a.min_rise = "plateau", 2, 0.5  # in epochs 0, 1, 3, 5, ...
    a.learning_rate = 1e-3
    a.batch_size, a.history_batch_size, a.history_size = 8, 4, 24
    a.max_passes = 2
    c.reward.adversarial = ConfigDict({"embedded_detector": a})
    c.reward.references.path = str(TESTS.parent / "reward_bridge" / "embedded" / "references" / "photographs")
    return c.lock()
