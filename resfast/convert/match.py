"""Which nodes of a forward's graph become one op: layers, and residual blocks made of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from resfast.convert.trace import write_in_place
from resfast.nn.blocks import _block_layer_reason
from resfast.nn.fuse import conv_reason, is_frozen_norm, norm_reason

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_ADD_FUNCTIONS = (operator.add, torch.add)

Usable = Callable[[nn.Module], bool]


@dataclass
class Layer:
    """[convolution,] norm [, + residual] [, ReLU [, max-pool]]: the nodes of one layer."""

    norm: fx.Node
    input: fx.Node
    conv: fx.Node | None = None
    act: fx.Node | None = None
    add: fx.Node | None = None
    residual: fx.Node | None = None
    pool: fx.Node | None = None
    identities: list[fx.Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[fx.Node]:
        own = (self.conv, self.norm, self.add, self.act, self.pool)
        return sorted([n for n in own if n is not None] + self.identities)

    @property
    def output(self) -> fx.Node:
        return self.pool or self.act or self.add or self.norm

    @property
    def parts(self) -> list[fx.Node]:
        return [n for n in (self.conv, self.norm) if n is not None]


@dataclass
class Block:
    """A chain of layers, the last with a residual and ReLU, and the shortcut's layer if any."""

    chain: list[Layer]
    shortcut: Layer | None

    @property
    def layers(self) -> list[Layer]:
        return [*self.chain, *([] if self.shortcut is None else [self.shortcut])]

    @property
    def nodes(self) -> list[fx.Node]:
        return sorted(n for layer in self.layers for n in layer.nodes)

    @property
    def input(self) -> fx.Node:
        return self.chain[0].input

    @property
    def shortcut_input(self) -> fx.Node:
        source = self.chain[-1].residual if self.shortcut is None else self.shortcut.input
        assert source is not None
        return source

    @property
    def output(self) -> fx.Node:
        return self.chain[-1].output

    @property
    def parts(self) -> list[fx.Node]:
        return [n for layer in self.layers for n in layer.parts]


