"""The rule for sizes against a host that tries them: see also tests/commands."""

import pytest

from dfine_plugin.tools.image_sizes import RT_DETR_STRIDES, check_image_size


def test_what_does_not_fit_is_told_with_what_does() -> None:
    check_image_size((640, 480), RT_DETR_STRIDES)
    check_image_size((161, 33), ())
    with pytest.raises(
        ValueError,
        match=r"^this host cannot take images of 161 x 640: its levels, of strides 8, 16, 32, would not fit one "
        r"another. Multiples of 32 do: 160 x 640 or 192 x 640$",
    ):
        check_image_size((161, 640), RT_DETR_STRIDES)


def test_there_are_as_many_places_as_queries() -> None:
    check_image_size((128, 128), RT_DETR_STRIDES, num_queries=16 * 16 + 8 * 8 + 4 * 4)
    check_image_size((32, 32), (), num_queries=300)
    with pytest.raises(ValueError, match=r"^this host cannot take images of 96 x 128: they have 252 places on its"):
        check_image_size((96, 128), RT_DETR_STRIDES, num_queries=253)
