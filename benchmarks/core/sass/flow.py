"""Basic blocks, subroutines and natural loops of a kernel's machine code.

Edges are those of branches, of what falls through, and of BSYNC, which goes on at the label that
BSSY named for the same register. A subroutine, which CALL names by `$`, is a graph of its own; a
CALL to a label within the kernel never returns: ptxas leaves loops by it. BRA.DIV
is followed by code for warps that have parted, which a kernel that keeps them together never runs;
it is a block as any other here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from m3i_fast.benchmarks.core.sass.disassembly import Frame, Instruction, Kernel
from m3i_fast.benchmarks.core.sass.pipes import BRANCHES

_JUMPS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL")
_ENDS = ("EXIT", "RET", "KILL", "BPT")
_ALWAYS = ("", "PT", "UPT")


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that are executed one after the other, of which only the last may branch."""

    number: int
    """In the order of addresses."""
    instructions: list[Instruction]
    successors: tuple[int, ...]
    calls: int | None = None
    """The block where the subroutine begins that it ends with a call of."""

    @property
    def begin(self) -> int:
        return self.instructions[0].address

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]


@dataclass(frozen=True, slots=True)
class Loop:
    """A natural loop: all blocks from which a branch back to its header is reached."""

    number: int
    """In the order of the headers' addresses, over the whole kernel."""
    header: int
    blocks: frozenset[int]
    back: tuple[int, ...]
    """The blocks that branch back."""
    parent: int | None
    """The loop that it stands in."""
    depth: int
    """1 where it stands in none."""
    length: int
    """Instructions of its blocks, loops inside included."""
    line: Frame | None
    """The source line of the branch back."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The control flow of a kernel."""

    kernel: Kernel
    blocks: list[Block]
    entries: tuple[int, ...]
    """First blocks: of the kernel, then of its subroutines."""
    loops: list[Loop]
    irreducible: int
    """Branches back that make no natural loop: a loop with two entries."""
    unreachable: int
    """Instructions that nothing leads to: what fills the kernel's end up."""
    owner: dict[int, int] = field(default_factory=dict)
    """The entry from which each block is reached."""

    def loops_around(self, block: int) -> list[Loop]:
        """Return the loops that a block is in, the outermost first."""
        return sorted((each for each in self.loops if block in each.blocks), key=lambda e: e.depth)


def analyse(kernel: Kernel) -> Flow:
    """Return the control flow of a kernel."""
    blocks = _blocks(kernel)
    entries, owner = _reach(blocks)
    found: list[tuple[int, frozenset[int], tuple[int, ...]]] = []
    irreducible = 0
    for entry in entries:
        loops, odd = _natural_loops(blocks, entry)
        found += loops
        irreducible += odd
    unreachable = sum(len(block.instructions) for block in blocks if block.number not in owner)
    return Flow(kernel, blocks, entries, _nest(blocks, found), irreducible, unreachable, owner)


# ---- Blocks --------------------------------------------------------------------------------------


def _blocks(kernel: Kernel) -> list[Block]:
    """Cut a kernel at the targets of branches and behind them."""
    code, labels = kernel.instructions, kernel.labels
    named = [labels[name] for each in code for name in each.targets if name in labels]
    cuts = {code[0].address, *named}
    for each, following in zip(code, code[1:], strict=False):
        if each.stem in (*BRANCHES, *_ENDS, "BSYNC"):
            cuts.add(following.address)
    pieces: list[list[Instruction]] = []
    for each in code:
        if each.address in cuts:
            pieces.append([])
        pieces[-1].append(each)
    number_at = {piece[0].address: number for number, piece in enumerate(pieces)}
    successors, calls = _edges(pieces, {n: number_at[a] for n, a in labels.items() if a in cuts})
    return [
        Block(number, piece, successors[number], calls.get(number))
        for number, piece in enumerate(pieces)
    ]


def _edges(
    pieces: list[list[Instruction]], block_at: dict[str, int]
) -> tuple[dict[int, tuple[int, ...]], dict[int, int]]:
    """Return the successors of each block, and what is called at its end, by block.

    Where a thread goes on behind BSYNC is carried along: the label of BSSY by its register.
    """
    successors: dict[int, tuple[int, ...]] = {}
    calls: dict[int, int] = {}
    waiting: list[tuple[int, dict[str, int]]] = [(0, {})]
    while waiting:
        number, joins = waiting.pop()
        if number in successors or number >= len(pieces):
            continue
        joins = dict(joins)
        for each in pieces[number]:
            if each.stem == "BSSY" and each.targets:
                joins[each.operands.split(",")[0].strip()] = block_at[each.targets[0]]
        last = pieces[number][-1]
        following = [block_at[name] for name in last.targets if name in block_at]
        goes_on = True
        if is_subroutine_call(last) and following:
            calls[number] = following[0]
            waiting.append((following[0], {}))
            following = []
        elif last.stem in _JUMPS:
            goes_on = not _is_always_taken(last)
        elif last.stem in _ENDS:
            following, goes_on = [], last.predicate not in _ALWAYS
        elif last.stem == "BSYNC":
            join = joins.get(last.operands.strip())
            following, goes_on = ([], True) if join is None else ([join], bool(last.predicate))
        else:
            following = []  # a label that is no target: of BSSY or a return address
        if goes_on and number + 1 < len(pieces):
            following.append(number + 1)
        successors[number] = tuple(dict.fromkeys(following))
        waiting += [(each, joins) for each in reversed(following)]
    for number in range(len(pieces)):
        successors.setdefault(number, ())
    return successors, calls


