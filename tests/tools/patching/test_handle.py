"""Handles: every undo runs once, the last first, however the block ends."""

from __future__ import annotations

import copy
import pickle

import pytest

from batchnorm.tools.patching.handle import Handle


def test_it_undoes_once_the_last_first():
    order = []
    handle = Handle(lambda: order.append(1), lambda: order.append(2))
    with handle as entered:
        assert entered is handle
        assert order == []
    handle.remove()
    assert order == [2, 1]


def test_all_are_undone_if_one_fails():
    order = []
    handle = Handle(lambda: order.append(1), lambda: 1 / 0, lambda: order.append(3))
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        handle.remove()
    assert order == [3, 1]
    handle.remove()


class Judging(Handle):
    def _fail(self, error):
        self.error = str(error)
        raise RuntimeError("in _fail")


def test_a_failed_block_is_told_and_undone_all_the_same():
    order = []
    handle = Judging(lambda: order.append(1))
    with pytest.raises(RuntimeError, match="in _fail"), handle:
        raise ValueError("inside")
    assert handle.error == "inside"
    assert order == [1]


class Change:
    lasts = True

    def undo(self):
        self.lasts = False


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_with_bound_methods_undoes_on_its_own(duplicate):
    own = Change()
    twin = duplicate(Handle(own.undo))
    twin.remove()
    assert own.lasts
