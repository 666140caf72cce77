"""Builds the model of a run from its config."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from m3i_fast.config import TrainConfig
from m3i_fast.engine.optim.param_groups import freeze_patch_embed
from m3i_fast.engine.parallel.gradient_caching import ROW_WISE, encode_in_chunks
from m3i_fast.engine.teacher import load_teacher
from m3i_fast.models.internimage.deformable import InternImageLayer
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Block, BlockLayers
from m3i_fast.models.transformer.decoder_block import DecoderBlock
from m3i_fast.objectives.objective import MutualInformation


def build_objective(
    cfg: TrainConfig,
    process_group: dist.ProcessGroup | None = None,
    *,
    layers: BlockLayers = TORCH_LAYERS,
    on_meta: bool = False,
) -> MutualInformation:
    """Build the model of a run, with its blocks compiled where the config says so.

    layers: how blocks compute (`layers_of`); they do not change the state dict. on_meta: build
    without memory, which `meta_init.initialise` allocates; a frozen teacher always has memory.
    Raises ValueError, FileNotFoundError or ImportError for a teacher that cannot be loaded
    (`load_teacher`), and ValueError where nothing is left to train beside a frozen encoder.
    """
    specs = {name: spec for name, spec in cfg.objective.teachers.items() if spec is not None}
    # The student's start does not depend on its teachers, which are made on the CPU.
    with torch.random.fork_rng(devices=[]):
        teachers = {name: load_teacher(spec, cfg.vision) for name, spec in specs.items()}
    with torch.device("meta") if on_meta else nullcontext():
        objective = MutualInformation(
            cfg.objective,
            vision=cfg.vision,
            text=cfg.text,
            num_classes=cfg.num_classes,
            columns=cfg.columns,
            teachers=teachers,
            process_group=process_group,
            layers=layers,
        )
    if cfg.optim.freeze_patch_embed:
        freeze_patch_embed(objective)
    if cfg.optim.freeze_encoder:
        _freeze_encoder(objective)
    if cfg.compile:
        blocks = blocks_of(objective)
        # Blocks share one cache of graphs; it needs one for each rate of stochastic depth, size of
        # view and mode, and with fullgraph the ninth would be an error.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)
    if cfg.parallel.chunk:
        encode_in_chunks(objective, cfg.parallel.chunk)
    return objective


def _freeze_encoder(objective: MutualInformation) -> None:
    objective.encoder.requires_grad_(False)
    if objective.mask_token is not None:  # an input of the encoder's
        objective.mask_token.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in objective.parameters()):
        raise ValueError(
            "optim.freeze_encoder: expected a term with weights of its own to train, got none; set "
            "--optim.no-freeze-encoder"
        )


def stacks_of(model: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks of each encoder and decoder, in the order in which they run."""
    return [blocks_of(m) for m in model.modules() if isinstance(m, tuple(ROW_WISE))]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks, each of which is compiled, gathered and recomputed as one."""
    return [m for m in model.modules() if isinstance(m, Block | DecoderBlock | InternImageLayer)]
