"""One pull on many processes: the same global batch, gradient and checkpoint whatever their number.

Started by torchrun, which tells each process its rank through the environment; alone, every function here does nothing.
Two ways to share the work (Li et al. 2020, PyTorch Distributed; Zhao et al. 2023, PyTorch FSDP):
    ddp     every rank has the whole model and a share of the batch; gradients are summed
    fsdp    also weights, gradients and optimizer state are shared out by rows; a layer is whole only while it computes
The objective is a sum over the batch's tokens divided by their number in the *global* batch, so gradients are added
over ranks and never averaged: a rank with fewer scored tokens than another weighs less, as in one process.
"""

import math
import os
import warnings
import zlib
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from console import UserError

# FSDP2, DTensor and DCP are imported where they are used: a second of start-up that a pull on one process does without.
STATE_BYTES = 16  # of a parameter in training: weight, gradient and two moments in float32
DDP_SHARE = 0.4  # of a GPU's memory that this may take before it is shared out; activations need the rest


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files, speaks to W&B and prints."""
        return self.rank == 0

    def share(self, n_sequences: int) -> slice:
        """This rank's sequences of a global batch; shares differ by one at most. Raises UserError for an empty one."""
        if n_sequences < self.world:
            raise UserError(f"--batch_tokens: {n_sequences} sequences are too few for {self.world} ranks: start fewer")
        return slice(n_sequences * self.rank // self.world, n_sequences * (self.rank + 1) // self.world)

    def micro_batches(self, ids: Tensor, targets: Tensor, largest: int, n_global: int) -> list[tuple[Tensor, Tensor]]:
        """A rank's share (pulls, sequences, length) of `n_global` sequences, in parts of at most `largest` sequences.

        Every rank has as many parts, since under fsdp each is a collective of all. One that would be empty gets a
        sequence without targets, which adds nothing to any sum.
        """
        parts = math.ceil(math.ceil(n_global / self.world) / largest)
        if ids.size(1) < parts:
            ids = torch.cat((ids, ids[:, :1]), 1)
            targets = torch.cat((targets, torch.full_like(targets[:, :1], -1)), 1)
        return list(zip(ids.tensor_split(parts, 1), targets.tensor_split(parts, 1), strict=True))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over ranks, in place and everywhere."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def part(self) -> None:
        """End together: once one process is gone with a code other than 0, torchrun kills the others."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

    def see_the_same(self, what: str, seen: str) -> None:
        """Raises UserError on every rank when `seen` differs between them: they must share the folder of `what`."""
        mine = torch.tensor([zlib.crc32(seen.encode())], device=self.device)
        of_first = mine.clone()
        if self.world > 1:
            dist.broadcast(of_first, 0)
        if self.sum_((mine != of_first).float()):
            raise UserError(f"{what}: ranks see different checkpoints there; all need the same, shared folder")


ALONE = Ranks()


def start(device: str) -> Ranks:
    """Join torchrun's other processes, if it started this one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(device=device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo also on GPUs: checkpoints are gathered on the CPU, beside the training.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return Ranks(dist.get_rank(), world, device)


def choose(sharding: Literal["auto", "ddp", "fsdp"], ranks: Ranks, n_params: int, pulls: int) -> Literal["ddp", "fsdp"]:
    """auto: fsdp where a model's training state would crowd a GPU. Raises UserError for fsdp with several pulls."""
    if sharding == "auto":
        memory = torch.cuda.get_device_properties().total_memory if ranks.device == "cuda" else math.inf
        sharding = "fsdp" if pulls == 1 and ranks.world > 1 and STATE_BYTES * n_params > DDP_SHARE * memory else "ddp"
    if sharding == "fsdp" and pulls > 1:
        raise UserError(f"--sharding fsdp: shares one model out, not {pulls} pulls; use --sharding ddp, or one pull")
    return sharding


def wrap(model: nn.Module, layers: nn.ModuleList, sharding: Literal["ddp", "fsdp"], ranks: Ranks) -> nn.Module:
    """`model` such that its forward pass is this rank's part of a collective one, and its gradients are summed.

    Give it a model on the CPU: fsdp moves a layer at a time, so that a GPU never holds all of it.
    """
    if ranks.world == 1:
        return model.to(ranks.device)
    if sharding == "ddp":
        with warnings.catch_warnings():  # torch 2.13 renames the argument
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(model.to(ranks.device), broadcast_buffers=False)
        wrapped.register_comm_hook(None, _sum_bucket)
        return wrapped
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = dist.device_mesh.init_device_mesh(ranks.device, (ranks.world,))
    for module in (*layers, model):
        # Also what is outside the layers: left whole, it would stay so after a validation, which has no backward pass.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("token_nll", "generate"):
        register_fsdp_forward_method(model, method)
    return model


def _sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's own reduction divides by the number of ranks."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def backward_of_part(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """Around the forward and backward pass of one micro-batch: ddp sends gradients with the `last` alone.

    fsdp sends each one's: kept until the last they would be those of the whole model, which fits on no rank.
    """
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext()


def as_on_first(tensor: Tensor) -> None:
    """Overwrite `tensor`, on the CPU, with rank 0's, for ranks that must go the same way."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)


def local(tensor: Tensor) -> Tensor:
    """The rows of `tensor` on this rank, sharing its memory; all of them unless fsdp shares them out."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of `tensor`: a collective under fsdp."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_rows(rows: int) -> slice:
    """Which of a matrix's `rows` fsdp gives this rank: as torch.chunk deals, the last ranks may get fewer or none."""
    each = math.ceil(rows / dist.get_world_size())
    return slice(min(rows, each * dist.get_rank()), min(rows, each * (dist.get_rank() + 1)))


def gathered(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of `parameters` on rank 0's CPU, and nothing on others; one at a time, for no GPU has room for all."""
    found = {}
    for name, parameter in parameters.items():
        full = whole(parameter.detach())
        if dist.get_rank() == 0:
            found[name] = full.cpu()
    return found


def gather_rows(part: Tensor, rows: int) -> Tensor:
    """(rows, columns) from every rank's `own_rows`."""
    each = math.ceil(rows / dist.get_world_size())
    padded = part.new_zeros(each, part.size(1))
    padded[: part.size(0)] = part
    gathered = part.new_empty(each * dist.get_world_size(), part.size(1))
    dist.all_gather_into_tensor(gathered, padded)
    return gathered[:rows]


class Shards(NamedTuple):
    """A training state that ranks are writing to `folder`: all of it is there when rank 0's future is done."""

    folder: Path
    written: Future

    def wait(self) -> None:
        """Raises the OSError of the rank whose disk is full, on every rank."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            self.written.result()
        except CheckpointException as error:
            raise next((e for e, _ in error.failures.values() if isinstance(e, OSError)), error) from error


def save_shards(tensors: dict[str, Tensor], parameters: dict[str, Tensor], folder: Path) -> Shards:
    """Begin to write every rank's rows of the optimizer state.

    `tensors` from `checkpoint.training_tensors`, copied before this returns; `parameters` are the model's. Written as
    safetensors, since DCP's own format is a pickle. The ranks confer in a group of their own, beside the training.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    state = {key: _spread(tensor, parameters.get(_parameter(key))) for key, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    written = async_save(state, storage_writer=writer, process_group=_saving_group())
    assert isinstance(written, Future)
    return Shards(folder, written)


def load_shards(folder: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows, or all where `parameters` are whole, of the training state that any ranks wrote to `folder`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    state = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        if not key.startswith("rng.") and "/" not in key:
            continue  # a weight, in a folder that has these too
        assert isinstance(entry, TensorStorageMetadata)
        like = parameters.get(_parameter(key))
        if like is not None and like.shape == entry.size:
            state[key] = _spread(torch.empty_like(local(like)), like)
        else:
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():  # that each rank reads for itself
        warnings.simplefilter("ignore", UserWarning)
        load(state, storage_reader=reader, no_dist=True)
    return {key: local(tensor) for key, tensor in state.items()}


def _parameter(key: str) -> str:
    """`index of the optimizer/parameter/field`: the parameter."""
    return key.partition("/")[2].rpartition("/")[0]


def _spread(rows: Tensor, like: Tensor | None) -> Tensor:
    """This rank's `rows` as a part of a tensor that is shared out as `like` is; itself if that is not, or not alike."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor) or rows.shape != like.to_local().shape:
        return rows
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


@cache
def _saving_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")
