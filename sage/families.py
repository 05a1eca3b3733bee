"""What the arguments of a denoiser mean when several rows become one, and which pipelines want to be treated otherwise.

Sharing runs one row for a whole group. Every batch-shaped argument of the denoiser is reduced **by its name**, never by
its shape (a rotary table can have as many rows as the batch and still not be one). `RULES` is that table; a user's own
pipeline adds to it with ``sage.enable(pipe, ..., rules={"my_argument": "mean"})``.
"""

from __future__ import annotations

from collections.abc import Mapping

# The pipeline attributes that hold a denoiser, in the order they are looked for. A ControlNet's residuals are not rows of
# their own: they are not counted in nfe.
DENOISERS = ("unet", "transformer", "transformer_2", "controlnet")
ADAPTERS = ("controlnet",)

# The denoiser's latent argument: its rows are B leaves times k copies (k = 2 under classifier-free guidance).
LATENTS = ("sample", "hidden_states", "x")

# The ways in which the rows of a node's members become the node's one row.
HOW = {
    "mean": "the members' mean",
    "masked mean": "at each token the mean of the members whose mask is on there (see `MASKS`); without a mask the mean",
    "union": "the element-wise maximum: a token that counts for one member counts for the node",
    "alike": "the representative's row, refused when the members' rows differ",
    "representative": "the representative's row, whatever the others have",
    "never batched": "passed on as it is",
    "refused": "an error: what it carries from call to call cannot be shared",
}

RULES: dict[str, str] = {
    # the latents: a node has its representative's
    **dict.fromkeys(LATENTS, "representative"),
    # what the prompt says, token by token
    "encoder_hidden_states": "masked mean",
    "encoder_hidden_states_t5": "masked mean",  # HunyuanDiT's second text encoder
    "cap_feats": "masked mean",  # Z-Image: a list, each prompt as long as it is
    # what the prompt says, as one vector or as image tokens
    "encoder_hidden_states_llama3": "mean",  # HiDream: [layers, rows, ...]
    "pooled_projections": "mean",
    "pooled_embeds": "mean",
    "text_embeds": "mean",
    "image_embeds": "mean",  # Kandinsky, IP-Adapter
    "ip_adapter_image_embeds": "mean",  # IP-Adapter of Flux and SD3
    "ip_hidden_states": "mean",
    "encoder_hidden_states_image": "mean",  # Wan image-to-video
    # which of its tokens count
    "attention_mask": "union",
    "encoder_attention_mask": "union",
    "encoder_hidden_states_mask": "union",  # Qwen-Image
    "text_embedding_mask": "union",
    "text_embedding_mask_t5": "union",
    # where in the trajectory, and how strongly guided
    **dict.fromkeys(["timestep", "timesteps", "t", "timestep_cond", "guidance", "additional_t_cond"], "alike"),
    # sizes and styles that pictures are asked for in
    **dict.fromkeys(["class_labels", "time_ids", "resolution", "aspect_ratio", "image_meta_size", "style"], "alike"),
    **dict.fromkeys(["original_size", "target_size", "crop_coords", "ofs", "img_shapes"], "alike"),
    # pictures that steer: ControlNet, T2I-Adapter, GLIGEN, image tokens
    **dict.fromkeys(["controlnet_cond", "controlnet_mode", "control_type", "block_controlnet_hidden_states"], "alike"),
    **dict.fromkeys(["down_block_additional_residuals", "mid_block_additional_residual"], "alike"),
    **dict.fromkeys(["down_intrablock_additional_residuals", "siglip_feats", "image_noise_mask"], "alike"),
    **dict.fromkeys(["controlnet_block_samples", "controlnet_single_block_samples", "video_coords"], "alike"),
    **dict.fromkeys(["boxes", "positive_embeddings", "masks", "control_context", "control_hidden_states"], "alike"),
    **dict.fromkeys(["hidden_states_masks", "img_sizes"], "alike"),
    # what the loop makes of the denoiser's outputs: members that are guided differently cannot share
    "model_output": "alike",
    # position tables and options: not data of one picture
    **dict.fromkeys(["img_ids", "txt_ids", "txt_seq_lens", "image_rotary_emb"], "never batched"),
    **dict.fromkeys(["rope_interpolation_scale", "visual_rope_pos", "text_rope_pos", "scale_factor"], "never batched"),
    **dict.fromkeys(["sparse_params", "num_frames"], "never batched"),
    **dict.fromkeys(["conditioning_scale", "control_type_idx", "skip_layers", "return_dict"], "never batched"),
    **dict.fromkeys(["ip_adapter_masks", "control_hidden_states_scale", "num_ref_tokens", "patch_size"], "never batched"),
    "kv_cache": "refused",  # Flux 2 klein
}

# The mask that goes with an embedding, where it is not named <embedding>_mask: the first that the call gives.
MASKS: dict[str, tuple[str, ...]] = {
    "encoder_hidden_states": ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask", "attention_mask"),
    "encoder_hidden_states_t5": ("text_embedding_mask_t5",),
}

# Arguments that are lists of rows, one entry per latent; any other list holds several batches.
ROW_LISTS = ("x", "cap_feats", "siglip_feats", "image_noise_mask", "img_shapes")

# Tensors whose rows are the second dimension.
ROWS_SECOND = ("encoder_hidden_states_llama3",)

# Arguments of a pipeline's call that the latents begin from: members of a group must have the same picture.
INIT_IMAGES = ("image", "mask_image", "control_image")
INIT_VIDEOS = ("video", "mask", "mask_video")

# Pipelines, by how their names begin, that take several images for all pictures together.
REFERENCES = ("Flux2", "QwenImageEditPlus")

# Pipelines whose loop reads what their denoiser's layers left behind, of as many rows as it would have had without sharing.
UNSHARED = ("StableDiffusionSAG", "StableDiffusionAttendAndExcite", "LEdits")

# Arguments of a pipeline's call: how many pictures of each prompt, and what has a row per prompt when texts are not given.
IMAGES_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
CONDITIONS = ("prompt_embeds", "image_embeds")


def check_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """Merge a user's rules over `RULES`.

    Raises:
        ValueError: a rule is none of `HOW`. TypeError: no mapping.
    """
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a mapping of argument name → rule, got {type(rules).__name__}")
    for name, how in (rules or {}).items():
        if how not in HOW:
            raise ValueError(f"rules[{name!r}] must be one of {', '.join(map(repr, HOW))}, got {how!r}")
    return {**RULES, **(rules or {})}