def is_subroutine_call(instruction: Instruction) -> bool:
    """Whether an instruction calls what comes back to the next one."""
    return instruction.stem == "CALL" and any(n.startswith("$") for n in instruction.targets)


def _is_always_taken(jump: Instruction) -> bool:
    """Whether nothing is executed behind a jump: no predicate before it or among its operands."""
    conditions = [jump.predicate] if jump.predicate else []
    conditions += [part.strip() for part in jump.operands.split(",")[:-1]]
    is_of_all = not {"DIV", "CONV", "ANY"} & {*jump.modifiers}
    return is_of_all and all(condition in _ALWAYS for condition in conditions)


def _reach(blocks: list[Block]) -> tuple[tuple[int, ...], dict[int, int]]:
    """Return the entries, and by block the entry that it is reached from."""
    owner: dict[int, int] = {}
    entries = [0]
    for entry in entries:  # grows
        waiting = [entry]
        while waiting:
            number = waiting.pop()
            if number in owner:
                continue
            owner[number] = entry
            called = blocks[number].calls
            if called is not None and called not in entries:
                entries.append(called)
            waiting += blocks[number].successors
    return tuple(entries), owner


# ---- Loops ---------------------------------------------------------------------------------------


Graph = Mapping[int, Sequence[int]]
"""What follows each block."""


def reverse_postorder(graph: Graph, entry: int) -> list[int]:
    """Return the blocks that are reached from an entry, each before what it leads to."""
    seen, order = {entry}, []
    stack = [(entry, iter(graph[entry]))]
    while stack:
        number, left = stack[-1]
        following = next((each for each in left if each not in seen), None)
        if following is None:
            order.append(number)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph[following])))
    return order[::-1]


def dominators(graph: Graph, entry: int) -> dict[int, int]:
    """Return the immediate dominator of each block (Cooper, Harvey and Kennedy's algorithm)."""
    order = reverse_postorder(graph, entry)
    place = {number: at for at, number in enumerate(order)}
    before = reversed_graph(graph, order)
    above = {entry: entry}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            known = [each for each in before[number] if each in above]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    while place[common] > place[other]:
                        common = above[common]
                    while place[other] > place[common]:
                        other = above[other]
            if above.get(number) != common:
                above[number] = common
                changed = True
    return above


def reversed_graph(graph: Graph, blocks: Iterable[int]) -> dict[int, list[int]]:
    """Return what stands before each of these blocks, which lead to no other one."""
    before: dict[int, list[int]] = {number: [] for number in blocks}
    for number in before:
        for following in graph[number]:
            before[following].append(number)
    return before


def _natural_loops(
    blocks: list[Block], entry: int
) -> tuple[list[tuple[int, frozenset[int], tuple[int, ...]]], int]:
    """Return header, blocks and branching-back blocks of each loop, and how many are no loops."""
    graph = {block.number: block.successors for block in blocks}
    order = reverse_postorder(graph, entry)
    place = {number: at for at, number in enumerate(order)}
    above, before = dominators(graph, entry), reversed_graph(graph, order)
    back: dict[int, list[int]] = {}
    odd = 0
    for number in order:
        for header in blocks[number].successors:
            if place[header] > place[number]:
                continue
            at = number
            while at != header and at != entry:
                at = above[at]
            if at == header:
                back.setdefault(header, []).append(number)
            else:
                odd += 1
    loops = []
    for header, tails in back.items():
        body, waiting = {header}, list(tails)
        while waiting:
            number = waiting.pop()
            if number not in body:
                body.add(number)
                waiting += before[number]
        loops.append((header, frozenset(body), tuple(sorted(tails))))
    return loops, odd


def _nest(
    blocks: list[Block], found: list[tuple[int, frozenset[int], tuple[int, ...]]]
) -> list[Loop]:
    """Give loops numbers by their headers' addresses, and find what each stands in."""
    found = sorted(found)
    loops = []
    for number, (header, body, tails) in enumerate(found):
        around = [(len(b), n) for n, (_, b, _) in enumerate(found) if body < b]
        branch = blocks[tails[-1]].last
        loops.append(
            Loop(
                number=number,
                header=header,
                blocks=body,
                back=tails,
                parent=min(around)[1] if around else None,
                depth=len(around) + 1,
                length=sum(len(blocks[each].instructions) for each in body),
                line=branch.frames[0] if branch.frames else None,
            )
        )
    return loops
