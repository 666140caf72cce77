"""A tiny step of any method, and what goes into its losses worked out by code of others.

Images are normalised by torchvision, encoded by timm's Vision Transformer with the cells that
lightly keeps of it; positions come from products of affine maps. Only the small networks on top,
the text encoder and the decoder are the model's own, plainly called.

Legend: B samples, I images in inputs, n cells an image shows, N cells of the grid, Q cells asked,
C width of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from lightly.models import utils as lightly_models
from lightly.models.modules import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.objective.heads import CaptionerConfig, DecoderConfig, ProjectorConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.export.timm import load_timm, to_timm
from m3i_fast.objectives.methods import METHODS, Method
from m3i_fast.objectives.mixing import Mix, draw_mix, draw_slice_key
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.pipelines.batch import Batch
from tests.shared.annotated import regions

SIZE, LOCAL_SIZE, PATCH, CLASSES, BATCH, CONTEXT = 32, 16, 8, 5, 8, 6
GRID = SIZE // PATCH
VISION = vit_demo(image_size=SIZE, patch_size=PATCH, dim=32, depth=2, num_heads=2)
TEXT = TextConfig(vocab_size=50, context_length=CONTEXT, dim=32, depth=1, num_heads=2, embed_dim=16)
TEACHER = replace(VISION, dim=24, depth=1)
NUM_STEPS = 2


def build_teacher() -> VisionTransformer:
    """timm's own network, whose weights the frozen encoder gets."""
    torch.manual_seed(2)
    return VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=TEACHER.dim,
        depth=TEACHER.depth,
        num_heads=TEACHER.num_heads,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()


def build_model(method: Method) -> MutualInformation:
    """The method's model; nothing in it, its averages and memories included, is zero or equal."""
    cfg = ObjectiveConfig(
        terms=method.terms,
        mixing=method.mixing,
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
        captioner=CaptionerConfig(
            dim=24, depth=2, num_heads=2, parallel=method.parallel_captions, coordinate_bins=30
        ),
        projector=ProjectorConfig(hidden_dim=20, output_dim=12, predictor_hidden_dim=16),
        head_hidden_dim=24,
        num_prototypes=10,
        queue_length=4 * BATCH,
    )
    teacher = load_timm(build_teacher(), TEACHER)
    torch.manual_seed(0)
    model = MutualInformation(
        cfg,
        vision=VISION,
        text=TEXT,
        num_classes=CLASSES,
        columns=(ColumnConfig(name="regions", kind="regions"),),
        teachers={"frozen": teacher.eval()},
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("loss.centre"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model.train()


def draw_batch(seed: int, *, with_local: bool) -> Batch:
    """Views of noise; every picture has a label, a caption and a group of its own."""
    rng = torch.Generator().manual_seed(seed)

    def views(size: int) -> Tensor:
        shape = BATCH, 3, size, size
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)

    num_views = 2 + with_local
    corner = torch.rand(BATCH, num_views, 2, generator=rng) * 10
    side = 20 + torch.rand(BATCH, num_views, 2, generator=rng) * 10
    flip = torch.randint(0, 2, (BATCH, num_views, 1), generator=rng).float()
    num_tokens = torch.randint(3, CONTEXT + 1, (BATCH,), generator=rng)
    ids = torch.randint(1, 50, (BATCH, CONTEXT), generator=rng, dtype=torch.int32)
    sample_id = torch.randperm(BATCH, generator=rng)
    return Batch(
        global_views=(views(SIZE), views(SIZE)),
        local_views=(views(LOCAL_SIZE),) if with_local else (),
        boxes=torch.cat([corner, side, flip], -1),
        image_size=torch.full((BATCH, 2), 40.0),
        token_ids=ids.masked_fill(torch.arange(CONTEXT) >= num_tokens[:, None], 0),
        num_tokens=num_tokens,
        label=torch.randint(0, CLASSES, (BATCH,), generator=rng),
        sample_id=sample_id,
        group_id=sample_id,
        position=torch.arange(BATCH),
        columns={"regions": regions(BATCH, views=num_views)},
    )


def draw(model: MutualInformation, step: int, *, in_order: bool = False) -> Mix:
    """The step's mix; inputs of one image are in another order than the samples, unless asked."""
    mix = draw_mix(
        model.cfg.mixing,
        position=torch.arange(step * BATCH, (step + 1) * BATCH),
        first_position=step * BATCH,
        grid=GRID,
        context_length=CONTEXT,
        seed=1,
        step=step,
        num_steps=NUM_STEPS,
    )
    if model.cfg.uses(regulariser="sigreg"):
        mix = replace(mix, slice_key=draw_slice_key(step * BATCH, seed=1))
    if in_order or mix.members.shape[1] > 1:
        return mix
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(step))
    return replace(mix, members=order[:, None], sample=order)


