# SPDX-License-Identifier: Apache-2.0
"""Every family and variant by every method: saved, loaded, merged; and read by the reference."""

import torch

import pyfast
from tests.family_models import outputs
from tests.matrix.cells import MARKS, base, cells, close, dense, shaken

pytestmark = MARKS


@cells()
def test_what_is_saved_gives_the_same_outputs_in_a_fresh_base(name, method, tmp_path):
    model = shaken(pyfast.apply(base(method, name), method.config()))
    expected = outputs(model)
    method.save(model, tmp_path)
    # Weights that lie elsewhere in memory may be summed in another order.
    loaded = outputs(method.load(base(method, name), tmp_path))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=2e-6)
    if method.oracle_load is not None:
        close(outputs(method.oracle_load(dense(method, name), tmp_path)), expected)


@cells(lambda method: method.merges)
def test_merged_outputs_are_the_unmerged_ones_and_survive_saving(name, method, tmp_path):
    model = base(method, name)
    before = outputs(model)
    expected = outputs(shaken(pyfast.apply(model, method.config()), std=method.shake))
    assert not torch.allclose(expected, before, atol=1e-2)
    close(outputs(pyfast.merge(model)), expected)
    assert torch.equal(outputs(pyfast.unmerge(model)), expected)
    pyfast.unload(pyfast.merge(model)).save_pretrained(tmp_path)
    close(outputs(type(model).from_pretrained(tmp_path)), expected)
