"""Which frames of a driving video are used."""


def select_frames(available: int, *, start: int = 0, count: int = 0, skip: int = 1, official: bool = False) -> range:
    """Numbers of frames: from `start`, every `skip`-th, `count` of them or as many as there are.

    Args:
        available: frames of the video.
        start: the first.
        count: 0 for all.
        skip: 1 for every frame.
        official: a `count` of -1 leaves out the last `skip` frames, as in the released code.

    Raises `ValueError` for numbers out of range, and where nothing is left.
    """
    least = -1 if official else 0
    if not 0 <= start < available or count < least or skip < 1:
        raise ValueError(
            f"expected a start from 0 to {available - 1}, a count from {least} and a skip from 1; got {start}, {count} "
            f"and {skip}; the video has {available} frames, and a count of 0 takes them all"
        )
    stop = available if count == 0 else start + count * skip
    chosen = range(available)[start:stop:skip]
    if not chosen:
        raise ValueError(f"expected a count of 0 or more with a start of {start}; got {count}, which leaves no frame")
    return chosen
