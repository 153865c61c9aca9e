"""What the pages of the mechanisms say that the code does not: when to take which, and with which options."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Words:
    """One mechanism."""

    when: str
    """When it is the right one, and when not."""
    shown: dict[str, Any] = field(default_factory=dict)
    """Options for the bundled pipelines, with their small grids: of the image and of the snippet."""
    cost: dict[str, Any] = field(default_factory=dict)
    """Options for models of real size: of the table of costs."""
    video: bool = False
    """Is it shown on frames?"""


WORDS = {
    "agent": Words(
        "Stable Diffusion at larger sizes than in training, by its preset `AgentAttention.stable_diffusion()`, "
        "without training. On diffusion transformers it is another function than the model's: distill it, or take "
        "`routing`.",
        {"num_agents": 64},
        {"num_agents": 256},
    ),
    "channel": Words(
        "Training a new attention whose cost grows like the number of tokens. It mixes the channels of each token "
        "by weights that all tokens have a say in, so in the image below a query's output comes from its own "
        "cell. Untrained, images are noise.",
    ),
    "clear": Words(
        "FLUX.1-dev from 2048 px on, by the [published weights](../recipes/flux.md). Any other model after "
        "[distillation](../distillation.md), or untrained with `pool=`, which keeps what the window leaves out. "
        "Nothing is gained at 1024 px.",
        {"radius": 4},
        {"radius": 16},
    ),
    "criss_cross": Words(
        "Images whose content follows rows and columns, after training; with `pool=` untrained. Its cost grows "
        "like n x (rows + columns), so it is cheapest on square grids.",
        {"width": 2},
        {"width": 2},
    ),
    "dual_scope": Words(
        "Videos longer than those of training: the cost is linear in the frames. In the temporal layers of UNets "
        "(AnimateDiff, the bundled video model) it works untrained; in video transformers it is untested on "
        "trained weights.",
        {"padding": 1, "top_k": 2, "local_phase": None, "global_phase": None},
        {"padding": 2, "top_k": 4},
        video=True,
    ),
    "global_context": Words(
        "Training a window that also sees the whole image by its means. It is not made to be used untrained, with "
        "`pool=` neither.",
        {"window": 4},
        {"window": 16},
    ),
    "halo": Words(
        "As `clear`, where whole tiles suit the kernel: no mask is evaluated inside of a tile, so a window of "
        "many more keys takes the same time. Video transformers with `tile=(frames, rows, columns)`. Untrained "
        "with `pool=`.",
        {"tile": 4, "halo": 1},
        {"tile": 8, "halo": 2},
    ),
    "hybrid": Words(
        "[Distillation](../distillation.md) of any mechanism: a trained linear branch gives back what the base "
        "leaves out. Before training it is its base bit for bit.",
        {"base": "clear(radius=4)"},
        {"base": "clear(radius=16)"},
    ),
    "linear": Words(
        "Training a new attention: it costs least of all, and is furthest from what the model was trained with. "
        "Never untrained.",
    ),
    "multi_axis": Words(
        "Reaching over the whole image at the cost of a window, in alternate heads or layers; untrained with `pool=`.",
        {"window": 4},
        {"window": 16},
    ),
    "neighborhood": Words(
        "As `clear`, where every query should have the same number of keys, at borders too, or where NATTEN's "
        "kernels are installed; dilation reaches further for the same cost. Untrained with `pool=`.",
        {"kernel_size": 7},
        {"kernel_size": 31},
    ),
    "per_head": Words(
        "Heads that do different things: `diffattn.calibrate_heads` measures which head bears which mechanism.",
        {"mechanisms": "clear(radius=4,pool=2),routing(share=0.5,tile=2,pool=2)"},
        {"mechanisms": "clear(radius=16,pool=8),routing(top_share=0.1,blocks=256)"},
    ),
    "routing": Words(
        "The first one to try, on any transformer, without training: it stays nearest to the model's own image. "
        'Begin with `quality="balanced"`; on video `order="content"` is nearer by far. Below some thousand tokens '
        "choosing costs more than it saves.",
        {"share": 0.5, "tile": 2, "pool": 2},
        {"top_share": 0.05, "blocks": 256},
    ),
    "shifted_window": Words(
        "Windows that do not overlap, the cheapest to compute, which pass information on from layer to layer; "
        "after training, or untrained with `pool=`.",
        {"window": 4},
        {"window": 16},
    ),
    "sla": Words(
        "Wan with the [weights that its authors and others "
        "published](../distillation.md#other-peoples-sparse-weights), and distillation of video models. Untrained "
        "it drops what it does not choose: then take `routing`.",
        {"top_share": 0.25, "tile": 16, "query_tile": 32},
        {"top_share": 0.1},
    ),
    "softmax": Words(
        "The baseline to compare with; with `proportional=True` and `ntk_factor=10` the full attention for images "
        "larger than those of training. With `reuse=2` of `apply` it is computed in one of two steps, which is a "
        "strong setting of its own.",
    ),
    "token_merge": Words(
        "Stable Diffusion 1.5 and SDXL at 768 px and more, without training. On transformers that rotate or "
        "normalise their queries it is further from the model than `routing` at the same cost.",
        {"ratio": 0.5},
        {"ratio": 0.5},
    ),
    "vsa": Words(
        "Wan with the [published weights](../distillation.md#other-peoples-sparse-weights), and distillation of "
        "video models. Untrained it drops what it does not choose: then take `routing`.",
        {"top_share": 0.25, "tile": 3},
        {"top_share": 0.2},
        video=True,
    ),
    "window_state": Words(
        "[Distillation](../distillation.md) of `clear` where the window alone loses too much: trained states "
        "carry the rest along rows and columns at linear cost. Before training it is `clear`.",
        {"radius": 4},
        {"radius": 16},
    ),
}
