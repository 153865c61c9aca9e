"""Image models of earlier years."""

import torch
from tiny_model import COLUMNS, ROWS, TEXT, Tiny, Tokens, _make, draw, text_mask


def uvit2d() -> Tiny:
    """Ids of a codebook's vectors, halved; the last row and column have no partner. No timestep."""
    model = _make(
        "UVit2DModel",
        hidden_size=16,
        cond_embed_dim=6,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=12,
        vocab_size=32,
        codebook_size=30,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    rows, columns = 2 * ROWS - 1, 2 * COLUMNS - 1
    inputs = dict(
        input_ids=torch.arange(2 * rows * columns).view(2, rows, columns) * 7 % 30,
        encoder_hidden_states=draw(2, TEXT, 12),
        pooled_text_emb=draw(2, 6),
        micro_conds=draw(2, 5),
    )
    return Tiny(model, inputs, {r"transformer_layers\.\d+\.attn1": (Tokens(0, 1, ROWS, COLUMNS),)})


def unidiffuser() -> Tiny:
    """Two times, the kind of data, text and an embedded image come first. Square images alone."""
    model = _make(
        "UniDiffuserModel",
        text_dim=6,
        clip_img_dim=4,
        num_text_tokens=TEXT,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=12,
        patch_size=2,
        use_timestep_embedding=True,
        use_data_type_embedding=True,
    )
    inputs = dict(
        latent_image_embeds=draw(2, 4, 12, 12),
        image_embeds=draw(2, 1, 4),
        prompt_embeds=draw(2, TEXT, 6),
        timestep_img=torch.tensor([7, 3]),
        timestep_text=torch.tensor([7, 3]),
    )
    layers = r"transformer\.transformer_(in_blocks\.\d+|mid_block|out_blocks\.\d+\.block)\.attn1"
    return Tiny(model, inputs, {layers: (Tokens(3 + TEXT + 1, 1, 6, 6),)})


def kandinsky3() -> Tiny:
    """The first layer of a level sees the features, the others the text; the finest level has none."""
    model = _make(
        "Kandinsky3UNet",
        time_embedding_dim=8,
        groups=4,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 8, 8, 8),
        cross_attention_dim=12,
        encoder_hid_dim=10,
    )
    inputs = dict(
        sample=draw(2, 4, 24, 32),
        timestep=torch.tensor([7, 3]),
        encoder_hidden_states=draw(2, TEXT, 10),
        encoder_attention_mask=text_mask(TEXT, 3),
    )
    layouts = {
        rf"(down_blocks\.{level}|up_blocks\.{3 - level})\.attentions\.0\.attention": (Tokens(0, 1, *size),)
        for level, size in ((1, (12, 16)), (2, (6, 8)), (3, (3, 4)))
    }
    return Tiny(model, inputs, layouts)
