"""The losses of known methods as their papers have them, in code of others.

Each gives the parts of a step's loss by term, weighted as the paper's sum is. Networks say z_hat in
the dtype of the run; from there on it is fp64. Where no package has a loss it is written from the
paper's formula. What remembers something is started with the model and called step after step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lightly import loss as lightly
from lightly.loss import swav_loss
from lightly.loss.memory_bank import MemoryBankModule
from lightly.models import utils as lightly_models
from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from m3i_fast.objectives.losses.sigreg import draw_directions
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.phi_s import hadamard
from tests.objectives.methods.steps import BATCH, GRID, PATCH, TEXT, Step
from tests.shared.torch_decoder import hidden_of

Parts = dict[str, Tensor]
Run = Callable[[Step], Parts]
Start = Callable[[MutualInformation], Run]
FIRST, LAST, ALL = slice(0, BATCH // 2), slice(BATCH // 2, BATCH), slice(0, BATCH)


def each_step(run: Run) -> Start:
    """Of a loss that remembers nothing."""
    return lambda model: run


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1)


def _among_batch(z_hat: Tensor, z: Tensor, temperature: float) -> Tensor:
    """-log softmax of the own target among the batch's, by cosine."""
    return F.cross_entropy(_unit(z_hat) @ _unit(z).T / temperature, torch.arange(len(z)))


# ---- Categories and captions ---------------------------------------------------------------------


def _predicted(step: Step, name: str) -> Tensor:  # [I + L B, E]
    """The head's unit embeddings of images and of local views."""
    head = step.model.terms[name].head
    return _unit(torch.cat([head(tokens) for tokens in (step.tokens[0], *step.local)]))


def _of_rows(step: Step, values: Tensor) -> Tensor:  # [B] -> [I + L B]
    return torch.cat([values[step.mix.sample], *(values for _ in step.local)])


def category(step: Step) -> Parts:
    term = step.model.terms["category"]
    logits = term.log_scale.exp() * _predicted(step, "category") @ _unit(term.embedding).T
    return {"category": F.cross_entropy(logits, _of_rows(step, step.batch.label))}


def _captions(step: Step) -> Tensor:  # [B, E]
    text = step.model.terms["caption"].text_encoder
    return _unit(text(step.batch.token_ids, step.batch.num_tokens))


def clip(step: Step) -> Parts:
    scale = step.model.terms["caption"].log_scale.double().exp()
    captions = _captions(step)[step.mix.sample]
    return {"caption": ClipLoss()(_predicted(step, "caption"), captions, scale)}


def siglip(step: Step) -> Parts:
    term = step.model.terms["caption"]
    scale, bias = term.log_scale.double().exp(), term.bias.double()
    captions = _captions(step)[step.mix.sample]
    return {"caption": SigLipLoss()(_predicted(step, "caption"), captions, scale, bias)}


def _caption_tokens(step: Step) -> Tensor:
    """open_clip's loss of a caption's tokens but the first, which torch's decoder predicts."""
    term, sample = step.model.terms["caption_tokens"], step.mix.sample
    ids, share = step.batch.token_ids[sample], term.decoder.cfg.parallel
    parallel = step.mix.token_priority[sample, 0] < share if share else None
    hidden = hidden_of(term.decoder, step.tokens[0], ids, parallel).double()
    logits = hidden @ term.vocabulary.double().T
    place = torch.arange(1, ids.shape[1])
    padding = len(term.vocabulary)  # an id of its own: 0 is a word
    labels = ids[:, 1:].long().masked_fill(place >= step.batch.num_tokens[sample, None], padding)
    criterion = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0, pad_id=padding)
    one = torch.ones(2, 2).double()  # of its contrastive part, which is left out
    return criterion(one, one, logits, labels, torch.tensor(1.0).double())[1]


def cappa(step: Step) -> Parts:
    return {"caption_tokens": _caption_tokens(step)}


