"""How far every method of `METHODS` is from its paper's loss; the table that documents it.

python -m tests.objectives.methods.oracles > docs/measure/methods.md
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from torch import Tensor, nn

from m3i_fast.cli.methods import predicted, shown
from m3i_fast.config.objective.objective import Term
from m3i_fast.objectives.methods import METHODS, Method
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Encoded, Source, Targets
from tests.objectives.methods import losses
from tests.objectives.methods.steps import NUM_STEPS, Step, build_model, draw, draw_batch

FLOOR, MOST = 1e-7, 1e-5


@dataclass(frozen=True, slots=True)
class MethodOracle:
    source: str
    start: losses.Start


MSE, TIMM = "torch mse_loss", "timm VisionTransformer"
NORMALISED = f"{MSE} of lightly patchify, normalize_mean_var"
COSINE = "lightly NegativeCosineSimilarity"

ORACLES: dict[str, MethodOracle] = {
    "supervised": MethodOracle("torch cross_entropy", losses.each_step(losses.category)),
    "clip": MethodOracle("open_clip ClipLoss", losses.each_step(losses.clip)),
    "siglip": MethodOracle("open_clip SigLipLoss", losses.each_step(losses.siglip)),
    "cappa": MethodOracle(
        "open_clip CoCaLoss, torch TransformerDecoder", losses.each_step(losses.cappa)
    ),
    "coca": MethodOracle(
        "open_clip ClipLoss, CoCaLoss, torch TransformerDecoder", losses.each_step(losses.coca)
    ),
    "locca": MethodOracle(
        "open_clip CoCaLoss, torch TransformerDecoder, torch cross_entropy",
        losses.each_step(losses.locca),
    ),
    "autoencoder": MethodOracle(NORMALISED, losses.each_step(losses.autoencoder)),
    "dense_distillation": MethodOracle(
        f"{MSE} of layer_norm, {TIMM}", losses.each_step(losses.distillation)
    ),
    "global_distillation": MethodOracle(
        f"torch cross_entropy, {TIMM}", losses.each_step(losses.global_distillation)
    ),
    "mae": MethodOracle(NORMALISED, losses.each_step(losses.hidden_pixels)),
    "data2vec": MethodOracle(f"{MSE} of layer_norm, {TIMM}", losses.each_step(losses.data2vec)),
    "milan": MethodOracle(f"{MSE} of layer_norm, {TIMM}", losses.each_step(losses.milan)),
    "masked_global": MethodOracle(COSINE, losses.each_step(losses.masked_global)),
    "novel_view": MethodOracle(NORMALISED, losses.each_step(losses.other_pixels)),
    "densecl": MethodOracle("lightly NTXentLoss, memory bank, select_most_similar", losses.densecl),
    "moco_v3": MethodOracle("torch cross_entropy", losses.each_step(losses.moco_v3)),
    "simclr": MethodOracle("lightly NTXentLoss", losses.pair("views", NTXentLoss(0.1))),
    "byol": MethodOracle(COSINE, losses.each_step(losses.byol)),
    "simsiam": MethodOracle(COSINE, losses.each_step(losses.simsiam)),
    "barlow_twins": MethodOracle(
        "lightly BarlowTwinsLoss", losses.pair("embedding", BarlowTwinsLoss())
    ),
    "vicreg": MethodOracle("lightly VICRegLoss", losses.pair("embedding", VICRegLoss())),
    "unigrad": MethodOracle("lightly TiCoLoss", losses.unigrad),
    "dino": MethodOracle("lightly DINOLoss", losses.dino),
    "siameseim_pixel": MethodOracle(NORMALISED, losses.each_step(losses.other_pixels)),
    "siameseim": MethodOracle(
        "SiameseIM's formula in fp64, scikit-learn StandardScaler", losses.siameseim
    ),
    "msn": MethodOracle("lightly MSNLoss", losses.each_step(losses.msn)),
    "mixmim": MethodOracle(
        f"{NORMALISED}, each image's hidden cells", losses.each_step(losses.hidden_pixels)
    ),
    "ibot": MethodOracle("lightly DINOLoss + IBOTPatchLoss", losses.ibot),
    "dinov2": MethodOracle("lightly DINOLoss + IBOTPatchLoss + KoLeoLoss", losses.dinov2),
    "dinov3": MethodOracle(
        "lightly swav_loss.sinkhorn + KoLeoLoss, torch mse_loss of Gram matrices", losses.dinov3
    ),
    "tips": MethodOracle("torch cross_entropy + lightly DINOLoss + IBOTPatchLoss", losses.tips),
    "siglip2": MethodOracle(
        "torch binary_cross_entropy, open_clip CoCaLoss, lightly DINOLoss + IBOTPatchLoss",
        losses.siglip2,
    ),
    "lejepa": MethodOracle("lightly LeJEPALoss", losses.each_step(losses.lejepa)),
    "radio": MethodOracle(f"{COSINE}, torch mse_loss, scikit-learn PCA, {TIMM}", losses.radio),
    "slip": MethodOracle("open_clip ClipLoss + lightly NTXentLoss", losses.each_step(losses.slip)),
    "m3i": MethodOracle(
        "M3I's formulas in fp64, torch cross_entropy, scikit-learn StandardScaler", losses.m3i
    ),
}


# ---- Both on the same step -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest relative differences of a run, in the norm of all elements."""

    tokens: float
    """Of what the encoders say; 0 in fp64, where the tokens are the others'."""
    value: float
    """Of each term's part of the sum, and of the sum."""
    gradient: float
    """Of each part's, by the encoder's tokens and by what is learnt beside the encoder."""


