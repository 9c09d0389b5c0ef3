"""CLIP's grey-level statistics, for the model's config and the processor alike; imports nothing."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Means of red, green and blue, of pixels from 0 to 1; as OpenAI's CLIP was trained."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviations that belong to CLIP_MEAN."""
