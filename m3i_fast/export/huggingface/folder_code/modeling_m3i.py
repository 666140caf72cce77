# SPDX-License-Identifier: Apache-2.0
"""The model of an export of m3i-fast, in torch and transformers alone.

An image encoder, a Vision Transformer or an InternImage, and where the weights have them a text
encoder and the head that projects pictures into its space, or a classifier. Load it with
trust_remote_code=True, a classifier by AutoModelForImageClassification:

    model = transformers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)

Legend: B pictures or texts, K classes or labels, S pixels of a side, R tokens before the patches
(class token and registers), N patches, C width of a token, P that of a summary of a picture, T
token ids of a text, E width of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput

from .internimage import InternImage
from .vision_transformer import Block, VisionTransformer, parameter


class M3IConfig(PretrainedConfig):
    """Describe an image encoder and, where there is one, a text encoder.

    vision: the arguments of `VisionTransformer` or, with "type": "internimage", of `InternImage`.
    text: those of `TextTransformer`; None without captions. head_dim: width of the hidden layer of
    the pictures' head, 0 for none. embed_dim: E. logit_bias: whether a number is added to the
    scaled cosines. classifier: arguments of `Classifier` beside the width of what it reads; None
    without one. Its classes are `id2label`, and problem_type says whether they exclude each other.
    """

    model_type = "m3i"

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        head_dim: int | None = None,
        embed_dim: int | None = None,
        logit_bias: bool = False,
        classifier: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vision, self.text = vision or {}, text
        self.head_dim, self.embed_dim, self.logit_bias = head_dim, embed_dim, logit_bias
        self.classifier = classifier
        self.hidden_size: int = self.vision.get("dim", 0)
        self.summary_dim: int = self.vision.get("pooled_dim", self.hidden_size)


class TextTransformer(nn.Module):
    """Embed texts: [B, T] ids, [B] counts -> [B, E]; what follows the counted has no effect.

    sizes: vocab_size, context_length, dim, depth, num_heads, mlp_dim, mlp, norm_eps and attention.
    bidirectional: every token attends to all others, and their mean is projected; causal: to itself
    and those before it, and the last one is projected.
    """

    def __init__(self, sizes: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        dim, self.is_causal = sizes["dim"], sizes["attention"] == "causal"
        self.context_length, self.end = sizes["context_length"], sizes["vocab_size"] - 1
        self.token_embedding = nn.Embedding(sizes["vocab_size"], dim)
        self.pos_embed = parameter(1, self.context_length, dim)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes["depth"]))
        self.norm = nn.LayerNorm(dim, sizes["norm_eps"])
        self.projection = nn.Linear(dim, embed_dim, bias=False)

    def forward(
        self, input_ids: Tensor, num_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:  # -> [B, T, C], [B, E]
        length = input_ids.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"input_ids: expected at most {self.context_length} tokens, got {length}: pass "
                "truncation=True to the tokenizer"
            )
        place = torch.arange(length, device=input_ids.device)
        real = place < num_tokens[:, None]
        mask = place <= place[:, None] if self.is_causal else real[:, None, None]
        x = self.token_embedding(input_ids) + self.pos_embed[:, :length]
        for block in self.blocks:
            x = block(x, mask=mask)
        x = self.norm(x)
        if self.is_causal:
            last = x[torch.arange(len(x), device=x.device), num_tokens - 1]
            return x, self.projection(last)
        mean = (x * real[..., None].to(x.dtype)).sum(1) / num_tokens[:, None]
        return x, self.projection(mean)


class ImageHead(nn.Module):
    """Project the summary of a picture into the space of texts: [B, P] -> [B, E].

    Two layers with a GELU between them, or one without bias where head_dim is 0.
    """

    def __init__(self, dim: int, head_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, head_dim) if head_dim else None
        self.output = nn.Linear(head_dim or dim, embed_dim, bias=head_dim > 0)

    def forward(self, summary: Tensor) -> Tensor:
        hidden = summary if self.hidden is None else F.gelu(self.hidden(summary))
        return self.output(hidden)


class M3IModel(PreTrainedModel):
    """An image encoder, with a text encoder in the same space where the config has one."""

    config_class = M3IConfig
    base_model_prefix = "m3i"
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: M3IConfig) -> None:
        super().__init__(config)
        is_internimage = config.vision.get("type") == "internimage"
        encoder = InternImage if is_internimage else VisionTransformer
        self.encoder = encoder(config.vision)
        self.text_encoder: TextTransformer | None = None
        if config.text is not None:
            assert config.head_dim is not None and config.embed_dim is not None
            self.text_encoder = TextTransformer(config.text, config.embed_dim)
            self.image_head = ImageHead(config.summary_dim, config.head_dim, config.embed_dim)
            self.logit_scale = parameter()
            self.logit_bias = parameter() if config.logit_bias else None
        self.post_init()

    def encode(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Encode pictures: all tokens [B, R + N, C], and the mean over the patches [B, C]."""
        tokens = self.encoder(pixel_values.to(self.dtype))
        mean = tokens[:, self.encoder.num_prefix :].mean(1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=mean)

    def get_image_features(
        self, pixel_values: Tensor, **_: Any
    ) -> BaseModelOutputWithPooling:  # pooler_output [B, E]
        """Embed pictures in the space of texts, of any length, as pooler_output."""
        self._expect_text()
        tokens = self.encoder(pixel_values.to(self.dtype))
        embedded = self.image_head(self.encoder.summarise(tokens))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=embedded)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:  # pooler_output [B, E]
        """Embed texts in the space of pictures, of any length, as pooler_output.

        attention_mask: [B, T], 1 where a token counts, padding on the right; None: all up to the
        first end token count.
        """
        text_encoder = self._expect_text()
        if attention_mask is None:
            num_tokens = (input_ids == text_encoder.end).int().argmax(1) + 1
        else:
            num_tokens = attention_mask.sum(1)
        states, embedded = text_encoder(input_ids, num_tokens)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=embedded)

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, S, S]
        input_ids: Tensor | None = None,  # [B', T] int64
        attention_mask: Tensor | None = None,  # [B', T]
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | CLIPOutput | tuple[Any, ...]:
        """Encode pictures alone, or compare them with texts: logits_per_image [B, B'].

        Texts alone go into `get_text_features`.
        """
        if input_ids is None:
            encoded = self.encode(pixel_values)
            return encoded if return_dict is not False else encoded.to_tuple()
        image = self.get_image_features(pixel_values)
        text = self.get_text_features(input_ids, attention_mask)
        image_embeds = F.normalize(image.pooler_output, dim=-1)
        text_embeds = F.normalize(text.pooler_output, dim=-1)
        logits = self.logit_scale.exp() * image_embeds @ text_embeds.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        output = CLIPOutput(
            logits_per_image=logits,
            logits_per_text=logits.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=image,
            text_model_output=text,
        )
        return output if return_dict is not False else output.to_tuple()

    def _expect_text(self) -> TextTransformer:
        if self.text_encoder is None:
            raise ValueError("expected a model with a text encoder, got an image encoder alone")
        return self.text_encoder