def _region_tokens(step: Step, name: str) -> Tensor:
    """torch's cross entropy of a region's tokens but the first, by torch's decoder, one by one.

    Coordinates are spelled in whole parts of the view's side, after the words of the vocabulary. A
    batch's mean is less by the share of pictures that have none.
    """
    term, sample = step.model.terms[name], step.mix.sample
    bins, words = step.model.cfg.captioner.coordinate_bins, TEXT.vocab_size
    logits, targets, members = [], [], 0
    for image, regions in enumerate(step.batch.columns["regions"][sample, 0].tolist()):
        there = [region for region in regions if region[4] >= 0]
        members += bool(there)
        for region in there:
            box = [words + bins * side // 2**30 for side in region[:4]]
            first, *others = [i for i in region[4:] if i >= 0]
            rest = [*box, *others] if name == "grounded_caption" else [*others, *box]
            ids = torch.tensor([[first, *rest]])
            hidden = hidden_of(term.decoder, step.tokens[0][image, None], ids)[0].double()
            logits.append(hidden @ term.vocabulary.double().T)
            targets += rest
    mean = F.cross_entropy(torch.cat(logits), torch.tensor(targets))
    return mean * members / len(sample)


def locca(step: Step) -> Parts:
    names = ("grounded_caption", "referring_box")
    of_regions = {name: _region_tokens(step, name) for name in names}
    return {"caption_tokens": _caption_tokens(step), **of_regions}


def coca(step: Step) -> Parts:
    return {**clip(step), "caption_tokens": 2 * _caption_tokens(step)}


def _several_pictures_a_caption(step: Step) -> Tensor:
    """Mean of both directions of the softmax; of a caption with several pictures the mean too."""
    scale = step.model.terms["caption"].log_scale.double().exp()
    logits = scale * _predicted(step, "caption") @ _captions(step).T
    caption = _of_rows(step, torch.arange(BATCH))
    of_pictures = F.cross_entropy(logits, caption)
    found = F.one_hot(caption, BATCH).double()
    of_captions = -(found * logits.log_softmax(0)).sum() / len(caption)
    return (of_pictures + of_captions) / 2


# ---- Dense targets -------------------------------------------------------------------------------


def _pixels(step: Step, view: int, cells: Tensor) -> Tensor:
    patches = lightly_models.patchify(step.pictures(view).double(), PATCH)
    return lightly_models.get_at_index(lightly_models.normalize_mean_var(patches), cells)


def _features(tokens: Tensor, cells: Tensor) -> Tensor:
    chosen = lightly_models.get_at_index(tokens.double(), cells)
    return F.layer_norm(chosen, chosen.shape[-1:])


def _decorrelated(p: Tensor, t: Tensor) -> Tensor:
    """SiameseIM: (mean |p - t|^2 + 0.02 mean p^T C p) / D, with all products; C the covariance."""
    p, t = p.double().flatten(0, 1), t.flatten(0, 1)
    spread = (p @ torch.cov(t.T, correction=0) @ p.T).diagonal().mean()
    return ((p - t).square().sum(1).mean() + 0.02 * spread) / p.shape[1]


def autoencoder(step: Step) -> Parts:
    z_hat = step.model.terms["pixels"].predictor(step.tokens[0])
    return {"pixels": F.mse_loss(z_hat.double(), _pixels(step, 0, step.every))}


def distillation(step: Step) -> Parts:
    z_hat = step.model.terms["features"].predictor(step.tokens[0])
    target = _features(step.frozen(0), step.every)
    return {"features": F.mse_loss(z_hat.double(), target)}


def hidden_pixels(step: Step) -> Parts:
    z_hat = step.decode("pixels", ALL, step.hidden, target=0)
    return {"pixels": F.mse_loss(z_hat.double(), _pixels(step, 0, step.hidden))}


def other_pixels(step: Step) -> Parts:
    z_hat = step.decode("pixels", ALL, step.every, target=1)
    return {"pixels": F.mse_loss(z_hat.double(), _pixels(step, 1, step.every))}


def data2vec(step: Step) -> Parts:
    z_hat = step.decode("features", ALL, step.hidden, target=0)
    return {"features": F.mse_loss(z_hat.double(), _features(step.momentum(0), step.hidden))}


def milan(step: Step) -> Parts:
    z_hat = step.decode("features", ALL, step.hidden, target=0)
    target = _features(step.frozen(0), step.hidden)
    return {"features": F.mse_loss(z_hat.double(), target)}


def radio(model: MutualInformation) -> Run:
    """The cosine of the pooled teacher, and its cells rotated by scikit-learn and by Hadamard, as
    the steps before have them."""
    seen: list[Tensor] = []

    def run(step: Step) -> Parts:
        cells = step.frozen(0).double()
        z = cells
        if seen:
            rows = torch.cat(seen)
            found = PCA().fit(rows.numpy())
            components = torch.from_numpy(found.components_[::-1].copy())
            scale = (found.explained_variance_.mean() * (len(rows) - 1) / len(rows)) ** -0.5
            z = (
                scale
                * (cells - torch.from_numpy(found.mean_))
                @ components.T
                @ hadamard(cells.shape[-1]).T
            )
        seen.append(cells.flatten(0, 1))
        terms = step.model.terms
        picture = terms["picture"].projector(step.tokens[0].mean(1)).double()
        return {
            "picture": cosine(picture, cells.mean(1)),
            "cells": F.mse_loss(terms["cells"].predictor(step.tokens[0]).double(), z),
        }

    return run


class _Standardised:
    """Layer norm of cells whose channels are standardised by the step before's."""

    def __init__(self) -> None:
        self.by: StandardScaler | None = None

    def __call__(self, tokens: Tensor, cells: Tensor) -> Tensor:  # [A, N, C], [A, Q] -> [A, Q, C]
        chosen = lightly_models.get_at_index(tokens.double(), cells)
        rows = chosen.flatten(0, 1).numpy()
        before, self.by = self.by, StandardScaler().fit(rows)
        if before is not None:
            rows = (rows - before.mean_) / np.sqrt(before.var_ + 1e-5)
        return F.layer_norm(torch.from_numpy(rows).view_as(chosen), chosen.shape[-1:])


def siameseim(model: MutualInformation) -> Run:
    standardised = _Standardised()

    def run(step: Step) -> Parts:
        z_hat = step.decode("features", ALL, step.every, target=1)
        return {"features": _decorrelated(z_hat, standardised(step.momentum(1), step.every))}

    return run


def m3i(model: MutualInformation) -> Run:
    """The first image's hidden cells of its view; all cells of another view of the last one, from
    the input and from each local view; categories and captions from images and local views. The
    dense ones weigh three times as much."""
    same_view, other_view = _Standardised(), _Standardised()

    def run(step: Step) -> Parts:
        intra = step.decode("intra", FIRST, step.hidden, target=0)
        own = same_view(step.momentum(0)[FIRST], step.hidden[FIRST])
        other = other_view(step.momentum(1)[LAST], step.every[LAST])
        inputs = (None, *range(len(step.local)))
        inter = [step.decode("inter", LAST, step.every, target=1, local=local) for local in inputs]
        return {
            "intra": 3 * _decorrelated(intra, own),
            "inter": 3 * torch.stack([_decorrelated(z_hat, other) for z_hat in inter]).mean(),
            "caption": _several_pictures_a_caption(step),
            **category(step),
        }

    return run


# ---- One embedding a view ------------------------------------------------------------------------


def _projected(step: Step, view: int) -> Tensor:  # [I, E]
    (term,) = (t for name, t in step.model.terms.items() if name in ("embedding", "views"))
    return term.projector(step.tokens[view].mean(1))


def _predicted_from(step: Step, view: int) -> Tensor:  # [I, E]
    return step.model.terms["embedding"].predictor(_projected(step, view)).double()


@torch.no_grad()
def _averaged(step: Step, view: int) -> Tensor:  # [I, E]
    return step.model.terms["embedding"].momentum(step.momentum(view).mean(1)).double()


def _both(step: Step, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each view predicts the averaged networks' embedding of the other one: both losses' sum."""
    pairs = ((0, 1), (1, 0))
    return sum(loss(_predicted_from(step, a), _averaged(step, b)) for a, b in pairs)


def pair(name: str, loss: nn.Module) -> Start:
    """A loss of both views' projections, each of which learns."""
    return each_step(
        lambda step: {name: loss(_projected(step, 0).double(), _projected(step, 1).double())}
    )


cosine = lightly.NegativeCosineSimilarity()


def byol(step: Step) -> Parts:  # |u - v|^2 = 2 - 2 cos, less its constant
    return {"embedding": _both(step, lambda p, z: 2 * cosine(p, z))}


def moco_v3(step: Step) -> Parts:
    return {"embedding": _both(step, lambda q, k: 2 * 0.2 * _among_batch(q, k, 0.2))}


def simsiam(step: Step) -> Parts:
    z = [_projected(step, view).detach().double() for view in range(2)]
    p = [_predicted_from(step, view) for view in range(2)]
    return {"embedding": cosine(p[0], z[1]) / 2 + cosine(p[1], z[0]) / 2}


def masked_global(step: Step) -> Parts:
    return {"embedding": cosine(_predicted_from(step, 0), _averaged(step, 0))}


def global_distillation(step: Step) -> Parts:
    target = step.teacher(step.pictures(0)).detach()  # pooled by timm
    return {"embedding": _among_batch(_projected(step, 0), target, 0.1)}


def slip(step: Step) -> Parts:
    views = lightly.NTXentLoss(temperature=0.1)
    z = [_projected(step, view).double() for view in range(2)]
    return {**clip(step), "views": views(*z)}


def unigrad(model: MutualInformation) -> Run:
    """TiCo is 1 + UniGrad's loss, of a matrix given to it."""
    criterion = lightly.TiCoLoss(beta=1.0, rho=100 / 2)
    matrices: list[Tensor] = []

    def run(step: Step) -> Parts:
        z = [_unit(_averaged(step, view)) for view in range(2)]
        newest = (z[0].T @ z[0] + z[1].T @ z[1]) / (2 * BATCH)
        matrices.append(0.99 * matrices[-1] + 0.01 * newest if matrices else newest)
        criterion.C = matrices[-1]
        return {"embedding": _both(step, lambda a, b: criterion(a, b) - 1) / 2}

    return run


def _bank(queue: Tensor) -> MemoryBankModule:
    """lightly overwrites from its beginning what has been there longest: our last rows."""
    bank = MemoryBankModule(tuple(queue.shape))
    bank.bank = queue.double().unflatten(0, (-1, BATCH)).flip(0).flatten(0, 1)
    return bank


def densecl(model: MutualInformation) -> Run:
    image, cell = (lightly.NTXentLoss(0.2, memory_bank_size=(1, 1)) for _ in range(2))
    image.memory_bank = _bank(model.terms["embedding"].loss.queue)
    pooled = _bank(model.terms["cells"].loss.queue)

    def run(step: Step) -> Parts:
        term = step.model.terms["cells"]
        q, k_tokens = term.projector(step.tokens[0]).double(), step.momentum(1)
        k = term.momentum(k_tokens).double()
        matched = lightly_models.select_most_similar(_unit(step.tokens[0]), _unit(k_tokens), k)
        cell.memory_bank = MemoryBankModule(tuple(pooled.bank.shape))
        cell.memory_bank.bank = pooled.bank.clone()
        pooled(_unit(k.mean(1)), update=True)
        of_images = image(_projected(step, 0).double(), _averaged(step, 1))
        of_cells = cell(q.flatten(0, 1), matched.flatten(0, 1))
        return {"embedding": of_images / 2, "cells": of_cells / 2}

    return run


def lejepa(step: Step) -> Parts:
    """lightly's loss of both global views and the local ones, by the directions of the step."""
    term, local = step.model.terms["views"], [t[step.mix.sample] for t in step.local]
    means = [tokens.mean(1) for tokens in (*step.tokens, *local)]
    z = term.projector(torch.cat(means)).double().unflatten(0, (len(means), -1))
    criterion = lightly.LeJEPALoss()
    drawn = draw_directions(step.mix.slice_key, z.shape[-1], step.model.cfg.num_slices).double()
    criterion.sigreg._generate_unit_vectors = lambda *_, **__: drawn
    return {"views": criterion(global_proj=z[:2], local_proj=z[2:])}


# ---- Prototypes ----------------------------------------------------------------------------------


def _pooled(step: Step) -> list[Tensor]:  # [I, C] of the views seen, then of local ones
    local = [tokens[step.mix.sample] for tokens in step.local]
    return [tokens.mean(1) for tokens in (*step.tokens, *local)]


def _assign(head: nn.Module, pooled: Tensor) -> Tensor:  # [I, K], cosines
    return _unit(head.mlp(pooled)) @ _unit(head.prototypes).T


def dino(model: MutualInformation) -> Run:
    term = model.terms["prototypes"]
    criterion = lightly.DINOLoss(term.loss.centre.shape[0]).double()
    criterion.center = term.loss.centre.double().clone().expand(1, 1, -1)

    def run(step: Step) -> Parts:
        students = [_assign(term.head, pooled) for pooled in _pooled(step)]
        teachers = [_assign(term.momentum, step.momentum(view).mean(1)) for view in range(2)]
        return {"prototypes": criterion(teachers, students)}

    return run


def ibot(model: MutualInformation) -> Run:
    """DINO's loss, and that of both views' hidden cells."""
    of_views, term = dino(model), model.terms["cells"]
    criterion = lightly.IBOTPatchLoss(term.loss.centre.shape[0]).double()
    criterion.center.center = term.loss.centre.double().clone()[None]

    def run(step: Step) -> Parts:
        mask = torch.zeros(BATCH, GRID**2, dtype=torch.bool).scatter_(1, step.hidden, True)

        def of_hidden(head: nn.Module, views: Iterable[Tensor]) -> Tensor:  # [2 I Q, K]
            return torch.cat([_assign(head, tokens[mask]) for tokens in views])

        student = of_hidden(term.head, step.tokens)
        teacher = of_hidden(term.momentum, (step.momentum(view) for view in range(2)))
        masks = mask.view(BATCH, GRID, GRID).repeat(2, 1, 1)
        return {**of_views(step), "cells": criterion(teacher, student, masks)}

    return run


def dinov2(model: MutualInformation) -> Run:
    """iBOT's, and KoLeo of the student's views, each by itself, with its weight of 0.1."""
    with_cells, spread = ibot(model), dinov2_spread()
    return lambda step: {**with_cells(step), "spread": spread(step)}


def dinov2_spread() -> Callable[[Step], Tensor]:
    koleo = lightly.KoLeoLoss(eps=1e-12)  # added to distances, where ours bounds them
    return lambda step: 0.1 * sum(koleo(tokens.mean(1).double()) for tokens in step.tokens)


def _balanced(
    students: Sequence[Tensor], teachers: Sequence[Tensor], pairs: Iterable[tuple[int, int]]
) -> Tensor:
    """The mean cross-entropy of pairs, all teacher's views balanced together by lightly's SwAV."""
    balanced = swav_loss.sinkhorn(torch.cat(list(teachers)).double(), epsilon=0.04)
    targets = balanced.split([len(logits) for logits in teachers])
    values = [
        -(targets[of] * F.log_softmax(students[number].double() / 0.1, -1)).sum(-1).mean()
        for of, number in pairs
    ]
    return torch.stack(values).mean()


def dinov3(model: MutualInformation) -> Run:
    """Balanced assignments of views and of hidden cells, KoLeo as DINOv2's, and Gram anchoring."""
    spread = dinov2_spread()

    def run(step: Step) -> Parts:
        of_views, of_cells = step.model.terms["prototypes"], step.model.terms["cells"]
        pooled = [_assign(of_views.head, tokens) for tokens in _pooled(step)]
        teachers = [_assign(of_views.momentum, step.momentum(view).mean(1)) for view in range(2)]
        pairs = [(of, n) for of in range(2) for n in range(len(pooled)) if n != of]
        hidden = [lightly_models.get_at_index(t, step.hidden) for t in step.tokens]
        seen = [lightly_models.get_at_index(step.momentum(v), step.hidden) for v in range(2)]
        own, kept = (_unit(tokens) for tokens in (step.tokens[0], step.snapshot(0)))
        return {
            "prototypes": _balanced(pooled, teachers, pairs),
            "cells": _balanced(
                [_assign(of_cells.head, tokens.flatten(0, 1)) for tokens in hidden],
                [_assign(of_cells.momentum, tokens.flatten(0, 1)) for tokens in seen],
                [(0, 0), (1, 1)],
            ),
            "spread": spread(step),
            "gram": 2 * F.mse_loss(own @ own.mT, kept @ kept.mT),
        }

    return run


def tips(model: MutualInformation) -> Run:
    of_pictures = ibot(model)
    return lambda step: {**of_pictures(step), "caption": _several_pictures_a_caption(step)}


def siglip2(model: MutualInformation) -> Run:
    """iBOT's, the sigmoid of every picture or small view with every caption, and its tokens."""
    of_pictures = ibot(model)

    def run(step: Step) -> Parts:
        term = step.model.terms["caption"]
        logits = term.log_scale.double().exp() * _predicted(step, "caption") @ _captions(step).T
        is_its_own = F.one_hot(_of_rows(step, torch.arange(BATCH)), BATCH).double()
        every = F.binary_cross_entropy_with_logits(
            logits + term.bias.double(), is_its_own, reduction="sum"
        )
        return {
            **of_pictures(step),
            "caption": every / len(logits),
            "caption_tokens": _caption_tokens(step),
        }

    return run


def msn(step: Step) -> Parts:
    term = step.model.terms["prototypes"]
    anchors = torch.cat([term.head.mlp(pooled) for pooled in _pooled(step)]).double()
    positives = term.momentum.mlp(step.momentum(1).mean(1)).double()
    return {"prototypes": lightly.MSNLoss()(anchors, positives, term.head.prototypes.double())}