def measure(name: str, dtype: torch.dtype = torch.float32) -> Errors:
    """Our terms beside the paper's loss, on the first steps of a tiny model."""
    model = build_model(METHODS[name]).to(dtype)
    run = ORACLES[name].start(model)
    found = [_one_step(name, number, model, run, dtype) for number in range(NUM_STEPS)]
    return Errors(*(max(getattr(e, f.name) for e in found) for f in fields(Errors)))


def _one_step(
    name: str, number: int, model: MutualInformation, run: losses.Run, dtype: torch.dtype
) -> Errors:
    method = METHODS[name]
    model.renew_bases(number)
    batch = draw_batch(number, with_local=method.local_views)
    step = Step(model, batch, draw(model, number), dtype)
    encoded, targets = _said_by_others(step, method)
    error = 0.0
    if dtype == torch.float32:  # ours normalise pictures to no wider type
        theirs = encoded, targets
        encoded = model.encode_inputs(batch, step.mix)
        targets = model.encode_targets(batch, step.mix)
        error = max(_token_errors(encoded, targets, *theirs))
    leaves = [tokens.detach().requires_grad_() for tokens in encoded.every]
    count = len(encoded.views)
    step = replace(step, tokens=tuple(leaves[:count]), local=tuple(leaves[count:]))
    expected = run(step)
    parts, total = _our_parts(step, targets)
    assert parts.keys() == expected.keys(), f"{name}: terms {list(parts)}, {list(expected)}"
    pairs = {term: (parts[term], expected[term]) for term in parts}
    whole = total, sum(expected.values())
    value = max(relative([a], [b]) for a, b in (*pairs.values(), whole))
    return Errors(error, value, max(_gradient_error(step, term, *of) for term, of in pairs.items()))


def _said_by_others(step: Step, method: Method) -> tuple[Encoded, Targets]:
    """What the encoders say of every view that the method may want."""
    both = any(term.symmetric or term.encoder == "shared" for term in method.terms)
    views = [step.inputs(view, method.mode) for view in range(1 + both)]
    local = [step.encode(step.local_pictures(n)) for n in range(len(step.batch.local_views))]
    tokens: dict[Source, Tensor] = {}
    for encoder in {term.encoder for term in method.terms} & {"momentum", "frozen", "snapshot"}:
        for view in range(2):
            tokens[encoder, view] = getattr(step, encoder)(view)
    return Encoded(tuple(views), tuple(local)), Targets(tokens, dict.fromkeys(tokens, "every"))


def _token_errors(
    encoded: Encoded, targets: Targets, encoded_theirs: Encoded, targets_theirs: Targets
) -> Iterator[float]:
    images = {"first": losses.FIRST, "last": losses.LAST, "all": losses.ALL, "every": losses.ALL}
    for ours, theirs in zip(encoded.every, encoded_theirs.every, strict=True):
        assert ours.requires_grad
        yield relative([ours], [theirs])
    for source, tokens in targets.tokens.items():
        assert not tokens.requires_grad
        theirs = targets_theirs.tokens[source][images[targets.rows[source]]]
        yield relative([tokens], [theirs])


