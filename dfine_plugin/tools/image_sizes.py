"""Which images a host can take."""

from collections.abc import Sequence

RT_DETR_STRIDES = (8, 16, 32)
"""Of the levels that RT-DETR merges."""


def check_image_size(size: tuple[int, int], strides: Sequence[int], num_queries: int = 0) -> None:
    """Refuse a size whose feature maps a host cannot merge, or which have too few places for its queries.

    A host that merges its levels, as RT-DETR's encoder does, doubles the coarser map and lays it over the finer one:
    ``ceil(side / stride)`` must halve exactly from level to level. Of the places of all levels it takes the best as
    queries.

    Args:
        size: height and width in pixels.
        strides: of the levels that are merged, ascending; none for a host that takes any size.
        num_queries: how many places the host takes.

    Raises:
        ValueError: names the nearest sizes that fit, or how many places there are.
    """
    if not strides:
        return
    finest, coarsest = min(strides), max(strides)

    def cover(side: int, stride: int) -> int:
        return -(-side // stride) * stride

    height, width = size
    if any(cover(side, finest) != cover(side, coarsest) for side in size):
        below = [max(coarsest, side // coarsest * coarsest) for side in size]
        above = [cover(side, coarsest) for side in size]
        raise ValueError(
            f"this host cannot take images of {height} x {width}: its levels, of strides "
            f"{', '.join(map(str, strides))}, would not fit one another. Multiples of {coarsest} do: "
            f"{below[0]} x {below[1]} or {above[0]} x {above[1]}"
        )
    places = sum(cover(height, stride) * cover(width, stride) // stride**2 for stride in strides)
    if places < num_queries:
        raise ValueError(
            f"this host cannot take images of {height} x {width}: they have {places} places on its levels, and it "
            f"takes the {num_queries} best"
        )


def check_windows(size: tuple[int, int], patch: int, windows: int) -> None:
    """Refuse a size whose patches a ViT that attends within windows cannot share out among them.

    Args:
        size: height and width in pixels.
        patch: side of a patch in pixels; what is left beside whole patches is dropped.
        windows: on each side.

    Raises:
        ValueError: names the nearest sizes that fit.
    """
    if all(side >= patch and side // patch % windows == 0 for side in size):
        return
    unit = patch * windows
    below, above = ([max(unit, (side // unit + more) * unit) for side in size] for more in (0, 1))
    raise ValueError(
        f"this host cannot take images of {size[0]} x {size[1]}: their patches of {patch} pixels cannot be shared out "
        f"among {windows} x {windows} windows. Multiples of {unit} can: {below[0]} x {below[1]} or "
        f"{above[0]} x {above[1]}"
    )
