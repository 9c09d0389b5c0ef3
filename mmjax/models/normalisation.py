"""Grey-level statistics of vision towers, for configs and processors alike; imports nothing."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Means of red, green and blue, of pixels from 0 to 1; as OpenAI's CLIP and EVA-CLIP saw them."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviations that belong to CLIP_MEAN."""

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
"""Both of SigLIP: pixels from -1 to 1."""
