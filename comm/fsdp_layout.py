"""Where FSDP2 keeps the gradient shards of each module, and what of its models cannot be averaged across replicas.

Torch's hook brings the shards of one module's parameters as one flat tensor; how it is laid out, only internals say.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gradwire.comm.averager import Averager
from gradwire.comm.exchange.reduce_scatter import Slot
from gradwire.comm.plain_name import plain_name

_USED = ("sharded_param", "sharded_size", "padded_sharded_param_size", "fsdp_placement")


@final
@dataclass(frozen=True)
class ShardGroup:
    """Where the parameters of one FSDP2 module lie in the flat gradient that it reduces at once.

    Args:
        name: The module's name.
        module: The module.
        names: Its parameters' names, without frozen ones.
        offsets: Where this rank's shard of each begins.
        shapes: Its shape; shards of uneven parameters are padded.
        wholes: The parameter's shape.
        dims: The dimension along which it is sharded.
        numel: Entries of the flat gradient.
        dtype: Its dtype.
        device: Its device.
    """

    name: str
    module: Any
    names: list[str]
    offsets: list[int]
    shapes: list[torch.Size]
    wholes: list[torch.Size]
    dims: list[int]
    numel: int
    dtype: torch.dtype
    device: torch.device

    def cut(self, flat: Tensor) -> tuple[list[Tensor], list[str]]:
        """Views of the parameters' gradients and their names, where this rank's shard is not empty."""
        runs = zip(self.names, self.offsets, self.shapes, strict=True)
        cut = [(flat[at : at + shape.numel()].view(shape), name) for name, at, shape in runs if shape.numel()]
        return [grad for grad, _ in cut], [name for _, name in cut]

    @property
    def divide_factor(self) -> float | None:
        """By what FSDP2 was told to divide gradients; by the number of ranks if None."""
        (members,) = _groups(self.module._get_fsdp_state())
        factor: float | None = getattr(members, "gradient_divide_factor", None)
        return factor

    def slots(self, owners: int) -> list[list[Slot]]:
        """Of every rank of so many, its shards that are not empty, in the order of `cut_all`."""
        parameters = list(zip(self.names, self.wholes, self.dims, strict=True))
        every = [[Slot(*parameter, owner, owners) for parameter in parameters] for owner in range(owners)]
        return [[slot for slot in slots if slot.shape.numel()] for slots in every]

    def cut_all(self, flat: Tensor, slots: list[list[Slot]]) -> list[Tensor]:
        """Views of the shards of all ranks in the flat gradient before it is reduced, in which rank follows rank."""
        offsets = dict(zip(self.names, self.offsets, strict=True))
        every = flat.view(len(slots), -1)
        return [
            run[offsets[slot.parameter] :][: slot.shape.numel()].view(slot.shape)
            for run, owned in zip(every, slots, strict=True)
            for slot in owned
        ]


def shard_groups(model: FSDPModule, left: dict[str, Any] | None = None) -> list[ShardGroup]:
    """The layout of every FSDP2 module's flat gradient; raises for what cannot be averaged.

    Modules with several groups of parameters go into `left` by name, if it is given.
    """
    assert isinstance(model, nn.Module)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    for module in modules.values():
        module.reshard()  # a forward pass alone leaves the root's parameters unsharded
    names = {p: plain_name(name) for name, p in model.named_parameters() if p.requires_grad}
    groups, found, states = [], set(), set()
    for name, module in modules.items():
        state: Any = module._get_fsdp_state()
        if id(state) in states:  # `fully_shard([a, b])` is one group
            continue
        states.add(id(state))
        if left is not None and len(_groups(state)) > 1:
            left[name] = module
            found |= {names[p] for p in parameters_of(module)}
            continue
        for members in _members(name, state):
            trained = [p for p in members.fsdp_params if p.sharded_param.requires_grad]
            if not trained:
                continue
            sizes = [p.padded_sharded_param_size.numel() for p in trained]
            policy, dtype = members.mp_policy, trained[0].sharded_param.dtype
            group = ShardGroup(
                name,
                module,
                names=[names[p.sharded_param] for p in trained],
                offsets=[sum(sizes[:place]) for place in range(len(sizes))],
                shapes=[p.sharded_size for p in trained],
                wholes=[p.sharded_param.shape for p in trained],
                dims=[p.fsdp_placement.dim for p in trained],
                numel=sum(sizes),
                dtype=policy.reduce_dtype or policy.param_dtype or dtype,
                device=members.device,
            )
            groups.append(group)
            found |= set(group.names)
    if missing := [name for name in names.values() if name not in found]:
        raise ValueError(
            f"attach: expected every parameter that requires a gradient to be sharded, got {missing[0]!r} on its own. "
            "Call fully_shard on a module that holds it, or freeze it."
        )
    if not groups:
        raise ValueError("attach: expected at least one parameter that requires a gradient, got none.")
    return groups


def _groups(state: Any) -> list[Any]:
    """FSDP2's own record of one module's parameters."""
    several = getattr(state, "_fsdp_param_groups", None)  # older torch has one at most, of another name
    groups = [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def _members(name: str, state: Any) -> list[Any]:
    """The only group of a module, if it has any."""
    groups = _groups(state)
    if len(groups) > 1:
        raise ValueError(
            f"attach: expected one group of parameters per FSDP2 module, got {len(groups)} for {name!r}, which "
            "shards them over different meshes. Call fully_shard on the modules that hold them, each with one mesh."
        )
    for p in (p for group in groups for p in group.fsdp_params):
        if lacking := [attribute for attribute in _USED if not hasattr(p, attribute)]:
            raise RuntimeError(
                f"attach: expected FSDP2's parameters to have {lacking[0]!r}, as in torch 2.13, got none in torch "
                f"{torch.__version__}. Use another version of torch, or average gradients by hand with average_."
            )
        if p.sharded_param.is_meta:
            raise ValueError(f"attach: expected parameters with storage, got a meta tensor in {name!r}. Attach later.")
    return groups


def group_of_shards(model: FSDPModule, left: Iterable[nn.Module] = ()) -> dist.ProcessGroup:
    """The ranks among which parameters are sharded: the same for all, in one dimension; but for those of `left`."""
    assert isinstance(model, nn.Module)
    mesh: DeviceMesh | None = None
    others = {id(p) for module in left for p in parameters_of(module)}
    for name, p in model.named_parameters():
        if not p.requires_grad or id(p) in others:
            continue
        assert isinstance(p, DTensor)
        if any(placement.is_replicate() for placement in p.placements):
            raise ValueError(
                f"attach: expected a model that is sharded alone, got {name!r} replicated by FSDP2 itself over "
                f"{p.device_mesh}, which averages densely. Call fully_shard with mesh=mesh['shard'] (one dimension), "
                "and pass replicate=mesh['replicate'] to attach."
            )
        if p.device_mesh.ndim > 1:
            raise ValueError(
                f"attach: expected parameters that only FSDP2 shards, got {name!r} on {p.device_mesh}. Tensor "
                "parallelism is not supported."
            )
        if mesh is not None and p.device_mesh != mesh:
            raise ValueError(f"attach: expected one mesh for all modules, got {mesh} and {p.device_mesh} for {name!r}.")
        mesh = p.device_mesh
    assert mesh is not None
    return mesh.get_group()


def parameters_of(module: Any) -> list[nn.Parameter]:
    """The parameters that an FSDP2 module reduces itself and that require a gradient."""
    state = module._get_fsdp_state()
    return [p.sharded_param for group in _groups(state) for p in group.fsdp_params if p.sharded_param.requires_grad]


def check_shards(communicator: Averager, shards: dist.ProcessGroup) -> None:
    """Raise ValueError unless the communicator's ranks are those among which parameters are sharded, in their order."""
    wanted = dist.get_process_group_ranks(shards)
    ranks = dist.get_process_group_ranks(communicator.group if communicator.group is not None else dist.group.WORLD)
    if ranks != wanted:
        raise ValueError(
            f"attach: expected a communicator of the ranks among which parameters are sharded, {wanted}, got one of "
            f"ranks {ranks}. Make it with group=mesh.get_group(), of the mesh that fully_shard was given."
        )


def check_replicas(communicator: Averager, replicate: DeviceMesh, shards: dist.ProcessGroup) -> None:
    """Raise ValueError unless the communicator averages the same shard of all replicas."""
    if replicate.ndim != 1:
        raise ValueError(f"attach: expected one dimension of a mesh as replicate, got {replicate}.")
    replicas = dist.get_process_group_ranks(replicate.get_group())
    common = set(replicas) & set(dist.get_process_group_ranks(shards))
    if common != {dist.get_rank()}:
        raise ValueError(
            f"attach: expected replicate to hold the same shard of other replicas, got ranks {replicas}, with "
            f"{sorted(common)} of the shard dimension. Pass the dimension over which fully_shard does not shard."
        )
    ranks = dist.get_process_group_ranks(communicator.group if communicator.group is not None else dist.group.WORLD)
    if ranks != replicas:
        raise ValueError(
            f"attach: expected a communicator of the replicas, ranks {replicas}, got one of ranks {ranks}. Make it "
            "with group=mesh['replicate'].get_group()."
        )