class Matcher:
    """Patterns in one graph. ``usable`` says whether a convolution or norm may be fused."""

    def __init__(self, root: nn.Module, graph: fx.Graph, usable: Usable) -> None:
        self.root = root
        self.nodes = list(graph.nodes)
        self.usable = usable
        self.transparent: set[str] = set()  # Identities that fused code steps over

    def module(self, node: fx.Node | Any) -> nn.Module | None:
        """The child that a node calls on one tensor."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        return self.root.get_submodule(str(node.target))

    def _is_conv(self, node: fx.Node | Any) -> bool:
        m = self.module(node)
        return isinstance(m, nn.Conv2d) and self.usable(m)

    def _is_norm(self, node: fx.Node) -> bool:
        m = self.module(node)
        kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
        if m is None or not (isinstance(m, kinds) or is_frozen_norm(m)):
            return False
        return self.usable(m)

    def _is_identity(self, node: fx.Node | Any) -> bool:
        m = self.module(node)
        return type(m) is nn.Identity and not m._forward_hooks and not m._forward_pre_hooks

    def _is_relu(self, node: fx.Node | None) -> bool:
        if node is None:
            return False
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in _RELU_FUNCTIONS

    @staticmethod
    def _operands(node: fx.Node | None) -> tuple[fx.Node, ...]:
        """The two nodes that an addition adds, or none."""
        if node is None or node.kwargs:
            return ()
        args = node.args
        if node.target is write_in_place and args[0] == "iadd":
            args = args[1:]
        elif not (node.op == "call_function" and node.target in _ADD_FUNCTIONS) and not (
            node.op == "call_method" and node.target in ("add", "add_")
        ):
            return ()
        operands = tuple(a for a in args if isinstance(a, fx.Node))
        return operands if len(args) == len(set(operands)) == 2 else ()

    @staticmethod
    def _adds_in_place(node: fx.Node) -> bool:
        return node.target in (write_in_place, "add_")

    def _sole_user(self, node: fx.Node, over: list[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
        """(the node or the last Identity behind it, who alone uses that), Identities noted."""
        while len(node.users) == 1:
            (user,) = node.users
            if not self._is_identity(user):
                return node, user
            over.append(user)
            node = user
        return node, None

    def match(self) -> list[Layer | Block]:
        layers = [self._layer(node) for node in self.nodes if self._is_norm(node)]
        # without a convolution before it a SyncBatchNorm's input may have any rank
        layers = [
            n for n in layers if n.conv or not isinstance(self.module(n.norm), nn.SyncBatchNorm)
        ]
        for layer in layers:
            over: list[fx.Node] = []
            _, user = self._sole_user(layer.norm, over)
            if user is not None and self._is_relu(user):
                layer.act = user
                layer.identities += over
                self._pool(layer, user)
        self._join(layers)
        layers = [n for n in layers if n.conv is not None or n.act is not None or n.add is not None]
        groups = self._blocks(layers)
        self._drop_hazards(groups, layers)
        for group in groups:
            members = group.layers if isinstance(group, Block) else [group]
            self.transparent |= {str(n.target) for m in members for n in m.identities}
        return groups

    def _layer(self, norm: fx.Node) -> Layer:
        def source(node: Any) -> tuple[Any, list[fx.Node]]:
            over = []
            node = node.args[0]
            while self._is_identity(node) and len(node.users) == 1:
                over.append(node)
                node = node.args[0]
            return node, over

        conv, over = source(norm)
        if not self._is_conv(conv) or len(conv.users) != 1:
            first: Any = norm.args[0]
            return Layer(norm, first)
        above, more = source(conv)
        return Layer(norm, above, conv, identities=over + more)

    def _pool(self, layer: Layer, act: fx.Node) -> None:
        """A max-pool that alone reads a convolution layer's output is part of it."""
        over: list[fx.Node] = []
        _, user = self._sole_user(act, over)
        if layer.conv is not None and type(self.module(user)) is nn.MaxPool2d:
            layer.pool = user
            layer.identities += over

    # ---- additions

    def _join(self, layers: list[Layer]) -> None:
        """Give each addition to the layer before it, of two to the one with more layers above."""
        ends: dict[fx.Node, tuple[Layer, list[fx.Node]]] = {}
        for layer in layers:
            if layer.act is None:
                over: list[fx.Node] = []
                end, _ = self._sole_user(layer.norm, over)
                ends[end] = (layer, over)
        outputs = {layer.output: layer for layer in layers}
        for node in self.nodes:
            operands = self._operands(node)
            choices = [o for o in operands if o in ends and len(o.users) == 1]
            if not choices:
                continue
            end = max(choices, key=lambda o: self._depth(ends[o][0], outputs))
            (other,) = (o for o in operands if o is not end)
            # in place into the other operand: who else has that would see it
            if self._adds_in_place(node) and operands[0] is not end and other not in choices:
                continue
            layer, over = ends.pop(end)
            layer.add, layer.residual = node, other
            layer.identities += over
            over = []
            _, user = self._sole_user(node, over)
            if self._is_relu(user):
                layer.act = user
                layer.identities += over
            outputs[layer.output] = layer

    def _depth(self, layer: Layer, outputs: dict[fx.Node, Layer]) -> int:
        return sum(1 for _ in self._above(layer, outputs))

    @staticmethod
    def _above(layer: Layer, outputs: dict[fx.Node, Layer]) -> Iterator[Layer]:
        """layer, and the convolution layers that feed only it: each behind a ReLU, no addition."""
        while True:
            yield layer
            above = outputs.get(layer.input)
            if above is None or above.conv is None or above.act is None:
                return
            if above.add is not None or above.pool is not None or len(above.output.users) != 1:
                return
            layer = above

    # ---- blocks

    def _in_block(self, layer: Layer) -> bool:
        if layer.conv is None:
            return False
        conv, norm = self.module(layer.conv), self.module(layer.norm)
        assert conv is not None
        assert norm is not None
        return _block_layer_reason(conv, norm) is None

    def _blocks(self, layers: list[Layer]) -> list[Layer | Block]:
        """Chains that end in an addition and a ReLU as blocks, every other layer by itself."""
        outputs = {layer.output: layer for layer in layers}
        shortcuts: dict[fx.Node, Layer] = {}
        for layer in layers:
            if layer.act is None and layer.add is None and self._in_block(layer):
                end, _ = self._sole_user(layer.norm, [])
                shortcuts[end] = layer
        blocks: list[Layer | Block] = []
        taken: set[int] = set()
        for layer in layers:
            if layer.add is None or layer.act is None or not self._in_block(layer):
                continue
            chain: list[Layer] = []
            for above in self._above(layer, outputs):
                if not self._in_block(above):
                    break
                chain.insert(0, above)
            if len(chain) < 2:
                continue
            assert layer.residual is not None
            shortcut = shortcuts.get(layer.residual)
            if shortcut is not None:
                _, _ = self._sole_user(shortcut.norm, shortcut.identities)
            blocks.append(Block(chain, shortcut))
            taken |= {id(part) for part in chain}
            taken |= {id(shortcut)}
        return blocks + [layer for layer in layers if id(layer) not in taken]

    # ---- what an addition must not be moved across

    def _drop_hazards(self, groups: list[Layer | Block], layers: list[Layer]) -> None:
        """A layer with a residual runs at its end: nothing between may write in place."""
        members = {n for layer in layers for n in layer.nodes}
        order = {n: i for i, n in enumerate(self.nodes)}
        for group in list(groups):
            layer = group.chain[-1] if isinstance(group, Block) else group
            if layer.add is None:
                continue
            first, last = order[group.nodes[0]], order[group.nodes[-1]]
            between = (n for n in self.nodes[first:last] if n not in members)
            if not any(self._may_write(n) for n in between):
                continue
            groups.remove(group)
            layer.add = layer.act = layer.residual = None
            for part in group.layers if isinstance(group, Block) else [group]:
                if part.act is None:
                    part.identities = [n for n in part.identities if n < part.norm]
                groups.append(part)

    def _may_write(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            name = str(node.target)
            return name.endswith("_") and not name.endswith("__")
        if node.op == "call_function":
            target: Any = node.target
            name = getattr(target, "__name__", "")
            in_place = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
            return in_place or target is write_in_place or name.endswith("_")
        if node.op == "call_module":
            m = self.root.get_submodule(str(node.target))
            return any(getattr(below, "inplace", False) for below in m.modules())
        return False


def usable_reason(m: nn.Module) -> str | None:
    """Why a convolution or norm is never fused, or None."""
    return conv_reason(m) if isinstance(m, nn.Conv2d) else norm_reason(m, synchronises=True)
