"""What is exported of a model: pictures and texts in, tokens and embeddings out, by name.

Legend: B pictures or texts, S the encoder's side in pixels, R prefix tokens, N cells of the grid, C
width of a token, E width of an embedding, K classes, T tokens of a text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from m3i_fast.inference.model import ColumnHead, Model
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.terms import Caption, Category, Labels, Numbers


class ImageGraph(nn.Module):
    """The image side of a model, with the normalisation of its pixels.

    input_names, output_names: as the exported graph has them. image_embedding and logits are there
    where the model has a head of captions, and of categories; logits_COLUMN or numbers_COLUMN for
    each named column that has one.
    """

    input_names = ("pixels",)
    scale: Tensor  # [3, 1, 1] fp32
    shift: Tensor  # [3, 1, 1] fp32

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.caption_head = None if model.caption is None else model.caption.head
        heads: dict[str, ColumnHead] = {} if model.category is None else {"logits": model.category}
        heads |= {output_name(head): head for head in model.column_heads.values()}
        self.heads = nn.ModuleDict(heads)
        self.num_prefix = model.num_prefix_tokens
        made = model.transform.preprocessing
        self.size = made.size
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (made.mean, made.std))
        # as ops.mask_mix has it: one factor and one summand a channel, rounded once
        for name, value in (("scale", 1 / (255 * std)), ("shift", -mean / std)):
            self.register_buffer(name, value.float().view(3, 1, 1).to(model.device))

    @property
    def output_names(self) -> tuple[str, ...]:
        embedding = () if self.caption_head is None else ("image_embedding",)
        return ("tokens", "pooled", *embedding, *self.heads)

    def example(self) -> Tensor:
        """Return an input: [2, 3, S, S] uint8."""
        return self.scale.new_zeros((2, 3, self.size, self.size), dtype=torch.uint8)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Encode RGB pictures [B, 3, S, S] uint8, of any values 0..255.

        Returns tokens [B, R + N, C], pooled [B, C], the mean of the N cells, image_embedding [B, E]
        of any length, logits [B, K], and of a named column its logits, or its numbers in the units
        of the data, [B, K]; all fp32.
        """
        images = pixels.float() * self.scale + self.shift
        encoder = self.encoder
        tokens = encoder(images) if isinstance(encoder, ViT) else encoder.encode_cells(images)
        cells = tokens[:, self.num_prefix :]
        outputs = {"tokens": tokens, "pooled": cells.mean(1)}
        if self.caption_head is not None or self.heads:
            summary = encoder.summarise(cells)
            if self.caption_head is not None:
                outputs["image_embedding"] = self.caption_head(summary)
            for name, head in self.heads.items():
                assert isinstance(head, Category | Labels | Numbers)
                answer = head.predict if isinstance(head, Numbers) else head.logits
                outputs[name] = answer(summary)
        return outputs


def output_name(head: ColumnHead) -> str:
    """Return what the graph calls the answer of a named column's head."""
    kind = "numbers" if isinstance(head, Numbers) else "logits"
    return f"{kind}_{head.term.column}"


class TextGraph(nn.Module):
    """The text side of a model with a head of captions."""

    input_names = ("token_ids",)
    output_names = ("text_embedding",)

    def __init__(self, caption: Caption) -> None:
        super().__init__()
        self.text_encoder = caption.text_encoder
        self.end = self.text_encoder.cfg.vocab_size - 1

    def example(self) -> Tensor:
        """Return an input: [2, T] int64, ends only."""
        cfg, device = self.text_encoder.cfg, self.text_encoder.pos_embed.device
        return torch.full((2, cfg.context_length), self.end, device=device)

    def forward(self, token_ids: Tensor) -> dict[str, Tensor]:
        """Embed texts, [B, T] int64 ids as the run's tokenizer returns them.

        Each row has an end, and what follows it has no effect. Returns text_embedding [B, E] fp32,
        of any length.
        """
        num_tokens = (token_ids == self.end).int().argmax(1) + 1
        return {"text_embedding": self.text_encoder(token_ids, num_tokens)}


Graph = ImageGraph | TextGraph


@torch.no_grad()
def capture(graph: Graph) -> ExportedProgram:
    """Trace a graph for any number of rows, with our operators where it has some."""
    batch = Dim("batch", min=1)
    return torch.export.export(graph, (graph.example(),), dynamic_shapes=({0: batch},))
