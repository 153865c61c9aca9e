"""Trained weights of sparse attention as their authors publish them: SLA's and VSA's for Wan.

They are told by their keys; nothing in the files says what they are:

    SLA   blocks.N.self_attn.attn_op.local_attn.proj_l.{weight, bias}, original names of Wan   TurboDiffusion
          blocks.N.attn1.attn_op.local_attn.proj_l.{weight, bias}, diffusers' names            TurboDiffusion, converted
          blocks.N.attn1.attn_impl.proj_l.{weight, bias}, diffusers' names                     FastVideo
    VSA   blocks.N.to_gate_compress.{weight, bias}, on the block or on its attn1               FastVideo

with a prefix of `PREFIXES` or none. Beside them a file holds every weight of the transformer, or none at all, or a LoRA
on some of its layers. `load` maps names to diffusers' and puts projections and gates into the swapped layers, strict as
for all adapters: each missing, unexpected and misshapen tensor is named by its name in the file, and nothing is changed
before all is well. Shares and sides are the mechanism's defaults, which are the authors', unless given:
`load(pipe, path, top_share=0.15)`. A model in several files is loaded by their index, or the folder that holds it.

Not verified: no published file was opened here. The keys are those of the authors' code and of tables by third parties;
which of the two places has the gate in a file, and the names of FastVideo's own SLA files, may differ. Refused: pickles
(`.pth`), quantized files, gates of MiniMax-H3 and LTX-2, whose VSA has text in its cubes.
"""

from .layout import Layout
from .loading import Published, recognise

__all__ = ["Layout", "Published", "recognise"]