@dataclass(frozen=True)
class Step:
    """What an oracle is given: a batch, its mix and the encoder's tokens to differentiate by."""

    model: MutualInformation
    batch: Batch
    mix: Mix
    dtype: torch.dtype
    tokens: tuple[Tensor, ...] = ()  # [I, n, C] of each view the encoder saw, leaves
    local: tuple[Tensor, ...] = ()  # [B, m, C] of each local view, leaves

    # ---- Images and tokens, by torchvision, timm and lightly -------------------------------------

    def pictures(self, view: int) -> Tensor:  # [I, 3, S, S], normalised, in the order of images
        return self._normalised(self.batch.global_views[view][self.mix.sample])

    def local_pictures(self, number: int) -> Tensor:  # [B, 3, s, s], in the order of samples
        return self._normalised(self.batch.local_views[number])

    def _normalised(self, views: Tensor) -> Tensor:
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        return transforms.normalize(views.to(self.dtype) / 255, mean, std)

    @torch.no_grad()
    def encode(
        self, images: Tensor, shown: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:  # -> [I, n, C]
        """The encoder's tokens of the cells shown, [I, n], or of all; hidden: of mask tokens."""
        vit = MaskedVisionTransformerTIMM(
            to_timm(self.model.encoder),
            mask_token=self.model.mask_token,
            weight_initialization="skip",
            pos_embed_initialization="skip",
        )
        return vit.encode(images, idx_keep=shown, idx_mask=hidden)

    def inputs(self, view: int, mode: str) -> Tensor:  # [I, n, C]
        """The encoder's tokens of the cells that images show: each image by itself, or where they
        are encoded together cut out of the picture that shows all of them."""
        if self.model.cfg.mixing.hidden == "mask_token":
            return self.encode(self.pictures(view), hidden=self.hidden)
        if mode != "joint":
            return self.encode(self.pictures(view), self.shown)
        together = torch.zeros_like(self.pictures(view))[: self.mix.num_inputs]
        for image, picture in enumerate(self.pictures(view)):
            canvas = together[image % self.mix.num_inputs]
            for cell in self.shown[image].tolist():
                top, left = PATCH * (cell // GRID), PATCH * (cell % GRID)
                rows, columns = slice(top, top + PATCH), slice(left, left + PATCH)
                canvas[:, rows, columns] = picture[:, rows, columns]
        tokens = self.encode(together).repeat(self.mix.members.shape[1], 1, 1)
        return lightly_models.get_at_index(tokens, self.shown)

    @torch.no_grad()
    def momentum(self, view: int) -> Tensor:  # [I, N, C]
        """The averaged encoder's tokens of a whole view."""
        vit = to_timm(self.model.target_encoder.encoder)
        return vit.forward_features(self.pictures(view))

    @torch.no_grad()
    def snapshot(self, view: int) -> Tensor:  # [I, N, C]
        """The tokens of a whole view by an earlier state of the averaged encoder."""
        return to_timm(self.model.snapshot.encoder).forward_features(self.pictures(view))

    @cached_property
    def teacher(self) -> VisionTransformer:
        return build_teacher().to(self.dtype)

    @torch.no_grad()
    def frozen(self, view: int) -> Tensor:  # [I, N, C]
        """The frozen encoder's tokens of a whole view."""
        return self.teacher.forward_features(self.pictures(view))

    # ---- Cells and where they are ----------------------------------------------------------------

    @property
    def shown(self) -> Tensor:  # [I, n]
        return self.mix.token_index

    @cached_property
    def hidden(self) -> Tensor:  # [I, N - n]
        every = set(range(GRID * GRID))
        return torch.tensor([sorted(every - set(row)) for row in self.shown.tolist()])

    @property
    def every(self) -> Tensor:  # [I, N]
        return torch.arange(GRID * GRID).expand(BATCH, -1)

    def decode(
        self, name: str, images: slice, cells: Tensor, *, target: int, local: int | None = None
    ) -> Tensor:  # [A, Q, E]
        """What a term's decoder says of cells of a target view, from the first or a local view."""
        sample = self.mix.sample[images]
        tokens, index, view, side = self.tokens[0][images], self.shown[images], 0, GRID
        if local is not None:
            side, view = LOCAL_SIZE // PATCH, 2 + local
            tokens = self.local[local][sample]
            line = torch.arange(side)
            index = (GRID * line[:, None] + line).flatten().expand(len(sample), -1)
        boxes = self.batch.boxes[sample].double()
        position = relative_position(boxes[:, view], boxes[:, target], cells[images], side=side)
        decoder = self.model.decoders[self.model.terms[name].decoder_key]
        return decoder(tokens, index, position)


def relative_position(
    input_box: Tensor,  # [A, 5]
    target_box: Tensor,  # [A, 5]
    cells: Tensor,  # [A, Q]
    *,
    side: int,
) -> Tensor:  # [A, Q, 4] fp32
    """Centre and log size of target cells in cells of the input view: products of affine maps."""
    to_input = torch.linalg.solve(_affine(input_box, side), _affine(target_box, GRID))  # [A, 3, 3]
    centre = torch.stack([cells // GRID + 0.5, cells % GRID + 0.5, torch.ones(cells.shape)], -1)
    place = (centre.double() @ to_input.mT)[..., :2] - 0.5
    size = to_input.diagonal(dim1=1, dim2=2)[:, None, :2].abs().log()
    return torch.cat([place, size.expand_as(place)], -1).float()


def _affine(box: Tensor, side: int) -> Tensor:  # [A, 5] -> [A, 3, 3]
    """From (row, column, 1) in cells of a view to pixels of the upright image."""
    top, left, height, width, flip = box.unbind(-1)
    zero, one = torch.zeros_like(top), torch.ones_like(top)
    region = [height, zero, top, zero, width, left, zero, zero, one]
    mirror = [one, zero, zero, zero, 1 - 2 * flip, flip, zero, zero, one]
    shrink = torch.diag(torch.tensor([1 / side, 1 / side, 1.0], dtype=box.dtype))
    return _matrix(region) @ _matrix(mirror) @ shrink


def _matrix(entries: list[Tensor]) -> Tensor:
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def runs_in_fp64(name: str) -> bool:
    """Whether a method's terms compute in fp64: pixels come in fp32, as do positions to a
    decoder."""
    terms = METHODS[name].terms
    return all(t.target != "pixels" and t.predictor != "decoder" for t in terms)
