"""The folder that holds what a run has done, until the video is written.

<work>/
    settings.json    what the weights of the model were
    checkpoints/     see `Checkpoints`
    parts/           of a video file, a rank each, before they are joined
"""

from diffattn.media import work


class WorkFolder(work.WorkFolder):
    """That of one output; all ranks see it, and the first one writes its settings."""

    own = (
        r"\.shared",
        r"checkpoints/\.?step-\d{6,}(\.partial)?/frames-\d{6,}-\d{6,}\.safetensors",
        r"checkpoints/\.?step-\d{6,}(\.partial)?/manifest\.json",
        r"parts/part-\d{4,}\.\w+",
    )
