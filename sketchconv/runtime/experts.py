"""`Experts`: a mixture's experts as linear modules of their own, dense or sketched."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sketchconv.adapters.batch import Names, current, use
from sketchconv.unfold import FUSED


class Experts(nn.Module):
    """Stands in for transformers' fused experts; computes what they compute.

    Of each token ``x`` and each expert e that it is routed to, ``down_e(act(gate_e(x)) *
    up_e(x))`` is multiplied with the route's weight, and a token's products are added up. Only
    experts that are hit run, each on all of its tokens at once. The submodule `N.LEAF` is one
    linear module of expert N, under the names that the checkpoint has for them.

    Args:
        fused: the module that is replaced: parameters `gate_up_proj` ``[E, 2 * I, H]`` and
            `down_proj` ``[E, H, I]`` and a function `act_fn`. Its memory is not kept.
        leaves: role -> name of an expert's linear module; the roles are gate, up and down, or
            gate_up (gate above up) and down.
    """

    def __init__(self, fused: nn.Module, leaves: Mapping[str, str]) -> None:
        super().__init__()
        gate_up, down = (cast(Tensor, fused._parameters[n]) for n in FUSED)
        self.num_experts, self.hidden_dim, self.intermediate_dim = down.shape
        self.leaves = dict(leaves)
        self.act_fn: Any = fused.act_fn
        # Not a submodule: it is a template without memory, to go back to the fused form.
        self.__dict__["_fused"] = copy.deepcopy(fused).to("meta")
        wide, middle = self.hidden_dim, self.intermediate_dim
        shapes = {"gate": (wide, middle), "up": (wide, middle), "gate_up": (wide, 2 * middle),
                  "down": (middle, wide)}  # fmt: skip
        for number in range(self.num_experts):
            expert = nn.Module()
            for role, leaf in leaves.items():
                linear = nn.Linear(*shapes[role], bias=False, device="meta", dtype=gate_up.dtype)
                expert.add_module(leaf, linear)
            self.add_module(str(number), expert)

    def linear(self, number: int, role: str) -> nn.Module:
        """One linear module of one expert."""
        # Not `get_submodule`, which takes 21 us to take a path apart; 24 times for 8 experts.
        expert = cast(nn.Module, self._modules[str(number)])
        return cast(nn.Module, expert._modules[self.leaves[role]])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts that are hit.

        Args:
            hidden_states: ``[tokens, H]`` of any float dtype.
            top_k_index: integers ``[tokens, k]``; E and above stand for no expert.
            top_k_weights: ``[tokens, k]``, of any float dtype.

        Returns:
            ``[tokens, H]`` in the dtype of `hidden_states`.
        """
        tokens, routes = top_k_index.shape
        numbers, order = torch.sort(top_k_index.reshape(-1), stable=True)
        inputs = hidden_states[order // routes]
        spans = _spans(numbers, self.num_experts)
        names = current()
        if names is None:
            outputs = [self._run(n, inputs[span]) for n, span in spans]
        else:
            mine = [names[t * len(names) // tokens] for t in (order // routes).tolist()]
            outputs = [self._run_mixed(n, inputs[span], tuple(mine[span])) for n, span in spans]
        done = sum(len(output) for output in outputs)
        outputs.append(inputs.new_zeros(len(inputs) - done, self.hidden_dim))
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # A sum over the routes in their order: adding by index would round as threads happen to.
        total = weighted[back].view(tokens, routes, self.hidden_dim).sum(1)
        return total.to(hidden_states.dtype)

    def _run(self, number: int, x: Tensor) -> Tensor:
        if "gate_up" in self.leaves:
            gate, up = self.linear(number, "gate_up")(x).chunk(2, dim=-1)
        else:
            gate, up = self.linear(number, "gate")(x), self.linear(number, "up")(x)
        output: Tensor = self.linear(number, "down")(self.act_fn(gate) * up)
        return output

    def _run_mixed(self, number: int, x: Tensor, names: Names) -> Tensor:
        """As `_run`; row r of `x` is a token of a sample with adapter ``names[r]``."""
        with use(names):
            return self._run(number, x)

    def fused(self) -> nn.Module:
        """The module that this one replaced, with these weights; all must be dense."""
        module: nn.Module = copy.deepcopy(self.__dict__["_fused"])
        numbers = range(self.num_experts)

        def stack(*roles: str) -> nn.Parameter:
            parts = [torch.cat([self._weight(n, role) for role in roles]) for n in numbers]
            return nn.Parameter(torch.stack(parts), requires_grad=False)

        fused_gate = ("gate_up",) if "gate_up" in self.leaves else ("gate", "up")
        module.register_parameter("gate_up_proj", stack(*fused_gate))
        module.register_parameter("down_proj", stack("down"))
        return module

    def _weight(self, number: int, role: str) -> Tensor:
        return cast(Tensor, self.linear(number, role).weight).detach()

    def extra_repr(self) -> str:
        """How many experts, and their sizes."""
        return f"{self.num_experts} of {self.hidden_dim}, {self.intermediate_dim}"


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Every module of experts by its path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Experts)}


def _spans(numbers: Tensor, count: int) -> Iterator[tuple[int, slice]]:
    """Experts that are hit, and where their tokens lie in the sorted `numbers`."""
    begin = 0
    for number, hits in enumerate(torch.bincount(numbers, minlength=count)[:count].tolist()):
        if hits:
            yield number, slice(begin, begin + hits)
        begin += hits
