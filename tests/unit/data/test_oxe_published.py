"""Keys of the Open X-Embodiment registry against the features that were published."""

from __future__ import annotations

import pytest
from oxe_episodes import features

from pizero.data.oxe import oxe_set
from pizero.data.rlds.spec import DatasetSpec
from pizero.data.rlds.synthetic import load_features


@pytest.mark.parametrize("name", ["bridge_dataset", "fractal20220817_data"])
def test_keys_are_those_of_the_published_features(name):
    spec = DatasetSpec.from_json(load_features(name))
    for key, kind in features(name).items():
        leaf = spec.steps[key]
        if kind not in ("image", "text"):
            kind = leaf.kind
            assert features(name)[key] == " ".join([leaf.dtype, *map(str, leaf.shape)])
        assert leaf.kind == kind
    success = oxe_set(name).success
    assert success is None or spec.episode[success].dtype == "bool"
