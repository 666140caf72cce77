"""A trained model as others call theirs: open_clip's names for embeddings, timm's for features.

Legend: B pictures or texts, S the encoder's side in pixels, R prefix tokens (class and registers),
N cells of the grid, C width of a token, E width of an embedding, K classes, T token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.engine.run.data_record import DataRecord
from m3i_fast.inference.transform import Transform, normalise
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.terms import Caption, Category, Labels, Numbers
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    Pictures = Image | Tensor | Sequence[Image | Tensor]

ColumnHead: TypeAlias = Category | Labels | Numbers


class Model(nn.Module):
    """The encoder of a run with its heads, in evaluation mode and frozen.

    Pictures are a PIL image or several (any mode, upright as their EXIF says), a tensor
    [B, 3, H, W] or [3, H, W] uint8, or what `transform` returns: [3, S, S] floats, or a batch of
    them, [B, 3, H, W]. All but floats go through `transform`; floats are taken as normalised
    already, and sides other than S interpolate the positions.

    Call `requires_grad_()` to train it further. Methods raise ValueError for tensors of another
    shape or dtype, and TypeError for what is neither a picture nor a tensor.
    """

    def __init__(
        self,
        *,
        encoder: ViT | InternImage,
        caption: Caption | None,
        category: Category | None,
        columns: Sequence[ColumnHead],
        transform: Transform,
        compute_dtype: torch.dtype,
        without_heads: str,
        read_record: Callable[[], DataRecord],
    ) -> None:
        """columns: the heads of named columns, each of which gives its name as `term.column`.

        without_heads: why a head is missing, for errors.

        read_record: returns the run's record of its data, when it is first asked for.
        """
        super().__init__()
        self.encoder, self.caption, self.category = encoder, caption, category
        self.columns = nn.ModuleList(columns)
        self.transform, self.compute_dtype = transform, compute_dtype
        self._without_heads, self._read_record = without_heads, read_record

    # ---- Facts -----------------------------------------------------------------------------------

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the categories in the order of `classify`'s logits."""
        return self._record.class_names

    @property
    def column_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the outputs of each named column that has a head, by its own name.

        Those of a class or of labels are of `classify`'s logits, those of numbers of
        `predict_numbers`. Raises ValueError where the run has no record of them.
        """
        names = {column.name: column.names for column in self._record.columns}
        heads = self.column_heads
        if missing := sorted(heads.keys() - names.keys()):
            raise ValueError(
                f"data.json: expected the names of the columns {', '.join(missing)}, got those of "
                f"{', '.join(names) or 'none'}"
            )
        return {name: names[name] for name in heads}

    @property
    def column_heads(self) -> dict[str, ColumnHead]:
        """Return the head of each named column that has one."""
        return {head.term.column: head for head in cast("list[ColumnHead]", self.columns)}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Return the run's tokenizer, which needs open_clip: texts -> [B, T] int64 token ids."""
        return Tokenizer.from_info(self._record.tokenizer)

    @cached_property
    def _record(self) -> DataRecord:
        return self._read_record()

    @property
    def num_features(self) -> int:
        """Return C, the width of a token."""
        return self.encoder.dim

    @property
    def num_prefix_tokens(self) -> int:
        """Return R, the tokens before those of the grid in `forward_features`."""
        return self.encoder.num_prefix if isinstance(self.encoder, ViT) else 0

    @property
    def logit_scale(self) -> Tensor:
        """Return the logarithm of the scale of a picture's cosines with captions, []."""
        return self._caption.log_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """Return what a sigmoid likelihood adds to the scaled cosines, []; None under softmax."""
        return self._caption.bias

    @property
    def device(self) -> torch.device:
        """Return the device of the weights, to which inputs are copied."""
        return next(self.parameters()).device

    # ---- Embeddings, as open_clip ----------------------------------------------------------------

    def encode_image(self, image: Pictures, normalize: bool = False) -> Tensor:  # -> [B, E] fp32
        """Embed pictures in the space of `encode_text`; normalize: to unit length.

        Raises ValueError where the model has no caption head.
        """
        head = self._caption
        with self._arithmetic():
            cells = self.encoder.encode_cells(self._images(image))
            embedded = head.project(self.encoder.summarise(cells))
        return F.normalize(embedded, dim=-1) if normalize else embedded

    def encode_text(
        self, text: str | Sequence[str] | Tensor, normalize: bool = False
    ) -> Tensor:  # -> [B, E] fp32
        """Embed texts in the space of `encode_image`; normalize: to unit length.

        text: one or several, or what `tokenizer` returns, [B, T] int; a longer text is cut at the
        run's context length. Raises ValueError where the model has no caption head, and for a row
        of ids that has no end.
        """
        head = self._caption
        token_ids = text if isinstance(text, Tensor) else self.tokenizer(text)
        token_ids = token_ids.to(self.device)
        with self._arithmetic():
            embedded = head.project_captions(token_ids, self._num_tokens(token_ids))
        return F.normalize(embedded, dim=-1) if normalize else embedded

    def classify(self, pictures: Pictures, column: str = "") -> Tensor:  # -> [B, K] fp32
        """Return the logits of a picture's classes or labels.

        column: a named column of the data, of a class or of labels, which `column_names` names the
            outputs of; empty: the class, whose names are `class_names`.

        A softmax over classes was trained, and a sigmoid of each label by itself. Raises ValueError
        where the model has no such head.
        """
        return self._answer(pictures, self.class_head(column).logits)

    def predict_numbers(self, pictures: Pictures, column: str) -> Tensor:  # -> [B, K] fp32
        """Predict the numbers of a column for each picture, in the units that the data have.

        column: a named column of numbers, which `column_names` names the outputs of. Raises
        ValueError where the model has no such head.
        """
        head = self._column(column)
        if not isinstance(head, Numbers):
            raise ValueError(
                f"predict_numbers: column: expected one of numbers, got {column!r}, whose logits "
                "classify(pictures, column) gives"
            )
        return self._answer(pictures, head.predict)

    # ---- Features, as timm -----------------------------------------------------------------------

    def forward_features(self, x: Pictures) -> Tensor:  # -> [B, R + N, C]
        """Encode pictures as tokens, the prefix first, the grid row by row."""
        with self._arithmetic():
            images = self._images(x)
            if isinstance(self.encoder, ViT):
                tokens: Tensor = self.encoder(images)
                return tokens
            return self.encoder.encode_cells(images)

    def forward_head(
        self, x: Tensor, pre_logits: bool = False
    ) -> Tensor:  # [B, R + N, C] -> [B, C] fp32
        """Average the tokens of the grid: the features of evaluation's kNN and linear probe.

        pre_logits: as timm's calls have it; either gives the average, since no classifier follows.
        """
        return x[:, self.num_prefix_tokens :].float().mean(1)

    def forward(self, x: Pictures) -> Tensor:  # -> [B, C] fp32
        """Encode pictures as one vector each: `forward_head(forward_features(x))`."""
        return self.forward_head(self.forward_features(x))

    # ---- Inputs ----------------------------------------------------------------------------------

    @property
    def _caption(self) -> Caption:
        if self.caption is None:
            raise ValueError(
                f"{self._no_head('a caption head')}; the model itself, called on pictures, returns "
                "a vector of features each"
            )
        return self.caption

    def class_head(self, column: str) -> Category | Labels:
        """Return the head of a class or of labels, as `classify` takes them."""
        if not column:
            if self.category is None:
                raise ValueError(self._no_head("a category head"))
            return self.category
        head = self._column(column)
        if isinstance(head, Numbers):
            raise ValueError(
                f"column: expected a class or labels, got {column!r}, whose numbers "
                "predict_numbers(pictures, column) gives"
            )
        return head

    def _column(self, name: str) -> ColumnHead:
        if name not in self.column_heads:
            raise ValueError(f"column: {self._no_head(f'a head of {name!r}')}")
        return self.column_heads[name]

    def _no_head(self, wanted: str) -> str:
        """Say which head is missing, and which columns have one."""
        there = f"heads of the columns {', '.join(self.column_heads)} alone"
        got = there if self.columns else f"none: {self._without_heads}"
        return f"expected {wanted}, got {got}"

    def _answer(self, pictures: Pictures, head: Callable[[Tensor], Tensor]) -> Tensor:
        with self._arithmetic():
            cells = self.encoder.encode_cells(self._images(pictures))
            return head(self.encoder.summarise(cells))

    def _images(self, pictures: Pictures) -> Tensor:  # -> [B, 3, H, W] normalised
        if not isinstance(pictures, Tensor | Sequence):
            pictures = [pictures]
        if isinstance(pictures, Sequence) and any(map(_is_normalised, pictures)):
            pictures = _stacked(pictures)
        if isinstance(pictures, Tensor) and pictures.ndim == 3:
            pictures = pictures[None]
        if not _is_normalised(pictures):
            views = self.transform.views(pictures).to(self.device)
            return normalise(views, self.compute_dtype).to(self._input_dtype)
        assert isinstance(pictures, Tensor)
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(
                f"pictures: expected [B, 3, H, W] floats, got {list(pictures.shape)} "
                f"{pictures.dtype}"
            )
        return pictures.to(self.device, self._input_dtype)

    @property
    def _input_dtype(self) -> torch.dtype:
        """Return autocast's, or that of the weights, which `half()` and `to(dtype)` change."""
        weights = next(self.encoder.parameters()).dtype
        return weights if self.compute_dtype == torch.float32 else self.compute_dtype

    def _num_tokens(self, token_ids: Tensor) -> Tensor:  # [B, T] -> [B] int64
        head = self._caption.text_encoder.cfg
        end = token_ids == head.vocab_size - 1
        if token_ids.is_floating_point() or token_ids.ndim != 2 or not end.any(1).all():
            raise ValueError(
                f"text: expected [B, T] token ids with an end in each row, {head.vocab_size - 1}, "
                f"as this model's tokenizer returns them, got {list(token_ids.shape)} "
                f"{token_ids.dtype}"
            )
        return end.int().argmax(1) + 1

    def _arithmetic(self) -> AbstractContextManager[None]:
        dtype = self.compute_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


def _is_normalised(picture: object) -> bool:
    return isinstance(picture, Tensor) and picture.is_floating_point()


def _stacked(pictures: Sequence[Image | Tensor]) -> Tensor:  # B x [3, S, S] -> [B, 3, S, S]
    """Stack what `transform` returned; ValueError where other pictures stand between."""
    floats = [picture for picture in pictures if isinstance(picture, Tensor)]
    if len(floats) < len(pictures) or not all(map(_is_normalised, floats)):
        raise ValueError("pictures: expected all of them or none to be normalised floats, got both")
    return torch.stack(floats)