def _our_parts(step: Step, targets: Targets) -> tuple[losses.Parts, Tensor]:
    """Each term times its weight, and what is trained on."""
    found: losses.Parts = {}
    hooks = [
        term.register_forward_hook(partial(_keep, found, name))
        for name, term in step.model.terms.items()
    ]
    encoded = Encoded(step.tokens, step.local)
    total, _ = step.model(encoded, targets, step.batch, step.mix)
    step.model.finish_step()
    for hook in hooks:
        hook.remove()
    weights = {term.name: term.weight for term in step.model.cfg.terms}
    return {name: weights[name] * value for name, value in found.items()}, total


def _keep(found: losses.Parts, name: str, module: nn.Module, args: tuple, output: tuple) -> None:
    found[name] = output[0]


def _gradient_error(step: Step, term: str, ours: Tensor, theirs: Tensor) -> float:
    """The larger one of both groups'; of the encoder's tokens alone where nothing predicts."""
    modules = (step.model.terms, step.model.decoders)
    learnt = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups: list[list[Tensor]] = [[*step.tokens, *step.local]]
    if modules[0][term].state_dict():
        groups.append(learnt)
    errors = []
    for group in groups:
        pair = [
            torch.autograd.grad(
                value, group, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for value in (ours, theirs)
        ]
        errors.append(relative(*pair))
    return max(errors)


def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """|ours - theirs| / |theirs| over the elements of all tensors."""
    a, b = (torch.cat([x.detach().double().flatten() for x in found]) for found in (ours, theirs))
    assert b.norm() > 0, "an oracle of zero"
    return float((a - b).norm() / b.norm())


# ---- The document --------------------------------------------------------------------------------

INTRODUCTION = """# Every method beside its paper

To see how near each method of `m3i-fast methods` comes to its paper, and where it differs.

Made by `python -m tests.objectives.methods.oracles > docs/measure/methods.md`, and measured anew by
`tests/objectives/methods/`. Each method takes two steps of a tiny model in fp32 beside the
oracle's code: which views and cells are encoded, what is predicted and the loss are worked out from
the batch, in fp64 from the predictions on. Errors are relative, the largest of each term and of the
sum: of the value, and of the gradient by the encoder's tokens and by all that is learnt beside the
encoder. The table has twice the error, rounded up to a power of ten, 1e-07 at least. A term is
its target: predictor, likelihood, what stands for the target's entropy. Sizes and training are this
project's, as are the networks on top of the encoder; the last column says where else a method is
not its paper's.
"""
COLUMNS = "method", "paper", "input", "terms", "oracle", "value", "gradient", "differs"


def page(errors: Mapping[str, tuple[str, str]]) -> str:
    """The document, with these bounds on the errors of value and gradient."""
    lines = [INTRODUCTION, _row(COLUMNS), _row("---" for _ in COLUMNS)]
    for name, method in METHODS.items():
        terms = "<br>".join(_term(term) for term in method.terms)
        facts = name, method.paper, shown(method), terms, ORACLES[name].source
        lines.append(_row((*facts, *errors[name], method.differs)))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _term(term: Term) -> str:
    return ("" if term.weight == 1 else f"{term.weight:g} x ") + predicted(term)


def read_errors(document: str) -> dict[str, tuple[str, str]]:
    """The bounds that a page states, by method."""
    rows = [line.strip("| ").split(" | ") for line in document.splitlines() if line[:1] == "|"]
    value, gradient = COLUMNS.index("value"), COLUMNS.index("gradient")
    return {row[0]: (row[value], row[gradient]) for row in rows[2:]}


def bound(error: float) -> str:
    """Twice it, for arithmetic on another machine, rounded up to a power of ten."""
    return f"{10.0 ** math.ceil(math.log10(max(2 * error, FLOOR))):.0e}"


if __name__ == "__main__":
    found = {name: measure(name) for name in METHODS}
    sys.stdout.write(page({n: (bound(e.value), bound(e.gradient)) for n, e in found.items()}))
