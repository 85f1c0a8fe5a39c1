"""Which parameters are trained, and at which rates, on the names of a real network."""

import jax
import jax.numpy as jnp
import pytest

import cotnet_jax
from cotnet_jax.configs import default
from cotnet_jax.models import parameter_names
from cotnet_jax.training.parameter_groups import ParameterGroups, describe, find_groups, only_head


@pytest.fixture(scope="module")
def shapes():
    model = cotnet_jax.create_model("cotnet_tiny", num_classes=10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def groups_of(shapes, **fields):
    finetune = default.get_config().finetune
    finetune.update(fields)
    return find_groups(finetune, lambda: shapes)


def fitting(pattern, names):
    return {name for name in names if parameter_names.fits(pattern, name)}


def test_nothing_is_looked_at_where_nothing_is_asked_for():
    finetune = default.get_config().finetune
    assert find_groups(finetune, lambda: 1 / 0) == ParameterGroups()


def test_frozen_parameters_and_the_batch_norms_in_them(shapes):
    names = parameter_names.flatten(shapes["params"])
    statistics = {n.rpartition("/")[0] for n in parameter_names.flatten(shapes["batch_stats"])}
    groups = groups_of(shapes, freeze="stem|stage[12].*")
    assert groups.frozen == fitting("stem|stage[12].*", names)
    assert 0 < len(groups.frozen) < len(names)
    assert groups.frozen_batch_norms == fitting("stem|stage[12].*", statistics)
    # One whose bias alone is frozen still follows its batches.
    assert groups_of(shapes, freeze="stem/bn/bias").frozen_batch_norms == set()
    assert groups_of(shapes, freeze="stem/bn").frozen_batch_norms == {"stem/bn"}
    assert groups_of(shapes, freeze=".*kernel").frozen_batch_norms == set()


def test_the_first_multiplier_that_fits_counts_times_the_layers_decay(shapes):
    groups = groups_of(shapes, rate_multipliers="head/bias=3,head=10,stage4.*=2", layer_decay=0.5)
    factors = groups.rate_multipliers
    assert factors["head/bias"] == 3
    assert factors["head/kernel"] == 10
    assert factors["stage4_block0/conv1/kernel"] == 2 * 0.5
    assert factors["stem/conv1/kernel"] == 0.5 ** len(cotnet_stages(shapes)) / 2
    assert factors.keys() == parameter_names.flatten(shapes["params"]).keys()
    assert not groups.frozen
    assert set(groups_of(shapes, rate_multipliers="head=10").rate_multipliers.values()) == {1, 10}


def cotnet_stages(shapes):
    return [name for name in shapes["params"] if name.startswith("stage")]


def test_all_that_fit_nothing_are_listed(shapes):
    with pytest.raises(ValueError) as error:
        groups_of(shapes, freeze="stem|stage1|layer2.*", rate_multipliers="hed=10")
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3
    assert lines[0].startswith("  --config.finetune.freeze: 'stage1' fits no parameter")
    assert lines[2].startswith("  --config.finetune.rate_multipliers: 'hed' fits no parameter")


def test_something_must_be_trained(shapes):
    with pytest.raises(ValueError, match=r"--config.finetune.freeze=.\*: freezes all \d+ param"):
        groups_of(shapes, freeze=".*")
    with pytest.raises(ValueError, match="freezes the head, which is to be trained first"):
        only_head(groups_of(shapes, freeze="head"), shapes)


def test_the_head_alone(shapes):
    groups = only_head(groups_of(shapes, freeze="stem|head/bias"), shapes)
    names = parameter_names.flatten(shapes["params"])
    assert names.keys() - groups.frozen == {"head/kernel"}
    statistics = parameter_names.flatten(shapes["batch_stats"])
    assert groups.frozen_batch_norms == {name.rpartition("/")[0] for name in statistics}
    assert describe(groups, shapes).endswith(f"in 1 of {len(names)} arrays (head)")
