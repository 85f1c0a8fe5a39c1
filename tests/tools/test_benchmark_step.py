"""What the benchmark of the training step times."""

import numpy as np

from configs import cotnet50, digits
from cotnet_jax.tools import benchmark_step


def test_the_batch_has_the_classes_of_the_dataset(tmp_path):
    for config, classes in ((digits.get_config(), 10), (cotnet50.get_config(), 1000)):
        config.data.data_dir = str(tmp_path)
        setup = benchmark_step.set_up_training(config)
        assert setup.model.num_classes == classes
        batch = benchmark_step.make_batch(setup)
        assert classes / 2 < np.max(batch["label"]) < classes
