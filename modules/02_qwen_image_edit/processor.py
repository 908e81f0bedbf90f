"""The pipeline's processor without torchvision, which transformers' own one wants."""

import re
from pathlib import Path

IMAGE_PAD = r"<\|image_pad\|>"


class PilProcessor:
    """Pictures to patches by PIL, and one <|image_pad|> token for each merged patch."""

    def __init__(self, folder: Path, tokenizer):
        from transformers import Qwen2VLImageProcessorPil

        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images, padding=True, return_tensors="pt"):
        from transformers.feature_extraction_utils import BatchFeature

        pixels = self.image_processor(images=images, return_tensors=return_tensors)
        patches = pixels["image_grid_thw"].prod(-1)  # [pictures]: time x height x width
        counts = iter((patches // self.image_processor.merge_size**2).tolist())
        padded = [re.sub(IMAGE_PAD, lambda pad: pad[0] * next(counts), line) for line in text]
        tokens = self.tokenizer(padded, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **pixels})