class Classifier(nn.Module):
    """Return the logits of classes or labels by the summary of a picture: [B, P] -> [B, K].

    embed_dim: of scaled cosines with the embeddings of K classes, which have unit length; None: the
    head's outputs are the logits themselves.
    """

    def __init__(
        self, summary_dim: int, head_dim: int, num_labels: int, embed_dim: int | None
    ) -> None:
        super().__init__()
        self.head = ImageHead(summary_dim, head_dim, embed_dim or num_labels)
        self.class_embeddings = parameter(num_labels, embed_dim) if embed_dim else None
        self.logit_scale = parameter() if embed_dim else None

    def forward(self, summary: Tensor) -> Tensor:
        found = self.head(summary)
        if self.class_embeddings is None or self.logit_scale is None:
            return found
        cosines = F.normalize(found, dim=-1) @ self.class_embeddings.T
        return self.logit_scale.exp() * cosines


class M3IForImageClassification(PreTrainedModel):
    """An image encoder with the head that a run trained on classes or labels."""

    config_class = M3IConfig
    base_model_prefix = "m3i"
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: M3IConfig) -> None:
        super().__init__(config)
        assert config.classifier is not None
        self.m3i = M3IModel(config)
        self.classifier = Classifier(
            config.summary_dim, num_labels=config.num_labels, **config.classifier
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, S, S]
        labels: Tensor | None = None,  # [B] int64, or [B, K] of 0 and 1 where labels do not exclude
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Return logits [B, K] of `config.id2label`, and the loss where labels are given."""
        tokens = self.m3i.encoder(pixel_values.to(self.dtype))
        logits = self.classifier(self.m3i.encoder.summarise(tokens))
        loss = None
        if labels is not None:
            several = self.config.problem_type == "multi_label_classification"
            loss = (
                F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
                if several
                else F.cross_entropy(logits, labels)
            )
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()
