"""What is passed is passed as it is meant; what is refused is named."""

import numpy as np
import pytest
import torch

from kfacerr.checks import choice, instance, names, path_of, positive, switch, whole
from kfacerr.exceptions import InputError


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3), torch.tensor(3.0)])
def test_a_whole_number_of_any_library_is_an_int(value):
    assert whole(value, "rank", 3, 3) == 3
    assert type(whole(value, "rank")) is int


def test_a_message_names_the_value_and_what_it_must_be():
    for check, message in (
        (lambda: whole(0.5, "k"), "k must be a whole number of at least 0, got 0.5"),
        (lambda: whole(2, "update", 0, 1), "update must be a whole number in 0..1, got 2"),
        (lambda: positive(float("nan"), "phi"), "phi must be positive and finite, got nan"),
        (lambda: positive(-1, "lr", or_zero=True), "lr must be non-negative and finite, got -1"),
        (lambda: choice("max", "continuation", ("min", "none")), "continuation 'max' is not one of min, none"),
        (lambda: names("B-KFAC", "algorithms"), "algorithms: a list is needed, got 'B-KFAC'"),
        (lambda: names([3], "layers"), "layers: each must be of type str, got 3"),
        (lambda: instance(np.eye(2), "X", int, str), "X must be of type int or str, got ndarray"),
        (lambda: path_of(""), "a file's name is needed, got ''"),
    ):
        with pytest.raises(InputError) as caught:
            check()
        assert str(caught.value) == message


@pytest.mark.parametrize("value", [True, False, 1, 0, np.True_, np.uint8(1)])
def test_a_switch_may_be_a_number(value):
    assert switch(value, "bias") is bool(value)


def test_a_path_need_not_be_there(tmp_path):
    assert path_of(str(tmp_path / "none" / "x")) == tmp_path / "none" / "x"
    assert positive(np.float32(2), "phi") == 2.0 and positive(0, "lr", or_zero=True) == 0.0
    assert names(iter(["a", "b"]), "layers") == ("a", "b")
